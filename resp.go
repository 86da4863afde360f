// RESP: reading commands, the command table, writing replies, in RESP2 and RESP3.
//
// What a client sends is answered as Redis 7 answers it, to the byte, errors included
// (networking.c, server.c). Commands are parsed in place: their arguments are parts of the read
// buffer, and hold until more is read. The GETs of a pipeline are asked for together, before the
// first reply is written.
package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// A connection reads into readBuffer, into up to pipelineBuffer if it sends more at once, into up
// to wideBuffer while its requests wait for Redis, so that they wait together, and into more while
// a request does not fit. What is over pipelineBuffer counts against the budget of requests.
const (
	readBuffer     = 2 << 10
	pipelineBuffer = 16 << 10
	wideBuffer     = 256 << 10
	maxRequest     = 64 << 20 // of a request: all its arguments and their framing
	argSize        = 40       // what an argument costs beside its bytes
	maxInline      = 64 << 10 // of a line: an inline request, a count or a length (PROTO_INLINE_MAX_SIZE)
	maxAhead       = 1 << 14  // keys that a client asks for before it waits
	answerSize     = 96       // what an answer costs that has no value
	maxWord        = 64       // longer than any word that means something
	maxName        = 4 << 10  // of what a client says about itself; Redis has no such bound
	redisVersion   = "7.0.15" // the Redis whose answers these are
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
	pause  func() error // is called before src is read; what read has returned is invalid afterwards
	buf    []byte       // buf[start:end] has been read and not consumed
	start  int          // of the current request
	next   int          // where parsing goes on
	end    int
	args   [][]byte // of the current request; each is a part of buf, and its capacity reaches to the end of buf
	strict bool     // the client has not authenticated: it may send only short requests
	wide   bool     // the client's requests wait for Redis
	err    error    // nothing more is read
	budget *budget
	held   int // of the budget
	queued int // bytes of the transaction that the client has begun
}

// fill reads once. A full buffer grows; a large one shrinks, unless it holds a large request or
// requests that wait for Redis.
func (r *reader) fill() {
	rest, size, full := r.buf[r.start:r.end], len(r.buf), r.end == len(r.buf)
	if r.err = r.pause(); r.err != nil {
		return
	}
	switch {
	case len(rest) == size:
		size *= 2
	case full && size < pipelineBuffer:
		size = pipelineBuffer
	case full && r.wide && size < wideBuffer && r.grant(wideBuffer):
		size = wideBuffer
	case size > pipelineBuffer && len(rest) <= readBuffer/2 && !(full && r.wide):
		size = readBuffer
	}
	if !r.grant(size) {
		r.err = errTooMuch
		return
	}
	if r.start > 0 || size != len(r.buf) {
		r.move(rest, size)
	}
	n, err := r.src.Read(r.buf[r.end:])
	if r.end += n; n == 0 {
		r.err = err
	}
}

// move has the buffer begin with the current request, and be of another size if need be.
func (r *reader) move(rest []byte, size int) {
	if size != len(r.buf) || cap(r.args) > len(r.args)+pipelineBuffer/argSize {
		r.buf, r.args = make([]byte, size), append([][]byte(nil), r.args...)
	}
	copy(r.buf, rest)
	for i, arg := range r.args {
		from := cap(rest) - cap(arg)
		r.args[i] = r.buf[from : from+len(arg)]
	}
	r.start, r.next, r.end = 0, r.next-r.start, len(rest)
}

// grant counts buffer, arguments and transaction against the budget, if there is room for them.
func (r *reader) grant(size int) bool {
	more := max(0, size+len(r.args)*argSize+r.queued-pipelineBuffer) - r.held
	switch {
	case more > 0 && r.budget.hold("", more) != nil:
		return false
	case more < 0:
		r.budget.release("", -more)
	}
	r.held += more
	return true
}

// read returns the next request's arguments, or none after the last.
func (r *reader) read() [][]byte {
	for r.err == nil {
		r.start, r.args = r.next, r.args[:0]
		switch {
		case r.next == r.end:
			r.fill()
		case r.buf[r.next] == '*':
			r.readArray()
		default:
			line := bytes.TrimSuffix(r.readLine('\n', 0, "inline request"), []byte("\r"))
			if r.err == nil {
				r.args, r.err = splitWords(r.args, line)
			}
		}
		if len(r.args) > 0 && r.err == nil {
			if r.grant(len(r.buf)) {
				return r.args
			}
			r.err = errTooMuch
		}
	}
	return nil
}

