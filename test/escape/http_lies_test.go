package escape

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var _ = register(entry{
	ID: "http/lies", Severity: takesNodeDown, Once: noStep,
	Threat: "A server that ADD fetches from stalls, sends without end, ends early, sends another length than it says, or answers that it is busy or broken.",
	Test:   httpLies,
})

// lie is how a server answers, and what the build must say; empty: it must only end when
// it is cancelled. A build that is told nothing wrong has the file that Gets is.
type lie struct {
	answer http.HandlerFunc
	says   string
	gets   string
}

// rawAnswer answers with bytes of its own making, and hangs up.
func rawAnswer(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, text)
	}
}

// refusal answers with a status, with a body of about a megabyte.
func refusal(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "86400")
		http.Error(w, strings.Repeat("no ", 300_000), code)
	}
}

var lies = map[string]lie{
	"stalls": {answer: stall},
	"stalls in the body": {answer: func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000000")
		_, _ = io.WriteString(w, "some")
		_ = http.NewResponseController(w).Flush()
		stall(w, r)
	}},
	"one byte at a time": {answer: func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			_, _ = io.WriteString(w, "x")
			_ = http.NewResponseController(w).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	}},
	"without end":               {answer: endless, says: "no space left"},
	"without end, compressed":   {answer: compressed, says: "no space left"},
	"ends early":                {answer: rawAnswer("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nsome"), says: "unexpected EOF"},
	"ends in a chunk":           {answer: rawAnswer("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nsome"), says: "unexpected EOF"},
	"a length of 2^63":          {answer: rawAnswer("HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nsome"), says: "Content-Length"},
	"a negative length":         {answer: rawAnswer("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nsome"), says: "Content-Length"},
	"two lengths":               {answer: rawAnswer("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 8\r\n\r\nsomemore"), says: "Content-Length"},
	"more than the length":      {answer: rawAnswer("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsomemore"), gets: "some"},
	"headers without end":       {answer: headers("HTTP/1.1 200 OK\r\n", "X-More: "+strings.Repeat("x", 64<<10)+"\r\n"), says: "server response headers exceeded"},
	"preliminary answers only":  {answer: headers("", "HTTP/1.1 103 Early Hints\r\nX-More: "+strings.Repeat("x", 8<<10)+"\r\n\r\n")},
	"no HTTP":                   {answer: rawAnswer("SSH-2.0-x\r\n"), says: "malformed HTTP"},
	"nothing":                   {answer: rawAnswer(""), says: "EOF"},
	"what nobody has asked for": {answer: rawAnswer("HTTP/1.1 304 Not Modified\r\n\r\n"), says: "not-modified"},
	"429":                       {answer: refusal(http.StatusTooManyRequests), says: "429"},
	"500":                       {answer: refusal(http.StatusInternalServerError), says: "500"},
	"503":                       {answer: refusal(http.StatusServiceUnavailable), says: "503"},
	"redirects to itself":       {answer: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) }, says: "10 redirects"},
	"redirects to what is no HTTP": {answer: func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
	}, says: "unsupported protocol scheme"},
}

// headers sends first, and then more without end.
func headers(first, more string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		for _, err = io.WriteString(conn, first); err == nil; {
			_, err = io.WriteString(conn, more)
		}
	}
}

// compressed sends little that becomes gigabytes when the client expands it.
func compressed(w http.ResponseWriter, r *http.Request) {
	body := zeros(1 << 10)
	w.Header().Set("Content-Encoding", "gzip")
	for r.Context().Err() == nil {
		if _, err := w.Write(body); err != nil {
			return
		}
	}
}

func httpLies(t *testing.T, e *env) {
	e = e.onDisk(t)
	grown := peakMemory(t)
	for name, lie := range lies {
		o := e.oracle(t, allowedLoopback+":0", lie.answer)
		ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
		waits := lie.says == "" && lie.gets == ""
		if waits {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), lieTime/3)
		}
		start := time.Now()
		r := e.BuildContext(t, ctx, build{Dockerfile: "FROM scratch\nADD " + o.URL + "/x /got\n"})
		cancel()
		took := time.Since(start)
		t.Logf("%s: %v: %.200v", name, took.Round(time.Millisecond), r.Err)
		require.Less(t, took, lieTime+10*time.Second, name)
		switch {
		case lie.gets != "":
			require.NoError(t, r.Err, name)
			require.Equal(t, lie.gets, r.Read(t, "got"), name)
		case waits:
			require.ErrorContains(t, r.Err, "DeadlineExceeded", name)
			require.NotEmpty(t, o.Requests(), name)
		default:
			require.ErrorContains(t, r.Err, lie.says, name)
		}
		if r.Err != nil {
			require.Less(t, len(r.Err.Error()), 4<<10, "%s: the error repeats what the server says", name)
			require.NoFileExists(t, fmt.Sprint(r.Dir, "/got"), name)
		}
		if lie.says == "no space left" {
			e.hasSpace(t, name)
		}
	}
	e.hasSpace(t, "all")
	require.Less(t, grown(), int64(256<<20), "memory of the agent")
	e.reclaimed(t)
}
