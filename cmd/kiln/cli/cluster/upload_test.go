package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// receiver takes an upload as the subresource does: it keeps what arrives, in order.
type receiver struct {
	total int64
	data  []byte
	sent  int64 // bytes that clients sent, with those that were not taken
	calls int
	// fault, if not nil, is called first; what it answers is the answer.
	fault func(call int, w http.ResponseWriter, r *http.Request) bool
	build *buildv1.Build // for who asks
}

func (s *receiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == builds && r.Method == http.MethodGet {
		answer(w, http.StatusOK, s.build)
		return
	}
	if r.URL.Path != logs+"/upload" || r.Method != http.MethodPut {
		refuse(w, http.StatusNotFound)
		return
	}
	s.calls++
	if s.fault != nil && s.fault(s.calls, w, r) {
		return
	}
	s.take(w, r, r.Body)
}

// take takes a part, of which body may be only the beginning.
func (s *receiver) take(w http.ResponseWriter, r *http.Request, body io.Reader) {
	var first, last, total int64
	n, _ := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &total)
	if n == 0 {
		_, err := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes */%d", &total)
		if err != nil || r.ContentLength != 0 {
			refuse(w, http.StatusBadRequest)
			return
		}
		first = int64(len(s.data))
	} else if r.ContentLength != last-first+1 {
		refuse(w, http.StatusBadRequest)
		return
	}
	if total != s.total {
		refuse(w, http.StatusBadRequest)
		return
	}
	part, err := io.ReadAll(body)
	s.sent += int64(len(part))
	code := http.StatusAccepted
	if first == int64(len(s.data)) {
		s.data = append(s.data, part...)
	} else {
		code = http.StatusRequestedRangeNotSatisfiable
	}
	if err != nil {
		refuse(w, http.StatusGatewayTimeout)
		return
	}
	if int64(len(s.data)) == s.total {
		answer(w, http.StatusOK, metav1.Status{Status: "Success"})
		return
	}
	w.Header().Set("Upload-Offset", strconv.Itoa(len(s.data)))
	answer(w, code, metav1.Status{Status: "Success"})
}

// cut takes some of a part and closes the connection.
func (s *receiver) cut(w http.ResponseWriter, r *http.Request, n int64) bool {
	s.take(discard{}, r, io.LimitReader(r.Body, n))
	panic(http.ErrAbortHandler)
}

// discard is an answer that is lost.
type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) WriteHeader(int)             {}

func random(t *testing.T, n int) []byte {
	t.Helper()
	data := make([]byte, n)
	_, err := rand.NewChaCha8([32]byte{1}).Read(data)
	require.NoError(t, err)
	return data
}

func TestUploadGoesOnWhereItWas(t *testing.T) {
	data := random(t, 20<<20)
	for name, c := range map[string]struct {
		fault func(s *receiver, call int, w http.ResponseWriter, r *http.Request) bool
		again bool // some bytes have to be sent again
	}{
		"nothing happens": {fault: func(*receiver, int, http.ResponseWriter, *http.Request) bool { return false }},
		"connections are cut": {fault: func(s *receiver, call int, w http.ResponseWriter, r *http.Request) bool {
			return call%2 == 1 && call < 8 && s.cut(w, r, rand.Int64N(3<<20))
		}},
		"the API server is away": {fault: func(_ *receiver, call int, w http.ResponseWriter, _ *http.Request) bool {
			if call == 1 || call == 4 || call == 5 {
				refuse(w, http.StatusServiceUnavailable)
				return true
			}
			return false
		}},
		"the answer to every other part is lost": {fault: func(s *receiver, call int, w http.ResponseWriter, r *http.Request) bool {
			return call%2 == 1 && r.ContentLength > 0 && s.cut(w, r, r.ContentLength)
		}},
		"the agent has lost what it had": {again: true, fault: func(s *receiver, call int, _ http.ResponseWriter, _ *http.Request) bool {
			if call == 2 {
				s.data = nil
			}
			return false
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &receiver{total: int64(len(data))}
			s.fault = func(call int, w http.ResponseWriter, r *http.Request) bool { return c.fault(s, call, w, r) }
			client := serve(t, s)
			require.NoError(t, client.Upload(t.Context(), "b", bytes.NewReader(data), s.total))
			require.True(t, bytes.Equal(data, s.data))
			if !c.again {
				require.Equal(t, s.total, s.sent, "nothing is sent twice")
			}
		})
	}
}