func (r *reader) readArray() {
	left := r.readLength('*', "mbulk count string", "multibulk length")
	switch {
	case left > 10 && r.strict:
		r.err = protocolError("unauthenticated multibulk length")
	case left > maxRequest/len("$0\r\n\r\n"):
		r.err = errTooLarge
	}
	for ; left > 0 && r.err == nil; left-- {
		n := r.readLength('$', "bulk count string", "bulk length")
		switch {
		case r.err != nil:
		case n < 0 || n > 512<<20:
			r.err = protocolError("invalid bulk length")
		case n > 16384 && r.strict:
			r.err = protocolError("unauthenticated bulk length")
		case r.next-r.start+n > maxRequest:
			r.err = errTooLarge
		}
		for r.err == nil && r.next+n+2 > r.end {
			r.fill()
		}
		if r.err == nil {
			r.args = append(r.args, r.buf[r.next:r.next+n])
			r.next += n + 2 // whatever the terminator is: Redis does not look either
		}
	}
}

// readLength parses a line of a marker and a number; a negative one is -1.
func (r *reader) readLength(marker byte, what, number string) int {
	rest, n, i := r.buf[r.next:r.end], 0, 1
	for ; i < min(len(rest)-1, 10) && rest[i]-'0' <= 9; i++ {
		n = 10*n + int(rest[i]-'0')
	}
	if i > 1 && i < len(rest)-1 && rest[i] == '\r' && rest[0] == marker && (rest[1] != '0' || i == 2) {
		r.next += i + 2 // for most, this is enough, and quick
		return n
	}
	line := r.readLine('\r', 1, what)
	if r.err != nil {
		return 0
	}
	switch v, ok := parseInt(line[min(1, len(line)):]); {
	case line[:1][0] != marker: // or the line's end, if it is empty
		r.err = protocolError("expected '$', got '" + string(line[:1]) + "'")
	case !ok || v > math.MaxInt32:
		r.err = protocolError("invalid " + number)
	case v >= 0:
		return int(v)
	}
	return -1
}

// readLine returns a line without its end, and skips so many more bytes after that.
func (r *reader) readLine(end byte, more int, what string) []byte {
	for ; r.err == nil; r.fill() {
		rest := r.buf[r.next:r.end]
		n := bytes.IndexByte(rest, end)
		if n >= 0 && bytes.IndexByte(rest[:n], 0) >= 0 {
			n = -1 // as for C's strchr
		}
		switch {
		case n > maxInline || n < 0 && len(rest) > maxInline:
			r.err = protocolError("too big " + what)
			return nil
		case n >= 0 && n+more < len(rest):
			r.next += n + 1 + more
			return rest[:n]
		}
	}
	return nil
}

// parseInt is Redis' string2ll: no sign but a minus, no leading zeros.
func parseInt(b []byte) (n int64, ok bool) {
	n, err := strconv.ParseInt(string(b[:min(len(b), 21)]), 10, 64) // it copies what it does not understand
	return n, err == nil && strconv.FormatInt(n, 10) == string(b)
}

const blanks = " \t\n\v\f\r"

// A word of an inline request may be quoted from somewhere to its end (sdssplitargs in sds.c).
var (
	quoted  = regexp.MustCompile(`(?s)^(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\+[^\\])*)')(?:[` + blanks + `]|$)`)
	escaped = regexp.MustCompile(`(?s)\\(?:x[0-9a-fA-F]{2}|.)`)
)

// splitWords splits an inline request.
func splitWords(words [][]byte, line []byte) ([][]byte, error) {
	for line = bytes.TrimLeft(line, blanks); len(line) > 0; line = bytes.TrimLeft(line, blanks) {
		n := bytes.IndexAny(line, " \t\n\r\"'")
		if n < 0 {
			n = len(line)
		}
		word, rest := line[:n:n], line[n:]
		if len(rest) > 0 && (rest[0] == '"' || rest[0] == '\'') {
			part := quoted.FindSubmatch(rest)
			if part == nil {
				return nil, protocolError("unbalanced quotes in request")
			}
			word = slices.Concat(word, escaped.ReplaceAllFunc(part[1], unescape),
				bytes.ReplaceAll(part[2], []byte(`\'`), []byte(`'`)))
			rest = rest[len(part[0]):]
		}
		words, line = append(words, word), rest
	}
	return words, nil
}

