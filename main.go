// Redis_proxy is a read-through cache in front of Redis. One TCP port answers HTTP GET /key and Redis
// GET key from a local LRU cache if it can, else from the backing Redis.
//
// This file is the roof: configuration, wiring, signals. Nothing in the other files names anything here.
// Dependencies point downwards: main to http and resp, those to sniff and lru; main to pool, pool to lru.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
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
	"path/filepath"
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

// drainTimeout bounds a shutdown: what is not finished by then is cut off.
const drainTimeout = 9 * time.Second

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
		serve(cfg)
	}
}

// serve listens, runs until a signal, and exits if it cannot.
func serve(cfg config) {
	lines := startLogWriter(os.Stderr, cfg)
	log := newLogger(lines, cfg)
	for _, name := range unreadVariables(os.Environ()) {
		log.Warn("nobody reads this variable; is it misspelt?", "variable", name)
	}
	if err := cfg.loadCertificates(log); err != nil {
		fmt.Fprintln(os.Stderr, "redis_proxy:", err)
		os.Exit(2)
	}
	ctx, stop := context.WithCancel(context.Background())
	signal.Ignore(syscall.SIGPIPE) // Go ends the process where stderr has no reader
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() { // ends with the process
		<-signals
		stop()
		<-signals
		os.Exit(1) // at once, as a second signal asks
	}()
	var admin net.Listener
	l, err := listen(cfg.address())
	if err == nil && cfg.adminAddress != "" {
		admin, err = net.Listen("tcp", cfg.adminAddress)
	}
	if err != nil {
		log.Error("not started", "error", err)
		lines.close()
		os.Exit(1)
	}
	cfg.clients.maxClients = fitDescriptors(cfg, log)
	fitMemory(&cfg, log)
	cfg.cores = tuneCores()
	run(ctx, cfg, l, admin, log)
	lines.close()
}

// loadCertificates reads the files that the flags name.
func (c *config) loadCertificates(log *slog.Logger) error {
	if c.tlsCert != "" {
		cert, err := newCertificate(c.tlsCert, c.tlsKey, log)
		if err != nil {
			return fmt.Errorf("--tls-cert %q, --tls-key %q: %w", c.tlsCert, c.tlsKey, err)
		}
		c.clients.tls = &tls.Config{GetCertificate: cert.get, NextProtos: []string{"h2", "http/1.1", "http/1.0"}}
	}
	c.pool.tls = &tls.Config{InsecureSkipVerify: c.redisInsecure}
	if c.redisInsecure {
		log.Warn("the certificate of Redis is not checked, as --redis-insecure says")
	}
	if c.redisCACert != "" {
		roots, err := x509.SystemCertPool()
		pem, errFile := os.ReadFile(c.redisCACert)
		if err = errors.Join(err, errFile); err == nil && !roots.AppendCertsFromPEM(pem) {
			err = errors.New("has no certificate in PEM")
		}
		if err != nil {
			return fmt.Errorf("--redis-cacert %q: %w", c.redisCACert, err)
		}
		c.pool.tls.RootCAs = roots
	}
	if c.redisCert != "" {
		cert, err := newCertificate(c.redisCert, c.redisKey, log)
		if err != nil {
			return fmt.Errorf("--redis-cert %q, --redis-key %q: %w", c.redisCert, c.redisKey, err)
		}
		c.pool.tls.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert.get(nil)
		}
	}
	return nil
}

// A logWriter passes lines on to a writer that may block or fail, without waiting for it: what does not
// go out in time is dropped and counted. It is safe for concurrent use.
type logWriter struct {
	lines   chan []byte // nil is the end
	dropped atomic.Int64
	done    chan struct{} // closed when all lines before the end are written
}

func startLogWriter(out io.Writer, cfg config) *logWriter {
	w := &logWriter{lines: make(chan []byte, 256), done: make(chan struct{})}
	go func() { // ends with close, or with the process where out blocks
		defer close(w.done)
		for line := <-w.lines; line != nil; line = <-w.lines {
			if n := w.dropped.Swap(0); n > 0 {
				newLogger(out, cfg).Warn("log lines were dropped", "count", n)
			}
			out.Write(line)
		}
	}()
	return w
}

// Write takes one line.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- bytes.Clone(line):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

