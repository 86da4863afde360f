// The listener: accept, find the protocol in the first line, hand over, drain.
//
// The protocol of a connection is decided once, and looking consumes nothing: the front end that gets
// the connection reads it from the first byte. Each connection is looked at by a goroutine of its own,
// so that a slow one delays nobody.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const (
	// firstLineTimeout is how long a client may take for its first line or its next request once it has
	// begun, and for a TLS handshake.
	firstLineTimeout = 10 * time.Second
	// httpIdleTimeout is how long an HTTP connection is kept alive if the settings do not say.
	httpIdleTimeout = 2 * time.Minute
	// maxFirstLine is the longest first line that is looked at, and maxEmptyLines bounds the bytes of empty
	// lines before it. Longer ones are left to RESP, which refuses the first and takes the others.
	maxFirstLine  = 64 << 10
	maxEmptyLines = 64
	// maxRefusing bounds the connections that are being told that there are too many clients; more than
	// these are closed without a word. refuseTimeout is how long each has to show its protocol.
	maxRefusing   = 100
	refuseTimeout = time.Second
	// drainTime is how much longer clients are read from when the server stops: that is answered.
	drainTime = 100 * time.Millisecond
	// stallTime is after how long a client counts as one that takes nothing of its replies for now.
	stallTime = 250 * time.Millisecond
	// flushAt is how many bytes of answers are gathered before they are written.
	flushAt = 16 << 10
)

// serverSettings are what the flags say about client connections.
type serverSettings struct {
	maxClients   int
	idleTimeout  time.Duration // how long a client may be silent; 0: for ever, over HTTP httpIdleTimeout
	writeTimeout time.Duration // how long a client may take nothing of its replies
	tls          *tls.Config   // nil: no TLS
	grown        func(int)     // is called when the number of clients passes another thousand
	requests     *budget       // what clients have sent that is not answered, beyond a buffer for each
	values       *budget       // values on their way to clients, where they are more than a client's buffer
}

// A protocol is what a connection speaks.
type protocol uint8

const (
	protoHTTP protocol = iota
	protoRESP
)

var protocols = [...]string{"http", "resp"}

// A frontEnd speaks a protocol with clients.
type frontEnd interface {
	// serve owns the connection. It may return before the connection ends.
	serve(*conn)
	// refuse answers a client that is one too many. The caller closes the connection.
	refuse(*conn)
}

// A server accepts connections and hands them to the front end of their protocol.
type server struct {
	serverSettings
	listener  net.Listener
	log       *slog.Logger
	frontEnds [len(protocols)]frontEnd

	handlers sync.WaitGroup
	draining atomic.Pointer[time.Time] // until when clients are read from; nil until stop

	mu       sync.Mutex // guards the following, and released of a link
	links    map[*link]struct{}
	refusing int // links that are one too many
	accepted int
	refused  int
	expected int // clients that grown has heard of
}

func newServer(l net.Listener, s serverSettings, log *slog.Logger, frontEnds [len(protocols)]frontEnd) *server {
	return &server{serverSettings: s, listener: l, log: log, frontEnds: frontEnds,
		links: make(map[*link]struct{}), expected: 1000}
}

// run accepts until stop.
func (s *server) run() {
	for pause := time.Duration(0); ; {
		nc, err := s.listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // out of descriptors, most likely: other connections may end
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Warn("accepting a connection", "error", err, "pause", pause)
			time.Sleep(pause)
		default:
			pause = 0
			s.add(&link{Conn: nc, server: s, idle: s.idleTimeout})
		}
	}
}

// add starts to handle a connection, or to refuse it.
func (s *server) add(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clients := len(s.links) - s.refusing
	if l.refused = clients >= s.maxClients; l.refused {
		s.refused++
	} else {
		s.accepted++
	}
	switch {
	case s.draining.Load() != nil || l.refused && s.refusing >= maxRefusing:
		l.Conn.Close()
		return
	case l.refused:
		s.refusing++
		l.Conn.SetReadDeadline(time.Now().Add(refuseTimeout))
	case clients >= s.expected:
		s.expected += 1000
		s.grown(s.expected)
	}
	s.links[l] = struct{}{}
	s.handlers.Go(func() { s.handle(l) }) // ends with the connection, which stop and wait see to
}

