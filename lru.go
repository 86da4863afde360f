// The read-through cache: least recently used, one TTL for all, bounded in keys and in bytes.
//
// Its one lock decides for each key: a hit, a flight to join, or a flight to begin. A flight is the
// promise of a value. The cache is made with the function that queues flights; finish ends each,
// and forget keeps those whose key has changed from being stored or joined. Two lists hold every
// entry, one in the order of use, one in the order of filling: as the TTL is the same for all, the
// second is also the order of expiry, but for entries that end early.
package main

import (
	"cmp"
	"container/list"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// entryOverhead is what an entry costs beside its key and its value, in bytes: two list
	// elements, the entry, its slot in the map. BenchmarkCacheMemory measures it.
	entryOverhead = 233
	// refreshPause is the least time between two refreshes of an entry: the first may have failed.
	refreshPause = 100 * time.Millisecond
	// maxLate is how many entries put looks past to place a late reply in the order of filling. If
	// that is not enough, the entry may be dropped late, by as long as the reply was late.
	maxLate = 1000
	// aheadBytes bounds the values that one request has asked for and not yet taken, by the size
	// that values had lately. At least one value is asked for.
	aheadBytes = 512 << 10
)

// cacheSettings are what the flags say about the cache.
type cacheSettings struct {
	maxKeys  int
	maxBytes int64
	ttl      time.Duration // of every entry, from the moment Redis was asked
	stale    time.Duration // how long after its TTL an entry may answer while Redis cannot
	absent   time.Duration // how long "no such key" is kept; 0: it is not
	refresh  time.Duration // a hit in the last so much of an entry's life has it fetched anew; 0: none does
	timeout  time.Duration // how long a request waits for Redis
}

// A cache maps keys to values, and has those that it lacks fetched. It is safe for concurrent use.
type cache struct {
	cacheSettings
	started time.Time
	enqueue func([]*flight) // queues flights that have begun, and must not block; finish ends each of them
	typical atomic.Int64    // bytes of a key and its value, as of late; 0 before the first

	mu      sync.Mutex // guards the following, and the fields of flights that say so; no other lock is taken under it
	entries map[string]*entry
	flights map[string]*flight // those that may be joined, at most one for a key
	used    list.List          // of *entry, the most recently read or filled in front
	filled  list.List          // of *entry, the one that Redis was asked for last in front
	bytes   int64

	evictions, expirations int64 // entries that have left the cache
}

// An entry is a value in the cache, and its place in both lists.
type entry struct {
	value
	used, filled *list.Element
	refreshed    time.Duration // when a flight to refresh it began last
}

func (e *entry) size() int64 { return int64(len(e.data)+len(e.header)) + entryOverhead }

// live reports whether an entry is there and may answer.
func (e *entry) live(now time.Duration) bool { return e != nil && now < e.expires }

// answer is the answer of a live entry.
func (e *entry) answer() (a answer) {
	if a.value = e.value; e.absent() {
		a.err = errAbsent
	}
	return a
}

// A value is what Redis had for a key at one moment. Its data is a string, because the cache and
// all its readers share it and must not write to it.
type value struct {
	data    string        // the key, then the value as a bulk string of RESP, in one allocation
	keyLen  int           // how much of data is the key
	fetched time.Duration // when Redis was asked, on the cache's clock
	expires time.Duration // when it may not answer any more; 0: finish sets it to the end of the TTL
	header  string        // what HTTP says about the value; empty until the cache's annotate
}

// newValue returns what Redis had for a key; nil: nothing, and data is the key alone.
func newValue(key string, val []byte, fetched time.Duration) value {
	data := key
	if val != nil {
		data = key + "$" + strconv.Itoa(len(val)) + "\r\n" + string(val) + "\r\n"
	}
	return value{data: data, keyLen: len(key), fetched: fetched}
}

func (v value) absent() bool { return len(v.data) == v.keyLen }
func (v value) key() string  { return v.data[:v.keyLen] }
func (v value) bulk() string { return v.data[v.keyLen:] }

