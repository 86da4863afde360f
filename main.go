// Redis_proxy is a read-through cache in front of Redis. One TCP port answers HTTP GET /key and Redis
// GET key from a local LRU cache if it can, else from the backing Redis.
//
// This file holds the configuration, the wiring and the proxy itself: a cache over a pool. It knows the
// other five files; they know nothing of each other, only the types declared here.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// version is set by the linker.
var version = "dev"

// writeTimeout is how long a client may take nothing of its replies.
const writeTimeout = 30 * time.Second

// httpIdleTimeout is how long an HTTP connection is kept alive if --idle-timeout does not say.
const httpIdleTimeout = 2 * time.Minute

// flushAt is how many bytes of answers are gathered before they are written.
const flushAt = 16 << 10

// maxAhead bounds the keys that a client asks for before it waits, and aheadBytes the values that are fetched
// for it, by how large they typically are.
const (
	maxAhead   = 128
	aheadBytes = 256 << 10
)

// drainTimeout bounds a shutdown: what is not finished by then is cut off.
const drainTimeout = 9 * time.Second

func main() {
	cfg, err := parseConfig(os.Args[1:], os.Environ())
	log := newLogger(os.Stderr, cfg)
	if err == nil && cfg.tlsCert != "" && !cfg.check && !cfg.version {
		cfg.tls, err = tlsConfig(cfg.tlsCert, cfg.tlsKey, log)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		printHelp(os.Stdout)
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "redis_proxy:", err)
		os.Exit(2)
	case cfg.version:
		fmt.Println("redis_proxy", version)
		return
	case cfg.check:
		if err := check(cfg); err != nil {
			fmt.Fprintln(os.Stderr, "redis_proxy:", err)
			os.Exit(1)
		}
		return
	}
	for _, name := range unreadVariables(os.Environ()) {
		log.Warn("nobody reads this variable; is it misspelt?", "variable", name)
	}
	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() { // ends with the process
		<-signals
		stop()
		<-signals
		os.Exit(1) // somebody does not want to wait
	}()
	l, err := net.Listen("tcp", net.JoinHostPort(cfg.listenAddress, strconv.Itoa(cfg.port)))
	if err == nil && cfg.adminAddress != "" {
		cfg.admin, err = net.Listen("tcp", cfg.adminAddress)
	}
	if err != nil {
		log.Error("not started", "error", err)
		os.Exit(1)
	}
	cfg.maxClients = fitDescriptors(cfg, log)
	tune(cfg)
	cfg.grown = func(clients int) { tuneMemory(cfg.cacheBytes, clients) }
	run(ctx, cfg, l, log)
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// check asks a running proxy for a sign of life. An error, such as that there are too many clients, is one.
func check(cfg config) error {
	host := cfg.listenAddress
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	c, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(cfg.port)), 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if cfg.tlsCert != "" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // it is alive, whoever it is
	}
	c.SetDeadline(time.Now().Add(2 * time.Second))
	io.WriteString(c, "PING\r\n") // if that fails, so does reading
	reply := make([]byte, 1)
	if _, err := io.ReadFull(c, reply); err != nil {
		return err
	}
	if reply[0] != '+' && reply[0] != '-' {
		return fmt.Errorf("PING was answered by %q", reply)
	}
	return nil
}

// tune sets up the Go runtime, where GOMAXPROCS, GOGC and GOMEMLIMIT do not say otherwise. Half of the
// cores serve: the others are for those who ask, and threads that wait for work cost more than they
// bring.
func tune(cfg config) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/2))
	}
	tuneMemory(cfg.cacheBytes, 0)
}

// tuneMemory has garbage collected seldom while memory is small beside the cache's limit, and within twice
// that limit, and what so many clients need, otherwise.
func tuneMemory(cacheBytes int64, clients int) {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(400)
		debug.SetMemoryLimit(2*min(cacheBytes, 1<<60) + 32<<20 + int64(clients)<<15)
	}
}