// unescape returns what an escape stands for: its own character, if Redis knows no other.
func unescape(escape []byte) []byte {
	code, _, _, err := strconv.UnquoteChar(string(escape), 0)
	if err != nil || bytes.IndexByte([]byte("nrtbax"), escape[1]) < 0 {
		return escape[1:]
	}
	return []byte{byte(code)}
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
	library  [2]string  // name and version
	late     bool       // Redis was too slow for what has been read: the rest does not wait
	multi    [][][]byte // requests of a transaction that has begun; nil outside MULTI
	broken   bool       // a command was refused: EXEC discards the transaction
	moment   []answer   // to the keys of a transaction that are still to be asked for; nil outside EXEC
	few      int        // how many keys are asked for at once: twice as many as last, or 1 if there was no room
	sent     bool       // something has been written since MGET began
	err      error      // ends the connection
	*buffers            // while there is something to answer
}

// Buffers are what a client needs only while it is being answered, and borrows for that.
type buffers struct {
	keys    [][]byte // asked for by GETs whose replies are not written yet
	answers []answer // to the keys that were asked for last
	out     []byte   // replies that are not flushed yet
}

var spareBuffers = sync.Pool{New: func() any { return &buffers{out: make([]byte, 0, flushAt)} }}

// refuse answers a connection that is one too many.
func (s *resp) refuse(nc *conn) { io.WriteString(nc, "-ERR max number of clients reached\r\n") }

// serve answers a connection until it ends.
func (s *resp) serve(nc *conn) {
	in := reader{src: nc, buf: make([]byte, readBuffer), budget: nc.link.server.requests, strict: s.password.needed}
	c := &client{resp: s, conn: nc, in: in, id: s.nextID.Add(1), since: time.Now(), proto: 2, few: maxAhead}
	c.in.pause = c.pause
	defer func() { c.in.budget.release("", c.in.held); nc.Close() }()
	nc.link.readsOn = true
	for c.err == nil {
		c.answer(c.in.read())
	}
	if _, ok := c.err.(protocolError); ok {
		nc.linger(refuseTimeout)
	} else if nc.link.server.readUntil.Load() != nil { // it may have sent more than was read
		nc.linger(drainTime)
	}
}

// answer answers a request, or gathers a GET. Without arguments it ends the connection.
func (c *client) answer(args [][]byte) {
	if c.buffers == nil {
		c.buffers, c.late = spareBuffers.Get().(*buffers), false
	}
	if len(args) == 2 && bytes.EqualFold(args[0], []byte("get")) && c.multi == nil && !c.in.strict {
		if c.keys = append(c.keys, args[1]); len(c.keys) == maxAhead {
			c.get()
		}
		return
	}
	if c.get(); args != nil {
		write(c, c.execute(args))
		return
	}
	if broken, ok := c.in.err.(protocolError); ok && broken != "" {
		write(c, failure("ERR %v", broken))
	}
	c.flush()
	c.err = cmp.Or(c.err, c.in.err)
}

// pause answers all that has been read before more is, and limits the time of a request that has
// begun.
func (c *client) pause() error {
	if b := c.buffers; b != nil {
		c.get()
		c.flush()
		if c.buffers = nil; cap(b.answers) <= 1024 && cap(b.keys) <= 1024 {
			spareBuffers.Put(b) // empty
		}
	}
	switch link := c.conn.link; {
	case c.in.end == c.in.start:
		link.hurry(0)
	case c.in.start > 0 || !link.hurried: // it has just begun
		link.hurry(requestTimeout)
	}
	return c.err
}

// get answers the GETs that have been gathered.
func (c *client) get() {
	for keys := c.keys; len(keys) > 0 && c.err == nil; {
		keys = c.ask(keys)
		c.writeAnswers()
	}
	c.letGo()
	clear(c.keys)
	c.keys = c.keys[:0]
}

// ask asks for keys, or for the first of them, and returns the others. The answers are in c.answers
// until the next call. If they are more than flushAt bytes, they count against the budget of
// values. If there is no room for all, there is one of them, which waits for room if it is as large
// by itself.
func (c *client) ask(keys [][]byte) (rest [][]byte) {
	if n := len(keys); c.moment != nil {
		c.answers, c.moment = c.moment[:n], c.moment[n:]
		return nil
	}
	c.letGo()
	n, link, since := min(len(keys), c.few), c.conn.link, c.resp.cache.now()
	if c.late {
		since -= c.resp.cache.timeout
	}
	c.answers = slices.Grow(c.answers, n)[:n]
	got := c.resp.cache.get(since, keys[:n], c.answers)
	if took := c.resp.cache.now() - since; 2*took > c.resp.cache.timeout { // an outage may end a little earlier
		c.late = took >= c.resp.cache.timeout || isOutage(c.answers[0].err)
	}
	c.in.wide = c.answers[got-1].flight != nil
	size, first := 0, c.answers[0].data
	for i := range got {
		size += len(c.answers[i].data) + answerSize
	}
	switch n = 1; {
	case got > 1 && link.hold("", size) == nil:
		n = got
	case link.hold(first, 0) != nil:
		clear(c.answers)
		c.answers[0] = c.resp.cache.getHeld(new(tally), keys[0], link.hold)
	}
	if c.few = min(2*c.few, maxAhead); n < got {
		c.few = n
	}
	clear(c.answers[n:])
	c.answers = c.answers[:n]
	c.resp.tally.add(c.answers)
	return keys[n:]
}

