// RESP: reading commands, the command table, writing replies, in RESP2 and RESP3.
//
// What a client sends is answered as Redis 7 answers it, to the byte, errors included (networking.c,
// server.c). Commands are parsed in place: their arguments are parts of the read buffer, and hold until
// more is read. The GETs of a pipeline are asked for together, before the first reply is written.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// readBuffer is what a connection has to read into, and pipelineBuffer while it sends more than that. One
	// whose requests wait for Redis has wideBuffer, so that they wait together. A request that does not fit
	// gets as much as it needs. What is over pipelineBuffer counts against the budget of requests.
	readBuffer     = 2 << 10
	pipelineBuffer = 16 << 10
	wideBuffer     = 256 << 10
	// maxRequest bounds a request: all its arguments and their framing. argSize is what an argument costs
	// beside its bytes.
	maxRequest = 64 << 20
	argSize    = 40
	// requestTime is how long a client may take for a request, and a second more for each MB of it.
	requestTime = 10 * time.Second
	// maxInline bounds a line: an inline request, a count or a length (PROTO_INLINE_MAX_SIZE).
	maxInline = 64 << 10
	// maxAhead bounds the keys that a client asks for before it waits.
	maxAhead = 1 << 14
	// answerSize is what an answer costs that has no value.
	answerSize = 96
	// maxWord is longer than any word that means something.
	maxWord = 64
	// maxName bounds what a client says about itself. Redis has no such bound.
	maxName = 4 << 10
	// redisVersion is the Redis whose answers these are.
	redisVersion = "7.0.15"
)

// A protocolError is answered, and then hung up on.
type protocolError string

func (e protocolError) Error() string { return "Protocol error: " + string(e) }

const (
	errTooLarge = protocolError("request larger than 64 MB")
	errTooMuch  = protocolError("too much of all clients' requests is unanswered")
)

// A reader splits what a client sends into requests.
type reader struct {
	src    io.Reader
	buf    []byte // what has been read and not consumed is buf[start:end]
	start  int    // of the current request
	end    int
	next   int  // where parsing goes on, from start
	need   int  // how long the current request is at least, where it says so; or 0
	last   int  // how much was read since a read last left room in buf
	left   int  // arguments still to come; 0 between requests
	strict bool // the client has not authenticated
	wide   bool // the client's requests wait for Redis
	broken error
	spans  []span
	args   [][]byte
	budget *budget
	held   int // of the budget
	queued int // bytes of the transaction that the client has begun
}

// A span is where an argument lies, from the start of its request.
type span struct{ from, to int32 }

// fill reads once. What read has returned is invalid afterwards.
func (r *reader) fill() error {
	rest, size, full := r.buf[r.start:r.end], len(r.buf), r.end == len(r.buf)
	switch {
	case full && size < pipelineBuffer:
		size = pipelineBuffer // more is coming
	case full && len(rest) == size:
		size = max(size+min(size, wideBuffer+size/4), min(r.need, 2*size+readBuffer))
	case full && r.wide && size <= wideBuffer:
		size = min(4*size, wideBuffer)
	case len(rest) <= readBuffer/2 && (r.last < readBuffer || size > pipelineBuffer):
		size = readBuffer
	}
	if size != len(r.buf) || cap(r.args) > pipelineBuffer/argSize {
		r.args = nil // it has parts of the old buffer
		if r.left == 0 {
			r.spans = nil
		}
	}
	if !r.grant(size, len(r.spans)) {
		if len(rest) == len(r.buf) {
			r.broken = errTooMuch
			return nil
		}
		size = len(r.buf)
	}
	if size != len(r.buf) {
		r.buf = make([]byte, size)
		copy(r.buf, rest)
	} else if r.start > 0 {
		copy(r.buf, rest)
	}
	r.start, r.end, r.need = 0, len(rest), 0
	if !full {
		r.last = 0
	}
	n, err := r.src.Read(r.buf[r.end:])
	r.end, r.last = r.end+n, r.last+n
	if n > 0 {
		return nil
	}
	return err
}

// grant counts a buffer and so many arguments against the budget, and reports whether there is room for them.
func (r *reader) grant(size, args int) bool {
	held := max(0, size+args*argSize+r.queued-pipelineBuffer)
	switch {
	case held > r.held && r.budget.hold("", held-r.held) != nil:
		return false
	case held < r.held:
		r.budget.release("", r.held-held)
	}
	r.held = held
	return true
}

// read returns the next request's arguments, or none if more must be read first.
func (r *reader) read() ([][]byte, error) {
	for r.start < r.end && r.broken == nil {
		if r.left == 0 && r.buf[r.start] != '*' {
			if ok, err := r.readInline(); !ok || err != nil {
				return nil, err
			}
			if !r.grant(len(r.buf), 2*len(r.args)) {
				return nil, errTooMuch
			}
			if len(r.args) > 0 {
				return r.args, nil
			}
			continue
		}
		if r.left == 0 {
			n, ok, err := r.readLength('*', "mbulk count string", "multibulk length")
			if !ok || err != nil {
				return nil, err
			}
			if n <= 0 {
				r.consume()
				continue
			}
			if n > 10 && r.strict {
				return nil, protocolError("unauthenticated multibulk length")
			}
			if n > maxRequest/len("$0\r\n\r\n") {
				return nil, errTooLarge
			}
			r.left, r.spans = n, r.spans[:0]
		}
		for r.left > 0 {
			if ok, err := r.readBulk(); !ok || err != nil {
				return nil, err
			}
		}
		if !r.grant(len(r.buf), len(r.spans)) {
			return nil, errTooMuch
		}
		r.args = slices.Grow(r.args[:0], len(r.spans))
		for _, s := range r.spans {
			from, to := r.start+int(s.from), r.start+int(s.to)
			r.args = append(r.args, r.buf[from:to:to])
		}
		r.consume()
		return r.args, nil
	}
	return nil, r.broken
}

