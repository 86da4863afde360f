// Unit tests, fuzz targets and benchmarks, in the order of the files.
//
// They need nothing outside the process: Redis is played by a function on a loopback socket, or is
// an address that cannot be dialled. Where time matters, it is testing/synctest's or a parameter.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"weak"

	"github.com/gomodule/redigo/redis"
)

// compare reports a difference. Long values are cut short.
func compare[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%.200s: got %.500s; want %.500s", strings.Trim(strconv.Quote(what), `"`), fmt.Sprintf("%#v", got),
			fmt.Sprintf("%#v", want))
	}
}

// Parts are the cache and what stands on it and under it, wired as run wires them, without a
// listener.
type parts struct {
	cfg   config
	cache *cache
	pool  *pool
	web   *web
	resp  *resp
}

// newParts makes the parts with these flags. Unless they say otherwise, the address of their Redis
// is malformed, so that a miss fails before it reaches any network.
func newParts(t testing.TB, flags ...string) *parts {
	t.Helper()
	cfg, err := parseConfig(slices.Concat([]string{"--redis-port", "1"}, patience, flags), nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.redisPort == 1 {
		cfg.pool.redis.hosts = "[" // nobody to ask
	}
	p, log := &parts{cfg: cfg}, slog.New(slog.DiscardHandler)
	p.cache = newCache(cfg.cache, func(fs []*flight) { p.pool.enqueue(fs) })
	p.cache.typical.Store(1) // nobody has to find out that values are small
	p.pool = newPool(cfg.pool, p.cache, log)
	t.Cleanup(p.pool.close)
	cfg.clients.requests, cfg.clients.values = newBudget(2*maxRequest), newBudget(2*maxRequest)
	p.cfg = cfg
	pw := newPassword(cfg.password)
	p.web = newWeb(cfg.clients, p.cache, pw, log)
	p.resp = &resp{cache: p.cache, password: pw, db: cfg.pool.redis.db, figures: func() []figure {
		return slices.Concat(cfg.figures(new(net.TCPAddr), p.cache.started, pw),
			keyFigures(&p.web.tally, &p.resp.tally), p.cache.figures(), p.pool.figures())
	}}
	return p
}

func (p *parts) now() time.Duration { return p.cache.now() }

// get asks for a key and waits.
func (p *parts) get(key string) answer {
	var answers [1]answer
	p.cache.get(p.now(), [][]byte{[]byte(key)}, answers[:])
	return answers[0]
}

// getHTTP asks for a key as a quick request does.
func (p *parts) getHTTP(key []byte) answer {
	l := link{server: &server{serverSettings: serverSettings{values: p.web.values}}}
	return p.cache.getHeld(&p.web.tally, key, l.hold)
}

// serveRESP serves a client that speaks RESP until it ends.
func (p *parts) serveRESP(c net.Conn) { p.resp.serve(newConn(c, p.cfg.clients)) }

// wait completes answers that askFor began.
func (p *parts) wait(answers []answer) {
	keys := make([][]byte, len(answers))
	for i := range answers {
		if answers[i].flight != nil {
			keys[i] = []byte(answers[i].flight.key)
		}
	}
	p.cache.wait(p.now(), keys, answers)
}

// cacheNow stores values as if they were fetched now.
func cacheNow(p *parts, keyValues ...string) {
	for kv := range slices.Chunk(keyValues, 2) {
		putValue(p.cache, p.now(), newValue(kv[0], []byte(kv[1]), p.now()))
	}
}

// putValue stores v.
func putValue(c *cache, now time.Duration, v value) (stored bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v.expires = v.fetched + c.ttl
	return c.put(now, v)
}

// main.go

func TestConfigReads(t *testing.T) {
	show := func(c config) string {
		return fmt.Sprintf("listen-address:%s port:%d redis:%s redis-timeout:%v client-limit:%d ",
			c.listenAddress, c.port, c.pool.redis.hosts, c.pool.timeout, c.pool.limit) +
			fmt.Sprintf("cache-size:%d cache-bytes:%d cache-timeout:%v stale-timeout:%v max-clients:%d ",
				c.cache.maxKeys, c.cache.maxBytes, c.cache.ttl, c.cache.stale, c.clients.maxClients) +
			fmt.Sprintf("idle-timeout:%v tracking:%v version:%v ", c.clients.idleTimeout, c.pool.tracking, c.version) +
			fmt.Sprintf("admin-address:%s ", c.adminAddress)
	}
	for _, tt := range []struct{ args, env, want string }{
		{"", "", "listen-address:127.0.0.1 port:8080 redis:127.0.0.1:6379 redis-timeout:1s client-limit:8 " +
			"cache-size:10000 cache-bytes:268435456 cache-timeout:30s stale-timeout:0s max-clients:10000 " +
			"idle-timeout:0s tracking:false version:false"},
		{"", "RP_PORT=1", "port:1"},
		{"", "RP_PORT=", "port:8080"},
		{"", "RP_CACHE_SIZE=5", "cache-size:5"},
		{"--port 0", "", "port:0"},
		{"--port 65535", "", "port:65535"},
		{"--port 2", "RP_PORT=1", "port:2"},
		{"--port=2", "RP_PORT=1", "port:2"},
		{"-port 2", "RP_PORT=1", "port:2"},
		{"-port=2", "", "port:2"},
		{"--port 2 --port 3", "", "port:3"},
		{"--version", "", "version:true"},
		{"--listen-address ::", "", "listen-address:::"},
		{"--cache-timeout 30", "", "cache-timeout:30s"},
		{"--cache-timeout 1.5", "", "cache-timeout:1.5s"},
		{"--cache-timeout 250ms", "", "cache-timeout:250ms"},
		{"", "RP_CACHE_TIMEOUT=1h30m", "cache-timeout:1h30m0s"},
		{"--redis-timeout .1", "", "redis-timeout:100ms"},
		{"--idle-timeout 5", "", "idle-timeout:5s"},
		{"--tracking", "", "tracking:true"},
		{"--tracking=false", "RP_TRACKING=true", "tracking:false"},
		{"", "RP_TRACKING=1", "tracking:true"},
		{"--stale-timeout 0s", "RP_STALE_TIMEOUT=5", "stale-timeout:0s"},
		{"--cache-bytes 1", "", "cache-bytes:1"},
		{"--cache-bytes 65536B", "", "cache-bytes:65536"},
		{"--cache-bytes 64KB", "", "cache-bytes:65536"},
		{"--cache-bytes 3mb", "", "cache-bytes:3145728"},
		{"--cache-bytes 2G", "", "cache-bytes:2147483648"},
		{"--redis-host ::1 --redis-port 7", "", "redis:[::1]:7"},
		{"--redis-host h", "RP_REDIS_PORT=7", "redis:h:7"},
		{"--redis-url redis://u:7 --redis-host h --redis-port 1", "", "redis:u:7"},
		{"--redis-host h", "RP_REDIS_URL=redis://u", "redis:u:6379"},
		{"--redis-url=", "RP_REDIS_URL=redis://u", "redis:127.0.0.1:6379"},
		{"--admin-address :9100", "", "admin-address::9100"},
		{"--redis-port 7", "REDIS_URL=redis://u", "redis:127.0.0.1:7"},
		{"", "PORT=1 REDIS_URL=redis://u", "port:1"},
		{"", "PORT=1 REDIS_URL=redis://u", "redis:u:6379"},
		{"", "PORT=1 RP_PORT=2", "port:2"},
		{"", "PORT=1 RP_PORT=", "port:1"},
		{"--port 3", "PORT=1", "port:3"},
		{"--port 3", "RP_PORT=x", "port:3"},
		{"--redis-host h", "REDIS_URL=redis://u", "redis:h:6379"},
		{"--redis-url=", "REDIS_URL=redis://u", "redis:127.0.0.1:6379"},
		{"", "RP_REDIS_PORT=7 REDIS_URL=redis://u", "redis:127.0.0.1:7"},
		{"", "RP_REDIS_URL=redis://h REDIS_URL=redis://u", "redis:h:6379"},
	} {
		cfg, err := parseConfig(strings.Fields(tt.args), strings.Fields(tt.env))
		if err != nil || !strings.Contains(" "+show(cfg), " "+tt.want+" ") {
			t.Errorf("%q %q: got %s, %v; want %s", tt.args, tt.env, show(cfg), err, tt.want)
		}
	}
}

// refusal is the error of a configuration that must have one.
func refusal(t *testing.T, args, env []string) string {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			t.Errorf("%q %q: got panic %v; want an error", args, env, r)
		}
	}()
	_, err := parseConfig(args, env)
	if err == nil {
		t.Errorf("%q %q: got no error", args, env)
		return ""
	}
	if strings.ContainsAny(err.Error(), "\r\n") {
		t.Errorf("%q %q: got error %q; want one line", args, env, err)
	}
	return err.Error()
}

func TestConfigRefuses(t *testing.T) {
	for _, tt := range []struct{ where, val, allowed string }{
		{"--port", "x", "from 0 to 65535"},
		{"--port", "", "from 0 to 65535"},
		{"--port", "65536", "from 0 to 65535"},
		{"--port", "-1", "from 0 to 65535"},
		{"RP_PORT", "8080x", "from 0 to 65535"},
		{"PORT", "8080x", "from 0 to 65535"},
		{"--redis-port", "0", "from 1 to 65535"},
		{"--client-limit", "0", "from 1 to"},
		{"--cache-size", "0", "from 1 to"},
		{"--max-clients", "0", "from 1 to"},
		{"RP_CACHE_SIZE", "1e3", "whole number"},
		{"--listen-address", "", "must be a host name"},
		{"--redis-host", "", "must be a host name"},
		{"--redis-host", "h:6379", "without a port"},
		{"RP_REDIS_HOST", "redis://h", "without a port"},
		{"--listen-address", "[::1]", "without a port"},
		{"--admin-address", "abc", "host:port"},
		{"--admin-address", "127.0.0.1", "host:port"},
		{"--admin-address", ":99999", "host:port"},
		{"RP_ADMIN_ADDRESS", ":", "host:port"},
		{"--log-level", "INFO+2", "debug, info, warn, error"},
		{"RP_LOG_FORMAT", "xml", "text, json"},
		{"--check", "maybe", "true or false"},
		{"--cache-timeout", "0", "above 0"},
		{"--cache-timeout", "-1", "above 0"},
		{"--redis-timeout", "0s", "above 0"},
		{"--cache-timeout", "NaN", "30, 1.5 or 250ms"},
		{"--cache-timeout", "inf", "30, 1.5 or 250ms"},
		{"--cache-timeout", "1e10", "30, 1.5 or 250ms"},
		{"RP_CACHE_TIMEOUT", "soon", "30, 1.5 or 250ms"},
		{"--stale-timeout", "-1s", "or 0"},
		{"--idle-timeout", "never", "or 0"},
		{"--tracking", "yes", "true or false"},
		{"--cache-bytes", "0", "above 0"},
		{"--cache-bytes", "-1", "above 0"},
		{"--cache-bytes", "KB", "64KB"},
		{"--cache-bytes", "1TB", "64KB"},
		{"--cache-bytes", "1.5GB", "64KB"},
		{"--cache-bytes", "9999999999GB", "64KB"},
		{"RP_CACHE_BYTES", "lots", "64KB"},
		{"--cache-bytes", "1ɐ", "64KB"}, // longer in upper case
	} {
		args, env := []string{tt.where + "=" + tt.val}, []string(nil)
		if !strings.HasPrefix(tt.where, "--") {
			args, env = env, args
		}
		got := refusal(t, args, env)
		for _, want := range []string{tt.where, strconv.Quote(tt.val), tt.allowed} {
			if !strings.Contains(got, want) {
				t.Errorf("%s %s: got error %q; want it to name %q", tt.where, tt.val, got, want)
			}
		}
	}
	for args, want := range map[string]string{
		"--prot 1": "-prot", "--port": "-port", "8080": "8080", "--port 1 2": `"2"`, "--port 1 -- --port": `"--port"`,
	} {
		if got := refusal(t, strings.Fields(args), nil); !strings.Contains(got, want) {
			t.Errorf("%s: got error %q; want it to name %q", args, got, want)
		}
	}
}

// Whoever asks for help may have set a variable wrongly.
func TestConfigAnswersHelpAndVersionWhateverTheEnvironment(t *testing.T) {
	_, err := parseConfig([]string{"--help"}, []string{"RP_PORT=x"})
	compare(t, "--help", err, flag.ErrHelp)
	cfg, err := parseConfig([]string{"--version"}, []string{"RP_PORT=x"})
	compare(t, "--version", fmt.Sprint(cfg.version, err), "true <nil>")
}

func TestConfigRedisURL(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want redisAddress
	}{
		{"redis://h", redisAddress{hosts: "h:6379"}},
		{"redis://h/", redisAddress{hosts: "h:6379"}},
		{"redis://h:7/3", redisAddress{hosts: "h:7", db: 3}},
		{"redis://:p%40ss@h", redisAddress{hosts: "h:6379", password: "p@ss"}},
		{"redis://[::1]", redisAddress{hosts: "[::1]:6379"}},
		{"redis://us%3Aer:p%2Fw:x@h", redisAddress{hosts: "h:6379", user: "us:er", password: "p/w:x"}},
		{"rediss://u:p@[fe80::1]:7/12",
			redisAddress{hosts: "[fe80::1]:7", user: "u", password: "p", db: 12, tls: true}},
		{"REDISS://cache.example.org:6380/0", redisAddress{hosts: "cache.example.org:6380", tls: true}},
		{"valkey://h", redisAddress{hosts: "h:6379"}},
		{"valkeys://h", redisAddress{hosts: "h:6379", tls: true}},
		{"redis://h:1,h:2,h", redisAddress{hosts: "h:1,h:2,h:6379"}},
		{"redis://u:p,@[::1]:1,10.0.0.1,[::2]/0",
			redisAddress{hosts: "[::1]:1,10.0.0.1:6379,[::2]:6379", user: "u", password: "p,"}},
		{"unix:///run/redis.sock", redisAddress{hosts: "/run/redis.sock"}},
		{"unix://u:p@/run/redis.sock?db=2", redisAddress{hosts: "/run/redis.sock", user: "u", password: "p", db: 2}},
		{"redis-sentinel://h,h:1/name", redisAddress{hosts: "h:26379,h:1", master: "name"}},
		{"redis+sentinel://:p@h/na%20me/3", redisAddress{hosts: "h:26379", master: "na me", db: 3, password: "p"}},
		{"rediss-sentinel://h#name", redisAddress{hosts: "h:26379", master: "name", tls: true}},
		{"rediss+sentinel://[::1]/3#name", redisAddress{hosts: "[::1]:26379", master: "name", db: 3, tls: true}},
		{"valkey-sentinel://h/name?sentinel_username=u&sentinel_password=p%20",
			redisAddress{hosts: "h:26379", master: "name", sentinelUser: "u", sentinelPassword: "p "}},
	} {
		cfg, err := parseConfig([]string{"--redis-url", tt.in}, nil)
		if err != nil {
			t.Errorf("%s: got error %v", tt.in, err)
			continue
		}
		compare(t, tt.in, cfg.pool.redis, tt.want)
	}
}

func TestConfigRefusesRedisURLWithoutTellingIt(t *testing.T) {
	for defect, in := range map[string]string{
		"another scheme":                        "http://:s3cret@h",
		"no scheme":                             ":s3cret@h",
		"no slashes":                            "redis::s3cret@h",
		"no host":                               "redis://:s3cret@",
		"port 0":                                "redis://:s3cret@h:0",
		"port too large":                        "redis://:s3cret@h:65536",
		"port not a number":                     "redis://:s3cret@h:port",
		"database not a number":                 "redis://:s3cret@h/x",
		"database negative":                     "redis://:s3cret@h/-1",
		"two databases":                         "redis://:s3cret@h/0/1",
		"database in the query":                 "redis://:s3cret@h?db=1",
		"fragment":                              "redis://:s3cret@h#1",
		"blank in front":                        " redis://:s3cret@h",
		"user without password":                 "redis://s3cret@h",
		"user with empty password":              "redis://s3cret:@h",
		"host with a colon":                     "redis://user:s3cret:6379",
		"malformed escape":                      "redis://:s3cret%zz@h",
		"control character":                     "redis://:s3cret\x01@h",
		"bracket without end":                   "redis://:s3cret@[::1",
		"empty host in a list":                  "redis://:s3cret@h,,h",
		"socket without a path":                 "unix://:s3cret@/",
		"socket with a host":                    "unix://:s3cret@h/s",
		"list that ends with a comma":           "redis://:s3cret@h,",
		"port 0 in a list":                      "redis://:s3cret@h,h:0",
		"bracket without end in a list":         "redis://:s3cret@h,[::1",
		"address without brackets":              "redis://:s3cret@h,::1",
		"sentinels without a master":            "redis-sentinel://:s3cret@h",
		"sentinels with an empty name":          "redis-sentinel://:s3cret@h/",
		"database of sentinels not a number":    "redis-sentinel://:s3cret@h/name/x",
		"another parameter":                     "redis-sentinel://:s3cret@h/name?db=1",
		"malformed parameter":                   "redis-sentinel://h/name?sentinel_password=s3cret%zz",
		"sentinels of another scheme":           "http-sentinel://:s3cret@h/name",
		"sentinels' user without password":      "redis-sentinel://:s3cret@h/name?sentinel_username=u",
		"sentinels' password without sentinels": "redis://h?sentinel_password=s3cret",
		"Unix socket with a host":               "unix://:s3cret@h",
		"Unix socket with a host and a path":    "unix://:s3cret@h/0",
		"Unix socket without a path":            "unix://:s3cret@?db=1",
		"Unix socket with TLS":                  "unixs://:s3cret@/path",
	} {
		for where, got := range map[string]string{
			"--redis-url":  refusal(t, []string{"--redis-url", in}, nil),
			"RP_REDIS_URL": refusal(t, nil, []string{"RP_REDIS_URL=" + in}),
		} {
			if strings.Contains(got, "s3cret") || !strings.Contains(got, where+": ") ||
				!strings.Contains(got, "redis://[[user]:pass@]host") {
				t.Errorf("%s: got error %q; want one that names %s and what is allowed, not the value", defect, got,
					where)
			}
		}
	}
	const key = "-----BEGIN PRIVATE KEY-----\ns3cret\n-----END PRIVATE KEY-----\n"
	for _, args := range [][]string{{"--redis-ulr=redis://:s3cret@h"}, {"--redis-url=", "redis://:s3cret@h"},
		{"--password", "my", "s3cret"}, {"--redis-host", "redis://:s3cret@h"}, {"--redis-key", key},
		{"--tls-key", strings.ReplaceAll(key, "\n", "")}, {"--redis-cacert", key}, {"--port", key}, {key},
		{"--tls-cert", "redis://:s3cret@h"}} {
		if got := refusal(t, args, nil); strings.Contains(got, "s3cret") {
			t.Errorf("%q: got error %q; want the secret left out", args, got)
		}
	}
}

func TestConfigNamesUnreadVariables(t *testing.T) {
	cfg, err := parseConfig(nil, []string{"RP_PORT=1", "RP_CACHESIZE=2", "HOME=/", "XRP_A=1", "RPA=1", "RP_=",
		"RP_VERSION"})
	compare(t, "unread", fmt.Sprint(cfg.unread, err), "[RP_ RP_CACHESIZE RP_VERSION] <nil>")
}

func TestHelpListsEveryFlag(t *testing.T) {
	for _, args := range []string{"--help", "-help", "-h"} {
		if _, err := parseConfig([]string{args}, nil); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("%s: got error %v; want %v", args, err, flag.ErrHelp)
		}
	}
	var b strings.Builder
	printHelp(&b)
	options := new(config).options()
	if len(options) < 14 {
		t.Errorf("got %d options; want those that are documented", len(options))
	}
	for _, o := range options {
		_, about, _ := strings.Cut(b.String(), "\n  --"+o.name+" ")
		about, _, _ = strings.Cut(about, "\n  --")
		about = strings.Join(strings.Fields(about), " ")
		if !strings.Contains(about, o.variable()+" ") ||
			o.def != "" && o.variable() != "" && !strings.Contains(about, "(default "+o.def+")") {
			t.Errorf("help on --%s: got %q; want its variable, %s, and its default, %q", o.name, about, o.variable(),
				o.def)
		}
	}
	for _, want := range []string{"Usage: redis_proxy ", "\n\nServing\n", "\n\nOperations\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("got %q; want it to have %q", b.String(), want)
		}
	}
	for line := range strings.Lines(b.String()) {
		if len(line) > 101 {
			t.Errorf("got a line of %d columns; want 100 at most: %s", len(line)-1, line)
		}
		if strings.HasPrefix(line, "   ") && !regexp.MustCompile(`^ {42}\S`).MatchString(line) {
			t.Errorf("got %q; want what goes on below the text, in column 43", line)
		}
	}
	compare(t, "variable", option{name: "redis-url"}.variable(), "RP_REDIS_URL")
}

func TestValueKeepsKeyAndContentApart(t *testing.T) {
	for _, key := range []string{"", "key", "$5\r\n", "\x00\xff"} {
		for _, val := range []string{"", "a", "\r\n", "$1\r\na\r\n", "\x00\xff", strings.Repeat("x", 1<<20)} {
			v := newValue(key, []byte(val), time.Second)
			compare(t, "key", v.key(), key)
			compare(t, "content", v.content(), val)
			compare(t, "bulk", v.bulk(), "$"+strconv.Itoa(len(val))+"\r\n"+val+"\r\n")
			compare(t, "fetched", v.fetched, time.Second)
		}
	}
}

// sniff.go

var beginnings = []struct {
	name, in string
	proto    protocol
	ok       bool
}{
	{"nothing", "", "", false},
	{"no line end", "GET / HTTP/1.1", "", false},
	{"carriage return without newline", "GET / HTTP/1.1\r", "", false},
	{"TLS", "\x16\x03\x01", protoRESP, true},
	{"array", "*1\r\n$4\r\nPING\r\n", protoRESP, true},
	{"asterisk alone", "*", protoRESP, true},
	{"inline command", "GET key\r\n", protoRESP, true},
	{"inline command without carriage return", "PING\n", protoRESP, true},
	{"empty lines", "\r\n\n\r\n", "", false},
	{"empty lines first", "\r\n\nPING\r\n", protoRESP, true},
	{"empty lines before HTTP", "\n\r\nGET / HTTP/1.1\r\n", protoHTTP, true},
	{"empty lines before an array", "\r\n*1\r\n", protoRESP, true},
	{"carriage return first", "\rGET / HTTP/1.1\r\n", protoHTTP, true},
	{"many empty lines", strings.Repeat("\n", 100) + "GET / HTTP/1.1\r\n", protoRESP, true},
	{"HTTP/1.1", "GET /key HTTP/1.1\r\n\r\n", protoHTTP, true},
	{"HTTP/1.0", "GET /key HTTP/1.0\r\n\r\n", protoHTTP, true},
	{"another method", "BREW / HTTP/1.1\r\n\r\n", protoHTTP, true},
	{"HTTP without carriage return", "GET / HTTP/1.1\n\n", protoHTTP, true},
	{"HTTP without path", "GET HTTP/1.1\r\n", protoHTTP, true},
	{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", protoHTTP, true},
	{"part of the HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n", "", false},
	{"longest line", "GET /" + strings.Repeat("a", 64<<10-16) + " HTTP/1.1\r\n", protoHTTP, true},
	{"no version", "GET /key\r\n", protoRESP, true},
	{"no blank before the version", "GET /HTTP/1.1\r\n", protoRESP, true},
	{"blank after the version", "GET / HTTP/1.1 \r\n", protoRESP, true},
	{"version in lower case", "GET / http/1.1\r\n", protoRESP, true},
	{"version without minor", "GET / HTTP/1.\r\n", protoRESP, true},
	{"minor of two digits", "GET / HTTP/1.10\r\n", protoRESP, true},
	{"minor not a digit", "GET / HTTP/1.x\r\n", protoRESP, true},
	{"HTTP/2 in a request", "GET / HTTP/2.0\r\n", protoRESP, true},
	{"HTTP on the second line", "PING\r\nGET / HTTP/1.1\r\n", protoRESP, true},
	{"HTTP in an array", "*1 HTTP/1.1\r\n", protoRESP, true},
	{"preface for another path", "PRI / HTTP/2.0\r\n", protoRESP, true},
	{"preface with a blank", "PRI * HTTP/2.0 \r\n", protoRESP, true},
	{"line too long", strings.Repeat("a", 64<<10+1), protoRESP, true},
	{"HTTP line too long", "GET /" + strings.Repeat("a", 64<<10) + " HTTP/1.1\r\n", protoRESP, true},
}

func TestProtocolOfFirstLine(t *testing.T) {
	for _, tt := range beginnings {
		proto, ok := protocolOf([]byte(tt.in))
		if ok != tt.ok || ok && proto != tt.proto {
			t.Errorf("%s: got %v, %v; want %v, %v", tt.name, proto, ok, tt.proto, tt.ok)
		}
	}
}

func FuzzProtocolOf(f *testing.F) {
	for _, tt := range beginnings {
		f.Add([]byte(tt.in), uint(len(tt.in)/2))
		f.Add([]byte(tt.in), uint(maxFirstLine+1))
	}
	f.Fuzz(func(t *testing.T, in []byte, cut uint) {
		early, ok := protocolOf(in[:min(cut, uint(len(in)))])
		whole, still := protocolOf(in)
		if ok && (!still || whole != early) {
			t.Errorf("after %d bytes: got %v; want what the whole is, %v (%v)", cut, early, whole,
				still)
		}
	})
}

// newConn is a client's connection as the server makes it.
func newConn(nc net.Conn, s serverSettings) *conn {
	if s.requests == nil {
		s.requests = newBudget(1 << 30)
	}
	if s.values == nil {
		s.values = newBudget(1 << 30)
	}
	l := &link{Conn: nc, server: &server{serverSettings: s}, idle: s.idleTimeout}
	return &conn{Conn: l, link: l}
}

func TestDetectConsumesNothing(t *testing.T) {
	for _, tt := range beginnings {
		for name, step := range map[string]int{"whole": len(tt.in), "a byte at a time": 1} {
			client, nc := net.Pipe()
			go func() { // ends when all is read
				defer client.Close()
				for b := range slices.Chunk([]byte(tt.in), max(step, 1)) {
					client.Write(b)
				}
			}()
			c := newConn(nc, serverSettings{})
			proto, err := c.detect()
			if proto != tt.proto || (err == nil) != tt.ok {
				t.Errorf("%s, %s: got %v, %v; want %v, %v", tt.name, name, proto, err, tt.proto,
					tt.ok)
			}
			rest, err := io.ReadAll(c)
			if err != nil {
				t.Errorf("%s, %s: reading on: %v", tt.name, name, err)
			}
			compare(t, tt.name+", "+name+": read after detection", string(rest), tt.in)
		}
	}
}

// A long first line counts against the budget of requests, and only until the protocol is known.
// Without room for it, the connection ends.
func TestDetectCountsALongLine(t *testing.T) {
	line := []byte("GET /" + strings.Repeat("k", maxFirstLine/2) + " HTTP/1.1\r\n")
	for _, tt := range []struct {
		max  int
		want protocol
	}{{8 * maxFirstLine, protoHTTP}, {maxFirstLine / 4, ""}} {
		budget := newBudget(tt.max)
		budget.used = tt.max/2 + 1 // there is no room for just anything
		before := budget.used
		most := 0
		client, nc := net.Pipe()
		var writer sync.WaitGroup
		writer.Go(func() { // ends when the line is read, or with the connection
			for b := range slices.Chunk(line, 1000) {
				client.Write(b)
				budget.mu.Lock()
				most = max(most, budget.used-before)
				budget.mu.Unlock()
			}
		})
		c := newConn(nc, serverSettings{requests: budget})
		proto, err := c.detect()
		compare(t, fmt.Sprint("with ", tt.max, ": error"), err != nil, tt.want == "")
		compare(t, fmt.Sprint("with ", tt.max, ": protocol"), proto, tt.want)
		client.Close()
		writer.Wait()
		compare(t, fmt.Sprint("with ", tt.max, ": held at the end"), budget.used, before)
		compare(t, fmt.Sprint("with ", tt.max, ": counted"), most > len(line)/2, tt.want == protoHTTP)
	}
}

func TestDetectDeadlines(t *testing.T) {
	for _, tt := range []struct {
		name  string
		idle  time.Duration
		write func(client net.Conn)
		took  time.Duration
		err   error
	}{
		{"silent for an hour at first", 0, func(c net.Conn) { time.Sleep(time.Hour); io.WriteString(c, "PING\r\n") },
			time.Hour, nil},
		{"silent with an idle timeout", time.Minute, func(net.Conn) {}, time.Minute + time.Minute/4,
			os.ErrDeadlineExceeded},
		{"silent after the first byte", 0, func(c net.Conn) { io.WriteString(c, "G") }, 10 * time.Second,
			os.ErrDeadlineExceeded},
		{"a byte every three seconds", 0, func(c net.Conn) {
			for _, err := c.Write([]byte("G")); err == nil; _, err = c.Write([]byte("E")) {
				time.Sleep(3 * time.Second)
			}
		}, 10 * time.Second, os.ErrDeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, nc := net.Pipe()
				c, start := newConn(nc, serverSettings{idleTimeout: tt.idle}), time.Now()
				go tt.write(client) // ends when client is closed
				_, err := c.detect()
				if took := time.Since(start); !errors.Is(err, tt.err) || took != tt.took {
					t.Errorf("got %v after %v; want %v after %v", err, took, tt.err, tt.took)
				}
				time.AfterFunc(time.Hour, func() { client.Close() })
				if _, err := io.ReadAll(c); tt.err == nil && err != nil {
					t.Errorf("reading an hour after detection: got %v; want the deadline gone", err)
				}
				time.Sleep(2 * time.Hour) // write has ended by then
			})
		})
	}
}

// A client that agreed on HTTP/2 in the handshake and speaks something else is closed.
func TestProtocolIsThatAgreedOn(t *testing.T) {
	cert, err := tls.LoadX509KeyPair(makeCertificate(t, t.TempDir(), "localhost"))
	if err != nil {
		t.Fatal(err)
	}
	settings := serverSettings{writeTimeout: time.Second, requests: newBudget(1 << 20),
		tls: &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}}
	ends := map[protocol]frontEnd{protoHTTP: echo{}, protoRESP: echo{}}
	s := newServer(nil, settings, slog.New(slog.DiscardHandler), ends)
	for _, tt := range []struct {
		agreed, send string
		served       bool
	}{
		{"h2", preface, true},
		{"h2", "GET / HTTP/1.1\r\n", false},
		{"h2", "PING\r\n", false},
		{"h2", "*1\r\n$4\r\nPING\r\n", false},
		{"http/1.1", "GET / HTTP/1.1\r\n", true},
		{"http/1.1", preface, true},
	} {
		outer, nc := net.Pipe()
		go s.handle(&link{Conn: nc, server: s}) // ends when outer is closed
		client := tls.Client(outer, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{tt.agreed}})
		got := make([]byte, len(tt.send))
		io.WriteString(client, tt.send)
		_, err := io.ReadFull(client, got)
		compare(t, tt.agreed+", "+tt.send+": agreed on", client.ConnectionState().NegotiatedProtocol, tt.agreed)
		compare(t, tt.agreed+", "+tt.send+": answered", err == nil && string(got) == tt.send, tt.served)
		if _, err := outer.Write([]byte("x")); !tt.served && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s, %q: got %v; want the connection closed", tt.agreed, tt.send, err)
		}
		outer.Close()
	}
}

// A value counts once however many hold it, and a budget that is half empty takes any.
func TestBudget(t *testing.T) {
	b := newBudget(100)
	large := strings.Repeat("x", 80)
	for range 3 {
		compare(t, "a value that is held already", b.hold(large, 0), nil)
	}
	full := b.hold("", 21)
	compare(t, "bytes that fit", b.hold("", 20), nil)
	b.release("", 20)
	b.release(large, 0)
	b.release(large, 0)
	if full == nil || b.used != 80 {
		t.Fatalf("got %d bytes, room for 21 more: %v; want 80, and none", b.used, full == nil)
	}
	b.release(large, 0)
	select {
	case <-full:
	default:
		t.Error("nobody hears of bytes that came back")
	}
	compare(t, "50 bytes", b.hold("", 50), nil)
	compare(t, "more than the budget beside half of it", b.hold("", 200), nil)
	if b.hold("", 1) == nil {
		t.Error("there is room in a budget that is more than full")
	}
}

// A client that takes nothing is closed the write time-out after the last byte that it took, or
// after a second where others wait for the room of the values that it holds. A read of what it
// sends meanwhile is not lost.
func TestLinkWrites(t *testing.T) {
	const timeout = 30 * time.Second
	settings := serverSettings{writeTimeout: timeout, requests: newBudget(1 << 20), values: newBudget(10)}
	for _, tt := range []struct {
		name             string
		takes            time.Duration
		holding, crowded bool
		want             time.Duration
	}{
		{"takes nothing", 0, false, false, timeout},
		{"takes a byte after 20 seconds", 20 * time.Second, false, false, 20*time.Second + timeout},
		{"holds a value that has room", 0, true, false, timeout},
		{"holds a value while another waits", 0, true, true, time.Second},
		{"holds nothing while another waits", 0, false, true, timeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, nc := net.Pipe()
				c := newConn(nc, settings)
				c.link.readsOn = true
				if tt.holding {
					c.link.hold("", flushAt+1)
				}
				if tt.crowded {
					c.link.server.values.freed = make(chan struct{})
				}
				if tt.takes > 0 {
					time.AfterFunc(tt.takes, func() { client.Read(make([]byte, 1)) })
				}
				sent := make(chan error, 1)
				go func() { // ends when all is read
					_, err := io.WriteString(client, strings.Repeat("pipeline", 10000))
					sent <- err
				}()
				began := time.Now()
				_, err := c.Write([]byte("reply"))
				if took := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || took < tt.want ||
					took > tt.want+2*stallTime {
					t.Errorf("got %v after %v; want a time-out after %v", err, took, tt.want)
				}
				compare(t, "sending meanwhile", <-sent, nil)
				got := make([]byte, 80000)
				_, err = io.ReadFull(c, got)
				compare(t, "what was sent meanwhile", string(got), strings.Repeat("pipeline", 10000))
				compare(t, "reading it", err, nil)
				c.link.letGo()
				_, err = c.Write([]byte("last words"))
				compare(t, "writing again", errors.Is(err, io.ErrClosedPipe), true)
				compare(t, "bytes held at the end", settings.requests.used+c.link.server.values.used, 0)
				c.link.server.values.freed = nil
			})
		})
	}
}

// What the client's side has taken counts before the system lets the proxy write more.
func TestLinkSeesWhatIsTaken(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux says what is acknowledged")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := newConn(nc, serverSettings{})
	much, written, left := make([]byte, 64<<20), 0, 0
	eventually(t, "some bytes are not taken", func() bool {
		nc.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, _ := nc.Write(much)
		written += n
		left = c.link.untaken()
		return left > 0
	})
	if left > written {
		t.Errorf("%d bytes are not taken of %d that were written", left, written)
	}
	io.CopyN(io.Discard, client, int64(written))
	eventually(t, "all is taken", func() bool { return c.link.untaken() == 0 })
}

// http.go

// serveHTTP answers a request that is given as a line without version, and header lines.
func serveHTTP(t testing.TB, p *parts, line string, header ...string) *http.Response {
	t.Helper()
	raw := line + " HTTP/1.1\r\nHost: x\r\n" + strings.Join(append(header, "\r\n"), "\r\n")
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
	if err != nil {
		t.Fatalf("%.200q: %v", raw, err)
	}
	rec := httptest.NewRecorder()
	p.web.ServeHTTP(rec, r)
	return rec.Result()
}

func bodyOf(t testing.TB, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestHTTPAnswers(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "text", "0123456789", "empty", "", "binary", "\xff\x00")
	const tag = `"84d89877f0d4041efb6bf91a16f0248f"` // half the SHA-256 of 0123456789
	for _, tt := range []struct {
		line, header string
		status       int
		body         string
		want         string // headers, between bars; without a value: must not be there
	}{
		{"GET /text", "", 200, "0123456789",
			"Content-Length: 10|Content-Type: text/plain; charset=utf-8|X-Content-Type-Options: nosniff|" +
				"Cache-Control: max-age=30|ETag: " + tag},
		{"GET /binary", "", 200, "\xff\x00",
			"Content-Length: 2|Content-Type: application/octet-stream|X-Content-Type-Options: nosniff"},
		{"GET /empty", "", 200, "",
			`Content-Length: 0|Content-Type: text/plain; charset=utf-8|ETag: "e3b0c44298fc1c149afbf4c8996fb924"`},
		{"GET /text?x=1", "", 200, "0123456789", "Content-Length: 10"},
		{"GET http://x/text", "", 200, "0123456789", "Content-Length: 10"},
		{"HEAD /text", "", 200, "", "Content-Length: 10|ETag: " + tag + "|Cache-Control: max-age=30"},
		{"GET /text", "If-None-Match: " + tag, 304, "", "ETag: " + tag + "|Cache-Control: max-age=30|Content-Length:"},
		{"GET /text", `If-None-Match: "other", W/` + tag, 304, "", "ETag: " + tag},
		{"GET /text", "If-None-Match: *", 304, "", "ETag: " + tag},
		{"GET /text", `If-None-Match: "other"`, 200, "0123456789", "ETag: " + tag},
		{"GET /text", "Range: bytes=2-4", 206, "234", "Content-Range: bytes 2-4/10|Content-Length: 3|ETag: " + tag},
		{"GET /text", "Range: bytes=-2", 206, "89", "Content-Range: bytes 8-9/10"},
		{"GET /text", "Range: bytes=2-4\r\nIf-Range: " + tag, 206, "234", "Content-Range: bytes 2-4/10"},
		{"GET /text", "Range: bytes=2-4\r\nIf-Range: \"other\"", 200, "0123456789", "Content-Range:"},
		{"HEAD /text", "Range: bytes=2-4", 200, "", "Content-Length: 10|Content-Range:"},
		{"GET /text", "Range: Bytes=0-3", 206, "0123", "Content-Range: bytes 0-3/10"},
		{"GET /text", "Range: byte\u017f=0-3", 200, "0123456789", "Content-Range:"},
		{"GET /text", "Range: lines=0-3", 200, "0123456789", "Content-Range:"},
		{"GET /text", "Range: bytes=-0", 416, "invalid range: failed to overlap\n", "Content-Range: bytes */10"},
		{"GET /text", "Range: bytes=-0, 1-2, -00", 206, "12", "Content-Range: bytes 1-2/10"},
		{"GET /text", "Range: bytes=8-99999999999999999999", 206, "89", "Content-Range: bytes 8-9/10"},
		{"GET /text", "Range: bytes=-99999999999999999999", 206, "0123456789", "Content-Range: bytes 0-9/10"},
		{"GET /text", "Range: bytes=0000000000000000000000000000008-", 206, "89", "Content-Range: bytes 8-9/10"},
		{"GET /text", "Range: bytes=99999999999999999999-", 416, "invalid range: failed to overlap\n",
			"Content-Range: bytes */10"},
		{"GET /text", "Range: bytes=" + strings.Repeat("-1,", maxRanges) + "-1", 200, "0123456789", "Content-Range:"},
		{"GET /text", "If-None-Match: \"other\"\r\nIf-None-Match: " + tag, 304, "", "ETag: " + tag},
		{"GET /text", "If-Match: \"other\"\r\nIf-Match: " + tag, 200, "0123456789", "ETag: " + tag},
		{"GET /text", "If-Match: \"other\"\r\nIf-Match: \"another\"", 412, "the value has another tag\n",
			"Cache-Control: no-store|Content-Type: text/plain; charset=utf-8"},
		{"GET /empty", "Range: bytes=-5", 200, "", "Content-Length: 0|Content-Range:"},
		{"GET /empty", "Range: bytes=0-", 200, "", "Content-Length: 0|Content-Range:"},
		{"GET http:///text", "", 400, "the path must begin with a slash\n", ""},
		{"GET /text", "Range: bytes=10-", 416, "invalid range: failed to overlap\n",
			"Content-Range: bytes */10|Cache-Control: no-store|ETag:"},
		{"POST /text", "Content-Length: 1\r\n\r\nx", 405, "only GET, HEAD, OPTIONS are allowed\n",
			"Allow: GET, HEAD, OPTIONS|Cache-Control: no-store|Connection: close"},
		{"PUT /text", "", 405, "only GET, HEAD, OPTIONS are allowed\n", "Allow: GET, HEAD, OPTIONS|Connection:"},
		{"OPTIONS *", "", 204, "", "Allow: GET, HEAD, OPTIONS|Content-Length:"},
		{"OPTIONS /text", "", 204, "", "Allow: GET, HEAD, OPTIONS"},
		{"GET http://x", "", 502, "upstream unavailable\n", ""},
		{"GET *", "", 400, "the path must begin with a slash\n", "Cache-Control: no-store"},
		{"GET /text", "Content-Length: 1\r\n\r\nx", 200, "0123456789", "Connection: close"},
		{"GET /nothing", "", 502, "upstream unavailable\n",
			"Content-Type: text/plain; charset=utf-8|Cache-Control: no-store|" +
				"Cache-Status: redis_proxy; fwd=miss|ETag:|Age:"},
	} {
		r := serveHTTP(t, p, tt.line, tt.header)
		what := tt.line + " " + tt.header
		compare(t, what+": status", r.StatusCode, tt.status)
		compare(t, what+": body", bodyOf(t, r), tt.body)
		for h := range strings.SplitSeq(tt.want, "|") {
			name, want, _ := strings.Cut(h, ":")
			compare(t, what+": "+name, r.Header.Get(name), strings.TrimSpace(want))
		}
	}
}

func TestHTTPTellsAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fresh, stale := newParts(t), newParts(t, "--stale-timeout", "60")
		time.Sleep(time.Minute)
		cacheNow(fresh, "key", "value")
		cacheNow(stale, "key", "value")
		for _, tt := range []struct {
			wait        time.Duration
			p           *parts
			status      int
			cacheStatus string
			age         string
		}{
			{0, fresh, 200, "redis_proxy; hit; ttl=30", "0"},
			{7 * time.Second, fresh, 200, "redis_proxy; hit; ttl=23", "7"},
			{22 * time.Second, fresh, 200, "redis_proxy; hit; ttl=1", "29"},
			{time.Second, fresh, 502, "redis_proxy; fwd=stale", ""},
			{5 * time.Second, stale, 200, "redis_proxy; fwd=stale; ttl=-5", "35"},
			{55 * time.Second, stale, 502, "redis_proxy; fwd=stale", ""},
		} {
			time.Sleep(tt.wait)
			r := serveHTTP(t, tt.p, "GET /key")
			what := tt.p.now().String()
			compare(t, what+": status", r.StatusCode, tt.status)
			compare(t, what+": Cache-Status", r.Header.Get("Cache-Status"), tt.cacheStatus)
			compare(t, what+": Age", r.Header.Get("Age"), tt.age)
		}
	})
}

// A client that has sent part of a request has 10 s for the rest, whoever reads it: bytes that come
// do not renew them. A silent one has longer.
func TestHTTPHalfARequest(t *testing.T) {
	const ordinary = "GET /k HTTP/1.1\r\nHost: h\r\n\r\n"
	const handed = "GET /k HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n\r\n"
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	const headers = "\x00\x00\x05\x01\x00\x00\x00\x00\x01\x82\x86\x84\x41\x00"
	for _, tt := range []struct {
		name, send string
		drips      string // a byte every two seconds
		took       time.Duration
	}{
		{"of the first", "GET", "", 10 * time.Second},
		{"of the first, dripping", "GET /", strings.Repeat("k", 60), 10 * time.Second},
		{"of the second", ordinary + "GE", "", 10 * time.Second},
		{"of the second, dripping", ordinary + "G", "ET /" + strings.Repeat("k", 60), 10 * time.Second},
		{"nothing of the second", ordinary, "", 2 * time.Minute},
		{"nothing but an empty line of the second", ordinary + "\r\n", "", 2 * time.Minute},
		// net/http counts from the fourth byte on, and counts less as nothing.
		{"of net/http's second", handed, "GE", 2 * time.Minute},
		{"of net/http's second, dripping", handed, "GET /" + strings.Repeat("k", 60), 18 * time.Second},
		{"nothing of net/http's second", handed, "", 2 * time.Minute},
		{"of the preface of HTTP/2", preface[:20], "", 10 * time.Second},
		// HTTP/2 has an idle time without a stream, and a second for GOAWAY.
		{"a frame of HTTP/2", preface + settings + headers[:9], "", 2*time.Minute + time.Second},
		{"a header block of HTTP/2", preface + settings + headers, "", 2*time.Minute + time.Second},
		{"a header block, in more and more frames", preface + settings + headers,
			strings.Repeat("\x00\x00\x00\x09\x00\x00\x00\x00\x01", 9), 2*time.Minute + time.Second},
		{"no frame of HTTP/2", preface + settings, "", 2*time.Minute + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newParts(t, "--cache-timeout", "1h")
				cacheNow(p, "k", "value")
				client, nc := net.Pipe()
				c := newConn(nc, serverSettings{idleTimeout: 2 * time.Minute, writeTimeout: time.Minute})
				c.link.idle = 2 * time.Minute
				go func() { // ends with the connection
					if _, err := c.detect(); err != nil {
						c.Close()
						return
					}
					p.web.serve(c)
				}()
				go func() { // ends with the connection
					io.WriteString(client, tt.send)
					for i := 0; i < len(tt.drips); i++ {
						time.Sleep(2 * time.Second)
						io.WriteString(client, tt.drips[i:i+1])
					}
				}()
				began := time.Now()
				io.Copy(io.Discard, client)
				if took := time.Since(began); took < tt.took-time.Second || took > tt.took+tt.took/4+time.Second {
					t.Errorf("closed after %v; want %v", took, tt.took)
				}
				p.web.shutdown(context.Background())
				p.pool.close()
				time.Sleep(time.Hour) // the writer has ended by then
			})
		})
	}
}

func TestHTTPHitAllocatesNothing(t *testing.T) {
	p := newParts(t, "--cache-timeout", "1h")
	cacheNow(p, "k", "value")
	c := newConn(nil, p.cfg.clients)
	out, r := make([]byte, 0, flushAt), []byte("GET /k HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"x\"\r\n\r\n")
	if n := testing.AllocsPerRun(1000, func() {
		q, _ := parse(r)
		a := p.cache.getHeld(&p.web.tally, q.key, c.link.hold)
		p.web.appendAnswer(out, &q, &a, p.now())
	}); n >= 1 { // the date may change
		t.Errorf("got %v allocations; want none", n)
	}
}

// What net/http makes of a header that is not whole counts against the budget of requests, tiny
// lines above all.
func TestHTTPHeadersHaveABudget(t *testing.T) {
	p := newParts(t, "--cache-timeout", "1h")
	cacheNow(p, "k", "value")
	for lines, want := range map[int]string{2000: "HTTP/1.1 206 Partial Content\r\n",
		5000: "HTTP/1.1 400 Bad Request\r\n"} {
		send := "GET /k HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n" + strings.Repeat("a:\r\n", lines) + "\r\n"
		s := &scripted{pieces: [][]byte{[]byte(send)}, closed: make(chan struct{})}
		settings := serverSettings{idleTimeout: time.Hour, requests: newBudget(300 << 10)}
		p.web.serve(newConn(s, settings))
		<-s.closed
		if got := s.got.String(); !strings.HasPrefix(got, want) {
			t.Errorf("%d lines: got %q; want %q", lines, got, want)
		}
		compare(t, "bytes held at the end", settings.requests.used, 0)
	}
	p.web.shutdown(context.Background())
}

// A body is not kept, and does not count.
func TestHTTPBodiesHaveNoBudget(t *testing.T) {
	budget := newBudget(1 << 20)
	nc := &scripted{pieces: [][]byte{[]byte("a\n"), []byte("b\n"), []byte("c\n")}, closed: make(chan struct{})}
	c := &counted{conn: newConn(nc, serverSettings{requests: budget})}
	for _, tt := range []struct {
		what  string
		until time.Time
		want  int
	}{
		{"header", time.Now().Add(requestTimeout), len("a\n") + lineCost},
		{"body", time.Time{}, 0},
		{"body that means nothing", time.Now().Add(bodyTimeout), 0},
	} {
		c.SetReadDeadline(tt.until)
		c.Read(make([]byte, 10))
		compare(t, tt.what, budget.used, tt.want)
	}
}

// An empty line may come while a request is answered, byte by byte, and before the next.
func TestHTTPEmptyLinesBetweenRequests(t *testing.T) {
	const requests = "GET / HTTP/1.1\r\nHost: h\r\n\r\n" + "GET / HTTP/1.1\nHost: h\n\n"
	const body = "\r\n\r\nx" // is none of them
	const empty = "\r\n"
	in := requests[:27] + empty + requests[27:] + empty + "\n" + requests
	for _, size := range []int{1, 2, 3, 7, 28, 30, 100} {
		nc := &scripted{pieces: slices.Collect(slices.Chunk([]byte(in), size)), closed: make(chan struct{})}
		c := &counted{conn: newConn(nc, serverSettings{requests: newBudget(1 << 20)})}
		got, _ := io.ReadAll(c)
		compare(t, fmt.Sprint("in pieces of ", size), string(got), requests+requests)

		nc = &scripted{pieces: slices.Collect(slices.Chunk([]byte(body), size)), closed: make(chan struct{})}
		c = &counted{conn: newConn(nc, serverSettings{requests: newBudget(1 << 20)})}
		c.SetReadDeadline(time.Now().Add(bodyTimeout))
		got, _ = io.ReadAll(c)
		compare(t, fmt.Sprint("a body in pieces of ", size), string(got), body)
	}
}

// A stream of HTTP/2 counts against the budget of requests until the client has taken the answer:
// what does not fit is reset. Fields that mean nothing count nothing.
func TestHTTPStreamsHaveABudget(t *testing.T) {
	p := newParts(t, "--cache-timeout", "1h")
	cacheNow(p, "k", "value")
	budget := newBudget(3*streamCost + 100) // for each stream a little more
	p.web.streams = budget
	client, nc := net.Pipe()
	c := newConn(nc, serverSettings{})
	c.unread = []byte(preface)
	go p.web.serve(c) // ends with client
	go func() {       // ends with client
		io.WriteString(client, h2Frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")) // no window
		for i := range 4 {
			io.WriteString(client, h2Get(2*i+1, "/k"))
		}
	}()
	headers, reset := 0, 0
	for headers+reset < 4 {
		var head [9]byte
		if _, err := io.ReadFull(client, head[:]); err != nil {
			t.Fatal(err)
		}
		io.CopyN(io.Discard, client, int64(head[1])<<8|int64(head[2]))
		switch head[3] {
		case 1:
			headers++
		case 3:
			reset++
		}
	}
	compare(t, "answered, and reset", fmt.Sprint(headers, " ", reset), "3 1")
	budget.mu.Lock()
	held := budget.used
	budget.mu.Unlock()
	if held < 3*streamCost || held > budget.max {
		t.Errorf("held: got %d bytes; want about %d", held, 3*streamCost)
	}
	client.Close()
	eventually(t, "nothing is held at the end", func() bool {
		budget.mu.Lock()
		defer budget.mu.Unlock()
		return budget.used == 0
	})
	p.web.shutdown(context.Background())

	r := httptest.NewRequest("GET", "/key", nil)
	r.Header.Set("Cookie", strings.Repeat("x", 1000))
	r.Header["Range"] = []string{"bytes=0-1", "2-3"}
	compare(t, "cost", keepFields(r), 2*len("/key")+len("bytes=0-1, 2-3"))
	compare(t, "Cookie", r.Header.Get("Cookie"), "")
	r.Trailer = http.Header{"A": nil, "B": nil}
	compare(t, "cost of names of trailers", keepFields(r), 2*len("/key")+len("bytes=0-1, 2-3")+2*lineCost)
}

// A connection that net/http answers for long holds no more than its latest request.
func TestHTTPHeadersLeaveTheBudget(t *testing.T) {
	const n = 100
	p := newParts(t, "--cache-timeout", "1h")
	cacheNow(p, "k", "value")
	send := strings.Repeat("GET /k HTTP/1.1\r\nHost: h\r\nRange: bytes=0-\r\n\r\n", n)
	s := &scripted{pieces: slices.Collect(slices.Chunk([]byte(send), len(send)/n)), closed: make(chan struct{})}
	p.web.serve(newConn(s, serverSettings{idleTimeout: time.Hour, requests: newBudget(20 << 10)}))
	<-s.closed
	compare(t, "answers", strings.Count(s.got.String(), "HTTP/1.1 206 "), n)
	p.web.shutdown(context.Background())
}

// A client may keep a 404 as long as the cache does, and is told so by both ways.
func TestHTTPAbsenceIsKept(t *testing.T) {
	p := newParts(t, append(playRedis(t, replies), "--absent-timeout", "10s")...)
	for _, status := range []string{"redis_proxy; fwd=miss; stored", "redis_proxy; hit; ttl=9"} {
		r := serveHTTP(t, p, "GET /absent")
		compare(t, "status", r.StatusCode, 404)
		compare(t, "Cache-Control", r.Header.Get("Cache-Control"), "max-age=10")
		compare(t, "Cache-Status", r.Header.Get("Cache-Status"), status)
		q, _ := parse([]byte("GET /absent HTTP/1.1\r\nHost: h\r\n\r\n"))
		a := p.getHTTP(q.key)
		out, body := p.web.appendAnswer(nil, &q, &a, p.now())
		for _, want := range []string{"HTTP/1.1 404 Not Found\r\n", "\r\nCache-Control: max-age=10\r\n",
			"\r\nAge: 0\r\n"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("quick: got %q; want %q", out, want)
			}
		}
		compare(t, "quick: body", body, "no such key\n")
	}
}

// Large values have a budget while they are on their way: a request waits for room, and is answered
// 503 if none comes in time.
func TestHTTPLargeValuesWaitForRoom(t *testing.T) {
	p := newParts(t, "--redis-timeout", "50ms", "--cache-timeout", "1h")
	p.web.values = newBudget(3 * flushAt)
	cacheNow(p, "large", strings.Repeat("x", 2*flushAt), "another", strings.Repeat("y", 2*flushAt), "small", "value")
	held := p.getHTTP([]byte("large"))
	for _, tt := range []struct {
		key           string
		quick, status int
	}{{"large", 200, 200}, {"another", 503, 503}, {"small", 200, 503}} { // net/http may keep any value
		if tt.key == "small" {
			p.web.values.used += flushAt
		}
		r := serveHTTP(t, p, "GET /"+tt.key)
		compare(t, tt.key+": status", r.StatusCode, tt.status)
		compare(t, tt.key+": Retry-After", r.Header.Get("Retry-After"), map[int]string{503: "1"}[tt.status])
		q, _ := parse([]byte("GET /" + tt.key + " HTTP/1.1\r\nHost: h\r\n\r\n"))
		a := p.getHTTP(q.key)
		out, _ := p.web.appendAnswer(nil, &q, &a, p.now())
		if len(a.data) > flushAt {
			p.web.values.release(a.data, 0)
		}
		compare(t, tt.key+": quick", string(out[:12]), "HTTP/1.1 "+strconv.Itoa(tt.quick))
	}
	p.web.values.used -= flushAt
	time.AfterFunc(10*time.Millisecond, func() { p.web.values.release(held.data, 0) })
	p.cache.timeout = time.Minute
	compare(t, "with room: status", serveHTTP(t, p, "GET /another").StatusCode, 200)
	compare(t, "bytes on their way at the end", p.web.values.used, 0)
	compare(t, "values on their way at the end", len(p.web.values.held), 0)
}

// However many large values one connection asks for, all of them have left the budget afterwards.
func TestHTTPLargeValuesAreLetGo(t *testing.T) {
	p := newParts(t, "--redis-timeout", "50ms", "--cache-timeout", "1h")
	p.web.values = newBudget(5 * flushAt)
	var send string
	for i := range 10 {
		cacheNow(p, fmt.Sprint(i), strings.Repeat("x", 2*flushAt))
		send += plainRequest(fmt.Sprint(i))
	}
	s := &scripted{pieces: [][]byte{[]byte(send)}, closed: make(chan struct{})}
	p.web.serve(newConn(s, serverSettings{idleTimeout: time.Hour}))
	<-s.closed
	compare(t, "values", strings.Count(s.got.String(), "HTTP/1.1 200 OK"), 10)
	compare(t, "bytes on their way at the end", p.web.values.used, 0)
}

// While the proxy stops, a connection gets one more answer, which says that it is the last.
func TestHTTPDrains(t *testing.T) {
	p := newParts(t, "--cache-timeout", "1h")
	cacheNow(p, "k", "value")
	p.web.drain()
	s := &scripted{pieces: [][]byte{[]byte(plainRequest("k") + plainRequest("k"))}, closed: make(chan struct{})}
	p.web.serve(newConn(s, serverSettings{idleTimeout: time.Hour}))
	<-s.closed
	got := s.got.String()
	if strings.Count(got, "HTTP/1.1 200 OK") != 1 || strings.Count(got, "Connection: close\r\n") != 1 {
		t.Errorf("got %q; want one answer with Connection: close", got)
	}
	p.web.shutdown(context.Background())
}

// What HTTP says about a value is kept with its entry, counts as its bytes, and goes with it.
func TestHTTPHeaderIsKeptWithTheEntry(t *testing.T) {
	p := newParts(t, "--cache-timeout", "1h")
	bytes := func() int64 { return p.cache.bytes }
	cacheNow(p, "k", "value")
	before := bytes()
	serveHTTP(t, p, "GET /k")
	kept := p.get("k").header
	compare(t, "kept", kept, "Etag: "+tagOfK+"\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 5\r\n")
	compare(t, "bytes", bytes(), before+int64(len(kept)))
	serveHTTP(t, p, "HEAD /k")
	compare(t, "bytes after another request", bytes(), before+int64(len(kept)))
	old := p.get("k")
	cacheNow(p, "k", "other")
	compare(t, "bytes after a change", bytes(), before)
	p.cache.annotate(old.value)
	compare(t, "the header of the old value", p.get("k").header, "")
	serveHTTP(t, p, "GET /k")
	p.cache.forget(nil)
	compare(t, "bytes at the end", bytes(), 0)

	for _, n := range []int{1, 2} { // it takes the place of another entry, or of its own
		p := newParts(t, "--cache-bytes", fmt.Sprint(bytesFor(n, len("k")+len("value"))))
		cacheNow(p, []string{"k", "value", "l", "value"}[:2*n]...)
		compare(t, "bytes of whole entries", p.cache.bytes, p.cache.maxBytes)
		compare(t, "body", bodyOf(t, serveHTTP(t, p, "GET /k")), "value")
		if p.cache.bytes > p.cache.maxBytes {
			t.Errorf("%d entries and a header: got %d bytes; want at most %d", n, p.cache.bytes, p.cache.maxBytes)
		}
	}
}

func TestHTTPLogsPanicsAsErrorsAndNothingElse(t *testing.T) {
	var log bytes.Buffer
	out := complaints{slog.New(slog.NewTextHandler(&log, nil))}
	io.WriteString(out, "http2: server: error reading preface\n")
	compare(t, "about a client", log.String(), "")
	io.WriteString(out, "http: panic serving 127.0.0.1:1: oh\ngoroutine 1\n")
	if !strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("got %q; want an error", log.String())
	}
}

func TestHTTPKeyIsThePath(t *testing.T) {
	p := newParts(t)
	for _, tt := range []struct{ target, key string }{
		{"/", ""}, {"/?key", ""}, {"/a", "a"}, {"/a/", "a/"}, {"/a/b", "a/b"}, {"/a%2Fb", "a/b"}, {"/%61", "a"},
		{"//a", "/a"}, {"//a//b", "/a//b"}, {"/%2Fa", "/a"}, {"/http://x/y", "http://x/y"},
		{"/.", "."}, {"/..", ".."}, {"/../a", "../a"}, {"/a/../b", "a/../b"}, {"/a/./b", "a/./b"},
		{"/%00", "\x00"}, {"/a%00b", "a\x00b"}, {"/a%20b", "a b"}, {"/a%2500", "a%00"}, {"/%ff%fe", "\xff\xfe"},
		{"/a+b", "a+b"}, {"/a%2Bb", "a+b"}, {"/a%3Fb?c", "a?b"}, {"/a;b&c=d", "a;b&c=d"}, {"/a#b", "a#b"},
		{"/ключ", "ключ"}, {"/%D0%BA%D0%BB%D1%8E%D1%87", "ключ"},
	} {
		p.cache.forget(nil)
		cacheNow(p, tt.key, "value of "+tt.key)
		compare(t, tt.target, bodyOf(t, serveHTTP(t, p, "GET "+tt.target)), "value of "+tt.key)
	}
}

func FuzzHTTPKey(f *testing.F) {
	p := newParts(f)
	for _, key := range []string{"", "a", "a b", "/", "..", "//", "a\x00b", "\xff", "ключ", "%2F", "?#+&;=", "\r\n",
		"http://x"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		p.cache.forget(nil)
		cacheNow(p, key, "value of "+key)
		var all strings.Builder
		for _, b := range []byte(key) {
			fmt.Fprintf(&all, "%%%02X", b)
		}
		for _, target := range []string{all.String(), url.PathEscape(key),
			strings.ReplaceAll(url.PathEscape(key), "%2F", "/") + "?query"} {
			compare(t, target, bodyOf(t, serveHTTP(t, p, "GET /"+target)), "value of "+key)
		}
	})
}

func TestHTTPErrors(t *testing.T) {
	for err, want := range map[error]string{
		errAbsent: "404 no such key", replyError("WRONGTYPE Operation"): "409 the key holds another type than a string",
		errUnavailable:                          "502 upstream unavailable",
		replyError("LOADING Redis at 10.0.0.1"): "502 upstream refused",
		errTimeout:                              "504 upstream timed out",
	} {
		status, text, _ := httpError(err)
		compare(t, err.Error(), fmt.Sprint(status, " ", text), want+"\n")
	}
}

// A bucket counts all latencies up to its bound, and the last one all.
func TestMetricsOfLatency(t *testing.T) {
	p := newParts(t)
	for _, d := range []time.Duration{50 * time.Microsecond, 100 * time.Microsecond, 150 * time.Microsecond,
		700 * time.Millisecond, 2300 * time.Millisecond} {
		p.pool.latency.add(d)
	}
	var out strings.Builder
	writeMetrics(&out, p.pool.figures())
	for _, want := range []string{`bucket{le="0.0001"} 2`, `bucket{le="0.00025"} 3`, `bucket{le="0.5"} 3`,
		`bucket{le="1"} 4`, `bucket{le="+Inf"} 5`, `sum 3.0003`, `count 5`} {
		if !strings.Contains(out.String(), "\nredis_proxy_upstream_seconds_"+want+"\n") {
			t.Errorf("got %s; want it to have %s", out.String(), want)
		}
	}
}

func TestHTTPAnswersFromRedis(t *testing.T) {
	p := newParts(t, append(playRedis(t, replies), "--cache-bytes", "2KB")...)
	for _, tt := range []struct {
		key         string
		status      int
		cacheStatus string
		body        string
	}{
		{"text", 200, "redis_proxy; fwd=miss; stored", "hello"},
		{"text", 200, "redis_proxy; hit; ttl=", "hello"},
		{"empty", 200, "redis_proxy; fwd=miss; stored", ""},
		{"absent", 404, "redis_proxy; fwd=miss", "no such key\n"},
		{"absent", 404, "redis_proxy; fwd=miss", "no such key\n"},
		{"empty", 200, "redis_proxy; hit; ttl=", ""},
		{"list", 409, "redis_proxy; fwd=miss", "the key holds another type than a string\n"},
		{"forbidden", 502, "redis_proxy; fwd=miss", "upstream refused\n"},
		{"large", 200, "redis_proxy; fwd=miss", strings.Repeat("x", 2048)},
	} {
		r := serveHTTP(t, p, "GET /"+tt.key)
		compare(t, tt.key+": status", r.StatusCode, tt.status)
		compare(t, tt.key+": Cache-Status", strings.TrimRight(r.Header.Get("Cache-Status"), "0123456789"),
			tt.cacheStatus)
		compare(t, tt.key+": body", bodyOf(t, r), tt.body)
	}
}

// resp.go

// newReader returns a reader of its own budget, for one who has nothing to do in between.
func newReader(src io.Reader) *reader {
	return &reader{src: src, pause: func() error { return nil }, buf: make([]byte, readBuffer),
		budget: newBudget(2 * maxRequest)}
}

// requests is all that a reader makes of src, and what it fails with; nil at the end.
func requests(t testing.TB, src io.Reader) (all [][]string, err error) {
	t.Helper()
	r := newReader(src)
	for args := r.read(); args != nil; args = r.read() {
		all = append(all, strs(args))
		if len(r.buf) > 4<<20 {
			t.Fatalf("got a buffer of %d bytes; want at most %d", len(r.buf), 4<<20)
		}
	}
	if r.err == io.EOF {
		return all, nil
	}
	return all, r.err
}

// strs copies a request's arguments.
func strs(args [][]byte) (s []string) {
	for _, a := range args {
		s = append(s, string(a))
	}
	return s
}

var rawRequests = []struct{ name, in, want, err string }{
	{"array", "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", `[["GET" "k"]]`, ""},
	{"two arrays", "*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nQUIT\r\n", `[["PING"] ["QUIT"]]`, ""},
	{"empty and binary arguments", "*3\r\n$0\r\n\r\n$2\r\n\r\n\r\n$1\r\n\x00\r\n", `[["" "\r\n" "\x00"]]`, ""},
	{"lengths of two and three digits", "*1\r\n$10\r\n0123456789\r\n*1\r\n$100\r\n" + strings.Repeat("a", 100) + "\r\n",
		`[["0123456789"] ["` + strings.Repeat("a", 100) + `"]]`, ""},
	{"ten arguments", "*10\r\n" + strings.Repeat("$1\r\na\r\n", 10),
		`[[` + strings.TrimSpace(strings.Repeat(`"a" `, 10)) + `]]`, ""},
	{"whatever for terminators", "*1\rX$1\rXaXX*1\r\n$1\r\nb\n\n", `[["a"] ["b"]]`, ""},
	{"inline", "GET k\r\n", `[["GET" "k"]]`, ""},
	{"inline without carriage return", "GET k\nPING\n", `[["GET" "k"] ["PING"]]`, ""},
	{"inline and arrays", "PING\r\n*1\r\n$4\r\nPING\r\nPING\r\n", `[["PING"] ["PING"] ["PING"]]`, ""},
	{"requests for nothing", "\r\n\n   \r\n*0\r\n*-1\r\n*-10\r\nPING\r\n", `[["PING"]]`, ""},
	{"unfinished array", "PING\r\n*2\r\n$3\r\nGET\r\n", `[["PING"]]`, ""},
	{"unfinished argument", "PING\r\n*1\r\n$5\r\nabc", `[["PING"]]`, ""},
	{"unfinished terminator", "*1\r\n$1\r\na\r", `[]`, ""},
	{"unfinished line", "PING\r\nPI", `[["PING"]]`, ""},
	{"zero byte hides the end of a line", "a\x00b\r\nPING\r\n", `[]`, ""},
	{"count not a number", "*x\r\n", `[]`, "invalid multibulk length"},
	{"count empty", "PING\r\n*\r\n", `[["PING"]]`, "invalid multibulk length"},
	{"count with a leading zero", "*01\r\n", `[]`, "invalid multibulk length"},
	{"count with a plus", "*+1\r\n", `[]`, "invalid multibulk length"},
	{"count with a blank", "* 1\r\n", `[]`, "invalid multibulk length"},
	{"count minus zero", "*-0\r\n", `[]`, "invalid multibulk length"},
	{"count over 2147483647", "*2147483648\r\n", `[]`, "invalid multibulk length"},
	{"count over any integer", "*99999999999999999999\r\n", `[]`, "invalid multibulk length"},
	{"count that cannot fit a request", "*11184811\r\n", `[]`, "request larger than 64 MB"},
	{"no dollar", "*1\r\nX\r\n", `[]`, "expected '$', got 'X'"},
	{"count in place of an argument", "*2\r\n$1\r\na\r\n*1\r\n", `[]`, "expected '$', got '*'"},
	{"argument longer than its length", "*2\r\n$1\r\nabc\r\n$1\r\n", `[]`, "expected '$', got '\r'"},
	{"length not a number", "*1\r\n$x\r\n", `[]`, "invalid bulk length"},
	{"length empty", "*1\r\n$\r\n", `[]`, "invalid bulk length"},
	{"length negative", "*1\r\n$-1\r\n", `[]`, "invalid bulk length"},
	{"length with a leading zero", "*1\r\n$03\r\n", `[]`, "invalid bulk length"},
	{"length of two zeros", "*1\r\n$00\r\n", `[]`, "invalid bulk length"},
	{"length with a plus", "*1\r\n$+3\r\n", `[]`, "invalid bulk length"},
	{"length over 512 MiB", "*1\r\n$536870913\r\n", `[]`, "invalid bulk length"},
	{"length over a request", "*1\r\n$67108865\r\n", `[]`, "request larger than 64 MB"},
	{"lengths over a request together", "*2\r\n$600000\r\n" + strings.Repeat("a", 600000) + "\r\n$66600000\r\n", `[]`,
		"request larger than 64 MB"},
	{"quotes that do not end", "PING\r\nGET \"k\r\n", `[["PING"]]`, "unbalanced quotes in request"},
	{"quotes that end within a word", "GET \"a\"b\r\n", `[]`, "unbalanced quotes in request"},
	{"large request", request("GET", strings.Repeat("k", 1<<20)), `[["GET" "` + strings.Repeat("k", 1<<20) + `"]]`, ""},
	{"longest line", strings.Repeat("a", 64<<10) + "\n", `[["` + strings.Repeat("a", 64<<10) + `"]]`, ""},
	{"line too long", strings.Repeat("a", 64<<10+1), `[]`, "too big inline request"},
	{"line too long, ended", strings.Repeat("a", 64<<10+1) + "\r\n", `[]`, "too big inline request"},
	{"count line too long", "*" + strings.Repeat("1", 64<<10), `[]`, "too big mbulk count string"},
	{"count line too long, ended", "*" + strings.Repeat("1", 64<<10) + "\r\n", `[]`, "too big mbulk count string"},
	{"length line too long", "*1\r\n$" + strings.Repeat("1", 64<<10), `[]`, "too big bulk count string"},
}

func TestReaderSplitsRequests(t *testing.T) {
	for _, tt := range rawRequests {
		want := error(nil)
		if tt.err != "" {
			want = protocolError(tt.err)
		}
		for name, src := range map[string]io.Reader{
			"whole": strings.NewReader(tt.in), "a byte at a time": iotest.OneByteReader(strings.NewReader(tt.in)),
		} {
			got, err := requests(t, src)
			compare(t, tt.name+", "+name, fmt.Sprintf("%q", got), tt.want)
			compare(t, tt.name+", "+name+": error", err, want)
		}
	}
	compare(t, "text", protocolError("invalid bulk length").Error(), "Protocol error: invalid bulk length")
}

func TestReaderLetsGoOfLargeRequests(t *testing.T) {
	r := newReader(io.MultiReader(strings.NewReader(request("GET", strings.Repeat("k", 1<<19))),
		strings.NewReader("P")))
	if args := r.read(); args == nil {
		t.Fatal(r.err)
	}
	large := weak.Make(&r.buf[0])
	if r.next = r.end; r.read() != nil { // this is where a silent client is waited for
		t.Fatal("got a request from half a word")
	}
	runtime.GC()
	if large.Value() != nil {
		t.Error("the buffer of a request of 512 KiB is still held after the next read")
	}
	runtime.KeepAlive(&r)
}

// A request that does not fit into the budget of all is refused in words; what fits is counted, its
// arguments too.
func TestReaderCountsWhatIsNotAnswered(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		others   int // bytes that others hold
		held     int // at most, by a reader that has the whole request
		err      error
	}{
		{"short", request("GET", "k"), 0, 0, nil},
		{"1 MB", request("GET", strings.Repeat("k", 1<<20)), 0, 2 << 20, nil},
		{"many arguments", request(slices.Repeat([]string{"k"}, 10000)...), 0, 100_000*2 + 10000*argSize, nil},
		{"too many arguments", request(slices.Repeat([]string{"k"}, 60000)...), 0, 0, errTooMuch},
		{"too many words", strings.Repeat("a ", 30000) + "\n", 1<<20 + 1, 0, errTooMuch},
		{"too many arguments in one read", request(slices.Repeat([]string{""}, 2000)...), 2<<20 - 20_000, 0,
			errTooMuch},
		{"too much", request("GET", strings.Repeat("k", 3<<20)), 0, 0, errTooMuch},
	} {
		b := newBudget(2 << 20)
		b.hold("", tt.others)
		r := newReader(strings.NewReader(tt.in))
		r.budget = b
		args := r.read()
		compare(t, tt.name+": error", r.err, tt.err)
		compare(t, tt.name+": is whole", args != nil, tt.err == nil)
		if held := b.used; tt.err == nil && (held > tt.held || held < tt.held/2) {
			t.Errorf("%s: held %d bytes; want %d at most, and half of it at least", tt.name, held, tt.held)
		}
		r.read()
		b.release("", r.held)
		compare(t, tt.name+": held at the end", b.used, tt.others)
	}
}

func FuzzReader(f *testing.F) {
	for _, tt := range rawRequests {
		if len(tt.in) < readBuffer { // long ones take the fuzzer minutes to minimise
			f.Add([]byte(tt.in))
		}
	}
	f.Fuzz(func(t *testing.T, whole []byte) {
		want, wantErr := requests(t, bytes.NewReader(whole))
		for _, parts := range []func(io.Reader) io.Reader{iotest.OneByteReader, iotest.HalfReader,
			iotest.DataErrReader} {
			got, err := requests(t, parts(bytes.NewReader(whole)))
			if !slices.EqualFunc(got, want, slices.Equal[[]string]) || err != wantErr {
				t.Errorf("in parts: got %.300q, %v; want what the whole is, %.300q, %v", got, err, want, wantErr)
			}
		}
	})
}

func TestSplitWordsAsRedisDoes(t *testing.T) {
	for in, want := range map[string]string{
		"":            `[]`,
		" \t\n\v\f\r": `[]`,
		"a":           `["a"]`,
		"  a \t b\r":  `["a" "b"]`,
		"\v\fa":       `["a"]`,
		// Blank in front of a word and after quotes, but no end of a word.
		"a\vb c\fd":             `["a\vb" "c\fd"]`,
		"\"a\"\vb":              `["a" "b"]`,
		"\u00a0a\u2003b \u0085": `["\u00a0a\u2003b" "\u0085"]`, // blank to Unicode, not to C
		`"a b" 'c d'`:           `["a b" "c d"]`,
		`"" ''`:                 `["" ""]`,
		`a"b c"`:                `["ab c"]`,
		`a'b' c`:                `["ab" "c"]`,
		"\"\xff\" \xff":         `["\xff" "\xff"]`,
		`"\n\r\t\b\a\q\\\""`:    `["\n\r\t\b\aq\\\""]`,
		`"\x41\xfF\x0"`:         `["A\xffx0"]`,
		`"\x4g\xg4\x"`:          `["x4gxg4x"]`,
		`'\n\x41\'"'`:           `["\\n\\x41'\""]`,
		`a\nb\`:                 `["a\\nb\\"]`,
		`"a`:                    `unbalanced`,
		`'a`:                    `unbalanced`,
		`"a\"`:                  `unbalanced`,
		`'a\'`:                  `unbalanced`,
		`"a\`:                   `unbalanced`,
		`"a"b`:                  `unbalanced`,
		`'a'b`:                  `unbalanced`,
		`"a""b"`:                `unbalanced`,
		`a b "`:                 `unbalanced`,
	} {
		got, err := splitWords(nil, []byte(in))
		if want == "unbalanced" {
			compare(t, in, err, error(protocolError("unbalanced quotes in request")))
			continue
		}
		compare(t, in, fmt.Sprintf("%q %v", got, err), want+" <nil>")
	}
}