// writeAnswers adds the answers to the replies.
func (c *client) writeAnswers() {
	for i := range c.answers {
		if a := &c.answers[i]; a.err == nil {
			write(c, a.bulk())
		} else {
			write(c, c.refusal(a.err))
		}
	}
}

// letGo lets go of the answers, and of their count against the budget with the last of a transaction.
func (c *client) letGo() {
	clear(c.answers)
	if c.answers = c.answers[:0]; len(c.moment) == 0 {
		c.conn.link.letGo()
	}
}

// flush writes the replies, unless the connection has ended.
func (c *client) flush() {
	if len(c.out) > 0 && c.err == nil {
		_, c.err = c.conn.Write(c.out)
		c.sent = true
	}
	c.out = c.out[:0]
}

// write adds s to the replies. What is long is written and not copied.
func write(c *client, s string) {
	n := min(len(s), max(flushAt-len(c.out), 0))
	if c.out, s = append(c.out, s[:n]...), s[n:]; s == "" {
		return
	}
	switch c.flush(); {
	case len(s) <= flushAt:
		c.out = append(c.out, s...)
	case c.err == nil:
		_, c.err = c.conn.WriteString(s)
	}
}

// Replies are strings; an empty one is none.
const statusOK = "+OK\r\n"

func head(kind byte, n int) string { return string(kind) + strconv.Itoa(n) + "\r\n" }

func bulks(all ...string) (reply string) {
	for _, s := range all {
		reply += head('$', len(s)) + s + "\r\n"
	}
	return reply
}

// failure returns an error. Its text comes in part from the client, and must remain one line.
func failure(format string, args ...any) string {
	return "-" + strings.NewReplacer("\r", " ", "\n", " ").Replace(fmt.Sprintf(format, args...)) + "\r\n"
}

// refusal returns what stands for the error of an answer. Redis' own replies pass as they are.
func (c *client) refusal(err error) string {
	switch err {
	case errAbsent:
		return c.null()
	case errUnavailable, errTimeout, errCrowded:
		return failure("ERR %v", err)
	}
	return failure("%v", err)
}

// choose returns what the client's protocol has of the two.
func (c *client) choose(resp2, resp3 string) string {
	if c.proto == 2 {
		return resp2
	}
	return resp3
}

func (c *client) null() string { return c.choose("$-1\r\n", "_\r\n") }

// verbatim returns a text for people.
func (c *client) verbatim(s string) string {
	return c.choose(bulks(s), head('=', len("txt:"+s))+"txt:"+s+"\r\n")
}

// echo adds what the client sent, without a copy of the whole.
func (c *client) echo(b []byte) string {
	write(c, head('$', len(b)))
	write(c, unsafe.String(unsafe.SliceData(b), len(b)))
	return "\r\n"
}

// A command has Redis' arity: how many arguments, its name among them; at least so many if
// negative. run returns the reply, or none if it has written that.
type command struct {
	arity int
	keys  bool                                  // all arguments are keys
	run   func(c *client, args [][]byte) string // nil for GET, which is gathered, and where only subcommands are
	sub   map[string]command
	form  string // of a subcommand's arguments, for HELP
}

// commands is the table of all that is answered, by name in lower case.
var commands map[string]command

