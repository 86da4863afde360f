// Redis: its nodes with their bounded connections, batches of GETs, health, and invalidation.
//
// Only this file knows redigo. The cache begins flights; the pool queues them, carries them out in
// batches, and finishes each with the reply or with the failure of the connection. It waits for nobody:
// those who asked wait in the cache, and a late reply still fills it.
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
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
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
	// maxBatch bounds the GETs of one batch, and batchBytes the values that it brings, by the size that
	// values had lately.
	maxBatch   = 1 << 12
	batchBytes = 1 << 20
	// maxQueue bounds the flights that wait for a connection, and maxQueueBytes their keys. More of them
	// end with errTimeout at once: they would not be carried out in time.
	maxQueue      = 1 << 16
	maxQueueBytes = 64 << 20
	// grace is how much longer than the longest waiter a connection waits for a reply, which still fills
	// the cache.
	grace = time.Second
	// maxReply is the longest value that Redis can hold (proto-max-bulk-len), maxElements the longest array
	// that is believed, and growBy how much of a value is believed before it has come.
	maxReply    = 512 << 20
	maxElements = 1 << 20
	growBy      = 64 << 10
	// anyReply has the first bytes of all replies, and as many * as arrays may be inside one another.
	anyReply = "-+:$****"
	// slots is into how many parts a cluster divides the keys. Each has an owner.
	slots = 1 << 14
	// The pool asks who owns what at hints and, without one, every learnOften where there are sentinels or
	// where a batch has failed in the last learnSeldom, else every learnSeldom; at most once in learnPause.
	// No server may take longer than askTimeout to answer.
	learnPause  = 250 * time.Millisecond
	learnOften  = time.Second
	learnSeldom = 10 * time.Second
	askTimeout  = 500 * time.Millisecond
	// strayTime is how long a node is kept that owns no slot, since ASK named it last.
	strayTime = 10 * time.Second
	// retryPause is the longest pause before a flight is tried again that no node takes.
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
	return err == nil || s != "" && !strings.ContainsAny(s, ":/[]@ ")
}

// A pool carries flights out. It is safe for concurrent use.
type pool struct {
	poolSettings
	cache         *cache
	log           *slog.Logger
	ctx           context.Context // done when the pool is closed
	stop          context.CancelFunc
	running       sync.WaitGroup // watch and the trackers
	invalidations atomic.Int64   // changes that Redis reported
	several       atomic.Bool    // false: a single Redis, which is sent nothing that only clusters and sentinels know
	hints         chan string    // it is time to learn, perhaps from the server at this address
	learnt        chan struct{}  // closed when that was tried once
	sentinels     []string       // their addresses, one that answered in front; only watch touches them

	// mu guards the following, and fields of nodes. The cache's lock may not be taken under it.
	mu         sync.Mutex
	nodes      map[string]*node // by address
	seeds      []string         // addresses where to begin, the one in use in front
	owners     []*node          // of each slot, nil where it is not known; a single nil before any is
	known      string           // the addresses of all owners, when settle looked last
	failed     time.Time        // when a batch last did
	unknown    error            // why no sentinel has named a master
	queued     int              // flights, over all queues
	queueBytes int              // of their keys
	poolCounts
}

// poolCounts count what became of flights.
type poolCounts struct {
	flights, batches, errors, redirects, refreshes int64
	latency                                        histogram // of batches
}

var latencyBounds = []time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond,
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

func newPool(s poolSettings, c *cache, log *slog.Logger) *pool {
	p := &pool{poolSettings: s, cache: c, log: log, hints: make(chan string, 1), learnt: make(chan struct{}),
		nodes: make(map[string]*node), owners: make([]*node, 1), seeds: strings.Split(s.redis.hosts, ","),
		unknown: errors.New("the sentinels name another master")}
	p.latency = histogram{bounds: latencyBounds, counts: make([]int64, len(latencyBounds)+1)}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.several.Store(s.redis.master != "" || len(p.seeds) > 1)
	if s.redis.master != "" {
		p.seeds, p.sentinels = []string{""}, p.seeds // the master is unknown until a sentinel answers
	}
	p.known = p.seeds[0]
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
	n := &node{pool: p, addr: addr}
	p.nodes[addr] = n
	n.ctx, n.stop = context.WithCancel(p.ctx)
	n.conns = &redis.Pool{MaxIdle: p.limit, Dial: n.dial, TestOnBorrow: n.test}
	if p.tracking && addr != "" && p.ctx.Err() == nil {
		p.running.Go(n.track) // ends when the node is closed
	}
	return n
}

