package controller

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// uploader sends parts of an archive through the API server.
type uploader struct {
	t       *testing.T
	client  *http.Client
	url     string
	content []byte
}

// put sends a request and returns the status and the offset of its answer, or an error
// when the connection was lost.
func (u *uploader) put(query, contentRange string, length int, body io.Reader) (code int, offset string, err error) {
	u.t.Helper()
	req, err := http.NewRequestWithContext(u.t.Context(), http.MethodPut, u.url+query, io.NopCloser(body))
	require.NoError(u.t, err)
	req.ContentLength = int64(length)
	if length == 0 {
		req.Body = http.NoBody
	}
	if contentRange != "" {
		req.Header.Set("Content-Range", contentRange)
	}
	resp, err := u.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	status := metav1.Status{}
	require.NoError(u.t, json.NewDecoder(resp.Body).Decode(&status))
	require.EqualValues(u.t, resp.StatusCode, status.Code)
	return resp.StatusCode, resp.Header.Get(v1alpha1.UploadOffsetHeader), nil
}

// part sends bytes of the archive from an offset up to another.
func (u *uploader) part(from, to int) (code int, offset string) {
	u.t.Helper()
	code, offset, err := u.put("", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(u.content)), to-from, bytes.NewReader(u.content[from:to]))
	require.NoError(u.t, err)
	return code, offset
}

// ask asks how much has arrived.
func (u *uploader) ask() (code int, offset string) {
	u.t.Helper()
	code, offset, err := u.put("", fmt.Sprintf("bytes */%d", len(u.content)), 0, http.NoBody)
	require.NoError(u.t, err)
	return code, offset
}

// throttled is a body that arrives slowly.
type throttled struct{ io.Reader }

func (s throttled) Read(p []byte) (int, error) {
	time.Sleep(50 * time.Millisecond)
	return s.Reader.Read(p[:min(len(p), 32<<10)])
}

func TestUploadInPartsThroughTheAPIServer(t *testing.T) {
	cfg := testConfig(t)
	cfg.Subresources.MaxUploadBytes = 8 << 20
	serveAPIServer(t, cfg)
	runController(t, cfg)
	startAgent(t, 1)
	ns := namespace(t, nil)
	alice := user(t, "alice", ns, "kiln-user")
	awaitAPIService(t, alice)
	restConfig, err := cluster.User("alice")
	require.NoError(t, err)
	client, err := rest.HTTPClientFor(restConfig)
	require.NoError(t, err)
	defer client.CloseIdleConnections()
	server, _, err := rest.DefaultServerUrlFor(restConfig)
	require.NoError(t, err)
	begin := func(name string) (*uploader, *v1alpha1.Build) {
		u := &uploader{t: t, client: client, url: server.JoinPath(streams, ns, "builds", name, "upload").String(), content: bytes.Repeat([]byte(name), 1<<20)}
		sum := sha256.Sum256(u.content)
		b := newBuild(ns, name, "ok")
		b.Spec.Source = &v1alpha1.Source{Upload: &v1alpha1.UploadSource{Digest: "sha256:" + hex.EncodeToString(sum[:])}}
		await(t, create(t, b), v1alpha1.ReasonAwaitingUpload)
		return u, b
	}
	expect := func(code int, offset int) func(int, string) {
		return func(gotCode int, gotOffset string) {
			t.Helper()
			require.Equal(t, code, gotCode)
			if offset >= 0 {
				require.Equal(t, strconv.Itoa(offset), gotOffset)
			}
		}
	}
	t.Run("each part where the last one ended", func(t *testing.T) {
		u, b := begin("app")
		all := len(u.content)
		expect(http.StatusAccepted, 0)(u.ask())
		expect(http.StatusAccepted, 1000)(u.part(0, 1000))
		expect(http.StatusRequestedRangeNotSatisfiable, 1000)(u.part(0, 999))
		expect(http.StatusRequestedRangeNotSatisfiable, 1000)(u.part(500, 1500))
		expect(http.StatusRequestedRangeNotSatisfiable, 1000)(u.part(1001, all))
		expect(http.StatusAccepted, 1<<20)(u.part(1000, 1<<20))
		code, _, err := u.put("", fmt.Sprintf("bytes 0-0/%d", 8<<20+1), 1, bytes.NewReader(u.content[:1]))
		require.NoError(t, err)
		require.Equal(t, http.StatusRequestEntityTooLarge, code)
		code, _, err = u.put("", "bytes 0-0", 1, bytes.NewReader(u.content[:1]))
		require.NoError(t, err)
		require.Equal(t, http.StatusBadRequest, code)
		expect(http.StatusOK, -1)(u.part(1<<20, all))
		await(t, b, v1alpha1.ReasonSucceeded)
		expect(http.StatusConflict, -1)(u.ask())
	})
	t.Run("another digest", func(t *testing.T) {
		u, _ := begin("bad")
		all := len(u.content)
		expect(http.StatusAccepted, 1000)(u.part(0, 1000))
		u.content = bytes.Clone(u.content)
		u.content[2000]++
		expect(http.StatusBadRequest, -1)(u.part(1000, all))
		expect(http.StatusAccepted, 0)(u.ask())
	})
	t.Run("longer than the API server lets a request be", func(t *testing.T) {
		u, b := begin("slow")
		all := len(u.content)
		// The user may ask for a shorter time than --request-timeout.
		const limit = "?timeout=3s"
		slowly := func(contentRange string, from, to int) (int, string) {
			code, offset, err := u.put(limit, contentRange, to-from, throttled{bytes.NewReader(u.content[from:to])})
			if err != nil {
				return http.StatusGatewayTimeout, "" // the answer was lost in what was being sent
			}
			return code, offset
		}
		expect(http.StatusGatewayTimeout, -1)(slowly("", 0, all))
		expect(http.StatusGatewayTimeout, -1)(slowly("", 0, all))
		calls, offset := 0, 0
		for code := 0; code != http.StatusOK; calls++ {
			require.Less(t, calls, 40)
			code, _ = slowly(fmt.Sprintf("bytes %d-%d/%d", offset, all-1, all), offset, all)
			if code == http.StatusOK {
				break
			}
			require.Equal(t, http.StatusGatewayTimeout, code)
			var now string
			require.Eventually(t, func() bool { // until the controller knows it too
				code, now = u.ask()
				return code == http.StatusOK || code == http.StatusAccepted && now != strconv.Itoa(offset)
			}, 10*time.Second, 100*time.Millisecond)
			if code == http.StatusAccepted {
				offset, err = strconv.Atoi(now)
				require.NoError(t, err)
			}
		}
		require.Positive(t, calls, "no request was ended by the API server")
		await(t, b, v1alpha1.ReasonSucceeded)
	})
	t.Run("of a build that is cancelled", func(t *testing.T) {
		u, b := begin("end")
		expect(http.StatusAccepted, 1000)(u.part(0, 1000))
		cancelled := get(t, b)
		cancelled.Spec.State = v1alpha1.StateCancelled
		require.NoError(t, api.Update(context.Background(), cancelled))
		expect(http.StatusConflict, -1)(u.part(1000, 2000))
	})
}