// close waits a moment for the last lines. What is written later is lost.
func (w *logWriter) close() {
	late := time.After(time.Second)
	select {
	case w.lines <- nil:
	case <-late:
		return
	}
	select {
	case <-w.done:
	case <-late:
	}
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
	l, err := net.Listen(network, address)
	if network == "unix" && errors.Is(err, syscall.EADDRINUSE) {
		c, dead := net.Dial(network, address)
		if !errors.Is(dead, syscall.ECONNREFUSED) {
			if dead == nil {
				c.Close()
			}
			return nil, err
		}
		os.Remove(address)
		return net.Listen(network, address)
	}
	return l, err
}

// check asks a running proxy for a sign of life. An error reply, such as that there are too many clients,
// is one.
func check(cfg config) error {
	if ip := net.ParseIP(cfg.listenAddress); ip != nil && ip.IsUnspecified() {
		cfg.listenAddress = "localhost"
	}
	network, address := cfg.address()
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if cfg.tlsCert != "" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // that it answers is enough
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

// tuneCores has half of the cores serve, and returns which do and why: the others are for the clients, and
// threads that wait for work cost more than they bring. Where the process has a CPU limit of its own, or
// GOMAXPROCS is set, Go follows that.
func tuneCores() string {
	all := runtime.GOMAXPROCS(0)
	quotas := cgroupValues("cpu.max", "cpu", "cpu.cfs_quota_us")
	switch {
	case os.Getenv("GOMAXPROCS") != "":
		return fmt.Sprint(all, " as GOMAXPROCS says")
	case slices.ContainsFunc(quotas, func(s string) bool { return s != "max" && s != "-1" }):
		return fmt.Sprint(all, " as the CPU limit says")
	}
	runtime.GOMAXPROCS(max(1, all/2))
	return fmt.Sprintf("%d of %d", runtime.GOMAXPROCS(0), all)
}

// fitMemory makes garbage collection rare while the heap is small, and bounds the heap to about twice the
// cache and what the clients need, unless GOGC or GOMEMLIMIT say otherwise. Where the container allows less
// than that, the cache is made smaller.
func fitMemory(cfg *config, log *slog.Logger) {
	const others = 32 << 20 // what is not the cache's
	allowed := int64(math.MaxInt64)
	for _, s := range cgroupValues("memory.max", "memory", "memory.limit_in_bytes") {
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			allowed = min(allowed, n/10*9)
		}
	}
	if fits := max(allowed-others, others/2) / 2; fits < cfg.cache.maxBytes {
		log.Warn("fewer bytes in the cache, as the container has not enough memory", "cache_bytes", fits,
			"wanted", cfg.cache.maxBytes, "memory", allowed/9*10)
		cfg.cache.maxBytes = fits
	}
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetGCPercent(400)
	cfg.clients.grown = func(clients int) {
		debug.SetMemoryLimit(min(allowed, 2*min(cfg.cache.maxBytes, 1<<60)+others+int64(clients)<<15))
	}
	cfg.clients.grown(0)
}

// cgroupValues returns the first words of a file in the control groups of the process, from its own up to
// the root: of the unified hierarchy (cgroups(7), version 2), or of a controller in version 1.
func cgroupValues(v2, controller, v1 string) (values []string) {
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		_, group, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, _ := strings.Cut(group, ":")
		root, file := "/sys/fs/cgroup", v2
		if controllers != "" {
			root, file = filepath.Join(root, controllers), v1
			if !slices.Contains(strings.Split(controllers, ","), controller) {
				continue
			}
		}
		for ; ; group = filepath.Dir(group) {
			b, _ := os.ReadFile(filepath.Join(root, group, file))
			if words := strings.Fields(string(b)); len(words) > 0 {
				values = append(values, words[0])
			}
			if group == "/" || group == "." {
				break
			}
		}
	}
	return values
}

// fitDescriptors returns how many clients the process may have, as each costs a file descriptor.
func fitDescriptors(cfg config, log *slog.Logger) int {
	const others = 32 + maxRefusing + maxAdmin // listeners, logs, clients of the admin listener
	wanted := cfg.clients.maxClients
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return wanted
	}
	upstream := cfg.pool.limit // to each node
	if cfg.pool.redis.master != "" || strings.Contains(cfg.pool.redis.hosts, ",") {
		upstream *= 8
	}
	possible := max(int(min(limit.Cur, math.MaxInt32))-upstream-others, 1)
	if possible < wanted {
		log.Warn("fewer clients, as the process may not open enough files",
			"max_clients", possible, "wanted", wanted, "files", limit.Cur)
	}
	return min(possible, wanted)
}

