// Redis_proxy is a read-through cache in front of Redis. One TCP port answers HTTP GET /key and
// Redis GET key from a local LRU cache if it can, else from the backing Redis.
//
// This file is the roof: configuration, wiring, signals. Nothing in the other files names anything
// here. Dependencies point downwards: main to http and resp, those to sniff; sniff and pool to lru.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
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

// shutdownTimeout bounds a shutdown: what is not finished by then is cut off.
const shutdownTimeout = 9 * time.Second

func main() {
	cfg, err := parseConfig(os.Args[1:], os.Environ())
	switch {
	case errors.Is(err, flag.ErrHelp):
		printHelp(os.Stdout)
	case err != nil:
		fmt.Fprintln(os.Stderr, "redis_proxy:", err)
		os.Exit(2)
	case cfg.version:
		fmt.Println("redis_proxy", version)
	case cfg.check:
		if err := check(cfg); err != nil {
			fmt.Fprintln(os.Stderr, "redis_proxy:", err)
			os.Exit(1)
		}
	default:
		os.Exit(serve(cfg))
	}
}

// serve listens and runs until a signal. It returns the exit code.
func serve(cfg config) int {
	log, flush := startLog(os.Stderr, cfg)
	defer flush()
	for _, name := range cfg.unread {
		log.Warn("nobody reads this variable; is it misspelt?", "variable", name)
	}
	if err := cfg.loadCertificates(log); err != nil {
		fmt.Fprintln(os.Stderr, "redis_proxy:", err)
		return 2
	}
	signal.Ignore(syscall.SIGPIPE) // Go ends the process where stderr has no reader
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	var admin net.Listener
	l, err := listen(cfg.address())
	if err == nil && cfg.adminAddress != "" {
		admin, err = net.Listen("tcp", cfg.adminAddress)
	}
	if err != nil {
		log.Error("not started", "error", err)
		return 1
	}
	fitDescriptors(&cfg, log)
	fitMemory(&cfg, log)
	cfg.cores = tuneCores()
	run(ctx, cfg, l, admin, log)
	return 0
}

// loadCertificates reads the files that the flags name.
func (c *config) loadCertificates(log *slog.Logger) error {
	own, errOwn := newCertificate[tls.ClientHelloInfo]("tls", c.tlsCert, c.tlsKey, log)
	client, errClient := newCertificate[tls.CertificateRequestInfo]("redis", c.redisCert, c.redisKey, log)
	if err := cmp.Or(errOwn, errClient); err != nil {
		return err
	}
	if own != nil {
		c.clients.tls = &tls.Config{GetCertificate: own, NextProtos: []string{"h2", "http/1.1", "http/1.0"}}
	}
	c.pool.tls = &tls.Config{InsecureSkipVerify: c.redisInsecure, GetClientCertificate: client}
	if c.redisInsecure {
		log.Warn("the certificate of Redis is not checked, as --redis-insecure says")
	}
	if c.redisCACert == "" {
		return nil
	}
	pem, err := os.ReadFile(c.redisCACert)
	roots, errRoots := x509.SystemCertPool()
	if err = cmp.Or(err, errRoots); err == nil && !roots.AppendCertsFromPEM(pem) {
		err = errors.New("has no certificate in PEM")
	}
	if err != nil {
		return fmt.Errorf("--redis-cacert %q: %w", c.redisCACert, err)
	}
	c.pool.tls.RootCAs = roots
	return nil
}

// startLog returns a logger that does not wait for out, which may block or fail: lines that do not
// go out in time are dropped and counted. flush waits a moment for the last ones; what is logged
// later is lost.
func startLog(out io.Writer, cfg config) (log *slog.Logger, flush func()) {
	w := &logWriter{lines: make(chan []byte, 256)}
	go func() { // ends with the process
		for line := range w.lines {
			if n := w.dropped.Swap(0); n > 0 {
				newLogger(out, cfg).Warn("log lines were dropped", "count", n)
			}
			out.Write(line)
		}
	}()
	return newLogger(w, cfg), func() {
		w.Write(nil) // is taken when all before it is written
		for began := time.Now(); len(w.lines) > 0 && time.Since(began) < time.Second; {
			time.Sleep(time.Millisecond)
		}
	}
}

