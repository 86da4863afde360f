// HTTP: the key from the path, the answer and its header.
//
// A connection of HTTP/1 begins with quick, which answers ordinary requests. It goes to net/http,
// for good, with the first other request, and one of HTTP/2 at once; both ways answer alike. RFC
// 9110 (semantics), 9111 (caching) and 9211 (Cache-Status) say what goes into the answers.
package main

import (
	"bufio"
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
	bodyTimeout    = time.Second // how long a body is read, which means nothing here
	quickBuffer    = 2 << 10     // quick reads into so much
	longBuffer     = 8 << 10     // and into so much from the first longer request on; still longer ones are net/http's
	maxHeaderBytes = 80 << 10    // of a request; net/http takes 4 KB more
	lineCost       = 128         // what net/http makes of a line of it, beside its bytes
	maxStreams     = 100         // of an HTTP/2 connection
	maxFrame       = 16 << 10    // of HTTP/2, the least that may be allowed: net/http makes room for a whole one
	h2Window       = 64 << 10    // of a request's body, over HTTP/2; clients send as much before they hear of less
	streamCost     = 12 << 10    // what a stream of HTTP/2 takes until it is answered
	maxBody        = 256 << 10   // is read of a body, as much as net/http reads over HTTP/1
	valuePiece     = 32 << 10    // is what http.ServeContent writes at once of a value
	maxRanges      = 16          // in a Range field
	maxAdmin       = 64          // connections to the admin listener
)

// A web is the HTTP front end.
type web struct {
	serverSettings
	cache    *cache
	password *password
	server   http.Server // for the connections that the web does not answer itself
	streams  *budget     // what the requests take that the server answers
	draining atomic.Bool
	date     atomic.Pointer[dateField]
	tally    tally
}

func newWeb(s serverSettings, c *cache, pw *password, logger *slog.Logger) *web {
	w := &web{serverSettings: s, cache: c, password: pw, streams: newBudget(s.requests.max)}
	w.server = http.Server{
		Handler:                      w,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            requestTimeout,
		IdleTimeout:                  cmp.Or(s.idleTimeout, httpIdleTimeout),
		WriteTimeout:                 s.writeTimeout + 2*c.timeout, // of a stream of HTTP/2, which may wait for Redis
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     log.New(complaints{logger}, "", 0),
		Protocols:                    new(http.Protocols),
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReadFrameSize: maxFrame,
			MaxReceiveBufferPerConnection: h2Window, MaxReceiveBufferPerStream: h2Window},
	}
	w.server.Protocols.SetHTTP1(true)
	w.server.Protocols.SetUnencryptedHTTP2(true)
	return w
}

// serve answers requests until the connection ends, or leaves it to net/http.
func (w *web) serve(c *conn) {
	if bytes.HasPrefix(c.unread, []byte(preface)) {
		c.link.exemptFromStop()
		w.handOver(c, c)
	} else if rest := w.quick(c); len(rest) > 0 {
		c.unread = slices.Concat(rest, c.unread)
		w.handOver(c, &counted{conn: c})
	} else {
		c.Close()
	}
}

// refuse answers a connection that is one too many.
func (w *web) refuse(c *conn) {
	if !bytes.HasPrefix(c.unread, []byte(preface)) { // HTTP/2 has no answer before a request
		r := quickRequest{head: bytes.HasPrefix(afterEmptyLines(c.unread), []byte("HEAD "))}
		head, body := w.appendAnswer(nil, &r, &answer{err: errFull}, 0)
		io.WriteString(c, string(head)+body)
	}
}

// drain has connections closed with their next answer. (SetKeepAlivesEnabled would close those that
// are idle, although a request may be on its way.)
func (w *web) drain() { w.draining.Store(true) }

// shutdown closes net/http's idle connections, and others when they are answered or ctx is done.
func (w *web) shutdown(ctx context.Context) {
	if w.server.Shutdown(ctx) != nil {
		w.server.Close()
	}
}