func init() {
	emptyMap := func(c *client, _ [][]byte) string { return c.choose("*0\r\n", "%0\r\n") }
	disabled := func(*client, [][]byte) string { return failure("ERR This instance has cluster support disabled") }
	off := command{arity: 1, run: disabled}
	commands = map[string]command{
		"get":      {arity: 2, keys: true},
		"mget":     {arity: -2, keys: true, run: (*client).mget},
		"exists":   {arity: -2, keys: true, run: (*client).exists},
		"multi":    {arity: 1, run: (*client).begin},
		"exec":     {arity: 1, run: (*client).exec},
		"discard":  {arity: 1, run: (*client).discard},
		"ping":     {arity: -1, run: (*client).ping},
		"echo":     {arity: 2, run: func(c *client, args [][]byte) string { return c.echo(args[1]) }},
		"hello":    {arity: -1, run: (*client).hello},
		"auth":     {arity: -2, run: (*client).auth},
		"select":   {arity: 2, run: (*client).selectDB},
		"quit":     {arity: -1, run: (*client).quit},
		"reset":    {arity: 1, run: (*client).reset},
		"info":     {arity: -1, run: (*client).info},
		"readonly": off, "readwrite": off, "asking": off,
		"cluster": {arity: -2, run: disabled, sub: make(map[string]command)},
		"config":  {arity: -2, sub: map[string]command{"get": {arity: -3, run: emptyMap, form: "<pattern>"}}},
		// Without DOCS, redis-cli completes and explains commands from what it knows itself.
		"command": {arity: -1, run: commandInfo, sub: map[string]command{
			"count":   {arity: 2, run: func(*client, [][]byte) string { return head(':', len(commands)) }},
			"info":    {arity: -2, run: commandInfo, form: "[<command-name> ...]"},
			"list":    {arity: -2, run: commandList},
			"getkeys": {arity: -4, run: commandKeys, form: "<full-command>"},
		}},
		"client": {arity: -2, sub: map[string]command{
			"id":       {arity: 2, run: func(c *client, _ [][]byte) string { return head(':', int(c.id)) }},
			"getname":  {arity: 2, run: (*client).getName},
			"setname":  {arity: 3, run: (*client).setName, form: "<name>"},
			"setinfo":  {arity: 4, run: (*client).setInfo, form: "<lib-name|lib-ver> <value>"},
			"info":     {arity: 2, run: (*client).describe},
			"list":     {arity: -2, run: (*client).list, form: "[options ...]"},
			"no-evict": {arity: 3, run: onOff, form: "(ON|OFF)"},
			"no-touch": {arity: 3, run: onOff, form: "(ON|OFF)"},
		}},
	}
}

// The subcommands of CLUSTER, and HELP of the others, go in here.
func init() {
	for arity, names := range map[int]string{
		-2: "failover reset", -3: "addslots delslots", -4: "addslotsrange delslotsrange meet setslot",
		2: "bumpepoch flushslots help info links myid nodes saveconfig shards slots", 4: "getkeysinslot",
		3: "count-failure-reports countkeysinslot forget keyslot replicas replicate set-config-epoch slaves",
	} {
		for name := range strings.FieldsSeq(names) {
			commands["cluster"].sub[name] = command{arity: arity, run: commands["cluster"].run}
		}
	}
	for _, name := range []string{"config", "command", "client"} {
		sub := commands[name].sub
		forms := head('*', len(sub)+2) + "+" + strings.ToUpper(name) + " <subcommand> [<arg> [value] [opt] ...]. " +
			"Subcommands are:\r\n"
		for _, key := range append(slices.Sorted(maps.Keys(sub)), "help") {
			forms += "+" + strings.TrimSpace(strings.ToUpper(key)+" "+sub[key].form) + "\r\n"
		}
		sub["help"] = command{arity: 2, run: func(*client, [][]byte) string { return forms }}
	}
}

// execute answers one command, or queues it in a transaction.
func (c *client) execute(args [][]byte) string {
	name, cmd, refusal := c.find(args)
	switch multi := c.multi != nil; {
	case refusal != "" && slices.Contains([]string{"post", "host:"}, word(args[0])):
		c.in.err = protocolError("") // a browser was made to speak to a Redis (securityWarningCommand)
		return ""
	case refusal != "" && name == "exec":
		c.discard(nil)
		return "-EXECABORT Transaction discarded because of: " + strings.TrimPrefix(refusal[1:], "ERR ")
	case refusal != "":
		c.broken = true
		return refusal
	case multi && name == "multi":
		return failure("ERR MULTI calls can not be nested")
	case !multi && (name == "exec" || name == "discard"):
		return failure("ERR %s without MULTI", strings.ToUpper(name))
	case multi && !slices.Contains([]string{"exec", "discard", "quit", "reset"}, name):
		return c.queue(args)
	}
	return cmd.run(c, args)
}

