// RESP: reading commands, the command table, writing replies, in RESP2 and RESP3.
//
// What a client sends is answered as Redis 7 answers it, to the byte, errors included (networking.c,
// server.c). Commands are parsed in place: their arguments are parts of the read buffer, and hold until
// more is read. The GETs of a pipeline are asked for together, before the first reply is written.
package main

import (
	"bytes"
	"cmp"
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
	buf    []byte   // what has been read and not consumed is buf[start:end]
	start  int      // of the current request
	next   int      // where parsing goes on
	end    int      // of what has been read
	need   int      // how long the current request is at least, where it says so; or 0
	last   int      // how much was read since a read last left room in buf
	left   int      // arguments still to come; 0 between requests
	args   [][]byte // of the current request; each is a part of buf, and its capacity reaches to the end of buf
	strict bool     // the client has not authenticated: it may send only short requests
	wide   bool     // the client's requests wait for Redis
	broken error
	budget *budget
	held   int // of the budget
	queued int // bytes of the transaction that the client has begun
}

// fill reads once. What read has returned is invalid afterwards.
func (r *reader) fill() error {
	rest, size, full, most := r.buf[r.start:r.end], len(r.buf), r.end == len(r.buf), pipelineBuffer
	if r.wide {
		most = wideBuffer
	}
	switch {
	case full && len(rest) == size && size >= pipelineBuffer:
		size = min(max(r.need, size+size/2), 2*size+readBuffer)
	case full && size <= most:
		size = min(8*size, most)
	case len(rest) <= readBuffer/2 && (r.last < readBuffer || size > pipelineBuffer):
		size = readBuffer
	}
	if r.left == 0 {
		r.args = r.args[:0]
	}
	if !r.grant(size, len(r.args)) {
		if len(rest) == len(r.buf) {
			r.broken = errTooMuch
			return nil
		}
		size = len(r.buf)
	}
	if r.start > 0 || size != len(r.buf) {
		r.move(rest, size)
	}
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

// move has the buffer begin with the current request, and be of another size if need be.
func (r *reader) move(rest []byte, size int) {
	if size != len(r.buf) || cap(r.args) > len(r.args)+pipelineBuffer/argSize {
		r.args = append([][]byte(nil), r.args...) // behind its end may be parts of the old buffer
	}
	if size != len(r.buf) {
		r.buf = make([]byte, size)
	}
	copy(r.buf, rest)
	for i, arg := range r.args {
		from := cap(rest) - cap(arg)
		r.args[i] = r.buf[from : from+len(arg)]
	}
	r.start, r.next, r.end, r.need = 0, r.next-r.start, len(rest), 0
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
	for ok := true; ok && r.next < r.end && r.broken == nil; {
		switch {
		case r.left > 0:
			ok = r.readBulk()
		case r.buf[r.next] == '*':
			ok = r.readGet() || r.readCount()
		default:
			ok = r.readInline()
		}
		if !ok || r.left > 0 {
			continue
		}
		if r.start = r.next; !r.grant(len(r.buf), len(r.args)) {
			r.broken = errTooMuch
		} else if len(r.args) > 0 {
			return r.args, nil
		}
	}
	return nil, r.broken
}

// The following parse a part of a request. They report whether it was there and right.

// readGet parses a whole GET of a common form, which is quicker than its parts.
func (r *reader) readGet() bool {
	const head = "*2\r\n$3\r\nGET\r\n$"
	b, i, n := r.buf[r.next:r.end], len(head), 0
	if len(b) <= i || string(b[:8]) != head[:8] || !isGet(b[8:11]) || string(b[11:i]) != head[11:] || b[i] == '0' {
		return false
	}
	for ; i < len(b) && n < 1000 && '0' <= b[i] && b[i] <= '9'; i++ {
		n = n*10 + int(b[i]-'0')
	}
	if n == 0 || i+2+n+2 > len(b) || b[i] != '\r' {
		return false
	}
	r.args = append(r.args[:0], b[8:11], b[i+2:i+2+n])
	r.next += i + 2 + n + 2
	return true
}

func (r *reader) readCount() bool {
	n, ok := r.readLength('*', "mbulk count string", "multibulk length")
	switch {
	case !ok:
	case n > 10 && r.strict:
		r.broken = protocolError("unauthenticated multibulk length")
	case n > maxRequest/len("$0\r\n\r\n"):
		r.broken = errTooLarge
	default:
		r.args, r.left = r.args[:0], max(n, 0)
		return true
	}
	return false
}

func (r *reader) readBulk() bool {
	header := r.next
	n, ok := r.readLength('$', "bulk count string", "bulk length")
	from, to := r.next, r.next+n
	switch {
	case !ok:
	case n < 0 || n > 512<<20:
		r.broken = protocolError("invalid bulk length")
	case to-r.start > maxRequest:
		r.broken = errTooLarge
	case n > 16384 && r.strict:
		r.broken = protocolError("unauthenticated bulk length")
	case to+2 > r.end:
		r.next, r.need = header, to+2-r.start // the length is parsed again when more has come
	default:
		r.args = append(r.args, r.buf[from:to])
		r.next, r.left = to+2, r.left-1 // whatever the terminator is: Redis does not look either
		return true
	}
	return false
}

func (r *reader) readInline() bool {
	line := r.readLine('\n', 0, "inline request")
	if line != nil {
		r.args, r.broken = splitWords(r.args[:0], bytes.TrimSuffix(line, []byte("\r")))
	}
	return line != nil && r.broken == nil
}

// readLength parses a line of a marker and a number; a negative one is -1.
func (r *reader) readLength(marker byte, what, number string) (n int, ok bool) {
	line := r.readLine('\r', 1, what)
	if line == nil {
		return 0, false
	}
	if first := line[:1]; first[0] != marker { // it may be the line's end
		r.broken = protocolError("expected '$', got '" + string(first) + "'")
		return 0, false
	}
	v, ok := parseInt(line[1:])
	if !ok || v > math.MaxInt32 {
		r.broken = protocolError("invalid " + number)
		return 0, false
	}
	return int(max(v, -1)), true
}

// readLine returns a line without its end and the bytes after that, or nil if there is more to come.
func (r *reader) readLine(end byte, after int, what string) []byte {
	rest := r.buf[r.next:r.end]
	n := bytes.IndexByte(rest, end)
	if n >= 0 && bytes.IndexByte(rest[:n], 0) >= 0 {
		n = -1 // as for C's strchr
	}
	switch {
	case n > maxInline || n < 0 && len(rest) > maxInline:
		r.broken = protocolError("too big " + what)
	case n >= 0 && n+after < len(rest):
		r.next += n + 1 + after
		return rest[:n]
	}
	return nil
}

// parseInt is Redis' string2ll: no sign but a minus, no leading zeros.
func parseInt(b []byte) (n int64, ok bool) {
	n, err := strconv.ParseInt(string(b[:min(len(b), 21)]), 10, 64) // it copies what it does not understand
	if err != nil || len(b) > 1 && b[0] == '0' || b[0] == '+' || b[0] == '-' && b[1] == '0' {
		return 0, false
	}
	return n, true
}

const blanks = " \t\n\v\f\r"

// splitWords splits an inline request as sdssplitargs does (sds.c).
func splitWords(words [][]byte, line []byte) ([][]byte, error) {
	for line = bytes.TrimLeft(line, blanks); len(line) > 0; line = bytes.TrimLeft(line, blanks) {
		word, rest, ok := cutWord(line)
		if !ok {
			return nil, protocolError("unbalanced quotes in request")
		}
		words, line = append(words, word), rest
	}
	return words, nil
}

// cutWord takes the first word off a line.
func cutWord(line []byte) (word, rest []byte, ok bool) {
	quote := byte(0)
	for ; len(line) > 0; line = line[1:] {
		switch ch := line[0]; {
		case quote == 0 && strings.IndexByte(" \n\r\t", ch) >= 0:
			return word, line, true
		case quote == 0 && (ch == '"' || ch == '\''):
			quote = ch
		case quote != 0 && ch == quote:
			return word, line[1:], len(line) == 1 || strings.IndexByte(blanks, line[1]) >= 0
		case quote == '\'' && bytes.HasPrefix(line, []byte(`\'`)):
			word, line = append(word, '\''), line[1:]
		case quote == '"' && ch == '\\' && len(line) > 1:
			b, n := unescape(line[1:])
			word, line = append(word, b), line[n:]
		default:
			word = append(word, ch)
		}
	}
	return word, nil, quote == 0
}

// unescape returns what a backslash and seq stand for, and how much of seq that takes.
func unescape(seq []byte) (b byte, n int) {
	if len(seq) > 2 && seq[0] == 'x' {
		if code, err := strconv.ParseUint(string(seq[1:3]), 16, 8); err == nil {
			return byte(code), 3
		}
	}
	if i := strings.IndexByte("nrtba", seq[0]); i >= 0 {
		return "\n\r\t\b\a"[i], 1
	}
	return seq[0], 1
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
	proto    int // 2 or 3
	name     string
	library  [2]string     // name and version
	asked    time.Duration // since when it waits for Redis, on the cache's clock
	late     bool          // Redis was too slow for what has been read: the rest does not wait as long again
	multi    *transaction  // nil outside MULTI
	moment   []answer      // to the keys of a transaction, in their order; nil outside EXEC
	begun    time.Time     // when the request began that is not complete
	few      int           // how many keys are asked for at once: not many more than there was room for lately
	free     int           // bytes of answers that are counted nowhere
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
	in := reader{src: nc, buf: make([]byte, readBuffer), budget: nc.link.server.requests, strict: s.password.needed}
	c := &client{resp: s, conn: nc, in: in, id: s.nextID.Add(1), since: time.Now(), proto: 2, few: maxAhead}
	defer func() { c.in.queued = 0; c.in.grant(0, 0); nc.Close() }()
	nc.link.readsOn = true
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

// answer answers all that has been read.
func (c *client) answer() {
	c.buffers, c.late = spareBuffers.Get().(*buffers), false
	for c.err == nil {
		args, broken := c.in.read()
		if len(args) == 2 && isGet(args[0]) && c.multi == nil && !c.in.strict {
			if c.keys = append(c.keys, args[1]); len(c.keys) == maxAhead {
				c.get()
			}
			continue
		}
		if c.get(); c.err != nil || args == nil && broken == nil {
			break
		}
		if broken != nil {
			c.fail("ERR " + broken.Error())
			c.end(broken)
		} else {
			c.execute(args)
		}
	}
	c.flush()
	b := c.buffers
	c.buffers, b.out = nil, b.out[:0]
	if cap(b.out) <= 2*flushAt && cap(b.answers) <= 1024 {
		spareBuffers.Put(b) // empty
	}
}

func isGet(name []byte) bool {
	return len(name) == 3 && name[0]|' ' == 'g' && name[1]|' ' == 'e' && name[2]|' ' == 't'
}

// get answers the GETs that have been gathered.
func (c *client) get() {
	c.look(c.keys, func(_ []answer, last bool) error { c.writeAnswers(last); return nil })
	clear(c.keys)
	c.keys = c.keys[:0]
}

// look asks for keys, and has take see the answers in lots, together with whether a lot is the last. Those
// that take does not write, or let go of, stay in c.answers. If take returns an error, that is the reply.
func (c *client) look(keys [][]byte, take func(lot []answer, last bool) error) {
	if len(keys) > 0 {
		c.startWaiting()
	}
	for len(keys) > 0 && c.err == nil {
		lot := c.ask(keys)
		keys = keys[len(lot):]
		if err := take(lot, len(keys) == 0); err != nil {
			c.letGo()
			c.failWith(err)
			return
		}
	}
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
	before, n := len(c.answers), min(len(keys), c.few)
	if len(c.moment) >= n {
		c.answers, c.moment = append(c.answers, c.moment[:n]...), c.moment[n:]
		return c.answers[before:]
	}
	c.answers = slices.Grow(c.answers, n)
	answers := c.answers[before : before+n]
	got := c.resp.cache.get(new(tally), c.asked, keys[:n], answers)
	c.in.wide = answers[got-1].flight != nil
	n = c.fit(keys, answers[:got])
	c.resp.tally.add(answers[:n])
	clear(answers[n:])
	c.answers = c.answers[:before+n]
	if c.few = min(2*c.few, maxAhead); n < got {
		c.few = max(n, 1)
	}
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
	late := time.After(c.resp.cache.timeout)
	for full := c.conn.link.hold(a[0].data, 0); full != nil; full = c.conn.link.hold(a[0].data, 0) {
		a[0] = answer{err: errCrowded}
		select {
		case <-late:
			return
		case <-full:
			c.startWaiting()
			c.resp.cache.get(new(tally), c.asked, key, a)
		}
	}
}

// writeAnswers adds the answers to the replies, and lets go of them.
func (c *client) writeAnswers(last bool) {
	for i := range c.answers {
		switch a := &c.answers[i]; {
		case c.err != nil:
		case a.err == nil:
			write(c, a.bulk())
		case a.err == errAbsent:
			c.null()
		default:
			c.failWith(a.err)
		}
		c.answers[i] = answer{}
	}
	c.letGo()
	if !last {
		c.startWaiting() // the client took its time, not Redis
	}
}

// letGo lets go of the answers. Those of a transaction hold until its end.
func (c *client) letGo() {
	clear(c.answers)
	c.answers, c.free = c.answers[:0], 0
	if c.moment == nil {
		c.conn.link.letGo()
	}
}

// write adds s to the replies. However long it is, no more than a part of it is copied at a time.
func write[S string | []byte](c *client, s S) {
	for len(c.out)+len(s) > flushAt {
		n := max(flushAt-len(c.out), 0)
		c.out, s = append(c.out, s[:n]...), s[n:]
		if c.flush(); c.err != nil {
			return
		}
	}
	c.out = append(c.out, s...)
}

// flush writes the replies, unless the connection has ended.
func (c *client) flush() {
	if len(c.out) > 0 && c.err == nil {
		_, c.err = c.conn.Write(c.out)
	}
	c.out = c.out[:0]
}

// end ends the connection after the replies.
func (c *client) end(err error) {
	c.flush()
	c.err = cmp.Or(c.err, err)
}

// The following add a reply of a kind, all of them short.

func (c *client) ok()                     { c.status("OK") }
func (c *client) status(s string)         { c.line('+', s) }
func (c *client) number(kind byte, n int) { c.line(kind, strconv.Itoa(n)) }

// fail adds an error. Its text comes in part from the client, and must remain one line.
func (c *client) fail(s string) { c.line('-', oneLine.Replace(s)) }

var oneLine = strings.NewReplacer("\r", " ", "\n", " ")

// failWith adds the error of an answer. Redis' own error replies pass as they are.
func (c *client) failWith(err error) {
	c.late = c.late || err == errTimeout
	if err == errUnavailable || err == errTimeout || err == errCrowded {
		err = fmt.Errorf("ERR %w", err)
	}
	c.fail(err.Error())
}

func (c *client) line(kind byte, s string) {
	if len(c.out) > flushAt {
		c.flush()
	}
	c.out = append(append(append(c.out, kind), s...), "\r\n"...)
}

func bulks[S string | []byte](c *client, all ...S) {
	for _, s := range all {
		c.number('$', len(s))
		write(c, s)
		write(c, "\r\n")
	}
}

// verbatim is a text for people.
func (c *client) verbatim(s string) {
	if c.proto == 2 {
		bulks(c, s)
		return
	}
	c.number('=', len("txt:"+s))
	write(c, "txt:"+s+"\r\n")
}

// mapping begins n pairs.
func (c *client) mapping(n int) {
	if c.proto == 2 {
		c.number('*', 2*n)
	} else {
		c.number('%', n)
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
	help  string // its form, and a line about it
}

// commands is the table of all that is answered, by name in lower case.
var commands map[string]command

func init() {
	emptyMap := func(c *client, _ [][]byte) { c.mapping(0) }
	count := func(c *client, _ [][]byte) { c.number(':', len(commands)) }
	id := func(c *client, _ [][]byte) { c.number(':', int(c.id)) }
	disabled := command{arity: 1, run: func(c *client, _ [][]byte) { c.fail("ERR This instance has cluster support disabled") }}
	commands = map[string]command{
		"get":      {arity: 2, keys: true, run: (*client).getOne},
		"mget":     {arity: -2, keys: true, run: (*client).mget},
		"exists":   {arity: -2, keys: true, run: (*client).exists},
		"multi":    {arity: 1, run: (*client).begin},
		"exec":     {arity: 1, run: (*client).exec},
		"discard":  {arity: 1, run: (*client).discard},
		"ping":     {arity: -1, run: (*client).ping},
		"echo":     {arity: 2, run: func(c *client, args [][]byte) { bulks(c, args[1]) }},
		"hello":    {arity: -1, run: (*client).hello},
		"auth":     {arity: -2, run: (*client).auth},
		"select":   {arity: 2, run: (*client).selectDB},
		"quit":     {arity: -1, run: func(c *client, _ [][]byte) { c.ok(); c.end(errQuit) }},
		"reset":    {arity: 1, run: (*client).reset},
		"info":     {arity: -1, run: (*client).info},
		"cluster":  {arity: -2, run: disabled.run, sub: make(map[string]command)},
		"readonly": disabled, "readwrite": disabled, "asking": disabled,
		"config": {arity: -2, sub: map[string]command{
			"get": {arity: -3, run: emptyMap, help: "GET <pattern>\nReturn parameters matching the glob-like <pattern> and their values."},
		}},
		"command": {arity: -1, run: (*client).commandInfo, sub: map[string]command{
			"count":   {arity: 2, run: count, help: "COUNT\nReturn the total number of commands in this Redis server."},
			"docs":    {arity: -2, run: emptyMap},
			"info":    {arity: -2, run: (*client).commandInfo, help: "INFO [<command-name> ...]\nReturn details about multiple Redis commands."},
			"list":    {arity: -2, run: (*client).commandList, help: "LIST\nReturn a list of all commands in this Redis server."},
			"getkeys": {arity: -4, run: (*client).commandKeys, help: "GETKEYS <full-command>\nReturn the keys from a full Redis command."},
		}},
		"client": {arity: -2, sub: map[string]command{
			"id":       {arity: 2, run: id, help: "ID\nReturn the ID of the current connection."},
			"getname":  {arity: 2, run: (*client).getName, help: "GETNAME\nReturn the name of the current connection."},
			"setname":  {arity: 3, run: (*client).setName, help: "SETNAME <name>\nAssign the name <name> to the current connection."},
			"setinfo":  {arity: 4, run: (*client).setInfo},
			"info":     {arity: 2, run: (*client).describe, help: "INFO\nReturn information about the current client connection."},
			"list":     {arity: -2, run: (*client).list, help: "LIST [options ...]\nReturn information about client connections."},
			"no-evict": {arity: 3, run: (*client).onOff, help: "NO-EVICT (ON|OFF)\nProtect current client connection from eviction."},
			"no-touch": {arity: 3, run: (*client).onOff},
		}},
	}
	for _, name := range []string{"config", "command", "client"} {
		commands[name].sub["help"] = command{arity: 2, run: help(name), help: "HELP\nPrints this help."}
	}
	for name := range strings.FieldsSeq("addslots addslotsrange bumpepoch count-failure-reports countkeysinslot delslots delslotsrange failover " +
		"flushslots forget getkeysinslot help info keyslot links meet myid nodes replicate replicas reset saveconfig set-config-epoch setslot " +
		"shards slaves slots") {
		commands["cluster"].sub[name] = command{arity: -2, run: disabled.run}
	}
}

// help answers HELP of a command with what the table says about its subcommands.
func help(name string) func(*client, [][]byte) {
	return func(c *client, _ [][]byte) {
		lines := []string{strings.ToUpper(name) + " <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"}
		subs := commands[name].sub
		for _, sub := range slices.Sorted(maps.Keys(subs)) {
			if form, about, ok := strings.Cut(subs[sub].help, "\n"); ok {
				lines = append(lines, form, "    "+about)
			}
		}
		c.number('*', len(lines))
		for _, line := range lines {
			c.status(line)
		}
	}
}

// commandInfo answers COMMAND and COMMAND INFO in the form of Redis 7: name, arity, flags, first and last
// key, step, ACL categories, tips, key specifications, subcommands.
func (c *client) commandInfo(args [][]byte) {
	var names []string
	for _, arg := range args[min(len(args), 2):] {
		names = append(names, nameOf(arg))
	}
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(commands))
	}
	c.number('*', len(names))
	for _, name := range names {
		cmd, ok := commands[name]
		if !ok {
			c.null()
			continue
		}
		flags, first, last := "*0\r\n", 0, 0
		if cmd.keys {
			flags, first, last = "*2\r\n+readonly\r\n+fast\r\n", 1, 1
		}
		if cmd.keys && cmd.arity < 0 {
			last = -1
		}
		write(c, fmt.Sprintf("*10\r\n$%d\r\n%s\r\n:%d\r\n%s:%d\r\n:%d\r\n:%d\r\n*0\r\n*0\r\n*0\r\n*0\r\n",
			len(name), name, cmd.arity, flags, first, last, first))
	}
}

func (c *client) commandList(args [][]byte) {
	if len(args) > 2 {
		c.fail("ERR syntax error")
		return
	}
	c.number('*', len(commands))
	bulks(c, slices.Sorted(maps.Keys(commands))...)
}

// commandKeys answers COMMAND GETKEYS (db.c, getKeysSubcommandImpl).
func (c *client) commandKeys(args [][]byte) {
	switch cmd, ok := commands[nameOf(args[2])]; {
	case !ok:
		c.fail("ERR Invalid command specified")
	case !cmd.keys:
		c.fail("ERR The command has no key arguments")
	case !cmd.takes(len(args) - 2):
		c.fail("ERR Invalid number of arguments specified for command")
	default:
		c.number('*', len(args)-3)
		bulks(c, args[3:]...)
	}
}

// takes reports whether a command takes n arguments, its name among them.
func (cmd command) takes(n int) bool { return n == cmd.arity || cmd.arity < 0 && n >= -cmd.arity }

// execute answers one command, or queues it in a transaction.
func (c *client) execute(args [][]byte) {
	if guard := word(args[0]); guard == "post" || guard == "host:" {
		// A browser that was made to speak to a Redis (networking.c, securityWarningCommand).
		c.end(protocolError("no reply"))
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
		if c.in.queued += c.multi.add(cmd, args); !c.in.grant(len(c.in.buf), len(args)) {
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
	case cmd.run == nil || !cmd.takes(len(args)):
		refusal = "ERR wrong number of arguments for '" + name + "' command"
	case c.in.strict && !slices.Contains([]string{"auth", "hello", "quit", "reset"}, name):
		refusal = "NOAUTH Authentication required."
	}
	return name, cmd, refusal
}

// unknownCommand has Redis' words: as much of the arguments as fits 128 bytes (server.c).
func unknownCommand(args [][]byte) string {
	var list strings.Builder
	for _, arg := range args[1:] {
		if list.Len() < 128 {
			list.WriteString("'" + cString(arg, 128-list.Len()) + "' ")
		}
	}
	return "ERR unknown command '" + cString(args[0], 128) + "', with args beginning with: " + list.String()
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
			r += 'a' - 'A'
		}
		return r
	}, s)
}