// content returns the value without its RESP frame.
func (v value) content() string {
	b := v.bulk()
	return b[strings.IndexByte(b, '\n')+1 : len(b)-2]
}

// A flight is a GET that has begun and not yet ended. Requests for the key join it, until the key
// changes or it is too old.
type flight struct {
	key   string
	began time.Duration // on the cache's clock

	until atomic.Int64  // when the last waiter gives up; it is set under the cache's lock, which guards the next three
	older *flight       // the flight that this one replaced for the key; it may still be under way
	dirty bool          // the key changed meanwhile: the reply must not be stored
	done  chan struct{} // nil until a request waits; closed when finished

	finished atomic.Bool // set after the following, which do not change any more
	value
	err    error
	stored bool // in the cache

	// The following are the pool's. Only the worker that carries the flight out touches them.
	tried  bool   // a connection broke under it once
	asking string // the address of the node that it is to ask, and that knows its slot only by ASKING
	hops   int    // how often it was sent elsewhere, or here again
}

// wanted reports whether a request will still wait for f at a time.
func (f *flight) wanted(at time.Duration) bool { return at < time.Duration(f.until.Load()) }

// spoil keeps the replies to f, which may be nil, and to older flights for its key out of the
// cache. It needs the cache's lock.
func (f *flight) spoil() {
	for ; f != nil; f = f.older {
		f.dirty = true
	}
}

// What can be wrong with an answer. An error reply of Redis wraps errWrongType or errRefused and
// has Redis' own words.
var (
	errAbsent      = errors.New("no such key")
	errWrongType   = errors.New("the key holds another type than a string")
	errUnavailable = errors.New("upstream unavailable")
	errTimeout     = errors.New("upstream timed out")
	errRefused     = errors.New("upstream refused")
	errCrowded     = errors.New("too many large values on their way")
)

// isOutage reports whether an error says nothing about the key: Redis could not answer.
func isOutage(err error) bool {
	return err != nil && err != errAbsent && !errors.Is(err, errWrongType)
}

// An answer is a value or an error for a key, and where it comes from.
type answer struct {
	value
	err     error // nil, or one of the above
	source  source
	expired bool    // the cache held the key, past its TTL
	flight  *flight // that was waited for; nil for a hit
}

// A source is where an answer comes from.
type source uint8

const (
	fromCache   source = iota
	fromRedis          // this request began the flight
	fromAnother        // another request had begun it
	fromStale          // the cache, past the TTL, because Redis cannot answer
)

// What an answer counts as in the statistics, and the names in the metrics: the sources in their
// order, and why there is no value.
const hit, miss, collapsed, stale, absent, absentHit, failed = 0, 1, 2, 3, 4, 5, 6

var outcomes = [...]string{"hit", "miss", "collapsed", "stale", "absent", "absent_hit", "error"}

func (a *answer) outcome() int {
	switch {
	case a.err == nil:
		return int(a.source)
	case a.err != errAbsent:
		return failed
	case a.source == fromCache:
		return absentHit
	}
	return absent
}

// A tally counts answers by their outcome. It is safe for concurrent use.
type tally [len(outcomes)]atomic.Int64

func (t *tally) add(answers []answer) {
	var n [len(outcomes)]int64
	for i := range answers {
		n[answers[i].outcome()]++
	}
	for o := range n {
		if n[o] > 0 {
			t[o].Add(n[o])
		}
	}
}

func newCache(s cacheSettings, enqueue func([]*flight)) *cache {
	return &cache{cacheSettings: s, started: time.Now(), enqueue: enqueue,
		entries: make(map[string]*entry), flights: make(map[string]*flight)}
}

// now is the cache's clock: the time since it was made, which no change of the wall clock moves.
func (c *cache) now() time.Duration { return time.Since(c.started) }

// get answers keys to a request that waits since the given time: the flights for all keys begin
// before the first is waited for. It may stop early, to bound the memory of values that the client
// has not read yet. It returns how many keys it answered, from the first on, at least one. It does
// not keep the keys. len(answers) must be len(keys).
func (c *cache) get(since time.Duration, keys [][]byte, answers []answer) int {
	n := c.decide(since, keys, answers)
	c.wait(since, keys, answers[:n])
	return n
}