// fitDescriptors is how many clients the process may have, as each costs a file descriptor.
func fitDescriptors(cfg config, log *slog.Logger) int {
	const others = 32 + maxRefusing // listeners, logs, who reads metrics
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return cfg.maxClients
	}
	most := max(int(min(limit.Cur, math.MaxInt32))-cfg.clientLimit-others, 1)
	if most < cfg.maxClients {
		log.Warn("fewer clients, as the process may not open enough files", "max_clients", most, "wanted", cfg.maxClients, "files", limit.Cur)
	}
	return min(most, cfg.maxClients)
}

// run serves on l until ctx is done, then stops what it started in reverse order. It owns l.
func run(ctx context.Context, cfg config, l net.Listener, log *slog.Logger) {
	if addr, ok := l.Addr().(*net.TCPAddr); ok {
		cfg.port = addr.Port // for INFO, where the flag said 0
	}
	p := newProxy(cfg, log)
	defer p.pool.close()
	web, resp := newWeb(p, l.Addr()), newRESP(p)
	s := newServer(l, cfg, log, [...]frontEnd{protoHTTP: web, protoRESP: resp})
	p.clients = s.clients

	log.Info("serving", "version", version, "address", l.Addr().String(), "protocols", "http resp", "redis", cfg.redis.address(),
		"cache_size", cfg.cacheSize, "cache_bytes", cfg.cacheBytes, "cache_timeout", cfg.cacheTimeout.String())
	if cfg.admin != nil {
		log.Info("serving metrics, health and profiles", "address", cfg.admin.Addr().String())
		admin := newAdmin(p)
		go admin.Serve(cfg.admin) // ends with its Close
		defer admin.Close()
	}
	go web.run() // ends with web.shutdown
	go s.run()   // ends with s.stop
	<-ctx.Done()

	log.Info("stopping")
	deadline, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	web.drain()
	s.stop()
	web.shutdown(deadline)
	s.wait(deadline)
	log.Info("stopped", "uptime", p.now().Round(time.Millisecond).String())
}

// A proxy is a cache over a pool. All its methods are safe for concurrent use.
type proxy struct {
	cfg     config
	log     *slog.Logger
	started time.Time
	cache   *cache
	pool    *pool
	clients func() clientCounts
	counts  [len(protocols)][len(results)]atomic.Int64
	denied  atomic.Int64 // wrong passwords
}

func newProxy(cfg config, log *slog.Logger) *proxy {
	p := &proxy{cfg: cfg, log: log, started: time.Now(), clients: func() clientCounts { return clientCounts{} }}
	p.cache = newCache(cfg.cacheSize, cfg.cacheBytes, cfg.cacheTimeout, cfg.staleTimeout)
	p.pool = newPool(cfg, p.cache, p.now, log)
	return p
}

// clientCounts tells how many clients are connected, and how many were let in and refused so far.
type clientCounts struct{ now, accepted, refused int }

// now is the proxy's clock: the time since it was made, which no change of the wall clock moves.
func (p *proxy) now() time.Duration { return time.Since(p.started) }

// get answers keys to a client that waits since then: all that the cache lacks is asked for before the
// first is waited for. It returns how many it answered, from the first on: fewer than all where that could
// be too much to hold. The keys are not kept. len(answers) must be len(keys).
func (p *proxy) get(proto protocol, since time.Duration, keys [][]byte, answers []answer) (answered int) {
	now := p.now()
	if p.cache.get(now, keys, answers) == 0 {
		p.counts[proto][fromCache].Add(int64(len(keys)))
		return len(keys)
	}
	answered = p.pool.fetch(now, keys, answers)
	p.wait(since, answers[:answered])
	p.count(proto, answers[:answered])
	return answered
}