// routeLocked returns the node that is to carry out a flight.
func (p *pool) routeLocked(f *flight) *node {
	if f.asking != "" {
		return p.nodeLocked(f.asking)
	}
	if len(p.owners) == slots {
		if n := p.owners[slot(f.key)]; n != nil {
			return n
		}
	}
	return p.nodeLocked(p.seeds[0])
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
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || host == "?" || !isHost(host) {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// enqueue queues flights, each at its node, whose workers carry them out. It does not block.
func (p *pool) enqueue(fs []*flight) {
	var refused []*flight
	p.mu.Lock()
	for _, f := range fs {
		if p.queued >= maxQueue || p.queueBytes+len(f.key) > maxQueueBytes {
			refused = append(refused, f)
			continue
		}
		n := p.routeLocked(f)
		n.queue = append(n.queue, f)
		p.queued++
		p.queueBytes += len(f.key)
		n.startLocked()
	}
	p.mu.Unlock()
	for _, f := range refused {
		p.cache.finish(f, value{}, errTimeout)
	}
}

// try connects once, so that the log says what is wrong before the first request.
func (p *pool) try() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.routeLocked(new(flight)).startLocked()
}

// ready reports whether Redis answers, by a flight like any other, for a key that nobody has. That Redis
// does not let the proxy read this key is an answer.
func (p *pool) ready() bool {
	now := p.cache.now()
	f := &flight{key: fmt.Sprint("redis_proxy:ready:", p.cache.started.UnixNano()), dirty: true, began: now, until: now + p.timeout}
	p.enqueue([]*flight{f})
	if !p.cache.ended(f, time.After(p.timeout)) {
		return false
	}
	refusal := fmt.Sprint(f.err)
	return !isOutage(f.err) || strings.HasPrefix(refusal, upstreamRefused+"NOPERM ") && strings.Contains(refusal, " key")
}

// figures reports the connections and what became of flights.
func (p *pool) figures() []figure {
	p.mu.Lock()
	defer p.mu.Unlock()
	connections, used, down, state := 0, 0, 0, trackingState(0)
	if p.tracking {
		state = 2
	}
	owners := p.ownersLocked()
	for addr, n := range p.nodes {
		connections += n.conns.ActiveCount()
		used += n.busy
		if owners[addr] != nil && p.tracking && !n.live.Load() {
			state = 1
		}
		if owners[addr] != nil && n.downLocked() {
			down++
		}
	}
	latency := p.latency
	latency.counts = slices.Clone(latency.counts)
	return []figure{
		{"Cache", "upstream_connections", "upstream_connections", "Connections to Redis.", connections},
		{"Cache", "upstream_connections_used", "upstream_connections_used", "Connections to Redis in use.", used},
		{"Cache", "upstream_fetches", "upstream_fetches_total", "GETs taken up by a connection to Redis.", p.flights},
		{"Cache", "upstream_batches", "upstream_batches_total", "Pipelines of them.", p.batches},
		{"Cache", "upstream_errors", "upstream_errors_total", "Flights that failed, or got an error not about the key.", p.errors},
		{"Cache", "upstream_nodes", "upstream_nodes", "Nodes of Redis that are known.", len(p.nodes)},
		{"Cache", "upstream_nodes_down", "upstream_nodes_down", "Owners of keys that could not be read last time.", down},
		{"Cache", "upstream_refreshes", "upstream_refreshes_total", "Times that Redis was asked who owns which keys.", p.refreshes},
		{"Cache", "upstream_redirects", "upstream_redirects_total", "GETs that a node sent to another one.", p.redirects},
		{"Cache", "tracking", "tracking", "Whether Redis reports changes: 0 is off, 1 down, 2 live.", state},
		{"Cache", "tracking_invalidations", "invalidations_total", "Changes that Redis reported.", p.invalidations.Load()},
		{"", "", "upstream_seconds", "Time from taking up a batch of GETs to its last reply, connecting included.", latency},
	}
}

// A trackingState is whether Redis reports changes: 0 is off, 1 down, 2 live.
type trackingState int

func (s trackingState) String() string { return [...]string{"off", "down", "live"}[s] }

// hint has watch learn soon, from the server at an address if that is one. It does not block.
func (p *pool) hint(addr string) {
	select {
	case p.hints <- addr:
	default:
	}
}

// watch learns who owns which keys, at hints and now and then, once at a time.
func (p *pool) watch() {
	known := sync.OnceFunc(func() { close(p.learnt) })
	defer known()
	for {
		hint := ""
		select {
		case <-p.ctx.Done():
			return
		case hint = <-p.hints:
		case <-time.After(p.patience() - learnPause):
		}
		switch {
		case p.redis.master != "":
			p.askSentinels()
		case p.several.Load():
			p.askNodes(hint)
		default:
			continue
		}
		p.settle()
		known()
		select {
		case <-p.ctx.Done():
		case <-time.After(learnPause):
		}
	}
}

// patience returns how long to wait for a hint.
func (p *pool) patience() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.several.Load():
		return math.MaxInt64
	case p.redis.master != "" || time.Since(p.failed) < learnSeldom:
		return learnOften
	}
	return learnSeldom
}