// readGet returns the key if the next request is a whole GET of a common form; read takes all others.
func (r *reader) readGet() (key []byte, ok bool) {
	const head = "*2\r\n$3\r\nGET\r\n$"
	b := r.buf[r.start:r.end]
	if r.strict || r.left > 0 || len(b) <= len(head) || string(b[:8]) != head[:8] || !isGet(b[8:11]) || string(b[11:len(head)]) != head[11:] {
		return nil, false
	}
	i, n := len(head), 0
	for ; i < len(b) && n < 1000 && '0' <= b[i] && b[i] <= '9'; i++ {
		n = n*10 + int(b[i]-'0')
	}
	if b[len(head)] <= '0' || i+2+n+2 > len(b) || b[i] != '\r' {
		return nil, false
	}
	key = b[i+2 : i+2+n]
	r.start += i + 2 + n + 2
	return key, true
}

// consume goes on after what has been parsed.
func (r *reader) consume() { r.start, r.next = r.start+r.next, 0 }

// readBulk parses one argument.
func (r *reader) readBulk() (ok bool, err error) {
	header := r.next
	n, ok, err := r.readLength('$', "bulk count string", "bulk length")
	if !ok || err != nil {
		return false, err
	}
	if n < 0 || n > 512<<20 {
		return false, protocolError("invalid bulk length")
	}
	if r.next+n > maxRequest {
		return false, errTooLarge
	}
	if n > 16384 && r.strict {
		return false, protocolError("unauthenticated bulk length")
	}
	if r.start+r.next+n+2 > r.end {
		r.next, r.need = header, r.next+n+2 // the length is parsed again when more has come
		return false, nil
	}
	r.spans = append(r.spans, span{int32(r.next), int32(r.next + n)})
	r.next += n + 2 // whatever the terminator is: Redis does not look either
	r.left--
	return true, nil
}

// readLength parses a line of a marker and a number; a negative one is -1.
func (r *reader) readLength(marker byte, line, number string) (n int, ok bool, err error) {
	rest := r.buf[r.start+r.next : r.end]
	cr := lineEnd(rest, '\r')
	if cr > maxInline || cr < 0 && len(rest) > maxInline {
		return 0, false, protocolError("too big " + line)
	}
	if cr < 0 || cr+2 > len(rest) {
		return 0, false, nil
	}
	if rest[0] != marker {
		return 0, false, protocolError("expected '$', got '" + strings.TrimRight(string(rest[:1]), "\x00") + "'")
	}
	v, ok := parseInt(rest[1:cr])
	if !ok || v > math.MaxInt32 {
		return 0, false, protocolError("invalid " + number)
	}
	r.next += cr + 2
	return int(max(v, -1)), true, nil
}

// readInline parses a line of words into args.
func (r *reader) readInline() (ok bool, err error) {
	rest := r.buf[r.start:r.end]
	lf := lineEnd(rest, '\n')
	if lf > maxInline || lf < 0 && len(rest) > maxInline {
		return false, protocolError("too big inline request")
	}
	if lf < 0 {
		return false, nil
	}
	r.args, err = splitWords(r.args[:0], bytes.TrimSuffix(rest[:lf], []byte("\r")))
	r.next = lf + 1
	r.consume()
	return true, err
}

// lineEnd finds the end of a line as C's strchr does: a zero byte hides it.
func lineEnd(b []byte, end byte) int {
	i := bytes.IndexByte(b, end)
	if i >= 0 && bytes.IndexByte(b[:i], 0) >= 0 {
		return -1
	}
	return i
}

// parseInt is Redis' string2ll: no sign but a minus, no leading zeros.
func parseInt(b []byte) (n int64, ok bool) {
	n, err := strconv.ParseInt(string(b[:min(len(b), 21)]), 10, 64) // it copies what it does not understand
	if err != nil || len(b) > 1 && b[0] == '0' || b[0] == '+' || b[0] == '-' && b[1] == '0' {
		return 0, false
	}
	return n, true
}

// splitWords splits an inline request as sdssplitargs does (sds.c).
func splitWords(words [][]byte, line []byte) ([][]byte, error) {
	unbalanced := protocolError("unbalanced quotes in request")
	for {
		line = bytes.TrimLeft(line, " \t\n\v\f\r")
		if len(line) == 0 {
			return words, nil
		}
		var word []byte
		var quote byte
	word:
		for len(line) > 0 && (quote != 0 || strings.IndexByte(" \n\r\t", line[0]) < 0) {
			ch := line[0]
			switch {
			case quote == 0 && (ch == '"' || ch == '\''):
				quote = ch
			case quote != 0 && ch == quote:
				if len(line) > 1 && !isSpace(line[1]) {
					return nil, unbalanced
				}
				quote, line = 0, line[1:]
				break word
			case quote == '"' && ch == '\\' && len(line) > 3 && line[1] == 'x' && isHex(line[2]) && isHex(line[3]):
				n, _ := strconv.ParseUint(string(line[2:4]), 16, 8)
				word, line = append(word, byte(n)), line[3:]
			case quote == '"' && ch == '\\' && len(line) > 1:
				word, line = append(word, unescape(line[1])), line[1:]
			case quote == '\'' && ch == '\\' && len(line) > 1 && line[1] == '\'':
				word, line = append(word, '\''), line[1:]
			default:
				word = append(word, ch)
			}
			line = line[1:]
		}
		if quote != 0 {
			return nil, unbalanced
		}
		words = append(words, word)
	}
}

