// HTTP: the key from the path, the answer and its headers.
//
// net/http reads, frames and times requests; RFC 9110 (semantics), RFC 9111 (caching) and RFC 9211
// (Cache-Status) say what goes into the answers.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math"
	"net"
	"net/http"
	_ "net/http/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	// maxAdmin bounds the connections to the admin listener.
	maxAdmin       = 64
	headerTimeout  = 10 * time.Second
	bodyTimeout    = time.Second
	maxHeaderBytes = 128 << 10
	// quickBuffer is what a connection has to read plain requests into.
	quickBuffer = 2 << 10
)

// webSettings are what the flags say about HTTP.
type webSettings struct {
	idleTimeout  time.Duration // of kept-alive connections; 0: httpIdleTimeout
	writeTimeout time.Duration // how long an HTTP/2 stream may take nothing of its answer
}

// A web is the HTTP front end. It is the net.Listener of its own http.Server, to which it gives the
// connections that it does not answer itself.
type web struct {
	webSettings
	cache    *cache
	password *password
	server   http.Server
	conns    chan net.Conn
	closed   chan struct{} // closed when conns is no longer received from
	addr     net.Addr
	tally    tally

	draining  atomic.Bool
	stopped   atomic.Bool
	unstarted sync.Map // of net.Conn: connections that net/http has had no whole request from
}

func newWeb(s webSettings, c *cache, pw *password, addr net.Addr, log *slog.Logger) *web {
	w := &web{webSettings: s, cache: c, password: pw, conns: make(chan net.Conn), closed: make(chan struct{}), addr: addr}
	w.server = http.Server{
		Handler:                      w,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  cmp.Or(s.idleTimeout, httpIdleTimeout),
		MaxHeaderBytes:               maxHeaderBytes,
		ConnState:                    w.follow,
		ErrorLog:                     errorLog(log),
		Protocols:                    new(http.Protocols),
	}
	w.server.Protocols.SetHTTP1(true)
	w.server.Protocols.SetHTTP2(true)
	w.server.Protocols.SetUnencryptedHTTP2(true)
	return w
}

// run serves until shutdown.
func (w *web) run() { w.server.Serve(w) }

// serve answers plain requests, and hands the connection to net/http at the first that is not plain. One
// that negotiated HTTP/2 is net/http's from the start, and so is every one if there is a password.
func (w *web) serve(c *conn) {
	var rest net.Conn = c
	switch {
	case c.negotiatedHTTP2():
		c.release(nil)
		rest = c.Conn
	case w.password.needed:
		c.release(nil)
	case !w.quick(c):
		c.Close()
		return
	}
	select {
	case w.conns <- rest:
	case <-w.closed:
		c.Close()
	}
}