// ask sends a server one command, over a connection of its own.
func (p *pool) ask(addr string, command string, args ...any) (any, error) {
	ctx, cancel := context.WithTimeout(p.ctx, 2*askTimeout)
	defer cancel()
	u, err := p.dial(ctx, addr, askTimeout, p.redis.master != "")
	if err != nil {
		return nil, err
	}
	defer u.Close()
	return u.Do(command, args...)
}

// askNodes learns the owners of all slots from the first node that knows them: the one that was hinted at,
// the owners that are known, those that cannot be read last, or those that the URL names.
func (p *pool) askNodes(hint string) {
	p.mu.Lock()
	addrs, down := []string{hint}, p.seeds
	for addr, n := range p.ownersLocked() {
		if n.downLocked() {
			down = append([]string{addr}, down...)
		} else {
			addrs = append(addrs, addr)
		}
	}
	p.mu.Unlock()
	addrs = append(addrs, down...)
	for i, addr := range addrs {
		if addr == "" || slices.Contains(addrs[:i], addr) {
			continue
		}
		if rows, err := redis.Values(p.ask(addr, "CLUSTER", "SLOTS")); err == nil && p.adopt(addr, rows) {
			return
		}
	}
}

// adopt takes the owners of slots over from an answer to CLUSTER SLOTS. Slots that it does not name keep
// theirs. It reports whether it named any.
func (p *pool) adopt(from string, rows []any) (named bool) {
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
		if errSpan == nil && errOwner == nil && addr != "" && first >= 0 && last < slots {
			p.giveLocked(p.nodeLocked(addr), first, last)
			named = true
		}
	}
	return named
}

// giveLocked notes that a node owns some slots.
func (p *pool) giveLocked(n *node, first, last int) {
	if len(p.owners) < slots {
		p.owners = make([]*node, slots)
	}
	for i := first; i <= last; i++ {
		p.owners[i] = n
	}
}

// askSentinels learns the master from the first sentinel that knows it, and asks that one first next time.
func (p *pool) askSentinels() {
	var unknown error
	for i, addr := range p.sentinels {
		named, err := redis.Strings(p.ask(addr, "SENTINEL", "get-master-addr-by-name", p.redis.master))
		if err == nil && len(named) == 2 {
			p.sentinels[0], p.sentinels[i] = addr, p.sentinels[0]
			p.mu.Lock()
			p.seeds[0] = resolve(addr, named[0]+":"+named[1])
			p.mu.Unlock()
			return
		}
		if err == redis.ErrNil {
			unknown = fmt.Errorf("no sentinel knows the master %q", p.redis.master)
		}
		unknown = cmp.Or(unknown, fmt.Errorf("no sentinel answers: %w", err))
	}
	p.mu.Lock()
	p.unknown = unknown
	p.mu.Unlock()
}