// figures reports the client connections.
func (s *server) figures() []figure {
	s.mu.Lock()
	defer s.mu.Unlock()
	return []figure{
		{"Clients", "connected_clients", "clients", "Client connections.", len(s.links) - s.refusing},
		{"Clients", "maxclients", "clients_max", "Most client connections at once.", s.maxClients},
		{"Clients", "blocked_clients", "", "", 0},
		{"Stats", "total_connections_received", "connections_total", "Client connections accepted.", s.accepted},
		{"Stats", "rejected_connections", "connections_refused_total", "Client connections over the limit.", s.refused},
	}
}

// handle finds out the protocol of a connection and hands it to its front end.
func (s *server) handle(l *link) {
	client := l.RemoteAddr().String()
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic; its connection is closed", "client", client, "panic", r, "stack", string(debug.Stack()))
			l.Close()
		}
	}()
	c := &conn{Conn: l, link: l}
	proto, err := s.protocol(c)
	if err != nil {
		s.log.Debug("closed before its protocol was known", "client", client, "error", err)
		l.Close()
		return
	}
	s.log.Debug("connected", "client", client, "protocol", protocols[proto], "refused", l.refused)
	if l.refused {
		s.frontEnds[proto].refuse(c)
		c.linger()
	} else {
		s.frontEnds[proto].serve(c)
	}
}

// protocol finds out what a connection speaks, and takes off TLS.
func (s *server) protocol(c *conn) (protocol, error) {
	proto, err := c.detect()
	if err != nil {
		return 0, err
	}
	secure := c.unread[0] == 0x16 // a handshake (RFC 8446 §5.1)
	if secure != (s.tls != nil) {
		return 0, errors.New("TLS without a certificate here, or no TLS with one")
	}
	if !secure {
		return proto, nil
	}
	outer := *c
	inner := tls.Server(&outer, s.tls)
	c.link.hurry(firstLineTimeout)
	if err := inner.Handshake(); err != nil {
		return 0, err
	}
	c.link.hurry(0)
	c.Conn, c.unread = inner, nil
	proto, err = c.detect()
	if err == nil && inner.ConnectionState().NegotiatedProtocol == "h2" && !bytes.HasPrefix(c.unread, []byte("PRI")) {
		err = errors.New("HTTP/2 was agreed on, and this is something else")
	}
	return proto, err
}

// stop ends accepting, and reading a moment later: what has been read by then is answered.
func (s *server) stop() {
	until := time.Now().Add(drainTime)
	s.draining.Store(&until)
	s.listener.Close()
	s.mu.Lock()
	for l := range s.links {
		if !l.released {
			l.Conn.SetReadDeadline(until)
		}
	}
	s.mu.Unlock()
	time.Sleep(drainTime)
}

// wait returns when no handler is left, or when ctx is done, and cuts off what connections there are.
func (s *server) wait(ctx context.Context) {
	ctx, done := context.WithCancel(ctx)
	go func() { s.handlers.Wait(); done() }() // ends with the last handler
	<-ctx.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.links {
		l.Conn.Close()
	}
}

// A conn is what a front end reads from and writes to, inside TLS if there is any. The link below keeps the
// deadlines.
type conn struct {
	net.Conn
	unread []byte // what has been read already: Read begins with it
	link   *link
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.unread) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.unread)
	if c.unread = c.unread[n:]; len(c.unread) == 0 {
		c.unread = nil
	}
	return n, nil
}

// detect reads until the protocol is known. Read returns that again.
func (c *conn) detect() (protocol, error) {
	buf := make([]byte, 0, 512)
	for {
		n, err := c.Conn.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		c.unread = buf
		proto, ok := protocolOf(buf)
		switch {
		case ok:
			if proto == protoHTTP {
				c.link.idle = cmp.Or(c.link.idle, httpIdleTimeout)
			}
			c.link.hurry(0)
			return proto, nil
		case err != nil:
			return 0, err
		case len(buf) == n:
			c.link.hurry(firstLineTimeout)
		case len(buf) == cap(buf):
			buf = slices.Grow(buf, 3*cap(buf))
		}
	}
}

