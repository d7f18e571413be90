package server

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"

	"github.com/kiln-build/kiln/agent/auth"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logBuffer is a log that tests read.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// find waits for a record that has all of the texts.
func (l *logBuffer) find(t *testing.T, texts ...string) map[string]any {
	t.Helper()
	var found map[string]any
	require.Eventually(t, func() bool {
		for line := range strings.Lines(l.String()) {
			if containsAll(line, texts) {
				require.NoError(t, json.Unmarshal([]byte(line), &found))
				return true
			}
		}
		return false
	}, 5*time.Second, 5*time.Millisecond, "%q in:\n%s", texts, l)
	return found
}

func containsAll(s string, texts []string) bool {
	for _, text := range texts {
		if !strings.Contains(s, text) {
			return false
		}
	}
	return true
}

// builds is a build API that does what a test needs.
type builds struct {
	agentv1.UnimplementedBuildServiceServer
	hold chan struct{}
}

func (b *builds) GetInfo(ctx context.Context, _ *agentv1.GetInfoRequest) (*agentv1.GetInfoResponse, error) {
	id, _ := auth.FromContext(ctx)
	return &agentv1.GetInfoResponse{Node: id.Name}, nil
}

func (b *builds) StartBuild(context.Context, *agentv1.StartBuildRequest) (*agentv1.StartBuildResponse, error) {
	var none *agentv1.Build
	return &agentv1.StartBuildResponse{Build: &agentv1.Build{BuildId: none.BuildId}}, nil
}

func (b *builds) WatchBuild(_ *agentv1.WatchBuildRequest, ss grpc.ServerStreamingServer[agentv1.WatchBuildResponse]) error {
	select {
	case <-b.hold:
		return nil
	case <-ss.Context().Done():
		return ss.Context().Err()
	}
}

func (b *builds) UploadSource(ss grpc.ClientStreamingServer[agentv1.UploadSourceRequest, agentv1.UploadSourceResponse]) error {
	for {
		if _, err := ss.Recv(); err != nil {
			return err
		}
	}
}

// fixture is a server with what it is made of.
type fixture struct {
	server  *Server
	builds  *builds
	log     *logBuffer
	metrics *prometheus.Registry
	socket  string
}

// start serves on a unix socket; root is the only caller that is known.
func start(t *testing.T, edit func(*Config)) *fixture {
	t.Helper()
	f := &fixture{builds: &builds{hold: make(chan struct{})}, log: &logBuffer{}, metrics: prometheus.NewRegistry(), socket: filepath.Join(t.TempDir(), "dir", "s")}
	cfg := Config{
		Builds: f.builds, Auth: auth.New(auth.Config{}), Credentials: auth.NewTransport(nil, false), Metrics: f.metrics,
		Log: slog.New(slog.NewJSONHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if edit != nil {
		edit(&cfg)
	}
	var err error
	f.server, err = New(cfg)
	require.NoError(t, err)
	l, err := ListenUnix(context.Background(), f.socket, 0o600)
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- f.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		f.server.Stop(ctx)
		require.NoError(t, <-served)
	})
	return f
}

func (f *fixture) dial(t *testing.T, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	opts = append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)
	conn, err := grpc.NewClient("unix://"+f.socket, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// stranger are credentials under which every peer is a user that nobody knows.
type stranger struct {
	credentials.TransportCredentials
}

func (s stranger) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := s.TransportCredentials.ServerHandshake(conn)
	if err == nil {
		cred := info.(auth.PeerCred)
		cred.UID, cred.GID = 4711, 4711
		info = cred
	}
	return c, info, err
}

func short(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}