// ownersLocked returns the nodes that own slots, by address. The seed stands for those that are not known.
func (p *pool) ownersLocked() map[string]*node {
	owners := make(map[string]*node)
	for _, n := range slices.Compact(slices.Clone(p.owners)) {
		if n == nil {
			n = p.nodeLocked(p.seeds[0])
		}
		owners[n.addr] = n
	}
	return owners
}

// settle follows a change of the owners. Flights that wait are queued at those of today, and a node is
// closed that owns nothing, unless ASK named it lately.
func (p *pool) settle() {
	var queued []*flight
	p.mu.Lock()
	p.refreshes++
	owners := p.ownersLocked()
	for addr, n := range p.nodes {
		queued = append(queued, n.queue...)
		n.queue = nil
		if owners[addr] == nil && time.Since(n.named) > strayTime {
			delete(p.nodes, addr)
			n.stop()
		}
	}
	p.queued, p.queueBytes = 0, 0
	known := strings.Join(slices.Sorted(maps.Keys(owners)), " ")
	changed := known != p.known
	p.known = known
	p.mu.Unlock()
	p.enqueue(queued)
	if changed {
		p.log.Info("other nodes own the keys now", "nodes", known)
	}
}

// A node is one Redis server, the connections to it, and the flights that wait for one of them. Its health,
// which only it logs, is whether it answered since it last failed.
type node struct {
	pool  *pool
	addr  string          // empty: of the master that no sentinel has named yet
	ctx   context.Context // done when the node is closed, which closes its connections
	stop  context.CancelFunc
	conns *redis.Pool
	live  atomic.Bool // its changes are reported

	// The pool's lock guards the following.
	queue  []*flight
	busy   int       // workers, each with a connection
	coming bool      // one of them is about to take the queue
	broke  time.Time // when a connection last did; others that have been idle since before may be dead
	named  time.Time // when ASK last did

	// When a reply last was no outage, and when a failure and a refusal were last logged, on the cache's clock.
	// 0: never.
	answered, warned, refused time.Duration
}

// log names the node, where there are or may be several.
func (n *node) log() *slog.Logger {
	if !n.pool.several.Load() {
		return n.pool.log
	}
	return n.pool.log.With("node", n.addr)
}

// dial makes a connection.
func (n *node) dial() (redis.Conn, error) {
	p := n.pool
	if n.addr == "" {
		<-p.learnt
		p.mu.Lock()
		defer p.mu.Unlock()
		return nil, p.unknown
	}
	u, err := p.dial(n.ctx, n.addr, p.timeout+grace, false)
	if err != nil {
		return nil, err
	}
	return u, nil
}

// test returns an error if a connection may not be used again.
func (n *node) test(c redis.Conn, idleSince time.Time) error {
	n.pool.mu.Lock()
	broke := n.broke
	n.pool.mu.Unlock()
	if idleSince.Before(broke) || !c.(*upstream).quiet() {
		return errors.New("it may be dead, or out of step")
	}
	return nil
}

// startLocked starts a worker, unless one is on its way to the queue. If it may not have a connection, the
// workers that have one come to the queue.
func (n *node) startLocked() {
	if !n.coming && n.busy < n.pool.limit {
		n.coming = true
		n.busy++
		go n.work() // ends when the queue is empty
	}
}

// work carries out what is queued until nothing is.
func (n *node) work() {
	for more := true; more; {
		runtime.Gosched() // requests that are about to ask do so first, and share a round trip
		more = n.batch()
	}
	n.pool.mu.Lock()
	defer n.pool.mu.Unlock()
	n.busy--
	if len(n.queue) > 0 { // since the last look at it, when all were busy
		n.startLocked()
	}
}

