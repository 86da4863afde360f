// HTTP: the key from the path, the answer and its header.
//
// net/http reads, frames and times requests, but for ordinary ones over HTTP/1, which quick answers alike. RFC
// 9110 (semantics), RFC 9111 (caching) and RFC 9211 (Cache-Status) say what goes into the answers.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
	"unsafe"
)

const (
	bodyTimeout    = time.Second // how long the rest of a body is read after the answer
	quickBuffer    = 2 << 10     // what a connection has to read ordinary requests into
	longBuffer     = 8 << 10     // the same, from its first longer request on; longer ones still are net/http's
	maxHeaderBytes = 80 << 10    // of a request; net/http takes 4 KB more
	lineCost       = 128         // what net/http makes of a line of it, beside its bytes
	maxStreams     = 100         // of an HTTP/2 connection
	maxRanges      = 16          // in a Range field
	maxAdmin       = 64          // connections to the admin listener
)

// A web is the HTTP front end.
type web struct {
	cache    *cache
	password *password
	values   *budget     // on their way to clients
	server   http.Server // for the connections that the web does not answer itself
	draining atomic.Bool
	date     atomic.Pointer[dateField]
	tally    tally
}

func newWeb(idle time.Duration, c *cache, pw *password, values *budget, logger *slog.Logger) *web {
	w := &web{cache: c, password: pw, values: values}
	w.server = http.Server{
		Handler:                      w,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            firstLineTimeout,
		IdleTimeout:                  cmp.Or(idle, httpIdleTimeout),
		MaxHeaderBytes:               maxHeaderBytes,
		ConnState: func(c net.Conn, state http.ConnState) {
			if f, ok := c.(*framed); ok {
				f.active.Store(state == http.StateActive)
			}
		},
		ErrorLog:  log.New(complaints{logger}, "", 0),
		Protocols: new(http.Protocols),
		HTTP2:     &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
	}
	w.server.Protocols.SetHTTP1(true)
	w.server.Protocols.SetUnencryptedHTTP2(true)
	return w
}

// serve answers requests until the connection ends, or leaves it to net/http.
func (w *web) serve(c *conn) {
	if unread, fresh := w.quick(c); len(unread) > 0 {
		w.handOver(c, unread, fresh)
	} else {
		c.Close()
	}
}

// refuse answers a connection that is one too many.
func (w *web) refuse(c *conn) {
	if !bytes.HasPrefix(afterEmptyLines(c.unread), []byte("PRI")) { // HTTP/2 has no answer before a request
		head, body := w.appendAnswer(nil, new(quickRequest), &answer{err: errFull}, 0)
		io.WriteString(c, string(head)+body)
	}
}

// drain has connections closed with their next answer. (SetKeepAlivesEnabled would close those that
// are idle, although a request may be on its way.)
func (w *web) drain() { w.draining.Store(true) }

// shutdown closes connections that are not being answered, and the others when they are or ctx is done.
func (w *web) shutdown(ctx context.Context) {
	if w.server.Shutdown(ctx) != nil {
		w.server.Close()
	}
}

// ServeHTTP answers GET and HEAD for the key that is everything after the path's first slash. There is
// no ServeMux in front, as that would clean the path.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	a := answer{}
	body := r.ContentLength != 0 && r.ProtoMajor == 1 // it means nothing here
	if body || w.draining.Load() {
		rw.Header().Set("Connection", "close")
	}
	if body { // net/http reads some of it, or the client might not see the answer
		http.NewResponseController(rw).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/")
	switch {
	case !w.authorised([]byte(r.Header.Get("Authorization"))):
		a.err = errDenied
	case r.Method == http.MethodOptions:
		rw.Header().Set("Allow", allowed)
		rw.WriteHeader(http.StatusNoContent)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		a.err = errMethod
	case !ok && (path != "" || r.URL.Host == ""): // in absolute form there may be no path (RFC 9110 §4.2.3)
		a.err = errPath
	default:
		a = w.cache.getHeld(&w.tally, []byte(path), w.values.hold) // a client may take its time with any value
		defer w.values.release(a.data, 0)
	}
	w.write(rw, r, &a, w.cache.now())
}

// write answers a request as quick does, and with parts of a value and by other conditions.
func (w *web) write(rw http.ResponseWriter, r *http.Request, a *answer, now time.Duration) {
	head, body := w.appendAnswer(nil, new(quickRequest), a, now)
	for line := range strings.Lines(string(head)) {
		if name, val, ok := strings.Cut(line, ": "); ok { // not the status line
			rw.Header().Add(name, strings.TrimSpace(val))
		}
	}
	if a.err != nil {
		status, _, _ := httpError(a.err)
		rw.WriteHeader(status)
		io.WriteString(rw, body)
		return
	}
	rw.Header().Del("Content-Length") // it may be that of a part
	correct(r, a.header)
	http.ServeContent(contentWriter{rw}, r, "", time.Time{}, strings.NewReader(body))
}

