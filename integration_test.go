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
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	mrand "math/rand/v2"
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
	"strconv"
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
	if os.Getenv("TEST_TWO_ADDRESSES") != "" {
		dial := func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go answerDNS(server) // ends when the resolver closes its end
			return client, nil
		}
		net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: dial}
		if ips, err := net.LookupHost(twoAddresses); err != nil || len(ips) != 2 || ips[0] != "127.0.0.2" {
			fmt.Fprintf(os.Stderr, "%s: got %v (%v); want 127.0.0.2 and 127.0.0.1", twoAddresses, ips, err)
			os.Exit(3)
		}
	}
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
	if err := r.launch(); err != nil {
		return err
	}
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

// launch starts cmd.
func (r *redisServer) launch() error {
	if err := r.cmd.Start(); err != nil {
		return err
	}
	r.ended = make(chan struct{})
	go func() { // ends with the process
		defer close(r.ended)
		r.cmd.Wait()
	}()
	return nil
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
		case <-time.After(2 * shutdownTimeout):
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

// program runs the program as a process of its own, without the variables of the tests.
func program(t testing.TB, env []string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	// The race detector would sleep for a second at the end of each process.
	own := append(env, "TEST_RUN_MAIN=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	ours := func(variable string) bool { return strings.HasPrefix(variable, "RP_") }
	cmd.Env = append(slices.DeleteFunc(os.Environ(), ours), own...)
	return cmd
}

// startProgram runs the program as a process, and returns the address that its log names.
func startProgram(t testing.TB, env []string, args ...string) (*exec.Cmd, string, *lockedBuffer) {
	t.Helper()
	cmd := program(t, env, slices.Concat(patience, []string{"--port", "0"}, args)...)
	addr, log := serves(t, cmd)
	return cmd, addr, log
}

// serves starts a program, and returns the address that its log names.
func serves(t testing.TB, cmd *exec.Cmd) (addr string, log *lockedBuffer) {
	t.Helper()
	log = new(lockedBuffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, "the program serves", func() bool {
		m := regexp.MustCompile(`serving.*?address[=":]+([0-9.:]+)`).FindStringSubmatch(log.String())
		if m != nil {
			addr = m[1]
		}
		return m != nil
	})
	return addr, log
}

// expectExit asks a process to stop and waits until it has ended with exit code 0.
func expectExit(t testing.TB, cmd *exec.Cmd, within time.Duration) {
	t.Helper()
	cmd.Process.Signal(syscall.SIGTERM)
	defer time.AfterFunc(within, func() { cmd.Process.Kill() }).Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v; want exit code 0 in %v", err, within)
	}
}

// fails runs a program that is to end with an error by itself, and returns what it writes.
func fails(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() }).Stop()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() < 1 {
		t.Errorf("%q: got %v; want it to end with an error:\n%s", cmd.Args[1:], err, out.String())
	}
	return out.String()
}

func portOf(addr string) string { return addr[strings.LastIndex(addr, ":")+1:] }

// tried waits until the attempt at the start to reach Redis is over.
func (p *testProxy) tried(t testing.TB) {
	t.Helper()
	eventually(t, "one connection, which is idle", func() bool {
		return p.stat(t, "upstream_connections") == "1" && p.stat(t, "upstream_connections_used") == "0"
	})
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	within(t, 15*time.Second, what, cond)
}

// within waits until a condition holds, for so long. It fails on a try that began after that.
func within(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	late := false
	for end := time.Now().Add(limit); !cond(); time.Sleep(5 * time.Millisecond) {
		if late {
			t.Fatalf("not within %v: %s", limit, what)
		}
		late = time.Now().After(end)
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

// newRawClient returns a client for what a dial has returned.
func newRawClient(t testing.TB, c net.Conn, err error) *rawClient {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return &rawClient{t, c, bufio.NewReader(c)}
}

func dial(t testing.TB, addr string) *rawClient {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	return newRawClient(t, c, err)
}

func dialTLS(t testing.TB, addr string, config *tls.Config) *rawClient {
	t.Helper()
	c, err := tls.Dial("tcp", addr, config)
	return newRawClient(t, c, err)
}

// dialNarrow connects with a receive buffer of so many bytes.
func dialNarrow(t testing.TB, addr string, bytes int) *rawClient {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, bytes)
		})
		return err
	}}
	c, err := d.Dial("tcp", addr)
	return newRawClient(t, c, err)
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

// expectGone waits until the other side takes nothing any more.
func (c *rawClient) expectGone() {
	c.t.Helper()
	eventually(c.t, "the connection is closed for good", func() bool {
		_, err := io.WriteString(c.Conn, "x")
		return err != nil
	})
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
	var s strings.Builder
	fmt.Fprintf(&s, "*%d\r\n", len(args))
	for _, a := range args {
		s.WriteString(bulk(a))
	}
	return s.String()
}

// plainRequest is a GET over HTTP without anything that needs a closer look.
func plainRequest(key string) string { return "GET /" + key + " HTTP/1.1\r\nHost: h\r\n\r\n" }

// h2Frame is a frame of HTTP/2 (RFC 9113 §4.1).
func h2Frame(kind, flags byte, stream int, payload string) string {
	head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return string(binary.BigEndian.AppendUint32(head, uint32(stream))) + payload
}

// h2Get is a GET: HEADERS with END_STREAM and END_HEADERS.
func h2Get(stream int, path string) string {
	return h2Frame(1, 5, stream, "\x82\x86\x41\x01a\x04"+string(rune(len(path)))+path)
}

// h2Begin is the preface, and SETTINGS with an INITIAL_WINDOW_SIZE of 0.
var h2Begin = preface + h2Frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")