// take removes from the queue as much as fits a batch, and reports whether there was anything. It ends
// the flights that no request waits for any more, and returns the others.
func (n *node) take() (fs []*flight, any bool) {
	p := n.pool
	p.mu.Lock()
	most := min(maxBatch, max(1, batchBytes/max(1, int(p.cache.typical.Load()))))
	fs = slices.Clone(n.queue[:min(len(n.queue), most)])
	n.queue = slices.Delete(n.queue, 0, len(fs))
	for _, f := range fs {
		p.queueBytes -= len(f.key)
	}
	p.queued -= len(fs)
	p.batches += int64(min(len(fs), 1))
	p.flights += int64(len(fs))
	n.coming = false
	if len(n.queue) > 0 { // what does not fit is another worker's
		n.startLocked()
	}
	p.mu.Unlock()
	wanted, unwanted := p.cache.wanted(fs, 0)
	for _, f := range unwanted {
		p.cache.finish(f, value{}, errTimeout)
	}
	return wanted, len(fs) > 0
}

// batch takes a connection, and then all that has been queued meanwhile, and carries it out. It reports
// whether there was anything.
func (n *node) batch() bool {
	p := n.pool
	began := p.cache.now()
	conn := n.conns.Get()
	defer conn.Close()
	made := conn.Err() == nil
	fs, any := n.take()
	rest, err := n.exchange(conn, fs)
	if err != nil {
		n.broken(rest, err, made, began)
	} else if len(fs) > 0 {
		p.mu.Lock()
		p.latency.add(p.cache.now() - began)
		p.mu.Unlock()
	}
	return any
}

// broken ends the flights of a connection that broke, or could not be made, since it began.
//
// Those that a request waits for are tried once more on another connection: this one may have died while it
// was idle, and GET does no harm twice. The same goes where it could not be made, but another was made
// meanwhile, or where another node is to be asked by now.
func (n *node) broken(fs []*flight, err error, made bool, began time.Duration) {
	p := n.pool
	now := p.cache.now()
	idle := len(fs) == 0
	wanted, ended := p.cache.wanted(fs, 0)
	var again []*flight
	p.mu.Lock()
	p.failed = time.Now()
	if made {
		n.broke = p.failed
	}
	p.leaveLocked(n)
	may := made || n.answered > began
	for _, f := range wanted {
		f.asking = ""
		elsewhere := p.routeLocked(f) != n && f.hops < len(p.seeds)+2
		if may && !f.tried || elsewhere {
			f.tried, f.hops = f.tried || may, f.hops+1
			again = append(again, f)
		} else {
			ended = append(ended, f)
		}
	}
	p.errors += int64(len(ended))
	// What began before an answer says nothing about the time after it, and the two may alternate.
	warn := (idle || len(ended) > 0) && n.ctx.Err() == nil && !n.downLocked() && n.answered <= began &&
		(n.warned == 0 || now-n.warned > time.Second)
	if warn {
		n.warned = now
	}
	p.mu.Unlock()
	p.hint("")
	if warn {
		n.log().Warn("Redis cannot be read; hits go on", "error", err)
	}
	p.enqueue(again)
	for _, f := range ended {
		p.cache.finish(f, value{}, asAnswer(err, false))
	}
}

// leaveLocked goes on to the next seed, if it is n that is in use.
func (p *pool) leaveLocked(n *node) {
	if p.seeds[0] == n.addr {
		p.seeds = append(p.seeds[1:], n.addr)
	}
}

// exchange sends a GET for each flight and finishes it with the reply. It lets go of the flights that it
// finished, and returns the rest.
func (n *node) exchange(conn redis.Conn, fs []*flight) (rest []*flight, err error) {
	p, answered := n.pool, false
	sent := p.cache.now()
	commands := []string{"GET", "PTTL"}
	if !p.keyTTL {
		commands = commands[:1]
	}
	for _, f := range fs {
		for _, command := range commands {
			if f.asking != "" {
				conn.Send("ASKING") // it is for the next command only
			}
			conn.Send(command, f.key) // if that fails, so does Flush
		}
	}
	if err := conn.Flush(); err != nil {
		return fs, err
	}
	for ; len(fs) > 0; fs = fs[1:] {
		f := fs[0]
		v, err := n.receive(conn, f.key, sent)
		reply, isReply := err.(redis.Error)
		if err != nil && err != errAbsent && !isReply {
			return fs, err
		}
		fs[0] = nil
		if isReply {
			if n.redirect(f, reply) {
				continue // another worker may have it
			}
			err = asAnswer(reply, true)
		}
		if isOutage(err) {
			n.refuses(reply)
		} else if !answered {
			answered = true
			n.answers()
		}
		p.cache.finish(f, v, err)
	}
	return nil, nil
}