// ServeHTTP answers GET and HEAD for the key that is everything after the path's first slash. There
// is no ServeMux in front, as that would clean the path.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	control, h2, cost := http.NewResponseController(rw), r.ProtoMajor == 2, keepFields(r)
	if w.streams.hold("", cost) != nil {
		panic(http.ErrAbortHandler) // which closes the connection, or resets the stream
	}
	defer w.streams.release("", cost)
	body := r.ContentLength != 0 // it means nothing here
	if body {                    // some of it is read, or the client might not see the answer
		control.SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	if body && h2 {
		io.CopyN(io.Discard, r.Body, maxBody)
		r.Body.Close()
	}
	if body && !h2 || w.draining.Load() {
		rw.Header().Set("Connection", "close")
	}
	a := answer{}
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
	case !ok && path != "", r.URL.Host == "" && (!ok || r.URL.Scheme != ""): // absolute form: RFC 9110 §4.2
		a.err = errPath
	default:
		a = w.cache.getHeld(&w.tally, []byte(path), w.values.hold) // a client may take its time with any value
		defer w.values.release(a.data, 0)
	}
	if w.write(rw, r, &a, w.cache.now()); cost > quickBuffer { // it is released when the answer is taken
		control.Flush()
	}
}

// keepFields drops the fields of a request that mean nothing here, as the client may take its time
// with the answer, and joins repeated ones (RFC 9110 §5.3). It returns about what the request takes.
func keepFields(r *http.Request) (size int) {
	kept := make(http.Header)
	for _, name := range []string{"Authorization", "If-Match", "If-None-Match", "If-Range", "Range"} {
		kept.Set(name, strings.Join(r.Header[name], ", "))
		size += len(kept.Get(name))
	}
	r.Header = kept
	return size + 2*len(r.RequestURI) + lineCost*len(r.Trailer) + (r.ProtoMajor-1)*streamCost
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
	out := valueWriter{rw, w.writeTimeout, r.ProtoMajor == 2 && len(body) > valuePiece}
	http.ServeContent(out, r, "", time.Time{}, strings.NewReader(body))
}

// correct changes a request where http.ServeContent reads it otherwise than RFC 9110. It drops Range
// for HEAD, for other units, for too many parts and for an empty value, ignores the case of the unit,
// makes a suffix of 0 bytes unsatisfiable, and caps large numbers (§14). Of If-None-Match it leaves *,
// if the tag is listed, or nothing. header is that of the value.
func correct(r *http.Request, header string) {
	if lists([]byte(r.Header.Get("If-None-Match")), header) {
		r.Header.Set("If-None-Match", "*")
	} else {
		r.Header.Del("If-None-Match")
	}
	unit, parts, _ := strings.Cut(r.Header.Get("Range"), "=")
	r.Header.Del("Range")
	if r.Method == http.MethodGet && strings.ToLower(unit) == "bytes" && strings.Count(parts, ",") < maxRanges &&
		!strings.HasSuffix(header, ": 0\r\n") {
		parts = tooLarge.ReplaceAllString(parts, "999999999999999999")
		r.Header.Set("Range", "bytes="+emptySuffix.ReplaceAllString(parts, "${1}999999999999999999-"))
	}
}

var (
	tooLarge    = regexp.MustCompile(`\b0*[1-9][0-9]{18,}\b`)
	emptySuffix = regexp.MustCompile(`((?:^|,)[ \t]*)-0+\b`)
)

// A valueWriter gives the client the write time-out for each piece of a large value over HTTP/2.
// The server's own is for a whole answer.
type valueWriter struct {
	http.ResponseWriter
	timeout time.Duration
	pieces  bool
}

func (w valueWriter) Write(p []byte) (int, error) {
	if w.pieces {
		http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.timeout))
	}
	return w.ResponseWriter.Write(p)
}

// WriteHeader gives the errors that http.ServeContent writes (412, 416) the header of all errors.
func (w valueWriter) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		w.Header().Set("Cache-Control", "no-store")
	}
	if status == http.StatusPreconditionFailed {
		http.Error(w.ResponseWriter, "the value has another tag", status)
		return
	}
	w.ResponseWriter.WriteHeader(status)
}

// authorised reports whether an Authorization field has the password (RFC 7617, RFC 6750).
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

// header returns what HTTP says about the value of an answer, a field a line: its tag (tagField),
// type and length. The tag is the same on every replica. The cache keeps the header.
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

// lists reports whether a field of If-None-Match is * or has the tag of a value with this header. A
// tag cannot be part of another, as it has quotes.
func lists(field []byte, header string) bool {
	return string(field) == "*" || bytes.Contains(field, bytesOf(header[len("Etag: "):tagField-2]))
}

