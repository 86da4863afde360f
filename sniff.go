// The listener: accept, tell the protocol from the first line, hand over, drain.
//
// The protocol of a connection is decided once, and looking consumes nothing: whoever gets the
// connection reads it from the first byte. Every connection is looked at by its own goroutine, so that
// a slow one delays nobody.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstLineTimeout is how long a client may take for its first line once it has begun.
	firstLineTimeout = 10 * time.Second
	// maxFirstLine is the longest first line that is looked at. Longer ones are left to RESP, where
	// this is the limit of an inline request, to refuse.
	maxFirstLine = 64 << 10
	// maxRefusing bounds the connections that are told that there are too many clients; more than these
	// are closed without a word. refuseTimeout is how long each has to show its protocol.
	maxRefusing   = 100
	refuseTimeout = time.Second
	// quiet is how much longer clients are read from when the server stops: what they have sent by
	// then is answered.
	quiet = 100 * time.Millisecond
)

// A server accepts connections and hands them to the front end of their protocol.
type server struct {
	listener  net.Listener
	cfg       config
	log       *slog.Logger
	frontEnds [len(protocols)]frontEnd

	handlers sync.WaitGroup
	draining atomic.Pointer[time.Time] // until when clients are read from; nil until stop

	mu       sync.Mutex // guards the following, and released of a connection
	conns    map[*conn]struct{}
	refusing int // how many connections too many are being told so
	counts   clientCounts
}

func newServer(l net.Listener, cfg config, log *slog.Logger, frontEnds [len(protocols)]frontEnd) *server {
	return &server{listener: l, cfg: cfg, log: log, frontEnds: frontEnds, conns: make(map[*conn]struct{})}
}

// run accepts until stop.
func (s *server) run() {
	var pause time.Duration
	most := 1000 // clients at once, rounded up; the first thousand need little
	for {
		nc, err := s.listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // out of descriptors, most likely: others may close some
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Warn("accepting a connection", "error", err, "pause", pause)
			time.Sleep(pause)
		default:
			pause = 0
			s.admit(&conn{Conn: nc, server: s})
			if s.cfg.grown != nil && s.clients().now > most {
				most += 1000
				s.cfg.grown(most)
			}
		}
	}
}

// admit starts to handle a connection, or to refuse it.
func (s *server) admit(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full := len(s.conns)-s.refusing >= s.cfg.maxClients
	if full {
		s.counts.refused++
	} else {
		s.counts.accepted++
	}
	if s.draining.Load() != nil || full && s.refusing >= maxRefusing {
		c.Conn.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.handlers.Add(1)
	if full {
		s.refusing++
		c.refused = true
		c.Conn.SetReadDeadline(time.Now().Add(refuseTimeout))
	}
	go s.handle(c) // ends with the connection, which stop and wait see to
}

// remove forgets a connection, and tells whether it was known.
func (s *server) remove(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known := s.conns[c]
	if known && c.refused {
		s.refusing--
	}
	delete(s.conns, c)
	return known
}

func (s *server) clients() clientCounts {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := s.counts
	counts.now = len(s.conns) - s.refusing
	return counts
}

// handle finds out the protocol of a connection and hands it to its front end.
func (s *server) handle(c *conn) {
	defer s.handlers.Done()
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic; its connection is closed", "client", c.RemoteAddr().String(), "panic", r, "stack", string(debug.Stack()))
			c.Close()
		}
	}()
	client := c.RemoteAddr().String()
	proto, nc, err := s.protocol(c)
	if err != nil {
		s.log.Debug("closed before its protocol was known", "client", client, "error", err)
		c.Close()
		return
	}
	s.log.Debug("connected", "client", client, "protocol", protocols[proto], "refused", c.refused)
	if c.refused {
		s.frontEnds[proto].refuse(nc)
	} else {
		s.frontEnds[proto].serve(nc)
	}
}