// receive reads what Redis says about a key that it was asked for at the time sent.
func (n *node) receive(conn redis.Conn, key string, sent time.Duration) (value, error) {
	reply, err := conn.Receive()
	left := int64(-1)
	if n.pool.keyTTL {
		var failure error
		left, failure = redis.Int64(conn.Receive())
		err = cmp.Or(err, failure)
	}
	val, found := reply.([]byte)
	switch {
	case err != nil:
		return value{}, err
	case !found:
		return newAbsent(key, sent), errAbsent
	}
	v := newValue(key, val, sent)
	if left != -1 { // -1: no expiry; -2: gone meanwhile
		v.expires = sent + time.Duration(max(left, 0))*time.Millisecond
	}
	return v, nil
}

// redirect has a flight carried out where an error reply says, or later where it says that this may help.
// It reports whether it did; else the flight is to end with the reply. Nodes that name each other for ever
// are asked less and less often, until no request waits any more.
func (n *node) redirect(f *flight, reply redis.Error) bool {
	p := n.pool
	code, rest, _ := strings.Cut(string(reply), " ")
	addr, pause := "", retryPause
	switch code {
	case "MOVED", "ASK":
		_, target, _ := strings.Cut(rest, " ")
		if addr = resolve(n.addr, target); addr != "" {
			pause = min(pause, time.Duration(f.hops*f.hops/2)*time.Millisecond)
		}
	case "CLUSTERDOWN", "TRYAGAIN", "LOADING":
		if wanted, _ := p.cache.wanted([]*flight{f}, pause); len(wanted) == 0 {
			return false
		}
	default:
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if code == "LOADING" {
		if p.leaveLocked(n); p.routeLocked(f) == n {
			return false
		}
	}
	p.several.Store(true)
	f.hops++
	f.asking = ""
	if addr != "" {
		p.moveLocked(f, n, code, addr)
	}
	if code != "ASK" {
		p.hint(n.addr)
	}
	time.AfterFunc(pause, func() { p.enqueue([]*flight{f}) })
	return true
}

// moveLocked has a flight of n
func (p *pool) moveLocked(f *flight, n *node, code, addr string) {
	p.redirects++
	to := p.nodeLocked(addr)
	to.named = time.Now()
	if code == "ASK" {
		f.asking = addr
	} else {
		p.giveLocked(to, slot(f.key), slot(f.key))
	}
	if to == n { // it may be another server by now: connections that are in use are not used again
		n.broke = time.Now().Add(retryPause)
	}
}

// downLocked reports whether the node has failed since it last answered.
func (n *node) downLocked() bool { return n.warned > n.answered }

// answers notes an answer, and logs the first after a failure.
func (n *node) answers() {
	p := n.pool
	p.mu.Lock()
	down, now := n.downLocked(), p.cache.now()
	after := now - n.warned
	n.answered = now
	p.mu.Unlock()
	if down {
		n.log().Info("Redis can be read again", "after", after.Round(time.Millisecond).String())
	}
}

// refuses counts an error reply that is not about a key, and logs one a minute.
func (n *node) refuses(reply redis.Error) {
	p := n.pool
	p.mu.Lock()
	p.errors++
	now := p.cache.now()
	first := n.refused == 0 || now-n.refused > time.Minute
	if first {
		n.refused = now
	}
	p.mu.Unlock()
	if first {
		n.log().Warn("Redis refuses", "error", reply)
	}
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

// asAnswer returns the answer to a request that failed with err. An error reply that is not to GET, or that
// concerns the proxy's own standing with Redis, is marked, so that a client does not take it for its own.
func asAnswer(err error, toGET bool) error {
	var reply redis.Error
	var network net.Error
	if errors.As(err, &reply) {
		for _, code := range []string{"NOAUTH ", "NOPERM ", "WRONGPASS ", "DENIED ", "MOVED ", "ASK ", "ERR max number of clients"} {
			if !toGET || strings.HasPrefix(string(reply), code) {
				return upstreamRefused + replyError(reply)
			}
		}
		return replyError(reply)
	}
	if errors.As(err, &network) && network.Timeout() {
		return errTimeout
	}
	return errUnavailable
}

// An upstream is a connection that reads replies itself. redigo believes whatever length a reply states, and
// takes any reply for that to the command. It is not safe for concurrent use.
type upstream struct {
	redis.Conn
	wire    *wire
	in      *bufio.Reader
	raw     syscall.RawConn // of the socket; nil over TLS
	release func() bool     // its context
	due     bytes.Buffer    // the first letters of the commands that Send sent, whose replies are still to come
}

// dial makes a connection to Redis or to a sentinel, which is closed when ctx is done. It gives up when that
// takes longer than the timeout or than patience. A read or write on it fails after patience.
func (p *pool) dial(ctx context.Context, addr string, patience time.Duration, sentinel bool) (*upstream, error) {
	soon, cancel := context.WithTimeout(ctx, min(p.timeout, patience))
	defer cancel()
	c, err := dialInTurn(soon, addr)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(soon, func() { c.Close() })()
	u := &upstream{wire: &wire{c, patience}, release: context.AfterFunc(ctx, func() { c.Close() })}
	var inside net.Conn = u.wire
	if p.redis.tls {
		conf := cmp.Or(p.tls, new(tls.Config)).Clone()
		conf.ServerName, _, _ = net.SplitHostPort(addr)
		t := tls.Client(u.wire, conf)
		inside, err = t, t.HandshakeContext(soon)
	} else if s, ok := c.(syscall.Conn); ok {
		u.raw, err = s.SyscallConn()
	}
	u.Conn, u.in = redis.NewConn(inside, 0, 0), bufio.NewReaderSize(inside, 16<<10)
	if err == nil {
		err = u.login(&p.redis, sentinel)
	}
	if err != nil {
		u.Close()
		return nil, cmp.Or(soon.Err(), err)
	}
	return u, nil
}

// dialInTurn connects to the first address of a name that answers. Each has its share of the time that is
// left: net.Dialer would give the first 2 s of it.
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
	if auth[0] == "" {
		auth = auth[1:]
	}
	if auth[len(auth)-1] != "" {
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

// Do sends a command and reads the reply, of any type. redigo's pool has it send none before it keeps a
// connection, on which no reply is due.
func (u *upstream) Do(command string, args ...any) (any, error) {
	if command == "" {
		return nil, u.Err()
	}
	if err := errors.Join(u.Conn.Send(command, args...), u.Flush()); err != nil {
		return nil, err
	}
	return u.reply(anyReply)
}

// Send sends GET, PTTL, or the ASKING before one of them, whose reply Receive reads with the other's.
func (u *upstream) Send(command string, args ...any) error {
	u.due.WriteByte(command[0])
	return u.Conn.Send(command, args...)
}

// Receive reads the reply to a GET, bytes or nil, or to a PTTL, a number. If the ASKING before it was refused,
// it returns the refusal.
func (u *upstream) Receive() (reply any, err error) {
	var refusal error
	command, _ := u.due.ReadByte()
	if command == 'A' {
		_, refusal = u.reply("-+")
		command, _ = u.due.ReadByte()
	}
	if command == 'P' {
		reply, err = u.reply("-:")
	} else {
		reply, err = u.reply("-$")
	}
	return reply, cmp.Or(refusal, err)
}

// reply reads a reply that begins with one of kinds. Any other breaks the connection, as the replies after it
// might be taken for those of other keys.
func (u *upstream) reply(kinds string) (any, error) {
	reply, err := u.read(kinds)
	if refusal, ok := reply.(redis.Error); ok {
		return nil, refusal
	}
	if err != nil {
		u.Conn.Close()
	}
	return reply, err
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
			return redis.Error(text[1:]), nil
		case err != nil:
		case kind == ':':
			return int64(n), nil
		case n == -1:
			return nil, nil
		case kind == '$' && n >= 0 && n <= maxReply:
			return u.readValue(n)
		case kind == '*' && n >= 0 && n <= maxElements:
			return u.readArray(n, strings.TrimSuffix(kinds, "*"))
		}
	}
	return nil, fmt.Errorf("reading a reply: it begins with %.40q", line)
}

func (u *upstream) readArray(n int, kinds string) (elements []any, err error) {
	for len(elements) < n && err == nil {
		var element any
		element, err = u.read(kinds)
		elements = append(elements, element)
	}
	return elements, err
}

// readValue reads the bytes of a value. Of a long one it believes only as much again as has come.
func (u *upstream) readValue(n int) (val []byte, err error) {
	for n += len("\r\n"); len(val) < n; {
		read := len(val)
		more := min(n-read, max(growBy, read))
		val = slices.Grow(val, more)[:read+more]
		if _, err := io.ReadFull(u.in, val[read:]); err != nil {
			return nil, err
		}
	}
	val, ended := bytes.CutSuffix(val, []byte("\r\n"))
	if !ended {
		return nil, errors.New("reading a reply: a value does not end where it says")
	}
	return val, nil
}

// quiet reports whether there is nothing to read. Where no reply is due, it would be taken for the reply to
// the next command.
func (u *upstream) quiet() (quiet bool) {
	if u.in.Buffered() > 0 || u.raw == nil {
		return u.in.Buffered() == 0
	}
	u.raw.Control(func(fd uintptr) {
		_, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = err == syscall.EAGAIN
	})
	return quiet
}

// A wire is a connection whose every read and write has a deadline. It replaces redigo's own time-outs,
// which cost two system clock readings and timer changes for each GET, not for each batch.
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

// track has Redis report every key that changes, and has the cache forget it, until the node is closed. It
// only sharpens the TTL: while its connection is down, entries live on by that. It pauses longer and longer
// between connections until one has lasted.
func (n *node) track() {
	p := n.pool
	for pause, logged := time.Duration(0), false; n.ctx.Err() == nil; {
		began := p.cache.now()
		err := n.follow()
		if n.live.Swap(false) && p.cache.now()-began > 2*pingEvery {
			pause, logged = 0, false
		}
		p.hint("")
		if !logged && n.ctx.Err() == nil {
			n.log().Warn("tracking is down; entries live until their TTL", "error", err)
			logged = true
		}
		pause = min(max(2*pause, 50*time.Millisecond), 5*time.Second)
		select {
		case <-n.ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow tracks over one connection, until that breaks. The connection redirects to itself: Redis
// reports changes only to RESP3 clients or to subscribers, and redigo speaks RESP2. It is live with the
// first answer to PING, which shows that Redis lets it go on.
func (n *node) follow() error {
	c, err := n.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	u := c.(*upstream)
	u.wire.patience = pingEvery
	id, err := redis.Int64(u.Do("CLIENT", "ID"))
	if err == nil {
		_, err = u.Do("CLIENT", "TRACKING", "ON", "REDIRECT", id, "BCAST")
	}
	if err == nil {
		_, err = u.Do("SUBSCRIBE", "__redis__:invalidate")
	}
	ping := func() error { return errors.Join(u.Conn.Send("PING"), u.Flush()) }
	if err == nil {
		err = ping()
	}
	for pinged := true; err == nil; {
		if _, err = u.in.Peek(1); err == nil {
			pinged = false
			err = n.heed(redis.Values(u.reply(anyReply)))
		} else if errors.Is(err, os.ErrDeadlineExceeded) && !pinged {
			pinged, err = true, ping()
		}
	}
	return err
}

// heed acts on a message to a tracking connection: the answer to PING, or a report of changes.
func (n *node) heed(msg []any, err error) error {
	if err != nil {
		return err
	}
	p := n.pool
	if len(msg) != 3 { // the answer to PING
		if !n.live.Load() {
			p.cache.forget(nil) // whatever changed until now was not reported
			n.live.Store(true)
			n.log().Info("tracking is live")
		}
		return nil
	}
	keys, err := redis.ByteSlices(msg[2], nil) // nil: all
	if err != nil && err != redis.ErrNil {
		return err
	}
	p.invalidations.Add(int64(max(len(keys), 1)))
	p.cache.forget(keys)
	return nil
}
