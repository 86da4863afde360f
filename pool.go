// Redis: in-flight fetches, and the bounded pool of connections that carries them out in batches.
//
// Only this file knows redigo. A fetch is registered before its GET is sent, and there is at most one
// for a key whose reply may be stored. Waiting is the business of those who asked: a fetch itself ends
// with the reply, or with the connection.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// maxPipeline bounds the GETs in one batch.
	maxPipeline = 256
	// maxQueue bounds the fetches that wait for a connection. Who comes later is told that Redis is too
	// slow, which is then true.
	maxQueue = 1 << 16
	// maxQueueBytes bounds their keys.
	maxQueueBytes = 64 << 20
	// grace is how much longer than anybody waits a connection may take for a reply: it still fills
	// the cache.
	grace = time.Second
	// pingEvery is how often the tracking connection is tried.
	pingEvery = 2 * time.Second
)

// A pool fetches keys from Redis. It is safe for concurrent use.
type pool struct {
	store   store
	now     func() time.Duration
	log     *slog.Logger
	timeout time.Duration // how long those who ask for a fetch wait
	shared  time.Duration // how long others may join it: what it brings must not be older than the TTL

	conns *redis.Pool
	slots chan struct{} // holds an element for each connection in use

	stopTracking func()       // stops the tracker and waits for it
	tracked      atomic.Int32 // a trackingState

	mu         sync.Mutex // guards the following, and older, dirty and done of a fetch
	flights    map[string]*fetch
	queue      []*fetch      // waiting for a worker
	queueBytes int           // of their keys
	coming     bool          // a worker is about to take the queue
	broke      time.Time     // when a connection last did; others that have been idle since before may be dead
	success    time.Duration // the last, on the proxy's clock
	failure    time.Duration // the first since then, if it was logged, or 0
	warned     time.Time     // when a failure was logged last
	refusal    time.Time     // when a refusal was
	typical    int           // bytes of a key and its value, as of late; 0 before the first
	poolCounts
}

// poolCounts says what became of fetches since the start.
type poolCounts struct {
	fetches, batches, errors, invalidations int64

	latencies  [len(latencyBounds) + 1]int64 // of batches; how many took up to each bound, or longer
	latencySum time.Duration
}

var latencyBounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

func newPool(cfg config, s store, now func() time.Duration, log *slog.Logger) *pool {
	p := &pool{store: s, now: now, log: log, timeout: cfg.redisTimeout, shared: min(cfg.redisTimeout, cfg.cacheTimeout),
		slots: make(chan struct{}, cfg.clientLimit), flights: make(map[string]*fetch), stopTracking: func() {}}
	dial := dialer(context.Background(), cfg.redis, cfg.redisTimeout, cfg.redisTimeout+grace)
	p.conns = &redis.Pool{
		MaxIdle: cfg.clientLimit,
		Dial: func() (redis.Conn, error) {
			c, err := dial()
			return upstream{c}, err
		},
		TestOnBorrow: func(_ redis.Conn, idleSince time.Time) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if idleSince.Before(p.broke) {
				return errors.New("a connection of the same age was dead")
			}
			return nil
		},
	}
	if cfg.tracking {
		p.tracked.Store(int32(trackingDown))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.track(ctx, dialer(ctx, cfg.redis, cfg.redisTimeout, cfg.redisTimeout+pingEvery))
		}()
		p.stopTracking = func() { cancel(); <-done }
	}
	return p
}

// dialer makes connections that are given up when they take longer to make than timeout, or when ctx is
// done meanwhile, and when a read or write takes longer than patience.
func dialer(ctx context.Context, to redisAddress, timeout, patience time.Duration) func() (redis.Conn, error) {
	return func() (redis.Conn, error) {
		return redis.DialContext(ctx, "tcp", to.address(),
			redis.DialContextFunc(func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, network, addr)
				return wire{c, patience}, err
			}),
			redis.DialTLSHandshakeTimeout(timeout), redis.DialUseTLS(to.tls),
			redis.DialUsername(to.user), redis.DialPassword(to.password), redis.DialDatabase(to.db))
	}
}

// An upstream is a connection on which every reply is one to GET.
type upstream struct{ redis.Conn }