// protocol finds out what a connection speaks, and takes off TLS.
func (s *server) protocol(c *conn) (protocol, net.Conn, error) {
	if s.cfg.tls == nil {
		proto, err := c.detect(protocolOf)
		return proto, c, err
	}
	if _, err := c.detect(func(begin []byte) (protocol, bool) { return 0, len(begin) > 0 }); err != nil {
		return 0, nil, err
	}
	if c.unread[0] != 0x16 { // a handshake (RFC 8446 §5.1)
		return 0, nil, errors.New("no TLS")
	}
	t := tls.Server(c, s.cfg.tls)
	c.idle = 0
	c.readFor(firstLineTimeout)
	if err := t.Handshake(); err != nil {
		return 0, nil, err
	}
	if t.ConnectionState().NegotiatedProtocol == "h2" && !c.refused { // for which net/http wants the tls.Conn itself
		c.release(nil)
		return protoHTTP, t, nil
	}
	inner := &conn{Conn: t, server: s, refused: c.refused}
	proto, err := inner.detect(protocolOf)
	return proto, inner, err
}

// stop ends accepting, and reading a moment later: what has been read by then is answered.
func (s *server) stop() {
	until := time.Now().Add(quiet)
	s.draining.Store(&until)
	s.listener.Close()
	s.mu.Lock()
	for c := range s.conns {
		if !c.released {
			c.Conn.SetReadDeadline(until)
		}
	}
	s.mu.Unlock()
	time.Sleep(quiet)
}

// wait returns when no handler is left, or when ctx is done: then it cuts off their connections.
func (s *server) wait(ctx context.Context) {
	done := make(chan struct{})
	go func() { s.handlers.Wait(); close(done) }() // ends with the last handler
	select {
	case <-done:
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.Conn.Close()
		}
	}
}

// A conn is a client's connection.
type conn struct {
	net.Conn
	server   *server
	refused  bool          // one too many
	unread   []byte        // what detection has read and nobody has consumed; Read begins with it
	idle     time.Duration // how long the client may be silent; 0: for ever
	readBy   time.Time     // the read deadline that is set for that
	writeBy  time.Time     // the write deadline that is set
	last     bool          // crypto/tls has set it, for its last words
	released bool          // net/http sets the read deadlines; the server's lock guards it
}

