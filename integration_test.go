// The real server in front of a real Redis, over real sockets, with faults made on purpose.
//
// The Redis is the one that RP_TEST_REDIS (host:port) names, or one started here. Tests that stop
// or fill a Redis start their own. Keys carry the test's name.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// TestMain runs the program itself where a test has started this binary for that.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_RUN_MAIN") != "" {
		main()
		os.Exit(0)
	}
	code := m.Run()
	if suite.redis != nil {
		suite.redis.kill()
	}
	os.Exit(code)
}

// suite holds the Redis that the tests share.
var suite struct {
	once  sync.Once
	redis *redisServer // nil if RP_TEST_REDIS names one
	addr  string
	err   error
}

// sharedRedis returns the address of a Redis on which only keys with the test's name may be
// changed.
func sharedRedis(t testing.TB) string {
	t.Helper()
	suite.once.Do(func() {
		if suite.addr = os.Getenv("RP_TEST_REDIS"); suite.addr != "" {
			return
		}
		if suite.redis, suite.err = launchRedis(os.TempDir(), freePort()); suite.err == nil {
			suite.addr = suite.redis.addr
		}
	})
	if suite.err != nil {
		t.Fatalf("no Redis to test against (redis-server on the PATH, or RP_TEST_REDIS): %v", suite.err)
	}
	return suite.addr
}

// A redisServer is a redis-server process.
type redisServer struct {
	addr, port, dir string
	args            []string
	cmd             *exec.Cmd
	ended           chan struct{} // closed when the process has ended
}

// startRedis starts a Redis for one test, which may do with it what it likes.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	r, err := launchRedis(t.TempDir(), freePort(), args...)
	if err != nil {
		t.Fatalf("starting redis-server: %v", err)
	}
	t.Cleanup(r.kill)
	return r
}

func launchRedis(dir, port string, args ...string) (*redisServer, error) {
	r := &redisServer{addr: "127.0.0.1:" + port, port: port, dir: dir, args: args}
	return r, r.start()
}

// start returns when the server answers. An error shows what the server wrote.
func (r *redisServer) start() error {
	args := []string{"--port", r.port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", "", "--appendonly", "no"}
	r.cmd = exec.Command("redis-server", append(args, r.args...)...)
	var out bytes.Buffer
	r.cmd.Stdout, r.cmd.Stderr = &out, &out
	if err := r.cmd.Start(); err != nil {
		return err
	}
	r.ended = make(chan struct{})
	go func() { // ends with the process
		defer close(r.ended)
		r.cmd.Wait()
	}()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		select {
		case <-r.ended:
			return fmt.Errorf("redis-server on %s: %v:\n%s", r.addr, r.cmd.ProcessState, out.String())
		case <-time.After(5 * time.Millisecond):
			if r.answers() {
				return nil
			}
		}
	}
	r.kill()
	return fmt.Errorf("redis-server on %s does not answer:\n%s", r.addr, out.String())
}

// answers reports whether this process, and no other on its port, answers.
func (r *redisServer) answers() bool {
	c, err := redis.Dial("tcp", r.addr)
	if err != nil {
		return false
	}
	defer c.Close()
	info, err := redis.String(c.Do("INFO", "server"))
	if _, refused := err.(redis.Error); refused { // it wants a password, or is loading
		return true
	}
	return err == nil && strings.Contains(info, fmt.Sprintf("\nprocess_id:%d\r", r.cmd.Process.Pid))
}

func (r *redisServer) signal(s syscall.Signal) { r.cmd.Process.Signal(s) }

func (r *redisServer) kill() {
	r.cmd.Process.Kill()
	<-r.ended
}

// freePort returns a port on which nothing listens. It is not one of those that the system gives to
// outgoing connections, which could take it before the caller does.
func freePort() string {
	for {
		n, err := rand.Int(rand.Reader, big.NewInt(12000))
		if err != nil {
			panic(err)
		}
		port := fmt.Sprint(20000 + n.Int64())
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// redisDo sends one command to a Redis, or to a proxy.
func redisDo(t testing.TB, addr string, cmd string, args ...any) any {
	t.Helper()
	c, err := redis.Dial("tcp", addr)
	if err != nil {
		t.Fatalf("dialling %s: %v", addr, err)
	}
	defer c.Close()
	reply, err := c.Do(cmd, args...)
	if err != nil {
		t.Fatalf("%s %.60q: %v", cmd, args, err)
	}
	return reply
}

// isRedis70 reports whether the Redis at addr is of the version whose bytes the proxy's are.
func isRedis70(t testing.TB, addr string) bool {
	t.Helper()
	info, _ := redis.String(redisDo(t, addr, "INFO", "server"), nil)
	return strings.Contains(info, "\nredis_version:7.0.")
}

// A testProxy is the whole program but for its process, on a free port.
type testProxy struct {
	addr string
	log  *lockedBuffer
	stop context.CancelFunc // asks it to stop
	done chan struct{}      // closed when it has
}

// startProxy runs a proxy in front of the Redis at redisAddr, with flags added.
func startProxy(t testing.TB, redisAddr string, flags ...string) *testProxy {
	t.Helper()
	return runProxy(t, append(redisAt(t, redisAddr), flags...))
}

// redisAt returns the flags for the Redis at addr.
func redisAt(t testing.TB, addr string) []string {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return []string{"--redis-host", host, "--redis-port", port}
}

// patience is the --redis-timeout of tests that are not about it: the machine may be slow.
var patience = []string{"--redis-timeout", "20s"}

// runProxy runs a proxy with these flags, and with the config changed for what is not a flag.
func runProxy(t testing.TB, flags []string, change ...func(*config)) *testProxy {
	t.Helper()
	cfg, err := parseConfig(slices.Concat(patience, flags), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(&cfg)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &testProxy{addr: l.Addr().String(), log: new(lockedBuffer), stop: stop, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		run(ctx, cfg, l, nil, slog.New(slog.NewTextHandler(p.log, nil)))
	}()
	t.Cleanup(func() {
		stop()
		select {
		case <-p.done:
		case <-time.After(2 * drainTimeout):
			t.Errorf("the proxy does not stop:\n%s", stacks())
		}
	})
	return p
}

// stat reads one figure of INFO.
func (p *testProxy) stat(t testing.TB, name string) string {
	t.Helper()
	info, _ := redis.String(redisDo(t, p.addr, "INFO"), nil)
	m := regexp.MustCompile(`(?m)^` + name + `:(.*)\r$`).FindStringSubmatch(info)
	if m == nil {
		t.Fatalf("INFO has no %s:\n%s", name, info)
	}
	return m[1]
}

// A lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex // guards the following
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// program runs the program as a process of its own.
func program(t testing.TB, env []string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	// The race detector would sleep for a second at the end of each process.
	cmd.Env = append(os.Environ(), append(env, "TEST_RUN_MAIN=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))...)
	return cmd
}

// startProgram runs the program as a process, and returns the address that its log names.
func startProgram(t testing.TB, env []string, args ...string) (*exec.Cmd, string, *lockedBuffer) {
	t.Helper()
	cmd, log := program(t, env, slices.Concat(patience, []string{"--port", "0"}, args)...), new(lockedBuffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var addr string
	eventually(t, "the program serves", func() bool {
		m := regexp.MustCompile(`serving.*?address[=":]+([0-9.:]+)`).FindStringSubmatch(log.String())
		if m != nil {
			addr = m[1]
		}
		return m != nil
	})
	return cmd, addr, log
}

func portOf(addr string) string { return addr[strings.LastIndex(addr, ":")+1:] }

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never came true: %s", what)
		}
	}
}

func stacks() string {
	buf := make([]byte, 4<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// soak returns the length of a campaign: the long one where RP_SOAK asks for it.
func soak(short, long int) int {
	if os.Getenv("RP_SOAK") != "" {
		return long
	}
	return short
}

// A rawClient sends and expects bytes.
type rawClient struct {
	t testing.TB
	net.Conn
	*bufio.Reader
}

func (c *rawClient) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func dial(t testing.TB, addr string) *rawClient {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return &rawClient{t, c, bufio.NewReader(c)}
}

func dialTLS(t testing.TB, addr string, config *tls.Config) *rawClient {
	t.Helper()
	c, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return &rawClient{t, c, bufio.NewReader(c)}
}

func (c *rawClient) send(s string) *rawClient {
	c.t.Helper()
	if _, err := io.WriteString(c.Conn, s); err != nil {
		c.t.Fatalf("sending %.60q: %v", s, err)
	}
	return c
}

func (c *rawClient) expect(want string) *rawClient {
	c.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.Reader, got)
	if string(got[:n]) != want {
		c.t.Fatalf("got %.200q (%v); want %.200q", got[:n], err, want)
	}
	return c
}

func (c *rawClient) expectClosed() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.Reader); len(rest) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("got %.200q (%v); want the connection closed", rest, err)
	}
}

// response reads one HTTP answer.
func (c *rawClient) response() (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		c.t.Fatalf("reading an HTTP answer: %v", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("reading the body of an HTTP answer: %v", err)
	}
	return resp, string(body)
}

// infoField reads one figure of INFO over a connection that is there.
func infoField(t testing.TB, c *rawClient, name string) string {
	t.Helper()
	c.send("INFO\r\n")
	var n int
	line, _ := c.ReadString('\n')
	fmt.Sscanf(line, "$%d", &n)
	text := make([]byte, n+2)
	io.ReadFull(c.Reader, text)
	_, after, _ := strings.Cut(string(text), "\n"+name+":")
	value, _, _ := strings.Cut(after, "\r")
	return value
}

// exchange sends bytes on a connection of their own, ends sending, and returns all that comes back.
func exchange(t testing.TB, addr, send string) string {
	t.Helper()
	c := dial(t, addr)
	defer c.Close()
	io.WriteString(c.Conn, send) // the other side may hang up before it has taken all
	c.Conn.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(c.Reader)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("after %.200q: %v", send, err)
	}
	return string(got)
}

// httpDo asks over HTTP, with headers in pairs.
func httpDo(t testing.TB, method, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := httpClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

var httpClient = &http.Client{
	Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
	Timeout:   time.Minute,
}

func bulk(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }

// request is a command as clients send it.
func request(args ...string) string {
	s := fmt.Sprintf("*%d\r\n", len(args))
	for _, a := range args {
		s += bulk(a)
	}
	return s
}

// plainRequest is a GET over HTTP without anything that needs a closer look.
func plainRequest(key string) string { return "GET /" + key + " HTTP/1.1\r\nHost: h\r\n\r\n" }

// sameContent returns how many bytes of want r begins with, in whole pieces.
func sameContent(r io.Reader, want []byte) (n int) {
	buf := make([]byte, 1<<20)
	for part := range slices.Chunk(want, len(buf)) {
		if _, err := io.ReadFull(r, buf[:len(part)]); err != nil || !bytes.Equal(buf[:len(part)], part) {
			break
		}
		n += len(part)
	}
	return n
}

// A relay stands between the proxy and Redis, and can cut, stall and refuse.
type relay struct {
	t    testing.TB
	addr string
	to   string
	most atomic.Int64 // connections at once, at most

	mu      sync.Mutex // guards the following
	l       net.Listener
	conns   map[net.Conn]net.Conn
	stalled chan struct{} // nil or open while nothing passes
	filter  filter
	wg      sync.WaitGroup
}

// A filter sees what passes, from Redis (down) or to it, and whether it is on the connection of a
// tracker. It returns what shall pass, or nil to cut the connection.
type filter func(down, tracker bool, chunk []byte) []byte

func (r *relay) setFilter(f filter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.filter = f
}

func startRelay(t testing.TB, to string) *relay {
	t.Helper()
	r := &relay{t: t, addr: "127.0.0.1:" + freePort(), to: to, conns: make(map[net.Conn]net.Conn)}
	r.accept()
	t.Cleanup(func() {
		r.resume()
		r.refuse()
		r.wg.Wait()
	})
	return r
}

// accept listens, again after refuse.
func (r *relay) accept() {
	r.t.Helper()
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.l = l
	r.mu.Unlock()
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", r.to)
			if err != nil {
				c.Close()
				continue
			}
			r.mu.Lock()
			r.conns[c] = up
			r.most.Store(max(r.most.Load(), int64(len(r.conns))))
			r.mu.Unlock()
			var tracker atomic.Bool
			r.wg.Go(func() { r.copy(&tracker, false, up, c); r.drop(c) })
			r.wg.Go(func() { r.copy(&tracker, true, c, up); r.drop(c) })
		}
	})
}

func (r *relay) copy(tracker *atomic.Bool, down bool, to, from net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		r.mu.Lock()
		stalled, filter := r.stalled, r.filter
		r.mu.Unlock()
		if stalled != nil {
			<-stalled
		}
		chunk := buf[:n]
		if !down && bytes.Contains(chunk, []byte("TRACKING")) {
			tracker.Store(true)
		}
		if filter != nil {
			if chunk = filter(down, tracker.Load(), chunk); chunk == nil {
				return
			}
		}
		if _, e := to.Write(chunk); e != nil || err != nil {
			return
		}
	}
}

func (r *relay) drop(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if up := r.conns[c]; up != nil {
		c.Close()
		up.Close()
		delete(r.conns, c)
	}
}

// stall lets nothing pass, in neither direction, until resume.
func (r *relay) stall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled == nil {
		r.stalled = make(chan struct{})
	}
}

func (r *relay) resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled != nil {
		close(r.stalled)
		r.stalled = nil
	}
}

// cut closes all connections.
func (r *relay) cut() {
	r.mu.Lock()
	conns := slices.Collect(maps.Keys(r.conns))
	r.mu.Unlock()
	for _, c := range conns {
		r.drop(c)
	}
}

// refuse closes all connections and takes no more until accept.
func (r *relay) refuse() {
	r.mu.Lock()
	r.l.Close()
	r.mu.Unlock()
	r.cut()
}

// The listener

// The first line decides, in however many pieces it arrives, and no byte of it is lost.
func TestIntegrationDetection(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	redisDo(t, addr, "SET", t.Name(), "value")
	silent := dial(t, p.addr)
	for _, row := range []struct{ name, send, want string }{
		{"RESP", request("GET", t.Name()), bulk("value")},
		{"inline", "GET " + t.Name() + "\r\n", bulk("value")},
		{"inline that looks like HTTP", "GET /" + t.Name() + "\r\n", "$-1\r\n"},
		{"HTTP", "GET /" + t.Name() + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\n"},
		{"garbage", "\x15\x03\x01\x02\r\n", "-ERR unknown command '\x15\x03\x01\x02', with args beginning with: \r\n"},
		{"an empty line first", "\r\nPING\r\n", "+PONG\r\n"},
	} {
		dial(t, p.addr).send(row.send).expect(row.want)
		slow := dial(t, p.addr)
		slow.Conn.(*net.TCPConn).SetNoDelay(true)
		for i := range row.send {
			slow.send(row.send[i : i+1])
			runtime.Gosched()
		}
		slow.expect(row.want)
	}
	want := "-ERR Protocol error: too big inline request\r\n"
	if got := exchange(t, p.addr, strings.Repeat("x", 70000)); got != want {
		t.Errorf("a line without end: got %.100q; want %q", got, want)
	}
	silent.send("PING\r\n").expect("+PONG\r\n")
}

func TestIntegrationMaxClients(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr, "--max-clients", "3")
	var served []*rawClient
	for range 3 {
		served = append(served, dial(t, p.addr).send(request("PING")).expect("+PONG\r\n"))
	}
	dial(t, p.addr).send(request("PING")).expect("-ERR max number of clients reached\r\n").expectClosed()
	resp, body := dial(t, p.addr).send(plainRequest("k")).response()
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" || body != "too many clients\n" {
		t.Errorf("over HTTP: got %d %q %v; want 503 with Retry-After", resp.StatusCode, body, resp.Header)
	}
	dial(t, p.addr).send(preface).expectClosed()
	// One that has more to say sees the answer too.
	for _, row := range []struct{ send, want string }{
		{"GET / HTTP/1.1\r\nHost: h\r\nCookie: " + strings.Repeat("x", 1<<20), "HTTP/1.1 503 "},
		{request("PING", strings.Repeat("x", 1<<20)), "-ERR max "},
	} {
		c := dial(t, p.addr)
		go io.WriteString(c.Conn, row.send) // ends with the connection
		if got, err := io.ReadAll(c.Reader); err != nil || !strings.HasPrefix(string(got), row.want) {
			t.Errorf("after %.20q: got %q, %v; want %q", row.send, got, err, row.want)
		}
	}
	// A flood, most of it silent, does not disturb clients that are served.
	var flood []net.Conn
	for range 500 {
		if c, err := net.Dial("tcp", p.addr); err == nil {
			flood = append(flood, c)
		}
	}
	for range 100 {
		served[0].send(request("PING")).expect("+PONG\r\n")
	}
	for _, c := range flood {
		c.Close()
	}
	served[1].Close()
	eventually(t, "a free place", func() bool { return exchange(t, p.addr, "PING\r\n") == "+PONG\r\n" })
	eventually(t, "502 refused clients", func() bool {
		var refused int
		fmt.Sscan(infoField(t, served[0], "rejected_connections"), &refused)
		return refused >= 502
	})
}