// correct changes a request where http.ServeContent reads it otherwise than RFC 9110: several lines are one
// list (§5.3); HEAD, another unit and too many parts have no range, the unit has no case, the last 0 bytes are
// no part, and no number is too large (§14). header is that of the value.
func correct(r *http.Request, header string) {
	list := func(name string) string { return strings.Join(r.Header[name], ", ") }
	if r.Header.Set("If-Match", list("If-Match")); lists([]byte(list("If-None-Match")), header) {
		r.Header.Set("If-None-Match", "*")
	} else {
		r.Header.Del("If-None-Match")
	}
	unit, parts, _ := strings.Cut(list("Range"), "=")
	r.Header.Del("Range")
	if r.Method == http.MethodGet && strings.ToLower(unit) == "bytes" && strings.Count(parts, ",") < maxRanges {
		parts = tooLarge.ReplaceAllString(parts, "999999999999999999")
		r.Header.Set("Range", "bytes="+emptySuffix.ReplaceAllString(parts, "${1}999999999999999999-"))
	}
}

var (
	tooLarge    = regexp.MustCompile(`\b0*[1-9][0-9]{18,}\b`)
	emptySuffix = regexp.MustCompile(`((?:^|,)[ \t]*)-0+\b`)
)

// A contentWriter gives the errors that http.ServeContent writes (412, 416) the header of all errors.
type contentWriter struct{ http.ResponseWriter }

func (w contentWriter) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		w.Header().Set("Cache-Control", "no-store")
	}
	w.ResponseWriter.WriteHeader(status)
}

// authorised reports whether an Authorization field has the password, in one of the two ways of RFC 7617
// and 6750.
func (w *web) authorised(field []byte) bool {
	if !w.password.needed {
		return true
	}
	scheme, secret, _ := bytes.Cut(field, []byte(" "))
	secret = bytes.TrimLeft(secret, " ")
	switch strings.ToLower(string(scheme)) {
	case "bearer":
		return w.password.matches(secret)
	case "basic":
		plain, err := base64.StdEncoding.AppendDecode(nil, secret)
		_, secret, _ = bytes.Cut(plain, []byte(":"))
		return err == nil && w.password.matches(secret)
	}
	return false
}

const (
	allowed      = "GET, HEAD, OPTIONS" // the methods that have a meaning here
	authenticate = "Www-Authenticate: Basic realm=\"redis_proxy\"\r\nWww-Authenticate: Bearer\r\n"
)

// What can be wrong with a request, beside the errors of the cache.
var (
	errDenied = errors.New("a password is required")
	errMethod = errors.New("only " + allowed + " are allowed")
	errPath   = errors.New("the path must begin with a slash")
	errFull   = errors.New("too many clients")
)

// httpError returns the status, the body and fields of the header for the error of an answer.
func httpError(err error) (status int, text, fields string) {
	for _, row := range []struct {
		err    error
		status int
		fields string
	}{
		{errAbsent, http.StatusNotFound, ""},
		{errTimeout, http.StatusGatewayTimeout, ""},
		{errWrongType, http.StatusConflict, ""},
		{errRefused, http.StatusBadGateway, ""},
		{errDenied, http.StatusUnauthorized, authenticate},
		{errCrowded, http.StatusServiceUnavailable, "Retry-After: 1\r\n"},
		{errMethod, http.StatusMethodNotAllowed, "Allow: " + allowed + "\r\n"},
		{errPath, http.StatusBadRequest, ""},
		{errFull, http.StatusServiceUnavailable, "Retry-After: 1\r\nConnection: close\r\n"},
	} {
		if errors.Is(err, row.err) {
			return row.status, row.err.Error() + "\n", row.fields
		}
	}
	return http.StatusBadGateway, errUnavailable.Error() + "\n", ""
}

// header returns what HTTP says about the value of an answer, a field a line: its tag (tagField), type and
// length. The tag is the same on every replica. The cache keeps the header.
func (w *web) header(a *answer) string {
	if a.header == "" {
		content := a.content()
		kind := "application/octet-stream" // Redis does not say what a value is: it is what it looks like
		if utf8.ValidString(content) {
			kind = "text/plain; charset=utf-8"
		}
		digest := sha256.New()
		for part := range slices.Chunk(bytesOf(content), 1<<20) { // a goroutine is not preempted within one
			digest.Write(part)
		}
		const fields = "Etag: \"%x\"\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
		a.header = fmt.Sprintf(fields, digest.Sum(nil)[:16], kind, len(content))
		w.cache.annotate(a.value)
	}
	return a.header
}

