// Redis_proxy is a read-through cache in front of Redis. One TCP port answers HTTP GET /key and Redis
// GET key from a local LRU cache if it can, else from the backing Redis.
//
// This file holds the configuration, the wiring and the proxy itself: a cache over a pool. It knows the
// other five files; they know nothing of each other, only the types declared here.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"os/signal"
	"runtime"
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

// drainTimeout bounds a shutdown: what is not finished by then is cut off.
const drainTimeout = 9 * time.Second

func main() {
	cfg, err := parseConfig(os.Args[1:], os.Environ())
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
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	for _, name := range unreadVariables(os.Environ()) {
		log.Warn("nobody reads this variable; is it misspelt?", "variable", name)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	l, err := net.Listen("tcp", net.JoinHostPort(cfg.listenAddress, strconv.Itoa(cfg.port)))
	if err != nil {
		log.Error("not started", "error", err)
		os.Exit(1)
	}
	cfg.maxClients = fitDescriptors(cfg, log)
	run(ctx, cfg, l, log)
}

// fitDescriptors is how many clients the process may have, as each costs a file descriptor.
func fitDescriptors(cfg config, log *slog.Logger) int {
	const others = 32 // listeners, logs, refused clients
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
	p := newProxy(cfg, log)
	defer p.pool.close()
	web, resp := newWeb(p, l.Addr()), newRESP(p)
	s := newServer(l, cfg, log, [...]frontEnd{protoHTTP: web, protoRESP: resp})
	p.clients = s.clients

	log.Info("serving", "version", version, "address", l.Addr(), "protocols", "http resp", "redis", cfg.redis.address(),
		"cache_size", cfg.cacheSize, "cache_bytes", cfg.cacheBytes, "cache_timeout", cfg.cacheTimeout)
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
	log.Info("stopped", "uptime", p.now().Round(time.Millisecond))
}

// A proxy is a cache over a pool. All its methods are safe for concurrent use.
type proxy struct {
	cfg     config
	log     *slog.Logger
	started time.Time
	cache   *cache
	pool    *pool
	clients func() (now, refused int) // how many are connected, and how many were not let in
	counts  [len(protocols)][len(outcomes)]atomic.Int64
}

func newProxy(cfg config, log *slog.Logger) *proxy {
	p := &proxy{cfg: cfg, log: log, started: time.Now(), clients: func() (int, int) { return 0, 0 }}
	p.cache = newCache(cfg.cacheSize, cfg.cacheBytes, cfg.cacheTimeout, cfg.staleTimeout)
	p.pool = newPool(cfg, p.cache, p.now, log)
	return p
}

// now is the proxy's clock: the time since it was made, which no change of the wall clock moves.
func (p *proxy) now() time.Duration { return time.Since(p.started) }

// ask answers keys from the cache, and has what it lacks fetched: an answer with a fetch is not
// complete before wait. The keys are not kept. len(answers) must be len(keys).
func (p *proxy) ask(keys [][]byte, answers []answer) {
	now := p.now()
	if p.cache.get(now, keys, answers) > 0 {
		p.pool.fetch(now, keys, answers)
	}
}

// wait completes answers. It begins with the last: replies come in the order of the questions, so that
// whoever waits for many is woken once.
func (p *proxy) wait(answers []answer) {
	var late <-chan time.Time
	for i := len(answers) - 1; i >= 0; i-- {
		a := &answers[i]
		if a.source == fromCache {
			continue
		}
		old := a.value
		if a.fetch != nil {
			if late == nil {
				timer := time.NewTimer(p.cfg.redisTimeout)
				defer timer.Stop()
				late = timer.C
			}
			if a.fetch.wait(late) {
				a.value, a.err = a.fetch.value, a.fetch.err
			} else {
				a.value, a.err = value{}, errTimeout
				late = closedTime // the others have had their time too
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

// count adds complete answers to the statistics.
func (p *proxy) count(proto protocol, answers []answer) {
	var n [len(outcomes)]int64
	for i := range answers {
		n[answers[i].outcome()]++
	}
	for o := range n {
		if n[o] > 0 {
			p.counts[proto][o].Add(n[o])
		}
	}
}

// A section is a part of what INFO tells.
type section struct {
	name   string
	fields []field
}

type field struct {
	name  string
	value any
}

// info tells the state of the proxy, in the names that Redis has for it where it has one.
func (p *proxy) info() []section {
	keys, bytes, cached := p.cache.usage()
	open, used, fetched := p.pool.usage()
	clients, refused := p.clients()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	var answered [len(outcomes)]int64
	for proto := range protocols {
		for o := range outcomes {
			answered[o] += p.counts[proto][o].Load()
		}
	}
	hits := answered[fromCache]
	all := int64(0)
	for _, n := range answered {
		all += n
	}
	tracking := "off"
	if p.cfg.tracking {
		tracking = p.pool.tracking()
	}
	return []section{
		{"Server", []field{
			{"redis_version", redisVersion}, {"redis_mode", "standalone"}, {"redis_proxy_version", version},
			{"os", runtime.GOOS + " " + runtime.GOARCH}, {"go_version", runtime.Version()}, {"process_id", os.Getpid()},
			{"tcp_port", p.cfg.port}, {"uptime_in_seconds", int64(p.now() / time.Second)},
		}},
		{"Clients", []field{{"connected_clients", clients}, {"maxclients", p.cfg.maxClients}}},
		{"Memory", []field{
			{"used_memory", mem.HeapAlloc}, {"used_memory_rss", mem.Sys - mem.HeapReleased}, {"maxmemory", p.cfg.cacheBytes},
			{"maxmemory_policy", "allkeys-lru"},
		}},
		{"Persistence", []field{{"loading", 0}}},
		{"Stats", []field{
			{"total_commands_processed", all}, {"rejected_connections", refused}, {"keyspace_hits", hits}, {"keyspace_misses", all - hits},
			{"evicted_keys", cached.evictions}, {"expired_keys", cached.expirations},
		}},
		{"Replication", []field{{"role", "master"}, {"connected_slaves", 0}}},
		{"Cache", []field{
			{"cache_keys", keys}, {"cache_bytes", bytes}, {"cache_hits", hits}, {"cache_misses", answered[fromRedis]},
			{"cache_collapsed", answered[fromAnother]}, {"cache_stale", answered[fromStale]},
			{"cache_absent", answered[outcomeAbsent]}, {"cache_errors", answered[outcomeError]},
			{"cache_evictions", cached.evictions}, {"cache_expirations", cached.expirations},
			{"upstream_connections", open}, {"upstream_connections_used", used}, {"upstream_fetches", fetched.fetches},
			{"upstream_batches", fetched.batches}, {"upstream_errors", fetched.errors},
			{"tracking", tracking}, {"tracking_invalidations", fetched.invalidations},
		}},
		{"Keyspace", []field{{"db0", fmt.Sprintf("keys=%d,expires=%d,avg_ttl=0", keys, keys)}}},
	}
}

// An answer is what the proxy has for a key: a value, an error, or a fetch to wait for.
type answer struct {
	value
	err     error // nil, errAbsent, errUnavailable, errTimeout or a replyError
	source  source
	expired bool   // the cache has it, past its TTL; until the answer is complete, value is it if it may be used
	fetch   *fetch // nil if there is nothing to wait for
}

func (a *answer) outcome() outcome {
	switch a.err {
	case nil:
		return outcome(a.source)
	case errAbsent:
		return outcomeAbsent
	}
	return outcomeError
}

// A source tells where an answer comes from.
type source uint8

const (
	fromCache   source = iota
	fromRedis          // this request had it fetched
	fromAnother        // another request had it fetched already
	fromStale          // from the cache, past its TTL, as Redis cannot answer
)

// An outcome is what the statistics count of an answer: its source, or that there is no value.
type outcome uint8

const (
	outcomeAbsent = outcome(fromStale) + 1 + iota
	outcomeError
)

var outcomes = [...]string{"hit", "miss", "collapsed", "stale", "absent", "error"}

type protocol uint8

const (
	protoHTTP protocol = iota
	protoRESP
)

var protocols = [...]string{"http", "resp"}

// closedTime is a timer that has expired, for any number of readers.
var closedTime = func() <-chan time.Time {
	c := make(chan time.Time)
	close(c)
	return c
}()

// What can be wrong with an answer, besides a replyError. The texts are for logs; each front end has
// its own words.
var (
	errAbsent      = errors.New("no such key")
	errUnavailable = errors.New("Redis is unreachable")
	errTimeout     = errors.New("Redis is too slow")
)

// A replyError is an error reply of Redis, as it came.
type replyError string

func (e replyError) Error() string { return string(e) }

// wrongType tells that the key holds something that GET does not read.
func (e replyError) wrongType() bool { return strings.HasPrefix(string(e), "WRONGTYPE ") }

// A fetch is the promise of a value. The pool completes it; whoever asked waits for done.
type fetch struct {
	key   string
	asked time.Duration // on the proxy's clock
	dirty bool          // what Redis replies must not be stored; the pool's lock guards it
	done  chan struct{} // closed when the following are set
	value
	err    error
	stored bool // in the cache
}

// wait tells whether the fetch is done before it is too late.
func (f *fetch) wait(late <-chan time.Time) bool {
	select {
	case <-f.done:
		return true
	default:
	}
	select {
	case <-f.done:
		return true
	case <-late:
		return false
	}
}

// A value is what Redis had for a key at one moment. It is a string and not bytes, because it is shared
// by the cache and all who read it: nobody can write to it.
type value struct {
	data    string        // the key, then the value as a bulk string of RESP, in one allocation
	keyLen  int           // how much of data is the key
	fetched time.Duration // on the proxy's clock, when Redis was asked
}

func newValue(key string, val []byte, fetched time.Duration) value {
	var b strings.Builder
	var scratch [20]byte
	size := strconv.AppendInt(scratch[:0], int64(len(val)), 10)
	b.Grow(len(key) + len("$\r\n\r\n") + len(size) + len(val))
	b.WriteString(key)
	b.WriteByte('$')
	b.Write(size)
	b.WriteString("\r\n")
	b.Write(val)
	b.WriteString("\r\n")
	return value{data: b.String(), keyLen: len(key), fetched: fetched}
}

func (v value) key() string  { return v.data[:v.keyLen] }
func (v value) bulk() string { return v.data[v.keyLen:] }

// content is the value without its frame.
func (v value) content() string {
	b := v.bulk()
	return b[strings.IndexByte(b, '\n')+1 : len(b)-2]
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
	remove(key []byte)
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
	writeTimeout  time.Duration // not a flag; tests have less time
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
		{"listen-address", "127.0.0.1", "`address` to serve on", text(&c.listenAddress)},
		{"port", "8080", "`port` to serve on; 0 picks a free one", number(&c.port, 0, 65535)},
		{"redis-host", "127.0.0.1", "`host` of the backing Redis", text(&c.redis.host)},
		{"redis-port", "6379", "`port` of the backing Redis", number(&c.redis.port, 1, 65535)},
		{"redis-url", "", "`URL` redis://[[user]:pass@]host[:port][/db], rediss:// for TLS; instead of host and port", c.setRedisURL},
		{"redis-timeout", "1s", "longest `time` a request waits for Redis in all: queue, dial, reply", duration(&c.redisTimeout, false)},
		{"client-limit", "8", "most Redis `connections` in use at once; further misses wait their turn", number(&c.clientLimit, 1, 1000)},
		{"cache-size", "10000", "most `keys` in the cache", number(&c.cacheSize, 1, 1<<31-1)},
		{"cache-bytes", "256MB", "most `bytes` of keys, values and bookkeeping in the cache", size(&c.cacheBytes)},
		{"cache-timeout", "30s", "TTL of every entry, a `time` from the moment it was fetched; 30, 1.5 (seconds) or 250ms", duration(&c.cacheTimeout, false)},
		{"stale-timeout", "0", "how long after its TTL an entry may still answer while Redis cannot, a `time`", duration(&c.staleTimeout, true)},
		{"max-clients", "10000", "most client `connections` at once", number(&c.maxClients, 1, 1<<20)},
		{"idle-timeout", "0", "`time` after which a silent client is closed; 0: never (HTTP keep-alive: 2 minutes)", duration(&c.idleTimeout, true)},
		{"tracking", "false", "drop entries as soon as Redis says that they changed", boolean(&c.tracking)},
	}
}

// secret tells of options whose value must not be shown.
func (o option) secret() bool { return o.name == "redis-url" }

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
	var bad error
	fs := flag.NewFlagSet("redis_proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.BoolVar(&cfg.version, "version", false, "")
	for _, o := range cfg.options() {
		if err := o.assign("default", o.def); err != nil {
			panic(err)
		}
		if val := lookup(environ, o.variable()); val != "" {
			if err := o.assign(o.variable(), val); err != nil {
				return cfg, err
			}
		}
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
	switch err := fs.Parse(args); {
	case bad != nil:
		return cfg, bad // flag would say it in more words, and show secrets
	case errors.Is(err, flag.ErrHelp):
		return cfg, err
	case err != nil:
		return cfg, fmt.Errorf("%w (--help lists the flags)", err)
	case fs.NArg() > 0:
		return cfg, fmt.Errorf("unexpected argument %q: only flags are allowed (--help lists them)", fs.Arg(0))
	}
	if cfg.fromURL.host != "" {
		cfg.redis = cfg.fromURL
	}
	return cfg, nil
}

// lookup finds a variable in a list of the form of os.Environ.
func lookup(environ []string, name string) string {
	for _, kv := range environ {
		if val, ok := strings.CutPrefix(kv, name+"="); ok {
			return val
		}
	}
	return ""
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
		arg, usage := flag.UnquoteUsage(&flag.Flag{Usage: o.usage, Value: noValue{}})
		def := ""
		if o.def != "" {
			def = " (default " + o.def + ")"
		}
		fmt.Fprintf(w, "  --%s %s, %s\n        %s%s\n", o.name, arg, o.variable(), usage, def)
	}
	fmt.Fprint(w, "  --version\n        print the version and exit\n  --help\n        print this and exit\n")
}

// noValue lets flag.UnquoteUsage name an argument that the usage does not.
type noValue struct{}

func (noValue) String() string   { return "" }
func (noValue) Set(string) error { return nil }

func text(p *string) func(string) error {
	return func(s string) error {
		if s == "" {
			return errors.New("must not be empty")
		}
		*p = s
		return nil
	}
}

func boolean(p *bool) func(string) error {
	return func(s string) (err error) {
		if *p, err = strconv.ParseBool(s); err != nil {
			return errors.New("must be true or false")
		}
		return nil
	}
}

func number(p *int, low, high int) func(string) error {
	return func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return fmt.Errorf("must be a whole number from %d to %d", low, high)
		}
		*p = n
		return nil
	}
}

// duration reads Go's notation, or a number of seconds.
func duration(p *time.Duration, zero bool) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if sec, e := strconv.ParseFloat(s, 64); e == nil && math.Abs(sec) < 1e9 {
			d, err = time.Duration(sec*float64(time.Second)), nil
		}
		if err != nil || d < 0 || d == 0 && !zero {
			if zero {
				return errors.New("must be a time such as 30, 1.5 or 250ms, or 0")
			}
			return errors.New("must be a time above 0, such as 30, 1.5 or 250ms")
		}
		*p = d
		return nil
	}
}

// size reads a number of bytes; as in redis.conf, 1KB is 1024 bytes.
func size(p *int64) func(string) error {
	return func(s string) error {
		digits := strings.TrimRight(strings.ToUpper(s), "KMGB")
		shift, ok := map[string]int{"": 0, "B": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30}[strings.ToUpper(s[len(digits):])]
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || !ok || n <= 0 || n > math.MaxInt64>>shift {
			return errors.New("must be a number of bytes above 0, such as 65536, 64KB, 256MB or 1GB")
		}
		*p = n << shift
		return nil
	}
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
	a := redisAddress{host: u.Hostname(), port: 6379, tls: u.Scheme == "rediss"}
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