// getHeld answers a key, and has hold count its value. If there is no room for it, hold returns
// what is closed when there may be: getHeld then lets go of the value, waits as long as it would
// for Redis, and asks again.
func (c *cache) getHeld(t *tally, key []byte, hold func(string, int) (full <-chan struct{})) answer {
	keys, answers, late := [1][]byte{key}, [1]answer{}, c.now()+c.timeout
	c.get(c.now(), keys[:], answers[:])
	for full := hold(answers[0].data, 0); full != nil; full = hold(answers[0].data, 0) {
		answers[0] = answer{err: errCrowded}
		select {
		case <-full:
			c.get(c.now(), keys[:], answers[:])
		case <-time.After(late - c.now()):
		}
	}
	t.add(answers[:])
	return answers[0]
}

// decide answers keys that the cache holds, and gives each of the others a flight. It returns how
// many keys it handled.
func (c *cache) decide(since time.Duration, keys [][]byte, answers []answer) (n int) {
	var begun []*flight
	now, used := c.now(), make([]*list.Element, 0, 32)
	c.mu.Lock()
	ahead, typical := aheadBytes, cmp.Or(int(c.typical.Load()), aheadBytes)
	for i, key := range keys {
		e := c.entries[string(key)]
		size := typical
		if e.live(now) {
			size = len(e.data)
		}
		if ahead -= size; i > 0 && ahead < 0 {
			break
		}
		n++
		if !e.live(now) {
			f, source := c.flights[string(key)], fromAnother
			if f == nil || now >= f.began+min(c.timeout, c.ttl) { // it may bring what is past the TTL, or come too late
				f, source = c.begin(string(key), f, now, 0), fromRedis
				begun = append(begun, f)
			}
			f.until.Store(max(f.until.Load(), int64(since+c.timeout)))
			answers[i] = answer{source: source, expired: e != nil, flight: f}
			continue
		}
		answers[i] = e.answer()
		if used = append(used, e.used); len(used) == cap(used) {
			used = c.use(used)
		}
		if c.dueForRefresh(e, now) {
			e.refreshed = now
			begun = append(begun, c.begin(string(key), nil, now, now+c.timeout))
		}
	}
	c.use(used)
	c.mu.Unlock()
	if len(begun) > 0 {
		c.enqueue(begun)
	}
	return n
}

// lookAgain replaces the answers to keys by what the cache holds now, all at one moment: live
// entries, and for an outage entries that are past the TTL by less than the stale time.
func (c *cache) lookAgain(keys [][]byte, answers []answer) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, key := range keys {
		switch e := c.entries[string(key)]; {
		case e.live(now):
			answers[i] = e.answer()
		case e != nil && isOutage(answers[i].err) && !c.useless(e, now):
			answers[i] = answer{value: e.value, source: fromStale, expired: true}
		}
	}
}

// wait completes answers. It begins with the last: replies come in the order of the questions, so
// that a request for many keys is woken once.
func (c *cache) wait(since time.Duration, keys [][]byte, answers []answer) {
	var late <-chan struct{} // closed when the time is over
	for i := len(answers) - 1; i >= 0; i-- {
		a := &answers[i]
		if a.flight == nil {
			continue
		}
		if late == nil {
			over := make(chan struct{})
			defer time.AfterFunc(since+c.timeout-c.now(), func() { close(over) }).Stop()
			late = over
		}
		if a.err = errTimeout; c.await(a.flight, late) {
			a.value, a.err = a.flight.value, a.flight.err
		}
		if c.stale > 0 && isOutage(a.err) {
			c.lookAgain(keys[i:i+1], answers[i:i+1])
		}
	}
}

// await waits until a flight ends or late is closed, and reports whether the flight ended.
func (c *cache) await(f *flight, late <-chan struct{}) bool {
	if f.finished.Load() { // of a pipeline, only the last is waited for
		return true
	}
	c.mu.Lock()
	if f.done == nil {
		f.done = make(chan struct{})
	}
	c.mu.Unlock()
	if !f.finished.Load() {
		select {
		case <-f.done:
		case <-late:
		}
	}
	return f.finished.Load()
}