func isSpace(b byte) bool { return b == ' ' || '\t' <= b && b <= '\r' }
func isHex(b byte) bool {
	return '0' <= b && b <= '9' || 'a' <= b && b <= 'f' || 'A' <= b && b <= 'F'
}

func unescape(b byte) byte {
	if i := strings.IndexByte("nrtba", b); i >= 0 {
		return "\n\r\t\b\a"[i]
	}
	return b
}

// A resp is the RESP front end.
type resp struct {
	cache    *cache
	password *password
	db       int             // that SELECT may name beside 0
	figures  func() []figure // for INFO
	nextID   atomic.Int64
	tally    tally
}

// A client is a connection that speaks RESP. Only its own goroutine uses it.
type client struct {
	resp     *resp
	conn     *conn
	in       reader
	id       int64
	since    time.Time
	authed   bool
	proto    int // 2 or 3
	name     string
	library  [2]string     // name and version
	asked    time.Duration // since when it waits for Redis, on the cache's clock
	late     bool          // Redis was too slow for what has been read: the rest does not wait as long again
	multi    *transaction  // nil outside MULTI
	moment   []answer      // to the keys of a transaction, in their order; nil outside EXEC
	begun    time.Time     // when the request began that is not complete
	counted  int           // keys that come next, are in the statistics, and had no room
	few      int           // how many of them are asked for at once
	free     int           // bytes of answers that are counted nowhere
	gone     bool          // a write has failed
	err      error         // ends the connection
	*buffers               // while there is something to answer
}

// Buffers are what a client needs only while it is being answered, and borrows for that.
type buffers struct {
	keys    [][]byte // asked for by GETs whose replies are not written yet
	answers []answer // that are not written yet
	out     []byte   // replies that are not flushed yet
}

var spareBuffers = sync.Pool{New: func() any { return &buffers{out: make([]byte, 0, flushAt)} }}

// errQuit ends a connection because the client asked for it.
var errQuit = errors.New("quit")

func newRESP(c *cache, pw *password, db int, figures func() []figure) *resp {
	return &resp{cache: c, password: pw, db: db, figures: figures}
}

// refuse answers a connection that is one too many.
func (s *resp) refuse(nc *conn) { io.WriteString(nc, "-ERR max number of clients reached\r\n") }

// serve answers a connection until it ends.
func (s *resp) serve(nc *conn) {
	in := reader{src: nc, buf: make([]byte, readBuffer), budget: nc.link.server.requests}
	c := &client{resp: s, conn: nc, in: in, id: s.nextID.Add(1), since: time.Now(), proto: 2}
	defer func() { c.in.queued = 0; c.in.grant(0, 0); nc.Close() }()
	nc.link.readsOn = true
	c.permit(!s.password.needed)
	for c.err == nil {
		c.pace()
		if c.err = c.in.fill(); c.err == nil {
			c.answer()
		}
	}
	if _, ok := c.err.(protocolError); ok {
		nc.linger()
	}
}

// pace limits the time for a request that has begun.
func (c *client) pace() {
	if c.multi == nil {
		c.in.queued = 0
	}
	n := c.in.end - c.in.start
	if n == 0 {
		c.conn.link.hurry(0)
		return
	}
	if c.in.start > 0 || !c.conn.link.hurried {
		c.begun = time.Now()
	}
	c.conn.link.hurry(max(1, time.Until(c.begun.Add(requestTime+time.Duration(n>>20)*time.Second))))
}

// permit sets whether the client may read. Until then Redis takes only short requests from it.
func (c *client) permit(ok bool) { c.authed, c.in.strict = ok, !ok }

// answer answers all that has been read.
func (c *client) answer() {
	c.buffers, c.late = spareBuffers.Get().(*buffers), false
	for c.err == nil {
		var args [][]byte
		var broken error
		var key []byte
		ok := false
		if c.multi == nil {
			key, ok = c.in.readGet()
		}
		if !ok {
			if args, broken = c.in.read(); args == nil && broken == nil {
				break
			}
			if ok = broken == nil && len(args) == 2 && c.authed && c.multi == nil && isGet(args[0]); ok {
				key = args[1]
			}
		}
		if ok {
			if c.keys = append(c.keys, key); len(c.keys) == maxAhead {
				c.get()
			}
			continue
		}
		c.get()
		switch {
		case c.err != nil:
		case broken != nil:
			c.fail("ERR " + broken.Error())
			c.err = broken
		default:
			c.execute(args)
		}
	}
	c.get()
	c.flush()
	c.give()
}

func isGet(name []byte) bool {
	return len(name) == 3 && name[0]|' ' == 'g' && name[1]|' ' == 'e' && name[2]|' ' == 't'
}