// run serves on l, and metrics and health on admin if that is not nil, until ctx is done. Then it stops
// what it started in reverse order. It owns the listeners.
func run(ctx context.Context, cfg config, l, admin net.Listener, log *slog.Logger) {
	var p *pool
	c := newCache(cfg.cache, func(fs []*flight) { p.enqueue(fs) })
	p = newPool(cfg.pool, c, log)
	defer p.close()
	pw := newPassword(cfg.password)
	room := int(max(16<<20, min(cfg.cache.maxBytes, 1<<60)/4))
	cfg.clients.requests, cfg.clients.values = newBudget(room), newBudget(room)
	var figures func() []figure
	web := newWeb(cfg.clients.idleTimeout, c, pw, cfg.clients.values, log)
	resp := &resp{cache: c, password: pw, db: cfg.pool.redis.db, figures: func() []figure { return figures() }}
	s := newServer(l, cfg.clients, log, [...]frontEnd{protoHTTP: web, protoRESP: resp})
	figures = func() []figure {
		return slices.Concat(cfg.figures(l.Addr()), processFigures(c.started, pw), s.figures(), c.figures(),
			keyFigures(&web.tally, &resp.tally), p.figures(), web.tally.figures("http"), resp.tally.figures("resp"))
	}
	log.Info("serving", "version", version, "address", l.Addr().String(), "protocols", "http resp",
		"tls", cfg.clients.tls != nil, "password", pw.needed, "redis", cfg.pool.redis.hosts,
		"redis_tls", cfg.pool.redis.tls, "database", cfg.pool.redis.db, "tracking", cfg.pool.tracking,
		"cache_size", cfg.cache.maxKeys, "cache_bytes", cfg.cache.maxBytes, "cache_timeout", cfg.cache.ttl.String(),
		"cores", cfg.cores)
	if admin != nil {
		log.Info("serving metrics, health and profiles", "address", admin.Addr().String())
		a := newAdmin(figures, p.ready, c.forget, log)
		go a.Serve(admin) // ends with its Close
		defer a.Close()
	}
	go s.run() // ends with s.stop
	p.try()
	<-ctx.Done()

	log.Info("stopping")
	deadline, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	web.drain()
	s.stop()
	web.shutdown(deadline)
	s.wait(deadline)
	log.Info("stopped", "uptime", c.now().Round(time.Millisecond).String())
}

// figures reports what is served in front of what, in labels.
func (c *config) figures(addr net.Addr) []figure {
	port := 0
	if tcp, ok := addr.(*net.TCPAddr); ok {
		port = tcp.Port
	}
	build := fmt.Sprintf("build_info{version=%q,go_version=%q}", version, runtime.Version())
	info := fmt.Sprintf("info{address=%q,redis=%q,cache_timeout=%q,stale_timeout=%q,absent_timeout=%q,"+
		"refresh_before=%q,redis_ttl=\"%t\",tls=\"%t\",password=\"%t\"}", addr, c.pool.redis.hosts, c.cache.ttl, c.cache.stale,
		c.cache.absent, c.cache.refresh, c.pool.keyTTL, c.clients.tls != nil, c.password != "")
	return []figure{
		{"", "", build, "What the program was built from, in labels; always 1.", 1},
		{"", "", info, "How the proxy is configured, in labels; always 1.", 1},
		{"Server", "redis_version", "", "", redisVersion},
		{"Server", "redis_mode", "", "", "standalone"},
		{"Server", "redis_proxy_version", "", "", version},
		{"Server", "tcp_port", "", "", port},
	}
}