// ready tells whether Redis answers, by a fetch like any other. That it does not let the proxy read this
// key is an answer.
func (p *proxy) ready() bool {
	now, answers := p.now(), []answer{{source: fromRedis}}
	key := fmt.Sprint("redis_proxy:ready:", p.started.UnixNano()) // nobody has it, so it is never in the cache
	p.pool.fetch(now, [][]byte{[]byte(key)}, answers)
	p.wait(now, answers)
	refusal, _ := answers[0].err.(replyError)
	forbidden := strings.HasPrefix(string(refusal), upstreamRefused+"NOPERM ") && strings.Contains(string(refusal), " key")
	return !isOutage(answers[0].err) || forbidden
}

// wait completes answers to who waits since then. It begins with the last: replies come in the order of
// the questions, so that whoever waits for many is woken once.
func (p *proxy) wait(since time.Duration, answers []answer) {
	var timer *time.Timer
	for i := len(answers) - 1; i >= 0; i-- {
		a := &answers[i]
		if a.source == fromCache {
			continue
		}
		old := a.value
		if a.fetch != nil {
			if timer == nil {
				timer = time.NewTimer(since + p.cfg.redisTimeout - p.now())
				defer timer.Stop()
			}
			if p.pool.wait(a.fetch, timer.C) {
				a.value, a.err = a.fetch.value, a.fetch.err
			} else {
				a.value, a.err = value{}, errTimeout
				timer.Reset(0) // the others have had their time too
			}
		}
		if old.data != "" && isOutage(a.err) {
			a.value, a.err, a.source = old, nil, fromStale
		}
	}
}

// isOutage tells whether Redis could not answer, as opposed to what it did answer.
func isOutage(err error) bool {
	refusal, ok := err.(replyError)
	return err == errUnavailable || err == errTimeout || ok && !refusal.wrongType()
}

// open tells whether no password is needed.
func (p *proxy) open() bool { return p.cfg.password == "" }

// authorised tells whether a password is the right one. It takes the same time for every wrong one.
func (p *proxy) authorised(password []byte) bool {
	want, got := sha256.Sum256([]byte(p.cfg.password)), sha256.Sum256(password)
	if subtle.ConstantTimeCompare(want[:], got[:]) == 1 {
		return true
	}
	p.denied.Add(1)
	return false
}

// count adds complete answers to the statistics.
func (p *proxy) count(proto protocol, answers []answer) {
	var n [len(results)]int64
	for i := range answers {
		switch answers[i].err {
		case nil:
			n[answers[i].source]++
		case errAbsent:
			n[absent]++
		default:
			n[unanswerable]++
		}
	}
	for r := range n {
		if n[r] > 0 {
			p.counts[proto][r].Add(n[r])
		}
	}
}

// A figure is something that the proxy tells of itself: in INFO, in the metrics, or in both.
type figure struct {
	section, name      string // in INFO; no name: not there
	metric, kind, help string // in the metrics; no metric: not there
	value              any
}