// word is an option as strcasecmp reads it, nameOf a command's name.
func word(b []byte) string   { return lower(cString(b, maxWord)) }
func nameOf(b []byte) string { return lower(string(b[:min(len(b), maxWord)])) }

// getOne answers a GET of a transaction.
func (c *client) getOne(args [][]byte) {
	c.keys = append(c.keys, args[1])
	c.get()
}

// mget answers MGET as Redis does: with null for a key that holds another type, and with an error instead of
// the array. It holds the answers back for that, until they are too large together: an error that comes
// then is an element.
func (c *client) mget(args [][]byte) {
	size, begun := 0, false
	c.look(args[1:], func(lot []answer, last bool) error {
		for i := range lot {
			a := &lot[i]
			size += len(a.data) + answerSize
			if errors.Is(a.err, errWrongType) {
				a.err = errAbsent
			}
			if a.err != nil && a.err != errAbsent && !begun {
				return a.err
			}
		}
		if last || len(lot) == 0 || size >= aheadBytes {
			if !begun {
				c.number('*', len(args)-1)
			}
			begun = true
			c.writeAnswers(last)
		}
		return nil
	})
}

// exists counts the keys that Redis has, of whatever type.
func (c *client) exists(args [][]byte) {
	n := 0
	c.look(args[1:], func(lot []answer, last bool) error {
		for i := range lot {
			if err := lot[i].err; err == nil || errors.Is(err, errWrongType) {
				n++
			} else if err != errAbsent {
				return err
			}
		}
		if c.letGo(); last {
			c.number(':', n)
		}
		return nil
	})
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
	if n := len(t.keys); n > 0 {
		c.startWaiting()
		if answers := c.ask(t.keys); len(answers) == n {
			c.resp.cache.again(t.keys, answers)
			c.moment = slices.Clone(answers)
		}
		c.letGo()
	}
	c.number('*', len(t.run))
	for _, run := range t.run {
		if c.err == nil {
			run(c)
		}
	}
	c.moment = nil
	c.letGo()
}