func TestIntegrationIdleTimeout(t *testing.T) {
	t.Parallel()
	const idle = 400 * time.Millisecond
	p := startProxy(t, sharedRedis(t), "--idle-timeout", idle.String())
	began := time.Now()
	silent := dial(t, p.addr)
	resp := dial(t, p.addr).send("PING\r\n").expect("+PONG\r\n")
	web := dial(t, p.addr).send("GET /x HTTP/1.1\r\nHost: h\r\n\r\n").expect("HTTP/1.1 404 Not Found\r\n")
	// A client that speaks often enough stays.
	busy := dial(t, p.addr)
	for range 15 {
		busy.send("PING\r\n").expect("+PONG\r\n")
		time.Sleep(idle / 10)
	}
	silent.expectClosed()
	resp.expectClosed()
	if _, err := io.ReadAll(web); err != nil {
		t.Errorf("HTTP: %v; want the connection closed", err)
	}
	if took := time.Since(began); took < idle || took > 5*time.Second {
		t.Errorf("closed after %v; want about %v", took, idle)
	}
}

// Many clients at once, most of them idle, some of them slow, get their answers.
func TestIntegrationManyClients(t *testing.T) {
	addr := sharedRedis(t)
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	n := min(soak(1000, 9000), int(limit.Cur)/2-200)
	p := startProxy(t, addr)
	redisDo(t, addr, "SET", t.Name(), "value")
	ask := func(c *rawClient, i int) {
		if i%2 == 0 {
			c.send(request("GET", t.Name())).expect(bulk("value"))
		} else if resp, body := c.send(plainRequest(t.Name())).response(); resp.StatusCode != 200 || body != "value" {
			t.Fatalf("client %d: got %d %q; want the value", i, resp.StatusCode, body)
		}
	}
	slow := make([]*rawClient, 30)
	for i := range slow {
		slow[i] = dial(t, p.addr).send([]string{"", "*2\r\n$3\r\nGE", "GET /x HT"}[i%3])
	}
	clients := make([]*rawClient, n)
	for i := range clients {
		clients[i] = dial(t, p.addr)
		ask(clients[i], i)
	}
	if got := p.stat(t, "connected_clients"); got != fmt.Sprint(n+len(slow)+1) {
		t.Errorf("clients: got %s; want %d", got, n+len(slow)+1)
	}
	for i, c := range clients {
		ask(c, i)
	}
}

// A client that asks for much and takes nothing costs bounded memory for bounded time.
func TestIntegrationClientThatDoesNotRead(t *testing.T) {
	const stuck = 500 * time.Millisecond
	server := startRedis(t)
	p := runProxy(t, redisAt(t, server.addr), func(cfg *config) { cfg.clients.writeTimeout = stuck })
	redisDo(t, server.addr, "SET", "k", make([]byte, 1<<20))
	exchange(t, p.addr, request("GET", "k"))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	greedy := dial(t, p.addr)
	began := time.Now()
	var sent atomic.Int64
	go func() { // ends when all is sent, or with the connection
		batch := strings.Repeat(request("GET", "k"), 1000)
		for range 1000 {
			if _, err := io.WriteString(greedy.Conn, batch); err != nil {
				return
			}
			sent.Add(1000)
		}
	}()
	other, most := dial(t, p.addr), uint64(0)
	eventually(t, "the greedy client is dropped", func() bool {
		other.send(request("PING")).expect("+PONG\r\n")
		runtime.ReadMemStats(&after)
		most = max(most, after.HeapInuse)
		return time.Since(began) > stuck/2 && p.stat(t, "connected_clients") == "2" // other, and who asks
	})
	if took := time.Since(began); took < stuck || took > 20*time.Second {
		t.Errorf("dropped after %v; want %v, and up to a third longer", took, stuck)
	}
	if grown := int64(most) - int64(before.HeapInuse); grown > 64<<20 { // the budget of requests
		t.Errorf("memory grew by %d MB", grown>>20)
	}
	t.Logf("%d GETs were sent, memory grew by %d KB", sent.Load(), (int64(most)-int64(before.HeapInuse))>>10)
}

// A client that reads slowly, but does read, is served to the end.
func TestIntegrationSlowReaderIsServed(t *testing.T) {
	t.Parallel()
	const stuck = time.Second
	val := strings.Repeat("0123456789abcdef", 1<<20)
	flags := playRedis(t, func(int, []string) string { return bulk(val) })
	p := runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = stuck })
	slow := func() *rawClient {
		c := dial(t, p.addr)
		c.Conn.(*net.TCPConn).SetReadBuffer(64 << 10) // or the system might take the whole value
		return c
	}
	quick := slow().send(plainRequest("k")).expect("HTTP/1.1 200 OK\r\n")
	handed := slow().send("GET /k HTTP/1.0\r\n\r\n").expect("HTTP/1.0 200 OK\r\n")
	for _, c := range []*rawClient{quick, handed} {
		for line := ""; line != "\r\n"; {
			line, _ = c.ReadString('\n')
		}
	}
	resp := slow().send(request("GET", "k")).expect(fmt.Sprintf("$%d\r\n", len(val)))
	const parts = 40 // in three times as long as a client that reads nothing has
	var readers sync.WaitGroup
	for name, c := range map[string]*rawClient{"RESP": resp, "HTTP": quick, "HTTP by net/http": handed} {
		readers.Go(func() {
			for part := range slices.Chunk([]byte(val), len(val)/parts+1) {
				time.Sleep(3 * stuck / parts)
				if sameContent(c, part) != len(part) {
					t.Errorf("over %s: not the whole value", name)
					return
				}
			}
		})
	}
	readers.Wait()
}

// Streams of HTTP/2 that the client takes slowly, a little of each at a time, are served to the end.
func TestIntegrationSlowHTTP2StreamsAreServed(t *testing.T) {
	t.Parallel()
	const streams, grants, grant = 4, 5, 16 << 10
	flags := playRedis(t, func(int, []string) string { return bulk(strings.Repeat("x", grants*grant)) })
	c := dial(t, runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = time.Second }).addr)
	frame := func(kind, flags, stream byte, payload string) string {
		return string([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, stream}) + payload
	}
	open := preface + frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")           // SETTINGS: INITIAL_WINDOW_SIZE 0
	more := frame(8, 0, 0, string([]byte{0, streams * grant >> 16, 0, 0})) // WINDOW_UPDATE
	for id := byte(1); id < 2*streams; id += 2 {
		open += frame(1, 5, id, "\x82\x86\x41\x01a\x04\x02/k") // HEADERS
		more += frame(8, 0, id, string([]byte{0, grant >> 16, grant >> 8 & 255, 0}))
	}
	c.send(open)
	go func() { // ends with its last write
		for range grants { // of 32 KB, two would be too late
			io.WriteString(c.Conn, more)
			time.Sleep(700 * time.Millisecond)
		}
	}()
	for got := 0; got < streams*grants*grant; {
		var head [9]byte
		if _, err := io.ReadFull(c.Reader, head[:]); err != nil || head[3] == 3 {
			t.Fatalf("after %d bytes: frame %x, %v; want data", got, head, err)
		}
		n := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
		io.CopyN(io.Discard, c.Reader, int64(n))
		if head[3] == 0 {
			got += n
		}
	}
}

// A frontEnd that panics ends its connection, and nothing else.
func TestIntegrationPanicEndsItsConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	s := newServer(l, serverSettings{maxClients: 10, writeTimeout: time.Second}, slog.New(slog.NewTextHandler(log, nil)),
		[len(protocols)]frontEnd{protoHTTP: panicker{}, protoRESP: echo{}})
	go s.run()
	other := dial(t, l.Addr().String()).send("*\r\n").expect("*\r\n")
	dial(t, l.Addr().String()).send("GET / HTTP/1.1\r\n").expectClosed()
	other.send("still here").expect("still here")
	if !strings.Contains(log.String(), "panicker") {
		t.Errorf("the log has no stack:\n%s", log)
	}
	other.Close()
	s.stop()
	s.wait(context.Background())
}

type panicker struct{}

func (panicker) serve(*conn)  { panic("on purpose") }
func (panicker) refuse(*conn) {}

type echo struct{}

func (echo) serve(c *conn) { io.Copy(c, c); c.Close() }
func (echo) refuse(*conn)  {}

// Both protocols

// values are what a value can look like.
var values = []struct{ name, val string }{
	{"empty", ""},
	{"text", "We Accelerate Engineering Breakthroughs"},
	{"zero", "a\x00b"},
	{"crlf", "a\r\nb\r\n"},
	{"utf8", "Grüße, 世界"},
	{"resp", "$5\r\nhello\r\n"},
	{"100001", strings.Repeat("é", 100001)},
	{"allByte", string(allBytes())},
}

func allBytes() []byte {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

// oddKeys are keys that clients write in their own ways, and how a path has them.
var oddKeys = []struct{ key, path string }{
	{"a space", "a%20space"},
	{"a/slash", "a/slash"},
	{"a//double", "a//double"},
	{"/leading", "/leading"},
	{"..", ".."},
	{"a/../b", "a/../b"},
	{"zero\x00byte", "zero%00byte"},
	{"percent%41", "percent%2541"},
	{"question?mark", "question%3Fmark"},
	{"plus+", "plus+"},
	{"Grüße", "Gr%C3%BC%C3%9Fe"},
	{"bytes\xff\xfe", "bytes%FF%FE"},
	{"hash#", "hash%23"},
}

func TestIntegrationEveryValueOverBothProtocols(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr, "--cache-timeout", "1h")
	for _, row := range values {
		name, val := row.name, row.val
		key := t.Name() + ":" + name
		redisDo(t, addr, "SET", key, val)
		for _, from := range []string{"Redis", "the cache"} {
			if got := exchange(t, p.addr, request("GET", key)); got != bulk(val) {
				t.Errorf("%s over RESP from %s: got %.80q; want %.80q", name, from, got, bulk(val))
			}
		}
		key += ":http"
		redisDo(t, addr, "SET", key, val)
		for _, status := range []string{"redis_proxy; fwd=miss; stored", "redis_proxy; hit; ttl=3599"} {
			resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+key)
			if resp.StatusCode != 200 || body != val || resp.ContentLength != int64(len(val)) {
				t.Errorf("%s over HTTP: got %d, %.80q, length %d; want 200, %.80q, length %d",
					name, resp.StatusCode, body, resp.ContentLength, val, len(val))
			}
			got := regexp.MustCompile(`ttl=35\d\d$`).ReplaceAllString(resp.Header.Get("Cache-Status"), "ttl=3599")
			if got != status {
				t.Errorf("%s: Cache-Status: got %q; want %q", name, got, status)
			}
		}
	}
}

func TestIntegrationOddKeys(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	for _, row := range oddKeys {
		key, path := t.Name()+row.key, t.Name()+row.path
		redisDo(t, addr, "SET", key, "value of "+key)
		got := exchange(t, p.addr, "GET /"+path+"?query HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
		if !strings.HasSuffix(got, "\r\n\r\nvalue of "+key) {
			t.Errorf("GET /%s: got %q; want the value of %q", path, got, key)
		}
		if got := exchange(t, p.addr, request("GET", key)); got != bulk("value of "+key) {
			t.Errorf("GET %q: got %q; want its value", key, got)
		}
	}
	redisDo(t, addr, "SET", "//"+t.Name(), "slashes first")
	got := exchange(t, p.addr, "GET ///"+t.Name()+" HTTP/1.0\r\n\r\n")
	if !strings.HasSuffix(got, "\r\n\r\nslashes first") {
		t.Errorf("a path of three slashes: got %q", got)
	}
}

// Absent, empty, of another type and expired are four things, over both protocols.
func TestIntegrationAbsentEmptyAndWrongType(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	empty, list, absent := t.Name()+":empty", t.Name()+":list", t.Name()+":absent"
	redisDo(t, addr, "SET", empty, "")
	redisDo(t, addr, "DEL", list)
	redisDo(t, addr, "RPUSH", list, "x")
	wrongType := "WRONGTYPE Operation against a key holding the wrong kind of value"
	for range 2 {
		for _, row := range []struct {
			key    string
			status int
			body   string
			resp   string
		}{
			{empty, 200, "", "$0\r\n\r\n"},
			{absent, 404, "no such key\n", "$-1\r\n"},
			{list, 409, "the key holds another type than a string\n", "-" + wrongType + "\r\n"},
		} {
			if got := exchange(t, p.addr, request("GET", row.key)); got != row.resp {
				t.Errorf("%s over RESP: got %q; want %q", row.key, got, row.resp)
			}
			resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+row.key)
			if resp.StatusCode != row.status || body != row.body {
				t.Errorf("%s over HTTP: got %d %q; want %d %q", row.key, resp.StatusCode, body, row.status, row.body)
			}
			if noStore := resp.Header.Get("Cache-Control") == "no-store"; noStore != (row.status != 200) {
				t.Errorf("%s: Cache-Control: %q", row.key, resp.Header.Get("Cache-Control"))
			}
		}
	}
	// An absent key is not cached: it is there as soon as it is written.
	redisDo(t, addr, "SET", absent, "now")
	t.Cleanup(func() { redisDo(t, addr, "DEL", absent) })
	if got := exchange(t, p.addr, request("GET", absent)); got != bulk("now") {
		t.Errorf("a key that is there now: got %q; want %q", got, bulk("now"))
	}
}

func TestIntegrationHundredMegabytes(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	val := make([]byte, 100<<20)
	for part := range slices.Chunk(val, 1<<20) {
		rand.Read(part[:1<<10])
	}
	redisDo(t, addr, "SET", t.Name(), val)
	t.Cleanup(func() { redisDo(t, addr, "DEL", t.Name()) })
	c := dial(t, p.addr).send(request("GET", t.Name())).expect(fmt.Sprintf("$%d\r\n", len(val)))
	if same := sameContent(c, val); same != len(val) {
		t.Errorf("over RESP: got %d bytes and then others; want %d", same, len(val))
	}
	resp, err := httpClient.Get("http://" + p.addr + "/" + t.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if same := sameContent(resp.Body, val); same != len(val) || resp.ContentLength != int64(len(val)) {
		t.Errorf("over HTTP: got %d bytes and then others, length %d; want %d", same, resp.ContentLength, len(val))
	}
	if got := p.stat(t, "upstream_fetches"); got != "1" {
		t.Errorf("fetches: got %s; want 1", got)
	}
}

// What a client that has not authenticated can reach, over both protocols: nothing.
func TestIntegrationPassword(t *testing.T) {
	addr := sharedRedis(t)
	key := t.Name()
	redisDo(t, addr, "SET", key, "value")
	p := startProxy(t, addr, "--password", "open sesame")
	server := startRedis(t)
	is70 := isRedis70(t, server.addr)
	redisDo(t, server.addr, "CONFIG", "SET", "requirepass", "open sesame")
	sends := []string{
		request("GET", "k"),
		request("MGET", "k"),
		request("PING"),
		request("ECHO", "x"),
		request("SELECT", "0"),
		request("CLIENT", "ID"),
		request("CLIENT", "GETNAME"),
		request("CONFIG", "GET", "x"),
		request("COMMAND"),
		request("INFO"),
		request("GET"),
		request("NONSENSE", "x"),
		request("QUIT"),
		request("RESET"),
		request("HELLO"),
		request("HELLO", "3"),
		request("HELLO", "4"),
		request("HELLO", "3", "SETNAME", "me"),
		request("AUTH"),
		request("AUTH", "wrong"),
		request("AUTH", ""),
		request("AUTH", "default", "wrong"),
		request("AUTH", "nobody", "open sesame"),
		request("AUTH", "a", "b", "c"),
		request("HELLO", "3", "AUTH", "default", "wrong"),
		request("HELLO", "3", "AUTH", "default"),
		request("AUTH", "open sesame") + request("PING"),
		request("AUTH", "default", "open sesame") + request("PING"),
		request("AUTH", "open sesame") + request("RESET") + request("PING"),
		request("HELLO", "3", "AUTH", "default", "open sesame") + request("GET", "nokey"),
		request("HELLO", "2", "AUTH", "default", "open sesame"),
		"*11\r\n",
		"*10\r\n",
		"*1\r\n$16385\r\n",
		"*1\r\n$16384\r\n",
		"PING\r\n",
		"GET k\r\n",
		request("AUTH", "open sesame") + "*11\r\n",
		request("AUTH", "open sesame") + "*1\r\n$16385\r\n",
		request("AUTH", strings.Repeat("x", 16385)),
	}
	if is70 { // later, HELLO does nothing before all of it is right
		sends = append(sends,
			request("AUTH", "open sesame")+request("AUTH", "wrong")+request("PING"),
			request("HELLO", "3", "AUTH", "default", "open sesame", "foo")+request("PING"),
			request("HELLO", "3", "SETNAME", "me")+request("AUTH", "open sesame")+request("CLIENT", "GETNAME"),
		)
	}
	t.Run("over RESP", func(t *testing.T) {
		for _, send := range sends {
			got, want := normalise(exchange(t, p.addr, send)), normalise(exchange(t, server.addr, send))
			if got != want {
				t.Errorf("after %.100q:\n got %.300q\nwant %.300q", send, got, want)
			}
		}
	})
	t.Run("over HTTP", func(t *testing.T) {
		url := "http://" + p.addr + "/" + key
		for _, row := range []struct {
			name, authorization string
			status              int
		}{
			{"nothing", "", 401},
			{"Bearer", "Bearer open sesame", 200},
			{"bearer", "bearer open sesame", 200},
			{"a wrong token", "Bearer open", 401},
			{"no token", "Bearer", 401},
			{"an empty token", "Bearer ", 401},
			{"Basic", "Basic YW55Ym9keTpvcGVuIHNlc2FtZQ==", 200},
			{"Basic without a user", "Basic Om9wZW4gc2VzYW1l", 200},
			{"a wrong password", "Basic YW55Ym9keTp3cm9uZw==", 401},
			{"another scheme", "Digest open sesame", 401},
		} {
			for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS"} {
				var header []string
				if row.authorization != "" {
					header = []string{"Authorization", row.authorization}
				}
				want := row.status
				if want == 200 {
					want = map[string]int{"GET": 200, "HEAD": 200, "POST": 405, "OPTIONS": 204}[method]
				}
				resp, body := httpDo(t, method, url, header...)
				silent := len(resp.Header.Values("WWW-Authenticate")) == 2 && !strings.Contains(body, "value")
				if resp.StatusCode != want || want == 401 && !silent {
					t.Errorf("%s with %s: got %d %v; want %d", method, row.name, resp.StatusCode, resp.Header, want)
				}
			}
		}
	})
	t.Run("over HTTP, plainly, for what is cached", func(t *testing.T) {
		for range 2 {
			resp, body := dial(t, p.addr).send(plainRequest(key)).response()
			if resp.StatusCode != 401 || strings.Contains(body, "value") {
				t.Errorf("a plain GET of a cached key without a password: got %d %q; want 401", resp.StatusCode, body)
			}
		}
	})
	if strings.Contains(p.log.String(), "sesame") {
		t.Errorf("the log shows the password:\n%s", p.log)
	}
}