// figures tells the state of the proxy, in Redis' and Prometheus' names where they have one.
func (p *proxy) figures() []figure {
	keys, bytes, cached := p.cache.usage()
	open, used, fetched := p.pool.usage()
	clients := p.clients()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	var answered [len(results)]int64
	for proto := range protocols {
		for o := range results {
			answered[o] += p.counts[proto][o].Load()
		}
	}
	all, hits := int64(0), answered[fromCache]
	for _, n := range answered {
		all += n
	}
	return []figure{
		{"Server", "redis_version", "", "", "", redisVersion},
		{"Server", "redis_mode", "", "", "", "standalone"},
		{"Server", "redis_proxy_version", "", "", "", version},
		{"Server", "os", "", "", "", runtime.GOOS + " " + runtime.GOARCH},
		{"Server", "gomaxprocs", "go_max_procs", "gauge", "Cores that may serve.", runtime.GOMAXPROCS(0)},
		{"Server", "process_id", "", "", "", os.Getpid()},
		{"Server", "tcp_port", "", "", "", p.cfg.port},
		{"Server", "uptime_in_seconds", "uptime_seconds", "gauge", "Time since the start.", int64(p.now() / time.Second)},
		{"Clients", "connected_clients", "clients", "gauge", "Client connections.", clients.now},
		{"Clients", "maxclients", "clients_max", "gauge", "Most client connections at once.", p.cfg.maxClients},
		{"Clients", "blocked_clients", "", "", "", 0},
		{"Memory", "used_memory", "go_heap_bytes", "gauge", "Memory of live and not yet collected objects.", mem.HeapAlloc},
		{"Memory", "used_memory_rss", "go_memory_bytes", "gauge", "Memory obtained from the system.", mem.Sys - mem.HeapReleased},
		{"Memory", "maxmemory", "cache_bytes_max", "gauge", "Most bytes in the cache.", p.cfg.cacheBytes},
		{"Memory", "maxmemory_policy", "", "", "", "allkeys-lru"},
		{"Persistence", "loading", "", "", "", 0},
		{"Stats", "total_connections_received", "connections_total", "counter", "Client connections accepted.", clients.accepted},
		{"Stats", "rejected_connections", "connections_refused_total", "counter", "Client connections over the limit.", clients.refused},
		{"Stats", "total_commands_processed", "", "", "", all},
		{"Stats", "keyspace_hits", "", "", "", hits},
		{"Stats", "keyspace_misses", "", "", "", all - hits},
		{"Stats", "acl_access_denied_auth", "passwords_denied_total", "counter", "Wrong passwords and users of clients.", p.denied.Load()},
		{"Stats", "evicted_keys", "evictions_total", "counter", "Entries that made room for others.", cached.evictions},
		{"Stats", "expired_keys", "expirations_total", "counter", "Entries dropped after their TTL.", cached.expirations},
		{"Replication", "role", "", "", "", "master"},
		{"Replication", "connected_slaves", "", "", "", 0},
		{"Cache", "cache_keys", "cache_keys", "gauge", "Entries in the cache, expired ones included.", keys},
		{"Cache", "cache_bytes", "cache_bytes", "gauge", "Bytes of keys, values and bookkeeping in the cache.", bytes},
		{"Cache", "cache_hits", "", "", "", hits},
		{"Cache", "cache_misses", "", "", "", answered[fromRedis]},
		{"Cache", "cache_collapsed", "", "", "", answered[fromAnother]},
		{"Cache", "cache_stale", "", "", "", answered[fromStale]},
		{"Cache", "cache_absent", "", "", "", answered[absent]},
		{"Cache", "cache_errors", "", "", "", answered[unanswerable]},
		{"Cache", "upstream_connections", "upstream_connections", "gauge", "Connections to Redis.", open},
		{"Cache", "upstream_connections_used", "upstream_connections_used", "gauge", "Connections to Redis in use.", used},
		{"Cache", "upstream_fetches", "upstream_fetches_total", "counter", "GETs taken up by a connection to Redis.", fetched.fetches},
		{"Cache", "upstream_batches", "upstream_batches_total", "counter", "Pipelines of them.", fetched.batches},
		{"Cache", "upstream_errors", "upstream_errors_total", "counter", "Fetches that failed, or were answered by an error that is not about the key.", fetched.errors},
		{"Cache", "tracking", "tracking", "gauge", "Whether Redis reports changes: 0 is off, 1 down, 2 live.", trackingState(p.pool.tracked.Load())},
		{"Cache", "tracking_invalidations", "invalidations_total", "counter", "Changes that Redis reported.", fetched.invalidations},
		{"", "", "go_goroutines", "gauge", "Goroutines.", runtime.NumGoroutine()},
		{"", "", "go_gc_cycles_total", "counter", "Garbage collections.", mem.NumGC},
		{"Keyspace", "db0", "", "", "", fmt.Sprintf("keys=%d,expires=%d,avg_ttl=0", keys, keys)},
	}
}

// A trackingState tells whether Redis reports changes.
type trackingState int32

const (
	trackingOff trackingState = iota
	trackingDown
	trackingLive
)

func (s trackingState) String() string { return [...]string{"off", "down", "live"}[s] }