// find returns a command that may run and its name, or the error reply.
func (c *client) find(args [][]byte) (name string, cmd command, refusal string) {
	name = nameOf(args[0])
	cmd, known := commands[name]
	if cmd.sub != nil && len(args) > 1 {
		if cmd, known = cmd.sub[nameOf(args[1])]; !known {
			name, sub := strings.ToUpper(name), cString(args[1], 128)
			return name, cmd, failure("ERR unknown subcommand '%s'. Try %s HELP.", sub, name)
		}
		name += "|" + nameOf(args[1])
	}
	switch {
	case !known:
		refusal = unknownCommand(args)
	case len(args) != cmd.arity && (cmd.arity > 0 || len(args) < -cmd.arity):
		refusal = failure("ERR wrong number of arguments for '%s' command", name)
	case c.in.strict && !slices.Contains([]string{"auth", "hello", "quit", "reset"}, name):
		refusal = failure("NOAUTH Authentication required.")
	}
	return name, cmd, refusal
}

// unknownCommand has Redis' words: as much of the arguments as fits 128 bytes (server.c).
func unknownCommand(args [][]byte) string {
	list := ""
	for _, arg := range args[1:] {
		if len(list) < 128 {
			list += "'" + cString(arg, 128-len(list)) + "' "
		}
	}
	return failure("ERR unknown command '%s', with args beginning with: %s", cString(args[0], 128), list)
}

// cString is what C's %.*s prints of b.
func cString(b []byte, limit int) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b[:min(len(b), limit)])
}

// nameOf returns a command's name. As for C's tolower, only ASCII has cases.
func nameOf(b []byte) string { return lower.Replace(string(b[:min(len(b), maxWord)])) }

var lower = strings.NewReplacer(strings.Split("AaBbCcDdEeFfGgHhIiJjKkLlMmNnOoPpQqRrSsTtUuVvWwXxYyZz", "")...)

// word returns an option, which ends at a zero byte as for strcasecmp.
func word(b []byte) string { return nameOf([]byte(cString(b, maxWord))) }

// mget answers MGET as Redis does: with null for a key that holds another type, and with an error
// instead of the array. An error that comes after a part of the array has been sent is an element.
func (c *client) mget(args [][]byte) string {
	begin := len(c.out)
	c.sent = false
	for keys := args[1:]; len(keys) > 0 && c.err == nil; {
		first := len(keys) == len(args)-1
		keys = c.ask(keys)
		for i := range c.answers {
			switch a := &c.answers[i]; {
			case a.err == nil:
			case !isOutage(a.err):
				a.err = errAbsent
			case !c.sent:
				c.out = c.out[:begin]
				return c.refusal(a.err)
			}
		}
		if first {
			write(c, head('*', len(args)-1))
		}
		c.writeAnswers()
	}
	return ""
}

// exists counts the keys that Redis has, of whatever type.
func (c *client) exists(args [][]byte) string {
	n := 0
	for keys := args[1:]; len(keys) > 0 && c.err == nil; {
		keys = c.ask(keys)
		for i := range c.answers {
			if err := c.answers[i].err; isOutage(err) {
				return c.refusal(err)
			} else if err != errAbsent {
				n++
			}
		}
	}
	return head(':', n)
}

func (c *client) begin([][]byte) string {
	c.multi, c.broken = [][][]byte{}, false
	return statusOK
}

// discard ends a transaction.
func (c *client) discard([][]byte) string {
	c.multi, c.in.queued = nil, 0
	return statusOK
}

// queue adds a copy of a request to the transaction.
func (c *client) queue(args [][]byte) string {
	own := make([][]byte, len(args))
	for i, arg := range args {
		own[i] = bytes.Clone(arg)
		c.in.queued += len(arg) + 2*argSize
	}
	c.multi = append(c.multi, own)
	if !c.in.grant(len(c.in.buf)) {
		c.in.err = errTooMuch
	}
	return "+QUEUED\r\n"
}

// exec answers all that is queued, from one moment of the cache: first what it lacks is fetched,
// then all keys are looked up at once. What is too large together for that is answered as it comes.
func (c *client) exec([][]byte) string {
	queue, keys := c.multi, [][]byte(nil)
	if c.discard(nil); c.broken {
		return failure("EXECABORT Transaction discarded because of previous errors.")
	}
	for _, args := range queue {
		if commands[nameOf(args[0])].keys {
			keys = append(keys, args[1:]...)
		}
	}
	if len(keys) > 0 && len(c.ask(keys)) == 0 {
		c.resp.cache.lookAgain(keys, c.answers)
		c.moment, c.answers = c.answers, nil
	}
	write(c, head('*', len(queue)))
	for _, args := range queue {
		if nameOf(args[0]) == "get" {
			c.keys = append(c.keys, args[1])
		} else if c.get(); c.err == nil {
			write(c, c.execute(args))
		}
	}
	c.get()
	c.moment, c.answers = nil, nil
	return ""
}

