// HTTP: the key from the path, the answer and its headers.
//
// net/http reads, frames and times requests; RFC 9110 (semantics), RFC 9111 (caching) and RFC 9211
// (Cache-Status) say what goes into the answers.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	headerTimeout   = 10 * time.Second
	httpIdleTimeout = 2 * time.Minute
	maxHeaderBytes  = 128 << 10
)

// A web is the HTTP front end. It is the net.Listener of its own http.Server, to which it gives the
// connections that were found to speak HTTP.
type web struct {
	proxy  *proxy
	server http.Server
	conns  chan net.Conn
	closed chan struct{} // closed when conns is no longer received from
	addr   net.Addr

	draining atomic.Bool
}

func newWeb(p *proxy, addr net.Addr) *web {
	w := &web{proxy: p, conns: make(chan net.Conn), closed: make(chan struct{}), addr: addr}
	w.server = http.Server{
		Handler:                      w,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  cmp.Or(p.cfg.idleTimeout, httpIdleTimeout),
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelWarn),
		Protocols:                    new(http.Protocols),
	}
	w.server.Protocols.SetHTTP1(true)
	w.server.Protocols.SetHTTP2(true)
	w.server.Protocols.SetUnencryptedHTTP2(true)
	return w
}

// run serves until shutdown.
func (w *web) run() { w.server.Serve(w) }

// serve takes over a connection that speaks HTTP.
func (w *web) serve(c net.Conn) {
	select {
	case w.conns <- c:
	case <-w.closed:
		c.Close()
	}
}

// refuse answers a connection that is one too many.
func (w *web) refuse(c net.Conn) {
	defer c.Close()
	const text = "too many clients\n"
	fmt.Fprintf(c, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nCache-Control: no-store\r\nConnection: close\r\n"+
		"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
}

// drain has connections closed with their next answer. (SetKeepAlivesEnabled would close those that
// are idle, although a request may be on its way.)
func (w *web) drain() { w.draining.Store(true) }

// shutdown closes idle connections, and the others when they are answered or ctx is done.
func (w *web) shutdown(ctx context.Context) {
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
	if w.draining.Load() || r.ContentLength != 0 && r.ProtoMajor == 1 {
		h.Set("Connection", "close") // a body means nothing here: do not wait for it
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
	keys, answers := [1][]byte{[]byte(path)}, [1]answer{}
	w.proxy.ask(keys[:], answers[:])
	w.proxy.wait(answers[:])
	w.proxy.count(protoHTTP, answers[:])
	a := &answers[0]
	now := w.proxy.now()
	h["Cache-Status"] = []string{w.cacheStatus(a, now)}
	if a.err != nil {
		status, text := httpError(a.err)
		fail(rw, status, text)
		return
	}
	content := a.content()
	h["Content-Type"] = []string{contentType(content)}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	h["Etag"] = []string{etag(content)}
	h["Cache-Control"] = []string{"max-age=" + seconds(w.proxy.cfg.cacheTimeout)}
	h["Age"] = []string{seconds(now - a.fetched)}
	if r.Header.Get("Range") != "" {
		rw = rangeWriter{rw}
	}
	http.ServeContent(rw, r, "", time.Time{}, strings.NewReader(content))
}

// authorised tells whether a request brings the password, in one of the two ways of RFC 7617 and 6750.
func (w *web) authorised(r *http.Request) bool {
	if w.proxy.authorised(nil) {
		return true
	}
	if _, password, ok := r.BasicAuth(); ok {
		return w.proxy.authorised([]byte(password))
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && w.proxy.authorised([]byte(token))
}

// A rangeWriter gives the one error that http.ServeContent writes the header of all errors.
type rangeWriter struct{ http.ResponseWriter }

func (w rangeWriter) WriteHeader(status int) {
	if status == http.StatusRequestedRangeNotSatisfiable {
		w.Header().Set("Cache-Control", "no-store")
	}
	w.ResponseWriter.WriteHeader(status)
}

// fail answers with an error: one line of text.
func fail(rw http.ResponseWriter, status int, text string) {
	rw.Header().Set("Cache-Control", "no-store")
	http.Error(rw, text, status)
}

// httpError says over HTTP what is wrong with an answer.
func httpError(err error) (status int, text string) {
	var refusal replyError
	switch {
	case errors.Is(err, errAbsent):
		return http.StatusNotFound, "no such key"
	case errors.Is(err, errTimeout):
		return http.StatusGatewayTimeout, "upstream timed out"
	case errors.As(err, &refusal) && refusal.wrongType():
		return http.StatusConflict, "the key holds another type than a string"
	case errors.As(err, &refusal):
		return http.StatusBadGateway, "upstream refused"
	}
	return http.StatusBadGateway, "upstream unavailable"
}

// cacheStatus tells how the cache handled a request (RFC 9211).
func (w *web) cacheStatus(a *answer, now time.Duration) string {
	if a.source == fromCache {
		return "redis_proxy; hit; ttl=" + seconds(a.fetched+w.proxy.cfg.cacheTimeout-now)
	}
	status := "redis_proxy; fwd=miss"
	if a.expired {
		status = "redis_proxy; fwd=stale"
	}
	switch {
	case a.source == fromStale:
		status += "; ttl=" + seconds(a.fetched+w.proxy.cfg.cacheTimeout-now)
	case a.err == nil && a.fetch.stored:
		status += "; stored"
	}
	if a.source == fromAnother {
		status += "; collapsed"
	}
	return status
}

// contentType is of what a value looks like: Redis does not say.
func contentType(content string) string {
	if utf8.ValidString(content) {
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}

// etag is a strong validator (RFC 9110 §8.8.3): a digest of the value, the same on every replica.
func etag(content string) string {
	sum := sha256.Sum256([]byte(content))
	return `"` + hex.EncodeToString(sum[:16]) + `"`
}

// seconds is a duration as HTTP has it: in whole seconds.
func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// newAdmin serves metrics, health and profiles.
func newAdmin(p *proxy) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "alive\n") })
	mux.HandleFunc("/readyz", func(rw http.ResponseWriter, _ *http.Request) {
		if p.pool.ping() != nil {
			fail(rw, http.StatusServiceUnavailable, "Redis does not answer")
			return
		}
		io.WriteString(rw, "ready\n")
	})
	mux.HandleFunc("/metrics", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		writeMetrics(rw, p)
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout, ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelWarn)}
}