// A logWriter passes lines on without waiting.
type logWriter struct {
	lines   chan []byte
	dropped atomic.Int64
}

func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- slices.Clone(line):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

func newLogger(w io.Writer, cfg config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// address returns where to serve, as net.Listen has it.
func (c *config) address() (network, address string) {
	if path, ok := strings.CutPrefix(c.listenAddress, "unix://"); ok {
		return "unix", path
	}
	return "tcp", net.JoinHostPort(c.listenAddress, strconv.Itoa(c.port))
}

// listen takes the place of a Unix socket that a process left behind; one that answers stays.
func listen(network, address string) (net.Listener, error) {
	if file, err := os.Lstat(address); network == "unix" && err == nil && file.Mode()&os.ModeSocket != 0 {
		if _, err := net.Dial(network, address); errors.Is(err, syscall.ECONNREFUSED) {
			os.Remove(address)
		}
	}
	return net.Listen(network, address)
}

// check asks a running proxy for a sign of life. Any reply is one, an error too.
func check(cfg config) error {
	network, address := cfg.address()
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err != nil {
		return err
	}
	if cfg.tlsCert != "" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // that it answers is enough
	}
	c.SetDeadline(time.Now().Add(2 * time.Second))
	io.WriteString(c, "PING\r\n") // if that fails, so does reading
	reply := make([]byte, 1)
	if _, err = c.Read(reply); err == nil && reply[0] != '+' && reply[0] != '-' {
		err = fmt.Errorf("PING was answered by %q", reply)
	}
	return err
}

// tuneCores sets GOMAXPROCS to half of the cores, and returns a description for the log. The other
// half is for clients on the same machine: threads that wait for work cost more than they bring.
// Where the process has a CPU limit of its own, or GOMAXPROCS is set, Go follows that.
func tuneCores() string {
	all := runtime.GOMAXPROCS(0)
	switch {
	case os.Getenv("GOMAXPROCS") != "":
		return fmt.Sprint(all, " as GOMAXPROCS says")
	case cgroupLimit("cpu.max", "cpu.cfs_quota_us") < math.MaxInt64:
		return fmt.Sprint(all, " as the CPU limit says")
	}
	runtime.GOMAXPROCS(max(1, all/2))
	return fmt.Sprintf("%d of %d", runtime.GOMAXPROCS(0), all)
}

// fitMemory makes garbage collection rare while the heap is small, and bounds the heap to about
// twice the cache and what the clients need, unless GOGC or GOMEMLIMIT say otherwise. Where the
// container allows less than that, the cache is made smaller.
func fitMemory(cfg *config, log *slog.Logger) {
	const others = 32 << 20 // what is not the cache's
	allowed := cgroupLimit("memory.max", "memory.limit_in_bytes") / 10 * 9
	if fits := max(allowed-others, others/2) / 2; fits < cfg.cache.maxBytes {
		log.Warn("fewer bytes in the cache, as the container has not enough memory", "cache_bytes", fits,
			"wanted", cfg.cache.maxBytes, "memory", allowed/9*10)
		cfg.cache.maxBytes = fits
	}
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(400)
		cfg.clients.grown = func(clients int) { // most often to the same limit, which costs nothing
			debug.SetMemoryLimit(min(allowed, 2*cfg.cache.maxBytes+others+int64(clients/1000)<<25))
		}
		cfg.clients.grown(0)
	}
}

// cgroupLimit returns the least number above 0 that one of the files begins with in the control
// groups of the process, of both versions, from its own up to the root (cgroups(7)). None:
// math.MaxInt64.
func cgroupLimit(files ...string) int64 {
	least := int64(math.MaxInt64)
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.SplitSeq(string(groups), "\n") {
		_, line, _ = strings.Cut(line, ":")
		controllers, group, _ := strings.Cut(line, ":") // no controllers: version 2
		for below := ""; group != below; below, group = group, filepath.Dir(group) {
			for _, file := range files {
				b, _ := os.ReadFile(filepath.Join("/sys/fs/cgroup", controllers, group, file))
				n := int64(0)
				if fmt.Sscan(string(b), &n); n > 0 { // "max" is no number
					least = min(least, n)
				}
			}
		}
	}
	return least
}