// An answer is what the proxy has for a key: a value, an error, or a fetch to wait for.
type answer struct {
	value
	err     error // nil, errAbsent, errUnavailable, errTimeout or a replyError
	source  source
	expired bool   // the cache has it, past its TTL; until the answer is complete, value is it if it may be used
	fetch   *fetch // nil if there is nothing to wait for
}

// A source tells where an answer comes from.
type source uint8

const (
	fromCache    source = iota
	fromRedis           // this request had it fetched
	fromAnother         // another request had it fetched already
	fromStale           // from the cache, past its TTL, as Redis cannot answer
	absent              // in the statistics only: there is no such key
	unanswerable        // in the statistics only: an error
)

// results are the sources' names in the metrics.
var results = [...]string{"hit", "miss", "collapsed", "stale", "absent", "error"}

type protocol uint8

const (
	protoHTTP protocol = iota
	protoRESP
)

var protocols = [...]string{"http", "resp"}

// What can be wrong with an answer, besides a replyError. The texts are for logs; each front end has
// its own words.
var (
	errAbsent      = errors.New("no such key")
	errUnavailable = errors.New("upstream unavailable")
	errTimeout     = errors.New("upstream timed out")
)

// upstreamRefused begins a replyError that is about the proxy and not about a key.
const upstreamRefused = "ERR upstream refused: "

// A replyError is an error reply of Redis, as it came.
type replyError string

func (e replyError) Error() string { return string(e) }

// wrongType tells that the key holds something that GET does not read.
func (e replyError) wrongType() bool { return strings.HasPrefix(string(e), "WRONGTYPE ") }

// A fetch is the promise of a value. The pool completes it; whoever asked waits for it there: finished is for
// who comes later, done for who waits.
type fetch struct {
	key   string
	asked time.Duration // on the proxy's clock
	older *fetch        // in flight for the same key, too late to be joined; the pool's lock guards it, dirty and done
	dirty bool          // what Redis replies must not be stored
	done  chan struct{} // nil until somebody waits; closed when finished

	finished atomic.Bool // set when the following are
	value
	err    error
	stored bool // in the cache
}

// A value is what Redis had for a key at one moment. It is a string and not bytes, because it is shared
// by the cache and all who read it: nobody can write to it.
type value struct {
	data    string        // the key, then the value as a bulk string of RESP, in one allocation
	keyLen  int           // how much of data is the key
	fetched time.Duration // on the proxy's clock, when Redis was asked
}

func newValue(key string, val []byte, fetched time.Duration) value {
	data := key + "$" + strconv.Itoa(len(val)) + "\r\n" + string(val) + "\r\n"
	return value{data: data, keyLen: len(key), fetched: fetched}
}

func (v value) key() string  { return v.data[:v.keyLen] }
func (v value) bulk() string { return v.data[v.keyLen:] }

// content is the value without its frame.
func (v value) content() string {
	b := v.bulk()
	return b[strings.IndexByte(b, '\n')+1 : len(b)-2]
}

// A clientConn can be handed on.
type clientConn interface {
	net.Conn
	// release leaves the read deadlines to another, who reads what was read too much once more.
	release(unread []byte)
}

// A frontEnd speaks a protocol with clients.
type frontEnd interface {
	// serve owns the connection. It may return before the connection ends.
	serve(net.Conn)
	// refuse tells a client that there are too many, and closes the connection.
	refuse(net.Conn)
}

// A store is what the pool fills with what it fetches.
type store interface {
	get(now time.Duration, keys [][]byte, answers []answer) (misses int)
	put(now time.Duration, v value) (stored bool)
	remove(now time.Duration, key []byte)
	clear()
}