// Receive reads a reply: bytes, nil or an error. Anything else breaks the connection, as the replies
// after it might be taken for those of other keys.
func (u upstream) Receive() (reply any, err error) {
	defer func() {
		if r := recover(); r != nil { // redigo allocates whatever length a reply states
			reply, err = nil, fmt.Errorf("reading a reply: %v", r)
		}
		if _, isReply := err.(redis.Error); err != nil && !isReply {
			u.Conn.Close()
		}
	}()
	reply, err = u.Conn.Receive()
	switch reply.(type) {
	case nil, []byte:
		return reply, err
	}
	return nil, fmt.Errorf("GET was answered by a %T", reply)
}

// A wire is a connection whose every read and write has a deadline. It replaces redigo's own timeouts,
// which cost two system clock readings and timer changes for each GET, not for each batch.
type wire struct {
	net.Conn
	timeout time.Duration
}

func (w wire) Read(p []byte) (int, error) {
	w.Conn.SetReadDeadline(time.Now().Add(w.timeout))
	return w.Conn.Read(p)
}

func (w wire) Write(p []byte) (int, error) {
	w.Conn.SetWriteDeadline(time.Now().Add(w.timeout))
	return w.Conn.Write(p)
}

func (wire) SetReadDeadline(time.Time) error  { return nil }
func (wire) SetWriteDeadline(time.Time) error { return nil }

// close drops the idle connections; those in use go when their batch ends.
func (p *pool) close() {
	p.stopTracking()
	p.conns.Close()
}

// fetch has those keys fetched whose answers are not complete: it joins a fetch in flight, or queues
// a new one. What is fetched is held until a client has taken it, and there may be many clients: it returns how
// many of the keys, from the first on, it has seen to, one at least.
func (p *pool) fetch(now time.Duration, keys [][]byte, answers []answer) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.startLocked()
	ahead := 1
	if p.typical > 0 {
		ahead = max(1, aheadBytes/p.typical)
	}
	for i, key := range keys {
		a, f := &answers[i], p.flights[string(key)]
		if a.source != fromRedis {
			continue
		}
		if ahead--; ahead < 0 {
			return i
		}
		switch {
		case f != nil && now < f.asked+p.shared:
			a.source, a.fetch = fromAnother, f
		case p.store.get(now, keys[i:i+1], answers[i:i+1]) == 0: // a fetch has ended since the cache was asked
		case len(p.queue) >= maxQueue || p.queueBytes+len(key) > maxQueueBytes:
			a.err = errTimeout
		default:
			a.fetch = &fetch{key: string(key), asked: now, older: f}
			p.flights[a.fetch.key] = a.fetch
			p.queue = append(p.queue, a.fetch)
			p.queueBytes += len(key)
		}
	}
	return len(keys)
}

// wait tells whether a fetch is done before it is too late.
func (p *pool) wait(f *fetch, late <-chan time.Time) bool {
	if f.finished.Load() {
		return true
	}
	p.mu.Lock()
	if f.finished.Load() {
		p.mu.Unlock()
		return true
	}
	if f.done == nil { // of a pipeline, only the last is waited for
		f.done = make(chan struct{})
	}
	p.mu.Unlock()
	select {
	case <-f.done:
		return true
	case <-late:
		return f.finished.Load()
	}
}

// startLocked has the queue worked on, unless somebody is on the way to it. If no slot is free, those who
// hold the slots will come to it.
func (p *pool) startLocked() {
	if len(p.queue) == 0 || p.coming {
		return
	}
	select {
	case p.slots <- struct{}{}:
		p.coming = true
		go p.work() // ends when the queue is empty
	default:
	}
}

// work owns a slot. It carries out what is queued until nothing is.
func (p *pool) work() {
	for more := true; more; {
		runtime.Gosched() // all who are about to ask do so first, and share a round trip
		more = p.batch()
	}
	<-p.slots
	p.mu.Lock()
	defer p.mu.Unlock()
	p.startLocked() // who queued since the last look at the queue may have found no slot
}

// take removes from the queue at most as much as fits a pipeline.
func (p *pool) take() []*fetch {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.coming = false
	fs := slices.Clone(p.queue[:min(len(p.queue), maxPipeline)])
	p.queue = slices.Delete(p.queue, 0, len(fs))
	for _, f := range fs {
		p.queueBytes -= len(f.key)
	}
	if len(fs) > 0 {
		p.fetches += int64(len(fs))
		p.batches++
	}
	return fs
}