// give returns the buffers, empty, for another client.
func (c *client) give() {
	b := c.buffers
	c.buffers = nil
	b.out = b.out[:0]
	if cap(b.out) <= 2*flushAt && cap(b.answers) <= 1024 {
		spareBuffers.Put(b)
	}
}

// get answers the GETs that have been gathered.
func (c *client) get() {
	c.counted = 0
	for keys := c.keys; len(keys) > 0 && c.err == nil; {
		c.startWaiting()
		keys = keys[len(c.ask(keys)):]
		c.writeAnswers()
	}
	clear(c.keys)
	c.keys = c.keys[:0]
}

// startWaiting has the client's time for Redis run from now on, unless it is used up.
func (c *client) startWaiting() {
	if !c.late {
		c.asked = c.resp.cache.now()
	}
}

// ask adds the answers to keys, or to the first of them, to those that are to be written. It returns what it
// has added: none if there is no room beside those that are there already.
func (c *client) ask(keys [][]byte) []answer {
	before, n := len(c.answers), len(keys)
	if len(c.moment) >= n {
		c.answers, c.moment = append(c.answers, c.moment[:n]...), c.moment[n:]
		return c.answers[before:]
	}
	t := &c.resp.tally
	if c.counted > 0 {
		t, n = new(tally), min(n, c.counted, c.few)
	}
	c.answers = slices.Grow(c.answers, n)
	answers := c.answers[before : before+n]
	got := c.resp.cache.get(t, c.asked, keys[:n], answers)
	c.in.wide = answers[got-1].flight != nil
	n = c.fit(keys, answers[:got])
	clear(answers[n:])
	c.answers = c.answers[:before+n]
	if c.counted == 0 {
		c.counted, c.few = got, max(n, 1)
	}
	c.counted -= n
	return answers[:n]
}

// fit counts answers against the budget of values, and returns for how many of them there is room. The first
// flushAt bytes of those that are not written need none.
func (c *client) fit(keys [][]byte, answers []answer) int {
	free, size, link := 0, c.free, c.conn.link
	for i := range answers {
		if size += len(answers[i].data) + answerSize; size <= flushAt {
			free, c.free = i+1, size
		}
	}
	switch {
	case free == len(answers) || len(answers) > 1 && link.hold("", size) == nil:
		return len(answers)
	case free > 0 || link.holding || c.free > 0 && len(answers[0].data) <= flushAt:
		return free
	}
	c.await(keys[:1], answers[:1])
	return 1
}

// await waits for room for one large value, as long as for Redis. It does not hold the value meanwhile.
func (c *client) await(key [][]byte, a []answer) {
	late := time.NewTimer(c.resp.cache.timeout)
	defer late.Stop()
	for {
		full := c.conn.link.hold(a[0].data, 0)
		if full == nil {
			return
		}
		a[0] = answer{err: errCrowded}
		select {
		case <-late.C:
			return
		case <-full:
			c.startWaiting()
			c.resp.cache.get(new(tally), c.asked, key, a)
		}
	}
}

// writeAnswers adds the answers to the replies, and lets go of them.
func (c *client) writeAnswers() {
	for i := range c.answers {
		switch a := &c.answers[i]; {
		case c.err != nil:
		case a.err == nil:
			c.write(a.bulk())
		case a.err == errAbsent:
			c.null()
		default:
			c.late = c.late || a.err == errTimeout
			c.fail(respError(a.err))
		}
		c.answers[i] = answer{}
	}
	c.letGo()
}

// letGo lets go of the answers. Those of a transaction hold until its end.
func (c *client) letGo() {
	clear(c.answers)
	c.answers, c.free = c.answers[:0], 0
	if c.moment == nil {
		c.conn.link.letGo()
	}
}

// respError returns the error reply for an answer. Redis' own error replies pass as they are.
func respError(err error) string {
	if err == errUnavailable || err == errTimeout || err == errCrowded {
		return "ERR " + err.Error()
	}
	return err.Error()
}

// write adds s to the replies. However long it is, no more than a part of it is copied at a time.
func (c *client) write(s string) {
	for len(c.out)+len(s) > flushAt {
		n := max(flushAt-len(c.out), 0)
		c.out, s = append(c.out, s[:n]...), s[n:]
		if c.flush(); c.err != nil {
			return
		}
	}
	c.out = append(c.out, s...)
}

func (c *client) flush() {
	if len(c.out) > 0 && !c.gone {
		if _, err := c.conn.Write(c.out); err != nil {
			c.err, c.gone = err, true
		}
	}
	c.out = c.out[:0]
}

// The following add a reply of a kind, all of them short.

func (c *client) ok()             { c.status("OK") }
func (c *client) status(s string) { c.line('+', s) }
func (c *client) integer(n int64) { c.line(':', strconv.FormatInt(n, 10)) }
func (c *client) array(n int)     { c.line('*', strconv.Itoa(n)) }

// fail adds an error. Its text comes in part from the client, and must remain one line.
func (c *client) fail(s string) { c.line('-', oneLine.Replace(s)) }

var oneLine = strings.NewReplacer("\r", " ", "\n", " ")

func (c *client) line(kind byte, s string) {
	if len(c.out) > flushAt {
		c.flush()
	}
	c.out = append(append(append(c.out, kind), s...), "\r\n"...)
}

func (c *client) bulk(s string) {
	c.line('$', strconv.Itoa(len(s)))
	c.write(s)
	c.write("\r\n")
}