// HTTP

func TestIntegrationHTTPProtocols(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	redisDo(t, addr, "SET", t.Name(), "value")
	path := "/" + t.Name()
	const end = " HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
	for _, row := range []struct{ name, send, want string }{
		{"1.1", "GET " + path + end, `^HTTP/1.1 200 OK\r\n(?s:.*)\r\n\r\nvalue$`},
		{"1.0", "GET " + path + " HTTP/1.0\r\n\r\n", `^HTTP/1.0 200 OK\r\n(?s:.*)\r\n\r\nvalue$`},
		{
			"1.0 keep-alive",
			strings.Repeat("GET "+path+" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 2),
			`^(HTTP/1.0 200 OK\r\n(?s:.*?)\r\n\r\nvalue){2}$`,
		},
		{
			"a pipeline",
			strings.Repeat(plainRequest(t.Name()), 20),
			`^(HTTP/1.1 200 OK\r\n(?s:.*?)\r\n\r\nvalue){20}$`,
		},
		{"HEAD", "HEAD " + path + end, `^HTTP/1.1 200 OK\r\n(?s:.*)Content-Length: 5\r\n(?s:.*)\r\n\r\n$`},
		{"absolute form", "GET http://elsewhere" + path + end, `^HTTP/1.1 200 OK\r\n(?s:.*)\r\n\r\nvalue$`},
		{
			"a body",
			"GET " + path + " HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nbody",
			`^HTTP/1.1 200 OK\r\n(?s:.*)Connection: close\r\n(?s:.*)\r\n\r\nvalue$`,
		},
		{
			"another method",
			"POST " + path + end,
			`^HTTP/1.1 405 (?s:.*)\r\nAllow: GET, HEAD, OPTIONS\r\nCache-Control: no-store\r\n`,
		},
		{"OPTIONS *", "OPTIONS *" + end, `^HTTP/1.1 204 No Content\r\nAllow: GET, HEAD, OPTIONS\r\n`},
		{
			"OPTIONS after a key",
			plainRequest(t.Name()) + "OPTIONS " + path + end,
			`^HTTP/1.1 200 OK\r\n(?s:.*)\r\n\r\nvalueHTTP/1.1 204 No Content\r\nAllow: GET, HEAD, OPTIONS\r\n`,
		},
		{"absolute form without a path", "GET http://h" + end, `^HTTP/1.1 404 `},
		{
			"empty lines first",
			"\r\n\r\n" + plainRequest(t.Name()) + "\r\n" + plainRequest(t.Name()),
			`^(HTTP/1.1 200 OK\r\n(?s:.*?)\r\n\r\nvalue){2}$`,
		},
		{
			"the preface of HTTP/2 in a connection",
			plainRequest(t.Name()) + preface,
			`^HTTP/1.1 200 OK\r\n(?s:.*)\r\n\r\nvalueHTTP/1.1 405 `,
		},
		{"no host", "GET " + path + " HTTP/1.1\r\n\r\n", `^HTTP/1.1 400 `},
		{"a bad escape", "GET /%zz HTTP/1.1\r\nHost: h\r\n\r\n", `^HTTP/1.1 400 `},
		{"a bad header", "GET / HTTP/1.1\r\nHost: h\r\nbad header\r\n\r\n", `^HTTP/1.1 400 `},
		{"a version to come", "GET / HTTP/1.7\r\nHost: h\r\nConnection: close\r\n\r\n", `^HTTP/1\.\d \d\d\d `},
	} {
		if got := exchange(t, p.addr, row.send); !regexp.MustCompile(row.want).MatchString(got) {
			t.Errorf("%s: got %q; want %s", row.name, got, row.want)
		}
	}
	h2 := &http.Transport{Protocols: new(http.Protocols)}
	h2.Protocols.SetUnencryptedHTTP2(true)
	defer h2.CloseIdleConnections()
	resp, err := (&http.Client{Transport: h2}).Get("http://" + p.addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.ProtoMajor != 2 || string(body) != "value" {
		t.Errorf("HTTP/2 with prior knowledge: got %s, %q; want HTTP/2.0, the value", resp.Proto, body)
	}
}

func TestIntegrationConditionalRequestsAndRanges(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	url := "http://" + p.addr + "/" + t.Name()
	redisDo(t, addr, "SET", t.Name(), "0123456789")
	first, _ := httpDo(t, "GET", url)
	tag := first.Header.Get("ETag")
	replica, _ := httpDo(t, "GET", "http://"+startProxy(t, addr).addr+"/"+t.Name())
	if got := replica.Header.Get("ETag"); got != tag || !regexp.MustCompile(`^"[0-9a-f]{32}"$`).MatchString(tag) {
		t.Errorf("ETag: got %q and %q; want the same strong tag", tag, got)
	}
	for _, row := range []struct {
		name   string
		header []string
		status int
		body   string
	}{
		{"the tag", []string{"If-None-Match", tag}, 304, ""},
		{"any tag", []string{"If-None-Match", "*"}, 304, ""},
		{"another tag", []string{"If-None-Match", `"other"`}, 200, "0123456789"},
		{"a range", []string{"Range", "bytes=2-4"}, 206, "234"},
		{"a suffix", []string{"Range", "bytes=-3"}, 206, "789"},
		{"past the end", []string{"Range", "bytes=10-"}, 416, "invalid range: failed to overlap\n"},
		{"If-Range that holds", []string{"Range", "bytes=0-0", "If-Range", tag}, 206, "0"},
		{"If-Range that does not", []string{"Range", "bytes=0-0", "If-Range", `"other"`}, 200, "0123456789"},
	} {
		resp, body := httpDo(t, "GET", url, row.header...)
		if resp.StatusCode != row.status || body != row.body {
			t.Errorf("%s: got %d %q; want %d %q", row.name, resp.StatusCode, body, row.status, row.body)
		}
		if got := resp.Header.Get("Cache-Control"); (got == "no-store") != (row.status == 416) {
			t.Errorf("%s: Cache-Control: got %q", row.name, got)
		}
	}
}

// Both ways of answering over HTTP state how long ago Redis was asked.
func TestIntegrationAge(t *testing.T) {
	t.Parallel()
	p := runProxy(t, append(playRedis(t, func(int, []string) string {
		time.Sleep(1050 * time.Millisecond)
		return bulk("value")
	}), "--cache-timeout", "1h"))
	asked := time.Now()
	exchange(t, p.addr, request("GET", "k"))
	for _, row := range []struct{ name, send string }{
		{"a plain GET", plainRequest("k")},
		{"HTTP/1.0", "GET /k HTTP/1.0\r\n\r\n"},
	} {
		resp, _ := dial(t, p.addr).send(row.send).response()
		var age, ttl int
		fmt.Sscan(resp.Header.Get("Age"), &age)
		fmt.Sscanf(resp.Header.Get("Cache-Status"), "redis_proxy; hit; ttl=%d", &ttl)
		if most := int(time.Since(asked) / time.Second); age < 1 || age > most {
			t.Errorf("%s: Age: got %d; want 1 to %d", row.name, age, most)
		}
		if age+ttl != 3599 { // both are rounded down
			t.Errorf("%s: got Age %d, ttl %d; want 3599 together", row.name, age, ttl)
		}
	}
}

// The body of a request has no meaning, and is not waited for long.
func TestIntegrationOwedBodyIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	p := startProxy(t, sharedRedis(t))
	owing := make(map[string]*rawClient)
	for _, send := range []string{
		"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n",
		"GET /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf",
		"GET /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha",
		"PUT /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
	} {
		owing[send] = dial(t, p.addr).send(send).expect("HTTP/1.1 40")
	}
	began := time.Now()
	for send, c := range owing {
		if _, err := io.ReadAll(c); err != nil || time.Since(began) > 5*time.Second {
			t.Errorf("%q: %v after %v; want the connection closed", send, err, time.Since(began))
		}
	}
}

func TestIntegrationLargeUploadIsRefusedInWords(t *testing.T) {
	p := startProxy(t, sharedRedis(t))
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	for range 5 {
		req, err := http.NewRequest("PUT", "http://"+p.addr+"/"+t.Name(), bytes.NewReader(make([]byte, 5<<20)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatalf("PUT of 5 MB: %v; want 405", err)
		}
		resp.Body.Close()
		if resp.StatusCode != 405 {
			t.Errorf("PUT of 5 MB: got %d; want 405", resp.StatusCode)
		}
	}
}

// A client that reads none of its answer is given up: by the quick way, by net/http over HTTP/1, and over
// HTTP/2, where it opens no window.
func TestIntegrationUnreadHTTPAnswersAreGivenUp(t *testing.T) {
	flags := playRedis(t, func(_ int, args []string) string {
		if args[1] == "big" {
			return bulk(strings.Repeat("x", 16<<20))
		}
		return bulk("small")
	})
	p := runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = 300 * time.Millisecond })
	exchange(t, p.addr, "GET big\r\n")
	const handed = "GET /big HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n\r\n"
	// SETTINGS with an INITIAL_WINDOW_SIZE of 0, then requests.
	h2 := preface +
		"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00"
	for id := 1; id < 10; id += 2 {
		h2 += "\x00\x00\x0b\x01\x05\x00\x00\x00" + string(rune(id)) + "\x82\x86\x41\x01a\x04\x04/big"
	}
	for _, row := range []struct{ name, send string }{
		{"quick", plainRequest("big")},
		{"HTTP/1.1", handed},
		{"HTTP/1.1 after an answer", plainRequest("small") + handed},
		{"HTTP/2", h2},
	} {
		t.Run(row.name, func(t *testing.T) {
			writes := regexp.MustCompile(`http\.ServeContent\(|\(\*web\)\.answer\(`)
			answering := func() bool { return writes.MatchString(stacks()) }
			dial(t, p.addr).send(row.send)
			eventually(t, "the answer is begun", answering)
			eventually(t, "the answer is given up", func() bool { return !answering() })
		})
	}
}

// RESP

// What only the proxy answers in its way.
func TestIntegrationCommandsOfItsOwn(t *testing.T) {
	p := startProxy(t, sharedRedis(t))
	for _, row := range []struct{ name, send, want string }{
		{"COMMAND", request("COMMAND"), `^\*\d+\r\n(?s:.*)\*10\r\n\$3\r\nget\r\n:2\r\n\*2\r\n\+readonly\r\n`},
		{"COMMAND DOCS", request("COMMAND", "DOCS"), `^\*0\r\n$`},
		{"CONFIG GET", request("CONFIG", "GET", "save"), `^\*0\r\n$`},
		{"CLIENT ID", request("CLIENT", "ID"), `^:\d+\r\n$`},
		{
			"CLIENT SETINFO",
			request("CLIENT", "SETINFO", "LIB-NAME", "x") + request("CLIENT", "INFO"),
			`^\+OK\r\n\$\d+\r\nid=\d+ addr=127.* lib-name=x lib-ver=\n\r\n$`,
		},
		{
			"CLIENT SETINFO of something else",
			request("CLIENT", "SETINFO", "FOO", "x"),
			`^-ERR Unrecognized option 'FOO'\r\n$`,
		},
		{
			"CLIENT LIST",
			request("CLIENT", "SETNAME", "me") + request("CLIENT", "LIST"),
			`^\+OK\r\n\$\d+\r\n(?s:.*) name=me (?s:.*)\n\r\n$`,
		},
		{
			"CLIENT TRACKING",
			request("CLIENT", "TRACKING", "ON"),
			`^-ERR unknown subcommand 'TRACKING'. Try CLIENT HELP.\r\n$`,
		},
		{"SET", request("SET", "a", "b"), `^-ERR unknown command 'SET', with args beginning with: 'a' 'b' \r\n$`},
		{"INFO", request("INFO"), `^\$\d+\r\n# Server\r\nredis_version:7(?s:.*)\r\nloading:0\r\n`},
		{
			"INFO of a section",
			request("INFO", "Keyspace"),
			`^\$\d+\r\n# Keyspace\r\ndb0:keys=\d+,expires=\d+,avg_ttl=0\r\n\r\n$`,
		},
		{"INFO in RESP3", request("HELLO", "3") + request("INFO", "keyspace"), `\r\n=\d+\r\ntxt:# Keyspace\r\n`},
		{"too large an argument", "*1\r\n$67108865\r\n", `^-ERR Protocol error: request larger than 64 MB\r\n$`},
		{"too many arguments", "*12000000\r\n", `^-ERR Protocol error: request larger than 64 MB\r\n$`},
		{
			"arguments too large together",
			"*3\r\n$4\r\nMGET\r\n" + bulk(strings.Repeat("x", 600000)) + "$66600000\r\n",
			`^-ERR Protocol error: request larger than 64 MB\r\n$`,
		},
		{"a large key", request("GET", strings.Repeat("x", 1<<20-100)), `^\$-1\r\n$`},
	} {
		if got := exchange(t, p.addr, row.send); !regexp.MustCompile(row.want).MatchString(got) {
			t.Errorf("%s: got %.300q; want %s", row.name, got, row.want)
		}
	}
}

// One that asks for much in one go gets everything, in order, in few round trips to Redis.
func TestIntegrationPipelines(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	const n = 20000
	up, err := redis.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	var send, want strings.Builder
	for i := range n {
		key := fmt.Sprintf("%s:%d", t.Name(), i)
		up.Send("SET", key, i, "EX", 60)
		send.WriteString(request("GET", key))
		want.WriteString(bulk(fmt.Sprint(i)))
	}
	if _, err := up.Do(""); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := exchange(t, p.addr, send.String()); got != want.String() {
			t.Fatalf("got %d bytes; want %d, the same", len(got), want.Len())
		}
	}
	var batches int
	fmt.Sscan(p.stat(t, "upstream_batches"), &batches)
	if batches > n/20 {
		t.Errorf("%d misses travelled in %d batches; want them together", n, batches)
	}
}

// A client waits once for all that it has sent together, be it an MGET of many keys: no longer
// than for one GET, although each reply of Redis would be in time for the key after it.
func TestIntegrationWhatIsSentTogetherWaitsOnce(t *testing.T) {
	t.Parallel()
	const timeout = 300 * time.Millisecond
	end := make(chan struct{})
	defer close(end)
	flags := playRedis(t, func(_ int, args []string) string {
		if args[1] != "quick" {
			select {
			case <-end:
			case <-time.After(2 * timeout):
			}
		}
		return bulk("value")
	})
	p := runProxy(t, append(flags, "--redis-timeout", timeout.String()))
	exchange(t, p.addr, request("GET", "quick")) // values are small: all of a pipeline is asked for at once
	large := []string{"MGET"}
	for i := range 2000 {
		large = append(large, fmt.Sprint("large", i))
	}
	var gets, mgets string
	for i := range 10 {
		gets += request("GET", fmt.Sprint("get", i))
		mgets += request("MGET", fmt.Sprint("mget", i))
	}
	for _, row := range []struct {
		name, send string
		replies    int
	}{
		{"GETs", gets, 10},
		{"MGETs", mgets, 10},
		{"an MGET of many keys", request(large...), 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			began := time.Now()
			c := dial(t, p.addr).send(row.send)
			c.SetDeadline(began.Add(8 * timeout)) // Redis takes longer for all of it
			want := strings.Repeat("-ERR upstream timed out\r\n", row.replies)
			got := make([]byte, len(want))
			n, err := io.ReadFull(c.Reader, got)
			if took := time.Since(began); string(got[:n]) != want || took < timeout {
				t.Errorf("after %v (%v): got %q; want %q after %v, as for one key", took, err, got[:n], want, timeout)
			}
		})
	}
}

