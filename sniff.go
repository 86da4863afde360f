// The listener: accept, find the protocol in the first line, hand over, drain.
//
// The protocol of a connection is decided once, and looking consumes nothing: the front end that
// gets the connection reads it from the first byte. Each connection is looked at by a goroutine of
// its own, so that a slow one delays nobody.
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
	// requestTimeout is how long a client may take, from the first byte on, for each of: a TLS
	// handshake, its first line, the header of an HTTP/1 request, a RESP request.
	requestTimeout = 10 * time.Second
	// httpIdleTimeout is how long an HTTP connection is kept alive if the settings do not say.
	httpIdleTimeout = 2 * time.Minute
	// maxFirstLine is the longest first line that is looked at, and maxEmptyLines bounds the bytes
	// of empty lines before it. A longer line goes to RESP, which refuses it; more empty lines go
	// to RESP, which skips them.
	maxFirstLine  = 64 << 10
	maxEmptyLines = 64
	// maxRefusing bounds the connections that are being told that there are too many clients; more
	// than these are closed without a word. refuseTimeout is how long each may be silent, and
	// linger reads.
	maxRefusing   = 100
	refuseTimeout = time.Second
	// drainTime is how long the server goes on reading after stop. Requests complete by then are
	// answered.
	drainTime = 100 * time.Millisecond
	// stallTime is after how long a client counts as one that takes nothing of its replies for now.
	stallTime = 250 * time.Millisecond
	// sendBuffer is the size of a socket's send buffer that is asked for; Linux doubles it. By
	// default a buffer grows to megabytes, and with many clients that data leaves the processor's
	// cache before it is sent.
	sendBuffer = 256 << 10
	// flushAt is how many bytes of answers are gathered before they are written.
	flushAt = 16 << 10
)

// serverSettings are what the flags say about client connections.
type serverSettings struct {
	maxClients   int
	idleTimeout  time.Duration // how long a client may be silent; 0: for ever, over HTTP httpIdleTimeout
	writeTimeout time.Duration // how long a client may take nothing of its replies
	tls          *tls.Config   // nil: no TLS
	grown        func(int)     // is called with the number of connections when there is one more
	requests     *budget       // what clients have sent that is not answered, beyond a buffer for each
	values       *budget       // values on their way to clients, where they are more than a client's buffer
}

// A protocol is what a connection speaks.
type protocol string

const (
	protoHTTP protocol = "http"
	protoRESP protocol = "resp"
)

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
	frontEnds map[protocol]frontEnd

	handlers  sync.WaitGroup
	readUntil atomic.Pointer[time.Time] // when reading from clients ends; nil until stop

	mu       sync.Mutex // guards the following, and exempt of a link
	links    map[*link]struct{}
	refusing int // links that are one too many
	accepted int
	refused  int
}

func newServer(l net.Listener, s serverSettings, log *slog.Logger, frontEnds map[protocol]frontEnd) *server {
	return &server{serverSettings: s, listener: l, log: log, frontEnds: frontEnds, links: make(map[*link]struct{})}
}