func FuzzSplitWords(f *testing.F) {
	for _, line := range []string{"", "a b", `"a" 'b'`, `"\x00\n\"" '\''`, `"`, "\v\f\x00", `a\`, `"\`, `"\x`} {
		f.Add([]byte(line))
	}
	f.Add(bytes.Repeat([]byte("a "), 1000))
	f.Fuzz(func(t *testing.T, line []byte) {
		words, err := splitWords(nil, line)
		held := 0
		for _, w := range words {
			held += cap(w)
		}
		if held > 16*len(line) {
			t.Errorf("a line of %d bytes: got words that hold %d; want in proportion", len(line), held)
		}
		if err != nil {
			words = nil
		}
		words = append(words, line)
		var quoted strings.Builder
		for _, w := range words {
			quoted.WriteString(`"`)
			for _, b := range w {
				fmt.Fprintf(&quoted, `\x%02x`, b)
			}
			quoted.WriteString("\"\t")
		}
		got, err := splitWords(nil, []byte(quoted.String()))
		if err != nil || !slices.EqualFunc(got, words, bytes.Equal) {
			t.Errorf("quoted again: got %.300q, %v; want %.300q", got, err, words)
		}
	})
}

func TestParseIntAsRedisDoes(t *testing.T) {
	for in, want := range map[string]string{
		"0":                    "0 true",
		"-1":                   "-1 true",
		"10":                   "10 true",
		"9223372036854775807":  "9223372036854775807 true",
		"-9223372036854775808": "-9223372036854775808 true",
		"":                     "0 false",
		"-":                    "0 false",
		"+1":                   "0 false",
		"01":                   "0 false",
		"-0":                   "0 false",
		"-01":                  "0 false",
		" 1":                   "0 false",
		"1 ":                   "0 false",
		"1_0":                  "0 false",
		"0x1":                  "0 false",
		"1.0":                  "0 false",
		"9223372036854775808":  "0 false",
	} {
		n, ok := parseInt([]byte(in))
		if !ok {
			n = 0 // it means nothing
		}
		compare(t, in, fmt.Sprint(n, ok), want)
	}
}