// refuse answers a connection that is one too many.
func (w *web) refuse(c *conn) {
	begin := make([]byte, len("PRI"))
	if _, err := io.ReadFull(c, begin); err != nil || string(begin) == "PRI" {
		return // HTTP/2 has no answer before a request
	}
	const text = "too many clients\n"
	fmt.Fprintf(c, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nCache-Control: no-store\r\nConnection: close\r\n"+
		"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
}

// drain has connections closed with their next answer. (SetKeepAlivesEnabled would close those that
// are idle, although a request may be on its way.)
func (w *web) drain() { w.draining.Store(true) }

// follow notes which connections have not sent a whole request yet. http.Server.Shutdown waits for those as
// if they were being answered.
func (w *web) follow(c net.Conn, state http.ConnState) {
	if state != http.StateNew {
		w.unstarted.Delete(c)
	} else if w.unstarted.Store(c, nil); w.stopped.Load() { // after Store, as shutdown may have looked before
		c.Close()
	}
}

// shutdown closes connections that are not being answered, and the others when they are or ctx is done.
func (w *web) shutdown(ctx context.Context) {
	w.stopped.Store(true)
	w.unstarted.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
	if w.server.Shutdown(ctx) != nil {
		w.server.Close()
	}
}

// Accept, Close and Addr make a net.Listener.
func (w *web) Accept() (net.Conn, error) {
	select {
	case c := <-w.conns:
		return c, nil
	case <-w.closed:
		return nil, net.ErrClosed
	}
}

// Close is called once, by the http.Server.
func (w *web) Close() error   { close(w.closed); return nil }
func (w *web) Addr() net.Addr { return w.addr }

// ServeHTTP answers GET and HEAD for the key that is everything after the path's first slash. There is
// no ServeMux in front, as that would clean the path.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	h := rw.Header()
	body := r.ContentLength != 0 && r.ProtoMajor == 1 // it means nothing here
	if body || w.draining.Load() {
		h.Set("Connection", "close")
	}
	if body { // net/http reads some of it, or the client might not see the answer
		http.NewResponseController(rw).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	if !w.authorised(r) {
		h["Www-Authenticate"] = []string{`Basic realm="redis_proxy"`, "Bearer"}
		fail(rw, http.StatusUnauthorized, "a password is required")
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		fail(rw, http.StatusMethodNotAllowed, "only GET and HEAD are allowed")
		return
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/")
	if !ok {
		fail(rw, http.StatusBadRequest, "the path must begin with a slash")
		return
	}
	a, now := w.get([]byte(path))
	for line := range bytes.Lines(w.appendFields(nil, &a, now)) {
		name, val, _ := bytes.Cut(line, []byte(": "))
		h[string(name)] = []string{string(bytes.TrimSpace(val))}
	}
	if a.err != nil {
		status, text := httpError(a.err)
		fail(rw, status, text)
		return
	}
	http.ServeContent(contentWriter{rw, w.writeTimeout}, r, "", time.Time{}, strings.NewReader(a.content()))
}

// get asks for one key.
func (w *web) get(key []byte) (answer, time.Duration) {
	keys, answers := [1][]byte{key}, [1]answer{}
	w.cache.get(&w.tally, w.cache.now(), keys[:], answers[:])
	return answers[0], w.cache.now()
}

// authorised reports whether a request brings the password, in one of the two ways of RFC 7617 and 6750.
func (w *web) authorised(r *http.Request) bool {
	if !w.password.needed {
		return true
	}
	if _, password, ok := r.BasicAuth(); ok {
		return w.password.matches([]byte(password))
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && w.password.matches([]byte(strings.TrimLeft(token, " ")))
}

// A contentWriter gives the errors that http.ServeContent writes (412, 416) the header of all errors, and an
// HTTP/2 client that opens no window as little time as one that does not read.
type contentWriter struct {
	http.ResponseWriter
	stuck time.Duration
}

func (w contentWriter) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		w.Header().Set("Cache-Control", "no-store")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w contentWriter) Write(p []byte) (int, error) {
	http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.stuck))
	return w.ResponseWriter.Write(p)
}

// fail answers with an error: one line of text.
func fail(rw http.ResponseWriter, status int, text string) {
	rw.Header().Set("Cache-Control", "no-store")
	http.Error(rw, text, status)
}

// httpError returns the status and the text for the error of an answer.
func httpError(err error) (status int, text string) {
	for _, row := range []struct {
		err    error
		status int
	}{
		{errAbsent, http.StatusNotFound},
		{errTimeout, http.StatusGatewayTimeout},
		{errWrongType, http.StatusConflict},
		{errRefused, http.StatusBadGateway},
	} {
		if errors.Is(err, row.err) {
			return row.status, row.err.Error()
		}
	}
	return http.StatusBadGateway, errUnavailable.Error()
}

// appendFields adds the header fields of the answer to a key, a line each, but those that every answer has.
func (w *web) appendFields(b []byte, a *answer, now time.Duration) []byte {
	b = append(w.appendCacheStatus(append(b, "Cache-Status: "...), a, now), "\r\n"...)
	if a.err != nil {
		return b
	}
	content := a.content()
	b = strconv.AppendInt(append(b, "Age: "...), int64((now-a.fetched)/time.Second), 10)
	b = strconv.AppendInt(append(b, "\r\nCache-Control: max-age="...), int64((a.expires-a.fetched)/time.Second), 10)
	b = append(append(b, "\r\nContent-Type: "...), contentType(content)...)
	b = appendETag(append(b, "\r\nEtag: "...), content)
	return append(b, "\r\nX-Content-Type-Options: nosniff\r\n"...)
}

// appendCacheStatus adds how the cache handled a request (RFC 9211).
func (w *web) appendCacheStatus(b []byte, a *answer, now time.Duration) []byte {
	ttl := int64(math.Floor((a.expires - now).Seconds()))
	if a.source == fromCache {
		return strconv.AppendInt(append(b, "redis_proxy; hit; ttl="...), ttl, 10)
	}
	if a.expired {
		b = append(b, "redis_proxy; fwd=stale"...)
	} else {
		b = append(b, "redis_proxy; fwd=miss"...)
	}
	switch {
	case a.source == fromStale:
		b = strconv.AppendInt(append(b, "; ttl="...), ttl, 10)
	case a.err == nil && a.flight.stored:
		b = append(b, "; stored"...)
	}
	if a.source == fromAnother {
		b = append(b, "; collapsed"...)
	}
	return b
}