// bytesOf returns the bytes of s without a copy. They must not be written to.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// quick answers requests until one is not ordinary (quickRequest), without net/http, which costs
// more than all the rest of a hit. It returns what it has not answered, for net/http to go on with.
func (w *web) quick(c *conn) (rest []byte) {
	for buf := make([]byte, quickBuffer); ; {
		n, err := c.Read(buf[len(rest):]) // an error that comes with bytes comes again
		if n == 0 && err != io.EOF {
			return nil
		}
		left, ordinary, err := w.answer(c, afterEmptyLines(buf[:len(rest)+n]))
		ordinary = ordinary && n > 0 && len(left) < longBuffer // at EOF, half a request is not
		switch {
		case err != nil || n == 0 && len(left) < 4:
			return nil
		case !ordinary && len(left) >= 4: // net/http waits for 4 bytes of a request
			return left
		case len(left) == len(buf):
			buf = make([]byte, longBuffer)
		}
		if len(left) == 0 {
			c.link.hurry(0)
		} else if len(left) <= n { // a request began with this read
			c.link.hurry(requestTimeout)
		}
		rest = buf[:copy(buf, left)]
	}
}

// answer answers the ordinary requests that b begins with. It returns what is left, and whether
// that may be the beginning of another.
func (w *web) answer(c *conn, b []byte) (rest []byte, ordinary bool, err error) {
	out := writers.Get().(*bufio.Writer)
	defer writers.Put(out)
	out.Reset(c)
	r, size := quickRequest{}, 0
	for rest = b; err == nil; rest = afterEmptyLines(rest[size:]) {
		if r, size = parse(rest); size <= 0 || w.draining.Load() {
			break
		}
		a := answer{err: errDenied}
		if w.authorised(r.authorization) {
			a = w.cache.getHeld(&w.tally, r.key, c.link.hold)
		}
		head, body := w.appendAnswer(out.AvailableBuffer(), &r, &a, w.cache.now())
		out.Write(head)
		_, err = out.WriteString(body) // which does not copy the rest of a large one
		c.link.letGo()
	}
	return rest, size == 0, out.Flush()
}

var writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, flushAt) }}

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

// appendCaching adds how long an answer may be kept, and how the cache came by it (RFC 9211).
func (w *web) appendCaching(b []byte, a *answer, now time.Duration) []byte {
	cacheable := a.err == nil || a.err == errAbsent && w.cache.absent > 0
	if cacheable {
		b = appendField(b, "Age: ", int((now-a.fetched)/time.Second))
		b = appendField(b, "Cache-Control: max-age=", int((a.expires-a.fetched)/time.Second))
	} else if b = append(b, "Cache-Control: no-store\r\n"...); a.flight == nil { // the cache had no part in it
		return b
	}
	how := "fwd=miss"
	if a.expired {
		how = "fwd=stale"
	} else if a.flight == nil {
		how = "hit"
	}
	b = append(append(b, "Cache-Status: redis_proxy; "...), how...)
	if a.flight == nil {
		return appendField(b, "; ttl=", int((a.expires-now)/time.Second))
	}
	if cacheable && a.flight.stored {
		b = append(b, "; stored"...)
	}
	if a.source == fromAnother {
		b = append(b, "; collapsed"...)
	}
	return append(b, "\r\n"...)
}

// A quickRequest is an ordinary request: GET or HEAD, well-formed to the byte, with one Host, no
// body, and no field that asks for what net/http alone knows. Fields that mean nothing here are
// skipped. Its parts lie in the buffer that it was read into.
type quickRequest struct {
	head, host    bool
	old, kept     bool // HTTP/1.0, which need not have a Host, and must ask to be kept alive
	key           []byte
	authorization []byte // nil: none
	tags          []byte // of If-None-Match; nil: none
}

const hostBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._:[]"