// fitDescriptors allows fewer clients where the process may not open enough files for them.
func fitDescriptors(cfg *config, log *slog.Logger) {
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	others := 32 + maxRefusing + maxAdmin + 8*cfg.pool.limit // for listeners and logs too; a cluster has several nodes
	possible := max(int(min(limit.Cur, math.MaxInt32))-others, 1)
	if possible < cfg.clients.maxClients {
		log.Warn("fewer clients, as the process may not open enough files",
			"max_clients", possible, "wanted", cfg.clients.maxClients, "files", limit.Cur)
		cfg.clients.maxClients = possible
	}
}

// run serves on l, and metrics and health on admin if that is not nil, until ctx is done. Then it
// stops what it started in reverse order. It owns the listeners.
func run(ctx context.Context, cfg config, l, admin net.Listener, log *slog.Logger) {
	var p *pool // the cache and the pool need each other; no flight begins before both are there
	c := newCache(cfg.cache, func(fs []*flight) { p.enqueue(fs) })
	p = newPool(cfg.pool, c, log)
	defer p.close()
	pw := newPassword(cfg.password)
	room := int(max(16<<20, cfg.cache.maxBytes/4))
	cfg.clients.requests, cfg.clients.values = newBudget(room), newBudget(room)
	web := newWeb(cfg.clients, c, pw, log)
	resp := &resp{cache: c, password: pw, db: cfg.pool.redis.db}
	s := newServer(l, cfg.clients, log, map[protocol]frontEnd{protoHTTP: web, protoRESP: resp})
	resp.figures = func() []figure {
		return slices.Concat(cfg.figures(l.Addr(), c.started, pw), keyFigures(&web.tally, &resp.tally), s.figures(),
			c.figures(), p.figures())
	}
	log.Info("serving", "version", version, "address", l.Addr().String(), "protocols", "http resp",
		"tls", cfg.clients.tls != nil, "password", pw.needed, "redis", cfg.pool.redis.hosts,
		"redis_tls", cfg.pool.redis.tls, "database", cfg.pool.redis.db, "tracking", cfg.pool.tracking,
		"cache_size", cfg.cache.maxKeys, "cache_bytes", cfg.cache.maxBytes, "cache_timeout", cfg.cache.ttl.String(),
		"cores", cfg.cores)
	if admin != nil {
		log.Info("serving metrics, health and profiles", "address", admin.Addr().String())
		a := newAdmin(resp.figures, p.ready, c.forget, log)
		go a.Serve(admin) // ends with its Close
		defer a.Close()
	}
	go s.run() // ends with s.stop
	p.probe()
	<-ctx.Done()

	log.Info("stopping")
	deadline, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	context.AfterFunc(deadline, s.cut) // also where net/http waits for a client that takes nothing
	web.drain()
	s.stop()
	web.shutdown(deadline)
	s.wait(deadline)
	log.Info("stopped", "uptime", c.now().Round(time.Millisecond).String())
}

// figures reports the configuration, in labels, and the process, in Redis' and Prometheus' names
// where they have one.
func (c *config) figures(addr net.Addr, started time.Time, pw *password) []figure {
	build := fmt.Sprintf("build_info{version=%q,go_version=%q}", version, runtime.Version())
	info := fmt.Sprintf("info{address=%q,redis=%q,cache_timeout=%q,stale_timeout=%q,absent_timeout=%q,"+
		"refresh_before=%q,redis_ttl=\"%t\",tls=\"%t\",password=\"%t\"}", addr, c.pool.redis.hosts, c.cache.ttl,
		c.cache.stale, c.cache.absent, c.cache.refresh, c.pool.keyTTL, c.clients.tls != nil, c.password != "")
	_, port, _ := net.SplitHostPort(addr.String()) // none of a Unix socket
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	obtained, pageSize := mem.Sys-mem.HeapReleased, uint64(os.Getpagesize())
	pages := obtained / pageSize // that are resident, where there is no /proc
	statm, _ := os.ReadFile("/proc/self/statm")
	fmt.Sscan(string(statm), new(uint64), &pages)
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	return []figure{
		{"", "", build, "What the program was built from, in labels; always 1.", 1},
		{"", "", info, "How the proxy is configured, in labels; always 1.", 1},
		{"Server", "redis_version", "", "", redisVersion},
		{"Server", "redis_mode", "", "", "standalone"},
		{"Server", "redis_proxy_version", "", "", version},
		{"Server", "tcp_port", "", "", cmp.Or(port, "0")},
		{"Server", "os", "", "", runtime.GOOS + " " + runtime.GOARCH},
		{"Server", "gomaxprocs", "go_max_procs", "Cores that may serve.", runtime.GOMAXPROCS(0)},
		{"Server", "process_id", "", "", os.Getpid()},
		{"Server", "uptime_in_seconds", "uptime_seconds", "Age of the process.", int64(time.Since(started).Seconds())},
		{"", "", "process_start_time_seconds", "Start of the process, in Unix time.", started.Unix()},
		{"", "", "process_cpu_seconds_total", "CPU time used, by user and system.", cpu.Seconds()},
		{"Memory", "used_memory", "go_heap_bytes", "Memory of objects.", mem.HeapAlloc},
		{"Memory", "used_memory_rss", "go_memory_bytes", "Memory obtained from the system.", obtained},
		{"", "", "process_resident_memory_bytes", "Resident memory.", pages * pageSize},
		{"Persistence", "loading", "", "", 0},
		{"Stats", "acl_access_denied_auth", "passwords_denied_total", "Wrong passwords of clients.", pw.denied.Load()},
		{"Replication", "role", "", "", "master"},
		{"Replication", "connected_slaves", "", "", 0},
		{"", "", "go_goroutines", "Goroutines.", runtime.NumGoroutine()},
		{"", "", "go_gc_cycles_total", "Garbage collections.", mem.NumGC},
	}
}