// contentType is of what a value looks like: Redis does not say.
func contentType(content string) string {
	if utf8.ValidString(content) {
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}

// appendETag adds a strong validator (RFC 9110 §8.8.3): a digest of the value, the same on every replica.
func appendETag(b []byte, content string) []byte {
	digest := sha256.New()
	// By parts, and not as bytes: that would copy the whole value.
	io.Copy(digest, io.LimitReader(strings.NewReader(content), int64(len(content))))
	return append(hex.AppendEncode(append(b, '"'), digest.Sum(nil)[:16]), '"')
}

// quick answers requests as ServeHTTP does, without net/http, which costs more than all the rest of a
// hit. It takes only what cannot be misunderstood: see plainGet. It returns true when net/http is to go on
// with what comes next, false when the connection is done with.
func (w *web) quick(c *conn) bool {
	buf := make([]byte, quickBuffer)
	for kept, answered := 0, false; ; {
		n, _ := c.Read(buf[kept:]) // if there is an error besides bytes, the next Read has it too
		if n == 0 {
			return false
		}
		var err error
		page := pages.Get().(*[]byte)
		out, unread := (*page)[:0], buf[:kept+n]
		for len(unread) > 0 && err == nil {
			key, size := plainGet(unread)
			if size == 0 || w.draining.Load() {
				break
			}
			unread, answered = unread[size:], true
			var content string
			out, content = w.appendAnswer(out, key)
			if len(out)+len(content) <= flushAt {
				out = append(out, content...)
				continue
			}
			large := bufio.NewWriterSize(c, flushAt)
			large.Write(out)
			large.WriteString(content)
			out, err = out[:0], large.Flush()
		}
		if len(out) > 0 && err == nil {
			_, err = c.Write(out)
		}
		*page = out
		pages.Put(page)
		if err != nil {
			return false
		}
		// Between requests net/http waits for 4 bytes, and says nothing if they never come.
		if len(unread) >= 4 || len(unread) > 0 && !answered {
			c.release(unread)
			return true
		}
		kept = copy(buf, unread)
	}
}

// pages are buffers for answers.
var pages = sync.Pool{New: func() any { b := make([]byte, 0, flushAt); return &b }}

// appendAnswer adds the header of the answer to one GET, and returns its body.
func (w *web) appendAnswer(b, key []byte) (out []byte, body string) {
	a, now := w.get(key)
	if a.err == nil {
		body = a.content()
		b = append(b, "HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\n"...)
	} else {
		status, text := httpError(a.err)
		body = text + "\n"
		b = strconv.AppendInt(append(b, "HTTP/1.1 "...), int64(status), 10)
		b = append(append(b, ' '), http.StatusText(status)...)
		b = append(b, "\r\nCache-Control: no-store\r\nContent-Type: text/plain; charset=utf-8\r\n"...)
		b = append(b, "X-Content-Type-Options: nosniff\r\n"...)
	}
	b = w.appendFields(b, &a, now)
	b = time.Now().UTC().AppendFormat(append(b, "Date: "...), http.TimeFormat)
	b = strconv.AppendInt(append(b, "\r\nContent-Length: "...), int64(len(body)), 10)
	return append(b, "\r\n\r\n"...), body
}

// plainGet returns the key and the size of a request that can be answered without net/http; size 0 means
// that it cannot, or that it is not whole. Plain is: GET, a path of characters that stand for themselves,
// HTTP/1.1, one Host, and no header but those that have no meaning here, each on a line of its own that
// ends in CR LF. Whatever else there may be in a request, a body above all, net/http decides.
func plainGet(b []byte) (key []byte, size int) {
	line, rest, ok := cutLine(b)
	if !ok {
		return nil, 0
	}
	key, get := bytes.CutPrefix(line, []byte("GET /"))
	key, version := bytes.CutSuffix(key, []byte(" HTTP/1.1"))
	if !get || !version || !plain(key, "-._~!$&'()*+,;=:@/") { // pchar and the slash (RFC 3986 §3.3)
		return nil, 0
	}
	for hosts := 0; ; {
		if line, rest, ok = cutLine(rest); !ok {
			return nil, 0
		}
		if len(line) == 0 {
			if hosts != 1 {
				return nil, 0
			}
			return key, len(b) - len(rest)
		}
		name, val, ok := bytes.Cut(line, []byte(": "))
		known := func(header string) bool { return strings.EqualFold(string(name), header) }
		if ok && known("Host") {
			hosts++
			ok = plain(val, "-._:[]")
		} else if ok {
			ok = slices.ContainsFunc(ignored, known) && plain(val, " !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
		}
		if !ok {
			return nil, 0
		}
	}
}

// ignored are the headers that have no meaning here.
var ignored = []string{"User-Agent", "Accept", "Accept-Encoding", "Accept-Language", "Referer", "Cookie"}

// cutLine cuts off a line that ends in CR LF.
func cutLine(b []byte) (line, rest []byte, ok bool) {
	i := bytes.IndexByte(b, '\n')
	if i < 1 || b[i-1] != '\r' {
		return nil, nil, false
	}
	return b[:i-1], b[i+1:], true
}

// plain tells whether b consists of letters, digits and others.
func plain(b []byte, others string) bool {
	for _, c := range b {
		letter := 'a' <= c|' ' && c|' ' <= 'z'
		if !letter && (c < '0' || '9' < c) && strings.IndexByte(others, c) < 0 {
			return false
		}
	}
	return true
}

// complaints takes what net/http has to say. What is not a panic is about a client.
type complaints struct{ log *slog.Logger }

func (c complaints) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(p, []byte("panic")) {
		level = slog.LevelError
	}
	text, _, _ := strings.Cut(string(p), `"`) // what it quotes is the client's, a key perhaps
	c.log.Log(context.Background(), level, strings.TrimSpace(text))
	return len(p), nil
}

// errorLog returns what net/http logs to.
func errorLog(l *slog.Logger) *log.Logger { return log.New(complaints{l}, "", 0) }

// newAdmin serves metrics, health and profiles, and drops keys that it is asked to forget.
func newAdmin(figures func() []figure, ready func() bool, forget func([][]byte), log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "alive\n") })
	mux.HandleFunc("/readyz", func(rw http.ResponseWriter, _ *http.Request) {
		if !ready() {
			fail(rw, http.StatusServiceUnavailable, "Redis cannot be read")
			return
		}
		io.WriteString(rw, "ready\n")
	})
	mux.HandleFunc("/metrics", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		writeMetrics(rw, figures())
	})
	mux.HandleFunc("/debug/pprof/cmdline", http.NotFound) // it would show secrets
	mux.HandleFunc("GET /{$}", servePage)
	mux.Handle("/debug/pprof/", http.DefaultServeMux) // where package pprof puts its handlers
	var open atomic.Int64
	return &http.Server{
		ReadHeaderTimeout: headerTimeout, IdleTimeout: httpIdleTimeout, ErrorLog: errorLog(log),
		ConnState: func(c net.Conn, state http.ConnState) {
			switch {
			case state == http.StateNew && open.Add(1) > maxAdmin:
				c.Close()
			case state == http.StateClosed:
				open.Add(-1)
			}
		},
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			key, ok := strings.CutPrefix(r.URL.Path, "/cache/") // not by mux, which would clean the key
			switch {
			case !ok || r.Method != http.MethodDelete:
				mux.ServeHTTP(rw, r)
				return
			case key == "":
				forget(nil)
			default:
				forget([][]byte{[]byte(key)})
			}
			rw.WriteHeader(http.StatusNoContent)
		}),
	}
}