// parse returns the first request in b and its size: 0 if it is not whole, -1 if not ordinary.
func parse(b []byte) (r quickRequest, size int) {
	for rest, first := b, true; ; first = false {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		line, crlf := bytes.CutSuffix(line, []byte("\r"))
		switch rest = after; {
		case !whole:
			return r, 0
		case crlf && len(line) == 0 && (r.host || r.old) && (r.kept || !r.old):
			return r, len(b) - len(rest)
		case !crlf || first && !r.begin(line) || !first && !r.field(line):
			return r, -1
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
		l := c | ' ' // digits and hyphens stay what they are; only ASCII has cases
		if (l < 'a' || l > 'z') && (c < '0' || c > '9') && strings.IndexByte("-!#$%&'*+.^_`|~", c) < 0 {
			return false
		}
		lower[min(i, len(lower)-1)] = l
	}
	if val = bytes.Trim(val, " \t"); !ok || !printable(val) {
		return false
	}
	switch string(lower[:min(len(name), len(lower))]) {
	case "host":
		ok = !r.host && len(bytes.TrimLeft(val, hostBytes)) == 0
		r.host = true
	case "connection":
		r.kept = true
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

// handOver has net/http serve c through as, which is c or wraps it. It sets the read deadlines from
// now on.
func (w *web) handOver(c *conn, as net.Conn) {
	c.link.idle = 0
	l := &oneConn{conn: as}
	if w.server.Serve(l); l.conn != nil { // the server is shut down
		c.Close()
	}
}

// A oneConn is a listener that accepts one connection.
type oneConn struct{ conn net.Conn }

func (l *oneConn) Accept() (c net.Conn, err error) {
	if c, l.conn = l.conn, nil; c == nil {
		err = net.ErrClosed
	}
	return c, err
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return nil }

// A counted connection is one of HTTP/1 that net/http serves. It counts what net/http reads of a
// header against the budget of requests, until the next deadline: net/http sets some around each
// header. It skips empty lines before a request (RFC 9112 §2.2), which net/http refuses.
type counted struct {
	*conn
	header        atomic.Bool // it is read; a body is not kept
	body          atomic.Bool // a body is read, and no header after it
	held          atomic.Int64
	lines, length int // of the header so far, and of its last line
}

// ConnectionState keeps net/http from looking for HTTP/2 in the middle of a connection.
func (h *counted) ConnectionState() (none tls.ConnectionState) { return }

func (h *counted) SetReadDeadline(t time.Time) error {
	left := time.Until(t)
	h.header.Store(left > bodyTimeout)
	h.body.Store(h.body.Load() || 0 < left && left <= bodyTimeout)
	h.link.server.requests.release("", int(h.held.Swap(0)))
	return h.conn.SetReadDeadline(t)
}

func (h *counted) Read(p []byte) (n int, err error) {
	for n == 0 && err == nil {
		if n, err = h.conn.Read(p); !h.body.Load() {
			header, rest := h.cut(p[:n])
			if len(rest) > 0 {
				h.unread = slices.Concat(rest, h.unread)
			}
			n = copy(p, header)
		}
	}
	if !h.header.Load() {
		return n, err
	}
	cost := n + lineCost*bytes.Count(p[:n], []byte("\n"))
	if h.link.server.requests.hold("", cost) != nil {
		return 0, errTooMuchSent
	}
	h.held.Add(int64(cost))
	return n, err
}

// cut returns b without empty lines before a header, up to the header's end, and the rest.
func (h *counted) cut(b []byte) (header, rest []byte) {
	if h.lines+h.length == 0 {
		if b = afterEmptyLines(b); string(b) == "\r" { // perhaps half of an empty line
			b = nil
		}
	}
	for i, c := range b {
		switch {
		case c == '\n' && h.length == 0:
			h.lines = 0
			return b[:i+1], b[i+1:]
		case c == '\n':
			h.lines, h.length = h.lines+1, 0
		case c != '\r':
			h.length++
		}
	}
	return b, nil
}

func (h *counted) Close() error {
	h.SetReadDeadline(time.Now())
	return h.conn.Close()
}

// complaints takes what net/http has to say. Only panics are news: the rest is about clients.
type complaints struct{ log *slog.Logger }

func (c complaints) Write(p []byte) (int, error) {
	text, _, _ := strings.Cut(string(p), `"`) // what it quotes is the client's, a key perhaps
	if strings.Contains(text, "panic") {
		c.log.Error(strings.TrimSpace(text))
	}
	return len(p), nil
}

// newAdmin serves metrics, health and profiles, and drops keys that it is asked to forget. There is
// no ServeMux in front, as that would clean the key.
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
		path := r.URL.Path
		key, isKey := strings.CutPrefix(path, "/cache/")
		keys := [][]byte{[]byte(key)}
		if key == "" {
			keys = nil // all
		}
		switch {
		case isKey && r.Method == http.MethodDelete:
			forget(keys)
			rw.WriteHeader(http.StatusNoContent)
		case path == "/readyz" && !ready():
			http.Error(rw, "Redis cannot be read", http.StatusServiceUnavailable)
		case path == "/healthz" || path == "/readyz":
			io.WriteString(rw, "ok\n")
		case path == "/metrics":
			rw.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			writeMetrics(rw, figures())
		case path == "/":
			rw.Header().Set("Content-Security-Policy", pagePolicy)
			rw.Header().Set("Content-Type", "text/html; charset=utf-8")
			io.WriteString(rw, adminPage)
		case strings.HasPrefix(path, "/debug/pprof/") && path != "/debug/pprof/cmdline": // that would show secrets
			http.DefaultServeMux.ServeHTTP(rw, r) // where package pprof puts its handlers
		default:
			http.NotFound(rw, r)
		}
	}
	return &http.Server{Handler: http.HandlerFunc(serve), ConnState: limit, ReadHeaderTimeout: requestTimeout,
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
		name, _, _ := strings.Cut(f.metric, "{")
		kind, lines := "gauge", fmt.Sprintln(f.metric, f.value)
		if h, ok := f.value.(histogram); ok {
			kind, lines = "histogram", bucketLines(name, h)
		}
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		if name != last {
			fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, f.help, name, kind)
		}
		last = name
		io.WriteString(out, lines)
	}
}

