// Redis: its nodes with their bounded connections, batches of GETs, health, and invalidation.
//
// Only this file knows redigo. The cache begins flights; the pool queues them, carries them out in
// batches, and finishes each with the reply or with the failure of the connection. It waits for nobody:
// those who asked wait in the cache, and a late reply still fills it.
package main

import (
	"bufio"
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
	// batchBytes bounds the values that one batch brings, by the size that values had lately. The number of
	// its GETs is bounded too, as that size is a guess: it grows from firstBatch to maxBatch while batches
	// succeed.
	batchBytes = 1 << 20
	firstBatch = 256
	maxBatch   = 1 << 12
	// maxQueue bounds the flights that wait for a connection, and maxQueueBytes their keys. More of them
	// end with errTimeout at once: they would not be carried out in time.
	maxQueue      = 1 << 16
	maxQueueBytes = 64 << 20
	// grace is how much longer than the longest waiter a connection waits for a reply, which still fills
	// the cache.
	grace = time.Second
	// maxReply is the longest value that Redis can hold (proto-max-bulk-len), and maxElements the longest
	// report of changes that is believed.
	maxReply    = 512 << 20
	maxElements = 1 << 20
	// slots is into how many parts a cluster divides the keys. Each has an owner.
	slots = 1 << 14
	// Who owns what is asked for at most once in learnPause: at a hint, every failingTick while a node fails
	// or has failed less than failingFor ago, every tick of a cluster, and every sentinelTick of sentinels.
	// No server may take longer than askTimeout to answer.
	learnPause   = 250 * time.Millisecond
	failingTick  = 500 * time.Millisecond
	failingFor   = 5 * time.Second
	sentinelTick = time.Second
	clusterTick  = 10 * time.Second
	askTimeout   = 500 * time.Millisecond
	// strayTime is how long a node is kept that owns no slot, since it was last named.
	strayTime = 10 * time.Second
	// retryPause is the longest pause before a flight is tried again that no node takes.
	retryPause = 50 * time.Millisecond
	// growBy is how many bytes of a reply are believed before they have come.
	growBy = 64 << 10
	// pingEvery is how often the tracking connection is tried.
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
	invalidations atomic.Int64  // changes that Redis reported
	hints         chan string   // it is time to learn, perhaps from the server at this address
	learnt        chan struct{} // closed when that was tried once
	watched       chan struct{} // closed when watch has ended

	// mu guards the following, and the queue of a node. The cache's lock may not be taken under it.
	mu         sync.Mutex
	nodes      map[string]*node // by address
	seeds      []string         // addresses where to begin
	seed       int              // which of them is in use
	owners     []*node          // of each slot, nil where it is not known; none at all before Redis says that it is a cluster
	masters    map[*node]bool   // the owners that settle has seen last
	sentinels  []string         // their addresses, one that answered in front; only watch touches them
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
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

func newPool(s poolSettings, c *cache, log *slog.Logger) *pool {
	p := &pool{poolSettings: s, cache: c, log: log, nodes: make(map[string]*node), seeds: strings.Split(s.redis.hosts, ","),
		unknown: errors.New("the sentinels name another master"), hints: make(chan string, 1), learnt: make(chan struct{}), watched: make(chan struct{})}
	p.latency = histogram{bounds: latencyBounds, counts: make([]int64, len(latencyBounds)+1)}
	p.ctx, p.stop = context.WithCancel(context.Background())
	if s.redis.master != "" {
		p.seeds, p.sentinels = []string{""}, p.seeds // the master is unknown until a sentinel answers
	}
	p.masters = p.mastersLocked()
	p.hintLocked("")
	go p.watch() // ends with close
	return p
}

// dial makes a connection, which is closed when ctx is done. It gives up when that takes longer than the
// timeout or than patience. A read or write on it fails after patience.
func (p *pool) dial(ctx context.Context, addr string, patience time.Duration, opts ...redis.DialOption) (*upstream, error) {
	soon, cancel := context.WithTimeout(ctx, min(p.timeout, patience))
	defer cancel()
	c, err := dialInTurn(soon, addr)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(soon, func() { c.Close() })() // redigo's AUTH and SELECT do not look at a context
	g := &guard{Conn: wire{c, patience}}
	if tcp, ok := c.(*net.TCPConn); ok && !p.redis.tls {
		g.raw, _ = tcp.SyscallConn()
	}
	if p.redis.tls {
		host, _, _ := net.SplitHostPort(addr)
		conf := cmp.Or(p.tls, new(tls.Config)).Clone()
		conf.ServerName = host
		t := tls.Client(g.Conn, conf)
		if err := t.HandshakeContext(soon); err != nil {
			c.Close()
			return nil, err
		}
		g.Conn = t
	}
	g.in = bufio.NewReaderSize(g.Conn, 16<<10)
	conn, err := redis.Dial("tcp", addr, append(opts,
		redis.DialContextFunc(func(context.Context, string, string) (net.Conn, error) { return g, nil }))...)
	if err != nil && soon.Err() != nil {
		return nil, soon.Err() // a time-out, which closed the connection
	} else if err != nil {
		return nil, err
	}
	return &upstream{conn, g, context.AfterFunc(ctx, func() { c.Close() }), nil, 0}, nil
}

// dialInTurn connects to the first address of a name that answers. Each has its share of the time that is
// left: net.Dialer would give the first 2 s of it.
func dialInTurn(ctx context.Context, addr string) (c net.Conn, err error) {
	if strings.HasPrefix(addr, "/") {
		return new(net.Dialer).DialContext(ctx, "unix", addr)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	for i, ip := range ips {
		d := net.Dialer{Timeout: time.Until(deadline) / time.Duration(len(ips)-i)}
		if c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(ip, port)); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// close drops all nodes, and their connections.
func (p *pool) close() {
	p.stop()
	<-p.watched
	p.mu.Lock()
	nodes := slices.Collect(maps.Values(p.nodes))
	p.mu.Unlock()
	for _, n := range nodes {
		n.close()
	}
}

// nodeLocked returns the node with this address.
func (p *pool) nodeLocked(addr string) *node {
	n := p.nodes[addr]
	if n == nil {
		n = p.newNode(addr)
		p.nodes[addr] = n
	}
	return n
}

// routeLocked returns the node that is to carry out a flight.
func (p *pool) routeLocked(f *flight) *node {
	if f.asking != "" {
		return p.nodeLocked(f.asking)
	}
	if p.owners != nil {
		if n := p.owners[slot(f.key)]; n != nil {
			return n
		}
	}
	return p.nodeLocked(p.seeds[p.seed])
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

// resolve returns the address that the server at from means by a host and a port: its own host and port
// where they are missing, and none where it does not know.
func resolve(from, host, port string) (addr string) {
	ownHost, ownPort, _ := net.SplitHostPort(from)
	host = cmp.Or(host, ownHost)
	if port == "0" {
		port = ownPort
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || host == "?" || !isHost(host) {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// login returns what a connection to Redis begins with.
func (p *pool) login() []redis.DialOption {
	return []redis.DialOption{redis.DialUsername(p.redis.user), redis.DialPassword(p.redis.password), redis.DialDatabase(p.redis.db)}
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
	p.routeLocked(new(flight)).startWorker()
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
	var refusal replyError
	forbidden := errors.As(f.err, &refusal) && strings.HasPrefix(string(refusal), upstreamRefused+"NOPERM ") &&
		strings.Contains(string(refusal), " key")
	return !isOutage(f.err) || forbidden
}

// figures reports the connections and what became of flights.
func (p *pool) figures() []figure {
	p.mu.Lock()
	n := p.poolCounts
	n.latency.counts = slices.Clone(n.latency.counts)
	masters, nodes := p.mastersLocked(), slices.Collect(maps.Values(p.nodes))
	p.mu.Unlock()
	connections, used, down, state := 0, 0, 0, trackingOff
	if p.tracking {
		state = trackingLive
	}
	for _, n := range nodes {
		connections += n.conns.ActiveCount()
		used += len(n.slots)
		if masters[n] && p.tracking && (n.tracker == nil || !n.tracker.live.Load()) {
			state = trackingDown
		}
		if masters[n] && n.health.down() {
			down++
		}
	}
	const failures = "Flights that failed, or were answered by an error that is not about the key."
	return []figure{
		{"Cache", "upstream_connections", "upstream_connections", "Connections to Redis.", connections},
		{"Cache", "upstream_connections_used", "upstream_connections_used", "Connections to Redis in use.", used},
		{"Cache", "upstream_fetches", "upstream_fetches_total", "GETs taken up by a connection to Redis.", n.flights},
		{"Cache", "upstream_batches", "upstream_batches_total", "Pipelines of them.", n.batches},
		{"Cache", "upstream_errors", "upstream_errors_total", failures, n.errors},
		{"Cache", "upstream_nodes", "upstream_nodes", "Nodes of Redis that are known.", len(nodes)},
		{"Cache", "upstream_nodes_down", "upstream_nodes_down", "Owners of keys that could not be read last time.", down},
		{"Cache", "upstream_refreshes", "upstream_refreshes_total", "Times that Redis was asked who owns which keys.", n.refreshes},
		{"Cache", "upstream_redirects", "upstream_redirects_total", "GETs that a node sent to another one.", n.redirects},
		{"Cache", "tracking", "tracking", "Whether Redis reports changes: 0 is off, 1 down, 2 live.", state},
		{"Cache", "tracking_invalidations", "invalidations_total", "Changes that Redis reported.", p.invalidations.Load()},
		{"", "", "upstream_seconds", "Time from taking up a batch of GETs to its last reply, connecting included.", n.latency},
	}
}

// aloneLocked reports whether there is a single Redis. It must not be sent any command that only nodes of
// a cluster and sentinels know.
func (p *pool) aloneLocked() bool {
	return p.owners == nil && len(p.seeds) == 1 && p.redis.master == ""
}

// hint has watch learn soon, from the server at an address if that is one. It does not block.
func (p *pool) hint(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hintLocked(addr)
}

func (p *pool) hintLocked(addr string) {
	if p.aloneLocked() {
		return
	}
	select {
	case p.hints <- addr:
	default:
	}
}

// leaveLocked goes on to the next seed, if it is n that is in use.
func (p *pool) leaveLocked(n *node) {
	if p.seeds[p.seed] == n.addr {
		p.seed = (p.seed + 1) % len(p.seeds)
	}
}

// watch learns who owns which keys, at hints and now and then, once at a time.
func (p *pool) watch() {
	defer close(p.watched)
	known := sync.OnceFunc(func() { close(p.learnt) })
	defer known()
	for {
		hint := ""
		select {
		case <-p.ctx.Done():
			return
		case hint = <-p.hints:
		case <-time.After(p.tick() - learnPause):
		}
		if p.redis.master != "" {
			p.askSentinels()
		} else {
			p.askNodes(hint)
		}
		p.settle()
		known()
		select {
		case <-p.ctx.Done():
		case <-time.After(learnPause):
		}
	}
}

// tick returns how long to wait for a hint.
func (p *pool) tick() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aloneLocked() {
		return math.MaxInt64
	}
	for n := range p.mastersLocked() {
		if time.Since(n.failed) < failingFor {
			return failingTick
		}
	}
	if p.redis.master != "" {
		return sentinelTick
	}
	return clusterTick
}

// ask sends a server one command, over a connection of its own.
func (p *pool) ask(addr string, login []redis.DialOption, command string, args ...any) ([]any, error) {
	ctx, cancel := context.WithTimeout(p.ctx, 2*askTimeout)
	defer cancel()
	u, err := p.dial(ctx, addr, askTimeout, login...)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	return redis.Values(u.Do(command, args...))
}

// askNodes learns the owners of all slots from the first node that knows them: the one that was hinted at,
// the owners that are known, those that failed last, or those that the URL names.
func (p *pool) askNodes(hint string) {
	p.mu.Lock()
	masters := slices.SortedFunc(maps.Keys(p.mastersLocked()), func(a, b *node) int { return a.failed.Compare(b.failed) })
	p.mu.Unlock()
	addrs := []string{hint}
	for _, n := range masters {
		addrs = append(addrs, n.addr)
	}
	addrs = append(addrs, p.seeds...)
	for i, addr := range addrs {
		if addr == "" || slices.Contains(addrs[:i], addr) {
			continue
		}
		rows, err := p.ask(addr, p.login(), "CLUSTER", "SLOTS")
		if err == nil && p.adopt(addr, rows) {
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
		var master []any
		span, _ := redis.Values(row, nil)
		_, err := redis.Scan(span, &first, &last, &master)
		if err == nil {
			_, err = redis.Scan(master, &host, &port)
		}
		addr := resolve(from, host, strconv.Itoa(port))
		if err != nil || addr == "" || first < 0 || last >= slots {
			continue
		}
		if p.owners == nil {
			p.owners = make([]*node, slots)
		}
		n := p.nodeLocked(addr)
		for i := first; i <= last; i++ {
			p.owners[i] = n
		}
		named = true
	}
	return named
}

// askSentinels learns the master from the first sentinel that knows it, and asks that one first next time.
func (p *pool) askSentinels() {
	login := []redis.DialOption{redis.DialUsername(p.redis.sentinelUser), redis.DialPassword(p.redis.sentinelPassword)}
	var unknown error
	for i, addr := range p.sentinels {
		named, err := redis.Strings(p.ask(addr, login, "SENTINEL", "get-master-addr-by-name", p.redis.master))
		if err == nil && len(named) == 2 {
			p.sentinels[0], p.sentinels[i] = addr, p.sentinels[0]
			p.mu.Lock()
			p.seeds[0] = resolve(addr, named[0], named[1])
			p.mu.Unlock()
			return
		}
		if err == redis.ErrNil {
			unknown = fmt.Errorf("no sentinel knows the master %q", p.redis.master)
		} else if unknown == nil {
			unknown = fmt.Errorf("no sentinel answers: %w", err)
		}
	}
	p.mu.Lock()
	p.unknown = unknown
	p.mu.Unlock()
}

// mastersLocked returns the nodes that own slots, or the one in use where there are none.
func (p *pool) mastersLocked() map[*node]bool {
	masters := make(map[*node]bool)
	var last *node
	if p.owners == nil {
		masters[p.nodeLocked(p.seeds[p.seed])] = true
	}
	for _, n := range p.owners {
		if n == nil {
			n = p.nodeLocked(p.seeds[p.seed])
		}
		if n != last {
			masters[n] = true
		}
		last = n
	}
	return masters
}

// settle follows a change of the owners. Flights that wait are queued at those of today, and a node is
// closed that owns nothing any more, or that has owned nothing and was not named for a while.
func (p *pool) settle() {
	var queued []*flight
	var gone []*node
	p.mu.Lock()
	p.refreshes++
	masters := p.mastersLocked()
	changed := !maps.Equal(masters, p.masters)
	for addr, n := range p.nodes {
		queued = append(queued, n.queue...)
		n.queue = nil
		if !masters[n] && (p.masters[n] || time.Since(n.named) > strayTime) {
			delete(p.nodes, addr)
			gone = append(gone, n)
		}
	}
	p.queued, p.queueBytes = 0, 0
	p.masters = masters
	p.mu.Unlock()
	p.enqueue(queued)
	if changed {
		var addrs []string
		for n := range masters {
			addrs = append(addrs, n.addr)
		}
		slices.Sort(addrs)
		p.log.Info("other nodes own the keys now", "nodes", strings.Join(addrs, " "))
	}
	for _, n := range gone {
		n.close()
	}
}

// A node is one Redis server, the connections to it, and the flights that wait for one of them.
type node struct {
	pool    *pool
	addr    string
	ctx     context.Context // done when the node is closed
	stop    context.CancelFunc
	conns   *redis.Pool
	slots   chan struct{} // holds an element for each connection in use
	health  health
	tracker *tracker // nil: no tracking

	// The pool's lock guards the following.
	queue  []*flight
	coming bool      // a worker is about to take the queue
	most   int       // GETs in one batch
	broke  time.Time // when a connection last did; others that have been idle since before may be dead
	named  time.Time // when MOVED or ASK last did, or it was made
	failed time.Time // when a batch last did
}

func (p *pool) newNode(addr string) *node {
	n := &node{pool: p, addr: addr, most: firstBatch, named: time.Now(), slots: make(chan struct{}, p.limit), health: health{now: p.cache.now}}
	n.health.log = n.log
	n.ctx, n.stop = context.WithCancel(p.ctx)
	n.conns = &redis.Pool{
		MaxIdle: p.limit,
		Dial: func() (redis.Conn, error) {
			c, err := n.dial(p.timeout + grace)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		TestOnBorrow: func(c redis.Conn, idleSince time.Time) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if idleSince.Before(n.broke) {
				return errors.New("a connection of the same age was dead")
			}
			return c.(*upstream).guard.quiet()
		},
	}
	if p.tracking && addr != "" {
		n.tracker = startTracker(n)
	}
	return n
}

// log names the node, where there are or may be several.
func (n *node) log() *slog.Logger {
	n.pool.mu.Lock()
	defer n.pool.mu.Unlock()
	if n.pool.aloneLocked() {
		return n.pool.log
	}
	return n.pool.log.With("node", n.addr)
}

// dial makes a connection on which a read or write fails after patience. Where sentinels named the node, it
// must say itself that it is a master.
func (n *node) dial(patience time.Duration) (*upstream, error) {
	p := n.pool
	if n.addr == "" {
		<-p.learnt
		p.mu.Lock()
		defer p.mu.Unlock()
		return nil, p.unknown
	}
	u, err := p.dial(n.ctx, n.addr, patience, p.login()...)
	if err != nil || p.redis.master == "" {
		return u, err
	}
	role := ""
	reply, err := redis.Values(u.Do("ROLE"))
	if err == nil {
		_, err = redis.Scan(reply, &role)
	}
	if err == nil && role != "master" {
		err = errors.New("the sentinels name a server that is no master")
	}
	if err != nil {
		u.Close()
		return nil, err
	}
	return u, nil
}

// close closes all connections, those in use too, and waits for the tracker.
func (n *node) close() {
	n.stop()
	n.tracker.wait()
	n.conns.Close()
}

// startLocked starts a worker for the queue, unless one is on its way to it. If no slot is free, the
// workers that hold the slots come to it.
func (n *node) startLocked() {
	if len(n.queue) > 0 && !n.coming {
		n.startWorker()
	}
}

func (n *node) startWorker() {
	select {
	case n.slots <- struct{}{}:
		n.coming = true
		go n.work() // ends when the queue is empty
	default:
	}
}

// work owns a slot. It carries out what is queued until nothing is.
func (n *node) work() {
	for more := true; more; {
		runtime.Gosched() // requests that are about to ask do so first, and share a round trip
		more = n.batch()
	}
	<-n.slots
	n.pool.mu.Lock()
	defer n.pool.mu.Unlock()
	n.startLocked() // a flight that was queued since the last look at the queue may have found no slot
}

// take removes from the queue as much as fits a batch, and reports whether there was anything. It ends
// the flights that no request waits for any more, and returns the others.
func (n *node) take() (fs []*flight, any bool) {
	p := n.pool
	p.mu.Lock()
	most := min(n.most, max(1, batchBytes/max(1, int(p.cache.typical.Load()))))
	fs = slices.Clone(n.queue[:min(len(n.queue), most)])
	n.queue = slices.Delete(n.queue, 0, len(fs))
	for _, f := range fs {
		p.queueBytes -= len(f.key)
	}
	p.queued -= len(fs)
	n.coming = false
	n.startLocked() // what does not fit is another worker's
	p.mu.Unlock()
	any = len(fs) > 0
	fs, unwanted := p.cache.wanted(fs, 0)
	for _, f := range unwanted {
		p.cache.finish(f, value{}, errTimeout)
	}
	if len(fs) > 0 {
		p.mu.Lock()
		p.batches++
		p.flights += int64(len(fs))
		p.mu.Unlock()
	}
	return fs, any
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
	if len(fs) == 0 {
		if !made && n.ctx.Err() == nil {
			n.health.failed(began, conn.Err())
		}
		return any
	}
	size, failed := len(fs), 0
	rest, err := n.exchange(conn, fs)
	if err != nil {
		failed = n.broken(rest, err, made, began)
	}
	n.count(began, size, failed, err)
	return true
}

// count adds the end of a batch to the statistics, and decides how large the next may be.
func (n *node) count(began time.Duration, size, failed int, err error) {
	p := n.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.errors += int64(failed)
	if err != nil {
		n.most = firstBatch
		return
	}
	if size >= n.most {
		n.most = min(2*size, maxBatch)
	}
	p.latency.add(p.cache.now() - began)
}

// broken ends the flights of a connection that broke, or could not be made, since it began. It returns how
// many.
//
// The others are tried once more on another connection: this one may have died while it was idle, and GET
// does no harm twice. The same goes where it could not be made, but another was made meanwhile, or where
// another node is to be asked by now.
func (n *node) broken(fs []*flight, err error, made bool, began time.Duration) (failed int) {
	p := n.pool
	var again, ended []*flight
	p.mu.Lock()
	n.failed = time.Now()
	if made {
		n.broke = n.failed
	}
	p.leaveLocked(n)
	may := made || n.health.workedSince(began)
	for _, f := range fs {
		f.asking = ""
		elsewhere := p.routeLocked(f) != n && f.hops < len(p.seeds)+2
		if f.began >= p.cache.now()-2*p.timeout && (may && !f.tried || elsewhere) {
			f.tried, f.hops = f.tried || may, f.hops+1
			again = append(again, f)
		} else {
			ended = append(ended, f)
		}
	}
	p.hintLocked("")
	p.mu.Unlock()
	p.enqueue(again)
	if len(ended) > 0 {
		n.health.failed(began, err)
	}
	failure := asAnswer(err)
	for _, f := range ended {
		p.cache.finish(f, value{}, failure)
	}
	return len(ended)
}

// exchange sends a GET for each flight and finishes it with the reply. It lets go of the flights that it
// finished, and returns the rest.
func (n *node) exchange(conn redis.Conn, fs []*flight) (rest []*flight, err error) {
	sent := n.pool.cache.now()
	commands := []string{"GET", "PTTL"}
	if !n.pool.keyTTL {
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
	answered := false
	defer func() {
		if answered {
			n.health.worked()
		}
	}()
	for i, f := range fs {
		v, err := n.receive(conn, f, sent)
		refusal, isReply := err.(redis.Error)
		switch {
		case isReply && n.redirect(f, refusal):
			fs[i] = nil
			continue // another worker may have it
		case isReply:
			n.refuse(f, refusal)
		case err == nil || err == errAbsent:
			n.pool.cache.finish(f, v, err)
		default:
			return fs[i:], err
		}
		answered = answered || !isOutage(f.err)
		fs[i] = nil
	}
	return nil, nil
}

// receive reads what Redis says about a key that it was asked for at the time sent.
func (n *node) receive(conn redis.Conn, f *flight, sent time.Duration) (v value, err error) {
	reply, err := conn.Receive()
	if val, found := reply.([]byte); found {
		v = newValue(f.key, val, sent)
	} else if err == nil {
		v, err = newAbsent(f.key, sent), errAbsent
	}
	if _, isReply := err.(redis.Error); !n.pool.keyTTL || err != nil && err != errAbsent && !isReply {
		return v, err
	}
	left, failure := redis.Int64(conn.Receive())
	switch {
	case failure != nil && (err == nil || err == errAbsent):
		return v, failure
	case err == nil && left != -1: // -1: no expiry; -2: gone meanwhile
		v.expires = sent + time.Duration(max(left, 0))*time.Millisecond
	}
	return v, err
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
		colon := strings.LastIndexByte(target, ':')
		if addr = resolve(n.addr, target[:max(colon, 0)], target[colon+1:]); addr != "" {
			pause = min(pause, time.Duration(f.hops*f.hops/2)*time.Millisecond)
		}
	case "LOADING":
		p.mu.Lock()
		p.leaveLocked(n)
		elsewhere := p.routeLocked(f) != n
		p.mu.Unlock()
		if !elsewhere {
			return false
		}
		fallthrough
	case "CLUSTERDOWN", "TRYAGAIN":
		if wanted, _ := p.cache.wanted([]*flight{f}, pause); len(wanted) == 0 {
			return false
		}
	default:
		return false
	}
	f.hops++
	f.asking = ""
	p.mu.Lock()
	if p.owners == nil {
		p.owners = make([]*node, slots)
	}
	if addr != "" {
		to := p.nodeLocked(addr)
		to.named = time.Now()
		p.redirects++
		if code == "ASK" {
			f.asking = addr
		} else {
			p.owners[slot(f.key)] = to
		}
	}
	if code != "ASK" {
		p.hintLocked(n.addr)
	}
	if addr == n.addr { // it may be another server by now: connections that are in use are not used again
		n.broke = time.Now().Add(retryPause)
	}
	p.mu.Unlock()
	if pause == 0 {
		p.enqueue([]*flight{f})
	} else {
		time.AfterFunc(pause, func() { p.enqueue([]*flight{f}) })
	}
	return true
}

// refuse finishes a flight with an error reply.
func (n *node) refuse(f *flight, reply redis.Error) {
	err := passedOn(reply)
	if isOutage(err) {
		n.pool.mu.Lock()
		n.pool.errors++
		n.pool.mu.Unlock()
		n.health.refused(reply)
	}
	n.pool.cache.finish(f, value{}, err)
}

// asAnswer returns the answer to a request whose batch failed with err.
func asAnswer(err error) error {
	var refusal redis.Error
	var network net.Error
	switch {
	case errors.As(err, &refusal): // to AUTH or SELECT
		return replyError(upstreamRefused + string(refusal))
	case errors.As(err, &network) && network.Timeout():
		return errTimeout
	}
	return errUnavailable
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

// passedOn returns an error reply as clients see it. One that concerns the proxy's own standing with Redis
// is marked, so that a client does not take it for its own.
func passedOn(reply redis.Error) replyError {
	for _, code := range []string{"NOAUTH ", "NOPERM ", "WRONGPASS ", "DENIED ", "MOVED ", "ASK ", "ERR max number of clients"} {
		if strings.HasPrefix(string(reply), code) {
			return upstreamRefused + replyError(reply)
		}
	}
	return replyError(reply)
}

// A health follows whether a node can be read, and is the only one to log it.
type health struct {
	log func() *slog.Logger
	now func() time.Duration

	success atomic.Int64 // a time.Duration: when a reply came last that was no outage; 0: never

	mu      sync.Mutex    // guards the following times, on the cache's clock; 0: never
	failure time.Duration // the first since the last success, if it was logged
	warned  time.Duration // when a failure was logged last
	refusal time.Duration // when a refusal was logged last
}

// workedSince reports whether there was a reply since began.
func (h *health) workedSince(began time.Duration) bool {
	return time.Duration(h.success.Load()) > began
}

func (h *health) down() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failure > 0
}

// failed logs the first failure after a success, but not every second one where the two alternate: what
// began before a success says nothing about the time after it.
func (h *health) failed(began time.Duration, err error) {
	h.mu.Lock()
	now := h.now()
	first := h.failure == 0 && !h.workedSince(began) && (h.warned == 0 || now-h.warned > time.Second)
	if first {
		h.failure, h.warned = now, now
	}
	h.mu.Unlock()
	if first {
		h.log().Warn("Redis cannot be read; hits go on", "error", err)
	}
}

// worked notes a reply that was no outage, and logs the first after a failure.
func (h *health) worked() {
	now := h.now()
	h.success.Store(int64(now))
	h.mu.Lock()
	failure := h.failure
	h.failure = 0
	h.mu.Unlock()
	if failure > 0 {
		h.log().Info("Redis can be read again", "after", (now - failure).Round(time.Millisecond).String())
	}
}

// refused logs an error reply that is not about a key, once a minute.
func (h *health) refused(reply redis.Error) {
	h.mu.Lock()
	now := h.now()
	first := h.refusal == 0 || now-h.refusal > time.Minute
	if first {
		h.refusal = now
	}
	h.mu.Unlock()
	if first {
		h.log().Warn("Redis refuses", "error", reply)
	}
}

// An upstream is a connection on which each reply is of the type that its command has. It is not safe for
// concurrent use.
type upstream struct {
	redis.Conn
	guard   *guard
	release func() bool // its context
	due     []byte      // the first letters of the commands whose replies are still to come
	next    int         // of due
}

func (u *upstream) Close() error {
	u.release()
	return u.Conn.Close()
}

func (u *upstream) Send(command string, args ...any) error {
	u.due = append(u.due, command[0])
	return u.Conn.Send(command, args...)
}

// Receive reads a reply: bytes or nil for GET, a number for PTTL, or an error. Any other reply breaks the
// connection, as the replies after it might be taken for those of other keys. If the ASKING before a command
// was refused, that is the reply.
func (u *upstream) Receive() (reply any, err error) {
	asking := u.due[u.next] == 'A'
	if reply, err = u.receive(); !asking {
		return reply, err
	}
	refusal, isReply := err.(redis.Error)
	if err != nil && !isReply {
		return nil, err
	}
	if reply, err = u.Receive(); isReply && u.Err() == nil {
		return nil, refusal
	}
	return reply, err
}

func (u *upstream) receive() (reply any, err error) {
	command := u.due[u.next]
	if u.next++; u.next == len(u.due) {
		u.due, u.next = u.due[:0], 0
	}
	reply, err = u.Conn.Receive()
	if _, isReply := err.(redis.Error); isReply {
		return nil, err
	}
	if reply == bulkElsewhere && u.guard.bulk != nil {
		reply, u.guard.bulk = u.guard.bulk, nil
	}
	fits := reply == nil
	switch reply.(type) {
	case string:
		fits = command == 'A' && reply == "OK"
	case []byte:
		fits = command == 'G'
	case int64:
		fits = command == 'P'
	}
	if err == nil && !fits {
		err = fmt.Errorf("reading a reply: a %T is none to the command", reply)
	}
	if err != nil {
		u.Conn.Close()
		return nil, err
	}
	return reply, nil
}

// A guard hands Redis' replies to redigo one at a time, after a look at the first line of each. redigo
// allocates whatever length a reply states; a guard refuses lengths that Redis cannot mean, and reads a
// long value itself, as its bytes come.
type guard struct {
	net.Conn
	raw  syscall.RawConn // of the socket; nil over TLS
	in   *bufio.Reader
	line []byte // of the current reply, not handed over yet
	rest int    // bytes of the current value, not handed over yet
	err  error  // of readLine, for good
	bulk []byte // a long value, in whose place bulkElsewhere was handed over
}

// bulkElsewhere is the status reply that stands for a value in guard.bulk. Only upstream sees it.
const bulkElsewhere = "(elsewhere)"

func (g *guard) Read(p []byte) (n int, err error) {
	if g.err == nil && len(g.line) == 0 && g.rest == 0 {
		g.err = g.readLine()
	}
	if g.err != nil {
		return 0, g.err
	}
	n = copy(p, g.line)
	g.line = g.line[n:]
	if len(g.line) == 0 && g.rest > 0 && (n == 0 || g.in.Buffered() >= g.rest) {
		var m int
		m, err = g.in.Read(p[n:min(len(p), n+g.rest)])
		g.rest -= m
		n += m
	}
	return n, err
}

// readLine reads the first line of a reply, or of an element of one.
func (g *guard) readLine() (err error) {
	if g.line, err = g.in.ReadSlice('\n'); err != nil {
		return err
	}
	if g.line[0] != '$' && g.line[0] != '*' {
		return nil
	}
	length, err := strconv.Atoi(strings.TrimSuffix(string(g.line[1:len(g.line)-1]), "\r"))
	switch {
	case err != nil || length < -1 || length > maxReply || g.line[0] == '*' && length > maxElements:
		return fmt.Errorf("reading a reply: it begins with %.40q", g.line)
	case g.line[0] == '*' || length < 0:
	case length <= growBy:
		g.rest = length + len("\r\n")
	default:
		return g.readLong(length)
	}
	return nil
}

// readLong reads a value that is longer than what is believed at once.
func (g *guard) readLong(length int) (err error) {
	var b []byte
	for len(b) < length {
		n := len(b)
		b = slices.Grow(b, min(length-n, max(growBy, n)))[:min(length, n+max(growBy, n))]
		if _, err := io.ReadFull(g.in, b[n:]); err != nil {
			return err
		}
	}
	if end, err := g.in.ReadString('\n'); err != nil || end != "\r\n" {
		return errors.Join(errors.New("reading a reply: a value does not end where it says"), err)
	}
	g.bulk, g.line = b, []byte("+"+bulkElsewhere+"\r\n")
	return nil
}

// quiet returns an error if there is anything to read where no reply is due: it would be taken for the
// reply to the next command.
func (g *guard) quiet() error {
	if len(g.line) > 0 || g.rest > 0 || g.in.Buffered() > 0 {
		return errors.New("a reply too many")
	}
	if g.raw == nil {
		return nil
	}
	var peeked error
	err := g.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, peeked = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return true
	})
	if err == nil && peeked == syscall.EAGAIN {
		return nil
	}
	return errors.New("a reply too many, or the end of the connection")
}

// A wire is a connection whose every read and write has a deadline. It replaces redigo's own time-outs,
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

// A trackingState is whether Redis reports changes.
type trackingState int32

const (
	trackingOff trackingState = iota
	trackingDown
	trackingLive
)

func (s trackingState) String() string { return [...]string{"off", "down", "live"}[s] }

// A tracker has Redis report every key that changes, and has the cache forget it. It only sharpens the
// TTL: while its connection is down, entries live on by that.
type tracker struct {
	node *node
	live atomic.Bool
	done chan struct{} // closed when it has stopped
}

func startTracker(n *node) *tracker {
	t := &tracker{node: n, done: make(chan struct{})}
	go t.run(n.ctx) // ends when the node is closed
	return t
}

// wait waits until the tracker has stopped.
func (t *tracker) wait() {
	if t != nil {
		<-t.done
	}
}

// run follows the reports until ctx is done, over a new connection whenever one breaks. It pauses longer
// and longer between connections until one has lasted.
func (t *tracker) run(ctx context.Context) {
	defer close(t.done)
	pause, logged := time.Duration(0), false
	for ctx.Err() == nil {
		began := t.node.pool.cache.now()
		err := t.follow()
		if t.live.Swap(false) && t.node.pool.cache.now()-began > 2*pingEvery {
			pause, logged = 0, false
		}
		t.node.pool.hint("")
		if !logged && ctx.Err() == nil {
			t.node.log().Warn("tracking is down; entries live until their TTL", "error", err)
			logged = true
		}
		pause = min(max(2*pause, 50*time.Millisecond), 5*time.Second)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// follow tracks over one connection, until that breaks. The connection redirects to itself: Redis
// reports changes only to RESP3 clients or to subscribers, and redigo speaks RESP2. It is live with the
// first answer to PING, which shows that Redis lets it go on.
func (t *tracker) follow() error {
	u, err := t.node.dial(t.node.pool.timeout + pingEvery)
	if err != nil {
		return err
	}
	defer u.Close()
	c := u.Conn
	if err := subscribe(c); err != nil {
		return err
	}
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
		if len(msg) != 3 { // the answer to PING has two
			t.goLive()
			continue
		}
		keys, err := redis.ByteSlices(msg[2], nil)
		if err != nil && err != redis.ErrNil {
			return err
		}
		if u.guard.bulk != nil { // a key that is too long for the report
			keys, u.guard.bulk = nil, nil
		}
		t.node.pool.invalidations.Add(int64(max(len(keys), 1)))
		t.node.pool.cache.forget(keys)
	}
}

// goLive drops all that the cache has, once: whatever changed until now was not reported.
func (t *tracker) goLive() {
	if !t.live.Load() {
		t.node.pool.cache.forget(nil)
		t.live.Store(true)
		t.node.log().Info("tracking is live")
	}
}

// subscribe has a connection report changes to itself.
func subscribe(c redis.Conn) error {
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
	_, err = c.Receive()
	return err
}

// ping sends a PING at once and then now and then: a dead peer shows by not answering.
func ping(c redis.Conn, stop <-chan struct{}) {
	for tick := time.Tick(pingEvery); ; {
		if errors.Join(c.Send("PING"), c.Flush()) != nil {
			return // Receive fails too
		}
		select {
		case <-stop:
			return
		case <-tick:
		}
	}
}
