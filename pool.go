// Redis: its nodes with their bounded connections, batches of GETs, health, and invalidation.
//
// Only this file knows redigo. The cache begins flights; the pool queues them, carries them out in
// batches, and finishes each with the reply or with the failure of the connection. It waits for
// nobody: those who asked wait in the cache, and a late reply may still fill it.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// A batch has at most maxBatch GETs, and brings at most batchBytes by the size of recent
	// values.
	maxBatch   = 1 << 12
	batchBytes = 1 << 20
	// maxQueue bounds the flights that wait for a node, and maxQueueBytes the keys of those of all
	// nodes. More of them end with errTimeout at once: they would not be carried out in time.
	maxQueue      = 1 << 16
	maxQueueBytes = 64 << 20
	// grace is how much longer than a request a connection waits: the reply still fills the cache.
	grace = time.Second
	// maxReply bounds a value as Redis does (proto-max-bulk-len), and maxElements an array.
	maxReply    = 512 << 20
	maxElements = 1 << 20
	// anyReply has the first bytes of all replies, and as many * as arrays may be nested.
	anyReply = "-+:$****"
	// slots is into how many parts a cluster divides the keys. Each has an owner.
	slots = 1 << 14
	// Servers are asked who owns what at hints and ticks, at most once in learnPause. The tick of a
	// cluster is twice that while batches fail, and for a clusterTick more. Each server has
	// askTimeout to connect and for each reply, and twice that in all.
	learnPause   = 250 * time.Millisecond
	sentinelTick = time.Second
	clusterTick  = 10 * time.Second
	askTimeout   = 500 * time.Millisecond
	// maxHops bounds how often a flight goes elsewhere when a connection breaks.
	maxHops = 10
	// retryPause is the longest pause before a flight is tried again, and the first of a tracker.
	retryPause = 50 * time.Millisecond
	// pingEvery is how long a tracking connection may be silent before it is tried.
	pingEvery = 2 * time.Second
)

// poolSettings are what the flags say about Redis.
type poolSettings struct {
	redis    redisAddress
	tls      *tls.Config   // for redis.tls; nil: the system's roots
	timeout  time.Duration // how long a request waits for Redis in all
	limit    int           // connections in use at once to each node
	keyTTL   bool          // an entry ends when its key does
	tracking bool
}

// A redisAddress says how to reach the backing Redis.
type redisAddress struct {
	hosts          string // host:port of a Redis, of nodes of a cluster or of sentinels, with commas between them
	user, password string
	db             int
	tls            bool

	master                         string // the name that sentinels know it by; none: hosts are not sentinels
	sentinelUser, sentinelPassword string
}

// isHost reports whether s is an IP address or may be a host name.
func isHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil || s != "" && !strings.ContainsAny(s, ":/[]@ ?")
}

// A pool carries flights out. It is safe for concurrent use.
type pool struct {
	poolSettings
	cache      *cache
	log        *slog.Logger
	ctx        context.Context // done when the pool is closed
	stop       context.CancelFunc
	running    sync.WaitGroup  // watch and the trackers
	several    atomic.Bool     // false: a single Redis, which is sent nothing that only clusters and sentinels know
	servers    []string        // that the URL names: Redis, nodes of a cluster, or sentinels
	hints      chan string     // it is time to learn, perhaps from the server at this address
	learnt     context.Context // done when the pool has tried once to learn who owns the keys
	markLearnt context.CancelFunc
	failed     atomic.Int64 // when a batch last did, on the cache's clock
	learnErr   atomic.Value // why a server did not say who owns the keys, a string

	flights, batches, errors, redirects, refreshes, invalidations atomic.Int64 // see figures

	// mu guards the following, and fields of nodes. The cache's lock may be taken under it.
	mu         sync.Mutex
	latency    histogram        // of batches
	nodes      map[string]*node // by address
	owners     []*node          // of each slot, or whoever may know
	queueBytes int              // of the keys of all flights that are queued
}

func newPool(s poolSettings, c *cache, log *slog.Logger) *pool {
	p := &pool{poolSettings: s, cache: c, log: log, hints: make(chan string, 1),
		nodes: make(map[string]*node), servers: strings.Split(s.redis.hosts, ",")}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.learnt, p.markLearnt = context.WithCancel(p.ctx)
	p.several.Store(s.redis.master != "" || len(p.servers) > 1)
	first := p.nodeLocked(cmp.Or(s.redis.master, p.servers[0]))
	first.owns, first.master = slots, true
	p.owners = slices.Repeat([]*node{first}, slots)
	p.hint("")
	p.running.Go(p.watch) // ends with close
	return p
}

