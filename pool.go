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
	"os"
	"runtime"
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

	node *node // with Redis Cluster: one for each master, chosen by the key's slot

	stopTracking func()       // stops the tracker and waits for it
	tracked      atomic.Int32 // a trackingState

	mu      sync.Mutex // guards the following, the node's queue and dirty of a fetch
	flights map[string]*fetch
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

// A node is one Redis server.
type node struct {
	conns      *redis.Pool
	slots      chan struct{} // holds an element for each connection in use
	queue      []*fetch      // waiting for a connection; the pool's lock guards it and coming
	coming     bool          // a worker is about to take the queue
	queueBytes int           // of the keys in the queue

	suspect atomic.Int64 // unix nanoseconds; connections idle since before may be dead
	success atomic.Int64 // unix nanoseconds of the last success
	failure atomic.Int64 // unix nanoseconds of the first failure since then, or 0
}

func newPool(cfg config, s store, now func() time.Duration, log *slog.Logger) *pool {
	dial := dialer(context.Background(), cfg.redis, cfg.redisTimeout, cfg.redisTimeout+grace)
	n := &node{slots: make(chan struct{}, cfg.clientLimit)}
	n.conns = &redis.Pool{
		MaxIdle: cfg.clientLimit,
		Dial: func() (redis.Conn, error) {
			c, err := dial()
			return upstream{c}, err
		},
		TestOnBorrow: func(_ redis.Conn, idleSince time.Time) error {
			if idleSince.UnixNano() < n.suspect.Load() {
				return errors.New("a connection of the same age was dead")
			}
			return nil
		},
	}
	p := &pool{store: s, now: now, log: log, timeout: cfg.redisTimeout, shared: min(cfg.redisTimeout, cfg.cacheTimeout), node: n,
		flights: make(map[string]*fetch), stopTracking: func() {}}
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

// dialer makes connections that are given up when they take longer to make than timeout, when a read or
// write takes longer than patience, or when ctx is done.
func dialer(ctx context.Context, to redisAddress, timeout, patience time.Duration) func() (redis.Conn, error) {
	return func() (redis.Conn, error) {
		return redis.Dial("tcp", to.address(),
			redis.DialNetDial(func(network, addr string) (net.Conn, error) {
				c, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				return wire{c, patience, context.AfterFunc(ctx, func() { c.Close() })}, nil
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
	unwatch func() bool
}

func (w wire) Close() error {
	w.unwatch()
	return w.Conn.Close()
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
	p.node.conns.Close()
}

// fetch has those keys fetched whose answers are not complete: it joins a fetch in flight, or queues
// a new one.
func (p *pool) fetch(now time.Duration, keys [][]byte, answers []answer) {
	p.mu.Lock()
	for i := range answers {
		if answers[i].source == fromRedis {
			p.fetchLocked(now, keys[i:i+1], answers[i:i+1])
		}
	}
	p.startLocked(p.node)
	p.mu.Unlock()
}

// fetchLocked has one key fetched. Key and answer come as slices of length 1.
func (p *pool) fetchLocked(now time.Duration, key [][]byte, as []answer) {
	a, f := &as[0], p.flights[string(key[0])]
	if f != nil && now < f.asked+p.shared {
		a.source, a.fetch = fromAnother, f
		return
	}
	if p.store.get(now, key, as) == 0 {
		return // a fetch has ended since the cache was asked
	}
	if len(p.node.queue) >= maxQueue || p.node.queueBytes+len(key[0]) > maxQueueBytes {
		a.err = errTimeout
		return
	}
	f = &fetch{key: string(key[0]), asked: now, done: make(chan struct{}), older: f}
	p.flights[f.key] = f
	p.node.queue = append(p.node.queue, f)
	p.node.queueBytes += len(f.key)
	a.fetch = f
}

// startLocked has the queue worked on, unless somebody is on the way to it. If no slot is free, those who
// hold the slots will come to it.
func (p *pool) startLocked(n *node) {
	if len(n.queue) == 0 || n.coming {
		return
	}
	select {
	case n.slots <- struct{}{}:
		n.coming = true
		go p.work(n) // ends when the queue is empty
	default:
	}
}

// work owns a slot. It carries out what is queued until nothing is.
func (p *pool) work(n *node) {
	var fs []*fetch
	for {
		runtime.Gosched() // all who are about to ask do so first, and share a round trip
		fs = p.batch(n, fs[:0])
		if len(fs) == 0 {
			break
		}
		clear(fs)
	}
	<-n.slots
	p.mu.Lock()
	defer p.mu.Unlock()
	p.startLocked(n) // who queued since the last look at the queue may have found no slot
}

// take moves what is queued to fs, at most as much as fits a pipeline.
func (p *pool) take(n *node, fs []*fetch) []*fetch {
	p.mu.Lock()
	defer p.mu.Unlock()
	n.coming = false
	fs = append(fs, n.queue[:min(len(n.queue), maxPipeline)]...)
	rest := copy(n.queue, n.queue[len(fs):])
	clear(n.queue[rest:])
	n.queue = n.queue[:rest]
	for _, f := range fs {
		n.queueBytes -= len(f.key)
	}
	if len(fs) > 0 {
		p.fetches += int64(len(fs))
		p.batches++
	}
	return fs
}

// batch takes a connection, and then all that has been queued meanwhile. It returns that, completed.
//
// If the connection breaks, the rest is tried once more on another: it may have died while it was
// idle, and GET does no harm twice.
func (p *pool) batch(n *node, fs []*fetch) []*fetch {
	conn := n.conns.Get()
	fs = p.take(n, fs)
	rest, began := fs, time.Now()
	for retried := false; len(rest) > 0; retried = true {
		err := conn.Err()
		dialled := err == nil
		if dialled {
			var done int
			done, err = p.exchange(conn, rest)
			rest = rest[done:]
		}
		if err == nil {
			n.worked(p.log)
			p.observe(time.Since(began))
			break
		}
		if dialled {
			n.suspect.Store(began.UnixNano())
		}
		if late := p.now() - 2*p.timeout; retried || !dialled || rest[len(rest)-1].asked < late {
			n.failed(p.log, began, err)
			p.fail(rest, err)
			break
		}
		conn.Close()
		conn = n.conns.Get()
	}
	conn.Close()
	return fs
}

// exchange sends a GET for each fetch and completes it with the reply. It returns how many it completed.
func (p *pool) exchange(conn redis.Conn, fs []*fetch) (done int, err error) {
	sent := p.now()
	for _, f := range fs {
		if err := conn.Send("GET", f.key); err != nil {
			return 0, err
		}
	}
	if err := conn.Flush(); err != nil {
		return 0, err
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
			p.finish(f, value{}, refused(refusal))
		default:
			return i, err
		}
	}
	return len(fs), nil
}

// finish completes a fetch. It is stored before anybody who waits learns of it, and before anybody can
// start another for the same key.
func (p *pool) finish(f *fetch, v value, err error) {
	f.value, f.err = v, err
	p.mu.Lock()
	if p.flights[f.key] == f {
		delete(p.flights, f.key)
	}
	f.older.spoil() // it must not replace what is newer
	f.older = nil
	switch {
	case f.dirty:
	case err == nil:
		f.stored = p.store.put(p.now(), v)
	case !isOutage(err):
		p.store.remove([]byte(f.key)) // or it might be answered once more, as stale
	}
	p.mu.Unlock()
	close(f.done)
}

// fail completes fetches that brought nothing.
func (p *pool) fail(fs []*fetch, err error) {
	p.mu.Lock()
	p.errors += int64(len(fs))
	p.mu.Unlock()
	var refusal redis.Error
	switch {
	case errors.As(err, &refusal):
		err = replyError("ERR upstream refused: " + refusal)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = errTimeout
	default:
		err = errUnavailable
	}
	for _, f := range fs {
		p.finish(f, value{}, err)
	}
}

// track has Redis tell of every key that changes, and drops it from the store, until ctx is done. It
// only sharpens the TTL: while the connection is down, entries live on by that.
func (p *pool) track(ctx context.Context, dial func() (redis.Conn, error)) {
	pause, told := time.Duration(0), false
	for ctx.Err() == nil {
		err := p.follow(dial)
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
func (p *pool) follow(dial func() (redis.Conn, error)) (err error) {
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
	p.forget(nil) // whatever has changed until now was not reported
	p.tracked.Store(int32(trackingLive))
	p.log.Info("tracking is live")

	stop, stopped := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-stopped }()
	go func() { // a dead peer shows by not answering
		defer close(stopped)
		for tick := time.NewTicker(pingEvery); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
				if errors.Join(c.Send("PING"), c.Flush()) != nil {
					return // Receive fails too
				}
			}
		}
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
			p.forget(keys)
		}
	}
}

// forget drops keys from the store; all if there are none. What is in flight for them may have been read
// before they changed: it goes to those who wait for it, is not stored, and nobody joins it any more.
// All this is one step under the lock under which finish stores: whichever of the two comes first,
// the old value is not there afterwards.
func (p *pool) forget(keys [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.invalidations += int64(len(keys))
	for _, key := range keys {
		p.flights[string(key)].spoil()
		delete(p.flights, string(key))
		p.store.remove(key)
	}
	if keys == nil {
		p.invalidations++
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

// observe counts the time that a batch took.
func (p *pool) observe(d time.Duration) {
	i := 0
	for i < len(latencyBounds) && d > latencyBounds[i] {
		i++
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latencies[i]++
	p.latencySum += d
}

// usage tells how many connections are open, how many of them are in use, and the counts.
func (p *pool) usage() (open, used int, counts poolCounts) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.node.conns.ActiveCount(), len(p.node.slots), p.poolCounts
}

// failed and worked log the first failure and the first success after it. A batch that began before a
// success says nothing of the time after it.
func (n *node) failed(log *slog.Logger, began time.Time, err error) {
	if began.UnixNano() >= n.success.Load() && n.failure.CompareAndSwap(0, time.Now().UnixNano()) {
		log.Warn("Redis cannot be read; hits go on", "error", err)
	}
}

func (n *node) worked(log *slog.Logger) {
	n.success.Store(time.Now().UnixNano())
	if since := n.failure.Swap(0); since != 0 {
		log.Info("Redis can be read again", "after", time.Since(time.Unix(0, since)).Round(time.Millisecond))
	}
}

// refused is an error reply as it is passed on. What concerns the proxy's own standing with Redis is
// marked, so that a client does not take it for its own.
func refused(reply redis.Error) replyError {
	for _, code := range []string{"NOAUTH ", "NOPERM ", "WRONGPASS ", "DENIED ", "MOVED ", "ASK ", "ERR max number of clients"} {
		if strings.HasPrefix(string(reply), code) {
			return replyError("ERR upstream refused: " + string(reply))
		}
	}
	return replyError(reply)
}