func TestUnknownCommandAsRedisHasIt(t *testing.T) {
	long := strings.Repeat("x", 200)
	for args, want := range map[string]string{
		"FOO":              "'FOO', with args beginning with: ",
		"foo|bar|b az":     "'foo', with args beginning with: 'bar' 'b az' ",
		"a\x00b|c\x00d|":   "'a', with args beginning with: 'c' '' ",
		long:               "'" + long[:128] + "', with args beginning with: ",
		"a|" + long + "|b": "'a', with args beginning with: '" + long[:128] + "' ",
		"a|" + long[:100] + "|" + long + "|b": "'a', with args beginning with: '" +
			long[:100] + "' '" + long[:25] + "' ",
	} {
		compare(t, args, unknownCommand(bytes.Split([]byte(args), []byte("|"))), "-ERR unknown command "+want+"\r\n")
	}
}

// A script is a client's connection: what it sends is there from the start, and its replies are
// kept.
type script struct {
	net.Conn // for all that is not read or written
	in       io.Reader
	out      io.Writer
	largest  int // the longest write
}

func newScript(t testing.TB, in io.Reader, out io.Writer) *script {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return &script{Conn: a, in: in, out: out}
}

func (s *script) Read(p []byte) (int, error) { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	s.largest = max(s.largest, len(p))
	return s.out.Write(p)
}