// Neither the replies of a pipeline nor the elements of an MGET pile up in memory while the
// client does not read.
func TestIntegrationMemoryHoldsWithManyLargeValues(t *testing.T) {
	const clients, each, size, limit = 16, 20, 512 << 10, 2*(16<<20) + 64<<20
	server := startRedis(t)
	c, err := redis.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	val := bytes.Repeat([]byte("v"), size)
	for i := range clients * each {
		c.Do("SET", fmt.Sprint("k", i), val)
	}
	_, proxy, _ := startProgram(t, nil, "--redis-port", server.port, "--cache-bytes", "16MB")
	most, info := 0, dial(t, proxy)
	settle := func() {
		info.SetDeadline(time.Now().Add(time.Minute))
		for quiet, last := 0, ""; quiet < 20; quiet++ { // no fetch for 20 looks
			var rss int
			fmt.Sscan(infoField(t, info, "used_memory_rss"), &rss)
			most = max(most, rss)
			if fetches := infoField(t, info, "upstream_fetches"); fetches != last {
				quiet, last = 0, fetches
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	for range soak(1, 20) {
		for _, mget := range []bool{false, true} {
			all := make([]*rawClient, clients)
			for n := range all {
				var keys []string
				send := ""
				for i := range each {
					keys = append(keys, fmt.Sprint("k", n*each+i))
					send += request("GET", keys[i])
				}
				if mget {
					send = request(append([]string{"MGET"}, keys...)...)
				}
				all[n] = dial(t, proxy).send(send)
			}
			settle()
			for _, c := range all {
				want := int64(each * len(bulk(string(val))))
				if mget {
					want += int64(len(fmt.Sprintf("*%d\r\n", each)))
				}
				if n, err := io.CopyN(io.Discard, c, want); err != nil {
					t.Fatalf("got %d bytes of %d: %v", n, want, err)
				}
				c.Close()
			}
		}
	}
	t.Logf("peak %d MB", most>>20)
	if most > limit {
		t.Errorf("peak %d MB; want %d at most", most>>20, limit>>20)
	}
}

// What both know is answered with the same bytes.
func TestIntegrationSameBytesAsRedis(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr)
	key, list := t.Name()+":key", t.Name()+":list"
	redisDo(t, addr, "SET", key, "value")
	redisDo(t, addr, "DEL", list)
	redisDo(t, addr, "RPUSH", list, "x")
	for _, send := range sameBytes(key, list, "nokey"+t.Name(), isRedis70(t, addr)) {
		want, got := normalise(exchange(t, addr, send)), normalise(exchange(t, p.addr, send))
		if got != want {
			t.Errorf("after %.200q:\n got %.300q\nwant %.300q", send, got, want)
		}
	}
}

// sameBytes returns requests that both servers answer with the same bytes where key holds a
// string, list holds a list and absent does not exist. Redis 7.0 does so for more of them than
// its successors.
func sameBytes(key, list, absent string, is70 bool) (all []string) {
	long := strings.Repeat("long", 100)
	if is70 {
		all = []string{ // later, HELLO does nothing before all of it is right
			request("HELLO", "3", "SETNAME", "a", "foo") + request("CLIENT", "GETNAME"),
			request("HELLO", "3", "SETNAME", "a", "SETNAME", "b c") + request("CLIENT", "GETNAME"),
			"*1\r\n\x00\r\n",
		}
	}
	return append(all,
		request("GET", key),
		request("get", key),
		request("gEt", list),
		request("GET", absent),
		request("MGET", key, list, absent, key),
		request("GET"),
		request("GET", "a", "b"),
		request("MGET"),
		request("PING"),
		request("PING", "hello"),
		request("ping", "a", "b"),
		request("ECHO", "x\r\ny"),
		request("ECHO"),
		request("SELECT", "0"),
		request("SELECT", "17"),
		request("SELECT", "x"),
		request("SELECT", "-1"),
		request("SELECT", "99999999999"),
		request("SELECT"),
		request("QUIT")+request("PING"),
		request("QUIT", "x"),
		request("RESET"),
		request("RESET", "x"),
		request("AUTH", "secret"),
		request("AUTH", "default", "x"),
		request("AUTH", "nobody", "x"),
		request("AUTH", "a", "b", "c"),
		request("AUTH"),
		request("HELLO", "x"),
		request("HELLO", "4"),
		request("HELLO", "1"),
		request("HELLO", "3", "foo"),
		request("HELLO", "3", "AUTH", "nobody", "x"),
		request("HELLO", "3", "SETNAME", "a b"),
		request("HELLO", "3", "AUTH", "default"),
		request("HELLO", ""),
		request("HELLO", "3")+request("GET", absent)+request("PING")+request("MGET", absent),
		request("HELLO", "3", "AUTH", "default", "x", "SETNAME", "me")+request("CLIENT", "GETNAME"),
		request("HELLO"),
		request("HELLO", "2"),
		request("POST\x00x"),
		request("HOST:\x00"),
		request("HELLO", "3", "AUTH\x00", "default", "x"),
		request("CLIENT", "NO-EVICT", "on\x00x"),
		request("HELLO", "3")+request("RESET")+request("GET", absent),
		request("CLIENT"),
		request("CLIENT", "NONSENSE"),
		request("CLIENT", "non\r\nsense", "x"),
		request("CLIENT", "ID", "x"),
		request("CLIENT", "GETNAME"),
		request("CLIENT", "SETNAME", "me")+request("CLIENT", "GETNAME"),
		request("CLIENT", "SETNAME", "a b"),
		request("CLIENT", "SETNAME"),
		request("CLIENT", "SETNAME", ""),
		request("CLIENT", "NO-EVICT", "on"),
		request("CLIENT", "NO-EVICT", "x"),
		request("CLIENT", "NO-EVICT"),
		request("CLIENT", "INFO", "x"),
		request("CONFIG"),
		request("CONFIG", "GET"),
		request("CONFIG", "GET", "nothing-of-the-kind"),
		request("CONFIG", "NONSENSE"),
		request("COMMAND", "NONSENSE"),
		request("COMMAND", "COUNT", "x"),
		request("COMMAND", "GETKEYS"),
		request("FOO"),
		request("FOO", "bar", "baz"),
		request("FOO", long, "x"),
		request(long, "x"),
		request("FOO", "a\r\nb", "c\x00d"),
		request("fo\x00o", "x"),
		request("FOO", strings.Repeat("x", 100), strings.Repeat("y", 100), "z"),
		request(""),
		request("", "x"),
		request("POST", "x")+request("PING"),
		request("Host:", "x")+request("PING"),
		request("EXISTS", key),
		request("EXISTS", key, absent, list, key),
		request("EXISTS"),
		request("EXEC"),
		request("DISCARD"),
		request("MULTI", "x"),
		"MULTI\r\nGET "+key+"\r\nGET "+absent+"\r\n"+request("MGET", key, list, absent)+request("EXISTS", key, list)+request("GET", list)+"PING\r\nEXEC\r\nPING\r\n",
		"MULTI\r\nMULTI\r\n"+request("GET", key)+"EXEC\r\n",
		"MULTI\r\nFOO\r\nPING\r\nEXEC\r\nEXEC\r\n",
		"MULTI\r\nGET\r\nEXEC\r\n",
		"MULTI\r\nPING\r\nDISCARD\r\nEXEC\r\n",
		"MULTI\r\nRESET\r\nEXEC\r\n",
		"MULTI\r\nEXEC\r\n",
		"MULTI\r\nCLIENT FOO\r\nEXEC\r\n",
		"MULTI\r\nQUIT\r\nEXEC\r\n",
		"MULTI\r\nSELECT 0\r\nSELECT 99\r\nECHO a\r\nEXEC\r\n",
		"MULTI\r\nEXEC x\r\nEXEC\r\n",
		"MULTI\r\nMULTI x\r\nEXEC\r\n",
		"HELLO 3\r\nMULTI\r\n"+request("GET", absent)+"COMMAND INFO nosuch\r\nEXEC\r\n",
		request("COMMAND", "INFO", "nosuch"),
		request("COMMAND", "GETKEYS", "get", "a"),
		request("COMMAND", "GETKEYS", "mget", "a", "b"),
		request("COMMAND", "GETKEYS", "ping", "a"),
		request("COMMAND", "GETKEYS", "nosuch", "a"),
		request("COMMAND", "GETKEYS", "get", "a", "b"),
		request("COMMAND", "LIST", "FILTERBY"),
		request("CLUSTER", "INFO"),
		request("CLUSTER"),
		request("CLUSTER", "FOO"),
		request("CLUSTER", "SLOTS"),
		request("READONLY"),
		request("READONLY", "x"),
		request("READWRITE"),
		"PING\r\n",
		"PING\n",
		"ping hello\r\n",
		"GET "+key+"\r\n",
		"  PING  \r\n",
		"\tPING\r\n",
		"\r\n",
		"\n",
		"   \r\n",
		"\r\nPING\r\n",
		"PING \"a b\"\r\n",
		"PING 'a b'\r\n",
		"PING \"a\\x41\\n\\\"\"\r\n",
		"PING 'a\\'b\\n'\r\n",
		"PING \"a\"b\r\n",
		"PING \"a\r\n",
		"PING 'a\r\n",
		"PING 'a'b\r\n",
		"PING a\"b c\"\r\n",
		"PING a\\x41\r\n",
		"PING \"\\x4\"\r\n",
		"PING \"\\\r\n",
		"PING \"\"\r\n",
		"PING \x00\r\n",
		"PING a\vb\r\n",
		"*0\r\n",
		"*-1\r\n",
		"*-10\r\n",
		"*0\r\nPING\r\n",
		"*\r\n",
		"*x\r\n",
		"*01\r\n",
		"*+1\r\n",
		"* 1\r\n",
		"*1 \r\n",
		"*-0\r\n",
		"*2147483648\r\n",
		"*99999999999999999999\r\n",
		"*1\rx$4\rxPINGxx",
		"*1\r\n$4\r\nPING",
		"*1\r\n$4\nPING\r\n",
		"*1\n$4\r\nPING\r\n",
		"*1\r\n$4\r\nPINGxx*1\r\n$4\r\nPING\r\n",
		"*1\r\n$-1\r\n",
		"*1\r\n$-2\r\n",
		"*1\r\n$x\r\n",
		"*1\r\n$\r\n",
		"*1\r\n$04\r\nPING\r\n",
		"*1\r\n$+4\r\n",
		"*1\r\n$536870913\r\n",
		"*1\r\n$ 4\r\nPING\r\n",
		"*1\r\nPING\r\n",
		"*1\r\n:4\r\n",
		"*1\r\n\r\n",
		"*1\r\n\nx\r\n",
		"*2\r\n$4\r\nPING\r\n*1\r\n",
		request("PING")+"*x\r\n"+request("PING"),
		"PING\r\n"+request("PING")+"PING\r\n",
		strings.Repeat("x", 65537),
		"*"+strings.Repeat("1", 65537),
		"*1\r\n$"+strings.Repeat("1", 65537),
		"PING "+strings.Repeat("x", 65000)+"\r\n",
		strings.Repeat(request("GET", key)+request("PING"), 1000),
		strings.Repeat("\r\n", 5000)+"PING\r\n",
	)
}

// normalise hides what differs between two servers, and between versions of Redis, and may.
func normalise(reply string) string {
	for _, row := range []struct{ differs, same string }{
		{`\$2\r\nid\r\n:\d+`, "$$2\r\nid\r\n:0"},
		{`\$7\r\nversion\r\n\$\d+\r\n[0-9.]+`, "$$7\r\nversion\r\n$$1\r\n7"},
		{`\$6\r\nserver\r\n\$6\r\nvalkey`, "$$6\r\nserver\r\n$$5\r\nredis"},
		{`(\$7\r\nmodules\r\n)\*1\r\n[*%]\d+\r\n(.*\r\n){11}\$4\r\nargs\r\n`, "$1"}, // of one module; it has no args
		{`otherwise the HELLO <proto> AUTH <user>`, "otherwise the HELLO AUTH <user>"},
	} {
		reply = regexp.MustCompile(row.differs).ReplaceAllString(reply, row.same)
	}
	return reply
}

// FuzzSameBytesAsRedis sends to a Redis and to the proxy what both must answer with the same bytes.
func FuzzSameBytesAsRedis(f *testing.F) {
	const limit = 4 << 10 // so little is read in one go by both, and minimised soon
	const variable = "TEST_BARE_REDIS"
	addr := os.Getenv(variable)
	if addr == "" {
		addr = startBareRedis(f)
		f.Setenv(variable, addr) // for the processes that fuzz, which may end without cleaning up
	}
	names, err := redis.Strings(redisDo(f, addr, "COMMAND", "LIST"), nil)
	if err != nil {
		f.Fatal(err)
	}
	p := startProxy(f, addr)
	is70 := isRedis70(f, addr)
	for _, send := range sameBytes("key", "list", "absent", is70) {
		if len(send) <= limit {
			f.Add([]byte(send))
		}
	}
	f.Fuzz(func(t *testing.T, send []byte) {
		if len(send) > limit || !sameBytesDue(t, send, names, is70) {
			return
		}
		var want, got string
		for range 3 { // a difference that is due to time does not come again
			want, got = normalise(exchange(t, addr, string(send))), normalise(exchange(t, p.addr, string(send)))
			if got == want {
				return
			}
		}
		t.Errorf("after %q:\n got %.300q\nwant %.300q", send, got, want)
	})
}

// startBareRedis starts a Redis without the databases and commands that the proxy does not have:
// its replies about them can be compared, and no request can harm it.
func startBareRedis(t testing.TB) string {
	t.Helper()
	server := startRedis(t, "--databases", "1")
	redisDo(t, server.addr, "SET", "key", "value")
	redisDo(t, server.addr, "RPUSH", "list", "x")
	redisDo(t, server.addr, "SAVE") // for the next start
	all, err := redis.Values(redisDo(t, server.addr, "COMMAND"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, about := range all {
		about := about.([]any)
		name, flags := string(about[0].([]byte)), fmt.Sprint(about[2])
		// Those of a module are not known yet where Redis reads what to rename.
		if _, ok := commands[name]; !ok && !strings.Contains(flags, "module") {
			server.args = append(server.args, "--rename-command", name, "")
		}
	}
	server.kill()
	if err := server.start(); err != nil {
		t.Fatal(err)
	}
	return server.addr
}

// sameBytesDue reports whether the proxy has no answer of its own to any of these requests. The
// names are those of the commands and subcommands of Redis, is70 whether it is 7.0.
func sameBytesDue(t *testing.T, send []byte, names []string, is70 bool) bool {
	t.Helper()
	if proto, ok := protocolOf(send); ok && proto == protoHTTP {
		return false
	}
	for _, header := range regexp.MustCompile(`[*$]\d+`).FindAll(send, -1) {
		if n, ok := parseInt(header[1:]); ok && n > maxRequest/10 && n < 1<<31 {
			return false // Redis may wait for more where the proxy has a lower limit
		}
	}
	if !is70 && (bytes.ContainsRune(send, 0) || regexp.MustCompile(`(^|\n)\s+\n.`).Match(send)) {
		return false // see sameBytes; and Valkey takes what follows on an empty line for an inline command
	}
	all, _ := requests(t, bytes.NewReader(send))
	for i, args := range all {
		// Redis compares names up to a zero byte, but finds some of them by a hash of the whole.
		name, _, zero := strings.Cut(strings.ToLower(args[0]), "\x00")
		if name == "post" || name == "host:" {
			return i == 0 // else Redis forgets what it has not yet written
		}
		cmd, ok := commands[name]
		if ok && zero || !ok && slices.Contains(names, name) {
			return false
		}
		if !is70 && (name == "hello" && len(args) > 2 || name == "auth" && i > 0) {
			return false // see sameBytes; and no reply says that AUTH failed where another is still to be written
		}
		if ok && cmd.sub != nil && len(args) > 1 {
			sub, _, zero := strings.Cut(strings.ToLower(args[1]), "\x00")
			name += "|" + sub
			cmd, ok = cmd.sub[sub]
			if ok != slices.Contains(names, name) || ok && zero {
				return false
			}
		}
		fits := cmd.run != nil && (len(args) == cmd.arity || len(args) >= -cmd.arity && cmd.arity < 0)
		if ok && fits && slices.Contains(ownAnswers, name) {
			return false
		}
	}
	return true
}

// ownAnswers are the commands that both know and the proxy answers in its way.
var ownAnswers = []string{
	"info",
	"config|get",
	"command",
	"command|count",
	"command|docs",
	"command|info",
	"command|list",
	"command|getkeys",
	"client|id",
	"client|info",
	"client|list",
}

// The cache

func TestIntegrationCacheAnswersUntilTheTTL(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr, "--cache-timeout", "300ms")
	redisDo(t, addr, "SET", t.Name(), "old")
	asked := time.Now()
	exchange(t, p.addr, request("GET", t.Name()))
	redisDo(t, addr, "SET", t.Name(), "new")
	got := exchange(t, p.addr, request("GET", t.Name()))
	if got != bulk("old") && time.Since(asked) < 300*time.Millisecond {
		t.Errorf("within the TTL: got %q; want %q", got, bulk("old"))
	}
	eventually(t, "the new value", func() bool { return exchange(t, p.addr, request("GET", t.Name())) == bulk("new") })
	if waited := time.Since(asked); waited < 300*time.Millisecond {
		t.Errorf("the new value came after %v; want the old until the TTL", waited)
	}
}

// The life of an entry, and the time in which others may join its fetch, begin when Redis is
// asked and not when it answers.
func TestIntegrationTTLBeginsWithTheQuestion(t *testing.T) {
	t.Parallel()
	const ttl = 200 * time.Millisecond
	// slowRedis holds back the reply to the first GET until answer is called.
	slowRedis := func(t *testing.T) (p *testProxy, gets func() int64, answer func()) {
		var n atomic.Int64
		answered := make(chan struct{})
		flags := playRedis(t, func(int, []string) string {
			if n.Add(1) == 1 {
				<-answered
			}
			return bulk("value")
		})
		answer = sync.OnceFunc(func() { close(answered) })
		p = runProxy(t, append(flags, "--cache-timeout", ttl.String()))
		t.Cleanup(answer)
		return p, n.Load, answer
	}
	t.Run("entry", func(t *testing.T) {
		p, gets, answer := slowRedis(t)
		c := dial(t, p.addr).send(request("GET", "k"))
		eventually(t, "the first GET", func() bool { return gets() == 1 })
		time.Sleep(ttl)
		answer()
		c.expect(bulk("value"))
		c.send(request("GET", "k")).expect(bulk("value"))
		if got := gets(); got != 2 {
			t.Errorf("an answer that was on its way for a TTL is answered with again: got %d GETs; want 2", got)
		}
	})
	t.Run("joining", func(t *testing.T) {
		p, gets, answer := slowRedis(t)
		early := dial(t, p.addr).send(request("GET", "k"))
		eventually(t, "the first GET", func() bool { return gets() == 1 })
		time.Sleep(ttl)
		dial(t, p.addr).send(request("GET", "k"))
		eventually(t, "a GET of its own for a client that asks a TTL later", func() bool { return gets() == 2 })
		answer()
		early.expect(bulk("value"))
	})
}

func TestIntegrationValueOverTheByteLimitIsServedNotKept(t *testing.T) {
	addr := sharedRedis(t)
	p := startProxy(t, addr, "--cache-bytes", "1KB")
	val := strings.Repeat("v", 2000)
	redisDo(t, addr, "SET", t.Name(), val)
	for range 2 {
		resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+t.Name())
		if body != val || resp.Header.Get("Cache-Status") != "redis_proxy; fwd=miss" {
			t.Errorf("got %d bytes, %q; want %d, not stored", len(body), resp.Header.Get("Cache-Status"), len(val))
		}
	}
	if got := p.stat(t, "cache_keys"); got != "0" {
		t.Errorf("keys: got %s; want 0", got)
	}
}

func TestIntegrationStaleAnswersWhileRedisCannot(t *testing.T) {
	const ttl, stale = 50 * time.Millisecond, 300 * time.Millisecond
	server := startRedis(t)
	r := startRelay(t, server.addr)
	p := startProxy(t, r.addr, "--cache-timeout", ttl.String(), "--stale-timeout", "1h")
	short := startProxy(t, r.addr, "--cache-timeout", ttl.String(), "--stale-timeout", stale.String())
	redisDo(t, server.addr, "SET", "k", "value")
	url := "http://" + p.addr + "/k"
	httpDo(t, "GET", url)
	began := time.Now()
	exchange(t, short.addr, request("GET", "k"))
	r.refuse()
	eventually(t, "a stale answer, marked", func() bool {
		resp, body := httpDo(t, "GET", url)
		if resp.StatusCode != 200 || body != "value" {
			t.Fatalf("got %d %q; want the old value", resp.StatusCode, body)
		}
		return strings.HasPrefix(resp.Header.Get("Cache-Status"), "redis_proxy; fwd=stale; ttl=")
	})
	if got := exchange(t, p.addr, request("GET", "k")); got != bulk("value") {
		t.Errorf("over RESP: got %q; want the old value", got)
	}
	if p.stat(t, "cache_stale") == "0" {
		t.Error("stale answers are not counted")
	}
	eventually(t, "stale for too long", func() bool {
		return exchange(t, short.addr, request("GET", "k")) == "-ERR upstream unavailable\r\n"
	})
	if age := time.Since(began); age < ttl+stale {
		t.Errorf("the stale answer was gone after %v; want %v", age, ttl+stale)
	}
	r.accept()
	if resp, _ := httpDo(t, "GET", url); resp.Header.Get("Cache-Status") != "redis_proxy; fwd=stale; stored" {
		t.Errorf("afterwards: got Cache-Status %q; want a value of Redis", resp.Header.Get("Cache-Status"))
	}
}

// An answer of Redis, be it that the key does not exist, goes before a stale value and ends it.
func TestIntegrationStaleEndsWithAnAnswerOfRedis(t *testing.T) {
	for _, row := range []struct{ name, reply string }{
		{"no such key", "$-1\r\n"},
		{"another type", "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var reply atomic.Value
			flags := playRedis(t, func(int, []string) string { return reply.Load().(string) })
			p := runProxy(t, append(flags, "--cache-timeout", "1ms", "--stale-timeout", "1h"))
			for _, step := range []struct{ name, reply, want string }{
				{"at first", bulk("old"), bulk("old")},
				{"in an outage", hungUp, bulk("old")},
				{"when Redis answers otherwise", row.reply, row.reply},
				{"in an outage after that answer", hungUp, "-ERR upstream unavailable\r\n"},
			} {
				reply.Store(step.reply)
				time.Sleep(2 * time.Millisecond) // past the TTL
				if got := exchange(t, p.addr, request("GET", "k")); got != step.want {
					t.Fatalf("%s: got %q; want %q", step.name, got, step.want)
				}
			}
		})
	}
}

// A value that is read was written for its key, and was the latest less than a TTL before the
// read began, while clients read, writers write and connections are cut.
func TestIntegrationEverythingAtOnce(t *testing.T) {
	server := startRedis(t)
	r := startRelay(t, server.addr)
	const keys, ttl = 40, 100 * time.Millisecond
	p := startProxy(t, r.addr, "--cache-timeout", ttl.String(), "--cache-size", "30", "--client-limit", "4")
	var mu sync.Mutex                    // guards written
	written := make([][]time.Time, keys) // when each version of a key was acknowledged
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(soak(2, 60))*time.Second)
	defer stop()
	var wg sync.WaitGroup
	for w := range 4 {
		up, err := redis.Dial("tcp", server.addr)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer up.Close()
			for n := w; ctx.Err() == nil; n += 4 {
				k := n % keys
				mu.Lock()
				version := len(written[k])
				mu.Unlock()
				if _, err := up.Do("SET", fmt.Sprint("k", k), fmt.Sprintf("%d:%d", k, version)); err != nil {
					t.Errorf("SET: %v", err)
					return
				}
				mu.Lock()
				written[k] = append(written[k], time.Now())
				mu.Unlock()
			}
		})
	}
	var reads, failed atomic.Int64
	for g := range 16 {
		c := dial(t, p.addr)
		wg.Go(func() {
			for n := g; ctx.Err() == nil; n++ {
				k := n * 7 % keys
				began := time.Now()
				io.WriteString(c.Conn, request("GET", fmt.Sprint("k", k)))
				line, err := c.ReadString('\n')
				if err != nil {
					t.Errorf("reading: %v", err)
					return
				}
				if line[0] != '$' || line == "$-1\r\n" {
					failed.Add(1)
					continue
				}
				val, _ := c.ReadString('\n')
				var key, version int
				fmt.Sscanf(val, "%d:%d", &key, &version)
				mu.Lock()
				history := written[k]
				mu.Unlock()
				if key != k || version > len(history) {
					t.Errorf("key %d has %q, which was never written for it", k, val)
					return
				}
				if version+1 < len(history) && history[version+1].Before(began.Add(-ttl)) {
					t.Errorf("key %d: version %d was replaced %v before it was read; the TTL is %v",
						k, version, began.Sub(history[version+1]), ttl)
					return
				}
				reads.Add(1)
			}
		})
	}
	for ctx.Err() == nil {
		time.Sleep(100 * time.Millisecond)
		r.cut()
	}
	wg.Wait()
	if reads.Load() < 1000 {
		t.Errorf("only %d reads, %d failed", reads.Load(), failed.Load())
	}
	t.Logf("%d reads, %d failed while connections were cut", reads.Load(), failed.Load())
}