func (c *client) ping(args [][]byte) string {
	switch len(args) {
	case 1:
		return "+PONG\r\n"
	case 2:
		return c.echo(args[1])
	}
	return failure("ERR wrong number of arguments for 'ping' command")
}

// hello switches the protocol (networking.c, helloCommand).
func (c *client) hello(args [][]byte) string {
	proto, isNumber, refusal := int64(c.proto), true, ""
	if len(args) > 1 {
		proto, isNumber = parseInt(args[1])
	}
	switch {
	case !isNumber:
		return failure("ERR Protocol version is not an integer or out of range")
	case proto != 2 && proto != 3:
		return failure("NOPROTO unsupported protocol version")
	}
	for rest := args[min(len(args), 2):]; len(rest) > 0 && refusal == ""; {
		switch opt := word(rest[0]); {
		case opt == "auth" && len(rest) > 2:
			refusal = c.login(rest[1], rest[2]) // at once, whatever is wrong with what follows
			rest = rest[3:]
		case opt == "setname" && len(rest) > 1:
			refusal = note(&c.name, "Client names", rest[1])
			rest = rest[2:]
		default:
			refusal = failure("ERR Syntax error in HELLO option '%s'", cString(rest[0], maxInline))
		}
	}
	switch {
	case refusal != "":
		return refusal
	case c.in.strict:
		return failure("NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO AUTH " +
			"<user> <pass> option can be used to authenticate the client and select the RESP protocol version at the " +
			"same time")
	}
	c.proto = int(proto)
	return c.choose("*14\r\n", "%7\r\n") + bulks("server", "redis", "version", redisVersion, "proto") +
		head(':', c.proto) + bulks("id") + head(':', int(c.id)) +
		bulks("mode", "standalone", "role", "master", "modules") + "*0\r\n"
}

// login authenticates the client. There is one user, the default one; if it has no password, any is
// right.
func (c *client) login(user, password []byte) string {
	switch pw := c.resp.password; {
	case string(user) != "default":
		pw.denied.Add(1)
	case !pw.needed || pw.matches(password):
		c.in.strict = false
		return ""
	}
	return failure("WRONGPASS invalid username-password pair or user is disabled.")
}

func (c *client) auth(args [][]byte) string {
	switch {
	case len(args) > 3:
		return failure("ERR syntax error")
	case len(args) == 2 && !c.resp.password.needed:
		return failure("ERR AUTH <password> called without any password configured for the default user. " +
			"Are you sure your configuration is correct?")
	case len(args) == 2:
		args = [][]byte{nil, []byte("default"), args[1]}
	}
	return cmp.Or(c.login(args[1], args[2]), statusOK)
}

func (c *client) selectDB(args [][]byte) string {
	switch n, isNumber := parseInt(args[1]); {
	case !isNumber:
		return failure("ERR value is not an integer or out of range")
	case n != int64(int32(n)):
		return failure("ERR value is out of range, value must between -2147483648 and 2147483647")
	case n != 0 && n != int64(c.resp.db):
		return failure("ERR DB index is out of range")
	}
	return statusOK
}

func (c *client) quit([][]byte) string {
	c.in.err = io.EOF
	return statusOK
}

func (c *client) reset([][]byte) string {
	c.proto, c.name, c.in.strict = 2, "", c.resp.password.needed
	c.discard(nil)
	return "+RESET\r\n"
}

func commandList(_ *client, args [][]byte) string {
	if len(args) > 2 {
		return failure("ERR syntax error")
	}
	return head('*', len(commands)) + bulks(slices.Sorted(maps.Keys(commands))...)
}

// commandInfo answers COMMAND and COMMAND INFO in the form of Redis 7: name, arity, flags, first
// and last key, step, ACL categories, tips, key specifications, subcommands.
func commandInfo(c *client, args [][]byte) string {
	names := args[min(len(args), 2):]
	if len(names) == 0 {
		names = bytes.Fields([]byte(strings.Join(slices.Sorted(maps.Keys(commands)), " ")))
	}
	write(c, head('*', len(names)))
	for _, arg := range names {
		set := c.choose("*", "~")
		row, flags, step := c.null(), set+"0\r\n", 0
		if cmd, known := commands[nameOf(arg)]; known {
			if cmd.keys {
				flags, step = set+"2\r\n+readonly\r\n+fast\r\n", 1
			}
			row = head('*', 10) + bulks(nameOf(arg)) + head(':', cmd.arity) + flags + head(':', step) +
				head(':', step*cmp.Compare(cmd.arity, 0)) + head(':', step) + strings.Repeat(set+"0\r\n", 4)
		}
		write(c, row)
	}
	return ""
}