func (c *client) bulks(all ...string) {
	for _, s := range all {
		c.bulk(s)
	}
}

// echo adds what the client sent, without a copy of the whole.
func (c *client) echo(b []byte) {
	c.line('$', strconv.Itoa(len(b)))
	for part := range slices.Chunk(b, flushAt) {
		c.write(string(part))
	}
	c.write("\r\n")
}

// verbatim is a text for people.
func (c *client) verbatim(s string) {
	if c.proto == 2 {
		c.bulk(s)
		return
	}
	c.line('=', strconv.Itoa(len("txt:"+s)))
	c.write("txt:" + s + "\r\n")
}

// mapping begins n pairs.
func (c *client) mapping(n int) {
	if c.proto == 2 {
		c.array(2 * n)
	} else {
		c.line('%', strconv.Itoa(n))
	}
}

func (c *client) null() {
	if c.proto == 2 {
		c.line('$', "-1")
	} else {
		c.line('_', "")
	}
}

// A command has Redis' arity: how many arguments, its name among them; at least so many if negative.
type command struct {
	arity int
	keys  bool                           // all arguments are keys
	run   func(c *client, args [][]byte) // nil for those that have only subcommands
	sub   map[string]command
}

// commands is the table of all that is answered, by name in lower case.
var commands map[string]command

func init() {
	emptyMap := func(c *client, _ [][]byte) { c.mapping(0) }
	disabled := func(c *client, _ [][]byte) { c.fail("ERR This instance has cluster support disabled") }
	clusterCommands := make(map[string]command)
	for name := range strings.FieldsSeq("addslots addslotsrange bumpepoch count-failure-reports countkeysinslot delslots delslotsrange failover " +
		"flushslots forget getkeysinslot help info keyslot links meet myid nodes replicate replicas reset saveconfig set-config-epoch setslot " +
		"shards slaves slots") {
		clusterCommands[name] = command{arity: -2, run: disabled}
	}
	commands = map[string]command{
		"get":     {arity: 2, keys: true, run: (*client).readOne},
		"mget":    {arity: -2, keys: true, run: (*client).mget},
		"exists":  {arity: -2, keys: true, run: (*client).exists},
		"multi":   {arity: 1, run: (*client).begin},
		"exec":    {arity: 1, run: (*client).exec},
		"discard": {arity: 1, run: (*client).discard},
		"ping":    {arity: -1, run: (*client).ping},
		"echo":    {arity: 2, run: func(c *client, args [][]byte) { c.echo(args[1]) }},
		"hello":   {arity: -1, run: (*client).hello},
		"auth":    {arity: -2, run: (*client).auth},
		"select":  {arity: 2, run: (*client).selectDB},
		"quit":    {arity: -1, run: func(c *client, _ [][]byte) { c.ok(); c.err = errQuit }},
		"reset":   {arity: 1, run: (*client).reset},
		"info":    {arity: -1, run: (*client).info},
		"config": {arity: -2, sub: map[string]command{
			"get":  {arity: -3, run: emptyMap},
			"help": {arity: 2, run: help("CONFIG", "GET <pattern>", "Return parameters matching the glob-like <pattern> and their values.")},
		}},
		// Without DOCS, redis-cli completes and explains commands from what it knows itself.
		"command": {arity: -1, run: (*client).commandInfo, sub: map[string]command{
			"count":   {arity: 2, run: func(c *client, _ [][]byte) { c.integer(int64(len(commands))) }},
			"info":    {arity: -2, run: (*client).commandInfo},
			"list":    {arity: -2, run: (*client).commandList},
			"getkeys": {arity: -4, run: (*client).commandKeys},
			"help": {arity: 2, run: help("COMMAND", "(no subcommand)", "Return details about all Redis commands.",
				"COUNT", "Return the total number of commands in this Redis server.",
				"LIST", "Return a list of all commands in this Redis server.",
				"INFO [<command-name> ...]", "Return details about multiple Redis commands.",
				"GETKEYS <full-command>", "Return the keys from a full Redis command.")},
		}},
		"cluster":  {arity: -2, run: disabled, sub: clusterCommands},
		"readonly": {arity: 1, run: disabled}, "readwrite": {arity: 1, run: disabled}, "asking": {arity: 1, run: disabled},
		"client": {arity: -2, sub: map[string]command{
			"id":       {arity: 2, run: func(c *client, _ [][]byte) { c.integer(c.id) }},
			"getname":  {arity: 2, run: (*client).getName},
			"setname":  {arity: 3, run: (*client).setName},
			"setinfo":  {arity: 4, run: (*client).setInfo},
			"info":     {arity: 2, run: (*client).describe},
			"list":     {arity: -2, run: (*client).list},
			"no-evict": {arity: 3, run: (*client).onOff},
			"no-touch": {arity: 3, run: (*client).onOff},
			"help": {arity: 2, run: help("CLIENT", "GETNAME", "Return the name of the current connection.",
				"ID", "Return the ID of the current connection.",
				"INFO", "Return information about the current client connection.",
				"LIST [options ...]", "Return information about client connections.",
				"SETNAME <name>", "Assign the name <name> to the current connection.",
				"NO-EVICT (ON|OFF)", "Protect current client connection from eviction.")},
		}},
	}
}