// keyFigures reports how keys were answered: by protocol in the metrics, and over both in INFO.
func keyFigures(web, resp *tally) (fs []figure) {
	const help = "Keys asked for, by protocol and how they were answered."
	var counts [len(outcomes)]int64
	all := int64(0)
	for o, name := range [...]string{"hits", "misses", "collapsed", "stale", "absent", "absent_hits", "errors"} {
		http, resp := web[o].Load(), resp[o].Load()
		labels := fmt.Sprintf(`,result=%q}`, outcomes[o])
		fs = append(fs, figure{"Cache", "cache_" + name, "", "", http + resp},
			figure{"", "", `requests_total{protocol="http"` + labels, help, http},
			figure{"", "", `requests_total{protocol="resp"` + labels, help, resp})
		counts[o], all = http+resp, all+http+resp
	}
	return append(fs, figure{"Stats", "total_commands_processed", "", "", all},
		figure{"Stats", "keyspace_hits", "", "", counts[hit]},
		figure{"Stats", "keyspace_misses", "", "", all - counts[hit]})
}

// A config holds the flags' values. The zero value is not useful: parseConfig makes one.
type config struct {
	cache                            cacheSettings
	pool                             poolSettings
	clients                          serverSettings
	listenAddress, adminAddress      string
	port, redisPort                  int
	redisHost, password              string
	tlsCert, tlsKey                  string
	redisCACert, redisCert, redisKey string
	redisInsecure, check, version    bool
	logLevel                         slog.Level
	logFormat                        string
	unread                           []string // RP_ variables that are not in the table
	cores                            string   // which cores serve, for the log
}

// An option is a row of the table of flags. Its environment variable follows from its name.
type option struct {
	name, def, usage string
	at               any // where its value goes
	rule
}

// A rule says what values must be. ok looks only at those that parse; nil takes them all.
type rule struct {
	must string
	ok   func(string) bool
}

var (
	truth     = rule{must: "true or false"}
	aSize     = rule{must: "a number of bytes above 0, such as 65536, 64KB, 256MB or 1GB"}
	aTime     = rule{must: "a time above 0, such as 30, 1.5 or 250ms"}
	timeOr0   = rule{must: "a time such as 30, 1.5 or 250ms, or 0"}
	aHost     = rule{"a host name or an IP address, without a port", isHost}
	anAddress = rule{aHost.must + ", or unix:///path", isListenAddress}
	aFile     = rule{"the name of a file", func(s string) bool { return !noFile.MatchString(s) }}
	hostPort  = rule{"host:port, such as 127.0.0.1:9090 or :9090", isHostPort}
	aLevel    = rule{"one of debug, info, warn, error", func(s string) bool { return !strings.ContainsAny(s, "+-") }}
	aFormat   = rule{"one of text, json", func(s string) bool { return s == "text" || s == "json" }}
	aRedis    = rule{must: redisURLForms}
)