// talk is what a new client reads after it has sent what in has.
func talk(t testing.TB, p *parts, in io.Reader) string {
	t.Helper()
	var out bytes.Buffer
	p.resp.nextID.Store(0)
	p.serveRESP(newScript(t, in, &out))
	return out.String()
}

// helloReply is the reply to HELLO of the first client in protocol 2 or 3.
func helloReply(proto int) string {
	return map[int]string{2: "*14\r\n", 3: "%7\r\n"}[proto] +
		bulk("server") + bulk("redis") + bulk("version") + bulk("7.0.15") +
		bulk("proto") + ":" + strconv.Itoa(proto) + "\r\n" + bulk("id") + ":1\r\n" +
		bulk("mode") + bulk("standalone") + bulk("role") + bulk("master") + bulk("modules") + "*0\r\n"
}

func TestRESPReplies(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "text", "hello", "empty", "", "crlf", "\r\n")
	arity := func(name string) string { return "-ERR wrong number of arguments for '" + name + "' command\r\n" }
	const hello = "$5\r\nhello\r\n"
	for _, tt := range []struct{ in, want string }{ // NULL, MAP and TEXT stand for empty ones in either protocol
		{"GET text\r\n", hello},
		{request("gEt", "text"), hello},
		{"GET empty\r\nGET crlf\r\nGET text\r\n", "$0\r\n\r\n$2\r\n\r\n\r\n" + hello},
		{"GET\r\nGet a b\r\n", arity("get") + arity("get")},
		{"GET nothing\r\nGET text\r\n", "-ERR upstream unavailable\r\n" + hello},
		{"MGET text empty text\r\n", "*3\r\n" + hello + "$0\r\n\r\n" + hello},
		{"MGET text nothing\r\n", "-ERR upstream unavailable\r\n"},
		{"MGET\r\n", arity("mget")},
		{"PING\r\nping\nPING a b\r\n", "+PONG\r\n+PONG\r\n" + arity("ping")},
		{request("PING", "a\r\n\x00"), "$4\r\na\r\n\x00\r\n"},
		{request("ECHO", "a\r\n\x00"), "$4\r\na\r\n\x00\r\n"},
		{"ECHO\r\n", arity("echo")},
		{"\r\n*0\r\n\n", ""},
		{"HELLO 4\r\n", "-NOPROTO unsupported protocol version\r\n"},
		{"HELLO x\r\n", "-ERR Protocol version is not an integer or out of range\r\n"},
		{"HELLO 2 foo\r\n", "-ERR Syntax error in HELLO option 'foo'\r\n"},
		{"HELLO 2 SETNAME\r\n", "-ERR Syntax error in HELLO option 'SETNAME'\r\n"},
		{"HELLO 3 AUTH u p\r\nCLIENT GETNAME\r\n",
			"-WRONGPASS invalid username-password pair or user is disabled.\r\nNULL"},
		{"HELLO 2 SETNAME \"a b\"\r\n", "-ERR Client names cannot contain spaces, newlines or special characters.\r\n"},
		{"HELLO 3 AUTH default x SETNAME n\r\nCLIENT GETNAME\r\n", helloReply(3) + "$1\r\nn\r\n"},
		{"AUTH x\r\n", "-ERR AUTH <password> called without any password configured for the default user. " +
			"Are you sure your configuration is correct?\r\n"},
		{"AUTH default x\r\nAUTH a b c\r\n", "+OK\r\n-ERR syntax error\r\n"},
		{"AUTH u x\r\n", "-WRONGPASS invalid username-password pair or user is disabled.\r\n"},
		{"SELECT 0\r\nSELECT 1\r\nSELECT -1\r\n",
			"+OK\r\n-ERR DB index is out of range\r\n-ERR DB index is out of range\r\n"},
		{"SELECT x\r\n", "-ERR value is not an integer or out of range\r\n"},
		{"SELECT 2147483648\r\n", "-ERR value is out of range, value must between -2147483648 and 2147483647\r\n"},
		{"RESET\r\nCONFIG GET x\r\nRESET x\r\n", "+RESET\r\n*0\r\n" + arity("reset")},
		{"COMMAND DOCS get\r\n", "-ERR unknown subcommand 'DOCS'. Try COMMAND HELP.\r\n"},
		{"COMMAND FOO\r\n", "-ERR unknown subcommand 'FOO'. Try COMMAND HELP.\r\n"},
		{"COMMAND COUNT x\r\n", arity("command|count")},
		{"CONFIG GET save\r\n", "MAP"},
		{"CONFIG GET save maxmemory\r\nCLUSTER SLOTS\r\nCLUSTER KEYSLOT a\r\n", "MAP" +
			strings.Repeat("-ERR This instance has cluster support disabled\r\n", 2)},
		{"CONFIG HELP\r\nPING\r\n", "*3\r\n+CONFIG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\r\n" +
			"+GET <pattern>\r\n+HELP\r\n+PONG\r\n"},
		{"CONFIG\r\nCONFIG GET\r\n", arity("config") + arity("config|get")},
		{"CONFIG SET a b\r\n", "-ERR unknown subcommand 'SET'. Try CONFIG HELP.\r\n"},
		{"CLIENT ID\r\n", ":1\r\n"},
		{"CLIENT\r\nCLIENT id x\r\n", arity("client") + arity("client|id")},
		{"CLIENT foo\r\n", "-ERR unknown subcommand 'foo'. Try CLIENT HELP.\r\n"},
		{"CLIENT TRACKING ON\r\n", "-ERR unknown subcommand 'TRACKING'. Try CLIENT HELP.\r\n"},
		{"CLIENT GETNAME\r\n", "NULL"},
		{"CLIENT SETNAME n\r\nCLIENT GETNAME\r\nCLIENT SETNAME \"\"\r\nCLIENT GETNAME\r\n",
			"+OK\r\n$1\r\nn\r\n+OK\r\nNULL"},
		{"CLIENT SETNAME \"a b\"\r\n", "-ERR Client names cannot contain spaces, newlines or special characters.\r\n"},
		{"CLIENT SETINFO lib-name x\r\nCLIENT SETINFO LIB-VER 1.0\r\n", "+OK\r\n+OK\r\n"},
		{"CLIENT SETINFO foo x\r\n", "-ERR Unrecognized option 'foo'\r\n"},
		{"CLIENT SETINFO lib-name \"a b\"\r\n",
			"-ERR lib-name cannot contain spaces, newlines or special characters.\r\n"},
		{"CLIENT NO-EVICT on\r\nCLIENT NO-TOUCH OFF\r\nCLIENT NO-EVICT x\r\n", "+OK\r\n+OK\r\n-ERR syntax error\r\n"},
		{"INFO nosuch\r\n", "TEXT"},
		{"SET k v\r\nPING\r\n", "-ERR unknown command 'SET', with args beginning with: 'k' 'v' \r\n+PONG\r\n"},
		{request("a\r\nb", "c\n"), "-ERR unknown command 'a  b', with args beginning with: 'c ' \r\n"},
		{"QUIT\r\nPING\r\n", "+OK\r\n"},
		{"QUIT x\r\n", "+OK\r\n"},
		{"PING\r\nPOST / x\r\nPING\r\n", "+PONG\r\n"},
		{"Host: x\r\nPING\r\n", ""},
		{"CLIENT LIST TYPE pubsub\r\nCLIENT LIST type SLAVE\r\nCLIENT LIST ID 2 3\r\n", "TEXTTEXTTEXT"},
		{"CLIENT LIST TYPE foo\r\nCLIENT LIST ID a\r\nCLIENT LIST ID 1 a\r\n",
			"-ERR Unknown client type 'foo'\r\n-ERR Invalid client ID\r\n-ERR Invalid client ID\r\n"},
		{"CLIENT LIST TYPE\r\nCLIENT LIST ID\r\nCLIENT LIST TYPE normal x\r\n",
			"-ERR syntax error\r\n-ERR syntax error\r\n-ERR syntax error\r\n"},
		{request("CLIENT", "SETNAME", strings.Repeat("n", maxName+1)) + "CLIENT GETNAME\r\n",
			"-ERR Client names cannot be longer than 4096 bytes.\r\nNULL"},
		{"GET text\r\n*x\r\nPING\r\n", hello + "-ERR Protocol error: invalid multibulk length\r\n"},
		{"*1\r\n\r\n\r\nPING\r\n", "-ERR Protocol error: expected '$', got ' '\r\n"},
	} {
		want2 := strings.NewReplacer("NULL", "$-1\r\n", "MAP", "*0\r\n", "TEXT", "$0\r\n\r\n").Replace(tt.want)
		want3 := strings.NewReplacer("NULL", "_\r\n", "MAP", "%0\r\n", "TEXT", "=4\r\ntxt:\r\n").Replace(tt.want)
		compare(t, tt.in, talk(t, p, strings.NewReader(tt.in)), want2)
		compare(t, "a byte at a time: "+tt.in, talk(t, p, iotest.OneByteReader(strings.NewReader(tt.in))), want2)
		compare(t, "in RESP3: "+tt.in, talk(t, p, strings.NewReader("HELLO 3\r\n"+tt.in)), helloReply(3)+want3)
	}
	third := newParts(t, "--redis-url", "redis://h/3")
	compare(t, "SELECT with a database in the URL",
		talk(t, third, strings.NewReader("SELECT 3\r\nSELECT 0\r\nSELECT 1\r\n")),
		"+OK\r\n+OK\r\n-ERR DB index is out of range\r\n")
	compare(t, "HELLO", talk(t, p, strings.NewReader("HELLO\r\nHELLO 3\r\nHELLO\r\nHELLO 2\r\n")),
		helloReply(2)+helloReply(3)+helloReply(3)+helloReply(2))
}