// protocolOf returns the protocol of a connection that begins with these bytes, once they suffice. Empty
// lines come before the first line in both protocols (RFC 9112 §2.2), and say nothing.
func protocolOf(begin []byte) (proto protocol, ok bool) {
	first := afterEmptyLines(begin[:min(len(begin), maxFirstLine)])
	if len(first) > 0 && (first[0] == '*' || first[0] == 0x16) || len(begin)-len(first) > maxEmptyLines {
		return protoRESP, true
	}
	line, _, whole := bytes.Cut(first, []byte("\n"))
	if !whole {
		return protoRESP, len(begin) > maxFirstLine
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	n := max(0, len(line)-1)
	http1 := bytes.HasSuffix(line[:n], []byte(" HTTP/1.")) && '0' <= line[n] && line[n] <= '9'
	if http1 || string(line) == "PRI * HTTP/2.0" {
		return protoHTTP, true
	}
	return protoRESP, true
}

// afterEmptyLines returns b without the empty lines that it begins with.
func afterEmptyLines(b []byte) []byte {
	for len(b) > 0 && b[0] == '\n' || len(b) > 1 && b[0] == '\r' && b[1] == '\n' {
		b = b[bytes.IndexByte(b, '\n')+1:]
	}
	return b
}

// CloseWrite ends the sending side, that of TLS first. net/http does so when it hangs up on a client that is
// still sending.
func (c *conn) CloseWrite() error {
	for _, side := range []net.Conn{c.Conn, c.link.Conn} {
		if half, ok := side.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	}
	return nil
}

// linger ends the sending side and reads on until the client has ended too, or for a moment: the last words
// would be lost if bytes that nobody has read were there at the end (RFC 9112 §9.6).
func (c *conn) linger() {
	c.CloseWrite()
	c.link.hurry(refuseTimeout)
	io.Copy(io.Discard, c.link)
	c.Close()
}

// A link is a client's connection as it was accepted, below TLS, with its deadlines.
type link struct {
	net.Conn
	server   *server
	refused  bool          // one too many
	idle     time.Duration // how long the client may be silent; 0: for ever
	readBy   time.Time     // the read deadline that is set for that
	hurried  bool          // the read deadline is that of hurry
	writeBy  time.Time     // the write deadline that is set
	closing  bool          // crypto/tls has set the write deadline, for its last words
	readsOn  bool          // no goroutine reads while one writes: Write may read on
	ahead    [][]byte      // what it has read; its capacity counts against the budget of requests
	held     hold          // of values on their way to the client
	released bool          // it may be read from after the server's stop; the server's lock guards it
}

// release exempts the connection from the server's stop: net/http ends those of HTTP/2 in its way.
func (l *link) release() {
	l.server.mu.Lock()
	defer l.server.mu.Unlock()
	l.released = true
	l.Conn.SetReadDeadline(time.Time{})
}

// SetReadDeadline sets the read deadline, but never later than the server's stop asks for.
func (l *link) SetReadDeadline(t time.Time) error {
	err := l.Conn.SetReadDeadline(t)
	// After, as stop may have set its own in between.
	if drain := l.server.draining.Load(); drain != nil && !l.released && (t.IsZero() || drain.Before(t)) {
		err = l.Conn.SetReadDeadline(*drain)
	}
	return err
}

// readFor sets the read deadline, 0 for none. A refused connection keeps its deadline.
func (l *link) readFor(d time.Duration) {
	var until time.Time
	if d > 0 {
		until = time.Now().Add(d)
	}
	if !l.refused {
		l.SetReadDeadline(until)
	}
}

// hurry gives the client a time to complete what it has begun to send; 0 ends that.
func (l *link) hurry(d time.Duration) {
	if d > 0 || l.hurried {
		l.hurried, l.readBy = d > 0, time.Time{}
		l.readFor(d)
	}
}

// Read fails when the client is silent for its idle time, or up to a quarter longer: a deadline costs as
// much as a short request, and is not set anew for each.
func (l *link) Read(p []byte) (int, error) {
	if len(l.ahead) > 0 {
		n, used := copy(p, l.ahead[0]), cap(l.ahead[0])
		if l.ahead[0] = l.ahead[0][n:]; len(l.ahead[0]) > 0 {
			used = n
		} else {
			l.ahead = l.ahead[1:]
		}
		l.server.requests.release("", used)
		return n, nil
	}
	if l.idle > 0 && !l.hurried {
		if now := time.Now(); l.readBy.Sub(now) < l.idle {
			l.readBy = now.Add(l.idle + l.idle/4)
			l.readFor(l.idle + l.idle/4)
		}
	}
	return l.Conn.Read(p)
}

// Write fails when the client takes no byte for the write time-out, or stallTime longer. It reads on
// meanwhile: the client may be one that sends all its requests before it takes the first reply.
func (l *link) Write(p []byte) (written int, err error) {
	slice := min(l.server.writeTimeout/8, stallTime)
	taken, most := time.Now(), math.MinInt
	for now := taken; ; now = time.Now() {
		if !l.closing && l.writeBy.Sub(now) < slice/2 {
			l.writeBy = now.Add(slice)
			if err := l.Conn.SetWriteDeadline(l.writeBy); err != nil {
				return written, err
			}
		}
		n, err := l.Conn.Write(p[written:])
		written += n
		if l.closing || !errors.Is(err, os.ErrDeadlineExceeded) {
			return written, err
		}
		if n := written - l.untaken(); n > most {
			most, taken = n, time.Now()
		} else if time.Since(taken) >= l.patience() {
			return written, err
		}
		for began := time.Now(); l.readsOn && l.readOn() && time.Since(began) < stallTime; {
		}
	}
}

// untaken returns how much of what was written the client's side has not acknowledged, where the system
// knows, else 0. Linux lets a writer go on only when a third of its buffer is free, long after the client took
// a byte (sk_stream_write_space).
func (l *link) untaken() int {
	n := int32(0)
	if c, ok := l.Conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
			})
		}
	}
	return int(n)
}