// close drops all connections.
func (p *pool) close() {
	p.mu.Lock()
	p.stop()
	p.mu.Unlock()
	p.running.Wait()
}

// nodeLocked returns the node with this address.
func (p *pool) nodeLocked(addr string) *node {
	if n := p.nodes[addr]; n != nil {
		return n
	}
	n := &node{pool: p, addr: addr, log: p.log.With("node", addr)}
	p.nodes[addr] = n
	n.ctx, n.stop = context.WithCancel(p.ctx)
	dial := func() (redis.Conn, error) { return n.dial() }
	n.conns = &redis.Pool{MaxIdle: p.limit, Dial: dial, TestOnBorrow: n.test}
	if p.tracking && addr != p.redis.master && p.ctx.Err() == nil {
		p.running.Go(n.track) // ends when the node is closed
	}
	return n
}

// routeLocked returns the node that is to carry out a flight.
func (p *pool) routeLocked(f *flight) *node {
	if f.asking != "" {
		return p.nodeLocked(f.asking)
	}
	if !p.several.Load() {
		return p.owners[0]
	}
	return p.owners[slot(f.key)]
}

// slot returns the slot of a key: CRC16 (XMODEM) of its hash tag, if it has one, or of all of it.
func slot(key string) int {
	if _, rest, ok := strings.Cut(key, "{"); ok {
		if tag, _, ok := strings.Cut(rest, "}"); ok && tag != "" {
			key = tag
		}
	}
	var crc uint16
	for _, b := range []byte(key) {
		x := crc>>8 ^ uint16(b)
		x ^= x >> 4
		crc = crc<<8 ^ x<<12 ^ x<<5 ^ x
	}
	return int(crc % slots)
}