// Redis

func TestIntegrationOneFetchForAllWhoAskMeanwhile(t *testing.T) {
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	p := startProxy(t, r.addr)
	redisDo(t, addr, "SET", t.Name(), "value")
	r.stall()
	clients := make([]*rawClient, 50)
	for i := range clients {
		clients[i] = dial(t, p.addr).send(request("GET", t.Name()))
	}
	var answers sync.WaitGroup
	for range 10 {
		answers.Go(func() {
			if _, body := httpDo(t, "GET", "http://"+p.addr+"/"+t.Name()); body != "value" {
				t.Errorf("over HTTP: got %q", body)
			}
		})
	}
	r.resume()
	for _, c := range clients {
		c.expect(bulk("value"))
	}
	answers.Wait()
	if got := p.stat(t, "upstream_fetches"); got != "1" {
		t.Errorf("fetches: got %s; want 1", got)
	}
}

func TestIntegrationClientLimitBoundsConnections(t *testing.T) {
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	p := startProxy(t, r.addr, "--client-limit", "3")
	r.stall()
	for i := range 100 {
		dial(t, p.addr).send(request("GET", fmt.Sprint(t.Name(), i)))
	}
	eventually(t, "all connections in use", func() bool { return p.stat(t, "upstream_connections_used") == "3" })
	r.resume()
	eventually(t, "all answered", func() bool { return p.stat(t, "cache_absent") == "100" })
	if got := r.most.Load(); got > 3 {
		t.Errorf("%d connections to Redis at once; want at most 3", got)
	}
}

func TestIntegrationNobodyWaitsLongerThanTheTimeout(t *testing.T) {
	t.Parallel()
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	p := startProxy(t, r.addr, "--redis-timeout", "200ms")
	redisDo(t, addr, "SET", t.Name(), "value")
	r.stall()
	begin := time.Now()
	if got := exchange(t, p.addr, request("GET", t.Name())); got != "-ERR upstream timed out\r\n" {
		t.Errorf("over RESP: got %q", got)
	}
	resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+t.Name())
	if resp.StatusCode != 504 || body != "upstream timed out\n" {
		t.Errorf("over HTTP: got %d %q", resp.StatusCode, body)
	}
	if got := exchange(t, p.addr, request("PING")); got != "+PONG\r\n" {
		t.Errorf("PING meanwhile: got %q", got)
	}
	if took := time.Since(begin); took < 400*time.Millisecond || took > 5*time.Second {
		t.Errorf("two waits in a row took %v; want about 400ms", took)
	}
}

func TestIntegrationLateReplyFillsTheCache(t *testing.T) {
	late := make(chan struct{})
	flags := playRedis(t, func(int, []string) string { <-late; return bulk("value") })
	p := runProxy(t, append(flags, "--redis-timeout", "50ms", "--cache-timeout", "1h"))
	defer close(late)
	if got := exchange(t, p.addr, request("GET", "k")); got != "-ERR upstream timed out\r\n" {
		t.Errorf("in time: got %q; want none", got)
	}
	late <- struct{}{}
	eventually(t, "the late reply in the cache", func() bool { return p.stat(t, "cache_keys") == "1" })
	if got := exchange(t, p.addr, request("GET", "k")); got != bulk("value") {
		t.Errorf("afterwards: got %q; want a hit", got)
	}
}

func TestIntegrationConnectionThatDiedIdleCostsNobodyAnError(t *testing.T) {
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	p := startProxy(t, r.addr, "--cache-timeout", "1ms", "--client-limit", "4")
	redisDo(t, addr, "SET", t.Name(), "value")
	for range 20 {
		// Several idle connections, all of which die.
		r.stall()
		for i := range 4 {
			batches := p.stat(t, "upstream_batches")
			dial(t, p.addr).send(request("GET", fmt.Sprint(t.Name(), i)))
			eventually(t, "a connection more in use", func() bool { return p.stat(t, "upstream_batches") != batches })
		}
		r.resume()
		eventually(t, "all idle", func() bool { return p.stat(t, "upstream_connections_used") == "0" })
		r.cut()
		if got := exchange(t, p.addr, request("GET", t.Name())); got != bulk("value") {
			t.Fatalf("after the connections died: got %q; want %q", got, bulk("value"))
		}
	}
}

// The connection is cut in the middle of a batch: answered keys are kept, the rest is asked for
// again.
func TestIntegrationCutInTheMiddleOfABatch(t *testing.T) {
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	p := startProxy(t, r.addr)
	var send, want string
	for i := range 10 {
		key := fmt.Sprint(t.Name(), i)
		redisDo(t, addr, "SET", key, i)
		send += request("GET", key)
		want += bulk(fmt.Sprint(i))
	}
	exchange(t, p.addr, request("GET", t.Name())) // values are small: all of a pipeline is asked for at once
	const part = len("$1\r\n0\r\n")*3 + 2
	var cut atomic.Bool
	r.setFilter(func(down, _ bool, chunk []byte) []byte {
		if down && len(chunk) > part && cut.CompareAndSwap(false, true) {
			go r.cut()
			return chunk[:part]
		}
		return chunk
	})
	if got := exchange(t, p.addr, send); got != want {
		t.Errorf("got %q; want %q", got, want)
	}
	if !cut.Load() {
		t.Error("the batch was not cut")
	}
}

// A refusal of the proxy by Redis is marked, so that a client does not take it for its own. It is
// logged once and counted.
func TestIntegrationOwnRefusalIsMarked(t *testing.T) {
	server := startRedis(t, "--requirepass", "secret")
	for url, line := range map[string]string{
		"redis://" + server.addr:                      "Redis refuses",
		"redis://:wrong@" + server.addr:               "Redis cannot be read",
		"redis://:secret@" + server.addr + "/99":      "Redis cannot be read",
		"redis://nobody:secret@" + server.addr + "/0": "Redis cannot be read",
	} {
		p := runProxy(t, []string{"--redis-url", url})
		for range 2 {
			if got := exchange(t, p.addr, "GET a\r\n"); !strings.HasPrefix(got, "-ERR upstream refused: ") {
				t.Errorf("%s: got %q; want it marked", url, got)
			}
		}
		if got := p.stat(t, "upstream_errors"); got != "2" || strings.Count(p.log.String(), line) != 1 {
			t.Errorf("%s: upstream_errors: got %s; want 2, and %q once in the log:\n%s", url, got, line, p.log)
		}
	}
}

func TestIntegrationRefusalOfRedisIsMarked(t *testing.T) {
	for _, refusal := range []string{
		"DENIED Redis is running in protected mode",
		"NOAUTH Authentication required.",
		"NOPERM User default has no permissions to run the 'get' command",
		"ERR max number of clients reached",
	} {
		p := runProxy(t, playRedis(t, func(int, []string) string { return "-" + refusal + "\r\n" }))
		want := "-ERR upstream refused: " + refusal + "\r\n"
		if got := exchange(t, p.addr, request("GET", "k")); got != want {
			t.Errorf("over RESP: got %q; want %q", got, want)
		}
		resp, body := httpDo(t, "GET", "http://"+p.addr+"/k")
		if resp.StatusCode != 502 || body != "upstream refused\n" {
			t.Errorf("%s, over HTTP: got %d %q; want 502, upstream refused", refusal, resp.StatusCode, body)
		}
	}
}

// The backing Redis speaks TLS: its certificate is checked.
func TestIntegrationTLSUpstream(t *testing.T) {
	dir := t.TempDir()
	cert, key := makeCertificate(t, dir, "redis")
	port := freePort()
	server := startRedis(t, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key,
		"--tls-auth-clients", "no", "--requirepass", "secret")
	c, err := redis.Dial("tcp", server.addr, redis.DialPassword("secret"), redis.DialDatabase(3))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Do("SET", "k", "value in 3")
	url := "RP_REDIS_URL=rediss://:secret@127.0.0.1:" + port + "/3"
	_, proxy, _ := startProgram(t, []string{url, "SSL_CERT_FILE=" + cert, "RP_TRACKING=true"})
	if got := exchange(t, proxy, request("GET", "k")); got != bulk("value in 3") {
		t.Errorf("got %q; want the value of database 3", got)
	}
	eventually(t, "tracking is live", func() bool { return infoField(t, dial(t, proxy), "tracking") == "live" })
	_, proxy, log := startProgram(t, []string{url})
	if got := exchange(t, proxy, request("GET", "k")); got != "-ERR upstream unavailable\r\n" {
		t.Errorf("with a certificate that nobody signed: got %q", got)
	}
	eventually(t, "the cause in the log", func() bool { return strings.Contains(log.String(), "certificate") })
	if strings.Contains(log.String(), "secret") {
		t.Errorf("the log shows the password:\n%s", log)
	}
}

// Faults