func (c *client) ping(args [][]byte) {
	switch len(args) {
	case 1:
		c.status("PONG")
	case 2:
		bulks(c, args[1])
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
	for rest := args[min(len(args), 2):]; len(rest) > 0; {
		switch opt := word(rest[0]); {
		case opt == "auth" && len(rest) > 2:
			if !c.login(rest[1], rest[2]) { // at once, whatever is wrong with what follows
				return
			}
			rest = rest[3:]
		case opt == "setname" && len(rest) > 1:
			if !c.note(&c.name, "Client names", rest[1]) {
				return
			}
			rest = rest[2:]
		default:
			c.fail("ERR Syntax error in HELLO option '" + cString(rest[0], maxInline) + "'")
			return
		}
	}
	if c.in.strict {
		c.fail("NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO AUTH <user> <pass> option can be used to " +
			"authenticate the client and select the RESP protocol version at the same time")
		return
	}
	c.proto = proto
	c.mapping(7)
	bulks(c, "server", "redis", "version", redisVersion, "proto")
	c.number(':', proto)
	bulks(c, "id")
	c.number(':', int(c.id))
	bulks(c, "mode", "standalone", "role", "master", "modules")
	c.number('*', 0)
}

// login authenticates the client, or says why not. There is one user, the default one; without a password for
// it, any is right.
func (c *client) login(user, password []byte) bool {
	pw := c.resp.password
	known := string(user) == "default"
	if !known {
		pw.denied.Add(1)
	}
	if !known || pw.needed && !pw.matches(password) {
		c.fail("WRONGPASS invalid username-password pair or user is disabled.")
		return false
	}
	c.in.strict = false
	return true
}

func (c *client) auth(args [][]byte) {
	user := []byte("default")
	if len(args) == 3 {
		user = args[1]
	}
	switch {
	case len(args) > 3:
		c.fail("ERR syntax error")
	case len(args) == 2 && !c.resp.password.needed:
		c.fail("ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?")
	case c.login(user, args[len(args)-1]):
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
	c.proto, c.name, c.multi, c.in.strict = 2, "", nil, c.resp.password.needed
	c.status("RESET")
}

func (c *client) getName([][]byte) {
	if c.name == "" {
		c.null()
	} else {
		bulks(c, c.name)
	}
}

func (c *client) setName(args [][]byte) {
	if c.note(&c.name, "Client names", args[2]) {
		c.ok()
	}
}

func (c *client) setInfo(args [][]byte) {
	attr := word(args[2])
	if i := slices.Index([]string{"lib-name", "lib-ver"}, attr); i < 0 {
		c.fail("ERR Unrecognized option '" + cString(args[2], maxInline) + "'")
	} else if c.note(&c.library[i], attr, args[3]) {
		c.ok()
	}
}

// note sets what a client says about itself, or says why not: it must be able to stand in CLIENT LIST.
func (c *client) note(field *string, what string, value []byte) bool {
	switch {
	case len(value) > maxName:
		c.fail(fmt.Sprintf("ERR %s cannot be longer than %d bytes.", what, maxName))
	case bytes.ContainsFunc(value, func(r rune) bool { return r < '!' || r > '~' }):
		c.fail("ERR " + what + " cannot contain spaces, newlines or special characters.")
	default:
		*field = string(value)
		return true
	}
	return false
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
	listed, option := len(args) == 2, ""
	if len(args) > 3 {
		option = word(args[2])
	}
	switch {
	case listed:
	case option == "type" && len(args) == 4:
		kind := word(args[3])
		if !slices.Contains([]string{"normal", "master", "replica", "slave", "pubsub"}, kind) {
			c.fail("ERR Unknown client type '" + cString(args[3], maxInline) + "'")
			return
		}
		listed = kind == "normal"
	case option == "id":
		for _, arg := range args[3:] {
			id, ok := parseInt(arg)
			if !ok {
				c.fail("ERR Invalid client ID")
				return
			}
			listed = listed || id == c.id
		}
	default:
		c.fail("ERR syntax error")
		return
	}
	if listed {
		c.describe(args)
	} else {
		c.verbatim("")
	}
}

// info answers INFO with the sections that were asked for, in the order in which they first appear.
func (c *client) info(args [][]byte) {
	asked := make(map[string]bool)
	for _, arg := range args[1:] {
		asked[word(arg)] = true
	}
	all := len(args) == 1 || asked["all"] || asked["default"] || asked["everything"]
	var order []string
	text := make(map[string]string) // of each section
	for _, f := range c.resp.figures() {
		if f.name == "" || !all && !asked[lower(f.section)] {
			continue
		}
		if text[f.section] == "" {
			order = append(order, f.section)
			text[f.section] = "# " + f.section + "\r\n"
		}
		text[f.section] += fmt.Sprintf("%s:%v\r\n", f.name, f.value)
	}
	for i, section := range order {
		order[i] = text[section]
	}
	c.verbatim(strings.Join(order, "\r\n"))
}