func TestRESPDescribesItself(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "key", "value")
	for _, tt := range []struct{ in, wants string }{
		{"INFO\r\n", "# Server\r\n|redis_version:7.0.15\r\n|loading:0\r\n|role:master\r\n|" +
			"\r\n\r\n# Cache\r\ncache_hits:0\r\n|\r\ncache_keys:1\r\n"},
		{"INFO all\r\n", "# Server\r\n|# Cache\r\n"},
		{"GET key\r\nINFO STATS memory\r\n", "# Memory\r\n|# Stats\r\n|keyspace_hits:1\r\n"},
		{"CLIENT SETNAME me\r\nCLIENT INFO\n", "id=1 |name=me |resp=2 "},
		{"COMMAND INFO cluster config command client get\r\n", "*5\r\n*10\r\n$7\r\ncluster\r\n:-2\r\n|" +
			"config\r\n:-2\r\n|command\r\n:-1\r\n|client\r\n:-2\r\n|get\r\n:2\r\n*2\r\n"},
		{"HELLO 3\r\nCOMMAND INFO get\r\n", "*1\r\n*10\r\n$3\r\nget\r\n:2\r\n~2\r\n+readonly\r\n+fast\r\n" +
			":1\r\n:1\r\n:1\r\n~0\r\n"},
		{"CLIENT LIST TYPE normal\n", "\r\nid=1 "},
		{"CLIENT LIST ID 7 1 8\n", "\r\nid=1 "},
		{"CLIENT SETINFO LIB-NAME x\r\nHELLO 3\r\nCLIENT LIST\n", "\r\ntxt:id=1 |resp=3 lib-name=x "},
	} {
		got := talk(t, p, strings.NewReader(tt.in))
		for want := range strings.SplitSeq(tt.wants, "|") {
			if !strings.Contains(got, want) {
				t.Errorf("%q: got %q; want it to have %q", tt.in, got, want)
			}
		}
	}
	if got := talk(t, p, strings.NewReader("INFO stats\r\n")); strings.Contains(got, "# Server") {
		t.Errorf("INFO stats: got %q; want that section alone", got)
	}
}

func TestRESPCountsHitsAndMisses(t *testing.T) {
	p := newParts(t, playRedis(t, replies)...)
	got := talk(t, p, strings.NewReader("GET text\r\n"))
	got += talk(t, p, strings.NewReader("GET text\r\nMGET text absent\r\nINFO stats\r\n"))
	if want := "\r\nkeyspace_hits:2\r\nkeyspace_misses:2\r\n"; !strings.Contains(got, want) {
		t.Errorf("got %q; want it to have %q", got, want)
	}
}

func TestRESPCountsWrongPasswords(t *testing.T) {
	p := newParts(t, "--password", "right")
	got := talk(t, p, strings.NewReader("AUTH wrong\r\nAUTH \"\"\r\nAUTH bob right\r\n"+
		"HELLO 3 AUTH default wrong\r\nAUTH right\r\nINFO stats\r\n"))
	if !strings.Contains(got, "\nacl_access_denied_auth:4\r\n") {
		t.Errorf("got %q; want 4 that were denied", got)
	}
}

func TestRESPAnswersPipelinesInOrder(t *testing.T) {
	p := newParts(t)
	large := strings.Repeat("x", 100000)
	cacheNow(p, "text", "hello", "empty", "", "large", large)
	var in, want strings.Builder
	for i := range 3000 {
		n := strconv.Itoa(i)
		in.WriteString(request("GET", "text") + "GET empty\r\n" + request("ECHO", n) + request("MGET", "empty", "text"))
		want.WriteString(bulk("hello") + bulk("") + bulk(n) + "*2\r\n" + bulk("") + bulk("hello"))
		if i%100 == 0 {
			in.WriteString(request("GET", "large"))
			want.WriteString(bulk(large))
		}
	}
	for range 1000 {
		in.WriteString("GET text\r\n")
		want.WriteString(bulk("hello"))
	}
	client, nc := net.Pipe()
	go p.serveRESP(nc)                                // ends with QUIT
	go io.WriteString(client, in.String()+"QUIT\r\n") // ends when all is read
	got, err := io.ReadAll(client)
	if err != nil {
		t.Error(err)
	}
	got, _ = bytes.CutSuffix(got, []byte("+OK\r\n"))
	for reply := range strings.SplitAfterSeq(want.String(), "\n") {
		if !bytes.HasPrefix(got, []byte(reply)) {
			t.Fatalf("got %.80q; want %.80q", got, reply)
		}
		got = got[len(reply):]
	}
	compare(t, "after all replies", string(got), "")
}

func TestRESPHoldsFewRepliesBack(t *testing.T) {
	p := newParts(t)
	s := newScript(t, strings.NewReader(strings.Repeat("INFO\n", readBuffer/len("INFO\n"))), io.Discard)
	p.serveRESP(s)
	if s.largest > 4*flushAt {
		t.Errorf("replies to %d bytes of commands: got %d in one write; want at most %d", readBuffer, s.largest,
			4*flushAt)
	}
}

func TestRESPKeepsClientsApartAfterAFailedWrite(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "large", strings.Repeat("x", 2*flushAt))
	for range 50 {
		gone := newScript(t, strings.NewReader(strings.Repeat("GET large\r\n", 3)), failingWriter{})
		p.serveRESP(gone)
		if got := talk(t, p, strings.NewReader("PING\r\n")); got != "+PONG\r\n" {
			t.Fatalf("PING of another client: got %.100q; want %q", got, "+PONG\r\n")
		}
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("gone") }

func TestRESPHitAllocatesNothing(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "key", "value")
	const n = 20000
	in := strings.Repeat(request("GET", "key"), n)
	got := testing.AllocsPerRun(3, func() { p.serveRESP(newScript(t, strings.NewReader(in), io.Discard)) })
	if got > n/20 { // the race detector has sync.Pool drop some
		t.Errorf("%d hits: got %v allocations; want none, but for the connection", n, got)
	}
}

func TestRESPAnswersFromRedis(t *testing.T) {
	for in, want := range map[string]string{
		"GET text":              bulk("hello"),
		"GET empty":             bulk(""),
		"GET absent":            "NULL",
		"GET list":              "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
		"GET loading":           "-LOADING Redis is loading the dataset in memory\r\n",
		"GET forbidden":         "-ERR upstream refused: NOPERM no permissions\r\n",
		"GET number":            "-ERR upstream unavailable\r\n",
		"MGET text absent list": "*3\r\n" + bulk("hello") + "NULLNULL",
		"MGET text loading":     "-LOADING Redis is loading the dataset in memory\r\n",
		// Nothing is left over for the next reply.
		"MGET text loading\r\nGET empty":   "-LOADING Redis is loading the dataset in memory\r\n" + bulk(""),
		"EXISTS text loading\r\nGET empty": "-LOADING Redis is loading the dataset in memory\r\n" + bulk(""),
	} {
		p := newParts(t, playRedis(t, replies)...)
		compare(t, in, talk(t, p, strings.NewReader(in+"\r\n")), strings.ReplaceAll(want, "NULL", "$-1\r\n"))
		compare(t, "in RESP3: "+in, talk(t, p, strings.NewReader("HELLO 3\r\n"+in+"\r\n")),
			helloReply(3)+strings.ReplaceAll(want, "NULL", "_\r\n"))
	}
}

// A transaction asks for each key once, and is answered from one moment: also a key that was a hit
// has the value that it has when the last reply has come.
func TestRESPTransactionsAreOfOneMoment(t *testing.T) {
	var p *parts
	var asked atomic.Int64
	p = newParts(t, playRedis(t, func(_ int, args []string) string {
		asked.Add(1)
		cacheNow(p, "hit", "new") // meanwhile
		return bulk("fetched")
	})...)
	cacheNow(p, "hit", "old")
	got := talk(t, p, strings.NewReader("MULTI\r\nGET hit\r\nMGET miss other\r\nEXISTS miss hit\r\nEXEC\r\n"))
	compare(t, "replies", got, "+OK\r\n"+strings.Repeat("+QUEUED\r\n", 3)+
		"*3\r\n"+bulk("new")+"*2\r\n"+bulk("fetched")+bulk("fetched")+":2\r\n")
	compare(t, "GETs", asked.Load(), 2)

	asked.Store(0) // the cache has room for one of the keys
	p = newParts(t, append(playRedis(t, func(_ int, args []string) string {
		asked.Add(1)
		return bulk("of " + args[1])
	}), "--cache-size", "1")...)
	got = talk(t, p, strings.NewReader("MULTI\r\nGET a\r\nGET b\r\nMGET b a\r\nEXEC\r\n"))
	compare(t, "replies with little room", got, "+OK\r\n"+strings.Repeat("+QUEUED\r\n", 3)+
		"*3\r\n"+bulk("of a")+bulk("of b")+"*2\r\n"+bulk("of b")+bulk("of a"))
	compare(t, "GETs with little room", asked.Load(), 2)
}

// A transaction that is too large for one moment is asked for in lots, not a key at a time.
func TestRESPLargeTransactionsAskTogether(t *testing.T) {
	p := newParts(t, playRedis(t, func(int, []string) string { return "$-1\r\n" })...)
	p.cache.typical.Store(aheadBytes / 8)
	in, want := "MULTI\r\n", ""
	for i := range 160 {
		in += request("GET", fmt.Sprint(i))
		want += "$-1\r\n"
	}
	got := talk(t, p, strings.NewReader(in+"EXEC\r\n"))
	compare(t, "replies", got, "+OK\r\n"+strings.Repeat("+QUEUED\r\n", 160)+"*160\r\n"+want)
	compare(t, "GETs", p.pool.flights.Load(), 168) // the first lot twice, as absences are not kept
	if n := p.pool.batches.Load(); n > 60 {
		t.Errorf("got %d batches; want about 21", n)
	}
}

// However many nulls and errors come before a value, none of them is lost, and none held back for
// long.
func TestRESPWritesAValueAfterManyShortReplies(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "v", "value")
	compare(t, "errors", talk(t, p, strings.NewReader(strings.Repeat("GET x\r\n", 1000)+"GET v\r\n")),
		strings.Repeat("-ERR upstream unavailable\r\n", 1000)+bulk("value"))
	p = newParts(t, playRedis(t, func(int, []string) string { return "$-1\r\n" })...)
	cacheNow(p, "v", "value")
	args := append(slices.Repeat([]string{"x"}, 20_000), "v")
	var out bytes.Buffer
	client := newScript(t, strings.NewReader(request(append([]string{"MGET"}, args...)...)), &out)
	p.serveRESP(client)
	compare(t, "nulls", out.String(), "*20001\r\n"+strings.Repeat("$-1\r\n", 20_000)+bulk("value"))
	if client.largest > 2*flushAt {
		t.Errorf("the longest write has %d bytes; want %d at most", client.largest, 2*flushAt)
	}
}