// Redis cannot be read in one way or another: hits go on, misses fail in time, and the first
// request after the fault succeeds.
func TestIntegrationFaults(t *testing.T) {
	loading := "-LOADING Redis is loading the dataset in memory\r\n"
	replies := func(with string) func(*relay, *redisServer) {
		return func(r *relay, _ *redisServer) {
			r.setFilter(func(down, _ bool, chunk []byte) []byte {
				if down && len(chunk) > 0 {
					return []byte(with)
				}
				return chunk
			})
		}
	}
	clean := func(r *relay, _ *redisServer) { r.setFilter(nil) }
	unavailable, timedOut := "-ERR upstream unavailable\r\n", "-ERR upstream timed out\r\n"
	for _, fault := range []struct {
		name       string
		begin, end func(*relay, *redisServer)
		resp       string
		status     int
	}{
		{
			"refused",
			func(r *relay, _ *redisServer) { r.refuse() },
			func(r *relay, _ *redisServer) { r.accept() },
			unavailable,
			502,
		},
		{
			"stalled",
			func(r *relay, _ *redisServer) { r.stall() },
			func(r *relay, _ *redisServer) { r.resume() },
			timedOut,
			504,
		},
		{
			"stopped",
			func(_ *relay, s *redisServer) { s.signal(syscall.SIGSTOP) },
			func(_ *relay, s *redisServer) { s.signal(syscall.SIGCONT) },
			timedOut,
			504,
		},
		{"killed", func(_ *relay, s *redisServer) { s.kill() }, restart, unavailable, 502},
		{"cut at every request", func(r *relay, _ *redisServer) {
			r.setFilter(func(down, _ bool, chunk []byte) []byte { return nil })
		}, clean, unavailable, 502},
		{"cut within a bulk", replies("$100\r\nabc"), clean, timedOut, 504},
		{"closed within a bulk", func(r *relay, _ *redisServer) {
			half := make(map[bool]bool)
			var mu sync.Mutex
			r.setFilter(func(down, _ bool, chunk []byte) []byte {
				mu.Lock()
				defer mu.Unlock()
				if !down || len(chunk) == 0 {
					return chunk
				}
				if half[down] = !half[down]; half[down] {
					go r.cut()
					return []byte("$100\r\nab")
				}
				return nil
			})
		}, clean, unavailable, 502},
		{"loading", replies(loading), clean, loading, 502},
		{"not Redis", replies("HTTP/1.1 400 Bad Request\r\n\r\n"), clean, unavailable, 502},
		{"an impossible length", replies("$99999999999999999\r\n"), clean, unavailable, 502},
		{"a status", replies("+OK\r\n"), clean, unavailable, 502},
		{"an array", replies("*1\r\n$1\r\na\r\n"), clean, unavailable, 502},
		{"a bulk that is too long", replies("$1\r\nabc\r\n"), clean, unavailable, 502},
		{
			"no permission",
			replies("-NOPERM this user has no permissions\r\n"),
			clean,
			"-ERR upstream refused: NOPERM this user has no permissions\r\n",
			502,
		},
	} {
		t.Run(fault.name, func(t *testing.T) {
			server := startRedis(t)
			r := startRelay(t, server.addr)
			timeout := "20s"
			if fault.resp == timedOut {
				timeout = "300ms"
			}
			p := startProxy(t, r.addr, "--redis-timeout", timeout, "--cache-timeout", "1h")
			set := func() {
				for _, k := range []string{"warm", "cold-resp", "cold-http", "after-resp", "after-http"} {
					redisDo(t, server.addr, "SET", k, "value")
				}
			}
			set()
			exchange(t, p.addr, request("GET", "warm"))
			settle()
			goroutines, files := runtime.NumGoroutine(), openFiles(t)

			fault.begin(r, server)
			for range 2 {
				began := time.Now()
				expectAnswers(t, p, "cold", fault.resp, fault.status)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("two misses took %v; want %s each at most", took, timeout)
				}
				expectAnswers(t, p, "warm", bulk("value"), 200)
			}
			fault.end(r, server)
			if fault.name == "killed" {
				set()
			}
			expectAnswers(t, p, "after", bulk("value"), 200)
			// Each idle connection to Redis has two goroutines and two descriptors of the relay.
			const idle = 8 * 3
			eventually(t, "no goroutine left", func() bool { return runtime.NumGoroutine() <= goroutines+idle })
			eventually(t, "no descriptor left", func() bool { return openFiles(t) <= files+idle })
			eventually(t, "no connection in use", func() bool { return p.stat(t, "upstream_connections_used") == "0" })
			if got := strings.Count(p.log.String(), "Redis cannot be read"); got > 1 {
				t.Errorf("%d lines in the log about one fault; want 1:\n%s", got, p.log)
			}
		})
	}
}

// expectAnswers asks for a key over both protocols. Each has its own unless the key is the warm
// one.
func expectAnswers(t *testing.T, p *testProxy, key, resp string, status int) {
	t.Helper()
	overRESP, overHTTP := key+"-resp", key+"-http"
	if key == "warm" {
		overRESP, overHTTP = key, key
	}
	if got := exchange(t, p.addr, request("GET", overRESP)); got != resp {
		t.Errorf("%s: got %q; want %q", overRESP, got, resp)
	}
	if got, body := httpDo(t, "GET", "http://"+p.addr+"/"+overHTTP); got.StatusCode != status {
		t.Errorf("%s: got %d %q; want %d", overHTTP, got.StatusCode, body, status)
	}
}

func restart(_ *relay, s *redisServer) {
	if err := s.start(); err != nil {
		panic(err)
	}
}

// settle waits for goroutines that are about to end.
func settle() {
	for last := -1; runtime.NumGoroutine() != last; time.Sleep(20 * time.Millisecond) {
		last = runtime.NumGoroutine()
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// Redis is killed and started again under the load of 50 clients: they see errors in the outage
// only.
func TestIntegrationOutageUnderLoad(t *testing.T) {
	for _, stale := range []string{"0", "1m"} {
		t.Run("stale "+stale, func(t *testing.T) {
			server := startRedis(t)
			p := startProxy(t, server.addr, "--cache-timeout", "20ms", "--stale-timeout", stale)
			for k := range 20 {
				redisDo(t, server.addr, "SET", fmt.Sprint("k", k), "value")
			}
			redisDo(t, server.addr, "SAVE") // for the next start
			for k := range 20 {
				exchange(t, p.addr, request("GET", fmt.Sprint("k", k)))
			}
			var outage atomic.Bool
			var inside, answered atomic.Int64
			ctx, stop := context.WithCancel(context.Background())
			var clients sync.WaitGroup
			for i := range 50 {
				c := dial(t, p.addr)
				clients.Go(func() {
					for n := i; ctx.Err() == nil; n++ {
						began := outage.Load()
						io.WriteString(c.Conn, request("GET", fmt.Sprint("k", n%20)))
						line, err := c.ReadString('\n')
						if err != nil {
							t.Errorf("a client lost its connection: %v", err)
							return
						}
						if line == "$5\r\n" {
							c.Discard(len("value\r\n"))
							answered.Add(1)
							continue
						}
						upstream := strings.HasPrefix(line, "-ERR upstream ") || strings.HasPrefix(line, "-LOADING")
						if !upstream || stale != "0" || !began && !outage.Load() {
							t.Errorf("got %q; in the outage: %v", line, began)
							return
						}
						inside.Add(1)
					}
				})
			}
			more := func() {
				n := answered.Load()
				eventually(t, "answers", func() bool { return answered.Load() > n+1000 })
			}
			for range soak(2, 20) {
				more()
				outage.Store(true)
				server.kill()
				if stale == "0" {
					n := inside.Load()
					eventually(t, "errors in the outage", func() bool { return inside.Load() > n })
				} else {
					more()
				}
				if err := server.start(); err != nil {
					t.Fatal(err)
				}
				more() // what was asked before Redis was back may still fail
				outage.Store(false)
			}
			more()
			stop()
			clients.Wait()
			t.Logf("%d answers, %d errors, all inside outages", answered.Load(), inside.Load())
		})
	}
}

// Tracking

// trackedProxy starts a proxy whose tracking is live, with a TTL that would show anything missed.
func trackedProxy(t testing.TB, redisAddr string, flags ...string) *testProxy {
	t.Helper()
	p := startProxy(t, redisAddr, append([]string{"--tracking", "--cache-timeout", "1h"}, flags...)...)
	eventually(t, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
	return p
}

// Two proxies agree with Redis soon after each write. Without tracking, they do at the TTL.
func TestIntegrationTrackingAfterEveryWrite(t *testing.T) {
	server := startRedis(t)
	proxies := []*testProxy{trackedProxy(t, server.addr), trackedProxy(t, server.addr)}
	untracked := startProxy(t, server.addr, "--cache-timeout", "1h")
	redisDo(t, server.addr, "SET", "k", "v0")
	exchange(t, untracked.addr, request("GET", "k"))
	up, err := redis.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	clients := []*rawClient{dial(t, proxies[0].addr), dial(t, proxies[1].addr)}
	var stale []time.Duration
	for n := range soak(300, 20000) {
		want := fmt.Sprint("v", n)
		if _, err := up.Do("SET", "k", want); err != nil {
			t.Fatal(err)
		}
		acknowledged := time.Now()
		for _, c := range clients {
			for got := ""; got != want; {
				c.send(request("GET", "k"))
				c.ReadString('\n')
				got, _ = c.ReadString('\n')
				if got = strings.TrimSpace(got); got == want {
					stale = append(stale, time.Since(acknowledged))
				} else if time.Since(acknowledged) > 10*time.Second {
					t.Fatalf("%v after the write: got %q; want %q", time.Since(acknowledged), got, want)
				}
			}
		}
	}
	slices.Sort(stale)
	t.Logf("the last old answer ends, after the write is acknowledged: p50 %v, p99 %v, max %v",
		stale[len(stale)/2], stale[len(stale)*99/100], stale[len(stale)-1])
	if got := exchange(t, untracked.addr, request("GET", "k")); got != bulk("v0") {
		t.Errorf("without tracking: got %q; want the old value until the TTL", got)
	}
}

// Replies are held back on their way while reports are not: no value from before a change is left
// after it.
func TestIntegrationTrackingRace(t *testing.T) {
	server := startRedis(t)
	r := startRelay(t, server.addr)
	p := trackedProxy(t, r.addr, "--client-limit", "64")
	r.setFilter(func(down, tracker bool, chunk []byte) []byte {
		if down && !tracker {
			time.Sleep(3 * time.Millisecond)
		}
		return chunk
	})
	const keys = 60
	rounds := soak(100, 1000)
	var wg sync.WaitGroup
	var passed atomic.Int64
	for k := range keys {
		key := fmt.Sprint("k", k)
		getter, checker := dial(t, p.addr), dial(t, p.addr)
		up, err := redis.Dial("tcp", server.addr)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer up.Close()
			for n := range rounds {
				up.Do("SET", key, fmt.Sprint("v", n, "before"))
				time.Sleep(2 * time.Millisecond) // for the report to arrive: GET is to be a miss
				io.WriteString(getter.Conn, request("GET", key))
				time.Sleep(time.Duration(n%4) * time.Millisecond)
				want := fmt.Sprint("v", n)
				if _, err := up.Do("SET", key, want); err != nil {
					t.Error(err)
					return
				}
				if line, _ := getter.ReadString('\n'); line != "$-1\r\n" {
					getter.ReadString('\n')
				}
				time.Sleep(5 * time.Millisecond) // for the report to arrive
				io.WriteString(checker.Conn, request("GET", key))
				checker.ReadString('\n')
				got, _ := checker.ReadString('\n')
				for late := time.Now(); strings.TrimSpace(got) != want && time.Since(late) < 5*time.Second; {
					time.Sleep(50 * time.Millisecond) // the machine may be slow
					io.WriteString(checker.Conn, request("GET", key))
					checker.ReadString('\n')
					got, _ = checker.ReadString('\n')
				}
				if strings.TrimSpace(got) != want {
					t.Errorf("round %d of %s: got %q for good; want %q", n, key, got, want)
					return
				}
				passed.Add(1)
			}
		})
	}
	wg.Wait()
	if want := int64(keys * rounds); passed.Load() != want {
		t.Errorf("%d rounds; want %d", passed.Load(), want)
	}
}

// A report spoils the fetch that is in flight for its key: a client that asks after it starts
// another, and the late answer changes nothing in the cache.
func TestIntegrationTrackingSpoilsWhatIsInFlight(t *testing.T) {
	for _, row := range []struct{ name, before, late string }{
		{"a value", "old", bulk("old")},
		{"no such key", "", "$-1\r\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			server := startRedis(t)
			r := startRelay(t, server.addr)
			p := trackedProxy(t, r.addr)
			set := func(val string) {
				reports := p.stat(t, "tracking_invalidations")
				redisDo(t, server.addr, "SET", "k", val)
				eventually(t, "the report", func() bool { return p.stat(t, "tracking_invalidations") != reports })
			}
			if row.before != "" {
				set(row.before)
			}
			var held atomic.Bool
			end := make(chan struct{})
			release := sync.OnceFunc(func() { close(end) })
			defer release()
			r.setFilter(func(down, tracker bool, chunk []byte) []byte {
				if down && !tracker && held.CompareAndSwap(false, true) {
					<-end
				}
				return chunk
			})
			early := dial(t, p.addr).send(request("GET", "k"))
			eventually(t, "the first reply is on its way", held.Load)
			set("new")
			later := dial(t, p.addr).send(request("GET", "k"))
			eventually(t, "a GET of its own for a client that asks after the report",
				func() bool { return p.stat(t, "upstream_fetches") == "2" })
			later.expect(bulk("new"))
			release()
			early.expect(row.late)
			later.send(request("GET", "k")).expect(bulk("new"))
			if got := p.stat(t, "upstream_fetches"); got != "2" {
				t.Errorf("after the late answer: got %s fetches; want 2, and what is newer still in the cache", got)
			}
		})
	}
}

// Every kind of change drops the key.
func TestIntegrationTrackingEveryKindOfChange(t *testing.T) {
	server := startRedis(t)
	p := trackedProxy(t, server.addr)
	const null = "$-1\r\n"
	for _, row := range []struct {
		name   string
		change [][]any
		want   string
	}{
		{"SET", [][]any{{"SET", "k", "new"}}, bulk("new")},
		{"DEL", [][]any{{"DEL", "k"}}, null},
		{"APPEND", [][]any{{"APPEND", "k", "er"}}, bulk("older")},
		{"EXPIRE in the past", [][]any{{"EXPIRE", "k", "-1"}}, null},
		{"expiry", [][]any{{"PEXPIRE", "k", "30"}}, null},
		{"RENAME away", [][]any{{"RENAME", "k", "other"}}, null},
		{"RENAME onto it", [][]any{{"SET", "other", "renamed"}, {"RENAME", "other", "k"}}, bulk("renamed")},
		{"MULTI", [][]any{{"MULTI"}, {"SET", "k", "multi"}, {"EXEC"}}, bulk("multi")},
		{"a script", [][]any{{"EVAL", "redis.call('SET', KEYS[1], 'script')", "1", "k"}}, bulk("script")},
		{"FLUSHDB", [][]any{{"FLUSHDB"}}, null},
		{"FLUSHALL", [][]any{{"FLUSHALL"}}, null},
		{
			"another type",
			[][]any{{"DEL", "k"}, {"LPUSH", "k", "x"}},
			"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
		},
		{
			"eviction",
			[][]any{{"CONFIG", "SET", "maxmemory-policy", "allkeys-random"}, {"CONFIG", "SET", "maxmemory", "1"}},
			null,
		},
	} {
		redisDo(t, server.addr, "DEL", "k")
		redisDo(t, server.addr, "SET", "k", "old")
		eventually(t, "the old value is cached", func() bool {
			resp, body := httpDo(t, "GET", "http://"+p.addr+"/k")
			return body == "old" && strings.HasPrefix(resp.Header.Get("Cache-Status"), "redis_proxy; hit")
		})
		up, err := redis.Dial("tcp", server.addr)
		if err != nil {
			t.Fatal(err)
		}
		for _, cmd := range row.change {
			if _, err := up.Do(cmd[0].(string), cmd[1:]...); err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
		}
		up.Close()
		eventually(t, "after "+row.name, func() bool { return exchange(t, p.addr, request("GET", "k")) == row.want })
	}
}

// The tracking connection is cut, refused or stalled while the others work: entries live until
// their TTL, and none of them is left when it is back.
func TestIntegrationTrackingDownAndUp(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	for _, fault := range []struct {
		name string
		via  func(stop chan struct{}) filter
	}{
		{"cut and refused", func(chan struct{}) filter {
			return func(_, tracker bool, chunk []byte) []byte {
				if tracker {
					return nil
				}
				return chunk
			}
		}},
		{"stalled", func(stop chan struct{}) filter {
			return func(_, tracker bool, chunk []byte) []byte {
				if tracker {
					<-stop
				}
				return chunk
			}
		}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			r := startRelay(t, server.addr)
			p := startProxy(t, r.addr, "--tracking", "--cache-timeout", "1h", "--redis-timeout", "300ms")
			eventually(t, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
			redisDo(t, server.addr, "SET", "k", "old")
			eventually(t, "the old value is cached for good", func() bool {
				reported := p.stat(t, "tracking_invalidations")
				resp, _ := httpDo(t, "GET", "http://"+p.addr+"/k")
				return reported != "0" && strings.HasPrefix(resp.Header.Get("Cache-Status"), "redis_proxy; hit")
			})
			stop := make(chan struct{})
			r.setFilter(fault.via(stop))
			redisDo(t, server.addr, "SET", "k", "missed")
			eventually(t, "tracking is down", func() bool { return p.stat(t, "tracking") == "down" })
			if got := exchange(t, p.addr, request("GET", "k")); got != bulk("old") {
				t.Errorf("while tracking is down: got %q; want the entry to live on", got)
			}
			redisDo(t, server.addr, "SET", "k2", "fetched")
			eventually(t, "a miss is answered while tracking is down", func() bool {
				return exchange(t, p.addr, request("GET", "k2")) == bulk("fetched")
			})
			close(stop)
			r.setFilter(nil)
			eventually(t, "tracking is live again", func() bool { return p.stat(t, "tracking") == "live" })
			eventually(t, "nothing from before afterwards", func() bool {
				return exchange(t, p.addr, request("GET", "k")) == bulk("missed")
			})
			log := p.log.String()
			if strings.Count(log, "tracking is down") != 1 || strings.Count(log, "tracking is live") != 2 {
				t.Errorf("the log does not say when tracking went and came:\n%s", log)
			}
		})
	}
}

