package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// lineRate is what the slow line takes in a second, in bytes.
const lineRate = 200 << 10

// testSlowUpload sends a context over a line on which it takes longer than the API server
// lets a request be, and whose connections are cut.
func testSlowUpload(t *testing.T, in *installation) {
	api, err := url.Parse(in.server(t))
	require.NoError(t, err)
	line := newSlowLine(t, api.Host)
	in.kubectl(t, "create", "serviceaccount", "far", "-n", namespace)
	in.kubectl(t, "create", "rolebinding", "far", "-n", namespace, "--clusterrole=edit", "--serviceaccount="+namespace+":far")
	config := in.userConfigAt(t, "far", "https://"+line.address())

	size := int64(1.5 * requestTimeout.Seconds() * lineRate)
	data := make([]byte, size)
	_, err = rand.Read(data)
	require.NoError(t, err)
	t.Run("as one request", func(t *testing.T) {
		if os.Getenv(clusterEnv) != "" {
			t.Skip("the API server of that cluster may let a request be longer")
		}
		sum := sha256.Sum256(data)
		in.apply(t, manifest("far-once", "  source: {upload: {digest: \"sha256:"+hex.EncodeToString(sum[:])+"\"}}\n"))
		require.Eventually(t, func() bool { return reason(in.get(t, "far-once")) == buildv1.ReasonAwaitingUpload }, time.Minute, 200*time.Millisecond)
		began := time.Now()
		code, err := putAll(t, config, "far-once", data)
		t.Logf("status %d, %v, after %s", code, err, time.Since(began).Round(100*time.Millisecond))
		if err == nil {
			require.Equal(t, http.StatusGatewayTimeout, code)
		}
		require.Equal(t, buildv1.ReasonAwaitingUpload, reason(in.get(t, "far-once")))
		in.kubectl(t, "delete", "build", "far-once", "-n", namespace, "--timeout=60s")
	})
	t.Run("as kiln submit does", func(t *testing.T) {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "data"), data, 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(in.dockerfile(fmt.Sprintf(`test "$(wc -c < /src/data)" -eq %d`, size))), 0o644))
		before := line.sent.Load()
		began := time.Now()
		cut := time.AfterFunc(requestTimeout/2, line.cut)
		defer cut.Stop()
		_, progress, err := in.kiln("submit", "--kubeconfig", config, "-n", namespace, "--progress", "plain", "--name", "far", dir)
		require.NoError(t, err, progress)
		took, sent := time.Since(began), line.sent.Load()-before
		t.Logf("%d bytes, of which %d were sent in %s", size, sent, took.Round(100*time.Millisecond))
		require.Greater(t, took, requestTimeout)
		require.Less(t, sent, size+size/2, "it does not start again from the beginning")
	})
}

// putAll uploads data for a build in one request.
func putAll(t *testing.T, kubeconfig, build string, data []byte) (int, error) {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	require.NoError(t, err)
	client, err := rest.HTTPClientFor(config)
	require.NoError(t, err)
	defer client.CloseIdleConnections()
	address := config.Host + "/apis/" + buildv1.SubresourcesGroup + "/v1alpha1/namespaces/" + namespace + "/builds/" + build + "/upload"
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, address, bytes.NewReader(data))
	require.NoError(t, err)
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// slowLine forwards connections slowly in the direction of the server.
type slowLine struct {
	listener net.Listener
	target   string
	sent     atomic.Int64 // bytes that went to the server

	mu    sync.Mutex
	open  map[net.Conn]bool // guarded by mu; of clients
	works sync.WaitGroup
}

func newSlowLine(t *testing.T, target string) *slowLine {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	line := &slowLine{listener: l, target: target, open: map[net.Conn]bool{}}
	line.works.Go(line.accept)
	t.Cleanup(func() {
		_ = l.Close()
		line.cut()
		line.works.Wait()
	})
	return line
}

func (s *slowLine) address() string { return s.listener.Addr().String() }

func (s *slowLine) accept() {
	for {
		client, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.open[client] = true
		s.mu.Unlock()
		s.works.Go(func() { s.forward(client) })
	}
}

// cut closes all connections.
func (s *slowLine) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		_ = c.Close()
	}
}

func (s *slowLine) forward(client net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.open, client)
		s.mu.Unlock()
		_ = client.Close()
	}()
	server, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(context.Background(), "tcp", s.target)
	if err != nil {
		return
	}
	defer server.Close()
	// What is on the way is little, so that the client sees how slow the line is.
	_ = client.(*net.TCPConn).SetReadBuffer(16 << 10)
	s.works.Go(func() {
		_, _ = io.Copy(client, server)
		_ = client.Close()
	})
	buf := make([]byte, 8<<10)
	for {
		n, err := client.Read(buf)
		if n > 0 {
			time.Sleep(time.Duration(n) * time.Second / lineRate)
			s.sent.Add(int64(n))
			if _, err := server.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