// secret matches values that are not shown, as they may be URLs with a password or keys in PEM, and
// noFile those that name no file.
var secret, noFile = regexp.MustCompile("@|-----|\n"), regexp.MustCompile("://|-----|\n")

// between is the rule for whole numbers.
func between(low, high int) rule {
	return rule{fmt.Sprintf("a whole number from %d to %d", low, high), func(s string) bool {
		n, err := strconv.Atoi(s)
		return err == nil && low <= n && n <= high
	}}
}

func isListenAddress(s string) bool { return isHost(s) || strings.HasPrefix(s, "unix:///") }

func isHostPort(s string) bool {
	host, port, _ := net.SplitHostPort(s)
	return s == "" || (host == "" || isHost(host)) && between(0, 65535).ok(port)
}

// options is the table of flags.
func (c *config) options() []option {
	return []option{
		{"listen-address", "127.0.0.1", "address to serve on, or unix:///path", &c.listenAddress, anAddress},
		{"port", "8080", "port to serve on; 0 picks a free one", &c.port, between(0, 65535)},
		{"password", "", "what clients must present; empty: anyone who can connect", &c.password, rule{}},
		{"tls-cert", "", "certificate in PEM: serve TLS only, both protocols", &c.tlsCert, aFile},
		{"tls-key", "", "key of the certificate in PEM", &c.tlsKey, aFile},
		{"redis-host", "127.0.0.1", "host of the backing Redis", &c.redisHost, aHost},
		{"redis-port", "6379", "port of the backing Redis", &c.redisPort, between(1, 65535)},
		{"redis-url", "", "instead of host and port:\n" + redisURLForms, &c.pool.redis, aRedis},
		{"redis-cacert", "", "whom to trust for rediss:// besides the system, in PEM", &c.redisCACert, aFile},
		{"redis-cert", "", "client certificate for rediss://, in PEM", &c.redisCert, aFile},
		{"redis-key", "", "key of the client certificate, in PEM", &c.redisKey, aFile},
		{"redis-insecure", "false", "do not check the certificate of Redis", &c.redisInsecure, truth},
		{"redis-timeout", "1s", "longest wait for Redis: queue, dial, reply", &c.pool.timeout, aTime},
		{"redis-ttl", "false", "end an entry when its key expires in Redis", &c.pool.keyTTL, truth},
		{"client-limit", "8", "most connections to each Redis in use at once", &c.pool.limit, between(1, 1000)},
		{"tracking", "false", "drop entries when Redis says they changed", &c.pool.tracking, truth},
		{"cache-size", "10000", "most keys in the cache", &c.cache.maxKeys, between(1, 1<<31-1)},
		{"cache-bytes", "256MB", "most bytes of keys, values and bookkeeping", &c.cache.maxBytes, aSize},
		{"cache-timeout", "30s", "TTL of every entry, from its fetch on", &c.cache.ttl, aTime},
		{"stale-timeout", "0", "how long past its TTL an entry serves outages", &c.cache.stale, timeOr0},
		{"absent-timeout", "0", "how long \"no such key\" is kept; 0: it is not", &c.cache.absent, timeOr0},
		{"refresh-before", "0", "a hit so near the end has the key fetched anew", &c.cache.refresh, timeOr0},
		{"max-clients", "10000", "most client connections at once", &c.clients.maxClients, between(1, 1<<20)},
		{"idle-timeout", "0", "silence that closes clients; 0: none, HTTP 2m", &c.clients.idleTimeout, timeOr0},
		{"admin-address", "", "host:port for a page, metrics, health, profiles", &c.adminAddress, hostPort},
		{"log-level", "info", "debug, info, warn or error", &c.logLevel, aLevel},
		{"log-format", "text", "text or json", &c.logFormat, aFormat},
		{"check", "false", "ask the configured address for a PING: exit 0 or 1", &c.check, truth},
		{"version", "false", "print the version and exit", &c.version, truth},
	}
}