// Without permission, or without support, the TTL does what tracking would.
func TestIntegrationTrackingRefused(t *testing.T) {
	server := startRedis(t)
	addUser := func(name string, rights ...any) {
		redisDo(t, server.addr, "ACL", append([]any{"SETUSER", name, "on", ">secret", "+get", "~*"}, rights...)...)
	}
	addUser("reader")
	addUser("tracker", "+client|id", "+client|tracking", "+subscribe", "+ping",
		"resetchannels", "&__redis__:invalidate")
	redisDo(t, server.addr, "SET", "k", "value")
	for user, state := range map[string]string{"reader": "down", "tracker": "live"} {
		p := runProxy(t, []string{"--tracking", "--redis-url", "redis://" + user + ":secret@" + server.addr})
		eventually(t, "the tracker's outcome in the log", func() bool {
			return strings.Contains(p.log.String(), "tracking is "+state)
		})
		if got := p.stat(t, "tracking"); got != state {
			t.Errorf("%s: INFO: got tracking:%s; want %s", user, got, state)
		}
		if got := exchange(t, p.addr, request("GET", "k")); got != bulk("value") {
			t.Errorf("%s: got %q; want the value", user, got)
		}
		if strings.Contains(p.log.String(), "secret") {
			t.Errorf("the log shows the password:\n%s", p.log)
		}
	}
}

// Changes of keys that nobody has here, many of them, do not cost the tracker its connection.
func TestIntegrationTrackingManyChanges(t *testing.T) {
	server := startRedis(t)
	p := trackedProxy(t, server.addr)
	up, err := redis.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	n := soak(100_000, 3_000_000)
	for i := range n {
		up.Send("SET", fmt.Sprint("other", i%50000), "x")
		if i%1000 == 999 {
			if _, err := up.Do(""); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "all reports", func() bool {
		var got int
		fmt.Sscan(p.stat(t, "tracking_invalidations"), &got)
		return got >= n
	})
	if strings.Contains(p.log.String(), "tracking is down") {
		t.Errorf("the tracker lost its connection:\n%s", p.log)
	}
}

func TestIntegrationTrackingOffCostsNoConnection(t *testing.T) {
	r := startRelay(t, sharedRedis(t))
	p := startProxy(t, r.addr)
	if exchange(t, p.addr, request("PING")); r.most.Load() > 1 {
		t.Errorf("%d connections to Redis before anybody asked; want the attempt at the start alone", r.most.Load())
	}
	exchange(t, p.addr, request("GET", t.Name()))
	if got := r.most.Load(); got != 1 {
		t.Errorf("%d connections to Redis for one miss; want 1", got)
	}
	if got := p.stat(t, "tracking"); got != "off" {
		t.Errorf("tracking: got %s; want off", got)
	}
}

// The program

func TestIntegrationCommandLine(t *testing.T) {
	for _, row := range []struct {
		name           string
		env            []string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"help", nil, []string{"--help"}, 0, `--cache-timeout +RP_CACHE_TIMEOUT `, `^$`},
		{"version", nil, []string{"--version"}, 0, `^redis_proxy `, `^$`},
		{
			"a bad value",
			nil,
			[]string{"--port", "x"},
			2,
			`^$`,
			`^redis_proxy: --port "x": must be a whole number from 0 to 65535\n$`,
		},
		{
			"a bad variable",
			[]string{"RP_CACHE_SIZE=0"},
			nil,
			2,
			`^$`,
			`^redis_proxy: RP_CACHE_SIZE "0": must be a whole number from 1 to \d+\n$`,
		},
		{"an unknown flag", nil, []string{"--prot=1"}, 2, `^$`, `^redis_proxy: .*-prot.*--help.*\n$`},
		{"a stray argument", nil, []string{"8080"}, 2, `^$`, `^redis_proxy: unexpected argument "8080".*\n$`},
		{
			"a secret in a bad value",
			nil,
			[]string{"--redis-url=http://:secret@h"},
			2,
			`^$`,
			`^redis_proxy: --redis-url: must be redis://\[\[user\].*rediss:// for TLS\n$`,
		},
		{
			"a certificate that is not there",
			nil,
			[]string{"--tls-cert", "/no/cert.pem", "--tls-key", "/no/key.pem"},
			2,
			`^$`,
			`^redis_proxy: --tls-cert "/no/cert.pem", --tls-key "/no/key.pem": open /no/cert.pem: no such file .*\n$`,
		},
		{
			"an address that is taken",
			nil,
			[]string{"--listen-address", "192.0.2.1"},
			1,
			`^$`,
			`cannot assign requested address`,
		},
	} {
		cmd := program(t, row.env, row.args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != row.code {
			t.Errorf("%s: exit code: got %d; want %d", row.name, got, row.code)
		}
		if !regexp.MustCompile(row.stdout).Match(stdout.Bytes()) {
			t.Errorf("%s: stdout: got %q; want %s", row.name, stdout.String(), row.stdout)
		}
		if !regexp.MustCompile(row.stderr).Match(stderr.Bytes()) {
			t.Errorf("%s: stderr: got %q; want %s", row.name, stderr.String(), row.stderr)
		}
	}
}

func TestIntegrationProcess(t *testing.T) {
	addr := sharedRedis(t)
	redisDo(t, addr, "SET", t.Name(), "value")
	cmd, proxy, log := startProgram(t, []string{"RP_REDIS_URL=redis://" + addr, "RP_CACHE_SIZ=1"})
	if got := exchange(t, proxy, request("GET", t.Name())); got != bulk("value") {
		t.Errorf("got %q; want the value", got)
	}
	if got := log.String(); !strings.Contains(got, "variable=RP_CACHE_SIZ") {
		t.Errorf("log does not name the variable that nobody reads:\n%s", got)
	}
	got, want := infoField(t, dial(t, proxy), "gomaxprocs"), fmt.Sprint(max(1, runtime.GOMAXPROCS(0)/2))
	if os.Getenv("GOMAXPROCS") == "" && got != want {
		t.Errorf("gomaxprocs: got %s; want %s, half of the cores", got, want)
	}
	// Idle clients of both protocols, silent ones and half-sent requests do not hold it up.
	idle := dial(t, proxy).send(request("PING")).expect("+PONG\r\n")
	web := dial(t, proxy).send("GET /x HTTP/1.1\r\nHost: h\r\n\r\n").expect("HTTP/1.1 404 Not Found\r\n")
	dial(t, proxy)
	dial(t, proxy).send("*2\r\n$3\r\nGE")
	dial(t, proxy).send("GET /x HTTP/1.1\r\nHo")
	dial(t, proxy).send("POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n").expect("HTTP/1.1 405 ")
	begin := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v; want exit code 0\n%s", err, log)
	}
	if took := time.Since(begin); took > 4*time.Second { // net/http would take 5 for half a header
		t.Errorf("stopping took %v", took)
	}
	idle.expectClosed()
	io.Copy(io.Discard, web)
}

func TestIntegrationSecondSignalEndsAtOnce(t *testing.T) {
	addr := sharedRedis(t)
	r := startRelay(t, addr)
	cmd, proxy, log := startProgram(t, nil, append(redisAt(t, r.addr), "--redis-timeout", "8s")...)
	r.stall()
	dial(t, proxy).send(request("GET", t.Name()))
	eventually(t, "the fetch", func() bool { return r.most.Load() > 0 })
	begin := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "stopping", func() bool { return strings.Contains(log.String(), "msg=stopping") })
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("two signals took %v", took)
	}
}

// What was asked before the signal is answered.
func TestIntegrationStopUnderLoad(t *testing.T) {
	addr := sharedRedis(t)
	redisDo(t, addr, "SET", t.Name(), "value")
	cmd, proxy, log := startProgram(t, nil, redisAt(t, addr)...)
	var signalled atomic.Pointer[time.Time]
	var clients sync.WaitGroup
	var answered atomic.Int64
	hello := []string{request("GET", t.Name()), "GET /" + t.Name() + " HTTP/1.1\r\nHost: h\r\n\r\n"}
	for i := range 20 {
		c := dial(t, proxy)
		clients.Go(func() {
			for {
				sent := time.Now()
				_, err := io.WriteString(c.Conn, hello[i%2])
				if err == nil && i%2 == 0 {
					_, err = c.ReadString('\n')
					c.ReadString('\n')
				} else if err == nil {
					var resp *http.Response
					if resp, err = http.ReadResponse(c.Reader, nil); err == nil {
						_, err = io.Copy(io.Discard, resp.Body)
					}
				}
				if err != nil {
					if at := signalled.Load(); at == nil || sent.Before(*at) {
						t.Errorf("a request from before the signal was not answered: %v", err)
					}
					return
				}
				answered.Add(1)
			}
		})
	}
	eventually(t, "load", func() bool { return answered.Load() > 2000 })
	now := time.Now()
	signalled.Store(&now)
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v; want exit code 0\n%s", err, log)
	}
	if took := time.Since(now); took > 10*time.Second {
		t.Errorf("stopping took %v", took)
	}
	clients.Wait()
}

// Neither a handler that waits for Redis nor a tracker that is being dialled holds up a stop.
func TestIntegrationStopDoesNotWaitForRedis(t *testing.T) {
	t.Parallel()
	hang := make(chan struct{})
	defer close(hang)
	flags := playRedis(t, func(int, []string) string { <-hang; return "" })
	url := "redis://:never-answered@" + net.JoinHostPort(flags[1], flags[3])
	p := runProxy(t, []string{"--redis-url", url, "--redis-timeout", "1m", "--tracking"})
	dial(t, p.addr).send("GET a\r\n")
	eventually(t, "the fetch", func() bool { return p.stat(t, "upstream_connections_used") == "1" })
	p.stop()
	select {
	case <-p.done:
	case <-time.After(drainTimeout + 3*time.Second):
		t.Errorf("not stopped after %v", drainTimeout+3*time.Second)
	}
}

func TestIntegrationTLS(t *testing.T) {
	addr := sharedRedis(t)
	key := t.Name()
	redisDo(t, addr, "SET", key, "value")
	dir := t.TempDir()
	certFile, keyFile := makeCertificate(t, dir, "first")
	flags := append(redisAt(t, addr), "--tls-cert", certFile, "--tls-key", keyFile)
	_, proxy, log := startProgram(t, nil, flags...)
	first, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(first)
	trusting := func(protocols ...string) *tls.Config { return &tls.Config{RootCAs: roots, NextProtos: protocols} }

	t.Run("every protocol", func(t *testing.T) {
		for _, row := range []struct {
			name       string
			config     *tls.Config
			send, want string
		}{
			{"RESP", trusting(), request("GET", key) + "PING\r\n", bulk("value") + "+PONG\r\n"},
			{
				"TLS 1.2",
				&tls.Config{RootCAs: roots, MaxVersion: tls.VersionTLS12},
				"GET " + key + "\r\n",
				bulk("value"),
			},
			{"HTTP/1.1", trusting(), plainRequest(key), "HTTP/1.1 200 OK\r\n"},
			{"HTTP/1.0", trusting("http/1.0"), "GET /" + key + " HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK\r\n"},
		} {
			t.Run(row.name, func(t *testing.T) { dialTLS(t, proxy, row.config).send(row.send).expect(row.want) })
		}
	})
	t.Run("HTTP clients", func(t *testing.T) {
		for proto, transport := range map[string]*http.Transport{
			"HTTP/1.1": {TLSClientConfig: trusting()},
			"HTTP/2.0": {TLSClientConfig: trusting(), ForceAttemptHTTP2: true},
		} {
			resp, err := (&http.Client{Transport: transport}).Get("https://" + proxy + "/" + key)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			transport.CloseIdleConnections()
			if resp.Proto != proto || string(body) != "value" {
				t.Errorf("got %s %q; want %s, the value", resp.Proto, body, proto)
			}
		}
	})
	t.Run("plaintext and old versions are refused", func(t *testing.T) {
		for _, send := range []string{request("PING"), "PING\r\n", "GET / HTTP/1.1\r\nHost: h\r\n\r\n", "\x15\x03"} {
			if got := exchange(t, proxy, send); got != "" {
				t.Errorf("after plaintext %q: got %q; want nothing", send, got)
			}
		}
		old := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
		if c, err := tls.Dial("tcp", proxy, old); err == nil {
			c.Close()
			t.Error("TLS 1.1 was accepted")
		}
	})
	t.Run("silent clients hold up no stop", func(t *testing.T) {
		cmd, stopped, _ := startProgram(t, nil, flags...)
		dial(t, stopped).send("\x16\x03\x01")
		dialTLS(t, stopped, trusting())
		dialTLS(t, stopped, trusting("h2"))
		dialTLS(t, stopped, trusting("http/1.1")).send("GET /x HTTP/1.1\r\nHo")
		began := time.Now()
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("after SIGTERM: %v; want exit code 0", err)
		}
		if took := time.Since(began); took > 4*time.Second { // net/http would take 5 for half a header
			t.Errorf("stopping took %v", took)
		}
	})
	t.Run("one too many with HTTP/2 is closed", func(t *testing.T) {
		_, full, _ := startProgram(t, nil, append(flags, "--max-clients", "1")...)
		dialTLS(t, full, trusting())
		dialTLS(t, full, trusting("h2")).expectClosed()
	})
	t.Run("a renewed certificate is served", func(t *testing.T) {
		time.Sleep(10 * time.Millisecond) // for another time of change
		makeCertificate(t, dir, "second")
		anyone := &tls.Config{InsecureSkipVerify: true}
		eventually(t, "the renewed certificate", func() bool {
			c := dialTLS(t, proxy, anyone)
			defer c.Close()
			return c.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName == "second"
		})
		os.WriteFile(certFile, []byte("no certificate"), 0o600)
		eventually(t, "a warning about a certificate that is none", func() bool {
			dialTLS(t, proxy, anyone).send("PING\r\n").expect("+PONG\r\n").Close()
			return strings.Contains(log.String(), "the certificate was not renewed")
		})
		if got := strings.Count(log.String(), "the certificate was renewed"); got != 1 {
			t.Errorf("%d lines in the log about one renewal; want 1:\n%s", got, log)
		}
	})
	t.Run("--check", func(t *testing.T) {
		cmd := program(t, nil, "--check", "--port", portOf(proxy), "--tls-cert", certFile, "--tls-key", keyFile)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("got %v: %s", err, out)
		}
	})
}

// certificate makes a certificate for 127.0.0.1 and returns the names of its files.
func makeCertificate(t testing.TB, dir, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: der},
		key:  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// startAdmin starts the program with an admin listener, and returns the addresses of both.
func startAdmin(t testing.TB, redisAddr string, flags ...string) (proxy, admin string) {
	t.Helper()
	flags = slices.Concat(redisAt(t, redisAddr), []string{"--admin-address", "127.0.0.1:0"}, flags)
	_, proxy, log := startProgram(t, nil, flags...)
	eventually(t, "the admin listener's address in the log", func() bool {
		m := regexp.MustCompile(`serving metrics[^\n]* address=([0-9.:]+)`).FindStringSubmatch(log.String())
		if m != nil {
			admin = "http://" + m[1]
		}
		return m != nil
	})
	return proxy, admin
}