// TestUploadOverASlowLine has a server that takes 2 MiB in a second and ends a request
// after half a second.
func TestUploadOverASlowLine(t *testing.T) {
	data := random(t, 6<<20)
	s := &receiver{total: int64(len(data))}
	s.fault = func(_ int, w http.ResponseWriter, r *http.Request) bool {
		s.take(w, r, &slow{r.Body, time.Now().Add(500 * time.Millisecond)})
		return true
	}
	c := serve(t, s)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, c.streams.Put().Namespace("team").Resource("builds").Name("b").SubResource("upload").URL().String(), bytes.NewReader(data))
	require.NoError(t, err)
	req.Header.Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(data)-1, len(data)))
	resp, err := c.http.Do(req)
	if err == nil { // the answer may be lost in what is still being sent
		require.Equal(t, http.StatusGatewayTimeout, resp.StatusCode, "all at once takes too long")
		require.NoError(t, resp.Body.Close())
	}
	s.data = nil
	require.NoError(t, c.Upload(t.Context(), "b", bytes.NewReader(data), s.total))
	require.True(t, bytes.Equal(data, s.data))
}

// slow is a body that arrives slowly until a deadline.
type slow struct {
	io.Reader
	until time.Time
}

func (s *slow) Read(p []byte) (int, error) {
	if time.Now().After(s.until) {
		return 0, context.DeadlineExceeded
	}
	time.Sleep(10 * time.Millisecond)
	return s.Reader.Read(p[:min(len(p), 20<<10)])
}

func TestUploadEnds(t *testing.T) {
	ended := build(metav1.ConditionFalse, buildv1.ReasonCancelled)
	ended.Status.StartTime = nil
	for name, c := range map[string]struct {
		fault http.HandlerFunc
		build *buildv1.Build
		want  string
	}{
		"forbidden":                {fault: func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusForbidden) }, want: "upload source of build b: no"},
		"another digest":           {fault: func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusBadRequest) }, want: "upload source of build b: no"},
		"the build was cancelled":  {fault: func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusConflict) }, build: ended, want: "upload source of build b: no"},
		"the build has its source": {fault: func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusConflict) }, build: build(metav1.ConditionUnknown, buildv1.ReasonRunning)},
	} {
		t.Run(name, func(t *testing.T) {
			s := &receiver{total: 7, build: c.build}
			s.fault = func(_ int, w http.ResponseWriter, r *http.Request) bool { c.fault(w, r); return true }
			err := serve(t, s).Upload(t.Context(), "b", strings.NewReader("archive"), 7)
			require.Equal(t, 1, s.calls)
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestUploadHasPatience(t *testing.T) {
	offset := func(value string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Upload-Offset", value)
			answer(w, http.StatusAccepted, metav1.Status{})
		}
	}
	for name, c := range map[string]struct {
		fault http.HandlerFunc
		want  string
	}{
		"the server is away":      {func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusServiceUnavailable) }, "nothing has arrived after byte 0 of 7: no"},
		"the server takes none":   {offset("0"), "nothing has arrived after byte 0 of 7: the server does not go on"},
		"the server never ends":   {offset("7"), "nothing has arrived after byte 7 of 7: the server does not go on"},
		"an offset beyond":        {offset("8"), `Upload-Offset "8", which is no place in 7 bytes`},
		"an offset that is none":  {offset("x"), `Upload-Offset "x", which is no place in 7 bytes`},
		"every connection is cut": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "nothing has arrived after byte 0 of 7"},
	} {
		t.Run(name, func(t *testing.T) {
			client := serve(t, c.fault)
			u := &uploading{client: client, archive: strings.NewReader("archive"), size: 7, patience: 500 * time.Millisecond}
			u.url = client.streams.Put().Namespace("team").Resource("builds").Name("b").SubResource("upload").URL().String()
			require.ErrorContains(t, u.run(t.Context()), c.want)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			u.patience = time.Hour
			require.ErrorIs(t, u.run(ctx), context.DeadlineExceeded)
		})
	}
}

func TestPartsFitTheLine(t *testing.T) {
	for _, c := range []struct {
		part, n int64
		took    time.Duration
		want    int64
	}{
		{4 << 20, 4 << 20, 4 * time.Second, 4 << 20},
		{4 << 20, 4 << 20, 8 * time.Second, 2 << 20},
		{4 << 20, 1 << 20, 2 * time.Second, 2 << 20},     // it was cut off, or the last
		{4 << 20, 4 << 20, time.Minute, 1 << 20},         // not at once
		{4 << 20, 4 << 20, time.Millisecond, 16 << 20},   // nor up
		{64 << 20, 64 << 20, time.Millisecond, 64 << 20}, // as large as may be
		{64 << 10, 64 << 10, time.Minute, 64 << 10},      // as small
	} {
		require.Equal(t, c.want, fit(c.part, c.n, c.took), "%d bytes of %d in %s", c.n, c.part, c.took)
	}
}
