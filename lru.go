// The cache: least recently used, one TTL for all, bounded in keys and in bytes.
//
// Two lists hold every entry, one in the order of use, one in the order of filling. As the TTL is the
// same for all, the second is also the order of expiry: what has expired is at its back.
package main

import (
	"container/list"
	"sync"
	"time"
)

// entryOverhead is what an entry costs beside its key and its value, in bytes: two list elements, the
// entry, its slot in the map. BenchmarkCacheMemory measures it.
const entryOverhead = 200

// maxLate bounds how far a late reply is moved back. Behind more than these, its expiry may be noticed as
// much too late as the reply was.
const maxLate = 1000

// A cache maps keys to values. It is safe for concurrent use.
type cache struct {
	maxKeys  int
	maxBytes int64
	ttl      time.Duration
	stale    time.Duration // how long after its TTL an entry may be of use

	mu      sync.Mutex // guards the following
	entries map[string]*entry
	used    list.List // of *entry, the most recently read or filled in front
	filled  list.List // of *entry, the most recently filled in front
	bytes   int64
	cacheCounts
}

// cacheCounts says what became of entries since the start, other than being there still.
type cacheCounts struct {
	evictions, expirations int64
}

type entry struct {
	value
	used, filled *list.Element
}

func (e *entry) size() int64 { return int64(len(e.data)) + entryOverhead }

func newCache(maxKeys int, maxBytes int64, ttl, stale time.Duration) *cache {
	return &cache{maxKeys: maxKeys, maxBytes: maxBytes, ttl: ttl, stale: stale, entries: make(map[string]*entry)}
}

// get completes the answers to keys that the cache holds, and returns how many it does not: their source
// is Redis, and their value the expired one if that may be of use. It does not keep the keys.
func (c *cache) get(now time.Duration, keys [][]byte, answers []answer) (misses int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, key := range keys {
		e := c.entries[string(key)]
		switch {
		case e == nil:
			answers[i] = answer{source: fromRedis}
			misses++
		case c.expired(e, now):
			answers[i] = answer{source: fromRedis, expired: true}
			if !c.useless(e, now) {
				answers[i].value = e.value
			}
			misses++
		default:
			c.used.MoveToFront(e.used)
			answers[i] = answer{value: e.value}
		}
	}
	return misses
}

// put stores v in place of what its key had. It does not keep what is larger than the limit of bytes.
func (c *cache) put(now time.Duration, v value) (stored bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[v.key()]; e != nil {
		c.drop(now, e) // whole: the map's key is part of the old value
	}
	e := &entry{value: v}
	if e.size() > c.maxBytes {
		return false
	}
	e.used, e.filled = c.used.PushFront(e), c.filled.PushFront(e)
	// A reply that was long on its way belongs behind those that were asked for after it.
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

// shrink drops what is of no use any more, a few at a time so that no put takes long, and then as much
// as the limits ask: what has expired first, then what was used least recently.
func (c *cache) shrink(now time.Duration) {
	const few = 4
	for n := 0; len(c.entries) > 0; n++ {
		oldest := c.filled.Back().Value.(*entry)
		over := len(c.entries) > c.maxKeys || c.bytes > c.maxBytes
		switch {
		case over && c.expired(oldest, now) || n < few && c.useless(oldest, now):
			c.drop(now, oldest)
		case over:
			c.drop(now, c.used.Back().Value.(*entry))
			c.evictions++
		default:
			return
		}
	}
}

// remove drops a key, if it is there.
func (c *cache) remove(now time.Duration, key []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[string(key)]; e != nil {
		c.drop(now, e)
	}
}

// clear drops all keys.
func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.entries)
	c.used.Init()
	c.filled.Init()
	c.bytes = 0
}

// usage tells what the cache holds, expired entries included, and what became of the rest.
func (c *cache) usage() (keys int, bytes int64, counts cacheCounts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries), c.bytes, c.cacheCounts
}

func (c *cache) expired(e *entry, now time.Duration) bool { return now-e.fetched >= c.ttl }
func (c *cache) useless(e *entry, now time.Duration) bool { return now-e.fetched >= c.ttl+c.stale }

// drop needs the lock.
func (c *cache) drop(now time.Duration, e *entry) {
	if c.expired(e, now) {
		c.expirations++
	}
	c.used.Remove(e.used)
	c.filled.Remove(e.filled)
	delete(c.entries, e.key())
	c.bytes -= e.size()
}