// release leaves the read deadlines to whoever has the connection now, and gives back what was read too
// much: it is read again.
func (c *conn) release(unread []byte) {
	c.unread, c.idle = slices.Concat(unread, c.unread), 0
	if outer, ok := c.Conn.(*tls.Conn); ok {
		outer.NetConn().(*conn).release(nil)
		return
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.released = true
	c.Conn.SetReadDeadline(time.Time{})
}

// detect reads until decide can tell the protocol from what has come.
func (c *conn) detect(decide func([]byte) (protocol, bool)) (protocol, error) {
	c.readFor(c.server.cfg.idleTimeout)
	line := make([]byte, 0, 512)
	for {
		n, err := c.Conn.Read(line[len(line):cap(line)])
		if len(line) == 0 && n > 0 {
			c.readFor(firstLineTimeout)
		}
		line = line[:len(line)+n]
		c.unread = line
		if proto, ok := decide(line); ok {
			c.readFor(0)
			if c.idle = c.server.cfg.idleTimeout; c.idle == 0 && proto == protoHTTP {
				c.idle = httpIdleTimeout
			}
			return proto, nil
		}
		if err != nil {
			return 0, err
		}
		if len(line) == cap(line) {
			line = append(make([]byte, 0, 4*cap(line)), line...)
		}
	}
}

// protocolOf tells the protocol of a connection that begins with these bytes, once they suffice.
func protocolOf(begin []byte) (proto protocol, ok bool) {
	if len(begin) == 0 {
		return 0, false
	}
	if begin[0] == '*' {
		return protoRESP, true
	}
	line, _, whole := bytes.Cut(begin[:min(len(begin), maxFirstLine)], []byte("\n"))
	if !whole {
		return protoRESP, len(begin) > maxFirstLine
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	n := len(line) - 1
	http1 := n > 0 && bytes.HasSuffix(line[:n], []byte(" HTTP/1.")) && '0' <= line[n] && line[n] <= '9'
	if http1 || string(line) == "PRI * HTTP/2.0" {
		return protoHTTP, true
	}
	return protoRESP, true
}

// readFor sets the read deadline, 0 for none, and never later than the server's stop asks for. One too many
// keeps the deadline that it has.
func (c *conn) readFor(d time.Duration) {
	if c.refused {
		return
	}
	var until time.Time
	if d > 0 {
		until = time.Now().Add(d)
	}
	c.Conn.SetReadDeadline(until)
	// After, as stop may have set its own in between.
	if drain := c.server.draining.Load(); drain != nil && (d == 0 || drain.Before(until)) {
		c.Conn.SetReadDeadline(*drain)
	}
}

// Read begins with what detection has read. It fails when the client is silent for its idle time, or up
// to a quarter longer; see Write.
func (c *conn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		if c.unread = c.unread[n:]; len(c.unread) == 0 {
			c.unread = nil
		}
		return n, nil
	}
	if c.idle > 0 {
		if now := time.Now(); c.readBy.Sub(now) < c.idle {
			c.readBy = now.Add(c.idle + c.idle/4)
			c.readFor(c.idle + c.idle/4)
		}
	}
	return c.Conn.Read(p)
}

// Write fails when the client takes nothing for the write timeout, or up to a third longer: a deadline
// costs as much as a short reply, and is not set anew for each.
func (c *conn) Write(p []byte) (written int, err error) {
	if _, inner := c.Conn.(*tls.Conn); inner {
		return c.Conn.Write(p) // to another conn, which sees to the deadlines
	}
	for {
		if now, stuck := time.Now(), c.server.cfg.writeTimeout; !c.last && c.writeBy.Sub(now) < stuck {
			c.writeBy = now.Add(stuck + stuck/3)
			if err := c.Conn.SetWriteDeadline(c.writeBy); err != nil {
				return written, err
			}
		}
		n, err := c.Conn.Write(p[written:])
		written += n
		if n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return written, err
		}
	}
}

// SetWriteDeadline takes note of what net/http and crypto/tls set: the one clears the deadline after each
// answer, the other sets one to say goodbye.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.writeBy, c.last = t, !t.IsZero()
	return c.Conn.SetWriteDeadline(t)
}

// CloseWrite lets net/http say goodbye before it hangs up on a client that is still sending.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (c *conn) Close() error {
	if c.server.remove(c) {
		c.server.log.Debug("closed", "client", c.RemoteAddr().String())
	}
	return c.Conn.Close()
}

// tlsConfig serves with a certificate that is read again when its files change.
func tlsConfig(certFile, keyFile string, log *slog.Logger) (*tls.Config, error) {
	var mu sync.Mutex // guards the following; held while the files are read, so that they are read once
	var cert *tls.Certificate
	var read [2]os.FileInfo
	var failed time.Time // the last attempt, if it was one
	load := func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		changed := false
		for i, name := range []string{certFile, keyFile} {
			now, err := os.Stat(name)
			if was := read[i]; err == nil && (was == nil || !os.SameFile(was, now) || was.ModTime() != now.ModTime() || was.Size() != now.Size()) {
				read[i], changed = now, true
			}
		}
		if !changed && cert != nil && (failed.IsZero() || time.Since(failed) < time.Minute) {
			return cert, nil
		}
		failed = time.Time{}
		renewed, err := tls.LoadX509KeyPair(certFile, keyFile)
		switch {
		case err == nil && cert != nil:
			log.Info("the certificate was renewed", "expires", renewed.Leaf.NotAfter)
			fallthrough
		case err == nil:
			cert = &renewed
		case cert != nil: // one of the two files is not replaced yet, perhaps
			failed = time.Now()
			log.Warn("the certificate was not renewed; the old one goes on", "error", err)
		default:
			return nil, fmt.Errorf("--tls-cert %q, --tls-key %q: %w", certFile, keyFile, err)
		}
		return cert, nil
	}
	_, err := load(nil)
	return &tls.Config{GetCertificate: load, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1", "http/1.0"}}, err
}