// processFigures reports the process, in Redis' and Prometheus' names where they have one.
func processFigures(started time.Time, pw *password) []figure {
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	resident := mem.Sys - mem.HeapReleased // where there is no /proc
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		fmt.Sscan(string(statm), new(uint64), &resident)
		resident *= uint64(os.Getpagesize())
	}
	return []figure{
		{"Server", "os", "", "", runtime.GOOS + " " + runtime.GOARCH},
		{"Server", "gomaxprocs", "go_max_procs", "Cores that may serve.", runtime.GOMAXPROCS(0)},
		{"Server", "process_id", "", "", os.Getpid()},
		{"Server", "uptime_in_seconds", "uptime_seconds", "Age of the process.", int64(time.Since(started).Seconds())},
		{"", "", "process_start_time_seconds", "Start of the process, in Unix time.", started.Unix()},
		{"", "", "process_cpu_seconds_total", "CPU time used, by user and system.", cpu.Seconds()},
		{"Memory", "used_memory", "go_heap_bytes", "Memory of objects.", mem.HeapAlloc},
		{"Memory", "used_memory_rss", "go_memory_bytes", "Memory obtained from the system.", mem.Sys - mem.HeapReleased},
		{"", "", "process_resident_memory_bytes", "Resident memory.", resident},
		{"Persistence", "loading", "", "", 0},
		{"Stats", "acl_access_denied_auth", "passwords_denied_total", "Wrong passwords of clients.", pw.denied.Load()},
		{"Replication", "role", "", "", "master"},
		{"Replication", "connected_slaves", "", "", 0},
		{"", "", "go_goroutines", "Goroutines.", runtime.NumGoroutine()},
		{"", "", "go_gc_cycles_total", "Garbage collections.", mem.NumGC},
	}
}

// keyFigures reports for INFO how keys were answered over both protocols; the metrics have each on its own.
func keyFigures(tallies ...*tally) []figure {
	var n [len(outcomes)]int64
	all := int64(0)
	for _, t := range tallies {
		for o := range outcomes {
			n[o] += t[o].Load()
			all += t[o].Load()
		}
	}
	return []figure{
		{"Stats", "total_commands_processed", "", "", all},
		{"Stats", "keyspace_hits", "", "", n[hit]},
		{"Stats", "keyspace_misses", "", "", all - n[hit]},
		{"Cache", "cache_hits", "", "", n[hit]},
		{"Cache", "cache_misses", "", "", n[miss]},
		{"Cache", "cache_collapsed", "", "", n[collapsed]},
		{"Cache", "cache_stale", "", "", n[stale]},
		{"Cache", "cache_absent", "", "", n[absent]},
		{"Cache", "cache_absent_hits", "", "", n[absentHit]},
		{"Cache", "cache_errors", "", "", n[failed]},
	}
}

// A config holds the flags' values. The zero value is not useful: parseConfig makes one.
type config struct {
	cache         cacheSettings
	pool          poolSettings
	clients       serverSettings
	listenAddress string
	port          int
	redisHost     string
	redisPort     int
	redisURL      redisAddress // instead of host and port, where it was given
	password      string
	redisCACert   string
	redisCert     string
	redisKey      string
	redisInsecure bool
	tlsCert       string
	tlsKey        string
	adminAddress  string
	logLevel      slog.Level
	logFormat     string
	check         bool
	version       bool
	cores         string // which cores serve, for the log
}

// An option is a row of the table of flags. Its environment variable follows from its name.
type option struct {
	name, def, usage string
	set              func(string) error
}

