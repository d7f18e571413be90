package auth

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/kiln-build/kiln/agent/auth/authtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// whoami is an unknown service to the server, as BuildKit's are, that answers with
// the identity that it sees.
const whoami = "/test.Who/Am"

// serve serves whoami on a unix socket and on loopback, and returns the addresses.
func serve(t *testing.T, a *Authenticator, creds credentials.TransportCredentials) (socket, tcp string) {
	t.Helper()
	s := grpc.NewServer(
		grpc.Creds(creds), grpc.StreamInterceptor(a.Stream()), grpc.UnaryInterceptor(a.Unary()),
		grpc.ConnectionTimeout(2*time.Second),
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			if err := ss.RecvMsg(&emptypb.Empty{}); err != nil {
				return err
			}
			id, ok := FromContext(ss.Context())
			if !ok {
				return ss.SendMsg(wrapperspb.String("nobody"))
			}
			return ss.SendMsg(wrapperspb.String(id.Name + " " + string(id.Role) + " " + id.Tenant))
		}))
	socket = filepath.Join(t.TempDir(), "s")
	var served []chan error
	for _, at := range [][2]string{{"unix", socket}, {"tcp", "127.0.0.1:0"}} {
		l, err := net.Listen(at[0], at[1])
		require.NoError(t, err)
		tcp = l.Addr().String()
		done := make(chan error, 1)
		go func() { done <- s.Serve(l) }()
		served = append(served, done)
	}
	t.Cleanup(func() {
		s.Stop()
		for _, done := range served {
			require.NoError(t, <-done)
		}
	})
	return socket, tcp
}

// ask calls whoami.
func ask(t *testing.T, conn *grpc.ClientConn, md ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var out wrapperspb.StringValue
	err := conn.Invoke(metadata.AppendToOutgoingContext(ctx, md...), whoami, &emptypb.Empty{}, &out)
	return out.Value, err
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	conn, err := grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(creds))...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// tlsServer serves with keys in a new directory, and returns that too.
func tlsServer(t *testing.T, cfg Config, certificateNeeded bool, server, clients *authtest.CA) (tcp, dir string, keys *Keyring) {
	t.Helper()
	dir = t.TempDir()
	authtest.Write(t, dir, server.Issue(t, authtest.Leaf{}), clients)
	keys, err := NewKeyring(filesIn(dir), certificateNeeded, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	keys.every = 0
	_, tcp = serve(t, New(cfg), NewTransport(keys.TLS(), false))
	return tcp, dir, keys
}

func filesIn(dir string) Files {
	return Files{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ClientCAs: []string{filepath.Join(dir, "ca.crt")}}
}

func message(err error) string { return status.Convert(err).Message() }