// tagField is how much of a value's header is its tag, which is a strong one (RFC 9110 §8.8.3).
const tagField = len("Etag: ") + 2 + 32 + len("\r\n")

// lists reports whether a field of If-None-Match is * or has the tag of a value with this header. A tag
// cannot be part of another, as it has quotes.
func lists(field []byte, header string) bool {
	return string(field) == "*" || bytes.Contains(field, bytesOf(header[len("Etag: "):tagField-2]))
}

// bytesOf returns the bytes of s without a copy. They must not be written to.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// quick answers requests until one is not ordinary (quickRequest), without net/http, which costs more than all the
// rest of a hit. It returns what it has read and not answered, for net/http to go on with, or nothing.
func (w *web) quick(c *conn) (unread []byte, fresh bool) {
	fresh = true // nothing has been answered
	for buf, kept := make([]byte, quickBuffer), 0; ; kept = copy(buf, unread) {
		n, err := c.Read(buf[kept:]) // an error that comes with bytes comes again
		if n == 0 && err != io.EOF {
			return nil, fresh
		}
		begin := afterEmptyLines(buf[:kept+n])
		rest, ordinary, err := w.answer(c, begin)
		answered := len(rest) < len(begin)
		fresh = fresh && !answered
		ordinary = ordinary && n > 0 && len(rest) < longBuffer // half a request at the end is not
		switch unread = rest; {
		case err != nil:
			return nil, fresh
		case !ordinary && (len(rest) >= 4 || fresh): // net/http waits for 4 bytes of the next
			return rest, fresh
		case n == 0:
			return nil, fresh
		case len(rest) == len(buf):
			buf = make([]byte, longBuffer)
		}
		if kept == 0 || answered {
			c.link.hurry(time.Duration(min(len(rest), 1)) * firstLineTimeout)
		}
	}
}

// answer answers the ordinary requests that b begins with. It returns what is left, and whether that may become
// another.
func (w *web) answer(c *conn, b []byte) (rest []byte, ordinary bool, err error) {
	page := pages.Get().(*[]byte)
	defer pages.Put(page)
	out, r, size := (*page)[:0], quickRequest{}, 0
	for rest = b; err == nil; rest = afterEmptyLines(rest[size:]) {
		if r, size = parse(rest); size <= 0 || w.draining.Load() {
			break
		}
		a, body := answer{err: errDenied}, ""
		if w.authorised(r.authorization) {
			a = w.cache.getHeld(&w.tally, r.key, c.link.hold)
		}
		out, body = w.appendAnswer(out, &r, &a, w.cache.now())
		n := min(len(body), max(0, flushAt-len(out)))
		if out = append(out, body[:n]...); n < len(body) { // the rest of a large body is not copied
			if _, err = c.Write(out); err == nil {
				_, err = c.Write(bytesOf(body[n:]))
			}
			out = out[:0]
		}
		c.link.letGo()
	}
	if len(out) > 0 && err == nil {
		_, err = c.Write(out)
	}
	*page = out
	return rest, size == 0, err
}

// pages are buffers for answers.
var pages = sync.Pool{New: func() any { b := make([]byte, 0, flushAt+1<<10); return &b }}

// appendAnswer adds the header of an answer, and returns its body, which a holds.
func (w *web) appendAnswer(b []byte, r *quickRequest, a *answer, now time.Duration) (out []byte, body string) {
	status, fields, own := http.StatusOK, "Accept-Ranges: bytes\r\n", ""
	if a.err != nil {
		status, body, fields = httpError(a.err)
	} else if own, body = w.header(a), a.content(); lists(r.tags, own) {
		status, own, body = http.StatusNotModified, own[:tagField], ""
	}
	b = append(b, "HTTP/1.1 "...)
	if r.old {
		b[len(b)-2] = '0'
		fields += "Connection: keep-alive\r\n"
	}
	b = append(strconv.AppendInt(b, int64(status), 10), ' ')
	b = append(append(b, http.StatusText(status)...), "\r\nX-Content-Type-Options: nosniff\r\n"...)
	b = w.appendCaching(append(append(b, fields...), own...), a, now)
	if a.err != nil {
		b = appendField(append(b, "Content-Type: text/plain; charset=utf-8\r\n"...), "Content-Length: ", len(body))
	}
	date := w.date.Load()
	if t := time.Now(); date == nil || date.second != t.Unix() {
		date = &dateField{t.Unix(), t.UTC().Format("Date: " + http.TimeFormat + "\r\n\r\n")}
		w.date.Store(date)
	}
	if r.head {
		body = ""
	}
	return append(b, date.text...), body
}