// options is the table of flags: each parses, checks and stores its own.
func (c *config) options() []option {
	return []option{
		{"listen-address", "127.0.0.1", "address to serve on, or unix:///path", to(&c.listenAddress, parseListenAddress)},
		{"port", "8080", "port to serve on; 0 picks a free one", to(&c.port, number(0, 65535))},
		{"password", "", "what clients must present; empty: anyone who can connect", to(&c.password, parseText)},
		{"tls-cert", "", "certificate in PEM: serve TLS only, both protocols", to(&c.tlsCert, parseText)},
		{"tls-key", "", "key of the certificate in PEM", to(&c.tlsKey, parseText)},
		{"redis-host", "127.0.0.1", "host of the backing Redis", to(&c.redisHost, parseHost)},
		{"redis-port", "6379", "port of the backing Redis", to(&c.redisPort, number(1, 65535))},
		{"redis-url", "", "URL instead of host and port: " + redisURLForms, to(&c.redisURL, parseRedisURL)},
		{"redis-cacert", "", "whom to trust for rediss:// besides the system, in PEM", to(&c.redisCACert, parseText)},
		{"redis-cert", "", "client certificate for rediss://, in PEM", to(&c.redisCert, parseText)},
		{"redis-key", "", "key of the client certificate, in PEM", to(&c.redisKey, parseText)},
		{"redis-insecure", "false", "do not check the certificate of Redis", to(&c.redisInsecure, parseSwitch)},
		{"redis-timeout", "1s", "longest wait for Redis in all: queue, dial, reply", to(&c.pool.timeout, parseTime)},
		{"redis-ttl", "false", "end an entry when its key expires in Redis", to(&c.pool.keyTTL, parseSwitch)},
		{"client-limit", "8", "most connections to each Redis in use at once", to(&c.pool.limit, number(1, 1000))},
		{"tracking", "false", "drop entries when Redis says that they changed", to(&c.pool.tracking, parseSwitch)},
		{"cache-size", "10000", "most keys in the cache", to(&c.cache.maxKeys, number(1, 1<<31-1))},
		{"cache-bytes", "256MB", "most bytes of keys, values and bookkeeping", to(&c.cache.maxBytes, parseSize)},
		{"cache-timeout", "30s", "TTL of every entry, from the moment it was fetched", to(&c.cache.ttl, parseTime)},
		{"stale-timeout", "0", "how long past its TTL an entry answers in an outage", to(&c.cache.stale, parseTimeOr0)},
		{"absent-timeout", "0", "how long \"no such key\" is kept; 0: it is not", to(&c.cache.absent, parseTimeOr0)},
		{"refresh-before", "0", "a hit so near the end has the key fetched anew", to(&c.cache.refresh, parseTimeOr0)},
		{"max-clients", "10000", "most client connections at once", to(&c.clients.maxClients, number(1, 1<<20))},
		{"idle-timeout", "0", "close clients silent so long; 0: never (HTTP: 2m)", to(&c.clients.idleTimeout, parseTimeOr0)},
		{"admin-address", "", "host:port for a page, metrics, health, profiles", to(&c.adminAddress, parseHostPort)},
		{"log-level", "info", "debug, info, warn or error", to(&c.logLevel, parseLevel)},
		{"log-format", "text", "text or json", to(&c.logFormat, choice("text", "json"))},
	}
}

// secret reports whether the option's value must not be shown.
func (o option) secret() bool { return o.name == "redis-url" || o.name == "password" }

