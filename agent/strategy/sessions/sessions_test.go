package sessions

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/session/upload"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve returns a connection to what serves a loan.
func serve(t *testing.T, l *Loan) *grpc.ClientConn {
	t.Helper()
	attachables, err := l.Attachables()
	require.NoError(t, err)
	server := grpc.NewServer()
	for _, a := range attachables {
		a.Register(server)
	}
	listener := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		server.Stop()
		<-done
	})
	return conn
}

func TestRegistryCredentialsByHost(t *testing.T) {
	l := &Loan{Registries: map[string]Credential{
		"docker.io": {Username: "hub", Password: "p"}, "r.example.com:5000": {Username: "u", Password: "p", IdentityToken: "token"},
	}}
	c := auth.NewAuthClient(serve(t, l))
	for host, want := range map[string][2]string{
		"registry-1.docker.io": {"hub", "p"}, "r.example.com:5000": {"", "token"}, "r.example.com": {}, "": {}, "evil.registry-1.docker.io": {},
	} {
		got, err := c.Credentials(t.Context(), &auth.CredentialsRequest{Host: host})
		require.NoError(t, err)
		require.Equal(t, want, [2]string{got.Username, got.Secret}, host)
	}
	_, err := c.GetTokenAuthority(t.Context(), &auth.GetTokenAuthorityRequest{Host: "docker.io"})
	require.Equal(t, codes.Unimplemented, status.Code(err), "the engine fetches tokens itself")
	l.Close()
	_, err = c.Credentials(t.Context(), &auth.CredentialsRequest{Host: "docker.io"})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
}

func TestSecretsByID(t *testing.T) {
	l := &Loan{Secrets: map[string][]byte{"a": []byte("x"), "empty": {}}}
	c := secrets.NewSecretsClient(serve(t, l))
	for id, want := range map[string]string{"a": "x", "empty": ""} {
		got, err := c.GetSecret(t.Context(), &secrets.GetSecretRequest{ID: id})
		require.NoError(t, err)
		require.Equal(t, want, string(got.Data))
	}
	_, err := c.GetSecret(t.Context(), &secrets.GetSecretRequest{ID: "b"})
	require.Equal(t, codes.NotFound, status.Code(err))
	l.Close()
	_, err = c.GetSecret(t.Context(), &secrets.GetSecretRequest{ID: "a"})
	require.Equal(t, codes.NotFound, status.Code(err))
}

func TestUploadsByName(t *testing.T) {
	dir := t.TempDir()
	content := bytes.Repeat([]byte("0123456789"), 300_000)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), content, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o600))
	l := &Loan{Uploads: map[string]string{"name": filepath.Join(dir, "a"), "gone": filepath.Join(dir, "gone")}}
	c := upload.NewUploadClient(serve(t, l))
	pull := func(path string) ([]byte, error) {
		stream, err := c.Pull(metadata.AppendToOutgoingContext(t.Context(), "urlpath", path))
		require.NoError(t, err)
		var out []byte
		for {
			m, err := stream.Recv()
			if err == io.EOF {
				return out, nil
			}
			if err != nil {
				return nil, err
			}
			out = append(out, m.Data...)
		}
	}
	for range 2 {
		got, err := pull("/name")
		require.NoError(t, err)
		require.True(t, bytes.Equal(content, got))
	}
	for _, path := range []string{"", "/", "/other", "/../" + dir + "/secret", "/secret", "/gone"} {
		_, err := pull(path)
		require.Error(t, err, path)
	}
	l.Close()
	_, err := pull("/name")
	require.Equal(t, codes.NotFound, status.Code(err))
}

func newKey(t *testing.T, passphrase string) (ssh.PublicKey, []byte) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	var block *pem.Block
	if passphrase == "" {
		block, err = ssh.MarshalPrivateKey(key, "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(passphrase))
	}
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	require.NoError(t, err)
	return signer.PublicKey(), pem.EncodeToMemory(block)
}

// stream is a forwarded connection to an SSH agent.
type stream struct {
	sshforward.SSH_ForwardAgentClient
	rest []byte
}

func (s *stream) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		m, err := s.Recv()
		if err != nil {
			return 0, err
		}
		s.rest = m.Data
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *stream) Write(p []byte) (int, error) {
	return len(p), s.Send(&sshforward.BytesMessage{Data: bytes.Clone(p)})
}

func TestSSHAgentSignsAndGivesNothingElse(t *testing.T) {
	public, file := newKey(t, "")
	l := &Loan{SSHKeys: map[string][]byte{"id": file}}
	c := sshforward.NewSSHClient(serve(t, l))
	_, err := c.CheckAgent(t.Context(), &sshforward.CheckAgentRequest{ID: "id"})
	require.NoError(t, err)
	for _, id := range []string{"", "default", "other"} {
		_, err := c.CheckAgent(t.Context(), &sshforward.CheckAgentRequest{ID: id})
		require.Equal(t, codes.NotFound, status.Code(err))
	}
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), sshforward.KeySSHID, "id"))
	defer cancel()
	forwarded, err := c.ForwardAgent(ctx)
	require.NoError(t, err)
	client := agent.NewClient(&stream{SSH_ForwardAgentClient: forwarded})
	keys, err := client.List()
	require.NoError(t, err)
	require.Len(t, keys, 1)
	sig, err := client.Sign(public, []byte("data"))
	require.NoError(t, err)
	require.NoError(t, public.Verify([]byte("data"), sig))
	require.Error(t, client.RemoveAll())
	require.Error(t, client.Lock([]byte("x")))
	_, other, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	require.Error(t, client.Add(agent.AddedKey{PrivateKey: other}))
	keys, err = client.List()
	require.NoError(t, err)
	require.Len(t, keys, 1)
	require.NoError(t, forwarded.CloseSend())

	l.Close()
	_, err = c.CheckAgent(t.Context(), &sshforward.CheckAgentRequest{ID: "id"})
	require.Equal(t, codes.NotFound, status.Code(err))
}

func TestSSHKeysThatCannotBeUsed(t *testing.T) {
	_, locked := newKey(t, "hunter2")
	for want, file := range map[string][]byte{
		"has a passphrase": locked, "is not a private key": []byte("hunter2"), "not a private key": nil,
	} {
		_, err := (&Loan{SSHKeys: map[string][]byte{"id": file}}).Attachables()
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "hunter2")
	}
}