// A dateField is the last field of a header, for a second.
type dateField struct {
	second int64
	text   string
}

// appendField adds a field that ends in a number.
func appendField(b []byte, field string, n int) []byte {
	return append(strconv.AppendInt(append(b, field...), int64(n), 10), "\r\n"...)
}

// appendCaching adds how long an answer may be kept, and how the cache handled the request (RFC 9211).
func (w *web) appendCaching(b []byte, a *answer, now time.Duration) []byte {
	kept := a.err == nil || a.err == errAbsent && w.cache.absent > 0
	if kept {
		b = appendField(b, "Age: ", int((now-a.fetched)/time.Second))
		b = appendField(b, "Cache-Control: max-age=", int((a.expires-a.fetched)/time.Second))
	} else {
		b = append(b, "Cache-Control: no-store\r\n"...)
	}
	ttl := int((a.expires - now) / time.Second)
	switch {
	case kept && a.source == fromCache:
		return appendField(b, "Cache-Status: redis_proxy; hit; ttl=", ttl)
	case a.source == fromStale:
		return appendField(b, "Cache-Status: redis_proxy; fwd=stale; ttl=", ttl)
	case a.flight == nil: // the cache was not asked
		return b
	}
	why := "miss"
	if a.expired {
		why = "stale"
	}
	b = append(append(b, "Cache-Status: redis_proxy; fwd="...), why...)
	if kept && a.flight.stored {
		b = append(b, "; stored"...)
	}
	if a.source == fromAnother {
		b = append(b, "; collapsed"...)
	}
	return append(b, "\r\n"...)
}

// A quickRequest is an ordinary request: GET or HEAD, well-formed to the byte, with one Host, no body, and no
// field that asks for what net/http alone knows. Fields that mean nothing here are skipped. Its parts lie in
// the buffer that it was read into.
type quickRequest struct {
	head, old     bool // old: HTTP/1.0, which must ask to be kept alive
	keepAlive     bool
	hosts         int
	key           []byte
	authorization []byte // nil: none
	tags          []byte // of If-None-Match; nil: none
}

// parse returns the request that b begins with, and its size: 0 if it is not whole, -1 if it is not ordinary.
func parse(b []byte) (r quickRequest, size int) {
	if len(b) < len(preface) && preface[:len(b)] == string(b) {
		return r, 0
	}
	for rest, first := b, true; ; first = false {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		line, crlf := bytes.CutSuffix(line, []byte("\r"))
		switch rest = after; {
		case !whole:
			return r, 0
		case !crlf || first && !r.begin(line) || !first && len(line) > 0 && !r.field(line):
			return r, -1
		case first || len(line) > 0:
		case r.hosts > 1 || r.hosts == 0 && !r.old || r.old && !r.keepAlive:
			return r, -1
		default:
			return r, len(b) - len(rest)
		}
	}
}

