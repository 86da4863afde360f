// The listener: accept, tell the protocol from the first line, hand over, drain.
//
// The protocol of a connection is decided once, and looking consumes nothing: whoever gets the
// connection reads it from the first byte. Every connection is looked at by its own goroutine, so that
// a slow one delays nobody.
package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"
)

const (
	// firstLineTimeout is how long a client may take for its first line once it has begun.
	firstLineTimeout = 10 * time.Second
	// maxFirstLine is the longest first line that is looked at. Longer ones are left to RESP, where
	// this is the limit of an inline request, to refuse.
	maxFirstLine = 64 << 10
	// writeTimeout is how long a client may not take a byte of its replies.
	writeTimeout = 30 * time.Second
	// quiet is how much longer clients are read from when the server stops: what they have sent by
	// then is answered.
	quiet = 100 * time.Millisecond
)

// A server accepts connections and hands them to the front end of their protocol.
type server struct {
	listener  net.Listener
	log       *slog.Logger
	serveRESP func(net.Conn) // returns when the connection is done with
	serveHTTP func(net.Conn) // takes the connection over

	detecting, serving sync.WaitGroup

	mu       sync.Mutex // guards the following
	conns    map[*conn]struct{}
	draining time.Time // until when clients are read from; zero until the server stops
}

func newServer(l net.Listener, log *slog.Logger, serveRESP, serveHTTP func(net.Conn)) *server {
	return &server{listener: l, log: log, serveRESP: serveRESP, serveHTTP: serveHTTP, conns: make(map[*conn]struct{})}
}

// run accepts until stop.
func (s *server) run() {
	var pause time.Duration
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
			c := &conn{Conn: nc, server: s}
			if s.add(c) {
				go s.handle(c) // ends with the connection, which stop and wait see to
			} else {
				nc.Close()
			}
		}
	}
}

// add registers a connection, unless the server has stopped.
func (s *server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.draining.IsZero() {
		return false
	}
	s.conns[c] = struct{}{}
	s.detecting.Add(1)
	s.serving.Add(1)
	return true
}

func (s *server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// clients tells how many connections there are.
func (s *server) clients() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// handle finds out the protocol of a connection and has it served.
func (s *server) handle(c *conn) {
	defer s.serving.Done()
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic; its connection is closed", "client", c.RemoteAddr(), "panic", r, "stack", string(debug.Stack()))
			c.Close()
		}
	}()
	proto, err := func() (protocol, error) {
		defer s.detecting.Done()
		proto, err := c.detect()
		if err == nil && proto == protoHTTP {
			s.release(c)
			s.serveHTTP(c)
		}
		return proto, err
	}()
	if err == nil && proto == protoHTTP {
		return
	}
	defer c.Close()
	if err == nil {
		s.serveRESP(c)
	}
}

// release leaves a connection's deadlines to net/http.
func (s *server) release(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.released = true
	c.SetReadDeadline(time.Time{})
}

// stop ends accepting. It returns when every connection has found its front end or is closed; those
// that are served here are read from for a moment longer.
func (s *server) stop() {
	s.mu.Lock()
	s.draining = time.Now().Add(quiet)
	for c := range s.conns {
		if !c.released {
			c.SetReadDeadline(s.draining)
		}
	}
	s.mu.Unlock()
	s.listener.Close()
	s.detecting.Wait()
}

// wait returns when no connection is left, or ctx is done and it has cut them off.
func (s *server) wait(ctx context.Context) {
	cut := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.Conn.Close()
		}
	})
	defer cut()
	s.serving.Wait()
}

// A conn is a client's connection.
type conn struct {
	net.Conn
	server   *server
	unread   []byte    // what detection has read and nobody has consumed; Read begins with it
	writeBy  time.Time // the write deadline that is set
	released bool      // net/http sets the read deadlines; the server's lock guards it
}

// detect waits for the first line and tells which protocol it is of.
func (c *conn) detect() (protocol, error) {
	line := make([]byte, 0, 512)
	for {
		n, err := c.Conn.Read(line[len(line):cap(line)])
		began := len(line) == 0 && n > 0
		line = line[:len(line)+n]
		c.unread = line
		if proto, ok := protocolOf(line); ok {
			return proto, c.setReadDeadline(time.Time{})
		}
		if err != nil {
			return 0, err
		}
		if began {
			if err := c.setReadDeadline(time.Now().Add(firstLineTimeout)); err != nil {
				return 0, err
			}
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
	line, _, whole := bytes.Cut(begin, []byte("\n"))
	if !whole {
		return protoRESP, len(begin) > maxFirstLine
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	if string(line) == "PRI * HTTP/2.0" {
		return protoHTTP, true
	}
	if n := len(line) - 1; n > 0 && bytes.HasSuffix(line[:n], []byte(" HTTP/1.")) && '0' <= line[n] && line[n] <= '9' {
		return protoHTTP, true
	}
	return protoRESP, true
}

// setReadDeadline sets a deadline, which the server's stop may only shorten.
func (c *conn) setReadDeadline(t time.Time) error {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if d := c.server.draining; !d.IsZero() && (t.IsZero() || d.Before(t)) {
		t = d
	}
	return c.SetReadDeadline(t)
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		if c.unread = c.unread[n:]; len(c.unread) == 0 {
			c.unread = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// Write fails when the client takes nothing for the write timeout, or up to a third longer: a deadline
// costs as much as a short reply, and is not set anew for each.
func (c *conn) Write(p []byte) (written int, err error) {
	for {
		if now := time.Now(); c.writeBy.Sub(now) < writeTimeout {
			c.writeBy = now.Add(writeTimeout + writeTimeout/3)
			if err := c.SetWriteDeadline(c.writeBy); err != nil {
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

func (c *conn) Close() error {
	c.server.remove(c)
	return c.Conn.Close()
}