// A config holds the flags' values. The zero value is not useful: parseConfig makes one.
type config struct {
	listenAddress string
	port          int
	redis         redisAddress
	redisTimeout  time.Duration
	clientLimit   int
	cacheSize     int
	cacheBytes    int64
	cacheTimeout  time.Duration
	staleTimeout  time.Duration
	maxClients    int
	idleTimeout   time.Duration
	tracking      bool
	password      string
	tlsCert       string
	tlsKey        string
	adminAddress  string
	logLevel      slog.Level
	logFormat     string
	check         bool
	tls           *tls.Config   // from tlsCert and tlsKey; nil: no TLS
	admin         net.Listener  // on adminAddress; nil: none
	writeTimeout  time.Duration // not a flag; tests have less time
	grown         func(int)     // told when the number of clients passes another thousand; nil: nobody
	version       bool
	fromURL       redisAddress // what --redis-url says; instead of redis where it was given
}

// An option is a row of the table of flags. Its environment variable follows from its name.
type option struct {
	name, def, usage string
	set              func(string) error
}

// options is the table of flags: each parses, checks and stores its own.
func (c *config) options() []option {
	return []option{
		{"listen-address", "127.0.0.1", "address to serve on", host(&c.listenAddress)},
		{"port", "8080", "port to serve on; 0 picks a free one", number(&c.port, 0, 65535)},
		{"redis-host", "127.0.0.1", "host of the backing Redis", host(&c.redis.host)},
		{"redis-port", "6379", "port of the backing Redis", number(&c.redis.port, 1, 65535)},
		{"redis-url", "", "URL redis://[[user]:pass@]host[:port][/db], rediss:// for TLS; instead of host and port", c.setRedisURL},
		{"redis-timeout", "1s", "longest time a request waits for Redis in all: queue, dial, reply", duration(&c.redisTimeout, false)},
		{"client-limit", "8", "most Redis connections in use at once; further misses wait their turn", number(&c.clientLimit, 1, 1000)},
		{"cache-size", "10000", "most keys in the cache", number(&c.cacheSize, 1, 1<<31-1)},
		{"cache-bytes", "256MB", "most bytes of keys, values and bookkeeping in the cache", size(&c.cacheBytes)},
		{"cache-timeout", "30s", "TTL of every entry, a time from the moment it was fetched; 30, 1.5 (seconds) or 250ms", duration(&c.cacheTimeout, false)},
		{"stale-timeout", "0", "how long after its TTL an entry may still answer while Redis cannot, a time", duration(&c.staleTimeout, true)},
		{"max-clients", "10000", "most client connections at once", number(&c.maxClients, 1, 1<<20)},
		{"idle-timeout", "0", "time after which a silent client is closed; 0: never (HTTP keep-alive: 2 minutes)", duration(&c.idleTimeout, true)},
		{"tracking", "false", "drop entries as soon as Redis says that they changed", boolean(&c.tracking)},
		{"password", "", "password that clients must present; empty: anyone who can connect", text(&c.password)},
		{"tls-cert", "", "file of a certificate in PEM: serve TLS only, both protocols", text(&c.tlsCert)},
		{"tls-key", "", "file of its key in PEM", text(&c.tlsKey)},
		{"admin-address", "", "host:port for metrics, health and profiles; empty: none", hostPort(&c.adminAddress)},
		{"log-level", "info", "level: debug, info, warn or error", c.setLogLevel},
		{"log-format", "text", "format: text or json", choice(&c.logFormat, "text", "json")},
	}
}

// secret tells of options whose value must not be shown.
func (o option) secret() bool { return o.name == "redis-url" || o.name == "password" }