// finish ends a flight with what Redis had, and stores that unless the key changed meanwhile. The
// entry is there before a waiter learns of it.
//
// finish and forget together close this race, in which an old value would stay in the cache until
// its TTL:
//
//	1: a request begins a flight; Redis reads the old value for it
//	2: a writer changes the key; Redis reports it
//	3: the report arrives: forget drops the entry, which is not there yet, and spoils the flight
//	4: the reply to 1 arrives: finish gives it to those who asked before 3, and does not store it
//	5: a request asks after 3: forget has taken the flight off the map, so it begins a new one
//
// 3 and 4 are one step each under the same lock. If 4 comes before 3, forget drops the entry.
func (c *cache) finish(f *flight, v value, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finishLocked(f, v, err)
}

// abandon ends a flight unless a request waits for it, and reports whether it did.
func (c *cache) abandon(f *flight, now time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.wanted(now) { // a request has joined it just now
		return false
	}
	c.finishLocked(f, value{}, errTimeout)
	return true
}

func (c *cache) finishLocked(f *flight, v value, err error) {
	if c.flights[f.key] == f { // else a report of a change, or a newer flight, has taken its place
		delete(c.flights, f.key)
		size := int64(len(f.key) + len(v.data))
		if !isOutage(err) && !c.typical.CompareAndSwap(0, size) && err == nil {
			c.typical.Add((size - c.typical.Load()) / 16)
		}
	}
	f.older.spoil() // it must not replace what is newer
	f.older = nil
	limit := v.fetched + c.ttl
	if err == errAbsent {
		limit = v.fetched + c.absent
	}
	v.expires = min(limit, cmp.Or(v.expires, limit))
	switch {
	case f.dirty: // those who wait get v, the cache does not
	case err == nil || err == errAbsent && c.absent > 0:
		f.stored = c.put(c.now(), v)
	case !isOutage(err):
		c.drop(c.now(), c.entries[f.key]) // another type, or absent and not kept: an outage must not serve what was
	}
	f.value, f.err = v, err
	f.finished.Store(true)
	if f.done != nil {
		close(f.done)
	}
}

// forget drops keys, all of them if keys is nil, because they changed in Redis. What is in flight
// for them may have been read before: it still goes to those who wait for it, is not stored, and is
// not joined any more. See finish.
func (c *cache) forget(keys [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range keys {
		c.flights[string(key)].spoil()
		delete(c.flights, string(key))
		c.drop(c.now(), c.entries[string(key)])
	}
	if keys == nil {
		for _, f := range c.flights {
			f.spoil()
		}
		clear(c.flights)
		clear(c.entries)
		c.used.Init()
		c.filled.Init()
		c.bytes = 0
	}
}

// annotate keeps v's header with the entry, if the entry's value is still v.
func (c *cache) annotate(v value) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[v.key()]; e != nil && e.header == "" && e.data == v.data { // which is quick for the same string
		e.header = v.header
		c.bytes += int64(len(v.header))
		c.shrink(c.now())
	}
}

// figures reports what the cache holds, expired entries included, and what has left it.
func (c *cache) figures() []figure {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys := len(c.entries)
	return []figure{
		{"Memory", "maxmemory", "cache_bytes_max", "Most bytes in the cache.", c.maxBytes},
		{"Memory", "maxmemory_policy", "", "", "allkeys-lru"},
		{"Stats", "evicted_keys", "evictions_total", "Entries that made room for others.", c.evictions},
		{"Stats", "expired_keys", "expirations_total", "Entries dropped after their TTL.", c.expirations},
		{"", "", "cache_keys_max", "Most entries in the cache.", c.maxKeys},
		{"Cache", "cache_keys", "cache_keys", "Entries in the cache, expired ones included.", keys},
		{"Cache", "cache_bytes", "cache_bytes", "Bytes of keys, values and bookkeeping in the cache.", c.bytes},
		{"Keyspace", "db0", "", "", "keys=" + strconv.Itoa(keys) + ",expires=" + strconv.Itoa(keys) + ",avg_ttl=0"},
	}
}