// help answers HELP of a command with what is known of its subcommands, a form and a line about each.
func help(name string, lines ...string) func(*client, [][]byte) {
	return func(c *client, _ [][]byte) {
		c.array(len(lines) + 3)
		c.status(name + " <subcommand> [<arg> [value] [opt] ...]. Subcommands are:")
		for i, line := range append(lines, "HELP", "Prints this help.") {
			c.status(strings.Repeat("    ", i%2) + line)
		}
	}
}

// commandInfo answers COMMAND and COMMAND INFO in the form of Redis 7: name, arity, flags, first and last
// key, step, ACL categories, tips, key specifications, subcommands.
func (c *client) commandInfo(args [][]byte) {
	names := args[min(len(args), 2):]
	if len(names) == 0 {
		for _, name := range slices.Sorted(maps.Keys(commands)) {
			names = append(names, []byte(name))
		}
	}
	c.array(len(names))
	for _, arg := range names {
		name := nameOf(arg)
		cmd, ok := commands[name]
		if !ok {
			c.null()
			continue
		}
		first, last, flags := int64(0), int64(0), []string(nil)
		if cmd.keys {
			first, last, flags = 1, 1, []string{"readonly", "fast"}
		}
		if cmd.keys && cmd.arity < 0 {
			last = -1
		}
		c.array(10)
		c.bulk(name)
		c.integer(int64(cmd.arity))
		c.array(len(flags))
		for _, flag := range flags {
			c.status(flag)
		}
		for _, n := range []int64{first, last, first} {
			c.integer(n)
		}
		for range 4 {
			c.array(0)
		}
	}
}

func (c *client) commandList(args [][]byte) {
	if len(args) > 2 {
		c.fail("ERR syntax error")
		return
	}
	c.array(len(commands))
	c.bulks(slices.Sorted(maps.Keys(commands))...)
}

// commandKeys answers COMMAND GETKEYS (db.c, getKeysSubcommandImpl).
func (c *client) commandKeys(args [][]byte) {
	switch cmd, ok := commands[nameOf(args[2])]; {
	case !ok:
		c.fail("ERR Invalid command specified")
	case !cmd.keys:
		c.fail("ERR The command has no key arguments")
	case cmd.arity > 0 && len(args)-2 != cmd.arity || len(args)-2 < -cmd.arity:
		c.fail("ERR Invalid number of arguments specified for command")
	default:
		c.array(len(args) - 3)
		for _, key := range args[3:] {
			c.echo(key)
		}
	}
}

// execute answers one command, or queues it in a transaction.
func (c *client) execute(args [][]byte) {
	if guard := word(args[0]); guard == "post" || guard == "host:" {
		// A browser that was made to speak to a Redis (networking.c, securityWarningCommand).
		c.err = protocolError("no reply")
		return
	}
	name, cmd, refusal := c.find(args)
	switch {
	case refusal != "" && c.multi != nil && name == "exec":
		c.multi = nil
		c.fail("EXECABORT Transaction discarded because of: " + strings.TrimPrefix(refusal, "ERR "))
	case refusal != "":
		c.fail(refusal)
		if c.multi != nil {
			c.multi.broken = true
		}
	case c.multi != nil && !slices.Contains([]string{"exec", "discard", "multi", "quit", "reset"}, name):
		c.status("QUEUED")
		if c.in.queued += c.multi.add(cmd, args); !c.in.grant(len(c.in.buf), len(c.in.spans)) {
			c.in.broken = errTooMuch
		}
	default:
		cmd.run(c, args)
	}
}

// find returns a command that may run, and its name, or the error reply.
func (c *client) find(args [][]byte) (name string, cmd command, refusal string) {
	name = nameOf(args[0])
	cmd, ok := commands[name]
	if !ok {
		return name, cmd, unknownCommand(args)
	}
	if cmd.sub != nil && len(args) > 1 {
		sub := nameOf(args[1])
		if cmd, ok = cmd.sub[sub]; !ok {
			return name, cmd, fmt.Sprintf("ERR unknown subcommand '%s'. Try %s HELP.", cString(args[1], 128), strings.ToUpper(name))
		}
		name += "|" + sub
	}
	switch {
	case cmd.run == nil || cmd.arity > 0 && len(args) != cmd.arity || len(args) < -cmd.arity:
		refusal = "ERR wrong number of arguments for '" + name + "' command"
	case !c.authed && !slices.Contains([]string{"auth", "hello", "quit", "reset"}, name):
		refusal = "NOAUTH Authentication required."
	}
	return name, cmd, refusal
}

// A transaction is what a client has queued since MULTI.
type transaction struct {
	run    []func(c *client)
	keys   [][]byte // of all GET, MGET and EXISTS, in their order
	broken bool     // a command was refused: EXEC discards the transaction
}

// add queues a copy of a command, and returns what it costs.
func (t *transaction) add(cmd command, args [][]byte) (size int) {
	own := make([][]byte, len(args))
	for i, arg := range args {
		own[i] = bytes.Clone(arg)
		size += len(arg) + 2*argSize
	}
	t.run = append(t.run, func(c *client) { cmd.run(c, own) })
	if cmd.keys {
		t.keys = append(t.keys, own[1:]...)
	}
	return size
}

func (c *client) begin([][]byte) {
	if c.multi != nil {
		c.fail("ERR MULTI calls can not be nested")
		return
	}
	c.multi, c.in.queued = new(transaction), 0
	c.ok()
}

func (c *client) discard([][]byte) {
	if c.multi == nil {
		c.fail("ERR DISCARD without MULTI")
		return
	}
	c.multi = nil
	c.ok()
}