// variable is the environment variable of an option.
func (o option) variable() string {
	return "RP_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// assign sets the option from where, a flag or a variable. Its error is fit for users.
func (o option) assign(where, val string) error {
	err := o.set(val)
	if err != nil && o.secret() {
		return fmt.Errorf("%s: %w", where, err)
	} else if err != nil {
		return fmt.Errorf("%s %q: %w", where, val, err)
	}
	return nil
}

// parseConfig reads defaults, then the environment, then the arguments. An empty variable counts as
// not set. The error is flag.ErrHelp where help was asked for.
func parseConfig(args, environ []string) (config, error) {
	cfg := config{writeTimeout: writeTimeout}
	variables := make(map[string]string)
	for _, kv := range environ {
		name, val, _ := strings.Cut(kv, "=")
		variables[name] = val
	}
	var bad, badVariable error
	fs := flag.NewFlagSet("redis_proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	define := func(o option) {
		assign := func(val string) error {
			bad = o.assign("--"+o.name, val)
			return bad
		}
		if o.def == "false" {
			fs.BoolFunc(o.name, o.usage, assign)
		} else {
			fs.Func(o.name, o.usage, assign)
		}
	}
	define(option{name: "check", def: "false", set: boolean(&cfg.check)})
	define(option{name: "version", def: "false", set: boolean(&cfg.version)})
	for _, o := range cfg.options() {
		if err := o.assign("default", o.def); err != nil {
			panic(err)
		}
		if val := variables[o.variable()]; val != "" && badVariable == nil {
			badVariable = o.assign(o.variable(), val)
		}
		define(o)
	}
	switch err := fs.Parse(args); {
	case bad != nil:
		return cfg, bad // flag would say it in more words, and show secrets
	case errors.Is(err, flag.ErrHelp):
		return cfg, err
	case err != nil:
		what, _, _ := strings.Cut(err.Error(), "=") // what follows may be a secret
		return cfg, errors.New(what + " (--help lists the flags)")
	case fs.NArg() > 0 && (cfg.password != "" || strings.Contains(fs.Arg(0), "@")): // part of a secret, perhaps
		return cfg, errors.New("unexpected argument: only flags are allowed (--help lists them)")
	case fs.NArg() > 0:
		return cfg, fmt.Errorf("unexpected argument %q: only flags are allowed, and --flag=true for a switch (--help lists them)", fs.Arg(0))
	case badVariable != nil && !cfg.version:
		return cfg, badVariable
	case (cfg.tlsCert == "") != (cfg.tlsKey == ""):
		return cfg, fmt.Errorf("--tls-cert or RP_TLS_CERT %q, --tls-key or RP_TLS_KEY %q: both must be given, or neither", cfg.tlsCert, cfg.tlsKey)
	}
	if cfg.fromURL.host != "" {
		cfg.redis = cfg.fromURL
	}
	return cfg, nil
}

// unreadVariables lists the RP_ variables that are not in the table.
func unreadVariables(environ []string) (names []string) {
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		known := func(o option) bool { return o.variable() == name }
		if strings.HasPrefix(name, "RP_") && !slices.ContainsFunc(new(config).options(), known) {
			names = append(names, name)
		}
	}
	return names
}

func printHelp(w io.Writer) {
	fmt.Fprint(w, "redis_proxy answers HTTP GET /key and Redis GET key from a cache in front of Redis.\n\n"+
		"Each flag has an environment variable, which it overrides. --flag value and --flag=value both work.\n\n")
	for _, o := range new(config).options() {
		def := ""
		if o.def != "" {
			def = " (default " + o.def + ")"
		}
		fmt.Fprintf(w, "  --%s, %s\n        %s%s\n", o.name, o.variable(), o.usage, def)
	}
	fmt.Fprint(w, "  --check\n        ask the configured address for a PING; exit 0 if it answers, else 1\n"+
		"  --version\n        print the version and exit\n  --help\n        print this and exit\n")
}

// parsed is the setter of an option that must be as told: it stores what parse makes of its argument.
func parsed[T any](p *T, must string, parse func(string) (T, bool)) func(string) error {
	return func(s string) error {
		v, ok := parse(s)
		if !ok {
			return errors.New("must be " + must)
		}
		*p = v
		return nil
	}
}

func text(p *string) func(string) error {
	return parsed(p, "text", func(s string) (string, bool) { return s, true })
}

func host(p *string) func(string) error {
	return parsed(p, "a host name or an IP address, without a port", func(s string) (string, bool) {
		_, err := netip.ParseAddr(s)
		return s, err == nil || s != "" && !strings.ContainsAny(s, ":/[]@ ")
	})
}