// A client that takes nothing has been waited for once.
func TestRESPWritesNothingAfterAFailedWrite(t *testing.T) {
	p := newParts(t)
	cacheNow(p, "large", strings.Repeat("v", 1<<20))
	writes := 0
	p.serveRESP(newScript(t, strings.NewReader(strings.Repeat("GET large\r\nPING\r\n", 10)),
		writerFunc(func([]byte) (int, error) {
			writes++
			return 0, net.ErrClosed
		})))
	compare(t, "writes", writes, 1)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A request that has begun must be complete in 10 seconds; between requests a client may be silent.
func TestRESPRequestsHaveTheirTime(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     time.Duration
	}{
		{"half a request", request("PING") + "*2\r\n$4\r\nEC", 10 * time.Second},
		{"half a line", "PING\r\nPIN", 10 * time.Second},
		{"3 MB of a request", request("PING") + "*2\r\n$4\r\nECHO\r\n$4000000\r\n" + strings.Repeat("x", 3<<20),
			10 * time.Second},
		{"whole requests", request("PING") + "PING\r\n", time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newParts(t)
				client, nc := net.Pipe()
				go p.serveRESP(nc) // ends with the connection
				time.AfterFunc(time.Hour, func() { client.Close() })
				began := time.Now()
				go func() { // ends with the connection
					io.WriteString(client, tt.in[:len(tt.in)-1])
					time.Sleep(5 * time.Second)
					io.WriteString(client, tt.in[len(tt.in)-1:]) // which renews nothing
				}()
				io.Copy(io.Discard, client)
				if took := time.Since(began); took < tt.want || took > tt.want+time.Second {
					t.Errorf("closed after %v; want %v", took, tt.want)
				}
			})
		})
	}
}

// Without room for large values, small ones are still answered, in small lots, and a large one when
// there is room or, after a while, by an error.
func TestRESPValuesWaitForRoom(t *testing.T) {
	small, large := strings.Repeat("s", 1000), strings.Repeat("l", 2*flushAt)
	pipeline := strings.Repeat(request("GET", "small"), 100) +
		request(append([]string{"MGET"}, slices.Repeat([]string{"small"}, 100)...)...)
	want := strings.Repeat(bulk(small), 100) + "*100\r\n" + strings.Repeat(bulk(small), 100)
	p := newParts(t, "--redis-timeout", "50ms", "--cache-timeout", "1h")
	cacheNow(p, "small", small, "large", large)
	values := p.cfg.clients.values
	values.used = values.max
	const crowded = "-ERR too many large values on their way\r\n"
	in := pipeline + request("GET", "large") + request("MGET", "small", "large") + "PING\r\n"
	compare(t, "without room", talk(t, p, strings.NewReader(in)), want+crowded+crowded+"+PONG\r\n")
	compare(t, "hits counted", p.resp.tally[hit].Load(), 201)
	compare(t, "errors counted", p.resp.tally[failed].Load(), 2)
	p.cache.timeout = time.Minute
	time.AfterFunc(20*time.Millisecond, func() { values.release("", values.max) })
	want += bulk(large) + "*2\r\n" + bulk(small) + bulk(large) + "+PONG\r\n"
	compare(t, "with room in time", talk(t, p, strings.NewReader(in)), want)
	compare(t, "with room", talk(t, p, strings.NewReader(in)), want)
	compare(t, "held at the end", values.used, 0)
	compare(t, "values held at the end", len(values.held), 0)
}

// What a transaction has queued counts as not answered.
func TestRESPTransactionsAreBounded(t *testing.T) {
	p := newParts(t)
	p.cfg.clients.requests = newBudget(1 << 20)
	key := strings.Repeat("k", 10000)
	got := talk(t, p, strings.NewReader("MULTI\r\n"+strings.Repeat(request("GET", key), 1000)))
	want := "+OK\r\n" + strings.Repeat("+QUEUED\r\n", 106) +
		"-ERR Protocol error: too much of all clients' requests is unanswered\r\n"
	if n := strings.Count(got, "QUEUED"); n < 80 || n > 110 || !strings.HasSuffix(got, want[len(want)-60:]) {
		t.Errorf("got %d commands queued, and at the end %.80q; want about 100, and an error", n, got[len(got)-80:])
	}
	compare(t, "held at the end", p.cfg.clients.requests.used, 0)
	got = talk(t, p, strings.NewReader("MULTI\r\n"+strings.Repeat(request("GET", "k"), 20_000)))
	if !strings.HasSuffix(got, want[len(want)-60:]) { // they cost more than their bytes
		t.Errorf("small commands: got at the end %.80q; want an error", got[len(got)-80:])
	}
	in := "MULTI\r\n" + strings.Repeat(request("GET", key), 50) + "DISCARD\r\n"
	got = talk(t, p, strings.NewReader(strings.Repeat(in, 10)+"PING\r\n"))
	compare(t, "after transactions that have ended", got[len(got)-12:], "+OK\r\n+PONG\r\n")
}

// An MGET whose answers are large is written as they come: an error is an element then.
func TestRESPWritesLargeMGETsAsTheyCome(t *testing.T) {
	large := strings.Repeat("v", aheadBytes/2)
	p := newParts(t, playRedis(t, func(_ int, args []string) string {
		switch args[1] {
		case "bad":
			return "-LOADING\r\n"
		case "list":
			return "-WRONGTYPE any\r\n"
		case "short":
			return bulk("v")
		}
		return bulk(large)
	})...)
	p.cache.typical.Store(aheadBytes)
	compare(t, "an error before much", talk(t, p, strings.NewReader(request("MGET", "short", "bad", "c"))),
		"-LOADING\r\n")
	compare(t, "an error after much", talk(t, p, strings.NewReader(request("MGET", "a", "list", "c", "d", "bad", "e"))),
		"*6\r\n"+bulk(large)+"$-1\r\n"+bulk(large)+bulk(large)+"-LOADING\r\n"+bulk(large))
}

// lru.go

// bytesFor is a byte limit that n entries of this length fill.
func bytesFor(n, keyAndValue int) int64 {
	v := newValue("", make([]byte, keyAndValue), 0)
	return int64(n) * (&entry{value: v}).size()
}

// newTestCache is a cache that nobody fills but the test.
func newTestCache(maxKeys int, maxBytes int64, ttl, stale time.Duration) *cache {
	s := cacheSettings{maxKeys: maxKeys, maxBytes: maxBytes, ttl: ttl, stale: stale, timeout: time.Second}
	return newCache(s, nil)
}

// putAt stores a value that was fetched now.
func putAt(c *cache, now time.Duration, keys ...string) {
	for _, key := range keys {
		putValue(c, now, newValue(key, []byte("value"), now))
	}
}

// lookUp reads a key.
func lookUp(c *cache, now time.Duration, key string) (val string, hit bool) {
	e := c.entries[key]
	if !e.live(now) {
		return "", false
	}
	c.use([]*list.Element{e.used})
	return e.content(), true
}

// holds tells which of the keys are there, and reads them: the last becomes the most recently used.
func holds(c *cache, now time.Duration, keys string) (found string) {
	for _, key := range strings.Split(keys, "") {
		if _, hit := lookUp(c, now, key); hit {
			found += key
		}
	}
	return found
}

func TestCacheEvictsLeastRecentlyUsed(t *testing.T) {
	c := newTestCache(3, 1<<20, time.Hour, 0)
	putAt(c, 0, "a", "b", "c")
	lookUp(c, 0, "a")
	lookUp(c, 0, "x")
	putAt(c, 0, "d")
	compare(t, "a read, d filled", holds(c, 0, "bcda"), "cda")
	putAt(c, 0, "c")
	putAt(c, 0, "e", "f")
	compare(t, "c refilled, e and f filled", holds(c, 0, "abcdef"), "cef")
	compare(t, "counts", fmt.Sprint(c.evictions, c.expirations), "3 0")
}

func TestCacheRefillRenewsTheExpiryAndAReadDoesNot(t *testing.T) {
	c := newTestCache(3, 1<<20, 10*time.Second, 0)
	putAt(c, 0, "a", "b")
	putAt(c, 5*time.Second, "b")
	compare(t, "just before", holds(c, 10*time.Second-1, "ab"), "ab")
	compare(t, "after the first TTL", holds(c, 10*time.Second, "ab"), "b")
	compare(t, "before the second", holds(c, 15*time.Second-1, "ab"), "b")
	compare(t, "after the second", holds(c, 15*time.Second, "ab"), "")
	putValue(c, 15*time.Second, newValue("a", []byte{}, 12*time.Second)) // the fetch took three seconds
	compare(t, "before the TTL from the fetch", holds(c, 22*time.Second-1, "a"), "a")
	compare(t, "after the TTL from the fetch", holds(c, 22*time.Second, "a"), "")
}

func TestCacheExpiredCostsNoLiveEntryItsPlace(t *testing.T) {
	for _, stale := range []time.Duration{0, time.Hour} { // an expired entry may still be of use
		c := newTestCache(3, 1<<20, 10*time.Second, stale)
		putAt(c, 0, "a", "b")
		putAt(c, 5*time.Second, "c")
		compare(t, "all read, c first", holds(c, 9*time.Second, "cab"), "cab")
		putAt(c, 10*time.Second, "d", "e")
		compare(t, "a and b expired", holds(c, 10*time.Second, "abcde"), "cde")
		compare(t, "counts", fmt.Sprint(c.evictions, c.expirations), "0 2")
	}
}

func TestCacheExpiredCostsNoLiveEntryItsPlaceAfterASlowFetch(t *testing.T) {
	c := newTestCache(2, 1<<20, 10*time.Second, 0)
	putValue(c, 3*time.Second, newValue("a", []byte{}, 2*time.Second))
	putValue(c, 4*time.Second, newValue("b", []byte{}, 1*time.Second)) // asked for earlier, answered later
	putAt(c, 11*time.Second, "c")
	compare(t, "b expired", holds(c, 11*time.Second, "abc"), "ac")
}

func TestCacheDropsExpiredAFewAtATime(t *testing.T) {
	c := newTestCache(100, 1<<20, 10*time.Second, 5*time.Second)
	putAt(c, 0, strings.Split("abcdefgh", "")...)
	for _, tt := range []struct {
		now  time.Duration
		key  string
		want int
	}{{15*time.Second - 1, "x", 9}, {15 * time.Second, "y", 6}, {15 * time.Second, "z", 3}} {
		putAt(c, tt.now, tt.key)
		compare(t, "keys after "+tt.key, len(c.entries), tt.want)
	}
}

func TestCacheBoundsBytes(t *testing.T) {
	c := newTestCache(100, bytesFor(3, 6), time.Hour, 0)
	putAt(c, 0, "a", "b", "c", "d")
	compare(t, "four where three fit", holds(c, 0, "abcd"), "bcd")
	compare(t, "usage", fmt.Sprint(len(c.entries), c.bytes), fmt.Sprint(3, bytesFor(3, 6)))

	large := make([]byte, bytesFor(3, 6))
	compare(t, "too large a value: stored", putValue(c, 0, newValue("c", large, 0)), false)
	compare(t, "c too large", holds(c, 0, "bcd"), "bd")
	most := large[:bytesFor(3, 6)-bytesFor(1, 0)-int64(len("c")+len("493")-len("0"))]
	compare(t, "the largest value: stored", putValue(c, 0, newValue("c", most, 0)), true)
	compare(t, "c as large as the cache", holds(c, 0, "bcd"), "c")
	c.drop(0, c.entries["c"])
	compare(t, "usage when empty", fmt.Sprint(len(c.entries), c.bytes), "0 0")
}

func TestCacheRemovesAndClears(t *testing.T) {
	c := newTestCache(5, 1<<20, time.Hour, 0)
	putAt(c, 0, "a", "b", "c")
	c.drop(0, c.entries["b"])
	c.drop(0, c.entries["x"])
	compare(t, "b removed", holds(c, 0, "abc"), "ac")
	c.forget(nil)
	compare(t, "cleared", holds(c, 0, "abc"), "")
	compare(t, "usage when cleared", fmt.Sprint(len(c.entries), c.bytes), "0 0")
	putAt(c, 0, "d")
	compare(t, "filled again", holds(c, 0, "acd"), "d")
}

func TestCacheGetAllocatesNothing(t *testing.T) {
	c := newTestCache(5, 1<<20, time.Hour, 0)
	long := strings.Repeat("a", 100) // shorter ones may be copied without
	putAt(c, 0, long)
	keys, answers := [][]byte{[]byte(long), []byte(long)}, make([]answer, 2)
	compare(t, "allocations", testing.AllocsPerRun(100, func() { c.get(0, keys, answers) }), 0)
}

// A flightDeck is a cache whose flights the test carries out.
type flightDeck struct {
	*cache
	begun []*flight
}

func newFlightDeck(s cacheSettings) *flightDeck {
	d := new(flightDeck)
	s.maxKeys, s.maxBytes, s.timeout = 100, 1<<20, time.Second
	d.cache = newCache(s, func(fs []*flight) { d.begun = append(d.begun, fs...) })
	return d
}

// ask returns what a request for a key is told before it waits: its outcome, or "flight".
func (d *flightDeck) ask(key string) string {
	var a [1]answer
	d.decide(d.now(), [][]byte{[]byte(key)}, a[:])
	if a[0].flight != nil {
		return "flight"
	}
	return outcomes[a[0].outcome()]
}

// without returns how a request for a key ends in an outage.
func (d *flightDeck) without(key string) string {
	a := [1]answer{{err: errUnavailable}}
	d.lookAgain([][]byte{[]byte(key)}, a[:])
	return outcomes[a[0].outcome()]
}

// land ends the oldest flight.
func (d *flightDeck) land(v value, err error) {
	f := d.begun[0]
	d.begun = d.begun[1:]
	d.finish(f, v, err)
}

func TestCacheKeepsAbsencesForTheirTime(t *testing.T) {
	for _, absent := range []time.Duration{2 * time.Second, 10 * time.Second} { // the second is the TTL
		synctest.Test(t, func(t *testing.T) {
			d := newFlightDeck(cacheSettings{ttl: 10 * time.Second, absent: absent, stale: time.Hour})
			compare(t, "at first", d.ask("k"), "flight")
			d.land(newValue("k", nil, d.now()), errAbsent)
			time.Sleep(absent - 1)
			compare(t, "within its time", d.ask("k"), "absent_hit")
			time.Sleep(time.Nanosecond)
			compare(t, "after its time", d.ask("k"), "flight")
			d.land(value{}, errUnavailable)
			compare(t, "in an outage", d.without("k"), "error")
			d.ask("k")
			d.land(newValue("k", []byte("v"), d.now()), nil)
			compare(t, "created", d.ask("k"), "hit")
			d.forget([][]byte{[]byte("k")})
			compare(t, "reported as changed", d.ask("k"), "flight")
		})
	}
}

func TestCacheEndsEntriesWithTheirKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFlightDeck(cacheSettings{ttl: 10 * time.Second, stale: time.Hour})
		for key, left := range map[string]time.Duration{"short": time.Second, "long": time.Minute} {
			d.ask(key)
			v := newValue(key, []byte("v"), d.now())
			v.expires = d.now() + left
			d.land(v, nil)
		}
		time.Sleep(time.Second - 1)
		compare(t, "before its key expires", d.ask("short"), "hit")
		time.Sleep(time.Nanosecond)
		compare(t, "after its key expired", d.ask("short"), "flight")
		compare(t, "the other", d.ask("long"), "hit")
		d.land(value{}, errUnavailable)
		compare(t, "in an outage", d.without("short"), "error")
		time.Sleep(9 * time.Second)
		compare(t, "after the TTL", d.ask("long"), "flight")
		compare(t, "in an outage, past its TTL only", d.without("long"), "stale")
	})
}

func TestCacheRefreshesBeforeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFlightDeck(cacheSettings{ttl: 10 * time.Second, refresh: 2 * time.Second})
		d.ask("k")
		d.land(newValue("k", []byte("1"), d.now()), nil)
		time.Sleep(8*time.Second - 1)
		compare(t, "early", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 0")
		time.Sleep(time.Nanosecond)
		compare(t, "near the end", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 1")
		compare(t, "while that is in flight", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 1")
		d.land(value{}, errUnavailable)
		compare(t, "just after it failed", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 0")
		time.Sleep(refreshPause)
		compare(t, "a pause later", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 1")
		d.land(newValue("k", []byte("2"), d.now()), nil)
		time.Sleep(2 * time.Second)
		compare(t, "past the end of the first", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "hit 0")
		d.ask("short")
		v := newValue("short", []byte("1"), d.now())
		v.expires = d.now() + time.Second
		d.land(v, nil)
		time.Sleep(time.Second/2 - 1)
		compare(t, "the first half of a short life", fmt.Sprint(d.ask("short"), " ", len(d.begun)), "hit 0")
		time.Sleep(time.Nanosecond)
		compare(t, "its second half", fmt.Sprint(d.ask("short"), " ", len(d.begun)), "hit 1")
	})
}

// A reply that a report overtook goes to those who asked before the report, and to nobody else.
func TestCacheStoresNothingThatChangedInFlight(t *testing.T) {
	for _, tt := range []struct {
		what   string
		report [][]byte
	}{{"its key", [][]byte{[]byte("k")}}, {"everything", nil}} {
		d := newFlightDeck(cacheSettings{ttl: time.Hour})
		d.ask("k")
		d.forget(tt.report)
		compare(t, tt.what+": asked after the report", fmt.Sprint(d.ask("k"), " ", len(d.begun)), "flight 2")
		old := d.begun[0]
		d.land(newValue("k", []byte("old"), d.now()), nil)
		compare(t, tt.what+": the old reply is stored", old.stored, false)
		d.land(newValue("k", []byte("new"), d.now()), nil)
		compare(t, tt.what+": after both replies", d.ask("k"), "hit")
	}
}

// A flight that nobody waited for goes on if a request joins it at the last moment.
func TestCacheAbandonsOnlyWhatNobodyWaitsFor(t *testing.T) {
	d := newFlightDeck(cacheSettings{ttl: time.Hour, timeout: time.Second})
	d.decide(d.now()-d.timeout, [][]byte{[]byte("k")}, make([]answer, 1)) // it is late already
	f := d.begun[0]
	compare(t, "wanted", f.wanted(d.now()), false)
	d.ask("k")
	compare(t, "joined, abandoned", d.abandon(f, d.now()), false)
	compare(t, "joined, finished", f.finished.Load(), false)
	compare(t, "past all time-outs, abandoned", d.abandon(f, d.now()+2*d.timeout), true)
	compare(t, "its error", f.err, errTimeout)
}

// A flight that ends just when the time is over does not have the others waited for without limit.
func TestCacheWaitsNoLongerThanTheTimeout(t *testing.T) {
	for range 40 { // the end of a flight and of the time are both there: either may be seen first
		synctest.Test(t, func(t *testing.T) {
			d := newFlightDeck(cacheSettings{ttl: time.Hour, timeout: time.Second})
			d.typical.Store(1)
			keys, answers := [][]byte{[]byte("hung"), []byte("late")}, make([]answer, 2)
			d.decide(0, keys, answers)
			time.AfterFunc(d.timeout, func() { d.finish(d.begun[1], newValue("late", nil, 0), errAbsent) })
			time.AfterFunc(time.Minute, func() { d.finish(d.begun[0], value{}, errTimeout) })
			d.wait(0, keys, answers)
			compare(t, "waited", d.now(), d.timeout)
			time.Sleep(time.Minute)
		})
	}
}

// What Redis said about a key before it changed removes nothing that was stored since.
func TestCacheKeepsWhatIsNewerThanAnAbsence(t *testing.T) {
	for _, err := range []error{errAbsent, errWrongType} {
		d := newFlightDeck(cacheSettings{ttl: time.Hour})
		d.ask("k")
		d.forget([][]byte{[]byte("k")})
		d.ask("k")
		old, renewed := d.begun[0], d.begun[1]
		d.finish(renewed, newValue("k", []byte("new"), d.now()), nil)
		d.finish(old, newValue("k", nil, 0), err)
		compare(t, fmt.Sprintf("after a late %q", err), d.ask("k"), "hit")
	}
}

// The first value is typical, later ones move that, and what is not about a key that was asked for
// does not.
func TestCacheLearnsHowLargeValuesAre(t *testing.T) {
	d := newFlightDeck(cacheSettings{ttl: time.Hour})
	size := func(n int) int64 { return int64(len("k") + len(newValue("k", make([]byte, n), 0).data)) }
	land := func(n int, err error) {
		d.ask("k")
		d.land(newValue("k", make([]byte, n), d.now()), err)
		d.forget(nil)
	}
	land(0, errUnavailable)
	d.finish(&flight{key: "ready", dirty: true}, newValue("ready", nil, 0), errAbsent)
	compare(t, "before the first", d.typical.Load(), 0)
	land(1600, nil)
	compare(t, "after the first", d.typical.Load(), size(1600))
	land(3200, nil)
	compare(t, "after a larger one", d.typical.Load(), size(1600)+(size(3200)-size(1600))/16)
}

// A slowCache does what the cache promises in the plainest way: a list, the most recently used in
// front.
type slowCache struct {
	maxKeys  int
	maxBytes int64
	ttl      time.Duration
	values   []value
}

func (m *slowCache) remove(key string) {
	m.values = slices.DeleteFunc(m.values, func(v value) bool { return v.key() == key })
}

func (m *slowCache) get(now time.Duration, key string) (val string, hit bool) {
	i := slices.IndexFunc(m.values, func(v value) bool { return v.key() == key && now-v.fetched < m.ttl })
	if i < 0 {
		return "", false
	}
	v := m.values[i]
	m.values = slices.Insert(slices.Delete(m.values, i, i+1), 0, v)
	return v.content(), true
}

func (m *slowCache) put(now time.Duration, v value) (stored bool) {
	m.remove(v.key())
	size := func() (n int64) {
		for _, v := range m.values {
			n += (&entry{value: v}).size()
		}
		return n
	}
	if (&entry{value: v}).size() > m.maxBytes {
		return false
	}
	m.values = slices.Insert(m.values, 0, v)
	m.values = slices.DeleteFunc(m.values, func(v value) bool { return now-v.fetched >= m.ttl })
	for len(m.values) > m.maxKeys || size() > m.maxBytes {
		m.values = m.values[:len(m.values)-1]
	}
	return true
}

// FuzzCache compares the cache with a slowCache. Three bytes are an operation, a key and an
// argument.
func FuzzCache(f *testing.F) {
	for seed := range uint64(50) {
		ops, r := make([]byte, 600), rand.New(rand.NewPCG(seed, 0))
		for i := range ops {
			ops[i] = byte(r.Uint32())
		}
		f.Add(ops, seed%2 == 0)
	}
	f.Fuzz(func(t *testing.T, ops []byte, stale bool) {
		m := &slowCache{maxKeys: 6, maxBytes: bytesFor(5, 100), ttl: 5 * time.Second}
		c := newTestCache(m.maxKeys, m.maxBytes, m.ttl, 0)
		if stale {
			c.stale = 3 * time.Second
		}
		var now time.Duration
		for op := range slices.Chunk(ops, 3) {
			if len(op) < 3 {
				break
			}
			what, key, arg := op[0]%16, string('a'+rune(op[1]%16)), int(op[2])
			switch {
			case what < 6:
				got, hit := lookUp(c, now, key)
				want, wantHit := m.get(now, key)
				compare(t, "get "+key, fmt.Sprint(got, hit), fmt.Sprint(want, wantHit))
			case what < 13:
				val := bytes.Repeat([]byte{op[1]}, arg/2)
				if arg > 250 {
					val = make([]byte, m.maxBytes)
				}
				v := newValue(key, val, now-time.Duration(arg%4)*time.Second)
				compare(t, "put "+key, putValue(c, now, v), m.put(now, v))
			case what < 15:
				now += time.Duration(arg%4) * time.Second
			case arg > 0:
				c.drop(now, c.entries[key])
				m.remove(key)
			default:
				c.forget(nil)
				m.values = nil
			}
			checkCache(t, c)
			if t.Failed() {
				return
			}
		}
	})
}

// checkCache checks that map, lists, and counts agree with one another and with the limits.
func checkCache(t *testing.T, c *cache) {
	t.Helper()
	var used int64
	for key, e := range c.entries {
		compare(t, "key in the map", key, e.key())
		used += e.size()
	}
	compare(t, "entries in use order", c.used.Len(), len(c.entries))
	compare(t, "entries in fill order", c.filled.Len(), len(c.entries))
	compare(t, "bytes", c.bytes, used)
	if len(c.entries) > c.maxKeys || used > c.maxBytes {
		t.Errorf("got %d keys, %d bytes; want at most %d, %d", len(c.entries), used, c.maxKeys, c.maxBytes)
	}
}

// pool.go

// replies is a Redis that holds a key for each way there is to answer.
func replies(_ int, args []string) string {
	return map[string]string{
		"text":      bulk("hello"),
		"empty":     bulk(""),
		"large":     bulk(strings.Repeat("x", 2048)),
		"absent":    "$-1\r\n",
		"list":      "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
		"loading":   "-LOADING Redis is loading the dataset in memory\r\n",
		"forbidden": "-NOPERM no permissions\r\n",
		"number":    ":1\r\n",
	}[args[1]]
}

// hungUp at the end of a reply has the connection closed.
const hungUp = "hung up"

// playRedis has reply play a Redis, for connections numbered from 1, and returns the flags for it.
// PING is answered without it.
func playRedis(t testing.TB, reply func(conn int, args []string) string) (flags []string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	var conns []net.Conn
	accepting := make(chan struct{})
	go func() { // ends when l is closed
		defer close(accepting)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, nc)
			n := len(conns)
			// ends when nc is closed
			serving.Go(func() {
				playConn(nc, func(args []string) string {
					if args[0] == "PING" {
						return "+PONG\r\n"
					}
					return reply(n, args)
				})
			})
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-accepting
		for _, nc := range conns {
			nc.Close()
		}
		serving.Wait()
	})
	host, port, _ := net.SplitHostPort(l.Addr().String())
	return []string{"--redis-host", host, "--redis-port", port}
}

func playConn(nc net.Conn, reply func(args []string) string) {
	defer nc.Close()
	r := newReader(nc)
	for args := r.read(); args != nil; args = r.read() {
		s, last := strings.CutSuffix(reply(strs(args)), hungUp)
		io.WriteString(nc, s)
		if last {
			return
		}
	}
}

// askFor asks for keys without waiting.
func askFor(p *parts, keys ...string) []answer {
	answers, raw := make([]answer, len(keys)), make([][]byte, len(keys))
	for i, key := range keys {
		raw[i] = []byte(key)
	}
	p.cache.decide(p.now(), raw, answers)
	return answers
}

// outcomeOf tells what an answer turned out to be.
func outcomeOf(a answer) string {
	if a.err != nil {
		return a.err.Error()
	}
	return a.content()
}

func TestSlotAsRedisHasIt(t *testing.T) {
	for _, tt := range []struct {
		key  string
		want int
	}{
		{"", 0}, {"123456789", 0x31c3}, {"foo", 12182}, {"bar", 5061}, {"hello", 866}, {"\xff\x00", 1023},
		{"{foo}x", 12182}, {"x{foo}y", 12182}, {"{foo}{bar}", 12182}, {"x{foo", 11351},
	} {
		compare(t, tt.key, slot(tt.key), tt.want)
	}
	for _, whole := range []string{"{}foo", "foo{}{bar}", "foo{bar", "}foo{"} { // no tag: not the slot of any part
		for _, part := range []string{"", "foo", "bar", "foo{}"} {
			if slot(whole) == slot(part) {
				t.Errorf("slot of %q: got that of %q", whole, part)
			}
		}
	}
	compare(t, "braces in a tag", slot("x{{foo}}"), slot("{foo"))
}

func TestResolveWhatServersCallThemselves(t *testing.T) {
	for _, tt := range []struct{ from, host, port, want string }{
		{"h:1", "10.0.0.1", "7", "10.0.0.1:7"},
		{"h:1", "name.example", "7", "name.example:7"},
		{"h:1", "", "7", "h:7"},
		{"[::1]:1", "", "7", "[::1]:7"},
		{"h:1", "::2", "7", "[::2]:7"},
		{"h:1", "10.0.0.1", "0", "10.0.0.1:1"},
		{"h:1", "", "0", "h:1"},
		{"h:1", "h", "65535", "h:65535"},
		{"h:1", "?", "7", ""},       // unknown host
		{"h:1", "a b", "7", ""},     // blank
		{"h:1", "h", "", ""},        // no port
		{"h:1", "h", "65536", ""},   // port too large
		{"h:1", "h", "-1", ""},      // negative port
		{"h:1", "h", "7@16379", ""}, // port with the bus
	} {
		compare(t, fmt.Sprintf("%q %q from %s", tt.host, tt.port, tt.from), resolve(tt.from, tt.host+":"+tt.port),
			tt.want)
	}
}

// Where a reply sends a flight, as Redis and as a malformed one has it.
func TestPoolRedirects(t *testing.T) {
	for _, tt := range []struct{ reply, at, asking string }{ // at h:1: here again; nowhere: it ends with the reply
		{"MOVED 12182 10.0.0.1:7", "10.0.0.1:7", ""},
		{"MOVED 12182 :7", "h:7", ""},
		{"MOVED 12182 ::1:7", "[::1]:7", ""},
		{"ASK 12182 10.0.0.1:7", "10.0.0.1:7", "10.0.0.1:7"},
		{"MOVED 12182 ?:7", "h:1", ""},
		{"MOVED 12182", "h:1", ""},
		{"MOVED", "h:1", ""},
		{"ASK 12182 nowhere", "h:1", ""},
		{"CLUSTERDOWN The cluster is down", "h:1", ""},
		{"TRYAGAIN Multiple keys request during rehashing of slot", "h:1", ""},
		{"LOADING Redis is loading", "", ""},
		{"MOVEDON 1 h:7", "", ""},
		{"ERR any", "", ""},
		{"", "", ""},
	} {
		p := newParts(t)
		p.pool.close() // nothing else happens to the flight
		f := &flight{key: "foo"}
		f.until.Store(int64(time.Hour))
		p.pool.mu.Lock()
		p.pool.queueBytes = maxQueueBytes // it gets no further than that
		n := p.pool.nodeLocked("h:1")
		for i := range slots {
			p.pool.giveLocked(i, n)
		}
		p.pool.mu.Unlock()
		compare(t, tt.reply, n.redirect(f, redis.Error(tt.reply)), tt.at != "")
		p.pool.mu.Lock()
		compare(t, tt.reply, p.pool.routeLocked(f).addr, cmp.Or(tt.at, "h:1"))
		p.pool.mu.Unlock()
		compare(t, tt.reply, f.asking, tt.asking)
	}
}

func TestPoolFetchesEachKeyOnce(t *testing.T) {
	var fetches atomic.Int64
	release := make(chan struct{})
	p := newParts(t, playRedis(t, func(int, []string) string {
		fetches.Add(1)
		<-release
		return bulk("hello")
	})...)
	var asked, done sync.WaitGroup
	var sources [fromStale]atomic.Int64
	for range 100 {
		asked.Add(1)
		done.Go(func() {
			answers := askFor(p, "key")
			asked.Done()
			p.wait(answers)
			compare(t, "answer", outcomeOf(answers[0]), "hello")
			sources[answers[0].source].Add(1)
		})
	}
	asked.Wait()
	close(release)
	done.Wait()
	compare(t, "fetches", fetches.Load(), 1)
	compare(t, "answers from Redis, from another's fetch",
		fmt.Sprint(sources[fromRedis].Load(), sources[fromAnother].Load()), "1 99")
}

func TestPoolSendsWhatWaitsTogether(t *testing.T) {
	const n = 200
	begun, release := make(chan struct{}), make(chan struct{})
	var held strings.Builder
	seen := 0
	p := newParts(t, append(playRedis(t, func(_ int, args []string) string {
		if args[1] == "first" {
			close(begun)
			<-release
			return bulk("first")
		}
		held.WriteString(bulk(args[1]))
		if seen++; seen < n {
			return "" // no reply before all have been asked for
		}
		return held.String()
	}), "--client-limit", "1")...)
	first := askFor(p, "first")
	<-begun
	var answers []answer
	for i := range n {
		answers = append(answers, askFor(p, strconv.Itoa(i))...)
	}
	close(release)
	p.wait(first)
	p.wait(answers)
	compare(t, "first", outcomeOf(first[0]), "first")
	for i, a := range answers {
		compare(t, "answer", outcomeOf(a), strconv.Itoa(i))
	}
	eventually(t, "both batches are counted", func() bool {
		return p.pool.flights.Load() == n+1 && p.pool.batches.Load() == 2
	})
	p.pool.mu.Lock()
	compare(t, "queued at the end", p.pool.queueBytes, 0)
	p.pool.mu.Unlock()
}

// A batch brings few values if they were large lately.
func TestPoolSendsFewLargeValuesTogether(t *testing.T) {
	const n = 8
	begun, release := make(chan struct{}), make(chan struct{})
	p := newParts(t, append(playRedis(t, func(_ int, args []string) string {
		if args[1] == "first" {
			close(begun)
			<-release
		}
		return bulk(strings.Repeat("v", batchBytes/2))
	}), "--client-limit", "1")...)
	answers := askFor(p, "first")
	<-begun
	for i := range n {
		answers = append(answers, askFor(p, strconv.Itoa(i))...)
	}
	p.cache.typical.Store(batchBytes / 2)
	close(release)
	p.wait(answers)
	eventually(t, "batches of one or two", func() bool {
		return p.pool.flights.Load() == n+1 && p.pool.batches.Load() > n/2
	})
}

func TestPoolRefusesWhatIsNoReplyToGet(t *testing.T) {
	for defect, reply := range map[string]string{
		"integer":                  ":1\r\n",
		"status":                   "+OK\r\n",
		"array":                    "*1\r\n$1\r\na\r\n",
		"null of RESP3":            "_\r\n",
		"no reply at all":          "hello\r\n",
		"nothing":                  hungUp,
		"value cut short":          "$5\r\nab" + hungUp,
		"value without end":        "$1\r\nabc" + hungUp,
		"length beyond all memory": "$1000000000000000\r\n",
		"length not a number":      "$x\r\n",
		"empty line":               "\r\n",
		"line feed alone":          "$5\nhello\r\n",
	} {
		sick := atomic.Bool{}
		sick.Store(true)
		p := newParts(t, playRedis(t, func(n int, args []string) string {
			if sick.Load() {
				return reply
			}
			return replies(n, args)
		})...)
		answers := askFor(p, "key")
		p.wait(answers)
		compare(t, defect, answers[0].err, errUnavailable)
		sick.Store(false)
		answers = askFor(p, "text")
		p.wait(answers)
		compare(t, "next answer after "+defect, outcomeOf(answers[0]), "hello")
	}
}

// What comes behind the reply to a login is not taken for the reply to the first GET.
func TestPoolRefusesWhatIsLeftOfTheLogin(t *testing.T) {
	flags := playRedis(t, func(_ int, args []string) string {
		if args[0] == "AUTH" {
			return "+OK\r\n" + bulk("of nobody")
		}
		return bulk("of " + args[1])
	})
	url := "redis://:password@" + net.JoinHostPort(flags[1], flags[3])
	p := newParts(t, append(flags, "--redis-url", url, "--redis-timeout", "3s")...)
	compare(t, "answer", outcomeOf(p.get("key")), errUnavailable.Error())
}

// A node that is not tracked any more leaves nothing in the cache, whether it was an owner or only
// named by ASK.
func TestPoolForgetsWhatIsNoLongerTracked(t *testing.T) {
	for i := range 4 {
		tracked, master := i%2 > 0, i/2 > 0
		p := newParts(t)
		cacheNow(p, "k", "from there")
		p.pool.mu.Lock()
		n := p.pool.nodeLocked("h:1")
		n.tracked.Store(tracked)
		n.master, n.named = master, time.Now().Add(-2*clusterTick)
		p.pool.mu.Unlock()
		p.pool.settle()
		compare(t, fmt.Sprint("node left, tracked ", tracked), p.pool.nodes["h:1"] == nil, true)
		_, kept := lookUp(p.cache, p.now(), "k")
		compare(t, fmt.Sprint("kept, tracked ", tracked), kept, !tracked)
	}
}

func TestPoolStoresALateReply(t *testing.T) {
	release := make(chan struct{})
	p := newParts(t, append(playRedis(t, func(int, []string) string { <-release; return bulk("late") }),
		"--redis-timeout", "500ms")...)
	answers := askFor(p, "key")
	p.wait(answers)
	compare(t, "answer in time", answers[0].err, errTimeout)
	close(release)
	p.cache.await(answers[0].flight, nil)
	a := p.get("key")
	compare(t, "answer", outcomeOf(a), "late")
	compare(t, "source", a.source, fromCache)
}

func TestPoolStoresNothingThatWasSuperseded(t *testing.T) {
	var fetches atomic.Int64
	begun, release := make(chan struct{}), make(chan struct{})
	p := newParts(t, playRedis(t, func(int, []string) string {
		if fetches.Add(1) > 1 {
			return bulk("new")
		}
		close(begun)
		<-release
		return bulk("old")
	})...)
	keys, old, renewed := [][]byte{[]byte("key")}, askFor(p, "key"), make([]answer, 1)
	<-begun
	p.cache.mu.Lock()
	old[0].flight.began -= p.cfg.pool.timeout // nobody joins the first any more
	p.cache.mu.Unlock()
	p.cache.decide(p.now(), keys, renewed)
	p.wait(renewed)
	compare(t, "second answer", outcomeOf(renewed[0]), "new")
	close(release)
	p.wait(old)
	compare(t, "first answer", outcomeOf(old[0]), "old")
	compare(t, "stored", old[0].flight.stored, false)
	compare(t, "in the cache", outcomeOf(p.get("key")), "new")
}

// The second connection is not one that may have died with the first.
func TestPoolRetriesOnAFreshConnection(t *testing.T) {
	slow, down := make(chan struct{}), make(chan struct{})
	asked := sync.OnceFunc(func() { close(slow) })
	p := newParts(t, playRedis(t, func(conn int, args []string) string {
		switch {
		case conn > 2: // Redis has been restarted
		case args[1] == "slow":
			asked()
			<-down
			return hungUp
		case args[1] == "last":
			return hungUp
		}
		return bulk("value")
	})...)
	first := askFor(p, "slow")
	<-slow
	fast := askFor(p, "fast") // on a connection that is put back later than the first one began
	p.wait(fast)
	compare(t, "meanwhile", outcomeOf(fast[0]), "value")
	close(down)
	p.wait(first)
	compare(t, "after the restart", outcomeOf(first[0]), "value")
}

// A connection that cannot be made says nothing of those that are there, and one that is being made
// keeps nobody from those that are free.
func TestPoolKeepsIdleConnectionsWhenOneCannotBeMade(t *testing.T) {
	held, dialled, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
	flags := playRedis(t, func(conn int, args []string) string {
		switch {
		case args[0] == "AUTH" && conn > 1:
			if conn == 2 {
				close(dialled)
			}
			return "" // and the connection is never made
		case args[0] == "AUTH":
			return "+OK\r\n"
		case args[1] == "held":
			close(held)
			<-release
		}
		return bulk("value")
	})
	url := "redis://:password@" + net.JoinHostPort(flags[1], flags[3])
	p := newParts(t, append(flags, "--redis-url", url, "--redis-timeout", "500ms", "--client-limit", "2")...)
	first := askFor(p, "held")
	<-held
	second := askFor(p, "x")
	<-dialled
	close(release)
	p.wait(first)
	p.wait(second)
	compare(t, "queued for the one that is being made", outcomeOf(second[0]), "value")
	compare(t, "by the one that is idle", outcomeOf(p.get("after")), outcomeOf(first[0]))
}

// An expiry that is centuries away is none for the cache.
func TestPoolBoundsAnExpiry(t *testing.T) {
	p := newParts(t, append(playRedis(t, func(_ int, args []string) string {
		if args[0] == "PTTL" {
			return ":253402300799000\r\n"
		}
		return bulk("value")
	}), "--redis-ttl", "--cache-timeout", "1h")...)
	a := p.get("k")
	compare(t, "life", a.expires-a.fetched, time.Hour)
}