// writeMetrics writes the text format of Prometheus.
func writeMetrics(out io.Writer, p *proxy) {
	header := func(name, kind, help string) {
		fmt.Fprintf(out, "# HELP redis_proxy_%s %s\n# TYPE redis_proxy_%s %s\n", name, help, name, kind)
	}
	header("requests_total", "counter", "Keys asked for, by protocol and how they were answered.")
	for proto := range protocols {
		for o := range outcomes {
			fmt.Fprintf(out, "redis_proxy_requests_total{protocol=%q,result=%q} %d\n", protocols[proto], outcomes[o], p.counts[proto][o].Load())
		}
	}
	for _, f := range p.figures() {
		if f.metric != "" {
			header(f.metric, f.kind, f.help)
			fmt.Fprintf(out, "redis_proxy_%s %d\n", f.metric, f.value)
		}
	}
	header("upstream_seconds", "histogram", "Time from sending a batch of GETs to its last reply.")
	_, _, fetched := p.pool.usage()
	count := int64(0)
	for i, n := range fetched.latencies {
		count += n
		bound := "+Inf"
		if i < len(latencyBounds) {
			bound = strconv.FormatFloat(latencyBounds[i].Seconds(), 'g', -1, 64)
		}
		fmt.Fprintf(out, "redis_proxy_upstream_seconds_bucket{le=%q} %d\n", bound, count)
	}
	fmt.Fprintf(out, "redis_proxy_upstream_seconds_sum %g\nredis_proxy_upstream_seconds_count %d\n", fetched.latencySum.Seconds(), count)
}