// exec answers all that is queued, from one moment of the cache: first what it lacks is fetched, then all
// keys are looked up at once. What is too large together for that is answered as it comes.
func (c *client) exec([][]byte) {
	t := c.multi
	c.multi = nil
	switch {
	case t == nil:
		c.fail("ERR EXEC without MULTI")
		return
	case t.broken:
		c.fail("EXECABORT Transaction discarded because of previous errors.")
		return
	}
	if n := len(t.keys); n > 0 && n <= maxAhead {
		c.startWaiting()
		if answers := c.ask(t.keys); len(answers) == n {
			c.resp.cache.again(t.keys, answers)
			c.moment = slices.Clone(answers)
		}
		c.letGo()
	}
	c.array(len(t.run))
	for _, run := range t.run {
		if c.err == nil {
			run(c)
		}
	}
	c.moment = nil
	c.letGo()
}

// readOne answers a GET that is not one of a pipeline's.
func (c *client) readOne(args [][]byte) {
	c.startWaiting()
	c.ask(args[1:])
	c.writeAnswers()
}

// exists counts the keys that Redis has, of whatever type.
func (c *client) exists(args [][]byte) {
	n := int64(0)
	c.startWaiting()
	defer c.letGo()
	for keys := args[1:]; len(keys) > 0; c.letGo() {
		answers := c.ask(keys[:min(len(keys), maxAhead)])
		keys = keys[len(answers):]
		for i := range answers {
			switch err := answers[i].err; {
			case err == nil || errors.Is(err, errWrongType):
				n++
			case err != errAbsent:
				c.late = c.late || err == errTimeout
				c.fail(respError(err))
				return
			}
		}
	}
	c.integer(n)
}

// unknownCommand has Redis' words: as much of the arguments as fits 128 bytes (server.c).
func unknownCommand(args [][]byte) string {
	var b strings.Builder
	for _, arg := range args[1:] {
		if b.Len() >= 128 {
			break
		}
		b.WriteString("'" + cString(arg, 128-b.Len()) + "' ")
	}
	return "ERR unknown command '" + cString(args[0], 128) + "', with args beginning with: " + b.String()
}

// cString is what C's %.*s prints of b.
func cString(b []byte, limit int) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b[:min(len(b), limit)])
}