// variable returns the environment variable of the option.
func (o option) variable() string {
	return "RP_" + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// assign sets the option from where, a flag or a variable. Its error is fit for users.
func (o option) assign(where, val string) error {
	err := o.set(val)
	if service, ok := strings.CutSuffix(where, "_PORT"); ok && strings.HasPrefix(val, "tcp://") {
		service = strings.ToLower(strings.ReplaceAll(service, "_", "-"))
		err = fmt.Errorf("%w (a Kubernetes Service named %s sets it)", err, service)
	}
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
	cfg := config{clients: serverSettings{writeTimeout: 30 * time.Second}}
	variables := make(map[string]string)
	for _, kv := range environ {
		name, val, _ := strings.Cut(kv, "=")
		variables[name] = val
	}
	addresses := []string{"redis-host", "redis-port", "redis-url"}
	platform := map[string]string{"port": "PORT", "redis-url": "REDIS_URL"} // where ours are unset
	for _, name := range addresses {
		if variables[option{name: name}.variable()] != "" || slices.ContainsFunc(args, func(arg string) bool {
			return strings.HasPrefix(strings.TrimLeft(arg, "-"), name)
		}) {
			delete(platform, "redis-url")
		}
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
	define(option{name: "check", def: "false", set: to(&cfg.check, parseSwitch)})
	define(option{name: "version", def: "false", set: to(&cfg.version, parseSwitch)})
	for _, o := range cfg.options() {
		if err := o.assign("default", o.def); err != nil {
			panic(err)
		}
		variable := o.variable()
		if variables[variable] == "" && platform[o.name] != "" {
			variable = platform[o.name]
		}
		if val := variables[variable]; val != "" && badVariable == nil {
			badVariable = o.assign(variable, val)
		}
		define(o)
	}
	switch err := fs.Parse(args); {
	case bad != nil:
		return cfg, bad // package flag would say it in more words, and show secrets
	case errors.Is(err, flag.ErrHelp):
		return cfg, err
	case err != nil:
		what, _, _ := strings.Cut(err.Error(), "=") // what follows may be a secret
		return cfg, errors.New(what + " (--help lists the flags)")
	case fs.NArg() > 0 && (cfg.password != "" || strings.Contains(fs.Arg(0), "@")): // part of a secret, perhaps
		return cfg, errors.New("unexpected argument: only flags are allowed (--help lists them)")
	case fs.NArg() > 0:
		return cfg, fmt.Errorf("unexpected argument %q: only flags are allowed (--help lists them)", fs.Arg(0))
	case badVariable != nil && !cfg.version:
		return cfg, badVariable
	}
	return cfg, cfg.complete()
}

// complete checks what concerns several options, and fills in what follows from others.
func (c *config) complete() error {
	for _, pair := range [][4]string{
		{"tls-cert", c.tlsCert, "tls-key", c.tlsKey},
		{"redis-cert", c.redisCert, "redis-key", c.redisKey},
	} {
		cert, key := option{name: pair[0]}, option{name: pair[2]}
		if (pair[1] == "") != (pair[3] == "") {
			return fmt.Errorf("--%s or %s %q, --%s or %s %q: both must be given, or neither",
				cert.name, cert.variable(), pair[1], key.name, key.variable(), pair[3])
		}
	}
	if c.pool.redis = c.redisURL; c.pool.redis.hosts == "" {
		c.pool.redis.hosts = net.JoinHostPort(c.redisHost, strconv.Itoa(c.redisPort))
	}
	c.cache.timeout = c.pool.timeout
	c.cache.absent = min(c.cache.absent, c.cache.ttl)
	return nil
}

// unreadVariables returns the RP_ variables that are not in the table.
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
	row := func(name, variable, usage string) {
		line := fmt.Sprintf("  --%-17s %-19s", name, variable)
		for word := range strings.FieldsSeq(usage) {
			if len(line)+1+len(word) > 100 {
				fmt.Fprintln(w, line)
				line = strings.Repeat(" ", 41)
			}
			line += " " + word
		}
		fmt.Fprintln(w, line)
	}
	for _, o := range new(config).options() {
		if title := groups[o.name]; title != "" {
			fmt.Fprintf(w, "\n%s\n", title)
		}
		if o.def != "" {
			o.usage += " (default " + o.def + ")"
		}
		row(o.name, o.variable(), o.usage)
	}
	row("check", "", "ask the configured address for a PING; exit 0 if it answers, else 1")
	row("version", "", "print the version and exit")
	row("help", "", "print this and exit")
}

// to returns a setter that stores in p what parse makes of its argument.
func to[T any](p *T, parse func(string) (T, error)) func(string) error {
	return func(s string) error {
		v, err := parse(s)
		if err == nil {
			*p = v
		}
		return err
	}
}

func parseText(s string) (string, error) { return s, nil }

func parseSwitch(s string) (bool, error) {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, errors.New("must be true or false")
	}
	return v, nil
}

func parseHost(s string) (string, error) {
	if !isHost(s) {
		return "", errors.New("must be a host name or an IP address, without a port")
	}
	return s, nil
}

func parseListenAddress(s string) (string, error) {
	if path, ok := strings.CutPrefix(s, "unix://"); ok && strings.HasPrefix(path, "/") {
		return s, nil
	}
	if !isHost(s) {
		return "", errors.New("must be a host name or an IP address, without a port, or unix:///path")
	}
	return s, nil
}

func parseHostPort(s string) (string, error) {
	name, port, err := net.SplitHostPort(s)
	if err == nil && name != "" {
		_, err = parseHost(name)
	}
	if err == nil {
		_, err = number(0, 65535)(port)
	}
	if err != nil && s != "" {
		return "", errors.New("must be host:port, such as 127.0.0.1:9090 or :9090")
	}
	return s, nil
}

func parseLevel(s string) (level slog.Level, err error) {
	if _, err := choice("debug", "info", "warn", "error")(strings.ToLower(s)); err != nil {
		return level, err
	}
	return level, level.UnmarshalText([]byte(s))
}

func choice(allowed ...string) func(string) (string, error) {
	return func(s string) (string, error) {
		if !slices.Contains(allowed, s) {
			return "", errors.New("must be one of " + strings.Join(allowed, ", "))
		}
		return s, nil
	}
}

func number(low, high int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return 0, fmt.Errorf("must be a whole number from %d to %d", low, high)
		}
		return n, nil
	}
}