// batch takes a connection, and then all that has been queued meanwhile, and completes it. It returns
// whether there was anything.
//
// If the connection breaks, the rest is tried once more on another: it may have died while it was
// idle, and GET does no harm twice. So is all where the connection could not be made, but another was
// meanwhile.
func (p *pool) batch() bool {
	began := p.now()
	conn := p.conns.Get()
	defer func() { conn.Close() }()
	fs := p.take()
	if len(fs) == 0 {
		return false
	}
	made := conn.Err() == nil
	rest, err := p.exchange(conn, fs)
	if err != nil && p.broken(made, began) && rest[len(rest)-1].asked >= p.now()-2*p.timeout {
		conn.Close()
		conn = p.conns.Get()
		rest, err = p.exchange(conn, rest)
	}
	if err != nil {
		p.fail(rest, began, err)
	} else {
		p.worked(began)
	}
	return true
}

// broken takes note of a connection that broke, or could not be made since it began, and tells whether
// another may do.
func (p *pool) broken(made bool, began time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if made {
		p.broke = time.Now()
	}
	return made || p.success > began
}

// exchange sends a GET for each fetch and completes it with the reply. It lets go of those that it
// completed, and returns the rest.
func (p *pool) exchange(conn redis.Conn, fs []*fetch) (rest []*fetch, err error) {
	sent := p.now()
	for _, f := range fs {
		if err := conn.Send("GET", f.key); err != nil {
			return fs, err
		}
	}
	if err := conn.Flush(); err != nil {
		return fs, err
	}
	for i, f := range fs {
		reply, err := conn.Receive()
		refusal, isReply := err.(redis.Error)
		switch val, found := reply.([]byte); {
		case found:
			p.finish(f, newValue(f.key, val, sent), nil)
		case err == nil:
			p.finish(f, value{}, errAbsent)
		case isReply:
			p.finish(f, value{}, p.refused(refusal))
		default:
			return fs[i:], err
		}
		fs[i] = nil
	}
	return nil, nil
}

// finish completes a fetch. It is stored before anybody who waits learns of it, and before anybody can
// start another for the same key.
func (p *pool) finish(f *fetch, v value, err error) {
	f.value, f.err = v, err
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.flights[f.key] == f {
		delete(p.flights, f.key)
	}
	f.older.spoil() // it must not replace what is newer
	f.older = nil
	now := p.now()
	switch size := len(f.key) + len(v.data); {
	case isOutage(err):
	case p.typical == 0:
		p.typical = size
	case err == nil:
		p.typical += (size - p.typical) / 16
	}
	switch {
	case err == nil:
		f.stored = !f.dirty && p.store.put(now, v)
	case !f.dirty && !isOutage(err):
		p.store.remove(now, []byte(f.key)) // or it might be answered once more, as stale
	}
	if !isOutage(err) {
		p.success = now
	}
	f.finished.Store(true)
	if f.done != nil {
		close(f.done)
	}
}

// fail completes fetches that brought nothing. It logs the first failure after a success, and not every
// second one where the two alternate: what began before a success says nothing of the time after it.
func (p *pool) fail(fs []*fetch, began time.Duration, err error) {
	p.mu.Lock()
	p.errors += int64(len(fs))
	first := p.failure == 0 && began >= p.success && time.Since(p.warned) > time.Second
	if first {
		p.failure, p.warned = p.now(), time.Now()
	}
	p.mu.Unlock()
	if first {
		p.log.Warn("Redis cannot be read; hits go on", "error", err)
	}
	var refusal redis.Error
	var network net.Error
	switch {
	case errors.As(err, &refusal):
		err = replyError(upstreamRefused + string(refusal))
	case errors.As(err, &network) && network.Timeout():
		err = errTimeout
	default:
		err = errUnavailable
	}
	for _, f := range fs {
		p.finish(f, value{}, err)
	}
}

// worked takes note of a batch that has ended, and logs the first success after a failure.
func (p *pool) worked(began time.Duration) {
	p.mu.Lock()
	took, i := p.now()-began, 0
	for i < len(latencyBounds) && took > latencyBounds[i] {
		i++
	}
	p.latencies[i]++
	p.latencySum += took
	failure := p.failure
	again := failure > 0 && p.success > failure
	if again {
		p.failure = 0
	}
	p.mu.Unlock()
	if again {
		p.log.Info("Redis can be read again", "after", (p.now() - failure).Round(time.Millisecond).String())
	}
}