// h2Update is a WINDOW_UPDATE.
func h2Update(stream, bytes int) string {
	return h2Frame(8, 0, stream, string(binary.BigEndian.AppendUint32(nil, uint32(bytes))))
}

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
		{"empty lines before HTTP", "\r\n\r\n" + plainRequest(t.Name()), "HTTP/1.1 200 OK\r\n"},
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
	var refused []*rawClient
	for _, row := range []struct{ send, want string }{
		{request("PING"), `^-ERR max number of clients reached\r\n$`},
		{plainRequest("k"), `^HTTP/1.1 503 (?s:.*)\r\nRetry-After: 1\r\n(?s:.*)\r\n\r\ntoo many clients\n$`},
		{"HEAD /k HTTP/1.1\r\nHost: h\r\n\r\n", `^HTTP/1.1 503 (?s:.*)\r\nContent-Length: 17\r\n(?s:.*)\r\n\r\n$`},
		{preface, `^$`},
		// One that has more to say sees the answer too.
		{"GET / HTTP/1.1\r\nHost: h\r\nCookie: " + strings.Repeat("x", 1<<20), `^HTTP/1.1 503 `},
		{request("PING", strings.Repeat("x", 1<<20)), `^-ERR max `},
	} {
		for try := 1; ; try++ {
			dialled, c := time.Now(), dial(t, p.addr)
			go io.WriteString(c.Conn, row.send) // ends with the connection
			got, err := io.ReadAll(c.Reader)
			if time.Since(dialled) > refuseTimeout && try < 3 { // the proxy may have hung up before
				continue
			}
			if refused = append(refused, c); err != nil || !regexp.MustCompile(row.want).Match(got) {
				t.Errorf("after %.20q: got %q, %v; want %s", row.send, got, err, row.want)
			}
			break
		}
	}
	for _, c := range refused {
		c.expectGone()
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

// Clients that are being refused take nobody's place, and are no clients to the figures.
func TestIntegrationRefusedClientsTakeNoPlace(t *testing.T) {
	p := startProxy(t, sharedRedis(t), "--max-clients", "2")
	first := dial(t, p.addr).send(request("PING")).expect("+PONG\r\n")
	second := dial(t, p.addr).send(request("PING")).expect("+PONG\r\n")
	var refused []*rawClient
	for range 5 {
		refused = append(refused, dial(t, p.addr)) // silent, and not closed yet
	}
	eventually(t, "5 refused clients", func() bool { return infoField(t, first, "rejected_connections") == "5" })
	for name, want := range map[string]string{"connected_clients": "2", "total_connections_received": "2"} {
		compare(t, name, infoField(t, first, name), want)
	}
	second.Close()
	eventually(t, "the second has left", func() bool { return infoField(t, first, "connected_clients") == "1" })
	dial(t, p.addr).send(request("PING")).expect("+PONG\r\n")
	for _, c := range refused {
		c.expectClosed()
	}
	eventually(t, "two clients", func() bool { return infoField(t, first, "connected_clients") == "2" })
}

// A flakyListener fails a few times before it accepts.
type flakyListener struct {
	net.Listener
	fails atomic.Int64
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.fails.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

// Where no connection can be accepted, the proxy tries again, more and more slowly, and says so.
func TestIntegrationAcceptingIsTriedAgain(t *testing.T) {
	const fails = 4
	cfg, err := parseConfig(redisAt(t, sharedRedis(t)), nil)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &flakyListener{Listener: inner}
	l.fails.Store(fails)
	var log lockedBuffer
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { stop(); running.Wait() })
	began := time.Now()
	running.Go(func() { run(ctx, cfg, l, nil, slog.New(slog.NewTextHandler(&log, nil))) }) // ends with stop
	dial(t, inner.Addr().String()).send(request("PING")).expect("+PONG\r\n")
	if took := time.Since(began); took < 75*time.Millisecond { // 5, 10, 20 and 40
		t.Errorf("accepted after %v; want pauses that grow", took)
	}
	compare(t, "complaints in the log", strings.Count(log.String(), "accepting a connection"), fails)
}

func TestIntegrationIdleTimeout(t *testing.T) {
	t.Parallel()
	const idle = 3 * time.Second
	p := startProxy(t, sharedRedis(t), "--idle-timeout", idle.String())
	began, took := time.Now(), time.Duration(0)
	silent := dial(t, p.addr)
	var closed sync.WaitGroup
	closed.Go(func() { // ends when silent is closed
		silent.Peek(1)
		took = time.Since(began)
	})
	resp := dial(t, p.addr).send("PING\r\n").expect("+PONG\r\n")
	web := dial(t, p.addr).send("GET /x HTTP/1.1\r\nHost: h\r\n\r\n").expect("HTTP/1.1 404 Not Found\r\n")
	// A client that speaks often enough stays.
	busy := dial(t, p.addr)
	for range 15 {
		busy.send("PING\r\n").expect("+PONG\r\n")
		time.Sleep(idle / 10)
	}
	closed.Wait()
	silent.expectClosed()
	resp.expectClosed()
	if _, err := io.ReadAll(web); err != nil {
		t.Errorf("HTTP: %v; want the connection closed", err)
	}
	if took < idle || took > 10*idle {
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
	clients := make([]*rawClient, n)
	for i := range clients {
		clients[i] = dial(t, p.addr)
		ask(clients[i], i)
	}
	slow := make([]*rawClient, 30)
	for i := range slow {
		slow[i] = dial(t, p.addr).send([]string{"", "*2\r\n$3\r\nGE", "GET /x HT"}[i%3])
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
	const stuck = 3 * time.Second
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
	const parts = 40 // in twice as long as a client that reads nothing has
	var readers sync.WaitGroup
	for name, c := range map[string]*rawClient{"RESP": resp, "HTTP": quick, "HTTP by net/http": handed} {
		readers.Go(func() {
			for part := range slices.Chunk([]byte(val), len(val)/parts+1) {
				time.Sleep(2 * stuck / parts)
				if sameContent(c, part) != len(part) {
					t.Errorf("over %s: not the whole value", name)
					return
				}
			}
		})
	}
	readers.Wait()
}

// Streams of HTTP/2 that the client takes slowly, a little of each at a time, are served to the
// end, which comes long after the first deadline.
func TestIntegrationSlowHTTP2StreamsAreServed(t *testing.T) {
	t.Parallel()
	const stuck, streams, grants, grant = 6 * time.Second, 4, 60, 32 << 10
	flags := playRedis(t, func(int, []string) string { return bulk(strings.Repeat("x", grants*grant)) })
	p := runProxy(t, append(flags, "--redis-timeout=500ms"),
		func(cfg *config) { cfg.clients.writeTimeout = stuck })
	eventually(t, "a value in the cache", func() bool { return strings.HasPrefix(p.ask(t, "k"), "$") })
	c := dial(t, p.addr)
	open, more := h2Begin, h2Update(0, streams*grant)
	for id := 1; id < 2*streams; id += 2 {
		open += h2Get(id, "/k")
		more += h2Update(id, grant)
	}
	c.send(open)
	go func() { // ends with its last write
		for range grants {
			io.WriteString(c.Conn, more)
			time.Sleep(2 * stuck / grants)
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
	settings := serverSettings{maxClients: 10, writeTimeout: time.Second, grown: func(int) {}, requests: newBudget(1)}
	s := newServer(l, settings, slog.New(slog.NewTextHandler(log, nil)),
		map[protocol]frontEnd{protoHTTP: panicker{}, protoRESP: echo{}})
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
	p := startProxy(t, addr, "--redis-timeout", "1m")
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
		"*2\r\n$3\r\nGET\r\n$100000000\r\n",
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
		{
			"empty lines between requests that are not ordinary",
			strings.Repeat("GET "+path+" HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1\r\n\r\n\r\n\n", 3) +
				"GET " + path + end,
			`^(HTTP/1.1 206 Partial Content\r\n(?s:.*?)\r\n\r\nva){3}HTTP/1.1 200 OK\r\n(?s:.*)\r\n\r\nvalue$`,
		},
		{
			"HEAD of another tag",
			"HEAD " + path + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\nIf-Match: \"x\"\r\n\r\n",
			`^HTTP/1.1 412 (?s:.*)\r\n\r\n$`,
		},
		{"absolute form without a path", "GET http://h" + end, `^HTTP/1.1 404 `},
		{"absolute form with a query and no path", "GET http://h?q" + end, `^HTTP/1.1 404 `},
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
		{
			"a range that fails in 1.0",
			"GET " + path + " HTTP/1.0\r\nConnection: keep-alive\r\nRange: bytes=100-\r\n\r\n",
			`^HTTP/1.0 416 (?s:.*)\r\nContent-Length: 33\r\n(?s:.*)\r\n\r\ninvalid range`,
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
	slow := 0
	for range 5 {
		req, err := http.NewRequest("PUT", "http://"+p.addr+"/"+t.Name(), bytes.NewReader(make([]byte, 5<<20)))
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil && time.Since(began) > 400*time.Millisecond && slow < 2 { // net/http hangs up after 500 ms
			slow++
			continue
		}
		if err != nil {
			t.Fatalf("PUT of 5 MB: %v; want 405", err)
		}
		resp.Body.Close()
		if resp.StatusCode != 405 {
			t.Errorf("PUT of 5 MB: got %d; want 405", resp.StatusCode)
		}
	}
}

// A client that reads none of its answer is given up: by the quick way, by net/http over HTTP/1,
// and over HTTP/2, where it opens no window.
func TestIntegrationUnreadHTTPAnswersAreGivenUp(t *testing.T) {
	t.Parallel()
	big := bulk(strings.Repeat("x", 8<<20))
	flags := playRedis(t, func(_ int, args []string) string {
		if args[1] == "big" {
			return big
		}
		return bulk("small")
	})
	flags = append(flags, "--redis-timeout", "1s", "--cache-timeout", "1h") // HTTP/2 allows a stream twice that, too
	p := runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = time.Second })
	eventually(t, "both values are cached", func() bool {
		return strings.HasPrefix(p.ask(t, "big"), "$") && strings.HasPrefix(p.ask(t, "small"), "$")
	})
	const handed = "GET /big HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n\r\n"
	h2 := h2Begin
	for id := 1; id < 10; id += 2 {
		h2 += h2Get(id, "/big")
	}
	refused := h2Begin + h2Frame(1, 5, 1, "\x82\x86\x41\x01a\x84\x40\x0aconnection\x01x")
	for _, row := range []struct {
		name, send string
		streams    int // of HTTP/2
	}{
		{"quick", plainRequest("big"), 0},
		{"HTTP/1.1", handed, 0},
		{"HTTP/1.1 after an answer", plainRequest("small") + handed, 0},
		{"HTTP/2", h2, 5},
		{"HTTP/2, a small value", h2Begin + h2Get(1, "/small"), 1},
		{"HTTP/2, an error of net/http", refused, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, p.addr).send(row.send)
			if row.streams == 0 {
				for line := ""; line != "Content-Length: 8388608\r\n"; {
					var err error
					if line, err = c.ReadString('\n'); err != nil {
						t.Fatalf("the answer is not begun: %v", err)
					}
				}
				c.expectGone()
				return
			}
			var begun, reset int
			for reset < row.streams {
				var head [9]byte
				if _, err := io.ReadFull(c.Reader, head[:]); err != nil {
					t.Fatalf("%d answers begun, %d given up: %v; want %d", begun, reset, err, row.streams)
				}
				io.CopyN(io.Discard, c.Reader, int64(head[0])<<16|int64(head[1])<<8|int64(head[2]))
				switch head[3] {
				case 1: // HEADERS
					begun++
				case 3: // RST_STREAM
					reset++
				}
			}
			compare(t, "answers begun", begun, row.streams)
		})
	}
}

// RESP

// What only the proxy answers in its way.
func TestIntegrationCommandsOfItsOwn(t *testing.T) {
	p := startProxy(t, sharedRedis(t))
	for _, row := range []struct{ name, send, want string }{
		{"COMMAND", request("COMMAND"), `^\*\d+\r\n(?s:.*)\*10\r\n\$3\r\nget\r\n:2\r\n\*2\r\n\+readonly\r\n`},
		{"COMMAND DOCS, for redis-cli then has its own", request("COMMAND", "DOCS"),
			`^-ERR unknown subcommand 'DOCS'. `},
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
		{"a browser", "PING\r\nPOST / HTTP/1.1\r\n" + strings.Repeat("x", 20000), `^\+PONG\r\n$`},
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
			case <-time.After(timeout + 800*time.Millisecond): // within its grace
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
	t.Parallel()
	const clients, each, size, limit = 16, 14, 512 << 10, 2*(16<<20) + 64<<20
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
			want := int64(each * len(bulk(string(val))))
			if mget {
				want += int64(len(fmt.Sprintf("*%d\r\n", each)))
			}
			var readers sync.WaitGroup
			for _, c := range all {
				readers.Go(func() {
					defer c.Close()
					if n, err := io.CopyN(io.Discard, c, want); err != nil {
						t.Errorf("got %d bytes of %d: %v", n, want, err)
					}
				})
			}
			readers.Wait()
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
			request("CLIENT", "LIST", "TYPE", "foo"),
			request("CLIENT", "LIST", "TYPE", "replica"),
			request("CLIENT", "LIST", "TYPE", "normal", "normal"),
			request("CLIENT", "LIST", "FOO"),
			request("CLIENT", "LIST", "ID", "-1"),
			request("CLIENT", "LIST", "ID", "1", "abc"),
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
		request("EXEC", "x"),
		request("DISCARD"),
		request("MULTI", "x"),
		"MULTI\r\nGET "+key+"\r\nGET "+absent+"\r\n"+request("MGET", key, list, absent)+request("EXISTS", key, list)+
			request("GET", list)+"PING\r\nEXEC\r\nPING\r\n",
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
		request("COMMAND", "GETKEYS", "config", "nonsense"),
		request("COMMAND", "GETKEYS", "config", "get", "a"),
		request("COMMAND", "LIST", "FILTERBY"),
		request("CLUSTER", "INFO"),
		request("CLUSTER"),
		request("CLUSTER", "FOO"),
		request("CLUSTER", "KEYSLOT"),
		request("CLUSTER", "KEYSLOT", "a", "b"),
		request("CLUSTER", "NODES", "x"),
		request("CLUSTER", "ADDSLOTS"),
		request("CLUSTER", "MEET", "h"),
		request("CLUSTER", "FAILOVER"),
		"MULTI\r\nCLUSTER KEYSLOT\r\nEXEC\r\n",
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
	if proto, ok := protocolOf(send); ok && proto == protoHTTP || bytes.HasPrefix(send, []byte{0x16}) {
		return false // HTTP, or TLS
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

// A read over either protocol, of one key or of many, counts as a use.
func TestIntegrationLeastRecentlyUsedGoesFirst(t *testing.T) {
	var asked lockedBuffer
	p := runProxy(t, append(playRedis(t, func(_ int, args []string) string {
		io.WriteString(&asked, args[1])
		return bulk(args[1])
	}), "--cache-size", "3", "--client-limit", "1"))
	c := dial(t, p.addr)
	for _, step := range []struct{ over, keys, missed string }{
		{"GET", "abca", "abc"},
		{"GET", "dacd", "d"}, // in place of b
		{"HTTP", "a", ""},
		{"GET", "bda", "b"}, // in place of c
		{"MGET", "bd", ""},
		{"GET", "cbd", "c"}, // in place of a
	} {
		before := len(asked.String())
		if step.over == "MGET" {
			c.send(request("MGET", "b", "d")).expect("*2\r\n" + bulk("b") + bulk("d"))
			step.keys = ""
		}
		for _, key := range strings.Split(step.keys, "") {
			if step.over == "HTTP" {
				httpDo(t, "GET", "http://"+p.addr+"/"+key)
			} else {
				c.send(request("GET", key)).expect(bulk(key))
			}
		}
		compare(t, "asked of Redis for "+step.over+" "+step.keys, asked.String()[before:], step.missed)
	}
}

// A hit near the end of an entry's life has it fetched anew, and waits for nothing.
func TestIntegrationHotKeysAreRefreshed(t *testing.T) {
	t.Parallel()
	var fetches atomic.Int64
	p := runProxy(t, append(playRedis(t, func(_ int, args []string) string {
		if args[1] == "k" {
			fetches.Add(1)
		}
		return bulk("value")
	}), "--cache-timeout", "4s", "--refresh-before", "3s"))
	url, began := "http://"+p.addr+"/k", time.Now()
	httpDo(t, "GET", url)
	time.Sleep(time.Second)
	compare(t, "GETs in the first half", fetches.Load(), 1)
	eventually(t, "a fetch before the end", func() bool {
		resp, _ := httpDo(t, "GET", url)
		if got := resp.Header.Get("Cache-Status"); !strings.HasPrefix(got, "redis_proxy; hit; ttl=") {
			t.Fatalf("after %v: got Cache-Status %q; want a hit", time.Since(began), got)
		}
		return fetches.Load() == 2
	})
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("refreshed after %v; want it in the second half of 4s", took)
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
		c.SetDeadline(time.Now().Add(3 * time.Minute))
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

// Redis has said that the key is gone: it does not come back when Redis goes too.
func TestIntegrationForgetsWhatRedisSaysIsGone(t *testing.T) {
	for _, gone := range []string{"$-1\r\n", "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"} {
		var reply atomic.Value
		reply.Store(bulk("old"))
		flags := playRedis(t, func(int, []string) string { return reply.Load().(string) })
		p := newParts(t, append(flags, "--cache-timeout", "1ms", "--stale-timeout", "1h")...)
		get := func() answer {
			time.Sleep(2 * time.Millisecond) // past the TTL
			return p.get("k")
		}
		get()
		reply.Store(gone)
		get()
		reply.Store(hungUp)
		if a := get(); a.err != errUnavailable {
			t.Errorf("after %q and an outage: got %q, %v; want %v", gone, a.data, a.err, errUnavailable)
		}
	}
}

// Redis takes longer than anybody waits, and the key is asked for all the time: its replies are
// stored.
func TestIntegrationStoresLateRepliesForAHotKey(t *testing.T) {
	p := newParts(t, append(playRedis(t, func(int, []string) string {
		time.Sleep(60 * time.Millisecond)
		return bulk("v")
	}), "--redis-timeout", "40ms")...)
	for end := time.Now().Add(10 * time.Second); askFor(p,
		"k")[0].source != fromCache; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never a hit")
		}
	}
}

// After one wait that was too long, the rest of what a client has sent does not wait, also where
// stale values are the answers. A Redis that answers each lot in time is not too slow.
func TestIntegrationWaitsOnceForASlowRedis(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	flags := playRedis(t, func(int, []string) string {
		<-release
		return "$-1\r\n"
	})
	t.Cleanup(func() { close(release) })
	p := newParts(t, append(flags, "--redis-timeout", "500ms", "--cache-timeout", "1ms", "--stale-timeout", "1h")...)
	large := strings.Repeat("v", aheadBytes/2)
	mget, gets, want := []string{"MGET"}, "", ""
	for i := range 16 {
		key := fmt.Sprint(i)
		cacheNow(p, key, large)
		mget, gets, want = append(mget, key), gets+request("GET", key), want+bulk(large)
	}
	time.Sleep(2 * time.Millisecond) // they are stale
	for _, in := range []string{request(mget...) + gets, gets + request(mget...)} {
		began := time.Now()
		got := talk(t, p, strings.NewReader(in))
		compare(t, "replies", len(got), 2*len(want)+len("*16\r\n"))
		if took := time.Since(began); took > 8*p.cache.timeout {
			t.Errorf("took %v; want %v", took, p.cache.timeout)
		}
	}
	flags = playRedis(t, func(int, []string) string { return "-CLUSTERDOWN any\r\n" })
	p = newParts(t, append(flags, "--redis-timeout", "500ms")...)
	p.cache.typical.Store(100 * aheadBytes) // one at a time
	began := time.Now()
	refusals := talk(t, p, strings.NewReader(gets))
	compare(t, "refusals", strings.Count(refusals, "-CLUSTERDOWN any\r\n")+strings.Count(refusals, "timed out\r\n"), 16)
	if took := time.Since(began); took > 8*p.cache.timeout {
		t.Errorf("took %v; want %v", took, p.cache.timeout)
	}
	p = newParts(t, append(playRedis(t, func(int, []string) string {
		time.Sleep(200 * time.Millisecond)
		return bulk("v")
	}), "--redis-timeout", "2s", "--client-limit", "1")...)
	p.cache.typical.Store(100 * aheadBytes) // one at a time
	got := talk(t, p, strings.NewReader(request(append(mget, "a", "b")...)))
	compare(t, "lots in time", got, "*18\r\n"+strings.Repeat(bulk("v"), 18))
}

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

// INFO shows what becomes of connections and nodes, while a GET is on its way, idle, in an outage
// and after it.
func TestIntegrationFiguresOfRedis(t *testing.T) {
	asked, answered := make(chan struct{}), make(chan struct{})
	var down atomic.Bool
	p := runProxy(t, playRedis(t, func(_ int, args []string) string {
		if args[1] == "held" {
			close(asked)
			<-answered
		}
		if down.Load() {
			return hungUp
		}
		return bulk("value")
	}))
	answer := sync.OnceFunc(func() { close(answered) })
	t.Cleanup(answer)
	expect := func(when string, figures ...string) {
		t.Helper()
		eventually(t, when+fmt.Sprintf(": %q of connections, used, nodes, down, errors", figures), func() bool {
			var got []string
			for _, name := range []string{"connections", "connections_used", "nodes", "nodes_down", "errors"} {
				got = append(got, p.stat(t, "upstream_"+name))
			}
			return slices.Equal(got, figures)
		})
	}
	expect("at the start", "1", "0", "1", "0", "0")
	c := dial(t, p.addr).send(request("GET", "held"))
	<-asked
	expect("on its way", "1", "1", "1", "0", "0")
	answer()
	c.expect(bulk("value"))
	expect("idle", "1", "0", "1", "0", "0")
	down.Store(true)
	for range 3 {
		c.send(request("GET", "k")).expect("-ERR upstream unavailable\r\n")
	}
	expect("in an outage", "0", "0", "1", "1", "3")
	down.Store(false)
	c.send(request("GET", "k")).expect(bulk("value"))
	expect("after it", "1", "0", "1", "0", "3")
	for i := range 3 {
		c.send(request("GET", fmt.Sprint(i))).expect(bulk("value"))
	}
	for line, want := range map[string]int{"Redis cannot be read": 1, "Redis can be read again": 1} {
		if got := strings.Count(p.log.String(), line); got != want {
			t.Errorf("%q in the log: got %d times; want %d:\n%s", line, got, want, p.log)
		}
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

// A Redis that takes nothing keeps no connection in use.
func TestIntegrationRedisThatDoesNotRead(t *testing.T) {
	t.Parallel()
	p := startAt(t, scriptedAt(t, "127.0.0.1").addr, "--client-limit", "1", "--redis-timeout", "1s")
	dial(t, p.addr).send(request("GET", strings.Repeat("k", 20<<20))).expect(timedOut)
	eventually(t, "no connection in use", func() bool { return p.stat(t, "upstream_connections_used") == "0" })
}

func TestIntegrationLateReplyFillsTheCache(t *testing.T) {
	t.Parallel()
	var asked atomic.Bool
	late := make(chan struct{})
	reply := sync.OnceFunc(func() { close(late) })
	defer reply()
	flags := playRedis(t, func(int, []string) string { asked.Store(true); <-late; return bulk("value") })
	p := runProxy(t, append(flags, "--redis-timeout", "1s", "--cache-timeout", "1h"))
	eventually(t, "Redis is asked, and has not answered in time", func() bool {
		return p.ask(t, "k") == timedOut && asked.Load()
	})
	reply()
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
	p.tried(t)
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

// A connection that Redis lets in but not log in is not kept.
func TestIntegrationRefusedConnectionsAreClosed(t *testing.T) {
	n := scriptedAt(t, "127.0.0.1")
	n.other = func([]string) string { return "-WRONGPASS invalid username-password pair or user is disabled.\r\n" }
	n.play(nil, nil)
	p := startURL(t, "redis://:wrong@"+n.addr)
	for range 5 {
		exchange(t, p.addr, request("GET", "k"))
	}
	compare(t, "asked for the password", n.times("AUTH") >= 5, true)
	eventually(t, "no connection is left", func() bool { return n.open() == 0 })
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
	for _, flags := range [][]string{{"--redis-cacert", cert}, {"--redis-insecure"}} {
		_, proxy, log := startProgram(t, []string{url}, flags...)
		if got := exchange(t, proxy, request("GET", "k")); got != bulk("value in 3") {
			t.Errorf("with %q: got %q; want the value", flags, got)
		}
		warned := strings.Contains(log.String(), "the certificate of Redis is not checked")
		compare(t, flags[0]+": a warning", warned, flags[0] == "--redis-insecure")
	}
	for _, flags := range [][]string{{"--redis-cacert", key}, {"--redis-cacert", dir + "/none"},
		{"--redis-cert", cert}, {"--redis-key", key}} {
		if out := fails(t, program(t, []string{url}, flags...)); !strings.Contains(out, flags[0]) {
			t.Errorf("with %q alone: got %q; want an error that names the flag", flags, out)
		}
	}
}

// A Redis may ask for a certificate.
func TestIntegrationTLSUpstreamAsksForACertificate(t *testing.T) {
	cert, key := makeCertificate(t, t.TempDir(), "redis")
	port := freePort()
	server := startRedis(t, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key,
		"--tls-auth-clients", "yes", "--tls-ca-cert-file", cert)
	redisDo(t, server.addr, "SET", "k", "value")
	flags := []string{"--redis-url", "rediss://127.0.0.1:" + port, "--redis-cacert", cert}
	_, proxy, _ := startProgram(t, nil, append(flags, "--redis-cert", cert, "--redis-key", key)...)
	if got := exchange(t, proxy, request("GET", "k")); got != bulk("value") {
		t.Errorf("with a certificate: got %q; want the value", got)
	}
	_, proxy, _ = startProgram(t, nil, flags...)
	if got := exchange(t, proxy, request("GET", "k")); got != "-ERR upstream unavailable\r\n" {
		t.Errorf("without one: got %q; want an error", got)
	}
}

// A socket on either side. One that a process left behind is replaced, one that answers is not.
func TestIntegrationUnixSockets(t *testing.T) {
	dir, err := os.MkdirTemp("", "rp") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server := startRedis(t, "--unixsocket", dir+"/redis")
	redisDo(t, server.addr, "SET", "k", "value")
	left, err := net.Listen("unix", dir+"/proxy")
	if err != nil {
		t.Fatal(err)
	}
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()
	flags := slices.Concat(patience,
		[]string{"--listen-address", "unix://" + dir + "/proxy", "--redis-url", "unix://" + dir + "/redis"})
	cmd := program(t, nil, flags...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var c net.Conn
	eventually(t, "a connection", func() bool {
		c, err = net.Dial("unix", dir+"/proxy")
		return err == nil
	})
	newRawClient(t, c, err).send(request("GET", "k")).expect(bulk("value"))
	if out, err := program(t, nil, append(flags, "--check")...).CombinedOutput(); err != nil {
		t.Errorf("--check: %v, %s", err, out)
	}
	if out := fails(t, program(t, nil, flags...)); !strings.Contains(out, "in use") {
		t.Errorf("a second process: got %q; want the address to be in use", out)
	}
	c, err = net.Dial("unix", dir+"/proxy")
	newRawClient(t, c, err).send("PING\r\n").expect("+PONG\r\n")
}

// The log says what is on, and, before any client has asked, that Redis is not there or wants a
// password.
func TestIntegrationStartSaysWhatIsWrong(t *testing.T) {
	p := runProxy(t, []string{"--redis-url", "redis://" + startRedis(t, "--requirepass", "secret").addr})
	eventually(t, "the password is missed", func() bool { return strings.Contains(p.log.String(), "NOAUTH") })
	_, _, log := startProgram(t, nil, "--redis-port", freePort())
	eventually(t, "Redis is missed", func() bool { return strings.Contains(log.String(), "Redis cannot be read") })
	if !regexp.MustCompile(`serving.* tls=false password=false`).MatchString(log.String()) {
		t.Errorf("got %s; want no TLS and no password", log)
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
				timeout = "1s"
			}
			p := startProxy(t, r.addr, "--redis-timeout", timeout, "--cache-timeout", "1h")
			set := func() {
				for _, k := range []string{"warm", "cold-resp", "cold-http", "after-resp", "after-http"} {
					redisDo(t, server.addr, "SET", k, "value")
				}
			}
			set()
			eventually(t, "a warm key", func() bool { return p.ask(t, "warm") == bulk("value") })
			settle()
			goroutines, files := runtime.NumGoroutine(), openFiles(t)

			fault.begin(r, server)
			for range 2 {
				began := time.Now()
				expectAnswers(t, p, "cold", fault.resp, fault.status)
				if took := time.Since(began); took > 8*time.Second {
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

// expectAnswers asks for a key over both protocols, at once where both are to wait. Each has its own
// unless the key is the warm one.
func expectAnswers(t *testing.T, p *testProxy, key, resp string, status int) {
	t.Helper()
	overRESP, overHTTP := key+"-resp", key+"-http"
	if key == "warm" {
		overRESP, overHTTP = key, key
	}
	var both sync.WaitGroup
	both.Go(func() {
		if got := exchange(t, p.addr, request("GET", overRESP)); got != resp {
			t.Errorf("%s: got %q; want %q", overRESP, got, resp)
		}
	})
	if resp != timedOut {
		both.Wait()
	}
	both.Go(func() {
		if got, body := httpDo(t, "GET", "http://"+p.addr+"/"+overHTTP); got.StatusCode != status {
			t.Errorf("%s: got %d %q; want %d", overHTTP, got.StatusCode, body, status)
		}
	})
	both.Wait()
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
			var outage, inside, answered atomic.Int64 // outage is odd in one
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
						if !upstream || stale != "0" || began%2 == 0 && outage.Load() == began {
							t.Errorf("got %q; in the outage: %v", line, began%2 == 1)
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
				outage.Add(1)
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
				outage.Add(1)
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
		getter.SetDeadline(time.Now().Add(3 * time.Minute))
		checker.SetDeadline(time.Now().Add(3 * time.Minute))
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
			p := startProxy(t, r.addr, "--tracking", "--cache-timeout", "1h")
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

// Tracking stays live, and entries with it, while nothing changes for long.
func TestIntegrationTrackingOutlivesQuiet(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	p := trackedProxy(t, server.addr)
	redisDo(t, server.addr, "SET", "k", "value")
	eventually(t, "the change is reported", func() bool { return p.stat(t, "tracking_invalidations") == "1" })
	url := "http://" + p.addr + "/k"
	httpDo(t, "GET", url)
	time.Sleep(3*pingEvery + pingEvery/2)
	resp, _ := httpDo(t, "GET", url)
	if got := resp.Header.Get("Cache-Status"); !strings.HasPrefix(got, "redis_proxy; hit") {
		t.Errorf("after a while: got Cache-Status %q; want a hit", got)
	}
	if strings.Contains(p.log.String(), "tracking is down") {
		t.Errorf("tracking went down:\n%s", p.log)
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
	p.tried(t)
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

// Cluster and Sentinel: real servers that are resharded, killed, stopped and failed over, and
// scripted nodes for what real ones do not do on demand.

const (
	// afterKill and afterStop are how long after all nodes agree a killed and a stopped master may
	// still cause errors.
	afterKill, afterStop = 3 * time.Second, 4 * time.Second
	// afterSwitch is how long after the sentinels name another master the former one may be read.
	afterSwitch = 3 * time.Second
	// soonStale bounds the age of a value after an acknowledged write, where tracking is on: p99.
	soonStale = 20 * time.Millisecond
	// atRest bounds it at the worst, on a machine under load.
	atRest = 2 * time.Second
)

// serverPort returns a free port outside the range from which connections get theirs: a server that
// is down for a while must find it free again.
func serverPort() string {
	for {
		port := strconv.Itoa(11000 + mrand.IntN(20000))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// startURL runs a proxy in front of what a URL names.
func startURL(t testing.TB, url string, flags ...string) *testProxy {
	t.Helper()
	return runProxy(t, append([]string{"--redis-url", url, "--redis-timeout", "3s"}, flags...))
}

// startAt runs a proxy in front of the server at an address.
func startAt(t testing.TB, addr string, flags ...string) *testProxy {
	t.Helper()
	return startURL(t, "redis://"+addr, flags...)
}

// figure reads one figure of INFO.
func (p *testProxy) figure(t testing.TB, name string) (n int) {
	t.Helper()
	fmt.Sscan(p.stat(t, name), &n)
	return n
}

// ask returns the bytes that answer a GET.
func (p *testProxy) ask(t testing.TB, key string) string {
	t.Helper()
	return exchange(t, p.addr, request("GET", key))
}

// difference says where two texts begin to differ.
func difference(got, want string) string {
	at := 0
	for at < len(got) && at < len(want) && got[at] == want[at] {
		at++
	}
	at = max(0, at-20)
	return fmt.Sprintf("from byte %d on got %.150q; want %.150q", at, got[min(at, len(got)):],
		want[min(at, len(want)):])
}

// percentile sorts durations and returns one of them.
func percentile(ds []time.Duration, percent int) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	slices.Sort(ds)
	return ds[min(len(ds)*percent/100, len(ds)-1)]
}

// keySlot is the slot of a key, as the specification of Redis Cluster has it.
func keySlot(key string) int {
	if i := strings.IndexByte(key, '{'); i >= 0 {
		if n := strings.IndexByte(key[i+1:], '}'); n > 0 {
			key = key[i+1 : i+1+n]
		}
	}
	var crc uint16
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			high := crc&0x8000 != 0
			if crc <<= 1; high {
				crc ^= 0x1021
			}
		}
	}
	return int(crc % 16384)
}

// A testNode is a redis-server of a cluster.
type testNode struct {
	*redisServer
	bus, id string
	down    atomic.Bool // killed or stopped
	stopped bool
}

// try sends the node one command, on a connection of its own, and does not wait for long.
func (n *testNode) try(cmd string, args ...any) (any, error) {
	patience := 2 * time.Second
	c, err := redis.Dial("tcp", n.addr, redis.DialConnectTimeout(patience), redis.DialReadTimeout(patience),
		redis.DialWriteTimeout(patience))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(cmd, args...)
}

func (n *testNode) do(t testing.TB, cmd string, args ...any) any {
	t.Helper()
	reply, err := n.try(cmd, args...)
	if err != nil {
		t.Fatalf("at %s: %s %.80s: %v", n.addr, cmd, fmt.Sprint(args...), err)
	}
	return reply
}

func (n *testNode) kill() {
	n.down.Store(true)
	n.redisServer.kill()
}

func (n *testNode) stop() {
	n.down.Store(true)
	n.stopped = true
	n.signal(syscall.SIGSTOP)
}

// revive has a node that was stopped or killed go on.
func (n *testNode) revive(t testing.TB) {
	t.Helper()
	if n.stopped {
		n.signal(syscall.SIGCONT)
	} else if err := n.start(); err != nil {
		t.Fatalf("starting %s again: %v", n.addr, err)
	}
	n.stopped = false
	n.down.Store(false)
}

// A testCluster is a Redis Cluster of processes on this machine.
type testCluster struct {
	nodes []*testNode
	dir   string
	args  []string
	moves []func(t testing.TB) // that have begun, and end once
}

// startCluster starts a cluster of masters, with so many replicas each, and of some that own
// nothing.
func startCluster(t testing.TB, masters, replicas, idle int, args ...string) *testCluster {
	t.Helper()
	c := &testCluster{dir: t.TempDir(), args: append([]string{
		"--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "2000",
		"--cluster-allow-replica-migration", "no", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1",
	}, args...)}
	n := masters * (1 + replicas)
	for range n + idle {
		c.launch(t)
	}
	for i := range masters {
		c.nodes[i].do(t, "CLUSTER", "ADDSLOTSRANGE", i*16384/masters, (i+1)*16384/masters-1)
	}
	c.meet(t)
	for i := masters; i < n; i++ {
		c.nodes[i].do(t, "CLUSTER", "REPLICATE", c.nodes[i%masters].id)
	}
	c.heal(t)
	return c
}

// launch starts a node that nobody knows yet.
func (c *testCluster) launch(t testing.TB) *testNode {
	t.Helper()
	port, bus := serverPort(), serverPort()
	dir := filepath.Join(c.dir, port)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r, err := launchRedis(dir, port, append([]string{"--cluster-port", bus}, c.args...)...)
	if err != nil {
		t.Fatalf("starting a node of the cluster: %v", err)
	}
	n := &testNode{redisServer: r, bus: bus}
	t.Cleanup(n.kill)
	c.nodes = append(c.nodes, n)
	n.do(t, "CLUSTER", "SET-CONFIG-EPOCH", len(c.nodes))
	n.id, _ = redis.String(n.do(t, "CLUSTER", "MYID"), nil)
	return n
}

// meet has all nodes know each other.
func (c *testCluster) meet(t testing.TB) {
	t.Helper()
	var sent time.Time
	eventually(t, "all nodes of the cluster know each other", func() bool {
		if time.Since(sent) > 3*time.Second { // a node gives up one that is slow to answer
			sent = time.Now()
			for i, n := range c.nodes {
				for _, other := range c.nodes[:i] {
					n.do(t, "CLUSTER", "MEET", "127.0.0.1", other.port, other.bus)
				}
			}
		}
		for _, n := range c.nodes {
			list, _ := redis.String(n.do(t, "CLUSTER", "NODES"), nil)
			if strings.Count(list, " connected") != len(c.nodes) || strings.Contains(list, "handshake") {
				return false
			}
		}
		return true
	})
}

// view returns who owns which slots as a node has it, as one comparable text.
func (n *testNode) view() (text string, owners []string, covered int) {
	rows, _ := redis.Values(n.try("CLUSTER", "SLOTS"))
	var parts []string
	for _, row := range rows {
		fields, _ := redis.Values(row, nil)
		from, _ := redis.Int(fields[0], nil)
		to, _ := redis.Int(fields[1], nil)
		master, _ := redis.Values(fields[2], nil)
		port, _ := redis.Int(master[1], nil)
		parts = append(parts, fmt.Sprintf("%05d-%05d=%d", from, to, port))
		owners = append(owners, fmt.Sprint(port))
		covered += to - from + 1
	}
	slices.Sort(parts)
	slices.Sort(owners)
	return strings.Join(parts, " "), slices.Compact(owners), covered
}

// table returns the owner of every slot, as the first node has it that is up.
func (c *testCluster) table(t testing.TB) []*testNode {
	t.Helper()
	for _, n := range c.nodes {
		if n.down.Load() {
			continue
		}
		owners := make([]*testNode, 16384)
		text, _, covered := n.view()
		for _, part := range strings.Fields(text) {
			var from, to int
			var port string
			fmt.Sscanf(part, "%d-%d=%s", &from, &to, &port)
			for slot := from; slot <= to; slot++ {
				owners[slot] = c.at(port)
			}
		}
		if covered == len(owners) {
			return owners
		}
	}
	t.Fatal("no node of the cluster knows an owner of every slot")
	return nil
}

func (c *testCluster) owner(t testing.TB, slot int) *testNode {
	t.Helper()
	return c.table(t)[slot]
}

// at returns the node with this port.
func (c *testCluster) at(port string) *testNode {
	for _, n := range c.nodes {
		if n.port == port {
			return n
		}
	}
	return nil
}

// masters returns the nodes that own slots.
func (c *testCluster) masters(t testing.TB) (nodes []*testNode) {
	t.Helper()
	for _, n := range c.table(t) {
		if !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// replica returns a replica of a master, which is up.
func (c *testCluster) replica(t testing.TB, master *testNode) *testNode {
	t.Helper()
	for _, n := range c.nodes {
		if n.down.Load() {
			continue
		}
		if role, _ := redis.Values(n.try("ROLE")); len(role) == 5 && fmt.Sprint(role[2]) == master.port {
			return n
		}
	}
	t.Fatalf("%s has no replica", master.addr)
	return nil
}

// disagreement returns "" if all nodes that are up have the same table, with an owner that is up
// for each slot, and else what they say.
func (c *testCluster) disagreement() (all string) {
	first, same := "", true
	for _, n := range c.nodes {
		if n.down.Load() {
			continue
		}
		text, owners, covered := n.view()
		if first == "" {
			first = text
		}
		state, _ := redis.String(n.try("CLUSTER", "INFO"))
		state, _, _ = strings.Cut(state, "\r\n")
		same = same && text == first && covered == 16384 && state == "cluster_state:ok"
		for _, port := range owners {
			n := c.at(port)
			same = same && n != nil && !n.down.Load()
		}
		all += fmt.Sprintf("\n%s: %s, %d slots: %.200s", n.addr, state, covered, text)
	}
	if same {
		return ""
	}
	return all
}

// agree waits until all nodes agree, and returns when they did.
func (c *testCluster) agree(t testing.TB) time.Time {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := c.disagreement()
		if all == "" {
			return time.Now()
		}
		if time.Now().After(end) {
			t.Fatalf("the nodes of the cluster never agree who owns what:%s", all)
		}
	}
}

// heal revives every node, ends what a test has left half done, and waits until all agree and
// replicas follow their masters.
func (c *testCluster) heal(t testing.TB) {
	t.Helper()
	for _, n := range c.nodes {
		if n.down.Load() {
			n.revive(t)
		}
	}
	c.agree(t)
	for _, finish := range c.moves {
		finish(t)
	}
	c.moves = nil
	eventually(t, "all replicas follow their masters", func() bool {
		for _, n := range c.nodes {
			state, err := redis.String(n.try("INFO", "replication"))
			if err != nil || strings.Contains(state, "master_link_status:down") {
				return false
			}
		}
		return true
	})
	c.agree(t)
}

// configure sets an option at every node.
func (c *testCluster) configure(t testing.TB, name, val string) {
	t.Helper()
	for _, n := range c.nodes {
		if !n.down.Load() {
			n.do(t, "CONFIG", "SET", name, val)
		}
	}
}

// moveHalf moves half of the keys of a slot to another node, and returns what moves the rest and
// ends it.
func (c *testCluster) moveHalf(t testing.TB, slot int, to *testNode) (finish func(t testing.TB)) {
	t.Helper()
	from := c.owner(t, slot)
	to.do(t, "CLUSTER", "SETSLOT", slot, "IMPORTING", from.id)
	from.do(t, "CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
	move := func(t testing.TB, n int) (moved int) {
		keys, _ := redis.Values(from.do(t, "CLUSTER", "GETKEYSINSLOT", slot, n), nil)
		if len(keys) > 0 {
			from.do(t, "MIGRATE", append([]any{"127.0.0.1", to.port, "", 0, 5000, "KEYS"}, keys...)...)
		}
		return len(keys)
	}
	n, _ := redis.Int(from.do(t, "CLUSTER", "COUNTKEYSINSLOT", slot), nil)
	if n > 1 {
		move(t, n/2)
	}
	ended := false
	finish = func(t testing.TB) {
		t.Helper()
		if ended {
			return
		}
		ended = true
		for move(t, 100) > 0 {
		}
		// The target first, as redis-cli does it: the source has somewhere to send clients to.
		for _, n := range append([]*testNode{to, from}, c.masters(t)...) {
			n.do(t, "CLUSTER", "SETSLOT", slot, "NODE", to.id)
		}
	}
	c.moves = append(c.moves, finish)
	return finish
}

// move moves a slot.
func (c *testCluster) move(t testing.TB, slot int, to *testNode) {
	t.Helper()
	if c.owner(t, slot) != to {
		c.moveHalf(t, slot, to)(t)
	}
}

// failover has a replica take over from its master, by hand, and waits until all agree.
func (c *testCluster) failover(t testing.TB, replica *testNode) {
	t.Helper()
	var tried time.Time
	eventually(t, replica.addr+" is a master", func() bool {
		if time.Since(tried) > 6*time.Second { // Redis gives up after 5
			tried = time.Now()
			replica.do(t, "CLUSTER", "FAILOVER")
		}
		_, owners, _ := replica.view()
		return slices.Contains(owners, replica.port)
	})
	c.agree(t)
}

// cut closes all connections of clients to a node: "normal" ones, or those of trackers, "pubsub".
func (n *testNode) cut(t testing.TB, kind string) {
	t.Helper()
	n.do(t, "CLIENT", "KILL", "TYPE", kind)
}

// A clusterClient reads and writes keys at the nodes themselves. One goroutine may use it at a
// time.
type clusterClient struct {
	c      *testCluster
	conns  map[string]redis.Conn
	owners map[int]string
}

func (c *testCluster) client(t testing.TB) *clusterClient {
	cc := &clusterClient{c, make(map[string]redis.Conn), make(map[int]string)}
	t.Cleanup(func() {
		for _, conn := range cc.conns {
			conn.Close()
		}
	})
	return cc
}

// try sends a command for a key to the node that owns it, again and again for as long as patience
// says until one takes it.
func (cc *clusterClient) try(patience time.Duration, cmd, key string, args ...any) (any, error) {
	slot, addr, asking := keySlot(key), "", false
	for end := time.Now().Add(patience); ; {
		if addr == "" {
			if addr = cc.owners[slot]; addr == "" {
				up := slices.DeleteFunc(slices.Clone(cc.c.nodes), func(n *testNode) bool { return n.down.Load() })
				addr = up[mrand.IntN(len(up))].addr
			}
		}
		reply, err := cc.once(addr, asking, cmd, append([]any{key}, args...)...)
		var refusal redis.Error
		words := strings.Fields(fmt.Sprint(err))
		switch isReply := errors.As(err, &refusal); {
		case err == nil:
			if !asking {
				cc.owners[slot] = addr
			}
			return reply, nil
		case isReply && words[0] == "MOVED":
			addr, asking = words[2], false
			cc.owners[slot] = addr
		case isReply && words[0] == "ASK":
			addr, asking = words[2], true
		case isReply && !slices.Contains([]string{"CLUSTERDOWN", "TRYAGAIN", "LOADING", "READONLY"}, words[0]):
			return nil, err
		default:
			addr, asking = "", false
			delete(cc.owners, slot)
			time.Sleep(5 * time.Millisecond)
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%s %s in vain for %v: %w", cmd, key, patience, err)
		}
	}
}

func (cc *clusterClient) once(addr string, asking bool, cmd string, args ...any) (any, error) {
	conn, patience := cc.conns[addr], 300*time.Millisecond
	if conn == nil || conn.Err() != nil {
		var err error
		if conn, err = redis.Dial("tcp", addr, redis.DialConnectTimeout(patience), redis.DialReadTimeout(patience),
			redis.DialWriteTimeout(patience)); err != nil {
			return nil, err
		}
		cc.conns[addr] = conn
	}
	if asking {
		if _, err := conn.Do("ASKING"); err != nil {
			return nil, err
		}
	}
	return conn.Do(cmd, args...)
}

func (cc *clusterClient) do(t testing.TB, cmd, key string, args ...any) any {
	t.Helper()
	reply, err := cc.try(10*time.Second, cmd, key, args...)
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

// queue sends a command to a node, and flush waits for the replies to all that were sent.
func (cc *clusterClient) queue(t testing.TB, to *testNode, cmd string, args ...any) {
	t.Helper()
	conn := cc.conns[to.addr]
	if conn == nil || conn.Err() != nil {
		var err error
		if conn, err = redis.Dial("tcp", to.addr, redis.DialReadTimeout(10*time.Second)); err != nil {
			t.Fatal(err)
		}
		cc.conns[to.addr] = conn
	}
	if err := conn.Send(cmd, args...); err != nil {
		t.Fatal(err)
	}
}

func (cc *clusterClient) flush(t testing.TB) {
	t.Helper()
	for addr, conn := range cc.conns {
		if conn.Err() != nil {
			continue // it was broken before anything was queued
		}
		if _, err := redis.DoWithTimeout(conn, 10*time.Second, ""); err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
	}
}

// keysOf returns n keys for each node that owns slots.
func (c *testCluster) keysOf(t testing.TB, name string, n int) map[*testNode][]string {
	t.Helper()
	groups, table := make(map[*testNode][]string), c.table(t)
	for i, full, owners := 0, 0, len(c.masters(t)); full < owners && i < 1<<20; i++ {
		key := fmt.Sprint(name, ":", i)
		owner := table[keySlot(key)]
		if len(groups[owner]) < n {
			if groups[owner] = append(groups[owner], key); len(groups[owner]) == n {
				full++
			}
		}
	}
	return groups
}

// A clusterLoad writes to keys all the time, reads them through proxies, and checks every answer:
// it must have been written at some time, and must not be older than the bound of its proxy, but
// for writes that a failover may have lost.
type clusterLoad struct {
	t       *testing.T
	c       *testCluster
	readers []*loadReader
	groups  map[*testNode][]string
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup
	pen     sync.RWMutex // write-locked while nothing is written

	mu      sync.Mutex // guards the following
	history map[string][]writing
	losses  []interval // in which writes may have been lost
	wrong   []string
}

// A writing's value is a number; its index is one less. acked is zero until Redis has acknowledged
// it.
type writing struct{ acked time.Time }

type interval struct{ from, to time.Time }

// A loadReader is how one proxy is read, and what came of it.
type loadReader struct {
	name    string
	p       *testProxy
	bound   time.Duration // how old a value may be
	answers atomic.Int64

	mu     sync.Mutex // guards the following
	errors []failedRead
	took   []tookRead // successful reads
}

type failedRead struct {
	key, err     string
	began, ended time.Time
}

type tookRead struct {
	owner *testNode // at the start
	began time.Time
	took  time.Duration
}

func (f failedRead) String() string {
	return fmt.Sprintf("GET %s (slot %d) at %s: %s", f.key, keySlot(f.key), f.ended.Format("05.000"), f.err)
}

// load begins to write to keys, and to read them.
func (c *testCluster) load(t *testing.T, groups map[*testNode][]string, readers ...*loadReader) *clusterLoad {
	t.Helper()
	l := &clusterLoad{t: t, c: c, groups: groups, readers: readers, history: make(map[string][]writing)}
	l.ctx, l.stop = context.WithCancel(context.Background())
	t.Cleanup(l.end)
	first := c.client(t)
	for _, keys := range groups {
		for _, key := range keys {
			l.write(first, key)
		}
	}
	for _, r := range readers {
		for _, keys := range groups { // all have been seen once
			for _, key := range keys {
				got := r.p.ask(t, key)
				if !strings.HasPrefix(got, "$") {
					t.Fatalf("%s: GET %s: got %q; want a value", r.name, key, got)
				}
			}
		}
	}
	for owner, keys := range groups {
		client := c.client(t)
		l.wg.Go(func() {
			for i := 0; l.ctx.Err() == nil; i++ {
				l.pen.RLock()
				l.write(client, keys[i%len(keys)])
				l.pen.RUnlock()
				time.Sleep(3 * time.Millisecond)
			}
		})
		for _, r := range readers {
			for i := range 6 {
				l.wg.Go(func() { l.read(r, owner, keys, i) })
			}
		}
	}
	return l
}

func (l *clusterLoad) end() {
	l.stop()
	l.wg.Wait()
}

func (l *clusterLoad) write(client *clusterClient, key string) {
	l.mu.Lock()
	l.history[key] = append(l.history[key], writing{})
	n := len(l.history[key])
	l.mu.Unlock()
	if _, err := client.try(20*time.Second, "SET", key, fmt.Sprint(key, "=", n)); err != nil {
		l.blame("writing: %v", err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.history[key][n-1].acked = time.Now()
}

func (l *clusterLoad) blame(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.wrong) < 10 {
		l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
	}
}

func (l *clusterLoad) read(r *loadReader, owner *testNode, keys []string, first int) {
	var conn redis.Conn
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	for i := first * 7; l.ctx.Err() == nil; i++ {
		time.Sleep(10 * time.Millisecond)
		if conn == nil || conn.Err() != nil {
			var err error
			if conn, err = redis.Dial("tcp", r.p.addr, redis.DialReadTimeout(10*time.Second)); err != nil {
				l.blame("%s: dialling the proxy: %v", r.name, err)
				return
			}
		}
		key := keys[i%len(keys)]
		began := time.Now()
		val, err := redis.String(conn.Do("GET", key))
		ended := time.Now()
		var reply redis.Error
		switch {
		case errors.As(err, &reply):
			r.mu.Lock()
			r.errors = append(r.errors, failedRead{key, string(reply), began, ended})
			r.mu.Unlock()
		case err != nil && err != redis.ErrNil:
			l.blame("%s: GET %s: the proxy did not answer: %v", r.name, key, err)
		default:
			r.answers.Add(1)
			r.mu.Lock()
			r.took = append(r.took, tookRead{owner, began, ended.Sub(began)})
			r.mu.Unlock()
			if fault := l.judge(key, val, began, r.bound); fault != "" {
				l.blame("%s: GET %s at %s: got %q: %s", r.name, key, began.Format("05.000"), val, fault)
			}
		}
	}
}

// judge returns what is wrong with a value, if anything is.
func (l *clusterLoad) judge(key, val string, began time.Time, bound time.Duration) string {
	after, ok := strings.CutPrefix(val, key+"=")
	n, err := strconv.Atoi(after)
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.history[key]
	if !ok || err != nil || n < 1 || n > len(all) {
		return fmt.Sprintf("it was never written; the last is %d", len(all))
	}
	for w, newer := range all[n:] {
		lost := slices.ContainsFunc(l.losses, func(i interval) bool {
			return newer.acked.After(i.from) && (i.to.IsZero() || newer.acked.Before(i.to))
		})
		if age := began.Sub(newer.acked); !newer.acked.IsZero() && !lost && age > bound {
			return fmt.Sprintf("%d was acknowledged %v before; want at most %v", n+w+1, age.Round(time.Millisecond),
				bound)
		}
	}
	return ""
}

// disturb notes that from now on, until the returned function is called, writes may get lost.
func (l *clusterLoad) disturb() (over func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := len(l.losses)
	l.losses = append(l.losses, interval{from: time.Now().Add(-3 * time.Second)})
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.losses[i].to = time.Now()
	}
}

// more waits for so many more answers through every proxy.
func (l *clusterLoad) more(n int64) {
	l.t.Helper()
	for _, r := range l.readers {
		begun := r.answers.Load()
		within(l.t, 15*time.Second, fmt.Sprintf("%d more answers through the %s proxy", n, r.name),
			func() bool { return r.answers.Load() >= begun+n })
	}
}

// quiet has nothing written, and every proxy agree with Redis soon.
func (l *clusterLoad) quiet() {
	l.t.Helper()
	l.pen.Lock()
	defer l.pen.Unlock()
	client := l.c.client(l.t)
	for _, keys := range l.groups {
		for _, key := range keys {
			want, err := redis.String(client.do(l.t, "GET", key), nil)
			if err != nil {
				l.t.Errorf("GET %s at Redis itself: %v", key, err)
				continue
			}
			for _, r := range l.readers {
				got, late := "", false
				for end := time.Now().Add(3 * time.Second); got != bulk(want); time.Sleep(time.Millisecond) {
					if late {
						l.t.Errorf("%s: GET %s, when all is quiet: got %q; want %q", r.name, key, got, want)
						return
					}
					late = time.Now().After(end)
					got = r.p.ask(l.t, key)
				}
			}
		}
	}
}

// finish ends the load and reports every wrong answer, and every error that is not excused.
func (l *clusterLoad) finish(excused func(r *loadReader, f failedRead) bool) {
	l.t.Helper()
	l.end()
	for _, w := range l.wrong {
		l.t.Error(w)
	}
	for _, r := range l.readers {
		shown, not := 0, 0
		for _, f := range r.errors {
			if excused == nil || !excused(r, f) {
				if not++; shown < 3 {
					shown++
					l.t.Errorf("%s: %v", r.name, f)
				}
			}
		}
		if not > shown {
			l.t.Errorf("%s: … and %d more errors that must not be", r.name, not-shown)
		}
		if log := r.p.log.String(); not > 0 {
			l.t.Logf("the end of its log:\n%s", log[max(0, len(log)-2000):])
		}
		slow := r.latency(nil, time.Time{}, time.Now())
		if excused == nil && slow > time.Second {
			l.t.Errorf("%s: p99 of its answers: got %v; want a second at most", r.name, slow)
		}
		l.t.Logf("%s: %d answers, p99 %v, %d errors", r.name, r.answers.Load(), slow, len(r.errors))
	}
}

// latency returns the 99th percentile of reads of keys that other nodes own, begun inside an
// interval.
func (r *loadReader) latency(not *testNode, from, to time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ds []time.Duration
	for _, s := range r.took {
		if s.owner != not && s.began.After(from) && s.began.Before(to) {
			ds = append(ds, s.took)
		}
	}
	return percentile(ds, 99)
}

// staleness returns how long after acknowledged writes to all masters the last old value is read.
func (c *testCluster) staleness(t testing.TB, p *testProxy, keys []string) []time.Duration {
	t.Helper()
	client, reader := c.client(t), dial(t, p.addr)
	defer reader.Close()
	var ds []time.Duration
	for n := range 200 {
		key, want := keys[n%len(keys)], fmt.Sprint("fresh ", n)
		reader.send(request("GET", key))
		if line, _ := reader.ReadString('\n'); strings.HasPrefix(line, "$") && line != "$-1\r\n" {
			reader.ReadString('\n')
		}
		client.do(t, "SET", key, want)
		acked := time.Now()
		for got := ""; got != want; {
			late := time.Since(acked) > 2*time.Second
			line, _ := reader.send(request("GET", key)).ReadString('\n')
			if got = line; strings.HasPrefix(line, "$") && line != "$-1\r\n" {
				got, _ = reader.ReadString('\n')
			}
			if got = strings.TrimSpace(got); got != want && late {
				t.Fatalf("GET %s, %v after the write: got %q; want %q", key, time.Since(acked), got, want)
			}
		}
		ds = append(ds, time.Since(acked))
	}
	return ds
}

// coherent checks the staleness through a tracking proxy. A machine under load may be slow.
func (c *testCluster) coherent(t testing.TB, p *testProxy) {
	t.Helper()
	within(t, 5*time.Second, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
	var keys []string
	for _, group := range c.keysOf(t, t.Name()+" fresh", 5) {
		keys = append(keys, group...)
	}
	var worst time.Duration
	for range 10 {
		ds := c.staleness(t, p, keys)
		if worst = percentile(ds, 99); worst < soonStale {
			t.Logf("stale after a write: p50 %v, p99 %v, max %v", percentile(ds, 50), worst, ds[len(ds)-1])
			return
		}
	}
	t.Errorf("stale after a write: p99 %v; want less than %v", worst, soonStale)
}

// TestIntegrationCluster has a real cluster of three masters with a replica each, in turn for each
// subject.
func TestIntegrationCluster(t *testing.T) {
	c := startCluster(t, 3, 1, 1)
	witness := startAt(t, c.nodes[0].addr, "--tracking", "--cache-timeout", "1h") // sees all that happens
	hasLeft := leavingNode(t)
	for _, subject := range []struct {
		name string
		test func(*testing.T, *testCluster)
	}{
		{"the harness", testClusterHarness},
		{"every slot", testClusterEverySlot},
		{"answers in order", testClusterAnswersInOrder},
		{"at rest", testClusterAtRest},
		{"addresses", testClusterAddresses},
		{"rights", testClusterRights},
		{"tracking", testClusterTracking},
		{"slots moved", testClusterSlotsMoved},
		{"a slot half moved", testClusterSlotHalfMoved},
		{"failed over by hand", testClusterFailoverByHand},
		{"a master killed", testClusterMasterKilled},
		{"a master stopped", testClusterMasterStopped},
		{"at random", testClusterAtRandom},
	} {
		t.Run(subject.name, func(t *testing.T) {
			c.heal(t)
			subject.test(t, c)
		})
	}
	c.heal(t)
	t.Run("a node has left", hasLeft)
	t.Run("all was seen", func(t *testing.T) { c.coherent(t, witness) })
}

// threeProxies are a plain proxy that misses nearly always, one that may answer stale, and one that
// tracks.
func threeProxies(t *testing.T, c *testCluster, flags ...string) (plain, stale, tracking *loadReader) {
	t.Helper()
	start := func(more ...string) *testProxy { return startAt(t, c.nodes[0].addr, append(more, flags...)...) }
	plain = &loadReader{name: "plain", p: start("--cache-timeout", "1ms", "--client-limit", "4"),
		bound: 100 * time.Millisecond}
	stale = &loadReader{name: "stale", p: start("--cache-timeout", "1ms", "--stale-timeout", "1m"), bound: time.Minute}
	tracking = &loadReader{name: "tracking", p: start("--tracking", "--cache-timeout", "1h"), bound: atRest}
	eventually(t, "tracking is live", func() bool { return tracking.p.stat(t, "tracking") == "live" })
	return plain, stale, tracking
}

// The harness itself: slots are counted as Redis does, and a slot held half moved is.
func testClusterHarness(t *testing.T, c *testCluster) {
	client := c.client(t)
	for i := range 300 {
		key := fmt.Sprint(string(allBytes()[i%256]), "{", i, "}")[i%4:]
		if want, _ := redis.Int(c.nodes[0].do(t, "CLUSTER", "KEYSLOT", key), nil); keySlot(key) != want {
			t.Fatalf("slot of %q: got %d; want %d", key, keySlot(key), want)
		}
	}
	for i := range 20 {
		client.do(t, "SET", fmt.Sprint("{harness}", i), i)
	}
	from := c.owner(t, keySlot("{harness}"))
	to := c.another(t, from)
	finish := c.moveHalf(t, keySlot("{harness}"), to)
	asked := 0
	for i := range 20 {
		key := fmt.Sprint("{harness}", i)
		if _, err := from.try("GET", key); err != nil && strings.HasPrefix(err.Error(), "ASK ") {
			asked++
		}
		if got, _ := redis.Int(client.do(t, "GET", key), nil); got != i {
			t.Errorf("GET %s: got %d", key, got)
		}
	}
	if asked != 10 {
		t.Errorf("half moved: %d keys are asked for elsewhere; want 10", asked)
	}
	finish(t)
	c.agree(t)
	if c.owner(t, keySlot("{harness}")) != to {
		t.Error("the slot has not moved")
	}
}

// another returns a master that is not this one.
func (c *testCluster) another(t testing.TB, not *testNode) *testNode {
	t.Helper()
	masters := c.masters(t)
	return masters[(slices.Index(masters, not)+1)%len(masters)]
}

// sum adds up a figure of INFO over all nodes.
func (c *testCluster) sum(t testing.TB, section, pattern string) (sum int) {
	t.Helper()
	for _, n := range c.nodes {
		info, _ := redis.String(n.do(t, "INFO", section), nil)
		if m := regexp.MustCompile(pattern).FindStringSubmatch(info); m != nil {
			i, _ := strconv.Atoi(m[1])
			sum += i
		}
	}
	return sum
}

const getCalls = `cmdstat_get:calls=(\d+)`

// A key in every slot: each is fetched once, and from the right node as soon as the proxy knows the
// cluster.
func testClusterEverySlot(t *testing.T, c *testCluster) {
	keys := make([]string, 16384)
	for i, found := 0, 0; found < len(keys); i++ {
		key := fmt.Sprint("slot:", i)
		if at := keySlot(key); keys[at] == "" {
			keys[at] = key
			found++
		}
	}
	client, table := c.client(t), c.table(t)
	var send, want strings.Builder
	for slot, key := range keys {
		client.queue(t, table[slot], "SET", key, "value of "+key)
		send.WriteString(request("GET", key))
		want.WriteString(bulk("value of " + key))
	}
	client.flush(t)
	p := startAt(t, c.nodes[1].addr, "--cache-timeout", "1ms", "--redis-timeout", "10s")
	for _, n := range c.nodes {
		n.do(t, "CONFIG", "RESETSTAT")
	}
	same := func(got string) {
		t.Helper()
		if got != want.String() {
			t.Fatal(difference(got, want.String()))
		}
	}
	same(exchange(t, p.addr, send.String()))
	if got := c.sum(t, "commandstats", getCalls); got != len(keys) {
		t.Errorf("%d keys cost Redis %d GETs; want one each", len(keys), got)
	}
	eventually(t, "the proxy knows three nodes", func() bool { return p.stat(t, "upstream_nodes") == "3" })
	redirected := p.figure(t, "upstream_redirects")
	same(exchange(t, p.addr, send.String()))
	if got := p.figure(t, "upstream_redirects"); got != redirected || redirected == 0 {
		t.Errorf("upstream_redirects: got %d, then %d; want some until the slots are known, none afterwards",
			redirected, got)
	}
	for slot := 0; slot < len(keys); slot += 64 {
		resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+keys[slot])
		if resp.StatusCode != 200 || body != "value of "+keys[slot] {
			t.Fatalf("over HTTP, slot %d: got %d %q; want the value", slot, resp.StatusCode, body)
		}
	}
	// Keys whose slot is that of a part of them, or seems to be.
	for _, key := range []string{"", "{a}b", "b{a}", "{}a", "a{}{b}", "{{a}}b", "a{b", "a}b{", "{a}{b}", "}{",
		"{\x00}\xff", "Grüße{世界}"} {
		client.do(t, "SET", key, "tagged "+key)
		before := p.figure(t, "upstream_redirects")
		if got := p.ask(t, key); got != bulk("tagged "+key) {
			t.Errorf("GET %q: got %q; want its value", key, got)
		}
		if got := p.figure(t, "upstream_redirects"); got != before {
			t.Errorf("GET %q went to the wrong node first", key)
		}
		client.do(t, "DEL", key)
	}
}

// Pipelines and MGETs over all nodes are answered in order, whatever the keys hold, and keys that
// many ask for are fetched once.
func testClusterAnswersInOrder(t *testing.T, c *testCluster) {
	client := c.client(t)
	const wrong = "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
	var keys []string
	var pipeline, inPipeline, inMGET string
	for i := range 300 {
		key := fmt.Sprint("order:", i)
		keys = append(keys, key)
		pipeline += request("GET", key)
		client.do(t, "DEL", key)
		switch i % 5 {
		case 1:
			inPipeline, inMGET = inPipeline+"$-1\r\n", inMGET+"$-1\r\n"
		case 2:
			client.do(t, "RPUSH", key, "x")
			inPipeline, inMGET = inPipeline+wrong, inMGET+"$-1\r\n"
		default:
			client.do(t, "SET", key, i)
			inPipeline, inMGET = inPipeline+bulk(fmt.Sprint(i)), inMGET+bulk(fmt.Sprint(i))
		}
	}
	inMGET = fmt.Sprintf("*%d\r\n", len(keys)) + inMGET
	p := startAt(t, c.nodes[2].addr)
	for range 2 {
		if got := exchange(t, p.addr, pipeline); got != inPipeline {
			t.Fatalf("a pipeline: got %.300q…; want %.300q…", got, inPipeline)
		}
		if got := exchange(t, p.addr, request(append([]string{"MGET"}, keys...)...)); got != inMGET {
			t.Fatalf("MGET: got %.300q…; want %.300q…", got, inMGET)
		}
	}
	fresh := startAt(t, c.nodes[2].addr)
	if got := exchange(t, fresh.addr, request(append([]string{"MGET"}, keys...)...)); got != inMGET {
		t.Errorf("MGET first of all: got %.300q…; want %.300q…", got, inMGET)
	}
	for key, want := range map[string]int{"order:0": 200, "order:1": 404, "order:2": 409} {
		if resp, body := httpDo(t, "GET", "http://"+p.addr+"/"+key); resp.StatusCode != want {
			t.Errorf("%s over HTTP: got %d %q; want %d", key, resp.StatusCode, body, want)
		}
	}
	// Twenty clients ask for the same values at once.
	for _, n := range c.nodes {
		n.do(t, "CONFIG", "RESETSTAT")
	}
	collapsing, values := startAt(t, c.nodes[2].addr), 0
	pipeline, inPipeline = "", ""
	for i := range keys {
		if i%5 != 1 && i%5 != 2 {
			values++
			pipeline += request("GET", keys[i])
			inPipeline += bulk(fmt.Sprint(i))
		}
	}
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() {
			if got := exchange(t, collapsing.addr, pipeline); got != inPipeline {
				t.Errorf("one of many clients: got %.300q…; want %.300q…", got, inPipeline)
			}
		})
	}
	clients.Wait()
	if got := c.sum(t, "commandstats", getCalls); got != values {
		t.Errorf("twenty clients cost Redis %d GETs of %d keys; want one each", got, values)
	}
}

// A proxy at rest asks for nothing, and says what it knows.
func testClusterAtRest(t *testing.T, c *testCluster) {
	addr, admin := startAdmin(t, c.nodes[0].addr, "--cache-timeout", "1ms")
	p := &testProxy{addr: addr}
	client := c.client(t)
	var keys []string
	for _, group := range c.keysOf(t, "rest", 5) {
		keys = append(keys, group...)
	}
	for _, key := range keys {
		client.do(t, "SET", key, "value")
	}
	read := func() {
		t.Helper()
		for _, key := range keys {
			if got := p.ask(t, key); got != bulk("value") {
				t.Fatalf("GET %s: got %q; want its value", key, got)
			}
		}
	}
	read()
	eventually(t, "three nodes are known", func() bool { return p.stat(t, "upstream_nodes") == "3" })
	time.Sleep(300 * time.Millisecond) // for a hint that waits
	refreshes := p.figure(t, "upstream_refreshes")
	for began := time.Now(); time.Since(began) < time.Second; {
		read()
	}
	if got := p.figure(t, "upstream_refreshes"); got > refreshes+1 {
		t.Errorf("%d refreshes in a second in which nothing happened; want none", got-refreshes)
	}
	_, metrics := httpDo(t, "GET", admin+"/metrics")
	for _, want := range []string{"redis_proxy_upstream_nodes 3", "redis_proxy_upstream_refreshes_total ",
		"redis_proxy_upstream_redirects_total ", "redis_proxy_upstream_nodes_down 0"} {
		if !strings.Contains(metrics, "\n"+want) {
			t.Errorf("/metrics has no %q", want)
		}
	}
	if got := exchange(t, p.addr, request("INFO", "server")); !strings.Contains(got, "redis_mode:standalone") {
		t.Errorf("INFO server: got %q; want redis_mode:standalone: clients must not take the proxy for a cluster", got)
	}
}

// Any node, a replica, a node that is down beside others, and a name, are as good as any other
// address. A database other than 0 is refused in Redis' own words.
func testClusterAddresses(t *testing.T, c *testCluster) {
	client := c.client(t)
	var keys []string
	for _, group := range c.keysOf(t, "address", 2) {
		keys = append(keys, group...)
	}
	for _, key := range keys {
		client.do(t, "SET", key, "value")
	}
	nobody := "127.0.0.1:" + serverPort()
	replica := c.replica(t, c.masters(t)[0])
	for name, url := range map[string]string{
		"a replica":               "redis://" + replica.addr,
		"a name":                  "redis://localhost:" + c.nodes[0].port,
		"several":                 "redis://" + c.nodes[0].addr + "," + c.nodes[1].addr,
		"several with a database": "redis://" + c.nodes[0].addr + "," + c.nodes[1].addr + "/0",
		"the first is down":       "redis://" + nobody + "," + c.nodes[1].addr,
		"two of three are down":   "redis://" + nobody + ",127.0.0.1:" + serverPort() + "," + c.nodes[1].addr,
		"one in brackets, down":   "redis://[::1]:" + serverPort() + "," + c.nodes[2].addr,
		"the last is down":        "redis://" + c.nodes[0].addr + "," + nobody,
	} {
		t.Run(name, func(t *testing.T) {
			p := startURL(t, url, "--cache-timeout", "1ms")
			for range 2 {
				for _, key := range keys {
					if got := p.ask(t, key); got != bulk("value") {
						t.Fatalf("%s: GET %s: got %q; want its value\nlog:\n%s", url, key, got, p.log)
					}
				}
			}
		})
	}
	p := startURL(t, "redis://"+c.nodes[0].addr+"/1")
	if got := p.ask(t, keys[0]); got != "-ERR upstream refused: ERR SELECT is not allowed in cluster mode\r\n" {
		t.Errorf("database 1: got %q; want it refused", got)
	}
	for _, url := range []string{"redis://:s3cret@h:1,", "redis://:s3cret@h:1,,h:2", "redis://:s3cret@h:x,h:2",
		"redis://:s3cret@h:1,[::1", "redis://:s3cret@h:1,h:2/x", "redis-sentinel://:s3cret@h:1,h:2",
		"redis-sentinel://:s3cret@h/name/x", "redis-sentinel://h/name?sentinel_password=s3cret%zz"} {
		if _, err := parseConfig([]string{"--redis-url", url}, nil); err == nil {
			t.Errorf("%s is accepted", url)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error shows the password: %v", url, err)
		}
	}
}

// The least rights that will do.
func testClusterRights(t *testing.T, c *testCluster) {
	plain := []any{"reset", "on", ">s3cret", "~*", "+get", "+cluster|slots", "+asking"}
	tracker := append(slices.Clone(plain), "+client|id", "+client|tracking", "+subscribe", "+ping",
		"&__redis__:invalidate")
	for _, n := range c.nodes {
		n.do(t, "ACL", append([]any{"SETUSER", "plain"}, plain...)...)
		n.do(t, "ACL", append([]any{"SETUSER", "tracker"}, tracker...)...)
	}
	client := c.client(t)
	for i := range 10 {
		client.do(t, "SET", fmt.Sprint("{rights}", i), i)
	}
	from := c.owner(t, keySlot("{rights}"))
	finish := c.moveHalf(t, keySlot("{rights}"), c.another(t, from))
	for user, flags := range map[string][]string{"plain": nil, "tracker": {"--tracking"}} {
		p := startURL(t, "redis://"+user+":s3cret@"+c.nodes[0].addr, flags...)
		for i := range 10 {
			if got := p.ask(t, fmt.Sprint("{rights}", i)); got != bulk(fmt.Sprint(i)) {
				t.Errorf("user %s: GET {rights}%d: got %q; want %d\nlog:\n%s", user, i, got, i, p.log)
			}
		}
		if flags != nil {
			eventually(t, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
		}
		if log := p.log.String(); strings.Contains(log, "NOPERM") || strings.Contains(log, "s3cret") {
			t.Errorf("user %s: a right is missing, or the log shows the password:\n%s", user, log)
		}
	}
	finish(t)
	c.agree(t)
}

// Every master's changes are known, also those that it could not report as its tracker had gone.
func testClusterTracking(t *testing.T, c *testCluster) {
	p := startAt(t, c.nodes[0].addr, "--tracking", "--cache-timeout", "1h")
	c.coherent(t, p)
	client := c.client(t)
	for master, keys := range c.keysOf(t, "unreported", 1) {
		key := keys[0]
		client.do(t, "SET", key, "old")
		within(t, atRest, "the old value is cached", func() bool { return p.ask(t, key) == bulk("old") })
		client.queue(t, master, "CLIENT", "KILL", "TYPE", "pubsub")
		client.queue(t, master, "SET", key, "new")
		client.flush(t)
		within(t, 2*time.Second, "a change while "+master.addr+" had no tracker is known",
			func() bool { return p.ask(t, key) == bulk("new") })
	}
	c.coherent(t, p)
}

// Slots move to and fro under load: not one error, and nothing wrong or old.
func testClusterSlotsMoved(t *testing.T, c *testCluster) {
	plain, stale, tracking := threeProxies(t, c)
	groups := c.keysOf(t, "moved", 20)
	l := c.load(t, groups, plain, stale, tracking)
	l.more(100)
	from := c.masters(t)[0]
	to := c.another(t, from)
	for range soak(1, 20) {
		for _, target := range []*testNode{to, from} {
			for _, key := range groups[from] {
				c.move(t, keySlot(key), target)
			}
			c.agree(t)
			l.more(50)
			l.quiet()
		}
	}
	l.finish(nil)
	for _, r := range l.readers {
		if got := r.p.figure(t, "upstream_redirects"); got == 0 {
			t.Errorf("%s: upstream_redirects: got 0; want some", r.name)
		}
	}
	c.coherent(t, tracking.p)
}

// A slot is held half moved, to a master that owns nothing yet and that nobody hears of but by ASK.
func testClusterSlotHalfMoved(t *testing.T, c *testCluster) {
	joiner := c.nodes[len(c.nodes)-1]
	plain, stale, tracking := threeProxies(t, c)
	client := c.client(t)
	keys, written := make([]string, 20), make([]string, 20)
	for i := range keys {
		keys[i], written[i] = fmt.Sprint("{half}", i), fmt.Sprint("{half}written", i)
		client.do(t, "SET", keys[i], "x")
		client.do(t, "SET", written[i], "old")
	}
	slot := keySlot("{half}")
	from := c.owner(t, slot)
	l := c.load(t, map[*testNode][]string{from: keys}, plain, stale, tracking)
	l.more(50)
	finish := c.moveHalf(t, slot, joiner)
	l.more(200)
	l.quiet()
	for _, key := range written {
		if got := tracking.p.ask(t, key); got != bulk("old") {
			t.Errorf("GET %s: got %q; want the old value", key, got)
		}
	}
	// Writes to either node are reported.
	for i, key := range written {
		want := fmt.Sprint("new ", i)
		client.do(t, "SET", key, want)
		within(t, atRest, "the proxy knows of a write to "+key,
			func() bool { return tracking.p.ask(t, key) == bulk(want) })
	}
	// Known to nobody: created at the target.
	for key, want := range map[string]string{"{half}new": "new", "{half}absent": ""} {
		if reply := "$-1\r\n"; want != "" {
			client.do(t, "SET", key, want)
			if got := plain.p.ask(t, key); got != bulk(want) {
				t.Errorf("GET %s: got %q; want its value", key, got)
			}
		} else if got := plain.p.ask(t, key); got != reply {
			t.Errorf("GET %s: got %q; want none", key, got)
		}
	}
	finish(t)
	c.agree(t)
	l.more(50)
	l.quiet()
	eventually(t, "the new master is one of the nodes", func() bool { return plain.p.stat(t, "upstream_nodes") == "4" })
	c.coherent(t, tracking.p)
	c.move(t, slot, from)
	c.agree(t)
	l.more(50)
	l.quiet()
	l.finish(nil)
	if got := plain.p.figure(t, "upstream_redirects"); got < 20 {
		t.Errorf("upstream_redirects: got %d; want one for each GET of a key that had moved", got)
	}
}

// A failover by hand is seen by nobody.
func testClusterFailoverByHand(t *testing.T, c *testCluster) {
	plain, stale, tracking := threeProxies(t, c)
	l := c.load(t, c.keysOf(t, "hand", 10), plain, stale, tracking)
	l.more(100)
	for range soak(2, 20) {
		victim := c.masters(t)[0]
		c.failover(t, c.replica(t, victim))
		l.more(100)
		l.quiet()
		c.heal(t)
	}
	l.finish(nil)
	c.coherent(t, tracking.p)
}

// An outage is what happens to a master, and how long it may be felt.
type outage struct {
	begin    func(*testNode)
	coverage string        // cluster-require-full-coverage
	timeout  string        // --redis-timeout
	grace    time.Duration // for errors, after all nodes agree
}

// Without full coverage only the victim's slots are disturbed. With it, all nodes refuse all slots
// for a while, and a client that waits long enough for that sees nothing of it.
func testClusterMasterKilled(t *testing.T, c *testCluster) {
	c.suffer(t, outage{(*testNode).kill, "yes", "8s", afterKill})
	if soak(0, 1) == 1 {
		c.heal(t)
		c.suffer(t, outage{(*testNode).kill, "no", "1s", afterKill})
	}
}

func testClusterMasterStopped(t *testing.T, c *testCluster) {
	c.suffer(t, outage{(*testNode).stop, "no", "1s", afterStop})
	if soak(0, 1) == 1 {
		c.heal(t)
		c.suffer(t, outage{(*testNode).stop, "yes", "8s", afterStop})
	}
}

// suffer has a master suffer an outage under load, and come back.
func (c *testCluster) suffer(t *testing.T, o outage) {
	t.Helper()
	c.configure(t, "cluster-require-full-coverage", o.coverage)
	plain, stale, tracking := threeProxies(t, c, "--redis-timeout", o.timeout)
	groups := c.keysOf(t, "outage", 20)
	l := c.load(t, groups, plain, stale, tracking)
	calm := time.Now()
	l.more(300)
	steady := plain.p.stat(t, "upstream_nodes_down")
	refreshes := plain.p.figure(t, "upstream_refreshes")

	victim := c.masters(t)[0]
	over := l.disturb()
	began := time.Now()
	o.begin(victim)
	if !victim.stopped {
		within(t, 2*time.Second, "tracking is down as one master is",
			func() bool { return tracking.p.stat(t, "tracking") == "down" })
	}
	felt := !victim.stopped || o.timeout == "1s" // else another master answers before any request has failed
	if felt {
		down := func() bool { return plain.p.stat(t, "upstream_nodes_down") != steady }
		eventually(t, "upstream_nodes_down is not what it was", down)
	}
	agreed := c.agree(t)
	t.Logf("all nodes agree %v after the outage began", agreed.Sub(began))
	time.Sleep(time.Until(agreed.Add(o.grace / 2)))
	over()
	got, took := plain.p.figure(t, "upstream_refreshes")-refreshes, time.Since(began)
	if most := int(4*took.Seconds()) + 2; got > most || got == 0 {
		t.Errorf("%d refreshes in %v; want some, and at most %d", got, took, most)
	}
	l.more(100)
	l.quiet()
	within(t, o.grace, "upstream_nodes_down is what it was",
		func() bool { return plain.p.stat(t, "upstream_nodes_down") == steady })
	if log := plain.p.log.String(); !strings.Contains(log, victim.addr) || strings.Count(log, "\n") > 25 {
		t.Errorf("the log does not name %s, or has too much to say:\n%s", victim.addr, log)
	}
	c.coherent(t, tracking.p)

	over = l.disturb() // a write that waits in a stopped master is lost when it wakes
	victim.revive(t)
	c.heal(t)
	over()
	t.Logf("all is well %v after the outage began", time.Since(began))
	l.more(100)
	l.quiet()
	l.finish(func(r *loadReader, f failedRead) bool {
		owned := slices.Contains(groups[victim], f.key)
		outage := f.err == "ERR upstream unavailable" || f.err == "ERR upstream timed out" ||
			strings.HasPrefix(f.err, "CLUSTERDOWN ")
		return r != stale && owned && outage && f.ended.After(began) && f.ended.Before(agreed.Add(o.grace))
	})
	if len(plain.errors) > 0 {
		last := plain.errors[len(plain.errors)-1]
		t.Logf("errors from %v after the outage began to %v after all nodes agreed",
			plain.errors[0].ended.Sub(began), last.ended.Sub(agreed))
	} else if felt {
		t.Error("the outage was not felt at all; is the test one?")
	}
	if o.coverage == "no" {
		before, during := plain.latency(victim, calm, began), plain.latency(victim, began, agreed)
		t.Logf("p99 of other slots: %v before, %v during the outage", before, during)
		if limit := max(500*time.Millisecond, 2*before); during > limit {
			t.Errorf("p99 of other slots' misses in the outage: got %v; want less than %v (before: %v)", during, limit,
				before)
		}
	}
}

// Faults at random, under load, for minutes in the long form.
func testClusterAtRandom(t *testing.T, c *testCluster) {
	c.configure(t, "cluster-require-full-coverage", "no")
	plain, stale, tracking := threeProxies(t, c)
	plain.bound += 50 * time.Millisecond
	groups := c.keysOf(t, "random", 10)
	l := c.load(t, groups, plain, stale, tracking)
	var mu sync.Mutex
	var felt []interval // in which errors are excused
	outage := func(fault func(*testNode), victim *testNode, grace time.Duration) {
		over := l.disturb()
		began := time.Now()
		mu.Lock()
		felt = append(felt, interval{from: began})
		mu.Unlock()
		fault(victim)
		c.agree(t)
		time.Sleep(grace)
		over()
		mu.Lock()
		felt[len(felt)-1].to = time.Now()
		mu.Unlock()
	}
	short := []func(victim *testNode){
		func(victim *testNode) { // reshard
			to := c.another(t, victim)
			for _, key := range slices.Concat(slices.Collect(maps.Values(groups))...)[:10] {
				c.move(t, keySlot(key), to)
			}
		},
		func(victim *testNode) { c.failover(t, c.replica(t, victim)) },
		func(victim *testNode) { victim.cut(t, "normal") },
		func(victim *testNode) { victim.cut(t, "pubsub") },
	}
	long := append(slices.Clone(short),
		func(victim *testNode) { outage((*testNode).kill, victim, afterKill) },
		func(victim *testNode) { outage((*testNode).stop, victim, afterStop) },
		func(victim *testNode) { // shorter than what the others call a failure
			over := l.disturb()
			began := time.Now()
			victim.stop()
			time.Sleep(time.Duration(mrand.IntN(1200)) * time.Millisecond)
			victim.revive(t)
			mu.Lock()
			felt = append(felt, interval{from: began, to: time.Now().Add(time.Second)})
			mu.Unlock()
			time.Sleep(time.Second)
			over()
		},
		func(victim *testNode) { // one slot is held half moved
			for _, key := range slices.Concat(slices.Collect(maps.Values(groups))...) {
				if c.owner(t, keySlot(key)) == victim {
					finish := c.moveHalf(t, keySlot(key), c.another(t, victim))
					l.more(50)
					l.quiet()
					finish(t)
					return
				}
			}
		})
	faults := short
	if soak(0, 1) == 1 {
		faults = long
	}
	seed := uint64(time.Now().UnixNano())
	random := mrand.New(mrand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	for i := range soak(len(short), 60) {
		masters := c.masters(t)
		victim, fault := masters[random.IntN(len(masters))], i
		if i >= len(short) {
			fault = random.IntN(len(faults))
		}
		t.Logf("%s fault %d at %s", time.Now().Format("05.000"), fault, victim.addr)
		faults[fault](victim)
		l.more(50)
		over := func() {}
		if slices.ContainsFunc(c.nodes, func(n *testNode) bool { return n.down.Load() }) {
			over = l.disturb() // a write that waits in a stopped master is lost when it wakes
		}
		c.heal(t)
		over()
		l.more(20)
		l.quiet()
		if t.Failed() {
			break
		}
	}
	l.finish(func(r *loadReader, f failedRead) bool {
		in := slices.ContainsFunc(felt, func(i interval) bool { return f.ended.After(i.from) && f.ended.Before(i.to) })
		return r != stale && in && !strings.HasPrefix(f.err, "MOVED") && !strings.HasPrefix(f.err, "ASK")
	})
	c.coherent(t, tracking.p)
}

// leavingNode has a scripted node lose its slots, while a proxy has connections to it, and returns
// what checks, some time later, that none is left.
func leavingNode(t *testing.T) (check func(*testing.T)) {
	stays, leaves := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
	left := false
	slots := func() string {
		if left {
			return stays.owns()
		}
		return rows(row(0, 8191, bulk(stays.host), stays.port), row(8192, 16383, bulk(leaves.host), leaves.port))
	}
	var mu sync.Mutex // guards left
	for _, n := range []*scriptedNode{stays, leaves} {
		n.other = asTracked
		n.play(func() string { mu.Lock(); defer mu.Unlock(); return slots() }, func(_ int, key string, _ bool) string {
			mu.Lock()
			defer mu.Unlock()
			switch owner := keySlot(key) < 8192 || left; {
			case owner && n == leaves:
				return stays.moved(key)
			case !owner && n == stays:
				return leaves.moved(key)
			}
			return bulk("value")
		})
	}
	p := startAt(t, stays.addr, "--tracking", "--cache-timeout", "1ms")
	read := func(t *testing.T) {
		t.Helper()
		for i := range 20 {
			expectValue(t, "two nodes, of which one leaves", p, fmt.Sprint(i), bulk("value"))
		}
	}
	began := time.Now()
	t.Run("a node leaves", func(t *testing.T) {
		read(t)
		eventually(t, "both are tracked", func() bool {
			return p.stat(t, "tracking") == "live" && leaves.times("SUBSCRIBE") > 0
		})
		mu.Lock()
		left = true
		mu.Unlock()
		read(t)
	})
	return func(t *testing.T) {
		if t.Logf("%v later", time.Since(began)); leaves.times("GET") == 0 {
			return // it is known to have failed
		}
		within(t, 25*time.Second, "one node is left", func() bool { return p.stat(t, "upstream_nodes") == "1" })
		within(t, 5*time.Second, "no connection to the other is left", func() bool { return leaves.open() == 0 })
		read(t)
	}
}

// A sentinelGroup is a master and a replica that sentinels know by a name.
type sentinelGroup struct {
	name            string
	master, replica *redisServer
}

// startGroup starts a master and a replica of it.
func startGroup(t testing.TB, name string, args ...string) *sentinelGroup {
	t.Helper()
	start := func(more ...string) *redisServer {
		r, err := launchRedis(t.TempDir(), serverPort(),
			append(append([]string{"--repl-diskless-sync-delay", "0"}, more...), args...)...)
		if err != nil {
			t.Fatalf("starting redis-server: %v", err)
		}
		t.Cleanup(r.kill)
		return r
	}
	g := &sentinelGroup{name: name, master: start()}
	g.replica = start("--replicaof", "127.0.0.1 "+g.master.port)
	return g
}

// A testSentinels is some sentinels that know some groups.
type testSentinels struct {
	dir     string
	groups  []*sentinelGroup
	servers []*redisServer
}

// startSentinels starts n sentinels that watch groups, and know all replicas and each other.
func startSentinels(t testing.TB, n int, groups ...*sentinelGroup) *testSentinels {
	t.Helper()
	s := &testSentinels{dir: t.TempDir(), groups: groups}
	for range n {
		port := serverPort()
		s.servers = append(s.servers, &redisServer{addr: "127.0.0.1:" + port, port: port})
	}
	for i, server := range s.servers {
		conf := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\nsentinel myid %040d\n", server.port, s.dir, i+1)
		for _, g := range groups {
			conf += fmt.Sprintf("sentinel monitor %s 127.0.0.1 %s %d\n", g.name, g.master.port, n/2+1)
			conf += fmt.Sprintf("sentinel down-after-milliseconds %s 3000\nsentinel failover-timeout %s 10000\n",
				g.name, g.name)
			if g.replica != nil {
				conf += fmt.Sprintf("sentinel known-replica %s 127.0.0.1 %s\n", g.name, g.replica.port)
			}
			for j, other := range s.servers {
				if j != i {
					conf += fmt.Sprintf("sentinel known-sentinel %s 127.0.0.1 %s %040d\n", g.name, other.port, j+1)
				}
			}
		}
		if err := os.WriteFile(s.conf(i), []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		s.start(t, i)
		t.Cleanup(func() { s.servers[i].kill() })
	}
	for _, g := range groups {
		within(t, 15*time.Second, "all sentinels know the replica of "+g.name, func() bool {
			for i := range s.servers {
				if s.named(i, g.name) != g.master.addr || g.replica != nil && s.replicas(i, g.name) != 1 {
					return false
				}
			}
			return true
		})
	}
	return s
}

func (s *testSentinels) conf(i int) string {
	return filepath.Join(s.dir, fmt.Sprintf("sentinel-%d.conf", i))
}

// start starts a sentinel, again with what it has written into its configuration.
func (s *testSentinels) start(t testing.TB, i int) {
	t.Helper()
	server := s.servers[i]
	server.cmd = exec.Command("redis-server", s.conf(i), "--sentinel")
	if err := server.launch(); err != nil {
		t.Fatalf("starting a sentinel: %v", err)
	}
	within(t, 5*time.Second, "the sentinel listens", func() bool {
		c, err := net.Dial("tcp", server.addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// try sends a sentinel one command, and does not wait for long.
func (s *testSentinels) try(i int, cmd string, args ...any) (any, error) {
	return (&testNode{redisServer: s.servers[i]}).try(cmd, args...)
}

// named returns the address of the master that a sentinel names.
func (s *testSentinels) named(i int, name string) string {
	parts, _ := redis.Strings(s.try(i, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name))
	return strings.Join(parts, ":")
}

// replicas returns how many healthy replicas a sentinel knows.
func (s *testSentinels) replicas(i int, name string) (n int) {
	list, _ := redis.Values(s.try(i, "SENTINEL", "REPLICAS", name))
	for _, row := range list {
		fields, _ := redis.StringMap(row, nil)
		if fields["flags"] == "slave" && fields["master-link-status"] == "ok" {
			n++
		}
	}
	return n
}

// switched waits until all sentinels name the replica of a group as the master, and returns when
// they did.
func (s *testSentinels) switched(t testing.TB, g *sentinelGroup) time.Time {
	t.Helper()
	within(t, 20*time.Second, "all sentinels name the other master of "+g.name, func() bool {
		for i := range s.servers {
			if s.named(i, g.name) != g.replica.addr {
				return false
			}
		}
		return true
	})
	return time.Now()
}

// failover has sentinels fail over by hand.
func (s *testSentinels) failover(t testing.TB, g *sentinelGroup) {
	t.Helper()
	var err error
	eventually(t, "a sentinel begins to fail over", func() bool {
		_, err = s.try(0, "SENTINEL", "FAILOVER", g.name)
		return err == nil
	})
}

// url names the sentinels and a master.
func (s *testSentinels) url(name string) string {
	var hosts []string
	for _, server := range s.servers {
		hosts = append(hosts, server.addr)
	}
	return "redis-sentinel://" + strings.Join(hosts, ",") + "/" + name
}

// A watcher reads one key through a proxy all the time.
type watcher struct {
	name string
	p    *testProxy

	mu   sync.Mutex // guards the following
	seen []seenReply
}

type seenReply struct {
	began, ended time.Time
	reply        string
}

// watch reads a key through a proxy until the test ends, or the returned function is called.
func watch(t testing.TB, name string, p *testProxy, key string) (w *watcher, stop func()) {
	t.Helper()
	w = &watcher{name: name, p: p}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		var conn redis.Conn
		for ; ctx.Err() == nil; time.Sleep(2 * time.Millisecond) {
			if conn == nil || conn.Err() != nil {
				var err error
				if conn, err = redis.Dial("tcp", p.addr, redis.DialReadTimeout(10*time.Second)); err != nil {
					t.Errorf("%s: dialling the proxy: %v", name, err)
					return
				}
			}
			began := time.Now()
			reply, err := redis.String(conn.Do("GET", key))
			if err != nil {
				reply = err.Error()
			}
			w.mu.Lock()
			w.seen = append(w.seen, seenReply{began, time.Now(), reply})
			w.mu.Unlock()
		}
		if conn != nil {
			conn.Close()
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return w, stop
}

// only checks that all replies to GETs sent after a moment are this one.
func (w *watcher) only(t testing.TB, since time.Time, want, why string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	bad, first, answers := 0, seenReply{}, 0
	for _, s := range w.seen {
		if s.began.Before(since) {
			continue
		}
		if answers++; s.reply != want {
			if bad++; bad == 1 {
				first = s
			}
		}
	}
	if bad > 0 {
		t.Errorf("%s: %s: %d of %d answers are wrong, the first %v after: got %q; want %q\nlog:\n%s", w.name, why, bad,
			answers, first.began.Sub(since).Round(time.Millisecond), first.reply, want, w.p.log)
	} else if answers == 0 {
		t.Errorf("%s: %s: no answer at all", w.name, why)
	}
}

// TestIntegrationSentinel has three sentinels, with a master and a replica for each subject.
func TestIntegrationSentinel(t *testing.T) {
	t.Parallel()
	killed, stopped := startGroup(t, "killed"), startGroup(t, "stopped")
	byHand, calm := startGroup(t, "by-hand"), startGroup(t, "calm")
	s := startSentinels(t, 3, killed, stopped, byHand, calm)
	t.Run("masters", func(t *testing.T) {
		// All at once, and looked at in the order in which the sentinels switch.
		subjects := []*sentinelSwitch{
			{group: byHand, fail: func() { s.failover(t, byHand) }, after: func() {}},
			// Started again, it says that it is a master until a sentinel has it follow the other.
			{group: killed, fail: killed.master.kill, after: func() { restart(nil, killed.master) }},
			{group: stopped, fail: func() { stopped.master.signal(syscall.SIGSTOP) },
				after: func() { stopped.master.signal(syscall.SIGCONT) }},
		}
		for _, step := range []func(*sentinelSwitch, *testing.T, *testSentinels){
			(*sentinelSwitch).prepare,
			func(x *sentinelSwitch, _ *testing.T, _ *testSentinels) { x.began = time.Now(); x.fail() },
			(*sentinelSwitch).switchOver,
			(*sentinelSwitch).check,
		} {
			for _, x := range subjects {
				step(x, t, s)
			}
		}
	})
	t.Run("addresses", func(t *testing.T) { testSentinelAddresses(t, s, calm) })
	t.Run("sentinels", func(t *testing.T) { testSentinelsAway(t, s, calm) })
}

// A sentinelSwitch has sentinels switch to the replica. Its values are read soon, and the old
// master's never again, though that answers on as a master for some seconds.
type sentinelSwitch struct {
	group           *sentinelGroup
	fail            func() // from which on the sentinels are to switch
	after           func() // what the old master does then
	began, switched time.Time
	watchers        []*watcher // of the plain, the stale and the tracking proxy
}

func (x *sentinelSwitch) prepare(t *testing.T, s *testSentinels) {
	g := x.group
	redisDo(t, g.master.addr, "SET", "k", "old")
	eventually(t, "the replica has the value", func() bool {
		val, _ := redis.String(redisDo(t, g.replica.addr, "GET", "k"), nil)
		return val == "old"
	})
	for name, flags := range map[string][]string{
		"plain":    {"--cache-timeout", "1ms"},
		"stale":    {"--cache-timeout", "1ms", "--stale-timeout", "1m"},
		"tracking": {"--tracking", "--cache-timeout", "1h"},
	} {
		p := startURL(t, s.url(g.name), flags...)
		if got := p.ask(t, "k"); got != bulk("old") {
			t.Fatalf("%s, %s: before: got %q; want the value\nlog:\n%s", g.name, name, got, p.log)
		}
		if name == "tracking" {
			eventually(t, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
		}
		w, _ := watch(t, name, p, "k")
		x.watchers = append(x.watchers, w)
	}
}

func (x *sentinelSwitch) switchOver(t *testing.T, s *testSentinels) {
	g := x.group
	x.switched = s.switched(t, g)
	redisDo(t, g.replica.addr, "SET", "k", "new")
	x.after()
	t.Logf("%s: switched %v after it began", g.name, x.switched.Sub(x.began))
	old := &testNode{redisServer: g.master}
	eventually(t, "the old master answers again", func() bool { _, err := old.try("PING"); return err == nil })
	if role, _ := redis.Values(old.try("ROLE")); len(role) > 0 && fmt.Sprintf("%s", role[0]) == "master" {
		old.try("SET", "k", "of the old master")
		t.Logf("%s: the old master says that it is one", g.name)
	}
}

func (x *sentinelSwitch) check(t *testing.T, s *testSentinels) {
	g := x.group
	time.Sleep(time.Until(x.switched.Add(afterSwitch + 2*time.Second)))
	for _, w := range x.watchers {
		w.name = g.name + ", " + w.name
		w.only(t, x.switched.Add(afterSwitch), "new", "after the switch")
		w.mu.Lock()
		seen := slices.Clone(w.seen)
		w.mu.Unlock()
		first := slices.IndexFunc(seen, func(s seenReply) bool { return s.reply == "new" })
		if first >= 0 {
			t.Logf("%s: the new value is read %v after the switch", w.name, seen[first].ended.Sub(x.switched))
		}
		for _, reply := range seen {
			if strings.HasSuffix(w.name, "stale") && strings.HasPrefix(reply.reply, "ERR") {
				t.Errorf("%s: %v after it began: got %q; want a value that was seen before", w.name,
					reply.ended.Sub(x.began), reply.reply)
				break
			}
		}
	}
	for _, w := range x.watchers {
		if strings.HasSuffix(w.name, "tracking") { // coherent with the new one
			within(t, 5*time.Second, "tracking is live again", func() bool { return w.p.stat(t, "tracking") == "live" })
			for n := range 20 {
				want := fmt.Sprint("newer ", n)
				redisDo(t, g.replica.addr, "SET", "k", want)
				within(t, atRest, "a write to the new master is known",
					func() bool { return w.p.ask(t, "k") == bulk(want) })
			}
		}
		if got := w.p.stat(t, "upstream_nodes"); got != "1" {
			t.Errorf("%s: upstream_nodes: got %s; want the new master only", w.name, got)
		}
		if log := w.p.log.String(); !strings.Contains(log, g.replica.addr) {
			t.Errorf("%s: the log does not name the new master, %s:\n%s", w.name, g.replica.addr, log)
		}
	}
}

// All ways to write an address, the sentinels' own passwords, and names that nobody knows.
func testSentinelAddresses(t *testing.T, s *testSentinels, g *sentinelGroup) {
	redisDo(t, g.master.addr, "SET", "k", "value")
	in3, err := redis.Dial("tcp", g.master.addr, redis.DialDatabase(3))
	if err != nil {
		t.Fatal(err)
	}
	defer in3.Close()
	in3.Do("SET", "k", "value in 3")
	hosts := strings.TrimSuffix(strings.TrimPrefix(s.url(""), "redis-sentinel://"), "/")
	nobody := "127.0.0.1:" + serverPort()
	for url, want := range map[string]string{
		"redis-sentinel://" + hosts + "/calm":                            "value",
		"redis-sentinel://" + hosts + "/calm/0":                          "value",
		"redis-sentinel://" + hosts + "/calm/3":                          "value in 3",
		"redis+sentinel://" + hosts + "/calm/3":                          "value in 3",
		"redis-sentinel://" + hosts + "/3#calm":                          "value in 3",
		"redis-sentinel://" + hosts + "#calm":                            "value",
		"redis-sentinel://" + nobody + "," + hosts + "/calm":             "value",
		"redis-sentinel://localhost:" + s.servers[2].port + "/calm":      "value",
		"redis-sentinel://[::1]:" + serverPort() + "," + hosts + "/calm": "value",
	} {
		if p := startURL(t, url); p.ask(t, "k") != bulk(want) {
			t.Errorf("%s: got %q; want %q\nlog:\n%s", url, p.ask(t, "k"), bulk(want), p.log)
		}
	}
	p := startURL(t, s.url("unheard-of"))
	if got := p.ask(t, "k"); got != "-ERR upstream unavailable\r\n" {
		t.Errorf("a master that nobody knows: got %q", got)
	}
	eventually(t, "the name that nobody knows in the log",
		func() bool { return strings.Contains(p.log.String(), "unheard-of") })
	if got := p.ask(t, "k"); got != "-ERR upstream unavailable\r\n" {
		t.Errorf("a master that nobody knows, again: got %q", got)
	}

	// Redis and the sentinel have passwords of their own, and give the least rights that will do.
	secret := &sentinelGroup{name: "secret"}
	if secret.master, err = launchRedis(t.TempDir(), serverPort()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(secret.master.kill)
	redisDo(t, secret.master.addr, "SET", "k", "value")
	redisDo(t, secret.master.addr, "ACL", "SETUSER", "reader", "on", ">s3cret", "~*", "+get", "+role")
	guarded := startSentinels(t, 1, secret)
	guarded.try(0, "ACL", "SETUSER", "asker", "on", ">h1dden", "+sentinel|get-master-addr-by-name")
	if _, err := guarded.try(0, "ACL", "SETUSER", "default", "resetpass", ">other"); err != nil {
		t.Fatal(err)
	}
	base := strings.Replace(guarded.url("secret"), "://", "://reader:s3cret@", 1)
	for _, row := range []struct{ query, want string }{
		{"?sentinel_username=asker&sentinel_password=h1dden", bulk("value")},
		{"?sentinel_password=other", bulk("value")},
		{"?sentinel_password=h1dden", ""},
		{"", ""},
	} {
		p := startURL(t, base+row.query)
		switch got := p.ask(t, "k"); {
		case row.want != "" && got != row.want:
			t.Errorf("%s: got %q; want %q\nlog:\n%s", row.query, got, row.want, p.log)
		case row.want == "" && !strings.HasPrefix(got, "-ERR upstream "):
			t.Errorf("%s: got %q; want an error of the proxy", row.query, got)
		}
		if log := p.log.String(); strings.Contains(log, "s3cret") || strings.Contains(log, "h1dden") {
			t.Errorf("%s: the log shows a password:\n%s", row.query, log)
		}
	}
}

// Sentinels come and go; as long as the master is well, nobody notices.
func testSentinelsAway(t *testing.T, s *testSentinels, g *sentinelGroup) {
	redisDo(t, g.master.addr, "SET", "k", "value")
	plain := startURL(t, s.url(g.name), "--cache-timeout", "1ms")
	if got := plain.ask(t, "k"); got != bulk("value") {
		t.Fatalf("before: got %q; want the value\nlog:\n%s", got, plain.log)
	}
	w, _ := watch(t, "plain", plain, "k")
	began := time.Now()
	for i := range s.servers { // one by one
		s.servers[i].kill()
		time.Sleep(300 * time.Millisecond)
		s.start(t, i)
	}
	w.only(t, began, "value", "sentinels restarted one by one")
	began = time.Now()
	for i := range s.servers { // all at once
		s.servers[i].kill()
	}
	time.Sleep(1500 * time.Millisecond)
	redisDo(t, g.master.addr, "CLIENT", "KILL", "TYPE", "normal") // new connections are made
	time.Sleep(500 * time.Millisecond)
	w.only(t, began, "value", "all sentinels away")
	late := startURL(t, s.url(g.name))
	if got := late.ask(t, "k"); got != "-ERR upstream unavailable\r\n" {
		t.Errorf("no sentinel at the start: got %q", got)
	}
	if log := late.log.String(); !strings.Contains(log, "sentinel") {
		t.Errorf("no sentinel at the start: the log does not say so:\n%s", log)
	}
	for i := range s.servers {
		s.start(t, i)
	}
	within(t, 3*time.Second, "the master is read, as sentinels are back",
		func() bool { return late.ask(t, "k") == bulk("value") })
	w.only(t, began, "value", "all sentinels away, and back")
}

// A scriptedNode is a server that plays a node of a cluster, a sentinel or a Redis by functions.
type scriptedNode struct {
	host, port, addr string
	slots            func() string                                 // answers CLUSTER SLOTS
	get              func(conn int, key string, asked bool) string // asked: ASKING came just before
	other            func(args []string) string                    // answers everything else

	mu       sync.Mutex // guards the following
	l        net.Listener
	conns    []net.Conn
	closed   int
	asking   map[int]bool
	commands map[string]int // and how often they came
	serving  sync.WaitGroup
}

// scriptedAt listens; nothing is answered before play.
func scriptedAt(t testing.TB, host string) *scriptedNode {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	n := &scriptedNode{host: host, port: port, addr: l.Addr().String(), l: l, asking: make(map[int]bool),
		commands: make(map[string]int)}
	t.Cleanup(func() {
		l.Close()
		n.mu.Lock()
		for _, c := range n.conns {
			c.Close()
		}
		n.mu.Unlock()
		n.serving.Wait()
	})
	return n
}

// scripts returns n scripted nodes.
func scripts(t testing.TB, n int) (nodes []*scriptedNode) {
	t.Helper()
	for range n {
		nodes = append(nodes, scriptedAt(t, "127.0.0.1"))
	}
	return nodes
}

// play begins to answer.
func (n *scriptedNode) play(slots func() string, get func(conn int, key string, asked bool) string) {
	n.slots, n.get = slots, get
	n.serving.Go(func() { // ends when the listener is closed
		for {
			c, err := n.l.Accept()
			if err != nil {
				return
			}
			n.mu.Lock()
			n.conns = append(n.conns, c)
			id := len(n.conns)
			n.mu.Unlock()
			n.serving.Go(func() {
				playConn(c, func(args []string) string { return n.reply(id, args) })
				n.mu.Lock()
				n.closed++
				n.mu.Unlock()
			})
		}
	})
}

func (n *scriptedNode) reply(conn int, args []string) string {
	cmd := strings.ToUpper(args[0])
	if cmd == "CLUSTER" || cmd == "SENTINEL" || cmd == "CLIENT" {
		cmd += " " + strings.ToUpper(args[1])
	}
	n.mu.Lock()
	n.commands[cmd]++
	asked := n.asking[conn]
	n.asking[conn] = cmd == "ASKING"
	n.mu.Unlock()
	switch {
	case cmd == "ASKING":
		return "+OK\r\n"
	case cmd == "GET" && n.get != nil:
		return n.get(conn, args[1], asked)
	case cmd == "CLUSTER SLOTS" && n.slots != nil:
		return n.slots()
	case n.other != nil:
		return n.other(args)
	case cmd == "PING":
		return "+PONG\r\n"
	}
	return "-ERR unknown command\r\n"
}

// open returns how many connections are.
func (n *scriptedNode) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns) - n.closed
}

// asTracked answers what a tracker sends.
func asTracked(args []string) string {
	switch strings.ToUpper(args[0]) {
	case "CLIENT":
		if strings.ToUpper(args[1]) == "ID" {
			return ":1\r\n"
		}
	case "SUBSCRIBE":
		return "*3\r\n" + bulk("subscribe") + bulk(args[1]) + ":1\r\n"
	case "PING":
		return "*2\r\n" + bulk("pong") + bulk("")
	}
	return "+OK\r\n"
}

// times returns how often a command came.
func (n *scriptedNode) times(cmd string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.commands[cmd]
}

// moved and ask are redirections.
func (n *scriptedNode) moved(key string) string {
	return fmt.Sprintf("-MOVED %d %s:%s\r\n", keySlot(key), n.host, n.port)
}
func (n *scriptedNode) ask(key string) string {
	return fmt.Sprintf("-ASK %d %s:%s\r\n", keySlot(key), n.host, n.port)
}

// row is one of CLUSTER SLOTS, with the host as it is on the wire.
func row(from, to int, host, port string) string {
	return fmt.Sprintf("*3\r\n:%d\r\n:%d\r\n*4\r\n%s:%s\r\n%s*0\r\n", from, to, host, port,
		bulk(strings.Repeat("a", 40)))
}

func rows(rows ...string) string { return fmt.Sprintf("*%d\r\n", len(rows)) + strings.Join(rows, "") }

// owns is a CLUSTER SLOTS that gives all slots to a node.
func (n *scriptedNode) owns() string { return rows(row(0, 16383, bulk(n.host), n.port)) }

const (
	emptySlots = "*0\r\n"
	nilHost    = "$-1\r\n"
	timedOut   = "-ERR upstream timed out\r\n"
)

func always(s string) func() string { return func() string { return s } }

func always3(s string) func(int, string, bool) string {
	return func(int, string, bool) string { return s }
}

// timed returns an answer and how long it took.
func (p *testProxy) timed(t testing.TB, key string) (string, time.Duration) {
	t.Helper()
	began := time.Now()
	got := p.ask(t, key)
	return got, time.Since(began)
}

func expectValue(t testing.TB, what string, p *testProxy, key, want string) {
	t.Helper()
	if got, took := p.timed(t, key); got != want {
		t.Fatalf("%s: GET %s: got %q after %v; want %q\nlog:\n%.1500s", what, key, got, took, want, p.log)
	}
}

// What real clusters do seldom, and not when they are asked to.
func TestIntegrationClusterScripted(t *testing.T) {
	t.Parallel()
	value := bulk("value")
	t.Run("two nodes name each other for a while", func(t *testing.T) {
		t.Parallel()
		a, b := scripts(t, 2)[0], scriptedAt(t, "127.0.0.1")
		began := time.Now()
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string {
			if time.Since(began) < 300*time.Millisecond {
				return a.moved(key)
			}
			return value
		})
		expectValue(t, "MOVED to and fro for 300ms", startAt(t, a.addr), "k", value)
	})
	t.Run("two nodes name each other for ever", func(t *testing.T) {
		t.Parallel()
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string { return a.moved(key) })
		p := startAt(t, a.addr, "--redis-timeout", "1s")
		got, took := p.timed(t, "k")
		if got != timedOut || took < 500*time.Millisecond || took > 4*time.Second {
			t.Errorf("got %q after %v; want %q after about 1s", got, took, timedOut)
		}
		gets, slots := a.times("GET")+b.times("GET"), a.times("CLUSTER SLOTS")+b.times("CLUSTER SLOTS")
		if most := int(4*took.Seconds()) + 2; gets > 30 || slots > most {
			t.Errorf("%d GETs and %d CLUSTER SLOTS in %v; want at most 30 and %d", gets, slots, took, most)
		}
	})
	t.Run("two nodes ask each other for ever", func(t *testing.T) {
		t.Parallel()
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string { return b.ask(key) })
		b.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string { return a.ask(key) })
		got, took := startAt(t, a.addr, "--redis-timeout", "1s").timed(t, "k")
		if gets := a.times("GET") + b.times("GET"); got != timedOut || took > 4*time.Second || gets > 30 {
			t.Errorf("got %q after %v and %d GETs; want %q after about 1s and at most 30 GETs", got, took, gets,
				timedOut)
		}
	})
	t.Run("a node names itself on its old connections", func(t *testing.T) {
		a := scriptedAt(t, "127.0.0.1")
		a.play(func() string { return a.owns() }, func(conn int, key string, _ bool) string {
			if conn == 1 {
				return a.moved(key)
			}
			return value
		})
		expectValue(t, "MOVED to itself", startAt(t, a.addr), "k", value)
	})
	t.Run("addresses", testScriptedAddresses)
	t.Run("tables", testScriptedTables)
	t.Run("an owner is cut off from the others", func(t *testing.T) {
		t.Parallel()
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return a.owns() }, always3("-CLUSTERDOWN The cluster is down\r\n"))
		b.play(func() string { return b.owns() }, always3(value))
		p := startURL(t, "redis://"+a.addr+","+b.addr, "--redis-timeout", "1s")
		eventually(t, "the others are asked", func() bool { return p.ask(t, "k") == value })
	})
	t.Run("an unknown node is to be asked", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string { return b.ask(key) })
		b.play(func() string { return a.owns() }, func(_ int, key string, asked bool) string {
			if !asked {
				return a.moved(key)
			}
			return bulk("value of " + key)
		})
		p := startAt(t, a.addr)
		var send, want string
		for i := range 50 {
			send += request("GET", fmt.Sprint(i))
			want += bulk(fmt.Sprint("value of ", i))
		}
		if got := exchange(t, p.addr, send); got != want {
			t.Errorf("got %.200q; want %.200q", got, want)
		}
		if a.times("GET") != 50 || b.times("GET") != 50 || b.times("ASKING") != 50 {
			t.Errorf("GETs at the owner: %d; GETs and ASKINGs at the target: %d, %d; want 50 each", a.times("GET"),
				b.times("GET"), b.times("ASKING"))
		}
		compare(t, "redirections", p.stat(t, "upstream_redirects"), "50")
	})
	t.Run("OK is no value", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return a.owns() }, func(_ int, key string, _ bool) string {
			if key == "ask" {
				return b.ask(key)
			}
			return bulk("value of " + key)
		})
		b.play(func() string { return a.owns() }, always3("+OK\r\n")) // beside the +OK to ASKING
		p := startAt(t, a.addr)
		got := exchange(t, p.addr, request("GET", "1")+request("GET", "ask")+request("GET", "2"))
		if want := bulk("value of 1") + "-ERR upstream unavailable\r\n" + bulk("value of 2"); got != want {
			t.Errorf("got %q; want %q", got, want)
		}
		expectValue(t, "afterwards", p, "3", bulk("value of 3"))
	})
	t.Run("a value is read before its node is tracked", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		gate, val := make(chan struct{}), atomic.Value{}
		open := sync.OnceFunc(func() { close(gate) })
		t.Cleanup(open)
		val.Store("old")
		a.other = asTracked
		b.other = func(args []string) string {
			if strings.ToUpper(args[0]) == "CLIENT" {
				<-gate
			}
			return asTracked(args)
		}
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(func() string { return b.owns() }, func(int, string, bool) string { return bulk(val.Load().(string)) })
		p := startAt(t, a.addr, "--tracking", "--cache-timeout", "1h")
		within(t, 2*time.Second, "the first node is tracked", func() bool { return a.times("SUBSCRIBE") > 0 })
		expectValue(t, "before it is tracked", p, "k", bulk("old"))
		within(t, 2*time.Second, "a tracker on its way to the node", func() bool { return b.times("CLIENT ID") > 0 })
		if got := p.stat(t, "tracking"); got != "down" {
			t.Errorf("tracking, while the only owner is not tracked: got %s; want down", got)
		}
		val.Store("new")
		open()
		within(t, 2*time.Second, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
		expectValue(t, "after it is tracked", p, "k", bulk("new"))
	})
	t.Run("a pipeline of all kinds of replies", testScriptedMixture)
	t.Run("the cluster is down for a while", func(t *testing.T) {
		t.Parallel()
		for _, reply := range []string{"-CLUSTERDOWN The cluster is down\r\n", "-CLUSTERDOWN Hash slot not served\r\n",
			"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"} {
			a := scriptedAt(t, "127.0.0.1")
			began := time.Now()
			a.play(func() string { return a.owns() }, func(int, string, bool) string {
				if time.Since(began) < 300*time.Millisecond {
					return reply
				}
				return value
			})
			expectValue(t, "for 300ms "+reply, startAt(t, a.addr), "k", value)
			if gets := a.times("GET"); gets > 30 {
				t.Errorf("%d GETs in 300ms; want at most 30", gets)
			}
		}
		a := scriptedAt(t, "127.0.0.1")
		a.play(always(emptySlots), always3("-CLUSTERDOWN Hash slot not served\r\n"))
		got, took := startAt(t, a.addr, "--redis-timeout", "1s").timed(t, "k")
		if got != timedOut && got != "-CLUSTERDOWN Hash slot not served\r\n" || took > 4*time.Second {
			t.Errorf("for ever: got %q after %v; want Redis' error or a time-out after about 1s", got, took)
		}
	})
	t.Run("a seed hangs", func(t *testing.T) {
		t.Parallel()
		hung, a := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1") // hung never accepts
		a.play(func() string { return a.owns() }, always3(value))
		p := startURL(t, "redis://"+hung.addr+","+a.addr)
		within(t, 3*time.Second, "the other one is found", func() bool { return p.ask(t, "first") == value })
		began := time.Now()
		for i := range 20 {
			expectValue(t, "once it is found", p, fmt.Sprint(i), value)
		}
		if took := time.Since(began); took > 10*askTimeout {
			t.Errorf("20 misses took %v", took)
		}
	})
	t.Run("a seed is loading", func(t *testing.T) {
		loading := "-LOADING Redis is loading the dataset in memory\r\n"
		for _, slots := range []string{loading, "its own"} {
			a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
			if slots == "its own" { // the table that it saved, from before a failover
				slots = a.owns()
			}
			var joined atomic.Bool
			a.play(always(slots), always3(loading))
			b.play(func() string {
				if joined.Load() {
					return b.owns()
				}
				return emptySlots
			}, always3(value))
			p := startURL(t, "redis://"+a.addr+","+b.addr)
			expectValue(t, "while nobody knows another", p, "k", loading)
			time.Sleep(time.Second) // the hints of the start are used up
			joined.Store(true)
			within(t, 2*time.Second, "the other one is found", func() bool { return p.ask(t, "k") == value })
		}
	})
	t.Run("a storm of MOVED", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		wrong := func() string { return rows(row(0, 16383, bulk(a.host), a.port)) }
		a.play(wrong, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(wrong, func(_ int, key string, _ bool) string { return bulk("value of " + key) })
		p := startAt(t, a.addr)
		began := time.Now()
		for i := 0; time.Since(began) < 1500*time.Millisecond && a.times("GET") < 10000; i++ {
			var send, want string
			for j := range 500 {
				send += request("GET", fmt.Sprint(i, ":", j))
				want += bulk(fmt.Sprint("value of ", i, ":", j))
			}
			if got := exchange(t, p.addr, send); got != want {
				t.Fatalf("got %.200q; want %.200q", got, want)
			}
		}
		refreshes := p.figure(t, "upstream_refreshes")
		slots := a.times("CLUSTER SLOTS") + b.times("CLUSTER SLOTS")
		took := time.Since(began)
		t.Logf("%d GETs were moved in %v, %d CLUSTER SLOTS", a.times("GET"), took, slots)
		if most := int(4*took.Seconds()) + 2; slots > most || slots == 0 {
			t.Errorf("%d CLUSTER SLOTS in %v; want some, and at most %d", slots, took, most)
		}
		if refreshes < slots/2 || refreshes > slots+1 { // one may have begun
			t.Errorf("upstream_refreshes: got %d; want about %d", refreshes, slots)
		}
		if lines := strings.Count(p.log.String(), "\n"); lines > 20 {
			t.Errorf("the log has %d lines:\n%.2000s", lines, p.log)
		}
	})
	t.Run("a node that hangs costs its own keys only", func(t *testing.T) {
		t.Parallel()
		a, hung := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1") // hung never accepts
		a.play(func() string {
			return rows(row(0, 8191, bulk(a.host), a.port), row(8192, 16383, bulk(hung.host), hung.port))
		}, func(_ int, key string, _ bool) string {
			if keySlot(key) > 8191 {
				return hung.moved(key)
			}
			return value
		})
		p := startAt(t, a.addr, "--client-limit", "2", "--redis-timeout", "4s")
		var here, there []string
		for i := 0; len(here) < 50 || len(there) < 30; i++ {
			if key := fmt.Sprint(i); keySlot(key) < 8192 {
				here = append(here, key)
			} else {
				there = append(there, key)
			}
		}
		var clients []*rawClient
		for _, key := range there[:30] {
			clients = append(clients, dial(t, p.addr).send(request("GET", key)))
			time.Sleep(5 * time.Millisecond) // batches of their own
		}
		began := time.Now()
		for _, key := range here[:50] {
			expectValue(t, "beside a node that hangs", p, key, value)
		}
		if took := time.Since(began); took > 3500*time.Millisecond {
			t.Errorf("50 misses at the other node took %v", took)
		}
		for _, c := range clients {
			c.expect(timedOut)
		}
	})
	t.Run("connections to each node", func(t *testing.T) {
		// A limit of one, and each node answers only when the others have been asked too.
		nodes := scripts(t, 3)
		var table []string
		for i, n := range nodes {
			table = append(table, row(i*5461, i*5461+5460+i/2, bulk(n.host), n.port))
		}
		var asked atomic.Int64
		all := make(chan struct{})
		for i, n := range nodes {
			n.play(always(rows(table...)), func(_ int, key string, _ bool) string {
				if at := min(keySlot(key)/5461, 2); at != i {
					return nodes[at].moved(key)
				}
				if strings.HasPrefix(key, "together") {
					if asked.Add(1) == 3 {
						close(all)
					}
					select {
					case <-all:
					case <-time.After(10 * time.Second):
					}
				}
				return value
			})
		}
		p := startAt(t, nodes[0].addr, "--client-limit", "1")
		var send string
		found := make([]bool, 3)
		for i := 0; !found[0] || !found[1] || !found[2]; i++ {
			key := fmt.Sprint("together", i)
			if at := min(keySlot(key)/5461, 2); !found[at] {
				found[at] = true
				expectValue(t, "warming up", p, fmt.Sprint("{", key, "}"), value)
				send += request("GET", key)
			}
		}
		if got := exchange(t, p.addr, send); got != value+value+value {
			t.Errorf("three nodes at once, a limit of one: got %q; want three values", got)
		}
	})
}

// Addresses in redirections that are not to be taken literally.
func testScriptedAddresses(t *testing.T) {
	value := bulk("value")
	t.Run("no host is the same host", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string {
			return fmt.Sprintf("-MOVED %d :%s\r\n", keySlot(key), b.port)
		})
		b.play(func() string { return b.owns() }, always3(value))
		expectValue(t, "MOVED without host", startAt(t, a.addr), "k", value)
	})
	t.Run("IPv6 without brackets", func(t *testing.T) {
		l, err := net.Listen("tcp", "[::1]:0")
		if err != nil {
			t.Skip("no IPv6, as by default in containers: ", err)
		}
		l.Close()
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "::1")
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(func() string { return b.owns() }, always3(value))
		p := startAt(t, a.addr)
		expectValue(t, "MOVED to ::1", p, "k", value)
		eventually(t, "the table is learnt", func() bool { return p.figure(t, "upstream_refreshes") > 0 })
		expectValue(t, "::1 in CLUSTER SLOTS", p, "k2", value)
		c := scriptedAt(t, "127.0.0.1")
		c.play(func() string { return c.owns() }, func(_ int, key string, _ bool) string { return b.ask(key) })
		expectValue(t, "ASK to ::1", startAt(t, c.addr), "k", value)
	})
	t.Run("names", func(t *testing.T) {
		a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
		b.host = "localhost"
		a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string { return b.moved(key) })
		b.play(func() string { return b.owns() }, always3(value))
		expectValue(t, "MOVED to localhost", startAt(t, a.addr), "k", value)
	})
	for _, host := range []string{"?", "no port"} {
		t.Run("unknown host "+host, func(t *testing.T) {
			a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
			var asked atomic.Int64
			a.play(func() string { return b.owns() }, func(_ int, key string, _ bool) string {
				asked.Add(1)
				if host == "?" {
					return fmt.Sprintf("-MOVED %d ?:%s\r\n", keySlot(key), b.port)
				}
				return fmt.Sprintf("-MOVED %d\r\n", keySlot(key))
			})
			b.play(func() string { return b.owns() }, always3(value))
			expectValue(t, "MOVED to nowhere, CLUSTER SLOTS knows better", startAt(t, a.addr), "k", value)
		})
	}
}

// Tables that are not to be taken literally.
func testScriptedTables(t *testing.T) {
	value := bulk("value")
	// Two nodes: the first moves what is not its own, to the second.
	for _, table := range []struct {
		name  string
		slots func(a, b *scriptedNode) string
	}{
		{"nil host", func(a, b *scriptedNode) string {
			return rows(row(0, 8191, nilHost, a.port), row(8192, 16383, bulk(b.host), b.port))
		}},
		{"empty host", func(a, b *scriptedNode) string {
			return rows(row(0, 8191, bulk(""), a.port), row(8192, 16383, bulk(b.host), b.port))
		}},
		{"port 0", func(a, b *scriptedNode) string {
			return rows(row(0, 8191, bulk(a.host), "0"), row(8192, 16383, bulk(b.host), b.port))
		}},
		{"nil host and port 0", func(a, b *scriptedNode) string {
			return rows(row(0, 8191, nilHost, "0"), row(8192, 16383, bulk(b.host), b.port))
		}},
		{"unknown host", func(a, b *scriptedNode) string {
			return rows(row(0, 8191, bulk(a.host), a.port), row(8192, 16383, bulk("?"), b.port))
		}},
		{"empty list", func(a, b *scriptedNode) string { return emptySlots }},
		{"a hole", func(a, b *scriptedNode) string { return rows(row(0, 8191, bulk(a.host), a.port)) }},
		{"an error", func(a, b *scriptedNode) string { return "-NOPERM this user has no permissions\r\n" }},
		{"no table", func(a, b *scriptedNode) string { return "+OK\r\n" }},
		{"no numbers", func(a, b *scriptedNode) string {
			return rows("*3\r\n+x\r\n$-1\r\n*0\r\n", "*0\r\n", ":1\r\n")
		}},
		{"slots out of range", func(a, b *scriptedNode) string {
			return rows(row(-5, 99999999, bulk(a.host), a.port), row(8192, 16383, bulk(b.host), b.port))
		}},
		{"a slot too many", func(a, b *scriptedNode) string { return rows(row(0, 16384, bulk(a.host), a.port)) }},
	} {
		t.Run(table.name, func(t *testing.T) {
			t.Parallel()
			a, b := scriptedAt(t, "127.0.0.1"), scriptedAt(t, "127.0.0.1")
			slots := func() string { return table.slots(a, b) }
			a.play(slots, func(_ int, key string, _ bool) string {
				if keySlot(key) > 8191 {
					return b.moved(key)
				}
				return value
			})
			b.play(func() string { return emptySlots }, func(_ int, key string, _ bool) string {
				if keySlot(key) < 8192 {
					return a.moved(key)
				}
				return value
			})
			p := startAt(t, a.addr)
			for i := range 20 {
				expectValue(t, "before the table is learnt", p, fmt.Sprint(i), value)
			}
			eventually(t, "the table is asked for",
				func() bool { return a.times("CLUSTER SLOTS")+b.times("CLUSTER SLOTS") > 0 })
			for i := range 40 {
				time.Sleep(time.Millisecond)
				expectValue(t, "after the table is learnt", p, fmt.Sprint("again", i), value)
			}
		})
	}
}

// A batch with values, keys that are absent, errors about keys, and keys that other nodes have is
// answered in order, each key as it is.
func testScriptedMixture(t *testing.T) {
	nodes := scripts(t, 3)
	a, b, c := nodes[0], nodes[1], nodes[2]
	slots := func() string { return a.owns() }
	own := func(key string) string {
		switch n, _ := strconv.Atoi(key); n % 8 {
		case 0:
			return "$-1\r\n"
		case 1:
			return "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
		case 2:
			return bulk("")
		case 3:
			return "-ERR of this key\r\n"
		}
		return bulk("value of " + key)
	}
	a.play(slots, func(_ int, key string, _ bool) string {
		switch n, _ := strconv.Atoi(key); n % 7 {
		case 0:
			return b.moved(key)
		case 1:
			return c.ask(key)
		case 2:
			return b.ask(key)
		case 3:
			return c.moved(key)
		}
		return own(key)
	})
	var once sync.Map // refused once each
	for _, n := range []*scriptedNode{b, c} {
		n.play(slots, func(_ int, key string, asked bool) string {
			i, _ := strconv.Atoi(key)
			wantAsked := i%7 == 1 || i%7 == 2
			if asked != wantAsked {
				return fmt.Sprintf("-ERR asked is %v\r\n", asked)
			}
			if _, again := once.LoadOrStore(key, true); !again && i%5 == 0 && !asked {
				return "-CLUSTERDOWN The cluster is down\r\n"
			}
			return own(key)
		})
	}
	p := startAt(t, a.addr, "--redis-timeout", "5s")
	var send, want string
	for i := range 256 {
		send += request("GET", fmt.Sprint(i))
		want += own(fmt.Sprint(i))
	}
	// A refused key goes to its owner by then, who may be the first again: a MOVED corrects that.
	if got := exchange(t, p.addr, send); got != want {
		t.Error(difference(got, want))
	}
}

// A single Redis is sent nothing but what it was always sent, whatever happens to it.
func TestIntegrationClusterSingleRedisIsSentNothingNew(t *testing.T) {
	a := scriptedAt(t, "127.0.0.1")
	var sick atomic.Value
	sick.Store("")
	a.other = asTracked
	a.play(nil, func(_ int, key string, _ bool) string {
		if s := sick.Load().(string); s != "" {
			return s
		}
		return bulk("value")
	})
	for name, start := range map[string]func() *testProxy{
		"host and port": func() *testProxy {
			return startAt(t, a.addr, "--tracking", "--cache-timeout", "1ms", "--redis-timeout", "100ms")
		},
		"URL": func() *testProxy {
			return startURL(t, "redis://user:s3cret@"+a.addr+"/0", "--cache-timeout", "1ms", "--redis-timeout", "100ms")
		},
	} {
		p := start()
		for _, s := range []string{"", hungUp, "", "-LOADING Redis is loading the dataset in memory\r\n", "$5\r\nab",
			"", "-NOAUTH Authentication required.\r\n", "-ERR max number of clients reached\r\n", "+OK\r\n", ""} {
			sick.Store(s)
			for i := range 3 {
				p.ask(t, fmt.Sprint(s, i))
			}
			if s == "" {
				eventually(t, name+": a value", func() bool { return p.ask(t, "2") == bulk("value") })
			}
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for cmd, n := range a.commands {
		if !slices.Contains([]string{"GET", "AUTH", "CLIENT ID", "CLIENT TRACKING", "SUBSCRIBE", "PING", "SELECT"},
			cmd) {
			t.Errorf("a single Redis was sent %d %s; want none", n, cmd)
		}
	}
	if a.commands["GET"] == 0 || a.commands["CLIENT TRACKING"] == 0 {
		t.Errorf("commands: %v; want GETs and CLIENT TRACKING", a.commands)
	}
}

// Sentinels that say what real ones say for a moment only.
func TestIntegrationSentinelScripted(t *testing.T) {
	t.Parallel()
	play := func(t *testing.T, role, val string) *scriptedNode {
		n := scriptedAt(t, "127.0.0.1")
		n.other = func(args []string) string {
			if strings.ToUpper(args[0]) == "ROLE" && role == "master" {
				return "*3\r\n" + bulk("master") + ":1\r\n*0\r\n"
			} else if strings.ToUpper(args[0]) == "ROLE" {
				return "*5\r\n" + bulk("slave") + bulk("127.0.0.1") + ":1\r\n" + bulk("connected") + ":1\r\n"
			}
			return "+PONG\r\n"
		}
		n.play(nil, always3(bulk(val)))
		return n
	}
	sentinel := func(t *testing.T, named func() string) *scriptedNode {
		n := scriptedAt(t, "127.0.0.1")
		n.other = func(args []string) string {
			if len(args) == 3 && strings.EqualFold(args[0]+" "+args[1], "SENTINEL get-master-addr-by-name") &&
				args[2] == "it" {
				return named()
			}
			return "-ERR unknown command\r\n"
		}
		n.play(nil, nil)
		return n
	}
	address := func(n *scriptedNode) string { return "*2\r\n" + bulk(n.host) + bulk(n.port) }
	t.Run("a replica is named for a while", func(t *testing.T) {
		t.Parallel()
		replica, master := play(t, "slave", "old"), play(t, "master", "value")
		began := time.Now()
		s := sentinel(t, func() string {
			if time.Since(began) < 700*time.Millisecond {
				return address(replica)
			}
			return address(master)
		})
		p := startURL(t, "redis-sentinel://"+s.addr+"/it")
		within(t, 4*time.Second, "the master is found", func() bool {
			got := p.ask(t, "k")
			if got == bulk("old") {
				t.Fatal("a replica was read")
			}
			return got == bulk("value")
		})
		if replica.times("ROLE") == 0 || replica.times("GET") > 0 {
			t.Errorf("the replica was asked for its role %d times, and read %d times; want never",
				replica.times("ROLE"), replica.times("GET"))
		}
	})
	t.Run("the first hangs", func(t *testing.T) {
		t.Parallel()
		hung, master := scriptedAt(t, "127.0.0.1"), play(t, "master", "value")
		s := sentinel(t, func() string { return address(master) })
		p := startURL(t, "redis-sentinel://"+hung.addr+","+s.addr+"/it", "--cache-timeout", "1ms")
		within(t, 3*time.Second, "the master is found", func() bool { return p.ask(t, "k") == bulk("value") })
		began := time.Now()
		for i := range 20 {
			expectValue(t, "once it is found", p, fmt.Sprint(i), bulk("value"))
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("20 misses took %v", took)
		}
	})
	t.Run("one knows the name and one does not", func(t *testing.T) {
		master := play(t, "master", "value")
		ignorant, s := sentinel(t, always("*-1\r\n")), sentinel(t, func() string { return address(master) })
		expectValue(t, "the second knows", startURL(t, "redis-sentinel://"+ignorant.addr+","+s.addr+"/it"), "k",
			bulk("value"))
	})
	t.Run("the first goes on naming a master that is gone", func(t *testing.T) {
		t.Parallel()
		master := play(t, "master", "value")
		lags := sentinel(t, always("*2\r\n"+bulk("127.0.0.1")+bulk(freePort())))
		s := sentinel(t, func() string { return address(master) })
		p := startURL(t, "redis-sentinel://"+lags.addr+","+s.addr+"/it")
		eventually(t, "the second is believed", func() bool { return p.ask(t, "k") == bulk("value") })
	})
	t.Run("asked every second, a former master is left at once", func(t *testing.T) {
		t.Parallel()
		old, fresh := play(t, "master", "old"), play(t, "master", "new")
		var now atomic.Pointer[scriptedNode]
		now.Store(old)
		s := sentinel(t, func() string { return address(now.Load()) })
		p := startURL(t, "redis-sentinel://"+s.addr+"/it", "--cache-timeout", "1ms")
		expectValue(t, "before", p, "k", bulk("old"))
		times := func() int { return s.times("SENTINEL GET-MASTER-ADDR-BY-NAME") }
		eventually(t, "the sentinel is asked again", func() bool { return times() > 1 })
		took := time.Hour // a machine under load may be late once or twice
		for tries := 0; tries < 5 && took > 2500*time.Millisecond; tries++ {
			began, asked := time.Now(), times()
			eventually(t, "the sentinel is asked twice more", func() bool { return times() >= asked+2 })
			took = time.Since(began)
		}
		if took < time.Second || took > 2500*time.Millisecond {
			t.Errorf("asked twice in %v; want once a second", took)
		}
		now.Store(fresh)
		within(t, afterSwitch, "the new master is read", func() bool { return p.ask(t, "k") == bulk("new") })
		for range 50 {
			expectValue(t, "afterwards", p, "k", bulk("new"))
		}
		for cmd := range old.commands {
			if cmd != "GET" && cmd != "ROLE" && cmd != "PING" {
				t.Errorf("the master was sent %s", cmd)
			}
		}
		eventually(t, "no connection to the old master is left",
			func() bool { return p.stat(t, "upstream_nodes") == "1" && old.open() == 0 })
		for _, n := range []*scriptedNode{old, fresh} {
			line := `"other nodes own the keys now" nodes=` + n.addr
			if got := strings.Count(p.log.String(), line); got != 1 {
				t.Errorf("%s in the log: got %d times; want 1:\n%s", line, got, p.log)
			}
		}
	})
}

// Behind a replica, tracking is as good as at the master: changes, expiry, and the replacement of
// all by a full resynchronisation, in each way that a replica can load it.
func TestIntegrationTrackingBehindAReplica(t *testing.T) {
	for _, load := range []string{"disabled", "on-empty-db", "swapdb"} {
		t.Run("repl-diskless-load "+load, func(t *testing.T) {
			t.Parallel()
			behindReplica(t, load)
		})
	}
}

func behindReplica(t *testing.T, load string) {
	delay := []string{"--repl-diskless-sync-delay", "0", "--client-output-buffer-limit", "replica 64kb 64kb 1"}
	g := startGroup(t, "any", append(delay, "--repl-diskless-load", load)...)
	other := startRedis(t, delay...)
	master, replica := &testNode{redisServer: g.master}, &testNode{redisServer: g.replica}
	marks := 0
	followed := func(m *redisServer) {
		t.Helper()
		eventually(t, "the replica follows "+m.addr, func() bool {
			state, _ := redis.String(replica.try("INFO", "replication"))
			if !strings.Contains(state, "master_link_status:up") || !strings.Contains(state, "master_port:"+m.port) {
				return false
			}
			marks++ // it may be said to follow up to a second before it hears anything
			redisDo(t, m.addr, "SET", "mark", marks)
			time.Sleep(20 * time.Millisecond)
			mark, _ := redis.Int(replica.try("GET", "mark"))
			return mark == marks
		})
	}
	followed(g.master)
	p := trackedProxy(t, replica.addr)
	c := &testCluster{nodes: []*testNode{master}} // the writer's way to one master
	client := c.client(t)
	var ds []time.Duration
	for range 10 { // a machine under load may be slow
		if ds = c.staleness(t, p, []string{"a", "b", "c"}); percentile(ds, 99) < soonStale {
			break
		}
	}
	t.Logf("stale after a write to the master: p50 %v, p99 %v, max %v", percentile(ds, 50), percentile(ds, 99),
		ds[len(ds)-1])
	if got := percentile(ds, 99); got >= soonStale {
		t.Errorf("stale after a write to the master: p99 %v; want less than %v", got, soonStale)
	}
	client.do(t, "SET", "expiring", "x")
	within(t, atRest, "the key is there", func() bool { return p.ask(t, "expiring") == bulk("x") })
	client.do(t, "PEXPIRE", "expiring", 200) // it is cached again meanwhile
	within(t, 10*time.Second, "the key expires", func() bool { return p.ask(t, "expiring") == "$-1\r\n" })

	// Two thousand keys; half of them change while the replica hears nothing, so long that only all
	// will do.
	check := func(generation string, gone int) {
		t.Helper()
		var send, want strings.Builder
		for i := range 2000 {
			send.WriteString(request("GET", fmt.Sprint("k", i)))
			switch {
			case i < gone:
				want.WriteString("$-1\r\n")
			case i%2 == 1 && generation == "second":
				want.WriteString(bulk(fmt.Sprint("first", i)))
			default:
				want.WriteString(bulk(fmt.Sprint(generation, i)))
			}
		}
		got, late := "", false
		for end := time.Now().Add(atRest); got != want.String(); time.Sleep(5 * time.Millisecond) {
			if late {
				t.Fatalf("the %s values: %v", generation, difference(got, want.String()))
			}
			late = time.Now().After(end)
			got = exchange(t, p.addr, send.String())
		}
	}
	set := func(addr, generation string, from, step int) {
		t.Helper()
		conn, err := redis.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for i := from; i < 2000; i += step {
			conn.Send("SET", fmt.Sprint("k", i), fmt.Sprint(generation, i))
		}
		if _, err := conn.Do(""); err != nil {
			t.Fatal(err)
		}
	}
	set(master.addr, "first", 0, 1)
	check("first", 0)
	syncs := c.sum(t, "stats", `sync_full:(\d+)`)
	replica.stop()
	set(master.addr, "second", 0, 2)
	for i := range 300 {
		client.do(t, "SET", "filler", strings.Repeat("x", 100<<10), "EX", 1+i)
	}
	replica.revive(t)
	eventually(t, "the replica is resynchronised in full",
		func() bool { return c.sum(t, "stats", `sync_full:(\d+)`) > syncs })
	followed(g.master)
	check("second", 0)

	// Another master, with other values, and without some keys.
	set(other.addr, "third", 100, 1)
	replica.do(t, "REPLICAOF", "127.0.0.1", other.port)
	followed(other)
	check("third", 100)
	eventually(t, "tracking is live", func() bool { return p.stat(t, "tracking") == "live" })
}

// Hostile clients, a hostile Redis and hostile conditions

// checkPeak watches the memory of a proxy until its peak stays what it is, and compares it with
// what is promised for a cache of so many bytes, and a tenth of that more.
func checkPeak(t testing.TB, info *rawClient, cacheBytes int64) {
	t.Helper()
	limit, most := (2*cacheBytes+64<<20)/10*11, int64(0)
	for quiet := 0; quiet < 25 && most <= limit; quiet++ {
		var now int64
		fmt.Sscan(infoField(t, info, "used_memory_rss"), &now)
		if now > most {
			most, quiet = now, 0
		}
		time.Sleep(20 * time.Millisecond)
	}
	if t.Logf("peak %d MB", most>>20); most > limit {
		t.Errorf("peak memory: got %d MB; want %d MB at most", most>>20, limit>>20)
	}
}

// deafProgram starts a program whose stderr is a pipe that is full, and returns the reading end.
func deafProgram(t testing.TB, redisAddr string) (cmd *exec.Cmd, addr string, stderr *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	w.Write(make([]byte, 1<<20))
	port := freePort()
	args := slices.Concat(patience, redisAt(t, redisAddr), []string{"--port", port, "--log-level", "debug"})
	cmd = program(t, nil, args...)
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	addr = "127.0.0.1:" + port
	eventually(t, "the program serves", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return cmd, addr, r
}

func TestIntegrationLogsNeverHurtService(t *testing.T) {
	addr := sharedRedis(t)
	redisDo(t, addr, "SET", t.Name(), "value")
	hit, miss := request("GET", t.Name()), request("GET", t.Name()+"2")
	for _, row := range []struct {
		name string
		hurt func(stderr *os.File)
	}{
		{"the reader of stderr has gone", func(stderr *os.File) { stderr.Close() }},
		{"nobody empties stderr", func(*os.File) {}},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := startRelay(t, addr)
			cmd, proxy, stderr := deafProgram(t, r.addr)
			row.hurt(stderr)
			expect := func(send, want string) {
				if got := exchange(t, proxy, send); got != want {
					t.Errorf("after %q: got %q; want %q", send, got, want)
				}
			}
			expect(hit, bulk("value"))
			for range 2 { // each outage is a line, and at the debug level each connection
				r.refuse()
				for range 100 {
					expect(miss, "-ERR upstream unavailable\r\n")
					expect(hit, bulk("value"))
				}
				r.accept()
				expect(miss+hit, "$-1\r\n"+bulk("value"))
			}
			expectExit(t, cmd, 4*time.Second)
		})
	}
	t.Run("lines that were dropped are counted", func(t *testing.T) {
		_, proxy, stderr := deafProgram(t, addr)
		for range 2000 {
			exchange(t, proxy, "PING\r\n")
		}
		log := new(lockedBuffer)
		go io.Copy(log, stderr) // ends when stderr is closed
		eventually(t, "the log says how many lines were dropped", func() bool {
			exchange(t, proxy, "PING\r\n")
			return regexp.MustCompile(`log lines were dropped.*count=[1-9]`).MatchString(log.String())
		})
	})
}

// A tracking connection that breaks as soon as it is there is not taken for one that works.
func TestIntegrationTrackingBacksOffUntilItHasProvedItself(t *testing.T) {
	t.Parallel()
	var subscribed, gets atomic.Int64
	flags := playRedis(t, func(_ int, args []string) string {
		switch strings.ToUpper(args[0]) {
		case "GET":
			gets.Add(1)
			return bulk("value")
		case "SUBSCRIBE":
			subscribed.Add(1)
			return "*3\r\n" + bulk("subscribe") + bulk(args[1]) + ":1\r\n" + hungUp
		}
		return ":1\r\n"
	})
	closing := runProxy(t, append(flags, "--tracking", "--cache-timeout", "1h"))
	server := startRedis(t)
	redisDo(t, server.addr, "ACL", "SETUSER", "proxy", "on", ">secret", "resetchannels", "&__redis__:invalidate",
		"~*", "+get", "+client|id", "+client|tracking", "+subscribe")
	forbidden := runProxy(t, []string{"--redis-url", "redis://proxy:secret@" + server.addr, "--tracking"})
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if got := exchange(t, closing.addr, request("GET", "k")); got != bulk("value") {
			t.Fatalf("got %q; want the value", got)
		}
	}
	for name, p := range map[string]*testProxy{
		"a peer that closes after SUBSCRIBE": closing,
		"a user without +ping":               forbidden,
	} {
		lines := regexp.MustCompile(`(?m)^.*msg="?[^"=]*tracking.*$`).FindAllString(p.log.String(), -1)
		if len(lines) == 0 || len(lines) > 2 {
			t.Errorf("%s: %d lines in the log in 3 s; want 1 or 2:\n%s", name, len(lines), p.log)
		}
	}
	if got := subscribed.Load(); got > 8 {
		t.Errorf("subscriptions in 3 s: got %d; want 8 at most", got)
	}
	if got := gets.Load(); got > 10 {
		t.Errorf("fetches of one key: got %d; want 10 at most, as the cache is not emptied for each", got)
	}
	if log := forbidden.log.String(); !strings.Contains(log, "ping") {
		t.Errorf("the log does not name the missing permission:\n%s", log)
	}
}

// What clients hold by not reading, and by not finishing what they send, is bounded over all of
// them.
func TestIntegrationMemoryHoldsWithHostileClients(t *testing.T) {
	t.Parallel()
	const cache = 16 << 20
	val := strings.Repeat("v", 1<<20)
	flags := append(playRedis(t, func(int, []string) string { return bulk(val) }), "--cache-bytes", "16MB")
	for _, row := range []struct {
		name    string
		attack  func(t *testing.T, proxy string, n int)
		clients int
	}{
		{"hits that are not read", func(t *testing.T, proxy string, n int) {
			gets, mget := "", []string{"MGET"}
			for i := range 12 {
				mget = append(mget, fmt.Sprintf("k%d.%d", n, i))
				gets += request("GET", mget[i+1])
			}
			reader := dial(t, proxy).send(gets)
			if got, err := io.CopyN(io.Discard, reader, int64(12*len(bulk(val)))); err != nil {
				t.Fatalf("a client that reads: %d bytes, %v", got, err)
			}
			c := dialNarrow(t, proxy, 4096).send([]string{gets, request(mget...)}[n%2])
			c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			c.Peek(1)
		}, soak(12, 80)},
		{"streams of HTTP/2 without a window", func(t *testing.T, proxy string, n int) {
			send := h2Begin
			for i := range 100 {
				send += h2Get(2*i+1, fmt.Sprintf("/k%d.%d", n, i))
			}
			dial(t, proxy).send(send)
		}, soak(2, 10)},
		{"requests that are not finished", func(t *testing.T, proxy string, n int) {
			send := "*2\r\n$3\r\nGET\r\n$1000000\r\n" + val[:999000]
			go io.WriteString(dial(t, proxy).Conn, send) // ends with the connection
		}, soak(150, 300)},
		{"first lines that are not finished", func(t *testing.T, proxy string, n int) {
			dial(t, proxy).send("GET /" + val[:maxFirstLine-100])
		}, soak(300, 3000)},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, proxy, _ := startProgram(t, nil, flags...)
			for n := range row.clients {
				row.attack(t, proxy, n)
			}
			checkPeak(t, dial(t, proxy), cache)
		})
	}
}

// Idle connections to the admin address take no descriptors from clients.
func TestIntegrationIdleAdminConnections(t *testing.T) {
	flags := append(playRedis(t, func(int, []string) string { return bulk("value") }), patience...)
	admin := "127.0.0.1:" + freePort()
	cmd := program(t, nil, append(flags, "--port", "0", "--admin-address", admin)...)
	cmd.Args = append([]string{"sh", "-c", `ulimit -n 300 && exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	proxy, log := serves(t, cmd)
	var most int
	fmt.Sscan(infoField(t, dial(t, proxy), "maxclients"), &most)
	if most < 20 || most > 200 || !strings.Contains(log.String(), "fewer clients") {
		t.Errorf("with 300 files: got %d clients at most; want fewer, and a warning:\n%s", most, log)
	}
	for range 400 {
		c, err := net.Dial("tcp", admin)
		if err != nil {
			break // which is right, too
		}
		defer c.Close()
	}
	for i := range 20 {
		if got := exchange(t, proxy, request("GET", fmt.Sprint(i))); got != bulk("value") {
			t.Fatalf("got %q; want the value", got)
		}
	}
}

// A client that goes on sending after a malformed request sees what was wrong with it, and is not
// read for ever.
func TestIntegrationProtocolErrorIsSeen(t *testing.T) {
	p := startProxy(t, sharedRedis(t))
	c := dial(t, p.addr)
	go io.WriteString(c.Conn, "*1\r\n$-5\r\n"+strings.Repeat("x", 4<<20)) // ends with the connection
	c.expect("-ERR Protocol error: invalid bulk length\r\n")
	if rest, err := io.ReadAll(c.Reader); len(rest) > 0 || err != nil {
		t.Errorf("after the error: got %q, %v; want an orderly end", rest, err)
	}
	c.expectGone()
}

func TestIntegrationLargeRequestsAreTaken(t *testing.T) {
	p := runProxy(t, playRedis(t, func(_ int, args []string) string { return bulk(args[1]) }))
	t.Run("MGET of 30,000 keys", func(t *testing.T) {
		send, want := []string{"MGET"}, new(strings.Builder)
		for i := range 30000 {
			send = append(send, fmt.Sprintf("a key of some length:%08d", i))
			want.WriteString(bulk(send[i+1]))
		}
		dial(t, p.addr).send(request(send...)).expect("*30000\r\n" + want.String())
	})
	t.Run("60 MB", func(t *testing.T) {
		text := strings.Repeat("0123456789abcdef", 60<<16)
		dial(t, p.addr).send(request("ECHO", text)).expect(bulk(text))
	})
}

// After an outage Redis is not asked for what nobody waits for any more.
func TestIntegrationOutageLeavesNoQueue(t *testing.T) {
	const clients, each = 40, 100
	var received, asked atomic.Int64
	val := bulk(strings.Repeat("v", 20<<10))
	flags := playRedis(t, func(_ int, args []string) string {
		if strings.HasPrefix(args[len(args)-1], "small") {
			return bulk("value")
		}
		received.Add(1)
		return val
	})
	r := startRelay(t, net.JoinHostPort(flags[1], flags[3]))
	p := startProxy(t, r.addr, "--redis-timeout", "500ms", "--client-limit", "2")
	for i := range 100 {
		eventually(t, "a value", func() bool { return p.ask(t, fmt.Sprint("small", i)) == bulk("value") })
	}
	r.stall()
	var wg sync.WaitGroup
	for n := range clients {
		c := dial(t, p.addr)
		wg.Go(func() {
			for round := range soak(3, 24) {
				var send strings.Builder
				for i := range each {
					send.WriteString(request("GET", fmt.Sprintf("large%d.%d.%d", n, round, i)))
				}
				io.WriteString(c.Conn, send.String())
				asked.Add(each)
				for range each {
					if line, err := c.ReadString('\n'); !strings.HasPrefix(line, "-ERR upstream ") {
						t.Errorf("in an outage: got %q (%v)", line, err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	r.resume()
	back := time.Now()
	eventually(t, "an answer with Redis back", func() bool {
		return exchange(t, p.addr, request("GET", "small again")) == bulk("value")
	})
	if took := time.Since(back); took > 5*time.Second {
		t.Errorf("the first answer after Redis was back came after %v; want 5 s at most", took)
	}
	t.Logf("%d GETs were asked for, %d of them received by Redis", asked.Load(), received.Load())
	if got := received.Load(); got > asked.Load()/2 { // a few batches were sent before anybody knew
		t.Errorf("Redis received %d of %d GETs that nobody waited for; want half at most", got, asked.Load())
	}
}

// twoAddresses is a name that stands for 127.0.0.2 and 127.0.0.1 where answerDNS resolves.
const twoAddresses = "redis.two-addresses.test"

// answerDNS answers as a name server does over TCP (RFC 1035 §4).
func answerDNS(c net.Conn) {
	defer c.Close()
	for {
		var size uint16
		if binary.Read(c, binary.BigEndian, &size) != nil {
			return
		}
		query := make([]byte, size)
		if _, err := io.ReadFull(c, query); err != nil || len(query) < 17 {
			return
		}
		end := 12 + bytes.IndexByte(query[12:], 0) + 5 // of the question
		reply := append(slices.Clone(query[:2]), 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0)
		reply = append(reply, query[12:end]...)
		if query[end-3] == 1 { // an IPv4 address
			reply[7] = 2
			for _, last := range []byte{2, 1} {
				reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, last)
			}
		}
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...))
	}
}

// Redis' name has two addresses, and the first takes no connection, without a word.
func TestIntegrationSecondAddressIsTriedInTime(t *testing.T) {
	flags := playRedis(t, func(int, []string) string { return bulk("value") })
	port, _ := strconv.Atoi(flags[3])
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	hole := &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 2}}
	if err := errors.Join(syscall.Bind(fd, hole), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for full := false; !full; { // a full backlog drops what comes
		c, err := net.DialTimeout("tcp", fmt.Sprint("127.0.0.2:", port), 200*time.Millisecond)
		if full = err != nil; !full {
			defer c.Close()
		}
	}
	_, addr, log := startProgram(t, []string{"TEST_TWO_ADDRESSES=1"},
		"--redis-host", twoAddresses, "--redis-port", flags[3], "--redis-timeout", "4s")
	if got := exchange(t, addr, request("GET", "k")); got != bulk("value") {
		t.Errorf("got %q; want the value\n%s", got, log)
	}
}

// A library may write its whole pipeline before it reads the first reply.
func TestIntegrationPipelineIsWrittenWholeBeforeItIsRead(t *testing.T) {
	t.Parallel()
	const keys, gets = 1000, 300000
	flags := playRedis(t, func(_ int, args []string) string { return bulk(strings.Repeat("v", 90) + args[1]) })
	var send, want strings.Builder
	for i := range keys {
		send.WriteString(request("GET", fmt.Sprintf("key%07d", i)))
		want.WriteString(bulk(fmt.Sprintf("%skey%07d", strings.Repeat("v", 90), i)))
	}
	all, due := strings.Repeat(send.String(), gets/keys), strings.Repeat(want.String(), gets/keys)
	cert, private := makeCertificate(t, t.TempDir(), "proxy")
	pair, err := tls.LoadX509KeyPair(cert, private)
	if err != nil {
		t.Fatal(err)
	}
	for name, secure := range map[string]bool{"TCP": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			p := runProxy(t, flags, func(cfg *config) {
				if secure {
					cfg.clients.tls = &tls.Config{Certificates: []tls.Certificate{pair}}
				}
			})
			c := dial(t, p.addr)
			if secure {
				c = dialTLS(t, p.addr, &tls.Config{InsecureSkipVerify: true})
			}
			c.send(all).expect(due).send("PING\r\n").expect("+PONG\r\n")
		})
	}
}

// startDistance stands between the proxy and Redis and lets bytes pass in half of a round trip's
// time, as many at once as there are. It returns its address.
func startDistance(t testing.TB, to string, roundTrip time.Duration) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	type chunk struct {
		due   time.Time
		bytes []byte
	}
	carry := func(to, from net.Conn) { // ends with from
		pipe := make(chan chunk, 1<<16)
		go func() { // ends with pipe
			for c := range pipe {
				time.Sleep(time.Until(c.due))
				to.Write(c.bytes)
			}
			to.Close()
		}()
		for {
			buf := make([]byte, 16<<10)
			n, err := from.Read(buf)
			if err != nil {
				close(pipe)
				return
			}
			pipe <- chunk{time.Now().Add(roundTrip / 2), buf[:n]}
		}
	}
	go func() { // ends when l is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if up, err := net.Dial("tcp", to); err == nil {
				go carry(up, c)
				go carry(c, up)
			}
		}
	}()
	return l.Addr().String()
}

// Cold keys cost few round trips to Redis, however many they are.
func TestIntegrationDistanceToRedis(t *testing.T) {
	const keys, most = 10000, 32 // batches, each of which may cost a round trip
	flags := playRedis(t, func(_ int, args []string) string { return bulk(args[1]) })
	gets, mget, want := new(strings.Builder), []string{"MGET"}, new(strings.Builder)
	for i := range keys {
		mget = append(mget, fmt.Sprintf("%08d", i))
		gets.WriteString(request("GET", mget[i+1]))
		want.WriteString(bulk(mget[i+1]))
	}
	for _, row := range []struct {
		name, send, begin string
		roundTrip         time.Duration
	}{
		{"MGET of 10,000 keys at 200 ms", request(mget...), fmt.Sprintf("*%d\r\n", keys), 200 * time.Millisecond},
		{"a pipeline of 10,000 GETs at 10 ms", gets.String(), "", 10 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := startProxy(t, startDistance(t, net.JoinHostPort(flags[1], flags[3]), row.roundTrip))
			began := time.Now()
			dial(t, p.addr).send(row.send).expect(row.begin + want.String())
			batches, err := strconv.Atoi(p.stat(t, "upstream_batches"))
			if t.Logf("took %v", time.Since(began)); err != nil || batches > most {
				t.Errorf("%d keys were fetched in %d batches (%v); want %d at most", keys, batches, err, most)
			}
		})
	}
}

// No reply of Redis ends the process, and no length is believed before its bytes come.
func TestIntegrationRedisCannotEndTheProcess(t *testing.T) {
	const huge = "9223372036854775807\r\n"
	subscribed := "*3\r\n" + bulk("subscribe") + bulk("__redis__:invalidate") + ":1\r\n"
	nested := strings.Repeat("*1\r\n", 1<<20)
	for _, row := range []struct{ name, command, reply string }{
		{"AUTH is answered by a huge bulk", "AUTH", "$" + huge},
		{"SELECT is answered by a huge array", "SELECT", "*" + huge},
		{"GET is answered by a number and a huge bulk", "GET", ":5\r\n$" + huge},
		{"GET is answered by a huge array", "GET", "*" + huge},
		{"GET is answered by a bulk of 512 MB that never comes", "GET", "$536870912\r\n"},
		{"GET is answered by a negative length", "GET", "$-9223372036854775808\r\n"},
		{"GET is answered by arrays in arrays", "GET", nested},
		{"GET is answered by a line that never ends", "GET", "+" + strings.Repeat("x", 16<<20)},
		{"CLIENT is answered by a huge bulk", "CLIENT", "$" + huge},
		{"CLIENT is answered by arrays in arrays", "CLIENT", nested},
		{"SUBSCRIBE is answered by a huge array", "SUBSCRIBE", "*" + huge},
		{"a report is a huge array", "SUBSCRIBE", subscribed + "*" + huge},
		{"a report has a huge key", "SUBSCRIBE", subscribed + "*3\r\n" + bulk("message") + "$" + huge},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var sent atomic.Bool
			flags := playRedis(t, func(_ int, args []string) string {
				switch name := strings.ToUpper(args[0]); {
				case name == row.command:
					sent.Store(true)
					return row.reply
				case name == "SUBSCRIBE":
					return subscribed
				case name == "CLIENT":
					return ":1\r\n"
				}
				return "+OK\r\n"
			})
			cmd, proxy, log := startProgram(t, nil, "--redis-url", "redis://:pw@127.0.0.1:"+flags[3]+"/3",
				"--redis-timeout", "200ms",
				fmt.Sprintf("--tracking=%v", strings.Contains("CLIENT SUBSCRIBE", row.command)))
			for range 2 {
				if got := exchange(t, proxy, "GET k\r\n"); !strings.HasPrefix(got, "-ERR upstream ") {
					t.Errorf("GET: got %q; want an error of the proxy", got)
				}
			}
			eventually(t, "the reply was sent", sent.Load)
			time.Sleep(50 * time.Millisecond) // and may have been read
			c, used := dial(t, proxy).send("PING\r\n").expect("+PONG\r\n"), 0
			if fmt.Sscan(infoField(t, c, "used_memory"), &used); used > 64<<20 {
				t.Errorf("used memory: got %d MB; want 64 MB at most", used>>20)
			}
			if expectExit(t, cmd, 4*time.Second); t.Failed() {
				t.Logf("%.2000s", log)
			}
		})
	}
}

// A reply too many is never taken for another key's.
func TestIntegrationExtraReplies(t *testing.T) {
	for _, row := range []struct{ name, extra string }{
		{"a value", bulk("EXTRA")},
		{"an error", "-ERR timeout\r\n"},
		{"null", "$-1\r\n"},
		{"half of a value", "$5\r\nEX"},
		{"an empty line", "\r\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var gets atomic.Int64
			flags := playRedis(t, func(_ int, args []string) string {
				if gets.Add(1)%20 == 0 {
					return bulk("of "+args[1]) + row.extra
				}
				return bulk("of " + args[1])
			})
			p, right := runProxy(t, append(flags, "--client-limit", "1")), 0
			for i := range 100 {
				key := fmt.Sprint("key", i)
				switch got := exchange(t, p.addr, request("GET", key)); {
				case got == bulk("of "+key):
					right++
				case !strings.HasPrefix(got, "-ERR upstream "):
					t.Fatalf("%s: got %q; want its own value, or an error of the proxy", key, got)
				}
			}
			if right < 90 {
				t.Errorf("right answers: got %d of 100; want 90 at least", right)
			}
		})
	}
}

// Nor is what Redis says while a connection is idle.
func TestIntegrationRepliesToNothing(t *testing.T) {
	n := scriptedAt(t, "127.0.0.1")
	n.play(nil, func(_ int, key string, _ bool) string { return bulk("of " + key) })
	p := startAt(t, n.addr)
	for i := range 10 {
		key := fmt.Sprint("key", i)
		expectValue(t, "after a reply to nothing", p, key, bulk("of "+key))
		n.mu.Lock()
		for _, c := range n.conns {
			io.WriteString(c, bulk("EXTRA")) // fails on those that are closed
		}
		n.mu.Unlock()
	}
}

// With --redis-ttl an entry ends when its key does, also where Redis does not report it.
func TestIntegrationKeysExpireWithRedis(t *testing.T) {
	server := startRedis(t, "--enable-debug-command", "yes")
	redisDo(t, server.addr, "DEBUG", "SET-ACTIVE-EXPIRE", "0") // no expiry is reported before someone asks
	up, err := redis.Dial("tcp", server.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	p := trackedProxy(t, server.addr, "--redis-ttl")
	const keys = 100
	for i := range keys {
		up.Send("SET", i, "value", "PX", 500+3*i)
	}
	for i := range keys {
		up.Send("PEXPIRETIME", i)
	}
	replies, err := redis.Values(up.Do(""))
	if err != nil {
		t.Fatal(err)
	}
	ends, _ := redis.Int64s(replies[keys:], nil)
	eventually(t, "the reports of the writes", func() bool {
		return p.figure(t, "tracking_invalidations") >= keys
	})
	for range 2 {
		for i := range keys {
			if got := exchange(t, p.addr, request("GET", fmt.Sprint(i))); got != bulk("value") && got != "$-1\r\n" {
				t.Errorf("key %d: got %q; want the value", i, got)
			}
		}
	}
	late := 0
	for i := range keys {
		time.Sleep(time.Until(time.UnixMilli(ends[i]).Add(50 * time.Millisecond)))
		if exchange(t, p.addr, request("GET", fmt.Sprint(i))) != "$-1\r\n" {
			late++
		}
	}
	if late > 0 {
		t.Errorf("answered more than 50 ms after their expiry: %d of %d keys; want none", late, keys)
	}
	redisDo(t, server.addr, "SET", "short", "value", "PX", 6900)
	redisDo(t, server.addr, "SET", "long", "value")
	for key, want := range map[string]string{"short": `^max-age=[3-6]$`, "long": `^max-age=3[56]\d\d$`} {
		resp, _ := httpDo(t, "GET", "http://"+p.addr+"/"+key)
		if got := resp.Header.Get("Cache-Control"); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("the %s key: Cache-Control: got %q; want %s", key, got, want)
		}
	}
}

// A TLS client of a proxy without a certificate is closed at once.
func TestIntegrationTLSWithoutCertificate(t *testing.T) {
	_, proxy, log := startProgram(t, nil, "--log-level", "debug")
	c := dial(t, proxy).send("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
	c.SetDeadline(time.Now().Add(5 * time.Second))
	c.expectClosed()
	eventually(t, "the reason in the log", func() bool {
		return regexp.MustCompile(`level=DEBUG.*TLS`).MatchString(log.String())
	})
}

func TestIntegrationSignals(t *testing.T) {
	t.Run("SIGTERM while a TLS handshake with Redis hangs", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		cmd, _, _ := startProgram(t, nil, "--redis-url", "rediss://"+l.Addr().String(), "--tracking")
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.ReadFull(c, make([]byte, 100)) // the handshake has begun
		expectExit(t, cmd, 4*time.Second)
	})
	t.Run("SIGHUP loses no answer", func(t *testing.T) {
		answer, waiting := make(chan struct{}), make(chan struct{})
		flags := playRedis(t, func(_ int, args []string) string {
			if args[len(args)-1] == "slow" {
				close(waiting)
				<-answer
			}
			return bulk("value")
		})
		cmd, proxy, log := startProgram(t, nil, flags...)
		c := dial(t, proxy).send(request("GET", "slow"))
		<-waiting
		cmd.Process.Signal(syscall.SIGHUP)
		eventually(t, "stopping", func() bool { return strings.Contains(log.String(), "msg=stopping") })
		close(answer)
		c.expect(bulk("value"))
		if err := cmd.Wait(); err != nil {
			t.Errorf("after SIGHUP: %v; want exit code 0", err)
		}
	})
}

// Short header lines, many of them, cost neither memory nor the time of others.
func TestIntegrationManyShortHeaderLines(t *testing.T) {
	flags := playRedis(t, func(int, []string) string { return bulk("value") })
	_, proxy, _ := startProgram(t, nil, append(flags, "--cache-bytes", "16MB", "--password", "pw")...)
	other := dial(t, proxy).send(request("AUTH", "pw")).expect("+OK\r\n")
	other.send(request("GET", "k")).expect(bulk("value"))
	send := []byte("GET /k HTTP/1.1\r\nHost: h\r\n")
	for i := 0; len(send) < 118<<10; i++ {
		send = fmt.Appendf(send, "%s:\r\n", strconv.FormatInt(int64(i), 36))
	}
	var clients sync.WaitGroup
	for range 200 {
		c := dial(t, proxy)
		clients.Go(func() { // it may be closed meanwhile
			c.SetDeadline(time.Now().Add(10 * time.Second))
			c.Write(send)
			c.Write([]byte("\r\n"))
			c.ReadString('\n')
		})
	}
	over, most, slow := make(chan struct{}), time.Duration(0), 0
	go func() { // ends with the clients
		clients.Wait()
		close(over)
	}()
	for ended := false; !ended; {
		select {
		case <-over:
			ended = true
		case <-time.After(20 * time.Millisecond):
			began := time.Now()
			other.send(request("GET", "k")).expect(bulk("value"))
			took := time.Since(began)
			if most = max(most, took); took > 2*time.Second {
				slow++
			}
		}
	}
	if t.Logf("a hit took %v at most", most); most > 4*time.Second || slow > 1 {
		t.Errorf("%d hits took more than 2 s meanwhile, one %v; want one at most, and 4 s", slow, most)
	}
	checkPeak(t, other, 16<<20)
}

// A client that stops taking has the time-out, from the last byte that it took.
func TestIntegrationClientThatStopsTakingIsClosedInTime(t *testing.T) {
	t.Parallel()
	const timeout = 4 * time.Second
	val := bulk(strings.Repeat("v", 12<<20))
	flags := playRedis(t, func(int, []string) string { return val })
	for name, send := range map[string]string{"RESP": request("GET", "k"), "HTTP": plainRequest("k")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = timeout })
			exchange(t, p.addr, request("GET", "k"))
			c := dialNarrow(t, p.addr, 32<<10).send(send)
			time.Sleep(timeout / 3)
			io.CopyN(io.Discard, c, 256<<10)
			last := time.Now()
			eventually(t, "the client is closed", func() bool { return p.stat(t, "connected_clients") == "1" })
			if took := time.Since(last); took < timeout-500*time.Millisecond || took > timeout*7/4 {
				t.Errorf("closed %v after its last byte; want %v, and a quarter more", took, timeout)
			}
		})
	}
}

// A request over HTTP/2 with a body, which means nothing, is answered: the body is read first.
func TestIntegrationHTTP2BodiesAreRead(t *testing.T) {
	p := runProxy(t, playRedis(t, func(int, []string) string { return bulk("value") }))
	h2 := &http.Transport{Protocols: new(http.Protocols)}
	h2.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(h2.CloseIdleConnections)
	for _, size := range []int{1, 70_000, maxBody} {
		for range 20 {
			body := &countingReader{Reader: strings.NewReader(strings.Repeat("b", size))}
			resp, err := (&http.Client{Transport: h2}).Post("http://"+p.addr+"/k", "text/plain", io.MultiReader(body))
			if err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
			resp.Body.Close()
			if n := body.n.Load(); resp.StatusCode != 405 || n != int64(size) {
				t.Fatalf("%d bytes: got %d after %d bytes; want 405 after all", size, resp.StatusCode, n)
			}
		}
	}
}

// A countingReader counts the bytes that it has read.
type countingReader struct {
	io.Reader
	n atomic.Int64
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.n.Add(int64(n))
	return n, err
}

// A stream of HTTP/2 that takes nothing for the write time-out is reset, and the others of its
// connection go on.
func TestIntegrationStuckHTTP2StreamIsReset(t *testing.T) {
	t.Parallel()
	const timeout, grants = 4 * time.Second, 30
	flags := playRedis(t, func(int, []string) string { return bulk(strings.Repeat("v", 1<<20)) })
	p := runProxy(t, flags, func(cfg *config) { cfg.clients.writeTimeout = timeout })
	exchange(t, p.addr, request("GET", "k"))
	c := dial(t, p.addr).send(h2Begin + h2Update(0, 1<<20) + h2Get(1, "/k") + h2Get(3, "/k"))
	go func() { // ends with its last write
		for range grants {
			io.WriteString(c.Conn, h2Update(3, 32<<10))
			time.Sleep(3 * timeout / grants)
		}
	}()
	got, reset := 0, []int(nil)
	for got < grants*32<<10 {
		var head [9]byte
		if _, err := io.ReadFull(c.Reader, head[:]); err != nil {
			t.Fatalf("after %d bytes: %v; want data", got, err)
		}
		n, stream := int(head[0])<<16|int(head[1])<<8|int(head[2]), int(head[8])
		io.CopyN(io.Discard, c.Reader, int64(n))
		switch head[3] {
		case 0: // DATA
			got += n
		case 3: // RST_STREAM
			reset = append(reset, stream)
		}
	}
	if !slices.Equal(reset, []int{1}) {
		t.Errorf("reset were %v; want the first stream", reset)
	}
}

// What a client sends stays out of the log, also where HTTP/2 cannot read it.
func TestIntegrationLogsShowNoKeys(t *testing.T) {
	cert, key := makeCertificate(t, t.TempDir(), "proxy")
	for name, more := range map[string][]string{"TCP": nil, "TLS": {"--tls-cert", cert, "--tls-key", key}} {
		t.Run(name, func(t *testing.T) {
			_, proxy, log := startProgram(t, nil, append([]string{"--log-level", "debug"}, more...)...)
			for range 2 { // the second is logged after all of the first
				c := dial(t, proxy)
				if more != nil {
					c = dialTLS(t, proxy, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
				} else {
					c.send("PRI * HTTP/2.0\r\n\r\n")
				}
				c.send(plainRequest("secretkey"))
				c.SetDeadline(time.Now().Add(5 * time.Second))
				io.Copy(io.Discard, c)
				eventually(t, "the end in the log", func() bool {
					return strings.Contains(log.String(), "msg=closed client="+c.LocalAddr().String())
				})
			}
			if strings.Contains(log.String(), "secret") {
				t.Errorf("the log shows what a client sent:\n%s", log)
			}
		})
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
			`^redis_proxy: --redis-url: must be redis://\[\[user\].*rediss for TLS.*\n$`,
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
			"a certificate without its key",
			nil,
			[]string{"--tls-cert", "/no/cert.pem"},
			2,
			`^$`,
			`^redis_proxy: --tls-cert "/no/cert.pem", --tls-key "": both must be given, or neither\n$`,
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

// While a request is on its way, a proxy that stops takes no new clients and closes idle ones.
func TestIntegrationStopFinishesWhatHasBegun(t *testing.T) {
	asked, answered := make(chan struct{}), make(chan struct{})
	answer := sync.OnceFunc(func() { close(answered) })
	flags := playRedis(t, func(_ int, args []string) string {
		close(asked)
		<-answered
		return bulk("value")
	})
	t.Cleanup(answer)
	cmd, addr, _ := startProgram(t, nil, flags...)
	idle := dial(t, addr).send(request("PING")).expect("+PONG\r\n")
	dial(t, addr).send("*x\r\n").expect("-ERR Protocol error: invalid multibulk length\r\n") // it stays open
	waiting := dial(t, addr).send(request("GET", "k"))
	<-asked
	cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "no new client is taken", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	idle.expectClosed()
	answer()
	waiting.expect(bulk("value")).expectClosed()
	began := time.Now()
	if err := cmd.Wait(); err != nil || time.Since(began) > shutdownTimeout/2 {
		t.Errorf("got %v after %v; want exit code 0 at once", err, time.Since(began))
	}
}

// A pipeline that has been read in part when the server stops ends with a whole reply, although the
// client has sent more.
func TestIntegrationStopEndsAfterAWholeReply(t *testing.T) {
	reply := bulk(strings.Repeat("v", 60_000))
	cmd, addr, _ := startProgram(t, nil, playRedis(t, func(int, []string) string { return reply })...)
	c := dial(t, addr).send(request("GET", "big")).expect(reply)
	c.send(strings.Repeat(request("GET", "big"), 2000))
	c.expect(reply)
	cmd.Process.Signal(syscall.SIGTERM)
	time.Sleep(3 * drainTime) // the client is slow
	rest, err := io.ReadAll(c)
	if whole := strings.Repeat(reply, len(rest)/len(reply)); err != nil || string(rest) != whole {
		t.Errorf("got %d bytes, %v; want whole replies of %d bytes and then the end", len(rest), err, len(reply))
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("got %v; want exit code 0", err)
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
				_, err := io.WriteString(c.Conn, hello[i%2])
				sent := time.Now()
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
	case <-time.After(shutdownTimeout + 3*time.Second):
		t.Errorf("not stopped after %v", shutdownTimeout+3*time.Second)
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
		var metrics string
		eventually(t, "both batches are timed, each after its answer", func() bool {
			_, metrics = httpDo(t, "GET", admin+"/metrics")
			return strings.Contains(metrics, "\nredis_proxy_upstream_seconds_count 2\n")
		})
		for _, want := range []string{
			`redis_proxy_requests_total{protocol="resp",result="hit"} 2`,
			`redis_proxy_requests_total{protocol="resp",result="miss"} 1`,
			`redis_proxy_requests_total{protocol="http",result="absent"} 1`,
			`redis_proxy_cache_keys 1`,
			`redis_proxy_upstream_fetches_total 2`,
			`redis_proxy_upstream_seconds_bucket{le="+Inf"} 2`,
			`redis_proxy_tracking 0`,
			`redis_proxy_cache_keys_max 10000`,
			fmt.Sprintf(`redis_proxy_build_info{version=%q,go_version=%q} 1`, version, runtime.Version()),
		} {
			if !strings.Contains(metrics, "\n"+want+"\n") {
				t.Errorf("/metrics has no %s", want)
			}
		}
		if want := `,tls="false",password="false"} 1`; !strings.Contains(metrics, want) {
			t.Errorf("/metrics has no %s", want)
		}
		for name, most := range map[string]float64{"resident_memory_bytes": 4 << 30, "cpu_seconds_total": 1000} {
			_, text, _ := strings.Cut(metrics, "\nprocess_"+name+" ")
			var got float64
			if fmt.Sscan(text, &got); got <= 0 || got > most {
				t.Errorf("%s: got %v; want more than 0 and less than %v", name, got, most)
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
		for path, want := range map[string]string{"/healthz": "ok\n|text/plain; charset=utf-8",
			"/readyz": "ok\n|text/plain; charset=utf-8", "/debug/pprof/": "goroutine|text/html; charset=utf-8",
			"/metrics": "redis_proxy_cache_keys 1\n|text/plain; version=0.0.4; charset=utf-8",
			"/":        "<title>redis_proxy</title>|text/html; charset=utf-8"} {
			resp, body := httpDo(t, "GET", admin+path)
			words, kind, _ := strings.Cut(want, "|")
			if got := resp.Header.Get("Content-Type"); !strings.Contains(body, words) || got != kind {
				t.Errorf("%s: got %.60q, %q; want %q, %q", path, body, got, words, kind)
			}
		}
	})
	t.Run("forgetting", func(t *testing.T) {
		for _, path := range []string{"/cache/k", "/cache/"} {
			exchange(t, proxy, request("GET", "k"))
			expect(t, " with GET", path, 404) // and forgets nothing
			resp, _ := httpDo(t, "GET", "http://"+proxy+"/k")
			if got := resp.Header.Get("Cache-Status"); !strings.Contains(got, "; hit") {
				t.Errorf("before DELETE %s: got %q; want a hit", path, got)
			}
			resp, _ = httpDo(t, "DELETE", admin+path)
			compare(t, "DELETE "+path, resp.StatusCode, 204)
			resp, _ = httpDo(t, "GET", "http://"+proxy+"/k")
			if got := resp.Header.Get("Cache-Status"); !strings.Contains(got, "fwd=miss") {
				t.Errorf("after DELETE %s: got %q; want a miss", path, got)
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

// Connections to the admin listener are few at once.
func TestIntegrationAdminConnectionsAreBounded(t *testing.T) {
	_, admin := startAdmin(t, sharedRedis(t))
	addr := strings.TrimPrefix(admin, "http://")
	var idle []*rawClient
	for range maxAdmin {
		idle = append(idle, dial(t, addr))
	}
	over := dial(t, addr)
	over.SetDeadline(time.Now().Add(requestTimeout / 2)) // and not when it has been silent for too long
	over.expectClosed()
	for _, c := range idle {
		resp, body := c.send("GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n").response()
		compare(t, "answer to one of not too many", fmt.Sprint(resp.StatusCode, " ", body), "200 ok\n")
		c.Close()
	}
	eventually(t, "room again", func() bool {
		resp, err := httpClient.Get(admin + "/healthz")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
}

// TestIntegrationAdminPage opens the page in a browser, through a relay that adds an unknown figure
// to the metrics.
func TestIntegrationAdminPage(t *testing.T) {
	proxy, address := startAdmin(t, sharedRedis(t))
	admin, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}

	t.Run("answer", func(t *testing.T) {
		resp, page := httpDo(t, "GET", admin.String()+"/")
		policy := resp.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "connect-src 'self'", "style-src 'sha256-",
			"script-src 'sha256-"} {
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
				more := "# HELP redis_proxy_new_bytes About <b>.\n# TYPE redis_proxy_new_bytes gauge\n" +
					"redis_proxy_new_bytes 2048\n"
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
		types := regexp.MustCompile(`(?m)^# TYPE (?:redis_proxy_)?(\w+) (?:counter|gauge|histogram)$`)
		for _, m := range types.FindAllStringSubmatch(metrics, -1) {
			if !strings.HasSuffix(m[1], "info") && !strings.Contains(dom, "<span>"+m[1]) {
				t.Errorf("the page does not show %s", m[1])
			}
		}
		line := regexp.MustCompile(`<polyline points="[0-9.]+,[0-9.]+( [0-9.]+,[0-9.]+)+"`)
		for _, title := range []string{"Requests", "Hits", "p99 of Redis", "Memory", "requests_total resp absent",
			"new_bytes"} {
			_, chart, _ := strings.Cut(dom, "<span>"+title+"</span>")
			chart, _, _ = strings.Cut(chart, "</li>")
			if !line.MatchString(chart) {
				t.Errorf("no line is drawn for %s: %s", title, chart)
			}
		}
		for _, want := range []string{proxy + " in front of Redis at ", ">2 KB</b>", `title="About &lt;b&gt;."`,
			"cache timeout: 30s", "tracking: off"} {
			if !strings.Contains(dom, want) {
				t.Errorf("the page lacks %s", want)
			}
		}
	})
}

// browse returns the DOM of a page after ten seconds of the browser's virtual time. It calls load
// repeatedly until then.
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