// bucketLines returns the lines of a histogram, whose buckets are cumulative.
func bucketLines(name string, h histogram) (lines string) {
	count := int64(0)
	for i, bound := range bounds {
		count += h.counts[i]
		lines += fmt.Sprintf("%s_bucket{le=\"%v\"} %d\n", name, bound, count)
	}
	return lines + fmt.Sprintf("%s_sum %g\n%s_count %d\n", name, h.sum.Seconds(), name, count)
}

// pagePolicy allows what the page itself consists of, by digest, and requests to its own host.
var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; style-src " + digestOf("style") +
	"; script-src " + digestOf("script") + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// digestOf returns the digest of an element of the page, as a source in a Content-Security-Policy.
func digestOf(element string) string {
	_, text, _ := strings.Cut(adminPage, "<"+element+">")
	text, _, _ = strings.Cut(text, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// adminPage polls /metrics every two seconds and keeps five minutes of it. It names the four
// figures that come first; every other one gets a row by its name.
const adminPage = `<!doctype html><html lang="en"><meta charset="utf-8"><title>redis_proxy</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --accent: light-dark(#1f66d1, #6fabff); --alarm: light-dark(#b3261e, #ff8a80) }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 1rem }
h1, p, ul { margin: 0 0 .7rem; padding: 0 } a, polyline { color: var(--accent) } output { color: var(--alarm) }
ul { --wide: 22rem; display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--wide)),
	1fr)); list-style: none; overflow-wrap: anywhere } small { opacity: .7 }
li { display: grid; grid-template-columns: 1fr 4.5rem 5rem; gap: .7rem; border-bottom: 1px solid #8883 }
b { font-variant-numeric: tabular-nums; text-align: right } svg { width: 100%; height: 1.6rem }
polyline { fill: none; stroke: currentcolor; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.first { --wide: 9.5rem; gap: .7rem } .first b { font-size: 1.6rem; line-height: 1.2; text-align: left }
.first li { display: block; padding: .5rem .8rem; border: 1px solid #8885; border-radius: .5rem }
.first :is(span, b, svg) { display: block } .first svg { height: 4rem; margin-top: .4rem }
</style><h1>redis_proxy</h1><p></p><output></output><ul class="first"></ul><ul></ul><small>Up to five minutes, from 0
up; rates and p99 are over two seconds. <a href="metrics">metrics</a> <a href="readyz">readyz</a>
<a href="debug/pprof/">profiles</a></small><template><li><span></span><b></b><svg viewBox="0 0 100 100"
preserveAspectRatio="none" aria-hidden="true"><polyline /></svg></li></template><script>
const $ = query => document.querySelector(query), samples = [], help = {}, rows = {}, scales = [
	[/^Hits|cpu/, [[.01, '%']]], [/_total|requests/i, [[1, '/s']]],
	[/bytes|memory/i, [[2 ** 30, ' GB'], [2 ** 20, ' MB'], [2 ** 10, ' KB'], [1, ' B']]],
	[/seconds|p99/, [[86400, ' days'], [3600, ' h'], [60, ' min'], [1, ' s'], [1e-3, ' ms']]], [/./, [[1, '']]]]
let failed = '' // when the first of the latest polls without an answer was
function format(v, key) {
	const [, scale] = scales.find(([names]) => names.test(key))
	const [size, unit] = scale.find(([size]) => v >= size) || scale.at(-1)
	const n = v / size, digits = { maximumSignificantDigits: n < 999.5 ? 3 : 9 }
	if (key == 'tracking') return ['off', 'down', 'live'][v]
	return n >= 0 ? n.toLocaleString('en', digits) + unit : '–'
}
function read(text) { // returns a sample: gauges, and how much counters and histograms rise a second
	const t = Date.now(), raw = {}, info = {}, figures = {}, last = samples.at(-1), buckets = []
	const sum = ids => Object.keys(figures).filter(id => ids.test(id)).reduce((n, id) => n + figures[id], 0)
	for (const line of text.replaceAll('redis_proxy_', '').split('\n')) {
		const [, of, words] = /^# HELP (\S+) (.*)/.exec(line) || []
		const [, id, name, part, labels, value] = /^((\w+?)(_bucket|_sum|_count)?({.*})?) (\S+)$/.exec(line) || []
		const rise = Math.max(0, (value - last?.raw[id]) / (t - last?.t) * 1e3)
		raw[id] = value
		if (of) help[of] = words
		else if (/info$/.test(name)) for (const [, label, v] of labels.matchAll(/(\w+)="(.*?)"/g)) info[label] = v
		else if (part == '_bucket') buckets.push([parseFloat(labels.slice(5)) || buckets.at(-1)[0], rise])
		else if (part == '_count') // the last line of a histogram
			figures[name + ' p99'] = buckets.splice(0).find(([, n]) => n > 0 && n >= .99 * rise)?.[0]
		else if (/_total$/.test(name)) figures[id] = rise
		else if (name && !part) figures[id] = /start_time/.test(name) ? t / 1e3 - value : +value
	}
	const all = sum(/^requests_total/), hits = sum(/^requests_total.*"(absent_)?hit"/)
	const first = { Requests: all, Hits: hits / all, 'p99 of Redis': figures['upstream_seconds p99'] }
	return { t, raw, info, figures: { ...first, Memory: figures.process_resident_memory_bytes, ...figures } }
}
function show({ t, figures, info: { address, redis, ...facts } }) {
	const span = Math.max(3e4, t - samples[0].t)
	for (const key of ['tracking', 'upstream_nodes']) facts[key] = format(figures[key], key)
	const pairs = Object.entries(facts).map(([name, text]) => name.replaceAll('_', ' ') + ': ' + text)
	$('p').textContent = [address + ' in front of Redis at ' + redis, ...pairs].join(' · ')
	Object.keys(figures).forEach((key, i) => {
		const list = $(i < 4 ? '.first' : 'ul + ul'), drawn = samples.filter(s => s.figures[key] >= 0)
		const row = rows[key] ??= list.appendChild($('template').content.firstChild.cloneNode(true))
		const top = key == 'Hits' ? 1 : Math.max(...drawn.map(s => s.figures[key])) || 1
		const points = drawn.map(s => [100 - 100 * (t - s.t) / span, 98 - 96 * s.figures[key] / top])
		row.title = help[/\w+/.exec(key)] || ''
		row.querySelector('span').textContent = key.replace(/[{,]\w+="/g, ' ').replace(/["}]/g, '')
		row.querySelector('b').textContent = format(figures[key], key)
		row.querySelector('polyline').setAttribute('points', points.join(' '))
	})
}
(async function poll() {
	const answer = await fetch('metrics', { signal: AbortSignal.timeout(5000) }).catch(() => 0)
	const text = answer.ok ? await answer.text().catch(() => '') : ''
	failed = text ? '' : failed || new Date().toLocaleTimeString()
	$('output').textContent = failed && 'no answer since ' + failed
	if (text) show(samples[samples.push(read(text)) - 1])
	while (samples[0]?.t < Date.now() - 3e5) samples.shift()
	setTimeout(poll, 2000)
})()
</script>`