// The cache's functions that follow need the lock.

// use counts uses, in their order, and returns es emptied, for reuse. Many at once are quicker:
// each waits for memory, and not for the one before.
func (c *cache) use(es []*list.Element) (none []*list.Element) {
	for _, e := range es {
		c.used.MoveToFront(e)
	}
	return es[:0]
}

// begin makes a flight that is to be carried out, beside the one that is in flight for the key.
func (c *cache) begin(key string, older *flight, now, until time.Duration) *flight {
	f := &flight{key: key, began: now, older: older}
	f.until.Store(int64(until))
	c.flights[key] = f
	return f
}

// dueForRefresh reports whether a live entry is near enough to its end to be fetched anew. Where a
// life is short, its second half is.
func (c *cache) dueForRefresh(e *entry, now time.Duration) bool {
	return c.refresh > 0 && now >= e.expires-min(c.refresh, (e.expires-e.fetched)/2) &&
		c.flights[e.key()] == nil && (e.refreshed == 0 || now >= e.refreshed+refreshPause)
}

// put stores v in place of what its key had, unless it is larger than the limit of bytes.
func (c *cache) put(now time.Duration, v value) (stored bool) {
	c.drop(now, c.entries[v.key()]) // whole: the map's key is part of the old value
	e := &entry{value: v}
	if e.size() > c.maxBytes {
		return false
	}
	e.used, e.filled = c.used.PushFront(e), c.filled.PushFront(e)
	// The place of a reply that was long on its way is behind those that were asked for after it.
	next := e.filled.Next()
	for n := 0; n < maxLate && next != nil && next.Value.(*entry).fetched > v.fetched; n++ {
		c.filled.MoveAfter(e.filled, next)
		next = e.filled.Next()
	}
	c.entries[v.key()] = e
	c.bytes += e.size()
	c.shrink(now)
	return true
}

// shrink drops useless entries, a few at a time so that no put takes long, and then as many as the
// limits ask: expired ones first, then the least recently used.
func (c *cache) shrink(now time.Duration) {
	const few = 4
	for n := 0; len(c.entries) > 0; n++ {
		oldest := c.filled.Back().Value.(*entry)
		over := len(c.entries) > c.maxKeys || c.bytes > c.maxBytes
		switch {
		case over && !oldest.live(now) || n < few && c.useless(oldest, now):
			c.drop(now, oldest)
		case over:
			c.drop(now, c.used.Back().Value.(*entry))
			c.evictions++
		default:
			return
		}
	}
}

// drop drops an entry, if there is one.
func (c *cache) drop(now time.Duration, e *entry) {
	if e == nil {
		return
	}
	if !e.live(now) {
		c.expirations++
	}
	c.used.Remove(e.used)
	c.filled.Remove(e.filled)
	delete(c.entries, e.key())
	c.bytes -= e.size()
}

// useless reports whether an entry may not even answer in an outage. An absence may not, nor one
// that ended before the TTL, with its key.
func (c *cache) useless(e *entry, now time.Duration) bool {
	return !e.live(now) && (e.absent() || e.expires < e.fetched+c.ttl || now >= e.expires+c.stale)
}

// A figure is what a part reports about itself: in INFO, in the metrics, or in both.
type figure struct {
	section, name string // in INFO; no name: not there
	metric, help  string // in the metrics; no metric: not there. A counter's name ends in _total
	value         any
}

// A histogram counts durations by how long they are.
type histogram struct {
	counts [len(bounds)]int64 // up to each bound
	sum    time.Duration
}

// bounds are those of histograms, in seconds.
var bounds = [...]float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, math.Inf(1)}

func (h *histogram) add(d time.Duration) {
	i, _ := slices.BinarySearch(bounds[:], d.Seconds())
	h.counts[i]++
	h.sum += d
}