// patience returns how long the client may take nothing: a second if others have wanted room for values since
// the last were released, and it holds some.
func (l *link) patience() time.Duration {
	v := l.server.values
	v.mu.Lock()
	defer v.mu.Unlock()
	if l.held != (hold{}) && v.freed != nil {
		return min(l.server.writeTimeout, time.Second)
	}
	return l.server.writeTimeout
}

// readOn reads once what the client sends, for Read to return later, and reports whether anything came soon.
func (l *link) readOn() bool {
	buf := make([]byte, 512+min(len(l.ahead), 1)*(flushAt-512)) // most stalled clients send nothing
	if l.server.draining.Load() != nil || l.server.requests.hold("", cap(buf)) != nil {
		return false
	}
	l.hurry(stallTime / 16)
	n, _ := l.Conn.Read(buf)
	l.hurry(0)
	if n == 0 {
		l.server.requests.release("", cap(buf))
		return false
	}
	l.ahead = append(l.ahead, buf[:n])
	return true
}

// hold counts a value and more bytes on their way to the client until letGo, if they are more than flushAt. See
// budget.hold.
func (l *link) hold(value string, more int) (full <-chan struct{}) {
	if len(value)+more > flushAt {
		if full = l.server.values.hold(value, more); full == nil {
			l.held = hold{value, more}
		}
	}
	return full
}

// letGo ends the hold, if there is one.
func (l *link) letGo() {
	if l.held != (hold{}) {
		l.server.values.release(l.held.value, l.held.more)
		l.held = hold{}
	}
}

// SetWriteDeadline notes what net/http and crypto/tls set: the first clears the deadline after each answer,
// the second sets one for its last words.
func (l *link) SetWriteDeadline(t time.Time) error {
	l.writeBy, l.closing = t, !t.IsZero()
	return l.Conn.SetWriteDeadline(t)
}