func TestIntegrationAdmin(t *testing.T) {
	server := startRedis(t)
	proxy, admin := startAdmin(t, server.addr)
	expect := func(t *testing.T, when, path string, want int) {
		t.Helper()
		if resp, _ := httpDo(t, "GET", admin+path); resp.StatusCode != want {
			t.Errorf("%s%s: got %d; want %d", path, when, resp.StatusCode, want)
		}
	}
	redisDo(t, server.addr, "SET", "k", "value")
	for range 3 {
		exchange(t, proxy, request("GET", "k"))
	}
	httpDo(t, "GET", "http://"+proxy+"/absent")

	t.Run("metrics", func(t *testing.T) { // first, while nothing else has been asked for
		_, metrics := httpDo(t, "GET", admin+"/metrics")
		for _, want := range []string{
			`redis_proxy_requests_total{protocol="resp",result="hit"} 2`,
			`redis_proxy_requests_total{protocol="resp",result="miss"} 1`,
			`redis_proxy_requests_total{protocol="http",result="absent"} 1`,
			`redis_proxy_cache_keys 1`,
			`redis_proxy_upstream_fetches_total 2`,
			`redis_proxy_upstream_seconds_bucket{le="+Inf"} 2`,
			`redis_proxy_upstream_seconds_count 2`,
			`redis_proxy_tracking 0`,
			`redis_proxy_cache_keys_max 10000`,
			fmt.Sprintf(`redis_proxy_build_info{version=%q,go_version=%q} 1`, version, runtime.Version()),
		} {
			if !strings.Contains(metrics, "\n"+want+"\n") {
				t.Errorf("/metrics has no %s", want)
			}
		}
		wellFormed := regexp.MustCompile(`^(# (HELP|TYPE) (redis_proxy|process)_[a-z_]+ .+|` +
			`(redis_proxy|process)_[a-z_]+(\{[^}]*\})? [0-9.e+-]+)$`)
		for _, line := range strings.Split(strings.TrimSpace(metrics), "\n") {
			if !wellFormed.MatchString(line) {
				t.Errorf("/metrics: malformed line %q", line)
			}
		}
		if promtool, err := exec.LookPath("promtool"); err == nil {
			cmd := exec.Command(promtool, "check", "metrics")
			cmd.Stdin = strings.NewReader(metrics)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("promtool: %v\n%s", err, out)
			}
		}
	})
	t.Run("paths", func(t *testing.T) {
		expect(t, "", "/healthz", 200)
		expect(t, "", "/readyz", 200)
		expect(t, "", "/debug/pprof/", 200)
		expect(t, "", "/debug/pprof/goroutine", 200)
		expect(t, "", "/k", 404)
		expect(t, "", "/debug/pprof/cmdline", 404)
	})
	t.Run("forgetting", func(t *testing.T) {
		for _, path := range []string{"/cache/k", "/cache/"} {
			exchange(t, proxy, request("GET", "k"))
			httpDo(t, "DELETE", admin+path)
			if resp, _ := httpDo(t, "GET", "http://"+proxy+"/k"); !strings.Contains(resp.Header.Get("Cache-Status"), "fwd=miss") {
				t.Errorf("after DELETE %s: got %q; want a miss", path, resp.Header.Get("Cache-Status"))
			}
		}
	})
	t.Run("permissions", func(t *testing.T) {
		redisDo(t, server.addr, "ACL", "SETUSER", "default", "resetkeys", "~k")
		expect(t, " for a user of some keys", "/readyz", 200)
		redisDo(t, server.addr, "ACL", "SETUSER", "default", "allkeys", "-get")
		expect(t, " for a user who may not GET", "/readyz", 503)
	})
	t.Run("outage", func(t *testing.T) {
		server.kill()
		expect(t, " without Redis", "/readyz", 503)
		expect(t, " without Redis", "/healthz", 200)
		if err := server.start(); err != nil {
			t.Fatal(err)
		}
		expect(t, " with Redis back", "/readyz", 200)
	})
}

// TestIntegrationAdminPage opens the page in a browser, through a relay that adds an unknown figure to the
// metrics.
func TestIntegrationAdminPage(t *testing.T) {
	proxy, address := startAdmin(t, sharedRedis(t))
	admin, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}

	t.Run("answer", func(t *testing.T) {
		resp, page := httpDo(t, "GET", admin.String()+"/")
		policy := resp.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "connect-src 'self'", "style-src 'sha256-", "script-src 'sha256-"} {
			if !strings.Contains(policy, want) {
				t.Errorf("Content-Security-Policy: got %q; want %s", policy, want)
			}
		}
		if got := resp.Header.Get("Content-Type"); got != "text/html; charset=utf-8" {
			t.Errorf("Content-Type: got %q", got)
		}
		if strings.Contains(page, "://") {
			t.Error("the page names another host")
		}
		for path, want := range map[string]int{"/index.html": 404, "/metrics/": 404, "/?x": 200} {
			if resp, _ := httpDo(t, "GET", admin.String()+path); resp.StatusCode != want {
				t.Errorf("%s: got %d; want %d", path, resp.StatusCode, want)
			}
		}
		if resp, _ := httpDo(t, "POST", admin.String()+"/"); resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST: got %d; want 405", resp.StatusCode)
		}
	})

	t.Run("browser", func(t *testing.T) {
		chromium, err := exec.LookPath("chromium")
		if err != nil {
			t.Log("no chromium on the PATH: what the page draws is not checked")
			return
		}
		relay := httputil.NewSingleHostReverseProxy(admin)
		relay.ModifyResponse = func(resp *http.Response) error {
			if strings.HasSuffix(resp.Request.URL.Path, "/metrics") {
				resp.Header.Del("Content-Length")
				resp.ContentLength = -1
				more := "# HELP redis_proxy_new_bytes About <b>.\n# TYPE redis_proxy_new_bytes gauge\nredis_proxy_new_bytes 2048\n"
				resp.Body = struct {
					io.Reader
					io.Closer
				}{io.MultiReader(resp.Body, strings.NewReader(more)), resp.Body}
			}
			return nil
		}
		front := httptest.NewServer(relay)
		defer front.Close()
		dom := browse(t, chromium, front.URL, func() { exchange(t, proxy, request("GET", t.Name())) })
		_, metrics := httpDo(t, "GET", admin.String()+"/metrics")
		for _, m := range regexp.MustCompile(`(?m)^# TYPE (?:redis_proxy_)?(\w+) (?:counter|gauge|histogram)$`).FindAllStringSubmatch(metrics, -1) {
			if !strings.HasSuffix(m[1], "info") && m[1] != "cache_bytes" && m[1] != "process_resident_memory_bytes" &&
				!strings.Contains(dom, "<span>"+m[1]) {
				t.Errorf("the page does not show %s", m[1])
			}
		}
		line := regexp.MustCompile(`<path d="M[0-9.]+ [0-9.]+h0(L[0-9.]+ [0-9.]+h0)+"`)
		for _, title := range []string{"Requests", "Hits", "Latency of Redis", "Memory", "requests_total resp absent", "new_bytes"} {
			_, chart, _ := strings.Cut(dom, "<span>"+title+"</span>")
			chart, _, _ = strings.Cut(chart, "</figure>")
			if !line.MatchString(chart) {
				t.Errorf("no line is drawn for %s: %s", title, chart)
			}
		}
		for _, want := range []string{proxy + " in front of Redis at ", ">2 KB</b>", `title="About &lt;b&gt;."`, "cache timeout: 30s", "tracking: off"} {
			if !strings.Contains(dom, want) {
				t.Errorf("the page lacks %s", want)
			}
		}
	})
}

// browse returns the DOM of a page after ten seconds of the browser's virtual time. It calls load repeatedly
// until then.
func browse(t *testing.T, chromium, url string, load func()) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) // not t.TempDir: the browser's other processes may still write
	cmd := exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
		"--user-data-dir="+dir, "--virtual-time-budget=10000", "--dump-dom", url)
	var dom, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &dom, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	defer time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }).Stop()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("chromium: %v\n%s", err, stderr.String())
			}
			for _, line := range strings.Split(stderr.String(), "\n") {
				if strings.Contains(line, ":CONSOLE") {
					t.Errorf("the page complains: %s", line)
				}
			}
			return dom.String()
		case <-time.After(time.Millisecond):
			load()
		}
	}
}

func TestIntegrationCheck(t *testing.T) {
	_, proxy, _ := startProgram(t, []string{"RP_PASSWORD=secret"})
	port := portOf(proxy)
	for _, row := range []struct {
		args []string
		code int
	}{
		{[]string{"--check", "--port", port}, 0},
		{[]string{"--check", "--port", port, "--listen-address", "0.0.0.0"}, 0},
		{[]string{"--check", "--port", freePort()}, 1},
	} {
		cmd := program(t, nil, row.args...)
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != row.code || (row.code == 0) != (len(out) == 0) {
			t.Errorf("%q: got exit code %d, %q; want %d", row.args, got, out, row.code)
		}
	}
}

func TestIntegrationLogs(t *testing.T) {
	_, proxy, log := startProgram(t, nil, "--log-level", "debug", "--log-format", "json")
	client := dial(t, proxy).send("\x00")
	client.Close()
	eventually(t, "the client's address in the debug log", func() bool {
		for _, line := range strings.Split(strings.TrimSpace(log.String()), "\n") {
			var entry map[string]any
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if entry["level"] == "DEBUG" && entry["client"] == client.Conn.LocalAddr().String() {
				return true
			}
		}
		return false
	})
}

// Benchmarks: the proxy, and the same load on Redis itself, over loopback. The clients are in this
// process, and allocate nothing for a request.

const (
	// benchValue is the value of all keys of benchmarks.
	benchValue = "0123456789012345678901234567890123456789"
	// benchClients is how many connections a benchmark has.
	benchClients = 50
	// benchPipeline is the longest of its pipelines.
	benchPipeline = 100
)

// setKeys sets n keys for as long as a benchmark runs, and returns what names them.
func setKeys(b *testing.B, addr string, n int) (key func(i int) string) {
	b.Helper()
	key = func(i int) string { return fmt.Sprintf("%s:%09d", b.Name(), i) }
	each := func(cmd string, args ...any) {
		c, err := redis.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		for i := range n {
			c.Send(cmd, append([]any{key(i)}, args...)...)
			if i%1000 == 999 || i == n-1 {
				if _, err := c.Do(""); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	each("SET", benchValue)
	b.Cleanup(func() { each("DEL") })
	return key
}

// A load is what the clients of a benchmark send, again and again.
type load struct {
	requests []string
	// answered reports whether got is all of the answers to n requests, and if not, whether it is
	// their beginning.
	answered func(got []byte, n int) (done, ok bool)
}

// respLoad asks for n keys, in an order of its own.
func respLoad(key func(i int) string, n int) *load {
	l, reply := new(load), bulk(benchValue)
	all := []byte(strings.Repeat(reply, benchPipeline))
	for i := range n {
		l.requests = append(l.requests, request("GET", key(i*7919%n)))
	}
	l.answered = func(got []byte, n int) (done, ok bool) {
		want := all[:n*len(reply)]
		return len(got) == len(want), bytes.HasPrefix(want, got)
	}
	return l
}

func httpLoad(key func(i int) string, n int) *load {
	l, begin, end := new(load), []byte("HTTP/1.1 200 OK\r\n"), []byte("\r\n\r\n"+benchValue)
	for i := range n {
		l.requests = append(l.requests, "GET /"+key(i*7919%n)+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
	}
	l.answered = func(got []byte, _ int) (done, ok bool) {
		return bytes.HasSuffix(got, end), bytes.HasPrefix(got, begin[:min(len(got), len(begin))])
	}
	return l
}

// A loadClient is one connection of a load.
type loadClient struct {
	*load
	net.Conn
	next int // of the requests
	buf  []byte
}

func (l *load) dial(b *testing.B, addr string, first int) *loadClient {
	b.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return &loadClient{load: l, Conn: c, next: first, buf: make([]byte, 64<<10)}
}

// ask sends the next n requests and reads the answers.
func (c *loadClient) ask(n int) error {
	batch := c.buf[:0]
	for range n {
		batch = append(batch, c.requests[c.next%len(c.requests)]...)
		c.next++
	}
	if _, err := c.Write(batch); err != nil {
		return err
	}
	for got, done := 0, false; !done; {
		read, err := c.Read(c.buf[got:])
		if err != nil {
			return err
		}
		got += read
		var ok bool
		if done, ok = c.answered(c.buf[:got], n); !ok {
			return fmt.Errorf("got %.200q", c.buf[:got])
		}
	}
	return nil
}

// askAll sends each request once.
func (l *load) askAll(b *testing.B, addr string) {
	b.Helper()
	c := l.dial(b, addr, 0)
	for left := len(l.requests); left > 0; left -= benchPipeline {
		if err := c.ask(min(left, benchPipeline)); err != nil {
			b.Fatal(err)
		}
	}
}

// run measures requests that are sent so many at once, by clients each of which begins with others.
func (l *load) run(b *testing.B, addr string, pipeline int) {
	b.Helper()
	procs := runtime.GOMAXPROCS(0)
	each := max(1, benchClients/procs)
	clients := make(chan *loadClient, procs*each)
	for i := range cap(clients) {
		c := l.dial(b, addr, i*len(l.requests)/cap(clients))
		if err := c.ask(pipeline); err != nil { // all that is made for a connection is there afterwards
			b.Fatal(err)
		}
		clients <- c
	}
	b.SetParallelism(each)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		c := <-clients
		for n := pipeline; n == pipeline; {
			for n = 0; n < pipeline && pb.Next(); {
				n++
			}
			if n == 0 {
				return
			}
			if err := c.ask(n); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

func BenchmarkIntegrationHit(b *testing.B) {
	addr, n := sharedRedis(b), 10_000
	key := setKeys(b, addr, n)
	p := startProxy(b, addr, "--cache-timeout", "1h")
	l := respLoad(key, n)
	l.askAll(b, p.addr)
	fetches := p.stat(b, "upstream_fetches")
	for _, pipeline := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("pipeline=%d/proxy", pipeline), func(b *testing.B) { l.run(b, p.addr, pipeline) })
		b.Run(fmt.Sprintf("pipeline=%d/redis", pipeline), func(b *testing.B) { l.run(b, addr, pipeline) })
	}
	b.Run("http", func(b *testing.B) { httpLoad(key, n).run(b, p.addr, 1) })
	if got := p.stat(b, "upstream_fetches"); got != fetches {
		b.Errorf("fetches: got %s; want %s, those from before", got, fetches)
	}
}

// No key is asked for again before all the others have been, of which the cache holds one.
func BenchmarkIntegrationMiss(b *testing.B) {
	addr, n := sharedRedis(b), 100_000
	key := setKeys(b, addr, n)
	p := startProxy(b, addr, "--cache-size", "1")
	l := respLoad(key, n)
	for _, pipeline := range []int{1, 16} {
		b.Run(fmt.Sprintf("pipeline=%d/proxy", pipeline), func(b *testing.B) { l.run(b, p.addr, pipeline) })
		b.Run(fmt.Sprintf("pipeline=%d/redis", pipeline), func(b *testing.B) { l.run(b, addr, pipeline) })
	}
	if got := p.stat(b, "cache_hits"); got != "0" {
		b.Errorf("hits: got %s; want none", got)
	}
}

// BenchmarkIntegrationLatency measures hits on a full cache in which misses replace entries. Half
// of the cache is hot. The other keys are asked for in turn, and more of them exist than fit.
func BenchmarkIntegrationLatency(b *testing.B) {
	addr, entries := sharedRedis(b), soak(50_000, 1_000_000)
	hot, cold := entries/2, entries*6/10
	key := setKeys(b, addr, hot+cold)
	_, proxy, _ := startProgram(b, nil, append(redisAt(b, addr), "--cache-size", fmt.Sprint(entries),
		"--cache-bytes", "1GB", "--cache-timeout", "1h")...)
	hits, misses := respLoad(key, hot), respLoad(func(i int) string { return key(hot + i) }, cold)
	misses.askAll(b, proxy)
	hits.askAll(b, proxy)
	missed := 0
	b.Run(fmt.Sprintf("entries=%d/proxy", entries), func(b *testing.B) {
		missed = measureLatency(b, proxy, hits, misses, missed)
	})
	b.Run(fmt.Sprintf("entries=%d/redis", entries), func(b *testing.B) { measureLatency(b, addr, hits, misses, 0) })
	for field, want := range map[string]int{"cache_keys": entries, "cache_misses": hot + cold + missed} {
		if got := infoField(b, dial(b, proxy), field); got != fmt.Sprint(want) {
			b.Errorf("%s: got %s; want %d", field, got, want)
		}
	}
}

// measureLatency lets each client ask for one hot key, and another client for a batch of cold
// keys, at a constant pace. It returns the index of the next cold key.
func measureLatency(b *testing.B, addr string, hits, misses *load, next int) int {
	b.Helper()
	const pace, batch = 5 * time.Millisecond, 5
	rounds := (b.N + benchClients - 1) / benchClients
	took := make([]time.Duration, rounds*benchClients)
	other := misses.dial(b, addr, next)
	clients := make([]*loadClient, benchClients)
	for i := range clients {
		clients[i] = hits.dial(b, addr, i*len(hits.requests)/benchClients)
		if err := clients[i].ask(1); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	var wg sync.WaitGroup
	begin := time.Now()
	wg.Go(func() {
		for round := range rounds {
			time.Sleep(time.Until(begin.Add(time.Duration(round) * pace)))
			if err := other.ask(batch); err != nil {
				b.Error(err)
				return
			}
		}
	})
	for i, c := range clients {
		wg.Go(func() {
			due, end := begin.Add(pace*time.Duration(i)/benchClients), begin
			for round := range rounds {
				sent := due // where the answer before came late, this one is late from then on
				if end.Before(due) {
					time.Sleep(time.Until(due))
					sent = time.Now()
				}
				if err := c.ask(1); err != nil {
					b.Error(err)
					return
				}
				end = time.Now()
				took[round*benchClients+i] = end.Sub(sent)
				due = due.Add(pace)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	slices.Sort(took)
	for _, percent := range []float64{50, 99, 99.9} {
		at := min(int(float64(len(took))*percent/100), len(took)-1)
		b.ReportMetric(float64(took[at])/float64(time.Microsecond), fmt.Sprintf("p%v-us", percent))
	}
	b.ReportMetric(0, "ns/op")
	return other.next
}