// resolve returns what the server at from means by an address: its own host and port where they are
// missing, and none where it does not know.
func resolve(from, addr string) string {
	ownHost, ownPort, _ := net.SplitHostPort(from)
	colon := strings.LastIndexByte(addr, ':')
	host, port := cmp.Or(addr[:max(colon, 0)], ownHost), addr[colon+1:]
	if port == "0" {
		port = ownPort
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || !isHost(host) {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// enqueue queues flights, each at its node, whose workers carry them out. It does not block.
func (p *pool) enqueue(fs []*flight) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range fs {
		n := p.routeLocked(f)
		if len(n.queue) >= maxQueue || p.queueBytes+len(f.key) > maxQueueBytes {
			p.cache.finish(f, value{}, errTimeout)
			continue
		}
		n.queue = append(n.queue, f)
		p.queueBytes += len(f.key)
		n.startLocked()
	}
}

// probe connects once, for the log. No request waits for it.
func (p *pool) probe() { p.enqueue([]*flight{{dirty: true}}) }

// ready reports whether Redis answers, by a flight like any other, for a key that nobody has. That
// Redis does not let the proxy read this key is an answer.
func (p *pool) ready() bool {
	f := &flight{key: fmt.Sprint("redis_proxy:ready:", p.cache.started.UnixNano()), dirty: true}
	f.until.Store(int64(p.cache.now() + p.timeout))
	p.enqueue([]*flight{f})
	a := [1]answer{{flight: f}}
	p.cache.wait(p.cache.now(), [][]byte{[]byte(f.key)}, a[:])
	rest, forbidden := strings.CutPrefix(fmt.Sprint(a[0].err), upstreamRefused+"NOPERM ")
	return !isOutage(a[0].err) || forbidden && strings.Contains(rest, " key")
}

// figures reports the connections and what became of flights.
func (p *pool) figures() []figure {
	p.mu.Lock()
	defer p.mu.Unlock()
	connections, used, down, tracking := 0, 0, 0, 0
	if p.tracking {
		tracking = 2
	}
	for _, n := range p.nodes {
		connections += n.conns.ActiveCount()
		used += n.busy
		if n.owns > 0 && n.down() {
			down++
		}
		if n.owns > 0 && p.tracking && !n.tracked.Load() {
			tracking = 1
		}
	}
	return []figure{
		{"Cache", "upstream_connections", "upstream_connections", "Connections to Redis.", connections},
		{"Cache", "upstream_connections_used", "upstream_connections_used", "Connections to Redis in use.", used},
		{"Cache", "upstream_fetches", "upstream_fetches_total", "GETs taken up by a connection.", p.flights.Load()},
		{"Cache", "upstream_batches", "upstream_batches_total", "Pipelines of them.", p.batches.Load()},
		{"Cache", "upstream_errors", "upstream_errors_total", "GETs without an answer about the key.", p.errors.Load()},
		{"Cache", "upstream_nodes", "upstream_nodes", "Nodes of Redis that are known.", len(p.nodes)},
		{"Cache", "upstream_nodes_down", "upstream_nodes_down", "Owners of keys that cannot be read.", down},
		{"Cache", "upstream_refreshes", "upstream_refreshes_total", "Rounds of asking for owners.", p.refreshes.Load()},
		{"Cache", "upstream_redirects", "upstream_redirects_total", "GETs that a node redirected.", p.redirects.Load()},
		{"Cache", "tracking", "", "", [...]string{"off", "down", "live"}[tracking]},
		{"", "", "tracking", "Whether Redis reports changes: 0 is off, 1 down, 2 live.", tracking},
		{"Cache", "tracking_invalidations", "invalidations_total", "Changes reported.", p.invalidations.Load()},
		{"", "", "upstream_seconds", "Time from taking up a batch to its last reply, connecting included.", p.latency},
	}
}

// hint has watch learn soon, from the server at an address if that is one. It does not block.
func (p *pool) hint(addr string) {
	select {
	case p.hints <- addr:
	default:
	}
}

// watch learns who owns which keys, at hints and now and then, once at a time.
func (p *pool) watch() {
	for {
		hint, wait, failed := "", clusterTick, p.failed.Load()
		if p.redis.master != "" {
			wait = sentinelTick
		} else if failed > 0 && p.cache.now()-time.Duration(failed) < clusterTick {
			wait = 2 * learnPause
		}
		select {
		case <-p.ctx.Done():
			return
		case hint = <-p.hints:
		case <-time.After(wait - learnPause):
		}
		if p.several.Load() {
			p.refreshes.Add(1)
			p.learn(hint)
			p.settle()
		}
		p.markLearnt()
		select {
		case <-p.ctx.Done():
		case <-time.After(learnPause):
		}
	}
}

// learn asks one server after the other who owns which keys, until one knows: sentinels, the one
// that knew last first; or the node at hint, the owners and the nodes that the URL names. Those
// that are down come last.
func (p *pool) learn(hint string) {
	addrs := p.servers
	if p.redis.master == "" {
		addrs = append([]string{hint}, addrs...)
		p.mu.Lock()
		for addr, n := range p.nodes {
			if n.owns > 0 {
				addrs = slices.Insert(addrs, 1, addr)
			}
		}
		isDown := func(addr string) bool { return p.nodes[addr] != nil && p.nodes[addr].down() }
		up := slices.DeleteFunc(slices.Clone(addrs[1:]), isDown)
		addrs = slices.Concat(addrs[:1], up, addrs[1:])
		p.mu.Unlock()
	}
	for i, addr := range addrs {
		if addr == "" || slices.Contains(addrs[:i], addr) {
			continue
		}
		err := p.ask(addr)
		if err == nil {
			addrs[0], addrs[i] = addr, addrs[0]
			return
		}
		p.learnErr.Store(err.Error())
	}
}

// ask learns from the server at an address, over a connection of its own.
func (p *pool) ask(addr string) error {
	ctx, cancel := context.WithTimeout(p.ctx, 2*askTimeout)
	defer cancel()
	u, err := p.dial(ctx, addr, askTimeout, p.redis.master != "")
	if err != nil {
		return err
	}
	defer u.Close()
	if p.redis.master == "" {
		rows, err := redis.Values(u.Do("CLUSTER", "SLOTS"))
		return cmp.Or(err, p.adopt(addr, rows))
	}
	master, err := redis.Values(u.Do("SENTINEL", "get-master-addr-by-name", p.redis.master))
	return cmp.Or(err, p.adopt(addr, []any{[]any{int64(0), int64(slots - 1), master}}))
}

// adopt takes the owners of slots over from an answer to CLUSTER SLOTS. Slots that it does not name
// keep theirs. It returns an error if it names none.
func (p *pool) adopt(from string, rows []any) error {
	err := errors.New("it names nobody")
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, row := range rows {
		var first, last, port int
		var host string
		var owner []any
		span, _ := redis.Values(row, nil)
		_, errSpan := redis.Scan(span, &first, &last, &owner)
		_, errOwner := redis.Scan(owner, &host, &port)
		addr := resolve(from, host+":"+strconv.Itoa(port))
		if errSpan != nil || errOwner != nil || addr == "" || first < 0 || last >= slots {
			continue
		}
		n := p.nodeLocked(addr)
		for i := first; i <= last; i++ {
			p.giveLocked(i, n)
		}
		err = nil
	}
	if err == nil && p.redis.master != "" && p.owners[0].down() {
		err = errors.New("it names a master that cannot be read") // another sentinel may know more
	}
	return err
}

// giveLocked makes a node the owner of a slot.
func (p *pool) giveLocked(slot int, n *node) {
	p.owners[slot].owns--
	p.owners[slot] = n
	n.owns++
}

// settle follows a change of the owners: it closes nodes that own nothing any more, or never did,
// unless they were named lately. Their connections break, and what they carried or queued goes to
// the owners of today.
func (p *pool) settle() {
	var owners []string
	changed, untracked := false, false
	p.mu.Lock()
	for addr, n := range p.nodes {
		if n.owns > 0 {
			owners = append(owners, addr)
		} else if n.master || time.Since(n.named) > clusterTick {
			untracked = untracked || n.tracked.Load()
			delete(p.nodes, addr)
			n.stop()
		}
		changed = changed || n.master != (n.owns > 0)
		n.master = n.owns > 0
	}
	p.mu.Unlock()
	if untracked { // what came from there is in the cache, and its changes are not reported any more
		p.cache.forget(nil)
	}
	if changed {
		slices.Sort(owners)
		p.log.Info("other nodes own the keys now", "nodes", strings.Join(owners, " "))
	}
}

// A node is one Redis server, the connections to it, and the flights that wait for one of them.
type node struct {
	pool    *pool
	addr    string // or the name that sentinels know it by, before they have answered
	log     *slog.Logger
	ctx     context.Context // done when the node is closed, which closes its connections
	stop    context.CancelFunc
	conns   *redis.Pool
	tracked atomic.Bool // its changes are reported

	// When a connection last broke, a reply last was no outage, and failures and refusals were last
	// logged, on the cache's clock; 0: never. Connections idle since before the first may be dead.
	broke, answered, warned, refused atomic.Int64

	// The pool's lock guards the following.
	queue  []*flight
	busy   int       // workers, each with a connection
	coming bool      // one of them is about to take the queue
	named  time.Time // when MOVED or ASK last did
	owns   int       // slots
	master bool      // it owned some when settle looked last
}

// down reports whether the node has failed since it last answered.
func (n *node) down() bool { return n.warned.Load() > n.answered.Load() }

// due reports whether the last time is longer ago than a pause, or never, and makes it now.
func due(last *atomic.Int64, now, pause time.Duration) bool {
	before := last.Load()
	return (before == 0 || now-time.Duration(before) > pause) && last.CompareAndSwap(before, int64(now))
}

// dial makes a connection, after the first attempt to learn who owns the keys.
func (n *node) dial() (*upstream, error) {
	p := n.pool
	<-p.learnt.Done()
	if n.addr == p.redis.master {
		return nil, fmt.Errorf("no sentinel names the master %q: %v", n.addr, p.learnErr.Load())
	}
	return p.dial(n.ctx, n.addr, p.timeout+grace, false)
}

// test returns an error if an idle connection may be dead, or if there is anything to read on it,
// which would be taken for the reply to the next command.
func (n *node) test(c redis.Conn, idleSince time.Time) error {
	u := c.(*upstream)
	usable := u.in.Buffered() == 0 && n.pool.cache.now()-time.Since(idleSince) > time.Duration(n.broke.Load())
	u.raw.Control(func(fd uintptr) {
		_, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		usable = usable && err == syscall.EAGAIN
	})
	if !usable {
		return errOutOfStep
	}
	return nil
}

var errOutOfStep = errors.New("the connection is dead, or has more replies than questions")

// startLocked starts a worker for the queue, unless one is on its way to it. If too many are busy,
// the first that ends does.
func (n *node) startLocked() {
	if len(n.queue) > 0 && !n.coming && n.busy < n.pool.limit {
		n.coming = true
		n.busy++
		go n.work() // ends when its batch does
	}
}

// work takes a connection, and then all that has been queued meanwhile, and carries it out.
func (n *node) work() {
	for range 3 {
		runtime.Gosched() // requests that are about to ask do so first, and share a round trip
	}
	p := n.pool
	began := p.cache.now()
	conn := n.conns.Get()
	self, err := conn.Do("")
	fs := n.take()
	rest := fs
	if u, made := self.(*upstream); made {
		if rest, err = n.exchange(u, fs); err != nil {
			n.broke.Store(int64(p.cache.now()))
		} else if len(fs) == 0 && p.redis.password == "" { // for the log: Redis may want a password
			_, err = u.Do("PING")
		}
	}
	conn.Close()
	if err != nil {
		n.broken(rest, err, began)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil && len(fs) > 0 {
		p.latency.add(p.cache.now() - began)
	}
	n.busy--
	if err == nil && n.conns.ActiveCount()-n.conns.IdleCount() == n.busy {
		n.coming = false // the worker that is coming makes a connection; the one of this worker is free
	}
	n.startLocked()
}

// take removes from the queue as much as fits a batch. It ends the flights that no request waits
// for any more, and returns the others.
func (n *node) take() []*flight {
	p := n.pool
	p.mu.Lock()
	most := min(maxBatch, max(1, batchBytes/max(1, int(p.cache.typical.Load()))))
	fs := slices.Clone(n.queue[:min(len(n.queue), most)])
	n.queue = slices.Delete(n.queue, 0, len(fs))
	for _, f := range fs {
		p.queueBytes -= len(f.key)
	}
	n.coming = false
	n.startLocked() // what does not fit is another worker's
	p.mu.Unlock()
	now := p.cache.now()
	fs = slices.DeleteFunc(fs, func(f *flight) bool { return !f.wanted(now) && p.cache.abandon(f, now) })
	p.batches.Add(int64(min(len(fs), 1)))
	p.flights.Add(int64(len(fs)))
	return fs
}

// broken takes the flights of a worker that started at began, and whose connection broke or could
// not be made. Those that a request waits for are tried again where another node is to be asked by
// now, and once at the same: the connection may have died while it was idle, and GET does no harm
// twice. The others end with err.
func (n *node) broken(fs []*flight, err error, began time.Duration) {
	p, now := n.pool, n.pool.cache.now()
	p.failed.Store(int64(now))
	var again, ended []*flight
	p.mu.Lock()
	for _, f := range fs {
		f.asking = ""
		if f.wanted(now) && (!f.tried || p.routeLocked(f) != n && f.hops < maxHops) {
			f.tried = true
			f.hops++
			again = append(again, f)
		} else {
			ended = append(ended, f)
		}
	}
	p.mu.Unlock()
	p.hint("")
	p.enqueue(again)
	p.errors.Add(int64(len(ended)))
	// If the node has answered since began, this failure is older than that.
	news := len(again) == 0 && n.ctx.Err() == nil && !n.down() && time.Duration(n.answered.Load()) <= began
	if news && due(&n.warned, now, time.Second) {
		n.log.Warn("Redis cannot be read; hits go on", "error", err)
	}
	for _, f := range ended {
		p.cache.finish(f, value{}, asAnswer(err, false))
	}
}

// exchange sends a GET for each flight and finishes it with the reply. It lets go of the flights
// that it finished, and returns the rest.
func (n *node) exchange(u *upstream, fs []*flight) (rest []*flight, err error) {
	p, answered := n.pool, false
	sent := p.cache.now()
	for _, f := range fs {
		u.send(f, "*2\r\n$3\r\nGET\r\n$")
		if p.keyTTL {
			u.send(f, "*2\r\n$4\r\nPTTL\r\n$")
		}
	}
	if err := u.out.Flush(); err != nil {
		u.Conn.Close()
		return fs, err
	}
	runtime.Gosched() // where there is other work, the replies are there after it
	for ; len(fs) > 0; fs = fs[1:] {
		f := fs[0]
		v, err := n.receive(u, f, sent)
		reply, isReply := err.(redis.Error)
		if err != nil && err != errAbsent && !isReply {
			return fs, err
		}
		fs[0] = nil
		if isReply && n.redirect(f, reply) {
			continue // another worker may have it
		}
		if isReply {
			err = asAnswer(reply, true)
		}
		if isOutage(err) {
			p.errors.Add(1)
			n.refuses(reply)
		} else if !answered {
			answered = true
			n.answers()
		}
		p.cache.finish(f, v, err)
	}
	return nil, nil
}

// answers notes a reply that was no outage, and logs the first after a failure.
func (n *node) answers() {
	now, warned := n.pool.cache.now(), n.warned.Load()
	if n.answered.Swap(int64(now)) < warned {
		n.log.Info("Redis can be read again", "after", (now - time.Duration(warned)).Round(time.Millisecond).String())
	}
}

// refuses notes an error reply that is not about a key, and logs one a minute. A node that loads its
// data, or is cut off from its cluster, is down, and another may own its keys by now.
func (n *node) refuses(reply redis.Error) {
	now := n.pool.cache.now()
	if strings.HasPrefix(string(reply), "LOADING ") || strings.HasPrefix(string(reply), "CLUSTERDOWN ") {
		if !n.down() {
			n.warned.Store(int64(now))
		}
		n.pool.hint("")
	}
	if due(&n.refused, now, time.Minute) {
		n.log.Warn("Redis refuses", "error", reply)
	}
}

// receive reads what Redis says about a key that it was asked for at the time sent.
func (n *node) receive(u *upstream, f *flight, sent time.Duration) (v value, err error) {
	reply, err := u.reply(f.asking != "", "-$")
	val, found := reply.([]byte)
	if v = newValue(f.key, val, sent); err == nil && !found {
		err = errAbsent
	}
	if n.pool.keyTTL {
		left, failure := redis.Int64(u.reply(f.asking != "", "-:"))
		if err = cmp.Or(err, failure); found && left != -1 { // -1: no expiry; -2: gone meanwhile
			most := int64(n.pool.cache.ttl / time.Millisecond) // a Duration does not hold every PTTL
			v.expires = sent + time.Duration(min(max(left, 0), most+1))*time.Millisecond
		}
	}
	return v, err
}

// redirect has a flight carried out where an error reply says, or later where it says that this may
// help. It reports whether it did; else the flight is to end with the reply. Nodes that name each
// other for ever are asked less and less often, until no request waits any more.
func (n *node) redirect(f *flight, reply redis.Error) bool {
	p := n.pool
	words := append(strings.Fields(string(reply)), "", "", "")
	code, addr, pause := words[0], resolve(n.addr, words[2]), retryPause
	mayPass := (code == "CLUSTERDOWN" || code == "TRYAGAIN") && f.wanted(p.cache.now()+pause)
	if code != "MOVED" && code != "ASK" && !mayPass {
		return false
	}
	if code == "CLUSTERDOWN" {
		n.refuses(reply)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.several.Store(true)
	f.asking = ""
	if addr != "" {
		to := p.nodeLocked(addr)
		to.named = time.Now()
		p.redirects.Add(1)
		pause = min(pause, time.Duration(f.hops*f.hops/2)*time.Millisecond)
		if code == "ASK" {
			f.asking = addr
		} else {
			p.giveLocked(slot(f.key), to)
			p.hint(n.addr)
		}
		if to == n { // it may be another server by now: connections that are in use are not used again
			n.broke.Store(int64(p.cache.now() + retryPause))
		}
	} else {
		p.hint("")
	}
	f.hops++
	time.AfterFunc(pause, func() { p.enqueue([]*flight{f}) })
	return true
}

// A replyError is an error reply as it is passed on to clients.
type replyError string

// upstreamRefused begins a replyError that is about the proxy and not about a key.
const upstreamRefused = "ERR upstream refused: "

func (e replyError) Error() string { return string(e) }

// Unwrap returns errWrongType or errRefused.
func (e replyError) Unwrap() error {
	if strings.HasPrefix(string(e), "WRONGTYPE ") {
		return errWrongType
	}
	return errRefused
}

// aboutProxy matches error replies to GET about the proxy's login, rights or routing, not the key.
var aboutProxy = regexp.MustCompile("^(NOAUTH|NOPERM|WRONGPASS|DENIED|MOVED|ASK|ERR max number of clients) ")

// asAnswer returns the answer to a request that failed with err. An error reply that is not to GET,
// or that is aboutProxy, is marked, so that a client does not take it for its own.
func asAnswer(err error, toGET bool) error {
	if reply, ok := errors.AsType[redis.Error](err); ok {
		if toGET && !aboutProxy.MatchString(string(reply)) {
			return replyError(reply)
		}
		return upstreamRefused + replyError(reply)
	}
	if network, ok := errors.AsType[net.Error](err); ok && network.Timeout() {
		return errTimeout
	}
	return errUnavailable
}

// An upstream is a connection that reads replies itself. redigo believes whatever length a reply
// states, and takes any reply for that to the command. It is not safe for concurrent use.
type upstream struct {
	redis.Conn
	wire    *wire
	in      *bufio.Reader
	out     *bufio.Writer   // of GETs; other commands go through redigo
	raw     syscall.RawConn // of the socket
	release func() bool     // its context
}

// dial makes a connection to Redis or to a sentinel, which is closed when ctx is done. It gives up
// when that takes longer than the timeout or than patience. A read or write on it fails after
// patience.
func (p *pool) dial(ctx context.Context, addr string, patience time.Duration, sentinel bool) (*upstream, error) {
	soon, cancel := context.WithTimeout(ctx, min(p.timeout, patience))
	defer cancel()
	c, err := dialInTurn(soon, addr)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(soon, func() { c.Close() })()
	raw, err := c.(syscall.Conn).SyscallConn()
	u := &upstream{wire: &wire{c, patience}, raw: raw, release: context.AfterFunc(ctx, func() { c.Close() })}
	var inside net.Conn = u.wire
	if p.redis.tls {
		conf := cmp.Or(p.tls, new(tls.Config)).Clone()
		conf.ServerName, _, _ = net.SplitHostPort(addr)
		t := tls.Client(u.wire, conf)
		inside, err = t, t.HandshakeContext(soon)
	}
	u.Conn = redis.NewConn(inside, 0, 0)
	u.in, u.out = bufio.NewReaderSize(inside, 16<<10), bufio.NewWriterSize(inside, 16<<10)
	if err = cmp.Or(err, u.login(&p.redis, sentinel)); err == nil && u.in.Buffered() > 0 {
		err = errOutOfStep
	}
	if err != nil {
		u.Close()
		return nil, cmp.Or(soon.Err(), err)
	}
	return u, nil
}

// dialInTurn connects to the first address of a name that answers. Each has its share of the time
// that is left: net.Dialer would give the first 2 s of it.
func dialInTurn(ctx context.Context, addr string) (c net.Conn, err error) {
	var d net.Dialer
	if strings.HasPrefix(addr, "/") {
		return d.DialContext(ctx, "unix", addr)
	}
	host, port, _ := net.SplitHostPort(addr)
	ips, err := net.DefaultResolver.LookupHost(ctx, host)
	deadline, _ := ctx.Deadline()
	for i, ip := range ips {
		d.Timeout = time.Until(deadline) / time.Duration(len(ips)-i)
		if c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(ip, port)); err == nil {
			break
		}
	}
	return c, err
}

// login begins a connection. A master that sentinels named must say itself that it is one.
func (u *upstream) login(a *redisAddress, sentinel bool) (err error) {
	auth, db := []any{a.user, a.password}, a.db
	if sentinel {
		auth, db = []any{a.sentinelUser, a.sentinelPassword}, 0
	}
	if auth = slices.DeleteFunc(auth, func(s any) bool { return s == "" }); len(auth) > 0 {
		_, err = u.Do("AUTH", auth...)
	}
	if err == nil && db != 0 {
		_, err = u.Do("SELECT", db)
	}
	if err != nil || sentinel || a.master == "" {
		return err
	}
	role := ""
	reply, err := redis.Values(u.Do("ROLE"))
	if redis.Scan(reply, &role); err == nil && role != "master" {
		err = errors.New("the sentinels name a server that is no master")
	}
	return err
}

func (u *upstream) Close() error {
	u.release()
	return u.Conn.Close()
}

// send adds a command for a flight's key. If that fails, so does the flush.
func (u *upstream) send(f *flight, command string) {
	if f.asking != "" {
		u.out.WriteString("*1\r\n$6\r\nASKING\r\n") // it is for the next command only
	}
	u.out.WriteString(command)
	u.out.Write(strconv.AppendInt(u.out.AvailableBuffer(), int64(len(f.key)), 10))
	u.out.WriteString("\r\n")
	u.out.WriteString(f.key)
	u.out.WriteString("\r\n")
}

// Do sends a command and reads the reply, of any type. Without a command, which is what redigo's
// pool has it do before it keeps a connection, it returns the connection.
func (u *upstream) Do(command string, args ...any) (any, error) {
	if command == "" {
		return u, u.Err()
	}
	if err := errors.Join(u.Send(command, args...), u.Flush()); err != nil {
		return nil, err
	}
	return u.reply(false, anyReply)
}

// reply reads the reply to a command. Its first byte must be one of kinds: with any other the
// connection is closed, as later replies could be taken for other keys'. If the command was sent
// behind ASKING, as asked says, reply first reads the reply to that, and returns its error if any.
func (u *upstream) reply(asked bool, kinds string) (any, error) {
	var refusal error
	if asked {
		_, refusal = u.reply(false, "-+")
	}
	reply, err := u.read(kinds)
	if _, refused := err.(redis.Error); err != nil && !refused {
		u.Conn.Close()
	}
	return reply, cmp.Or(refusal, err)
}

func (u *upstream) read(kinds string) (any, error) {
	line, err := u.in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	text, ended := bytes.CutSuffix(line, []byte("\r\n"))
	if ended && len(text) > 0 && strings.IndexByte(kinds, text[0]) >= 0 {
		n, err := strconv.Atoi(string(text[1:]))
		switch kind := text[0]; {
		case kind == '+':
			return string(text[1:]), nil
		case kind == '-':
			return nil, redis.Error(text[1:])
		case err != nil:
		case kind == ':':
			return int64(n), nil
		case n == -1:
			return nil, nil
		case kind == '$' && n >= 0 && n <= maxReply:
			return u.readValue(n)
		case kind == '*' && n >= 0 && n <= maxElements:
			var elements []any
			for len(elements) < n && err == nil {
				var element any
				element, err = u.read(strings.TrimSuffix(kinds, "*"))
				if val, ok := element.([]byte); ok {
					element = bytes.Clone(val)
				}
				elements = append(elements, element)
			}
			return elements, err
		}
	}
	return nil, fmt.Errorf("reading a reply: it begins with %.40q", line)
}

// readValue reads the bytes of a value, which hold until the next read. Of a long one it believes
// only as much again as has come.
func (u *upstream) readValue(n int) (val []byte, err error) {
	if n += len("\r\n"); n <= u.in.Size() {
		val, err = u.in.Peek(n)
		u.in.Discard(len(val))
	} else {
		var long bytes.Buffer
		long.Grow(u.in.Size())
		_, err = io.CopyN(&long, u.in, int64(n))
		val = long.Bytes()
	}
	if err != nil {
		return nil, err
	}
	val, ended := bytes.CutSuffix(val, []byte("\r\n"))
	if !ended {
		return nil, errors.New("reading a reply: a value does not end where it says")
	}
	return val, nil
}

// A wire is a connection whose every read and write has a deadline.
type wire struct {
	net.Conn
	patience time.Duration
}

func (w *wire) Read(p []byte) (int, error) {
	w.Conn.SetReadDeadline(time.Now().Add(w.patience))
	return w.Conn.Read(p)
}

func (w *wire) Write(p []byte) (int, error) {
	w.Conn.SetWriteDeadline(time.Now().Add(w.patience))
	return w.Conn.Write(p)
}

// track has Redis report every key that changes, and has the cache forget it, until the node is
// closed. Without its connection, entries end by their TTL alone. It pauses longer and longer
// between connections until one has lasted.
func (n *node) track() {
	p := n.pool
	for pause := retryPause; n.ctx.Err() == nil; pause = min(2*pause, time.Second) {
		began := p.cache.now()
		err := n.follow()
		if n.tracked.Swap(false) && p.cache.now()-began > 2*pingEvery {
			pause = retryPause
		}
		p.hint("")
		if pause == retryPause && n.ctx.Err() == nil {
			n.log.Warn("tracking is down; entries live until their TTL", "error", err)
		}
		select {
		case <-n.ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow tracks over one connection, until that breaks. The connection redirects to itself: Redis
// reports changes only to RESP3 clients or to subscribers.
func (n *node) follow() error {
	u, err := n.dial()
	if err != nil {
		return err
	}
	defer u.Close()
	u.wire.patience = pingEvery
	id, errID := redis.Int64(u.Do("CLIENT", "ID"))
	_, errTracking := u.Do("CLIENT", "TRACKING", "ON", "REDIRECT", id, "BCAST")
	_, errSubscribe := u.Do("SUBSCRIBE", "__redis__:invalidate")
	ping := func() error { return errors.Join(u.Send("PING"), u.Flush()) }
	err = cmp.Or(errID, errTracking, errSubscribe, ping())
	for pinged := true; err == nil; {
		var msg []any
		if _, err = u.in.Peek(1); err == nil {
			pinged = false
			msg, err = redis.Values(u.reply(false, anyReply))
			n.heed(msg)
		} else if errors.Is(err, os.ErrDeadlineExceeded) && !pinged {
			pinged, err = true, ping()
		}
	}
	return err
}

// heed acts on a message: a report of changes, or an answer to PING. The first such answer shows
// that Redis reports changes from now on, and empties the cache.
func (n *node) heed(msg []any) {
	if len(msg) == 3 {
		keys, _ := redis.ByteSlices(msg[2], nil) // nil: all
		n.pool.invalidations.Add(int64(max(len(keys), 1)))
		n.pool.cache.forget(keys)
	} else if len(msg) > 0 && !n.tracked.Load() {
		n.pool.cache.forget(nil) // what changed until now was not reported
		n.tracked.Store(true)
		n.log.Info("tracking is live")
	}
}