// lower is s as C's tolower has it: only ASCII has cases.
func lower(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// word is an option as strcasecmp reads it, nameOf a command's name.
func word(b []byte) string   { return lower(cString(b, maxWord)) }
func nameOf(b []byte) string { return lower(string(b[:min(len(b), maxWord)])) }

// mget answers MGET as Redis does: with null for a key that holds another type, and with an error instead of
// the array. It holds the answers back for that, until they are too large together: an error that comes
// then is an element.
func (c *client) mget(args [][]byte) {
	size, begun := 0, false
	c.startWaiting()
	for keys := args[1:]; len(keys) > 0 && c.err == nil; {
		answers := c.ask(keys[:min(len(keys), maxAhead)])
		keys = keys[len(answers):]
		for i := range answers {
			a := &answers[i]
			size += len(a.data) + answerSize
			switch {
			case errors.Is(a.err, errWrongType):
				a.err = errAbsent
			case a.err != nil && a.err != errAbsent && !begun:
				c.late = c.late || a.err == errTimeout
				c.fail(respError(a.err))
				c.letGo()
				return
			}
		}
		if len(keys) > 0 && len(answers) > 0 && size < aheadBytes {
			continue
		}
		if !begun {
			c.array(len(args) - 1)
			begun = true
		}
		c.writeAnswers()
		c.startWaiting() // the client took its time, not Redis
	}
}

func (c *client) ping(args [][]byte) {
	switch len(args) {
	case 1:
		c.status("PONG")
	case 2:
		c.echo(args[1])
	default:
		c.fail("ERR wrong number of arguments for 'ping' command")
	}
}

// hello switches the protocol (networking.c, helloCommand).
func (c *client) hello(args [][]byte) {
	proto := c.proto
	if len(args) > 1 {
		n, ok := parseInt(args[1])
		if !ok {
			c.fail("ERR Protocol version is not an integer or out of range")
			return
		}
		if n != 2 && n != 3 {
			c.fail("NOPROTO unsupported protocol version")
			return
		}
		proto = int(n)
	}
	for i := 2; i < len(args); i++ {
		switch opt, more := word(args[i]), len(args)-1-i; {
		case opt == "auth" && more >= 2:
			if !c.passes(args[i+1], args[i+2]) {
				c.fail(wrongPass)
				return
			}
			c.permit(true) // at once, whatever is wrong with what follows
			i += 2
		case opt == "setname" && more >= 1:
			if !c.rename(args[i+1]) {
				return
			}
			i++
		default:
			c.fail("ERR Syntax error in HELLO option '" + cString(args[i], maxInline) + "'")
			return
		}
	}
	if !c.authed {
		c.fail("NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO AUTH <user> <pass> option can be used to " +
			"authenticate the client and select the RESP protocol version at the same time")
		return
	}
	c.proto = proto
	c.mapping(7)
	c.bulks("server", "redis", "version", redisVersion, "proto")
	c.integer(int64(proto))
	c.bulks("id")
	c.integer(c.id)
	c.bulks("mode", "standalone", "role", "master", "modules")
	c.array(0)
}

const wrongPass = "WRONGPASS invalid username-password pair or user is disabled."

// passes checks a user and password. There is one user, the default one; without a password for it, any
// is right.
func (c *client) passes(user, password []byte) bool {
	pw := c.resp.password
	if string(user) != "default" {
		pw.denied.Add(1)
		return false
	}
	return !pw.needed || pw.matches(password)
}

func (c *client) auth(args [][]byte) {
	user, password := []byte("default"), args[len(args)-1]
	if len(args) == 3 {
		user = args[1]
	}
	switch {
	case len(args) > 3:
		c.fail("ERR syntax error")
	case len(args) == 2 && !c.resp.password.needed:
		c.fail("ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?")
	case !c.passes(user, password):
		c.fail(wrongPass)
	default:
		c.permit(true)
		c.ok()
	}
}

func (c *client) selectDB(args [][]byte) {
	switch n, ok := parseInt(args[1]); {
	case !ok:
		c.fail("ERR value is not an integer or out of range")
	case n != int64(int32(n)):
		c.fail("ERR value is out of range, value must between -2147483648 and 2147483647")
	case n != 0 && n != int64(c.resp.db):
		c.fail("ERR DB index is out of range")
	default:
		c.ok()
	}
}

func (c *client) reset([][]byte) {
	c.proto, c.name, c.multi = 2, "", nil
	c.permit(!c.resp.password.needed)
	c.status("RESET")
}

func (c *client) getName([][]byte) {
	if c.name == "" {
		c.null()
	} else {
		c.bulk(c.name)
	}
}

func (c *client) setName(args [][]byte) {
	if c.rename(args[2]) {
		c.ok()
	}
}

// rename sets the client's name, or says why not.
func (c *client) rename(name []byte) bool {
	if !c.accepts("Client names", name) {
		return false
	}
	c.name = string(name)
	return true
}

// accepts reports whether a word may stand in CLIENT LIST, or says why not.
func (c *client) accepts(what string, word []byte) bool {
	switch {
	case len(word) > maxName:
		c.fail(fmt.Sprintf("ERR %s cannot be longer than %d bytes.", what, maxName))
	case bytes.ContainsFunc(word, func(r rune) bool { return r < '!' || r > '~' }):
		c.fail("ERR " + what + " cannot contain spaces, newlines or special characters.")
	default:
		return true
	}
	return false
}

func (c *client) setInfo(args [][]byte) {
	attr := word(args[2])
	i := slices.Index([]string{"lib-name", "lib-ver"}, attr)
	if i < 0 {
		c.fail("ERR Unrecognized option '" + cString(args[2], maxInline) + "'")
	} else if c.accepts(attr, args[3]) {
		c.library[i] = string(args[3])
		c.ok()
	}
}

// onOff accepts a switch that has no meaning here.
func (c *client) onOff(args [][]byte) {
	if s := word(args[2]); s == "on" || s == "off" {
		c.ok()
	} else {
		c.fail("ERR syntax error")
	}
}

// describe answers CLIENT INFO.
func (c *client) describe([][]byte) {
	c.verbatim(fmt.Sprintf("id=%d addr=%s laddr=%s fd=0 name=%s age=%d idle=0 flags=N db=0 sub=0 psub=0 ssub=0 multi=-1 qbuf=0 qbuf-free=0 "+
		"argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r cmd=client user=default redir=-1 resp=%d lib-name=%s lib-ver=%s\n",
		c.id, c.conn.RemoteAddr(), c.conn.LocalAddr(), c.name, time.Since(c.since)/time.Second, c.proto, c.library[0], c.library[1]))
}

// list answers CLIENT LIST: a client is told of nobody but itself, and once.
func (c *client) list(args [][]byte) {
	asked := len(args) == 2
	switch {
	case asked:
	case len(args) == 4 && word(args[2]) == "type":
		if asked = word(args[3]) == "normal"; !asked && !slices.Contains([]string{"master", "replica", "slave", "pubsub"}, word(args[3])) {
			c.fail("ERR Unknown client type '" + cString(args[3], maxInline) + "'")
			return
		}
	case len(args) > 3 && word(args[2]) == "id":
		for _, arg := range args[3:] {
			id, ok := parseInt(arg)
			if !ok {
				c.fail("ERR Invalid client ID")
				return
			}
			asked = asked || id == c.id
		}
	default:
		c.fail("ERR syntax error")
		return
	}
	if asked {
		c.describe(args)
	} else {
		c.verbatim("")
	}
}

// info answers INFO with the sections that were asked for, in the order in which they first appear.
func (c *client) info(args [][]byte) {
	asked := func(names ...string) bool {
		return slices.ContainsFunc(args[1:], func(arg []byte) bool { return slices.Contains(names, word(arg)) })
	}
	all := len(args) == 1 || asked("all", "default", "everything")
	sections := make(map[string]string)
	var order []string
	for _, f := range c.resp.figures() {
		if f.name == "" || !all && !asked(lower(f.section)) {
			continue
		}
		if sections[f.section] == "" {
			order = append(order, f.section)
			sections[f.section] = "# " + f.section + "\r\n"
		}
		sections[f.section] += fmt.Sprintf("%s:%v\r\n", f.name, f.value)
	}
	var text []string
	for _, section := range order {
		text = append(text, sections[section])
	}
	c.verbatim(strings.Join(text, "\r\n"))
}