func hostPort(p *string) func(string) error {
	return parsed(p, "host:port, such as 127.0.0.1:9090 or :9090", func(s string) (string, bool) {
		name, port, err := net.SplitHostPort(s)
		return s, s == "" || err == nil && (name == "" || host(new(string))(name) == nil) && number(new(int), 0, 65535)(port) == nil
	})
}

func choice(p *string, allowed ...string) func(string) error {
	return parsed(p, "one of "+strings.Join(allowed, ", "), func(s string) (string, bool) { return s, slices.Contains(allowed, s) })
}

func (c *config) setLogLevel(s string) error {
	return cmp.Or(choice(new(string), "debug", "info", "warn", "error")(strings.ToLower(s)), c.logLevel.UnmarshalText([]byte(s)))
}

func boolean(p *bool) func(string) error {
	return parsed(p, "true or false", func(s string) (bool, bool) { v, err := strconv.ParseBool(s); return v, err == nil })
}

func number(p *int, low, high int) func(string) error {
	return parsed(p, fmt.Sprintf("a whole number from %d to %d", low, high), func(s string) (int, bool) {
		n, err := strconv.Atoi(s)
		return n, err == nil && low <= n && n <= high
	})
}

// duration reads Go's notation, or a number of seconds.
func duration(p *time.Duration, zero bool) func(string) error {
	must := "a time above 0, such as 30, 1.5 or 250ms"
	if zero {
		must = "a time such as 30, 1.5 or 250ms, or 0"
	}
	return parsed(p, must, func(s string) (time.Duration, bool) {
		d, err := time.ParseDuration(s)
		if sec, e := strconv.ParseFloat(s, 64); e == nil && math.Abs(sec) < 1e9 {
			d, err = time.Duration(sec*float64(time.Second)), nil
		}
		return d, err == nil && (d > 0 || d == 0 && zero) && d < 1e9*time.Second
	})
}

// size reads a number of bytes; as in redis.conf, 1KB is 1024 bytes.
func size(p *int64) func(string) error {
	return parsed(p, "a number of bytes above 0, such as 65536, 64KB, 256MB or 1GB", func(s string) (int64, bool) {
		digits := strings.TrimRight(s, "KMGBkmgb")
		shift, ok := map[string]int{"": 0, "B": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30}[strings.ToUpper(s[len(digits):])]
		n, err := strconv.ParseInt(digits, 10, 64)
		return n << shift, err == nil && ok && n > 0 && n <= math.MaxInt64>>shift
	})
}

// A redisAddress tells how to reach the backing Redis.
type redisAddress struct {
	host           string
	port           int
	user, password string
	db             int
	tls            bool
}

func (a redisAddress) address() string { return net.JoinHostPort(a.host, strconv.Itoa(a.port)) }

// setRedisURL reads redis://[[user]:pass@]host[:port][/db]. Its errors do not show the URL.
func (c *config) setRedisURL(s string) error {
	if s == "" {
		c.fromURL = redisAddress{}
		return nil
	}
	malformed := errors.New("must be redis://[[user]:pass@]host[:port][/db], or rediss:// for TLS")
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "redis" && u.Scheme != "rediss" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" {
		return malformed
	}
	a := redisAddress{port: 6379, tls: u.Scheme == "rediss"}
	if host(&a.host)(u.Hostname()) != nil {
		return malformed
	}
	if u.Port() != "" && number(&a.port, 1, 65535)(u.Port()) != nil {
		return malformed
	}
	if db := strings.TrimPrefix(u.Path, "/"); db != "" && number(&a.db, 0, 1<<30)(db) != nil {
		return malformed
	}
	a.user = u.User.Username()
	password, ok := u.User.Password()
	if u.User != nil && (!ok || password == "") {
		return errors.New("has a user but no password: " + malformed.Error())
	}
	a.password = password
	c.fromURL = a
	return nil
}