func (l *link) Close() error {
	s := l.server
	s.mu.Lock()
	_, known := s.links[l]
	if delete(s.links, l); known && l.refused {
		s.refusing--
	}
	s.mu.Unlock()
	if known {
		s.log.Debug("closed", "client", l.RemoteAddr().String())
		l.letGo()
		for _, buf := range l.ahead {
			s.requests.release("", cap(buf))
		}
	}
	return l.Conn.Close()
}

// A budget bounds bytes over all clients. It is safe for concurrent use.
type budget struct {
	max int

	mu    sync.Mutex // guards the following
	used  int
	held  map[*byte]int // how many hold the value that begins there
	freed chan struct{} // closed when bytes come back; nil unless they were wanted
}

// A hold is a value and other bytes that a budget counts.
type hold struct {
	value string
	more  int
}

func newBudget(max int) *budget { return &budget{max: max, held: make(map[*byte]int)} }

// hold counts a value and more bytes until release, and returns nil. Several holds of one value count once.
// If there is no room, hold returns what is closed when there may be. In a budget half empty there is room for
// any value.
func (b *budget) hold(value string, more int) (full <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, id := len(value)+more, unsafe.StringData(value)
	if value != "" && b.held[id] > 0 {
		n = 0
	}
	if n > 0 && b.used+n > b.max && b.used > b.max/2 {
		if b.freed == nil {
			b.freed = make(chan struct{})
		}
		return b.freed
	}
	b.used += n
	if value != "" {
		b.held[id]++
	}
	return nil
}

// release ends a hold.
func (b *budget) release(value string, more int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if id := unsafe.StringData(value); value != "" {
		if b.held[id]--; b.held[id] > 0 {
			return
		}
		delete(b.held, id)
	}
	b.used -= len(value) + more
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
}

// A password is what clients must present, if there is one. It is safe for concurrent use.
type password struct {
	digest [sha256.Size]byte
	needed bool
	denied atomic.Int64 // wrong passwords and users
}

func newPassword(s string) *password {
	return &password{digest: sha256.Sum256([]byte(s)), needed: s != ""}
}

// matches reports whether s is the password. It takes the same time for every wrong one.
func (p *password) matches(s []byte) bool {
	digest := sha256.Sum256(s)
	if subtle.ConstantTimeCompare(p.digest[:], digest[:]) == 1 {
		return true
	}
	p.denied.Add(1)
	return false
}

// A certificate is read again with a handshake, once a second at most, as its files may change. It is safe for
// concurrent use.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	current           atomic.Pointer[tls.Certificate]
	problem           atomic.Value // the last failure's text; the same is logged once
	looked            atomic.Int64 // when the files were read last, in Unix time
}

// newCertificate returns the certificate that the flags --OF-cert and --OF-key name, or nil if they are unset.
func newCertificate(of, certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	if certFile == "" && keyFile == "" {
		return nil, nil
	}
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	first, err := tls.LoadX509KeyPair(certFile, keyFile)
	if certFile == "" || keyFile == "" {
		err = errors.New("both must be given, or neither")
	}
	if err != nil {
		return nil, fmt.Errorf("--%s-cert %q, --%s-key %q: %w", of, certFile, of, keyFile, err)
	}
	c.current.Store(&first)
	return c, nil
}

// get returns the certificate for a handshake.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	old, now := c.current.Load(), time.Now().Unix()
	if c.looked.Swap(now) == now {
		return old, nil
	}
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		if c.problem.Swap(err.Error()) != err.Error() {
			c.log.Warn("the certificate was not renewed; the old one goes on", "error", err)
		}
		return old, nil
	}
	c.problem.Store("")
	if !slices.EqualFunc(cert.Certificate, old.Certificate, bytes.Equal) && c.current.CompareAndSwap(old, &cert) {
		c.log.Info("the certificate was renewed", "expires", cert.Leaf.NotAfter)
	}
	return c.current.Load(), nil
}