// refused is an error reply as it is passed on. What concerns the proxy's own standing with Redis is
// marked, so that a client does not take it for its own. What is not about the key is logged once a minute.
func (p *pool) refused(reply redis.Error) replyError {
	err := replyError(reply)
	concerns := func(code string) bool { return strings.HasPrefix(string(reply), code) }
	if slices.ContainsFunc([]string{"NOAUTH ", "NOPERM ", "WRONGPASS ", "DENIED ", "MOVED ", "ASK ", "ERR max number of clients"}, concerns) {
		err = upstreamRefused + err
	}
	if err.wrongType() {
		return err
	}
	p.mu.Lock()
	p.errors++
	first := time.Since(p.refusal) > time.Minute
	if first {
		p.refusal = time.Now()
	}
	p.mu.Unlock()
	if first {
		p.log.Warn("Redis refuses", "error", reply)
	}
	return err
}

// track has Redis tell of every key that changes, and drops it from the store, until ctx is done. It
// only sharpens the TTL: while the connection is down, entries live on by that.
func (p *pool) track(ctx context.Context, dial func() (redis.Conn, error)) {
	pause, told := time.Duration(0), false
	for ctx.Err() == nil {
		err := p.follow(ctx, dial)
		if p.tracked.Swap(int32(trackingDown)) == int32(trackingLive) {
			pause, told = 0, false
		}
		if !told && ctx.Err() == nil {
			p.log.Warn("tracking is down; entries live until their TTL", "error", err)
			told = true
		}
		pause = min(max(2*pause, 50*time.Millisecond), 5*time.Second)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow tracks over one connection, until that breaks. The connection redirects to itself: Redis
// reports changes only to RESP3 clients or to subscribers, and redigo speaks RESP2.
func (p *pool) follow(ctx context.Context, dial func() (redis.Conn, error)) (err error) {
	defer func() {
		if r := recover(); r != nil { // redigo allocates whatever length a reply states
			err = fmt.Errorf("reading a report: %v", r)
		}
	}()
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	id, err := redis.Int64(c.Do("CLIENT", "ID"))
	if err != nil {
		return err
	}
	if _, err := c.Do("CLIENT", "TRACKING", "ON", "REDIRECT", id, "BCAST"); err != nil {
		return err
	}
	if err := errors.Join(c.Send("SUBSCRIBE", "__redis__:invalidate"), c.Flush()); err != nil {
		return err
	}
	if _, err := c.Receive(); err != nil {
		return err
	}
	p.forget(nil, 0) // whatever has changed until now was not reported
	p.tracked.Store(int32(trackingLive))
	p.log.Info("tracking is live")

	stop, stopped := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-stopped }()
	go func() { // ends when stop is closed
		defer close(stopped)
		ping(c, stop)
	}()
	for {
		msg, err := redis.Values(c.Receive())
		if err != nil {
			return err
		}
		if len(msg) == 3 { // a report; a PING is answered by two
			keys, err := redis.ByteSlices(msg[2], nil)
			if err != nil && err != redis.ErrNil {
				return err
			}
			p.forget(keys, max(len(keys), 1))
		}
	}
}

// ping has a dead peer show by not answering.
func ping(c redis.Conn, stop <-chan struct{}) {
	for tick := time.Tick(pingEvery); ; {
		select {
		case <-stop:
			return
		case <-tick:
			if errors.Join(c.Send("PING"), c.Flush()) != nil {
				return // Receive fails too
			}
		}
	}
}

// forget drops keys from the store, all if keys is nil; Redis reported so many changes. What is in flight
// for them may have been read before they changed: it goes to those who wait for it, is not stored, and nobody
// joins it any more. All this is one step under the lock under which finish stores: whichever of the two comes
// first, the old value is not there afterwards.
func (p *pool) forget(keys [][]byte, reported int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.invalidations += int64(reported)
	for _, key := range keys {
		p.flights[string(key)].spoil()
		delete(p.flights, string(key))
		p.store.remove(p.now(), key)
	}
	if keys == nil {
		for _, f := range p.flights {
			f.spoil()
		}
		clear(p.flights)
		p.store.clear()
	}
}

// spoil needs the pool's lock.
func (f *fetch) spoil() {
	for ; f != nil; f = f.older {
		f.dirty = true
	}
}

// usage tells how many connections are open, how many of them are in use, and the counts.
func (p *pool) usage() (open, used int, counts poolCounts) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conns.ActiveCount(), len(p.slots), p.poolCounts
}