// commandKeys answers COMMAND GETKEYS (db.c, getKeysSubcommandImpl).
func commandKeys(c *client, args [][]byte) string {
	switch _, cmd, refusal := c.find(args[2:]); {
	case cmd.arity == 0:
		return failure("ERR Invalid command specified")
	case !cmd.keys:
		return failure("ERR The command has no key arguments")
	case refusal != "":
		return failure("ERR Invalid number of arguments specified for command")
	}
	write(c, head('*', len(args)-3))
	for _, key := range args[3:] {
		write(c, c.echo(key))
	}
	return ""
}

func (c *client) getName([][]byte) string {
	if c.name == "" {
		return c.null()
	}
	return bulks(c.name)
}

func (c *client) setName(args [][]byte) string {
	return cmp.Or(note(&c.name, "Client names", args[2]), statusOK)
}

func (c *client) setInfo(args [][]byte) string {
	attr := word(args[2])
	if i := slices.Index([]string{"lib-name", "lib-ver"}, attr); i >= 0 {
		return cmp.Or(note(&c.library[i], attr, args[3]), statusOK)
	}
	return failure("ERR Unrecognized option '%s'", cString(args[2], maxInline))
}

// note sets what a client says about itself. That must be able to stand in CLIENT LIST.
func note(field *string, what string, value []byte) string {
	if len(value) > maxName {
		return failure("ERR %s cannot be longer than %d bytes.", what, maxName)
	}
	if bytes.ContainsFunc(value, func(r rune) bool { return r < '!' || r > '~' }) {
		return failure("ERR %s cannot contain spaces, newlines or special characters.", what)
	}
	*field = string(value)
	return ""
}

// onOff accepts a switch that has no meaning here.
func onOff(_ *client, args [][]byte) string {
	if s := word(args[2]); s != "on" && s != "off" {
		return failure("ERR syntax error")
	}
	return statusOK
}

// describe answers CLIENT INFO.
func (c *client) describe([][]byte) string {
	return c.verbatim(fmt.Sprintf("id=%d addr=%s laddr=%s fd=0 name=%s age=%d idle=0 flags=N db=0 sub=0 psub=0 ssub=0 "+
		"multi=-1 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r "+
		"cmd=client user=default redir=-1 resp=%d lib-name=%s lib-ver=%s\n",
		c.id, c.conn.RemoteAddr(), c.conn.LocalAddr(), c.name, time.Since(c.since)/time.Second, c.proto,
		c.library[0], c.library[1]))
}

// list answers CLIENT LIST: a client is told of nobody but itself, and once.
func (c *client) list(args [][]byte) string {
	listed := len(args) == 2
	switch option := word(args[min(2, len(args)-1)]); {
	case listed:
	case option == "type" && len(args) == 4:
		kind := slices.Index([]string{"normal", "master", "replica", "slave", "pubsub"}, word(args[3]))
		if listed = kind == 0; kind < 0 {
			return failure("ERR Unknown client type '%s'", cString(args[3], maxInline))
		}
	case option == "id" && len(args) > 3:
		for _, arg := range args[3:] {
			id, isNumber := parseInt(arg)
			if listed = listed || id == c.id; !isNumber {
				return failure("ERR Invalid client ID")
			}
		}
	default:
		return failure("ERR syntax error")
	}
	if !listed {
		return c.verbatim("")
	}
	return c.describe(nil)
}

// info answers INFO with the sections that were asked for, in the order in which they first appear.
func (c *client) info(args [][]byte) string {
	asked := make(map[string]bool)
	for _, arg := range args[1:] {
		asked[word(arg)] = true
	}
	all := len(args) == 1 || asked["all"] || asked["default"] || asked["everything"]
	var sections []string // each is its name first
	for _, f := range c.resp.figures() {
		if f.name == "" || !all && !asked[strings.ToLower(f.section)] {
			continue
		}
		head := "# " + f.section + "\r\n"
		i := slices.IndexFunc(sections, func(s string) bool { return strings.HasPrefix(s, head) })
		if i < 0 {
			i, sections = len(sections), append(sections, head)
		}
		sections[i] += fmt.Sprintf("%s:%v\r\n", f.name, f.value)
	}
	return c.verbatim(strings.Join(sections, "\r\n"))
}