// A batch is not sent again when those who asked have long gone.
func TestPoolDoesNotRetryForNobody(t *testing.T) {
	var fetches atomic.Int64
	begun, hangUp := make(chan struct{}), make(chan struct{})
	p := newParts(t, playRedis(t, func(int, []string) string {
		if fetches.Add(1) == 1 {
			close(begun)
		}
		<-hangUp
		return hungUp
	})...)
	f := askFor(p, "key")[0].flight
	<-begun
	f.until.Store(int64(p.now()))
	close(hangUp)
	p.cache.await(f, nil)
	compare(t, "GETs", fetches.Load(), 1)
}

// What nobody waits for any more when a connection is free is neither sent nor remembered.
func TestPoolForgetsWhatNobodyWaitsFor(t *testing.T) {
	var fetches atomic.Int64
	begun, release := make(chan struct{}), make(chan struct{})
	p := newParts(t, append(playRedis(t, func(int, []string) string {
		if fetches.Add(1) == 1 {
			close(begun)
			<-release
		}
		return bulk("value")
	}), "--client-limit", "1", "--redis-timeout", "500ms")...)
	p.cache.decide(p.now()+time.Hour, [][]byte{[]byte("first")}, make([]answer, 1))
	<-begun
	p.wait(askFor(p, "a", "b", "c"))
	close(release)
	eventually(t, "no flight is left", func() bool {
		p.cache.mu.Lock()
		defer p.cache.mu.Unlock()
		return len(p.cache.flights) == 0
	})
	compare(t, "GETs", fetches.Load(), 1)
}

// A dial that began while Redis was down does not fail those who ask when it is back.
func TestPoolHasNoErrorAfterTheFirstSuccess(t *testing.T) {
	p := newParts(t, playRedis(t, func(int, []string) string { return bulk("value") })...)
	dial, dialling, refuse := p.pool.routeLocked(new(flight)).conns.Dial, make(chan struct{}), make(chan struct{})
	var dials atomic.Int64
	p.pool.routeLocked(new(flight)).conns.Dial = func() (redis.Conn, error) {
		if dials.Add(1) > 1 {
			return dial()
		}
		close(dialling)
		<-refuse
		return nil, errors.New("down")
	}
	asked := askFor(p, "key")
	<-dialling
	p.pool.routeLocked(new(flight)).answers() // over another connection
	close(refuse)
	p.wait(asked)
	compare(t, "answer", outcomeOf(asked[0]), "value")
}

// An outage is as long as from the first refusal.
func TestPoolNotesWhenRefusalsBegan(t *testing.T) {
	p := newParts(t)
	n := p.pool.routeLocked(new(flight))
	n.warned.Store(0)
	n.refuses("ERR any")
	compare(t, "down after an error of another kind", n.down(), false)
	n.refuses("LOADING any")
	first := n.warned.Load()
	compare(t, "down", n.down(), true)
	n.refuses("CLUSTERDOWN any")
	compare(t, "when it began", n.warned.Load(), first)
	n.answers()
	compare(t, "down after an answer", n.down(), false)
}

// What is too much is refused at once: nobody waits for it.
func TestPoolBoundsWhatWaits(t *testing.T) {
	p := newParts(t)
	p.pool.routeLocked(new(flight)).busy = p.pool.limit // no connection is free
	refused := func(key string) bool { return askFor(p, key)[0].flight.finished.Load() }
	for i := range maxQueue - 1 {
		askFor(p, fmt.Sprint(i))
	}
	compare(t, "the last that fits: refused", refused("last"), false)
	compare(t, "one too many: refused", refused("x"), true)
	compare(t, "one too many", outcomeOf(p.get("x")), errTimeout.Error())
	p.pool.mu.Lock()
	p.pool.nodeLocked("h:1").busy = p.pool.limit
	p.pool.mu.Unlock()
	elsewhere := &flight{key: "x", asking: "h:1"}
	p.pool.enqueue([]*flight{elsewhere})
	compare(t, "one for another node: refused", elsewhere.finished.Load(), false)
	p.pool.routeLocked(new(flight)).queue, p.pool.queueBytes = nil, maxQueueBytes-5
	compare(t, "keys too large: refused", refused("longer"), true)
	compare(t, "keys too large", outcomeOf(p.get("longer")), errTimeout.Error())
	compare(t, "the last bytes: refused", refused("bytes"), false)
	compare(t, "a byte too many: refused", refused("y"), true)
	p.pool.routeLocked(new(flight)).queue, p.pool.queueBytes = nil, 0
}

func TestRefusedMarksWhatConcernsTheProxy(t *testing.T) {
	for in, want := range map[redis.Error]replyError{
		"WRONGTYPE Operation":             "WRONGTYPE Operation",
		"LOADING Redis is":                "LOADING Redis is",
		"ERR any":                         "ERR any",
		"NOAUTHORITY":                     "NOAUTHORITY",
		"NOAUTH Authentication required.": "ERR upstream refused: NOAUTH Authentication required.",
		"NOPERM this user":                "ERR upstream refused: NOPERM this user",
		"WRONGPASS invalid":               "ERR upstream refused: WRONGPASS invalid",
	} {
		compare(t, string(in), asAnswer(in, true), error(want))
	}
}

func TestCacheAsksForFewLargeValuesAhead(t *testing.T) {
	const many = 1000
	keys, answers := make([][]byte, many), make([]answer, many)
	for typical, want := range map[int64]int{0: 1, 1: many, 512: many, 64 << 10: aheadBytes / (64 << 10), 1 << 20: 1} {
		for i := range keys {
			keys[i] = fmt.Append(nil, typical, i)
		}
		p := newParts(t)
		p.cache.typical.Store(typical)
		n := p.cache.decide(p.now(), keys, answers)
		compare(t, fmt.Sprint("typically ", typical, " bytes"), n, want)
	}
	p := newParts(t)
	large := strings.Repeat("v", aheadBytes/2)
	for i := range keys {
		keys[i] = fmt.Append(nil, "hit", i)
		cacheNow(p, string(keys[i]), large)
	}
	n := p.cache.decide(p.now(), keys, answers)
	compare(t, "hits that fill the bound", n, 1)
}

// Benchmarks

// filledCache holds n entries of 16-byte keys and 40-byte values.
func filledCache(n int) (*cache, [][]byte) {
	c := newTestCache(n, 1<<40, time.Hour, 0)
	keys := make([][]byte, n)
	for i := range keys {
		keys[i] = fmt.Appendf(nil, "key:%012d", i)
		putValue(c, 0, newValue(string(keys[i]), make([]byte, 40), 0))
	}
	rand.Shuffle(n, func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	return c, keys
}

func BenchmarkCacheGet(b *testing.B) {
	for _, n := range []int{1e3, 1e4, 1e5, 1e6} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			c, keys := filledCache(n)
			var answers [1]answer
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				c.get(0, keys[i%n:i%n+1], answers[:])
			}
		})
	}
}

func BenchmarkCacheGetParallel(b *testing.B) {
	c, keys := filledCache(1e4)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		var answers [1]answer
		for i := rand.IntN(len(keys)); pb.Next(); i++ {
			at := i % len(keys)
			c.get(0, keys[at:at+1], answers[:])
		}
	})
}

func BenchmarkCachePut(b *testing.B) {
	for name, keys := range map[string]int{"refill": 1e4, "evict": 2e4} {
		b.Run(name, func(b *testing.B) {
			c, _ := filledCache(1e4)
			val := make([]byte, 40)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				putValue(c, 0, newValue(fmt.Sprintf("key:%012d", i%keys), val, 0))
			}
		})
	}
}

// BenchmarkCacheMemory measures what entryOverhead states.
func BenchmarkCacheMemory(b *testing.B) {
	const n, data = 1_000_000, len("key:000000000000") + len("$40\r\n\r\n") + 40
	var overhead float64
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		c, keys := filledCache(n)
		clear(keys)
		runtime.GC()
		runtime.ReadMemStats(&after)
		overhead = float64(after.HeapAlloc-before.HeapAlloc-uint64(cap(keys))*24)/n - float64(data)
		runtime.KeepAlive(c)
		runtime.KeepAlive(keys)
	}
	b.ReportMetric(overhead, "bytes/entry")
	b.ReportMetric(0, "ns/op")
}

func BenchmarkReader(b *testing.B) {
	in := strings.NewReader(strings.Repeat(request("GET", "key:000000000000"), 16))
	r := newReader(in)
	b.ReportAllocs()
	b.SetBytes(in.Size())
	for b.Loop() {
		in.Seek(0, io.SeekStart)
		n := 0
		for r.err = nil; r.read() != nil; n++ {
		}
		if n != 16 {
			b.Fatalf("got %d requests, %v; want 16", n, r.err)
		}
	}
}

// requests are what clients, proxies and attackers send; each is also tried with another behind it.
var httpRequests = []string{
	"GET /k HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n",
	"GET /absent HTTP/1.1\r\nHost: h\r\n\r\n", "GET /list HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /binary HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /empty HTTP/1.1\r\nHost: h\r\n\r\n", "GET /large HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
	"HEAD /k HTTP/1.1\r\nHost: h\r\n\r\n", "POST /k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
	"get /k HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.0\r\n\r\n", "GET /k HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
	"GET /k HTTP/1.2\r\nHost: h\r\n\r\n", "GET /k HTTP/1.1 \r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.1\nHost: h\n\n", "GET /k HTTP/1.1\r\nHost: h\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\n\n",
	"GET /k HTTP/1.1\rHost: h\r\n\r\n", "GET /k HTTP/1.1\r\r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.1\r\n\r\n", "GET /k HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "GET /k HTTP/1.1\r\nHost: a b\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost:\r\n\r\n", "GET /k HTTP/1.1\r\nHost: \r\n\r\n",
	"GET /k HTTP/1.1\r\nHost : h\r\n\r\n", "GET /k HTTP/1.1\r\n Host: h\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\nAccept: a\r\n folded\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAccept\r\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAccept:x\r\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\nAccept: \x00\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nCookie: \xff\r\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\nCookie: a\tb\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nX\x00: a\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nContent-Length: 30\r\n\r\nGET /binary HTTP/1.1\r\nHost: h\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n" +
		"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nRange: bytes=0-0\r\n\r\n", "GET /k HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer x\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer secret\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAUTHORIZATION: Bearer secret\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer x\r\nAuthorization: Bearer secret\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nAuthorization:\r\nAuthorization: Bearer secret\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nIf-None-Match: " + tagOfK + "\r\nIf-None-Match: \"x\"\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\nIf-None-Match:\r\nIf-None-Match: " + tagOfK + "\r\n\r\n",
	"GET /%6b HTTP/1.1\r\nHost: h\r\n\r\n", "GET /%zz HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k?q HTTP/1.1\r\nHost: h\r\n\r\n", "GET /k#f HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET //k HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /../k HTTP/1.1\r\nHost: h\r\n\r\n", "GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /a\\b HTTP/1.1\r\nHost: h\r\n\r\n", "GET /[k]{} HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k:1@x;y=z,(!)*'$&~ HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET http://other/k HTTP/1.1\r\nHost: h\r\n\r\n", "GET * HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET k HTTP/1.1\r\nHost: h\r\n\r\n", "CONNECT /k HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET  /k HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h", "GET /k HTTP/1.1\r\nHost: h\r\n", "GET /\xc3\xbc HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /k HTTP/1.1\r\nHOST: h\r\nACCEPT: a\r\n\r\n",
	"GET /k HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("Accept: a\r\n", 300) + "\r\n",
	"GET /" + strings.Repeat("k", 5000) + " HTTP/1.1\r\nHost: h\r\n\r\n",
}

// nearly are the parts of requests that are nearly ordinary, each in a list: the most usual ones
// are repeated.
var nearly = struct{ method, target, version, end, name, colon, value, blank []string }{
	method: []string{"GET", "GET", "GET", "GET", "HEAD", "HEAD", "OPTIONS", "POST", "PRI", "get", "GE\x00T", ""},
	target: []string{"/k", "/k", "/k", "/%6b", "/%6B%", "/%2Fk", "//k", "/large", "/medium", "/empty", "/binary",
		"/absent", "/k?", "/k?x=%zz", "/?k", "/%zz",
		"/%6", "/%", "/%%6b", "/%00", "/\xc3\xbc", "/\xff", "/k\x7f", "/\"<>\\^`{|}", "/k#f", "/a b", "/k\t", "/../k",
		"*", "k", "", "http://h/k", "http://h", "http://h?k", "http:k", "http:///k"},
	version: []string{"HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.0", "HTTP/1.2",
		"HTTP/0.9", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", "HTTP/1.10", ""},
	end: append(slices.Repeat([]string{"\r\n"}, 40), "\n", "\r\r\n", " \r\n", "\r", "\r\n ", "\r\n\t"),
	name: []string{"Host", "Host", "Host", "host", "HOST", "Host ", "Connection", "connection", "Authorization",
		"If-None-Match", "IF-NONE-MATCH", "Cookie", "X-Forwarded-For",
		"Coo\xe2\x84\xaaie", "U\xc5\xbfer-Agent", "\xe2\x84\xaa", "ho\xc5\xbft", "Range", "If-Range", "If-Match",
		"If-Modified-Since", "If-Unmodified-Since", "Content-Length",
		"Transfer-Encoding", "Upgrade", "Expect", "TE", "Trailer", "HTTP2-Settings", "Keep-Alive", "Proxy-Connection",
		"Pragma", "", " ", "X Y", "X\t", "\tX", "(x)", "x\x00", "X\xff",
		"!#$%&'*+-.^_`|~", strings.Repeat("x", 25), "if-unmodified-sincex", "Content_Length", "Content-Length\x0b"},
	colon: []string{": ", ": ", ": ", ": ", ":", ":  ", ":\t", " :", "", "::"},
	value: []string{"h", "h", "h:80", "[::1]:80", "", " ", "\t", "a b", "a\tb", "h\t", "a\x00b", "a\x7f", "\xff", "h#",
		"h^", "keep-alive", "keep-alive", "Keep-Alive", "KEEP-ALIVE",
		"\xe2\x84\xaaeep-alive", "close", "x, CLOSE", "keep-alive, close", "Upgrade", "*", "\"x\"", "Bearer secret",
		"bearer  secret", "Bearer wrong", "Basic OnNlY3JldA==", "BASIC eDpzZWNyZXQ=",
		"Basic x", "Basic", "0", "5", "+0", "chunked", "bytes=0-0", "bytes=-0", "lines=0-1", "100-continue", "x",
		"trailers", "h2c", "gzip, deflate, br", strings.Repeat("x", 3000),
		tagOfK, "W/" + tagOfK, "\"x\", " + tagOfK, ",," + tagOfK + " ,", tagOfK[1:], "\"x, " + tagOfK, "x" + tagOfK},
	blank: []string{"", "", "", "", "", "", "", "", "\r\n", "\n", "\r\n\r\n", "\r"},
}

const tagOfK = `"cd42404d52ad55ccfa9aca4adc828aa5"`

// nearlyOrdinary makes requests of choices, one a byte. The empty lines before them are left out of
// plain.
func nearlyOrdinary(choices []byte) (sent, plain string) {
	pick := func(from []string) string {
		if len(choices) == 0 {
			return from[0]
		}
		i := int(choices[0])
		choices = choices[1:]
		return from[i%len(from)]
	}
	for ordinary := true; len(choices) > 0; {
		blank := pick(nearly.blank)
		r := pick(nearly.method) + " " + pick(nearly.target) + " " + pick(nearly.version) + pick(nearly.end) +
			"Host: h" + pick(nearly.end)
		for range int(pick([]string{"\x00", "\x01", "\x02", "\x03"})[0]) {
			r += pick(nearly.name) + pick(nearly.colon) + pick(nearly.value) + pick(nearly.end)
		}
		r += pick(nearly.end)
		if plain += r; !ordinary || blank == "\r" { // net/http skips none
			blank = ""
		}
		sent += blank + r
		_, size := parse([]byte(r))
		ordinary = ordinary && size == len(r)
	}
	const last = "GET /k HTTP/1.1\r\nHost: h\r\n\r\n"
	return sent + last, plain + last
}

// A scripted is a connection of which the other side is written down: it sends pieces and ends, and
// takes all.
type scripted struct {
	net.Conn
	mu     sync.Mutex
	pieces [][]byte
	got    bytes.Buffer
	once   sync.Once
	closed chan struct{}
}

func (s *scripted) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.pieces[0])
	if s.pieces[0] = s.pieces[0][n:]; len(s.pieces[0]) == 0 {
		s.pieces = s.pieces[1:]
	}
	return n, nil
}

func (s *scripted) Write(p []byte) (int, error)      { return s.got.Write(p) }
func (s *scripted) Close() error                     { s.once.Do(func() { close(s.closed) }); return nil }
func (s *scripted) CloseWrite() error                { return nil }
func (s *scripted) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (s *scripted) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *scripted) SetReadDeadline(time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }

// Whatever is sent, in whatever pieces, the quick way and net/http answer alike: there is nothing
// that one takes for a request and the other for something else. Input that begins with a byte of
// 0xff chooses from the lists.
func FuzzQuickAnswersAsNetHTTP(f *testing.F) {
	for _, r := range httpRequests {
		f.Add([]byte(r))
		f.Add([]byte(r + httpRequests[0]))
		f.Add([]byte(httpRequests[0] + r))
	}
	for i := range byte(60) { // a choice of each list
		f.Add([]byte{0xff, 0, i, 0, 0, 0, 0, 0, 0, 0, i, 0, 0, 0, 0})
		f.Add([]byte{0xff, i, 0, i, i, 0, 0, 2, 0, 0, i, 0, i, i, 0, 0, 0})
		f.Add([]byte{0xff, 0, 0, 0, 0, 0, i, 1, i, 0, 0, 0, 0, i, i, i})
	}
	open, closed := newParts(f, "--cache-timeout", "24h"), newParts(f, "--cache-timeout", "24h", "--password", "secret")
	for _, p := range []*parts{open, closed} {
		for key, val := range map[string]string{"k": "value", "/k": "another", "empty": "", "binary": "\xff\x00",
			"medium": strings.Repeat("x", flushAt-100), "large": strings.Repeat("x", 3*flushAt)} {
			cacheNow(p, key, val)
		}
		f.Cleanup(func() { p.web.shutdown(context.Background()) })
	}
	clock := regexp.MustCompile(`Date: [^\r]*|Age: \d+|ttl=\d+`)
	ask := func(front frontEnd, pieces ...[]byte) []string {
		s := &scripted{pieces: pieces, closed: make(chan struct{})}
		front.serve(newConn(s, serverSettings{idleTimeout: time.Hour}))
		<-s.closed
		return sortHeaders(clock.ReplaceAllString(s.got.String(), "now"))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		sent, plain := string(in), string(in)
		if len(in) > 0 && in[0] == 0xff {
			sent, plain = nearlyOrdinary(in[1:min(len(in), 200)])
		}
		if proto, ok := protocolOf([]byte(sent)); !ok || proto != protoHTTP || strings.HasPrefix(plain, "PRI ") {
			t.Skip()
		}
		for _, p := range []*parts{open, closed} {
			want := ask(byNetHTTP{p.web}, []byte(plain))
			half := 1 + int(in[len(in)-1])%(len(sent)-1)
			for how, pieces := range map[string][][]byte{"whole": {[]byte(sent)},
				"halves": {[]byte(sent)[:half], []byte(sent)[half:]},
				"bytes":  slices.Collect(slices.Chunk([]byte(sent), 1))} {
				if got := ask(p.web, pieces...); !slices.Equal(got, want) {
					t.Fatalf("after %.500q (%s):\n    quick %.800q\nnet/http %.800q", sent, how, got, want)
				}
			}
		}
	})
}

// byNetHTTP is a web without its quick way.
type byNetHTTP struct{ *web }

func (w byNetHTTP) serve(c *conn) { w.handOver(c, &counted{conn: c}) }

// sortHeaders splits what came back into header blocks with sorted lines, and what is between them.
func sortHeaders(s string) (parts []string) {
	for part := range strings.SplitSeq(s, "\r\n\r\n") {
		if i := strings.Index(part, "HTTP/1."); i >= 0 {
			lines := strings.Split(part[i:], "\r\n")
			slices.Sort(lines[1:])
			part = part[:i] + strings.Join(lines, "\r\n")
		}
		parts = append(parts, part)
	}
	return parts
}