func parseTime(s string) (time.Duration, error) {
	d, err := parseTimeOr0(s)
	if err != nil || d == 0 {
		return 0, errors.New("must be a time above 0, such as 30, 1.5 or 250ms")
	}
	return d, nil
}

// parseTimeOr0 reads Go's notation, or a number of seconds.
func parseTimeOr0(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if sec, e := strconv.ParseFloat(s, 64); e == nil && math.Abs(sec) < 1e9 {
		d, err = time.Duration(sec*float64(time.Second)), nil
	}
	if err != nil || d < 0 || d >= 1e9*time.Second {
		return 0, errors.New("must be a time such as 30, 1.5 or 250ms, or 0")
	}
	return d, nil
}

// parseSize reads a number of bytes; as in redis.conf, 1KB is 1024 bytes.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGBkmgb")
	units := map[string]int{"": 0, "B": 0, "K": 10, "KB": 10, "M": 20, "MB": 20, "G": 30, "GB": 30}
	shift, ok := units[strings.ToUpper(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n <= 0 || n > math.MaxInt64>>shift {
		return 0, errors.New("must be a number of bytes above 0, such as 65536, 64KB, 256MB or 1GB")
	}
	return n << shift, nil
}

const redisURLForms = "redis://[[user]:pass@]host[:port][,host[:port]...][/db], redis-sentinel://.../master[/db], " +
	"rediss for TLS, or unix:///path[?db=n]"

// parseRedisURL reads the URL of a Redis, of nodes of a cluster, or of sentinels. Its errors do not show it.
// An empty one is the zero address.
func parseRedisURL(s string) (a redisAddress, err error) {
	if s == "" {
		return a, nil
	}
	malformed := errors.New("must be " + redisURLForms)
	scheme, rest, _ := strings.Cut(s, "://")
	end := strings.IndexAny(rest+"/", "/?#")
	login := strings.LastIndexByte(rest[:end], '@') + 1
	u, err := url.Parse(scheme + "://" + rest[:login] + "hosts" + rest[end:]) // it does not take every list of them
	if err != nil {
		return a, malformed
	}
	base, sentinels := strings.CutSuffix(strings.ReplaceAll(u.Scheme, "+", "-"), "-sentinel")
	port, db := "6379", strings.TrimPrefix(u.Path, "/")
	query, errQuery := url.ParseQuery(u.RawQuery)
	if sentinels {
		if port, a.master = "26379", u.Fragment; a.master == "" {
			a.master, db, _ = strings.Cut(db, "/")
		}
		a.sentinelUser, a.sentinelPassword = query.Get("sentinel_username"), query.Get("sentinel_password")
		query.Del("sentinel_username")
		query.Del("sentinel_password")
	}
	if base == "unix" && rest[login:end] == "" && len(u.Path) > 1 {
		a.hosts, db = u.Path, query.Get("db")
		query.Del("db")
	} else {
		a.hosts, err = parseRedisHosts(rest[login:end], port)
	}
	if err == nil && db != "" {
		a.db, err = number(0, 1<<30)(db)
	}
	a.tls = base == "rediss" || base == "valkeys"
	a.user = u.User.Username()
	a.password, _ = u.User.Password()
	switch {
	case err != nil, errQuery != nil, len(query) > 0, !a.tls && base != "redis" && base != "valkey" && a.hosts != u.Path,
		sentinels == (a.master == ""), !sentinels && u.Fragment != "":
		return redisAddress{}, malformed
	case u.User != nil && a.password == "", a.sentinelUser != "" && a.sentinelPassword == "":
		return redisAddress{}, errors.New("has a user but no password: " + malformed.Error())
	}
	return a, nil
}

// parseRedisHosts reads host[:port],... with brackets around IPv6 addresses, and gives each a port.
func parseRedisHosts(s, port string) (string, error) {
	hosts := strings.Split(s, ",")
	for i, host := range hosts {
		u, err := url.Parse("redis://" + host)
		if err != nil {
			return "", err
		}
		port := cmp.Or(u.Port(), port)
		_, errPort := number(1, 65535)(port)
		if _, err := parseHost(u.Hostname()); err != nil || errPort != nil {
			return "", errors.Join(err, errPort)
		}
		hosts[i] = net.JoinHostPort(u.Hostname(), port)
	}
	return strings.Join(hosts, ","), nil
}