// variable returns the environment variable of the option, or none.
func (o option) variable() string {
	if o.name == "check" || o.name == "version" || o.name == "help" {
		return ""
	}
	return "RP_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// assign stores the value that where, a flag or a variable, gives. Its error has no secrets.
func (o option) assign(where, val string) (err error) {
	switch at := o.at.(type) {
	case *string:
		*at = val
	case *bool:
		*at, err = strconv.ParseBool(val)
	case *int:
		*at, err = strconv.Atoi(val)
	case *int64:
		*at, err = parseSize(val)
	case *time.Duration:
		if *at, err = parseTime(val); *at == 0 && o.def != "0" {
			err = strconv.ErrRange
		}
	case *slog.Level:
		err = at.UnmarshalText([]byte(val))
	case *redisAddress:
		*at, err = parseRedisURL(val)
	}
	if err == nil && (o.ok == nil || o.ok(val)) {
		return nil
	}
	must := strings.ReplaceAll(o.must, "\n", " ")
	if o.name != "redis-url" && !secret.MatchString(val) {
		where += " " + strconv.Quote(val)
	}
	return fmt.Errorf("%s: must be %s", where, must)
}

// parseConfig reads the arguments, the environment for what they leave open, and defaults. The
// error is flag.ErrHelp where help was asked for.
func parseConfig(args, environ []string) (config, error) {
	cfg := config{clients: serverSettings{writeTimeout: 30 * time.Second, grown: func(int) {}}}
	var bad error
	fs := flag.NewFlagSet("redis_proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, o := range cfg.options() {
		o.assign("", o.def)
		define := fs.Func
		if o.rule.must == truth.must {
			define = fs.BoolFunc
		}
		define(o.name, "", func(val string) error {
			bad = o.assign("--"+o.name, val)
			return bad
		})
	}
	switch err := fs.Parse(args); {
	case bad != nil:
		return cfg, bad // package flag would say it in more words, and show secrets
	case errors.Is(err, flag.ErrHelp):
		return cfg, err
	case err != nil:
		what, _, _ := strings.Cut(err.Error(), "=") // what follows may be a secret
		if secret.MatchString(what) {
			what = "malformed argument"
		}
		return cfg, errors.New(what + " (--help lists the flags)")
	case fs.NArg() > 0 && (cfg.password != "" || secret.MatchString(fs.Arg(0))): // part of a secret, perhaps
		return cfg, errors.New("unexpected argument: only flags are allowed (--help lists them)")
	case fs.NArg() > 0:
		return cfg, fmt.Errorf("unexpected argument %q: only flags are allowed (--help lists them)", fs.Arg(0))
	case cfg.version:
		return cfg, nil
	}
	given := make(map[string]bool) // by a flag, or a variable
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	err := cfg.readEnvironment(environ, given)
	if cfg.pool.redis.hosts == "" {
		cfg.pool.redis.hosts = net.JoinHostPort(cfg.redisHost, strconv.Itoa(cfg.redisPort))
	}
	cfg.cache.timeout = cfg.pool.timeout
	cfg.cache.absent = min(cfg.cache.absent, cfg.cache.ttl)
	return cfg, err
}

// readEnvironment sets options that are not given yet from variables that are not empty: ours, else
// PORT and REDIS_URL, which platforms set. It returns the first error.
func (c *config) readEnvironment(environ []string, given map[string]bool) (bad error) {
	vars := make(map[string]string)
	for _, kv := range environ {
		name, val, _ := strings.Cut(kv, "=")
		vars[name] = val
	}
	for _, o := range c.options() {
		names := []string{o.variable()}
		if o.name == "port" || o.name == "redis-url" && !given["redis-host"] && !given["redis-port"] {
			names = append(names, strings.TrimPrefix(names[0], "RP_"))
		}
		for _, name := range names {
			if vars[name] != "" && !given[o.name] {
				given[o.name], bad = true, cmp.Or(bad, o.assign(name, vars[name]))
			}
			delete(vars, name)
		}
	}
	c.unread = slices.DeleteFunc(slices.Sorted(maps.Keys(vars)), func(name string) bool {
		return !strings.HasPrefix(name, "RP_")
	})
	return bad
}

// groups are the titles in the help, by the first option below each.
var groups = map[string]string{"listen-address": "Serving", "redis-host": "Redis", "cache-size": "Cache",
	"max-clients": "Limits", "admin-address": "Operations"}

// printHelp prints lines of 100 columns at most.
func printHelp(w io.Writer) {
	fmt.Fprint(w, `redis_proxy answers HTTP GET /key and Redis GET key from a cache in front of Redis.

Usage: redis_proxy [--flag value | --flag=value] ...
Example: redis_proxy --redis-url redis://127.0.0.1:6379 --cache-timeout 1m --tracking

A flag overrides its environment variable. A time is 30, 1.5 (seconds), 250ms or 2m.
`)
	for _, o := range append(new(config).options(), option{name: "help", usage: "print this and exit"}) {
		if title := groups[o.name]; title != "" {
			fmt.Fprintf(w, "\n%s\n", title)
		}
		usage := strings.ReplaceAll(o.usage, "\n", "\n"+strings.Repeat(" ", 42))
		if o.def != "" && o.variable() != "" {
			usage += " (default " + o.def + ")"
		}
		fmt.Fprintf(w, "  --%-17s %-19s %s\n", o.name, o.variable(), usage)
	}
}

// parseTime reads Go's notation, or a number of seconds.
func parseTime(s string) (time.Duration, error) {
	if strings.Trim(s, "0123456789.") == "" {
		s += "s"
	}
	d, err := time.ParseDuration(s)
	if d < 0 || d >= 1e9*time.Second {
		err = strconv.ErrRange
	}
	return d, err
}

// parseSize reads a number of bytes; as in redis.conf, 1KB is 1024 bytes.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGBkmgb")
	units := map[string]int{"": 0, "B": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30}
	shift, ok := units[strings.ToUpper(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || n <= 0 || n > 1<<60>>shift {
		err = strconv.ErrRange
	}
	return n << shift, err
}

const redisURLForms = "redis://[[user]:pass@]host[:port][,host[:port]...][/db],\nredis-sentinel://.../master[/db], " +
	"rediss for TLS,\nor unix:///path[?db=n]"

// redisURL splits a URL, as package url does not take lists of hosts: into unix or TLS and
// sentinels, login, hosts, and the rest.
var redisURL = regexp.MustCompile(`(?i)^(?:(unix)|(?:redis|valkey)(s?)([-+]sentinel)?)://([^/?#]*@)?([^/?#]*)(.*)$`)

// parseRedisURL reads the URL of a Redis, of nodes of a cluster, or of sentinels. Empty: the zero
// address.
func parseRedisURL(s string) (a redisAddress, err error) {
	m := redisURL.FindStringSubmatch(s)
	switch {
	case s == "":
		return a, nil
	case m == nil:
		return a, errors.New("malformed")
	}
	u, err := url.Parse("redis://" + m[4] + "hosts" + m[6])
	if err != nil {
		return a, err
	}
	query, err := url.ParseQuery(u.RawQuery)
	take := func(name string) string {
		defer query.Del(name)
		return query.Get(name)
	}
	a.user, a.tls, a.master = u.User.Username(), m[2] != "", u.Fragment
	a.password, _ = u.User.Password()
	port, db, sentinels := "6379", strings.TrimPrefix(u.Path, "/"), m[3] != ""
	if sentinels {
		port = "26379"
		a.sentinelUser, a.sentinelPassword = take("sentinel_username"), take("sentinel_password")
	}
	if sentinels && a.master == "" {
		a.master, db, _ = strings.Cut(db, "/")
	}
	unix := m[1] != ""
	if a.hosts = parseRedisHosts(m[5], port); unix {
		a.hosts, db = u.Path, take("db")
	}
	a.db, _ = strconv.Atoi(db)
	if err != nil || len(a.hosts) < 2 || unix && m[5] != "" || len(query) > 0 ||
		db != "" && !between(0, 1<<30).ok(db) || sentinels == (a.master == "") || u.User != nil && a.password == "" ||
		a.sentinelUser != "" && a.sentinelPassword == "" {
		err = errors.New("malformed")
	}
	return a, err
}

// parseRedisHosts reads host[:port],... with brackets around IPv6 addresses, and gives each a port.
// It returns nothing if one is malformed.
func parseRedisHosts(s, port string) string {
	hosts := strings.Split(s, ",")
	for i, host := range hosts {
		if _, _, err := net.SplitHostPort(host); err != nil {
			hosts[i] = host + ":" + port
		}
		name, port, err := net.SplitHostPort(hosts[i])
		if err != nil || !isHost(name) || !between(1, 65535).ok(port) {
			return ""
		}
	}
	return strings.Join(hosts, ",")
}