// run accepts until stop.
func (s *server) run() {
	for {
		nc, err := s.listener.Accept()
		switch {
		case err == nil:
			if c, ok := nc.(interface{ SetWriteBuffer(int) error }); ok {
				c.SetWriteBuffer(sendBuffer)
			}
			s.add(&link{Conn: nc, server: s, idle: s.idleTimeout})
		case errors.Is(err, net.ErrClosed):
			return
		default: // out of descriptors, most likely: other connections may end
			s.log.Warn("accepting a connection", "error", err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// add starts to handle a connection, or to refuse it.
func (s *server) add(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clients := len(s.links) - s.refusing
	l.refused = clients >= s.maxClients
	switch {
	case s.readUntil.Load() != nil || l.refused && s.refusing >= maxRefusing:
		s.refused++
		l.Conn.Close()
		return
	case l.refused:
		s.refused++
		s.refusing++
		l.idle = refuseTimeout
	default:
		s.accepted++
	}
	s.links[l] = struct{}{}
	s.grown(len(s.links))
	s.handlers.Go(func() { s.handle(l) }) // ends at the hand-over or with the connection, which stop and wait see to
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
	s.log.Debug("connected", "client", client, "protocol", proto, "refused", l.refused, "error", err)
	switch {
	case err != nil:
		l.Close()
	case l.refused:
		s.frontEnds[proto].refuse(c)
		c.linger(refuseTimeout)
	default:
		s.frontEnds[proto].serve(c)
	}
}

// protocol finds out what a connection speaks, and takes off TLS.
func (s *server) protocol(c *conn) (protocol, error) {
	proto, err := c.detect()
	if err == nil && (c.unread[0] == 0x16) != (s.tls != nil) { // a handshake (RFC 8446 §5.1)
		err = errors.New("TLS on a plain port, or plaintext on a TLS port")
	}
	if err != nil || s.tls == nil {
		return proto, err
	}
	outer := *c
	inner := tls.Server(&outer, s.tls)
	c.link.hurry(requestTimeout)
	if err := inner.Handshake(); err != nil {
		return "", err
	}
	c.link.hurry(0)
	c.Conn, c.unread = inner, nil
	proto, err = c.detect()
	if err == nil && inner.ConnectionState().NegotiatedProtocol == "h2" && !bytes.HasPrefix(c.unread, []byte("PRI")) {
		err = errors.New("HTTP/2 was agreed on, and this is something else")
	}
	return proto, err
}

// stop ends accepting at once, and reading after drainTime.
func (s *server) stop() {
	until := time.Now().Add(drainTime)
	s.readUntil.Store(&until)
	s.listener.Close()
	s.mu.Lock()
	for l := range s.links {
		if !l.exempt {
			l.Conn.SetReadDeadline(until)
		}
	}
	s.mu.Unlock()
	time.Sleep(drainTime)
}

// wait returns when no handler is left, or when ctx is done.
func (s *server) wait(ctx context.Context) {
	ctx, done := context.WithCancel(ctx)
	go func() { s.handlers.Wait(); done() }() // ends with the last handler
	<-ctx.Done()
}

// cut closes the connections that there are.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.links {
		l.Conn.Close()
	}
}

// A conn is what a front end reads from and writes to, inside TLS if there is any. The link below
// keeps the deadlines.
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

// WriteString writes s without a copy.
func (c *conn) WriteString(s string) (int, error) {
	return c.Write(unsafe.Slice(unsafe.StringData(s), len(s)))
}

var errTooMuchSent = errors.New("too much of all clients' requests is unanswered")

// detect reads until the protocol is known. Read returns that again.
func (c *conn) detect() (protocol, error) {
	held := 0 // of the budget of requests
	defer func() { c.link.server.requests.release("", held) }()
	for {
		begun := len(c.unread)
		c.unread = slices.Grow(c.unread, 512)
		if more := cap(c.unread) - maxFirstLine/16 - held; more > 0 {
			if c.link.server.requests.hold("", more) != nil {
				return "", errTooMuchSent
			}
			held += more
		}
		n, err := c.Conn.Read(c.unread[begun:cap(c.unread)])
		c.unread = c.unread[:begun+n]
		proto, ok := protocolOf(c.unread)
		switch {
		case ok:
			if proto == protoHTTP {
				c.link.idle = cmp.Or(c.link.idle, httpIdleTimeout)
			}
			c.link.hurry(0)
			return proto, nil
		case err != nil:
			return "", err
		case begun == 0:
			c.link.hurry(requestTimeout)
		}
	}
}

// protocolOf returns the protocol of a connection that begins with these bytes, once they suffice.
// Empty lines come before the first line in both protocols (RFC 9112 §2.2), and say nothing.
func protocolOf(begin []byte) (proto protocol, ok bool) {
	first := afterEmptyLines(begin[:min(len(begin), maxFirstLine)])
	line, _, whole := bytes.Cut(first, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	minor := max(0, len(line)-1)
	switch {
	case len(first) > 0 && (first[0] == '*' || first[0] == 0x16) || len(begin)-len(first) > maxEmptyLines:
		return protoRESP, true
	case whole && string(line) == "PRI * HTTP/2.0":
		return protoHTTP, len(first) >= len(preface)
	case whole && bytes.HasSuffix(line[:minor], []byte(" HTTP/1.")) && '0' <= line[minor] && line[minor] <= '9':
		return protoHTTP, true
	}
	return protoRESP, whole || len(begin) > maxFirstLine
}

// preface begins a connection of HTTP/2 (RFC 9113 §3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// afterEmptyLines returns b without the empty lines that it begins with.
func afterEmptyLines(b []byte) []byte {
	for len(b) > 0 && b[0] == '\n' || len(b) > 1 && b[0] == '\r' && b[1] == '\n' {
		b = b[bytes.IndexByte(b, '\n')+1:]
	}
	return b
}

// CloseWrite ends the sending side, that of TLS first. net/http does so when it hangs up on a
// client that is still sending.
func (c *conn) CloseWrite() error {
	for _, side := range []net.Conn{c.Conn, c.link.Conn} {
		if half, ok := side.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	}
	return nil
}

// linger ends the sending side and reads on until the client has ended too, or for d: the last words
// would be lost if bytes that nobody has read were there at the end (RFC 9112 §9.6).
func (c *conn) linger(d time.Duration) {
	c.link.exemptFromStop()
	c.CloseWrite()
	c.link.hurry(d)
	io.Copy(io.Discard, c.link)
	c.Close()
}

// A link is a client's connection as it was accepted, below TLS, with its deadlines.
type link struct {
	net.Conn
	server  *server
	refused bool          // one too many
	idle    time.Duration // how long the client may be silent; 0: for ever
	readBy  time.Time     // the read deadline that Read or hurry set last
	hurried bool          // hurry set it
	writeBy time.Time     // the write deadline that Write set last
	readsOn bool          // no goroutine reads while one writes: Write may read on
	ahead   [][]byte      // what Write has read; its capacity counts against the budget of requests
	release func()        // ends the hold of values on their way to the client; nil: there is none
	exempt  bool          // stop does not end reading; set before a read, by the goroutine that reads
}

// exemptFromStop is for HTTP/2, whose connections net/http ends itself in web.shutdown, and for the
// end of others.
func (l *link) exemptFromStop() {
	l.server.mu.Lock()
	defer l.server.mu.Unlock()
	l.exempt = true
	l.Conn.SetReadDeadline(time.Time{})
}

// SetReadDeadline sets the read deadline, or that of the server's stop once that has begun, unless
// the link is exempt.
func (l *link) SetReadDeadline(t time.Time) error {
	err := l.Conn.SetReadDeadline(t)
	// This comes after it, as stop may have set its own in between.
	if until := l.server.readUntil.Load(); until != nil && !l.exempt {
		err = l.Conn.SetReadDeadline(*until)
	}
	return err
}

// hurry sets a read deadline d from now, which Read does not move. With 0 it removes that, and the
// idle time-out is in force again.
func (l *link) hurry(d time.Duration) {
	var until time.Time
	if l.refused {
		d = min(d, refuseTimeout)
	}
	if d > 0 {
		until = time.Now().Add(d)
	}
	if d > 0 || l.hurried {
		l.hurried, l.readBy = d > 0, until
		l.SetReadDeadline(until)
	}
}

// Read fails when the client is silent for its idle time, or up to a quarter longer: a deadline
// costs as much as a short request, and is not set anew for each. It leaves the deadline to hurry
// while that is in force, and sets none where idle is 0.
func (l *link) Read(p []byte) (int, error) {
	if len(l.ahead) > 0 {
		n := copy(p, l.ahead[0])
		used := n
		if l.ahead[0] = l.ahead[0][n:]; len(l.ahead[0]) == 0 {
			used += cap(l.ahead[0])
			l.ahead = l.ahead[1:]
		}
		l.server.requests.release("", used)
		return n, nil
	}
	if l.idle > 0 && !l.hurried {
		if now := time.Now(); l.readBy.Sub(now) < l.idle {
			l.readBy = now.Add(l.idle + l.idle/4)
			l.SetReadDeadline(l.readBy)
		}
	}
	return l.Conn.Read(p)
}

// Write fails when the client takes no byte for as long as patience allows, or stallTime longer.
// Over RESP it reads on meanwhile: the client may be one that sends all its requests before it
// takes a reply.
func (l *link) Write(p []byte) (written int, err error) {
	taken, most := time.Now(), math.MinInt
	for now := taken; ; now = time.Now() {
		if l.writeBy.Sub(now) < stallTime/2 {
			l.writeBy = now.Add(stallTime)
			l.Conn.SetWriteDeadline(l.writeBy)
		}
		n, err := l.Conn.Write(p[written:])
		written += n
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return written, err
		}
		if n := written - l.untaken(); n > most {
			most, taken = n, time.Now()
		} else if time.Since(taken) >= l.patience() {
			l.Conn.Close() // or crypto/tls would wait as long with its last words
			return written, err
		}
		for began := time.Now(); l.readsOn && l.readOn() && time.Since(began) < stallTime; {
		}
	}
}

// untaken returns how much of what was written the client's side has not acknowledged, where the
// system knows, else 0. Linux lets a writer go on only when a third of its buffer is free, long
// after the client took a byte (sk_stream_write_space).
func (l *link) untaken() int {
	n := int32(0)
	if c, ok := l.Conn.(syscall.Conn); ok {
		raw, _ := c.SyscallConn() // does not fail
		raw.Control(func(fd uintptr) {
			syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
		})
	}
	return int(n)
}

// patience returns how long the client may take nothing: the write time-out, but a second if it
// holds values and others wait for room.
func (l *link) patience() time.Duration {
	v := l.server.values
	v.mu.Lock()
	defer v.mu.Unlock()
	if l.release != nil && v.freed != nil {
		return min(l.server.writeTimeout, time.Second)
	}
	return l.server.writeTimeout
}

// readOn reads once what the client sends, for Read to return later, and reports whether any came
// soon.
func (l *link) readOn() bool {
	buf := make([]byte, 512+min(len(l.ahead), 1)*(flushAt-512)) // most stalled clients send nothing
	if l.server.requests.hold("", cap(buf)) != nil {
		return false
	}
	l.hurry(stallTime / 16)
	n, _ := l.Conn.Read(buf)
	l.hurry(0)
	if n == 0 {
		l.server.requests.release("", cap(buf))
	} else {
		l.ahead = append(l.ahead, buf[:n])
	}
	return n > 0
}

// hold counts a value and more bytes on their way to the client until letGo, if they are more than
// flushAt. See budget.hold.
func (l *link) hold(value string, more int) (full <-chan struct{}) {
	if len(value)+more > flushAt {
		if full = l.server.values.hold(value, more); full == nil {
			l.release = func() { l.server.values.release(value, more) }
		}
	}
	return full
}

// letGo ends the hold, if there is one.
func (l *link) letGo() {
	if l.release != nil {
		l.release()
		l.release = nil
	}
}

// SetWriteDeadline leaves the write deadline to Write.
func (l *link) SetWriteDeadline(time.Time) error { return nil }

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

func newBudget(max int) *budget { return &budget{max: max, held: make(map[*byte]int)} }

// hold counts a value and more bytes until release, and returns nil. Several holds of one value
// count once. If there is no room, hold returns what is closed when there may be. In a budget half
// empty there is room for any value.
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

// newCertificate returns a source of the certificate that the flags --OF-cert and --OF-key name, or
// nil if they are unset. It reads the files again every two seconds at most, as they may change.
func newCertificate[Hello any](of, certFile, keyFile string, log *slog.Logger) (
	get func(*Hello) (*tls.Certificate, error), err error) {
	if certFile == "" && keyFile == "" {
		return nil, nil
	}
	first, err := tls.LoadX509KeyPair(certFile, keyFile)
	if certFile == "" || keyFile == "" {
		err = errors.New("both must be given, or neither")
	}
	if err != nil {
		return nil, fmt.Errorf("--%s-cert %q, --%s-key %q: %w", of, certFile, of, keyFile, err)
	}
	var current atomic.Pointer[tls.Certificate]
	var looked atomic.Int64  // when the files were read last
	var problem atomic.Value // what was wrong with them then, which is logged once
	current.Store(&first)
	return func(*Hello) (*tls.Certificate, error) {
		if now := time.Now().Unix() / 2; looked.Swap(now) != now {
			renewed, err := tls.LoadX509KeyPair(certFile, keyFile)
			text := fmt.Sprint(err)
			if before := problem.Swap(text); err != nil && before != text {
				log.Warn("the certificate was not renewed; the old one goes on", "error", err)
			} else if err == nil && !renewed.Leaf.Equal(current.Swap(&renewed).Leaf) {
				log.Info("the certificate was renewed", "expires", renewed.Leaf.NotAfter)
			}
		}
		return current.Load(), nil
	}, nil
}