// printable reports whether b has no control characters but tabs.
func printable(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// begin parses the request line.
func (r *quickRequest) begin(line []byte) (ordinary bool) {
	method, target, _ := bytes.Cut(line, []byte(" "))
	target, version, _ := bytes.Cut(target, []byte(" "))
	r.head, r.old = string(method) == "HEAD", string(version) == "HTTP/1.0"
	path, ok := bytes.CutPrefix(target, []byte("/"))
	if r.key, _, _ = bytes.Cut(path, []byte("?")); bytes.IndexByte(r.key, '%') >= 0 {
		key, err := url.PathUnescape(string(r.key))
		r.key, ok = []byte(key), ok && err == nil
	}
	return ok && (r.head || string(method) == "GET") && (r.old || string(version) == "HTTP/1.1") &&
		printable(path) && bytes.IndexByte(path, '\t') < 0
}

// field parses a line of the header.
func (r *quickRequest) field(line []byte) (ordinary bool) {
	name, val, ok := bytes.Cut(line, []byte(":"))
	var lower [len("if-unmodified-since") + 1]byte // a longer name is none of those below
	for i, c := range name {
		if token[c] == 0 {
			return false
		}
		lower[min(i, len(lower)-1)] = token[c]
	}
	if val = bytes.Trim(val, " \t"); !ok || !printable(val) {
		return false
	}
	switch string(lower[:min(len(name), len(lower))]) {
	case "host":
		r.hosts++
		return len(bytes.TrimLeft(val, letters+"-._:[]")) == 0
	case "connection":
		r.keepAlive = true
		return string(val) == "keep-alive" || string(val) == "Keep-Alive"
	case "authorization":
		ok = r.authorization == nil && len(val) > 0
		r.authorization = val
	case "if-none-match":
		ok = r.tags == nil && len(val) > 0
		r.tags = val
	case "", "content-length", "transfer-encoding", "upgrade", "expect", "te", "trailer", "http2-settings", "range",
		"if-match", "if-range", "if-modified-since", "if-unmodified-since":
		return false
	}
	return ok
}

const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// token maps the bytes that names consist of (RFC 9110 §5.6.2) to their lower case, and the others to 0. Only
// ASCII has cases there.
var token = func() (t [256]byte) {
	for _, c := range []byte(letters + "!#$%&'*+-.^_`|~") {
		if t[c] = c; 'A' <= c && c <= 'Z' {
			t[c] = c | ' '
		}
	}
	return t
}()

// handOver gives net/http a connection, with bytes that have been read; fresh: they are the first.
func (w *web) handOver(c *conn, unread []byte, fresh bool) {
	c.unread, c.link.idle = slices.Concat(unread, c.unread), 0
	var rest net.Conn = &handed{conn: c}
	if fresh && bytes.HasPrefix(unread, []byte(preface)) {
		c.link.release()
		rest = newFramed(c, 2*w.cache.timeout)
	}
	l := &handedOver{conn: rest}
	if w.server.Serve(l); l.conn != nil { // it is shut down
		c.Close()
	}
}

// A handedOver is a net.Listener of one connection.
type handedOver struct{ conn net.Conn }

func (l *handedOver) Accept() (c net.Conn, err error) {
	if c, l.conn = l.conn, nil; c == nil {
		err = net.ErrClosed
	}
	return c, err
}

func (l *handedOver) Close() error   { return nil }
func (l *handedOver) Addr() net.Addr { return nil }

// A handed connection is net/http's, for HTTP/1. Between requests that waits for 4 bytes as long as for none, and
// it counts no header against the budget of requests.
type handed struct {
	*conn
	waits atomic.Bool
	held  atomic.Int64 // of the budget, since net/http set the last deadline: it does before a header and after
}

// ConnectionState keeps net/http from looking for HTTP/2 in the middle of a connection.
func (h *handed) ConnectionState() (none tls.ConnectionState) { return }

func (h *handed) SetReadDeadline(t time.Time) error {
	h.link.server.requests.release("", int(h.held.Swap(0)))
	h.waits.Store(time.Until(t) > firstLineTimeout)
	return h.conn.SetReadDeadline(t)
}

func (h *handed) Read(p []byte) (int, error) {
	n, err := h.conn.Read(p)
	if n > 0 && h.waits.Swap(false) {
		h.conn.SetReadDeadline(time.Now().Add(firstLineTimeout))
	}
	cost := n + lineCost*bytes.Count(p[:n], []byte("\n"))
	if h.link.server.requests.hold("", cost) != nil {
		return 0, errors.New("too much of all clients' requests is unanswered")
	}
	h.held.Add(int64(cost))
	return n, err
}

func (h *handed) Close() error {
	h.link.server.requests.release("", int(h.held.Swap(0)))
	return h.conn.Close()
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// A framed connection is net/http's, for HTTP/2. That waits for the rest of a frame or a header block as long
// as for a request, and for ever for a client that takes nothing of its answers.
type framed struct {
	*conn
	in, out frames
	block   bool          // a header block goes on in the next frame
	begun   bool          // it, or a frame, has a time to be complete
	redis   time.Duration // how long a request may wait for Redis
	active  atomic.Bool   // there are streams
	stuck   *time.Timer   // closes the connection if it is active
}

// newFramed gives a client the write time-out to take something of any of its answers.
func newFramed(c *conn, redis time.Duration) *framed {
	f := &framed{conn: c, in: frames{left: len(preface)}, redis: redis}
	f.stuck = time.AfterFunc(c.link.server.writeTimeout, func() {
		if f.active.Load() {
			f.Close()
		}
	})
	return f
}

func (f *framed) Read(p []byte) (int, error) {
	n, err := f.conn.Read(p)
	f.in.follow(p[:n], func(kind, flags byte) {
		if kind == 1 || kind == 9 { // HEADERS, CONTINUATION
			f.block = flags&4 == 0 // END_HEADERS
			f.stuck.Reset(f.link.server.writeTimeout + f.redis)
		}
	})
	if begun := f.in.got+f.in.left > 0 || f.block; begun != f.begun {
		f.begun = begun
		f.link.hurry(map[bool]time.Duration{true: firstLineTimeout}[begun])
	}
	return n, err
}

func (f *framed) Write(p []byte) (int, error) {
	n, err := f.conn.Write(p)
	f.out.follow(p[:n], func(kind, _ byte) {
		if kind <= 1 { // DATA, HEADERS
			f.stuck.Reset(f.link.server.writeTimeout)
		}
	})
	return n, err
}

func (f *framed) Close() error {
	f.stuck.Stop()
	return f.conn.Close()
}

// frames follows the frames that are read or written (RFC 9113 §4.1).
type frames struct {
	head      [9]byte
	got, left int // how much of head has come; how much of what follows has not
}

// follow takes bytes, and calls frame with type and flags of each whose header is complete with them.
func (f *frames) follow(p []byte, frame func(kind, flags byte)) {
	for len(p) > 0 {
		n := min(f.left, len(p))
		f.left, p = f.left-n, p[n:]
		n = copy(f.head[f.got:], p)
		if f.got, p = (f.got+n)%len(f.head), p[n:]; n > 0 && f.got == 0 {
			f.left = int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
			frame(f.head[3], f.head[4])
		}
	}
}

// complaints takes what net/http has to say. What is not a panic is about a client.
type complaints struct{ log *slog.Logger }

func (c complaints) Write(p []byte) (int, error) {
	text, _, _ := strings.Cut(string(p), `"`) // what it quotes is the client's, a key perhaps
	say := c.log.Debug
	if strings.Contains(text, "panic") {
		say = c.log.Error
	}
	say(strings.TrimSpace(text))
	return len(p), nil
}

// newAdmin serves metrics, health and profiles, and drops keys that it is asked to forget. There is no ServeMux in
// front, as that would clean the key.
func newAdmin(figures func() []figure, ready func() bool, forget func([][]byte), logger *slog.Logger) *http.Server {
	var open atomic.Int64
	limit := func(c net.Conn, state http.ConnState) {
		if state == http.StateNew && open.Add(1) > maxAdmin {
			c.Close()
		} else if state == http.StateClosed {
			open.Add(-1)
		}
	}
	serve := func(rw http.ResponseWriter, r *http.Request) {
		path, read := r.URL.Path, r.Method == http.MethodGet || r.Method == http.MethodHead
		key, isKey := strings.CutPrefix(path, "/cache/")
		keys := [][]byte{[]byte(key)}
		if key == "" {
			keys = nil // all
		}
		switch {
		case isKey && r.Method == http.MethodDelete:
			forget(keys)
			rw.WriteHeader(http.StatusNoContent)
		case path == "/healthz":
			io.WriteString(rw, "alive\n")
		case path == "/readyz" && ready():
			io.WriteString(rw, "ready\n")
		case path == "/readyz":
			http.Error(rw, "Redis cannot be read", http.StatusServiceUnavailable)
		case path == "/metrics":
			rw.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			writeMetrics(rw, figures())
		case path == "/" && read:
			rw.Header().Set("Content-Security-Policy", pagePolicy)
			rw.Header().Set("Content-Type", "text/html; charset=utf-8")
			io.WriteString(rw, adminPage)
		case path == "/":
			http.Error(rw, "only GET and HEAD are allowed", http.StatusMethodNotAllowed)
		case strings.HasPrefix(path, "/debug/pprof/") && path != "/debug/pprof/cmdline": // that would show secrets
			http.DefaultServeMux.ServeHTTP(rw, r) // where package pprof puts its handlers
		default:
			http.NotFound(rw, r)
		}
	}
	return &http.Server{Handler: http.HandlerFunc(serve), ConnState: limit, ReadHeaderTimeout: firstLineTimeout,
		IdleTimeout: httpIdleTimeout, ErrorLog: log.New(complaints{logger}, "", 0)}
}

// writeMetrics writes the text format of Prometheus.
func writeMetrics(out io.Writer, figures []figure) {
	last := ""
	for _, f := range figures {
		if f.metric == "" {
			continue
		}
		if !strings.HasPrefix(f.metric, "process_") { // a name that every exporter has
			f.metric = "redis_proxy_" + f.metric
		}
		h, isHistogram := f.value.(histogram)
		if name, _, _ := strings.Cut(f.metric, "{"); name != last {
			kind := "gauge"
			if isHistogram {
				kind = "histogram"
			} else if strings.HasSuffix(name, "_total") {
				kind = "counter"
			}
			fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, f.help, name, kind)
			last = name
		}
		if isHistogram {
			writeHistogram(out, f.metric, h)
		} else if v, isFloat := f.value.(float64); isFloat {
			fmt.Fprintln(out, f.metric, v)
		} else {
			fmt.Fprintf(out, "%s %d\n", f.metric, f.value) // %d: a state has a name, too
		}
	}
}

// writeHistogram writes the lines of a histogram, whose buckets are cumulative.
func writeHistogram(out io.Writer, name string, h histogram) {
	count := int64(0)
	for i, n := range h.counts {
		count += n
		bound := "+Inf"
		if i < len(h.bounds) {
			bound = fmt.Sprint(h.bounds[i].Seconds())
		}
		fmt.Fprintf(out, "%s_bucket{le=%q} %d\n", name, bound, count)
	}
	fmt.Fprintf(out, "%s_sum %g\n%s_count %d\n", name, h.sum.Seconds(), name, count)
}

// pagePolicy allows what the page itself consists of, by digest, and requests to the host that it came from.
var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; style-src " + digestOf("style") +
	"; script-src " + digestOf("script") + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// digestOf returns the digest of an element of the page, as a source in a Content-Security-Policy.
func digestOf(element string) string {
	_, text, _ := strings.Cut(adminPage, "<"+element+">")
	text, _, _ = strings.Cut(text, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// adminPage polls /metrics every two seconds and keeps five minutes of it. It names only the figures of the
// four charts and of the state; every other figure gets a row by its name and type.
const adminPage = `<!doctype html><html lang="en"><meta charset="utf-8"><title>redis_proxy</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --one: light-dark(#1f66d1, #6fabff); --two: light-dark(#b9540a, #f0a05a) }
body { font: 14px/1.4 system-ui, sans-serif; max-width: 90rem; margin: auto; padding: 1rem } small { opacity: .7 }
h1, figure { margin: 0 } a, b, path { color: var(--one) } b + b, path + path, output, .down { color: var(--two) }
header, p, figcaption { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline } p { gap: .4rem }
main figure, p span { border: 1px solid #8885; border-radius: .5rem; padding: .2rem .6rem } b { white-space: nowrap }
main, section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--wide)), 1fr)) }
main { --wide: 28rem; gap: .6rem } section { --wide: 21rem; gap: 0 2rem; margin: 1rem 0; overflow-wrap: anywhere }
section figcaption { display: contents } section b { order: 1; text-align: right } svg { width: 100%; height: 7rem }
section figure { display: grid; grid-template-columns: 1fr 5rem 7rem; gap: .7rem; border-bottom: 1px solid #8883 }
figcaption span { flex: 1 } section small, b:empty { display: none } section svg { height: 1.6rem }
path { fill: none; stroke: currentcolor; stroke-width: 1.5; stroke-linecap: round; vector-effect: non-scaling-stroke }
</style><header><h1>redis_proxy</h1><span></span><output></output></header><p></p><main></main><section></section>
<footer>Rates, means and p99 are over two seconds. <a href=metrics>metrics</a> <a href=readyz>readyz</a> <a
href=debug/pprof/>profiles</a></footer><template><figure><figcaption><span></span><b></b><b></b></figcaption><svg
viewBox="0 0 300 100" preserveAspectRatio=none><path/><path/></svg><small></small></figure></template><script>
const $ = query => document.querySelector(query), samples = [], help = {}, type = {}, info = {}, charts = [
	{ title: 'Requests', of: { '': 'all_total', 'hits ': 'hits_total' } }, { title: 'Hits', of: { '': 'hit_ratio' } },
	{ title: 'Latency of Redis', of: { 'p99 ': 'upstream_seconds p99', 'mean ': 'upstream_seconds mean' } },
	{ title: 'Memory', of: { 'process ': 'process_resident_memory_bytes', 'cache ': 'cache_bytes' } }]
let failed = '' // when the first of the latest polls without an answer was
function format(v, key) {
	const to = (v, unit) => (v < 99.95 ? +v.toPrecision(3) : Math.round(v)).toLocaleString('en') + unit
	const by = (v, steps, units) => { let i = 0; while (v >= steps[i]) v /= steps[i++]; return to(v, ' ' + units[i]) }
	if (!Number.isFinite(v) || /tracking$/.test(key)) return ['off', 'down', 'live'][v] || '–'
	if (/_time_seconds/.test(key)) return format(Date.now() / 1e3 - v, '_seconds') + ' ago'
	if (/_ratio|_seconds_total/.test(key)) return to(v * 100, '%')
	if (/_bytes/.test(key)) return by(v, [1024, 1024, 1024, 1024], ['B', 'KB', 'MB', 'GB', 'TB'])
	if (/_total| count/.test(key) || !/_seconds/.test(key)) return to(v, /_total| count/.test(key) ? '/s' : '')
	return v && v < 1 ? by(v * 1e6, [1e3], ['µs', 'ms']) : by(v, [60, 60, 24], ['s', 'min', 'h', 'days'])
}
function read(text) { // returns a sample: gauges, and how much counters and histograms rise a second
	const last = samples.at(-1), raw = {}, now = {}, buckets = [[0, 0]], t = Date.now()
	const rise = id => raw[id] >= last?.raw[id] ? (raw[id] - last.raw[id]) * 1e3 / (t - last.t) : NaN
	for (const line of text.replaceAll('redis_proxy_', '').split('\n')) {
		const [, kind, of, words] = /^# (HELP|TYPE) (\S+) (.*)/.exec(line) || []
		const [, name, labels = '', value] = /^(\w+)({.*})? (\S+)/.exec(line) || [], id = name + labels
		const [, family, part] = /(.*)_(bucket|sum|count)$/.exec(name) || []
		raw[id] = +value
		if (kind) (kind == 'HELP' ? help : type)[of] = words
		else if (/info$/.test(name)) for (const [, label, v] of labels.matchAll(/(\w+)="(.*?)"/g)) info[label] = v
		else if (type[name]) now[id] = type[name] == 'counter' ? rise(id) : raw[id]
		else if (part == 'bucket') buckets.push([/le="(.*?)"/.exec(labels)[1], rise(id)])
		else if (part == 'count') { // the last line of a histogram
			const rate = rise(id), i = buckets.findIndex(b => b[1] > 0 && b[1] >= .99 * rate), key = family + labels
			const [low, less] = buckets[i - 1] || [], [high, more] = buckets.splice(1)[i - 1] || []
			now[key + ' p99'] = high == '+Inf' ? +low : +low + (high - low) * (.99 * rate - less) / (more - less)
			Object.assign(now, { [key + ' mean']: rise(family + '_sum' + labels) / rate, [key + ' count']: rate })
		}
		if (name == 'requests_total') now.all_total = (now.all_total || 0) + rise(id)
		if (/^requests_total.*"hit"/.test(id)) now.hits_total = (now.hits_total || 0) + rise(id)
	}
	return { t, raw, now: Object.assign(now, { hit_ratio: now.hits_total / now.all_total }) }
}
function show({ t, now }) {
	const start = Math.min(samples[0].t, t - 3e4), ago = format((t - start) / 1e3, '_seconds')
	const { address, redis, ...facts } = info, words = key => format(now[key], key)
	for (const key in now) if (key + '_max' in now || /tracking|nodes|uptime/.test(key))
		facts[key] = words(key) + (key + '_max' in now ? ' of ' + words(key + '_max') : '')
	$('p').replaceChildren(...Object.entries(facts).map(([name, text]) => Object.assign(document.createElement('span'),
		{ textContent: name.replace(/_seconds$|_bytes$/, '').replaceAll('_', ' ') + ': ' + text, className: text })))
	$('header span').textContent = address + ' in front of Redis at ' + redis
	$('output').textContent = failed && 'no answer since ' + failed
	for (const c of charts) {
		const keys = Object.values(c.of)
		const f = c.f ??= $(c.at || 'main').appendChild($('template').content.firstChild.cloneNode(true))
		const top = keys[0] == 'hit_ratio' ? 1 : Math.max(...samples.flatMap(s => keys.map(key => s.now[key] || 0)))
		const x = s => 300 * (s.t - start) / (t - start), y = v => 98 - 96 * v / (top || 1)
		keys.forEach((key, i) => {
			const points = samples.map(s => s.now[key] >= 0 ? 'L' + x(s) + ' ' + y(s.now[key]) + 'h0' : 'G').join('')
			f.querySelectorAll('path')[i].setAttribute('d', points.replace(/(^|G)L/g, 'M').replaceAll('G', ''))
			f.querySelectorAll('b')[i].textContent = Object.keys(c.of)[i] + words(key)
		})
		f.querySelector('span').textContent = c.title
		f.querySelector('small').textContent = '0 to ' + format(top, keys[0]) + ' in ' + ago
		f.title = keys.map(key => help[/\w+/.exec(key)] || '').join('\n').trim()
	}
}
(async function poll() {
	const s = read(await fetch('metrics', { signal: AbortSignal.timeout(5000) }).then(r => r.text()).catch(() => ''))
	failed = 'all_total' in s.now ? '' : failed || new Date().toLocaleTimeString()
	samples.push(s)
	while (samples[0].t < s.t - 3e5) samples.shift()
	for (const key in s.now) if (!charts.some(c => Object.values(c.of).includes(key)))
		charts.push({ at: 'section', title: key.replace(/[{,]\w+="/g, ' ').replace(/["}]/g, ''), of: { '': key } })
	show(s)
	setTimeout(poll, 2000)
})()
</script>`