// writeMetrics writes the text format of Prometheus.
func writeMetrics(out io.Writer, figures []figure) {
	last := ""
	for _, f := range figures {
		if f.metric == "" {
			continue
		}
		name, _, _ := strings.Cut(f.metric, "{")
		kind := "gauge"
		if _, ok := f.value.(histogram); ok {
			kind = "histogram"
		} else if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		prefix := "redis_proxy_"
		if strings.HasPrefix(name, "process_") { // a name that every exporter has
			prefix = ""
		}
		if name != last {
			fmt.Fprintf(out, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, f.help, prefix, name, kind)
			last = name
		}
		switch v := f.value.(type) {
		case float64:
			fmt.Fprintf(out, "%s%s %g\n", prefix, f.metric, v)
		default:
			fmt.Fprintf(out, "%s%s %d\n", prefix, f.metric, v)
		case histogram:
			writeHistogram(out, prefix+name, v)
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
			bound = strconv.FormatFloat(h.bounds[i].Seconds(), 'g', -1, 64)
		}
		fmt.Fprintf(out, "%s_bucket{le=%q} %d\n", name, bound, count)
	}
	fmt.Fprintf(out, "%s_sum %g\n%s_count %d\n", name, h.sum.Seconds(), name, count)
}

// servePage answers with the admin page. Its Content-Security-Policy allows what the page itself consists
// of, by digest, and requests to the host that it came from.
func servePage(rw http.ResponseWriter, _ *http.Request) {
	h := rw.Header()
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-cache")
	io.WriteString(rw, adminPage)
}

var pagePolicy = "default-src 'none'; connect-src 'self'; img-src data:; style-src " + digestOf("style") +
	"; script-src " + digestOf("script") + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// digestOf returns the digest of an element of the page, as a source in a Content-Security-Policy.
func digestOf(element string) string {
	_, after, _ := strings.Cut(adminPage, "<"+element+">")
	text, _, _ := strings.Cut(after, "</"+element+">")
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
section figure { display: grid; grid-template-columns: 1fr 5rem 5rem; gap: .7rem; border-bottom: 1px solid #8883 }
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
