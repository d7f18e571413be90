package auth

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent/auth/authtest"
)

func fileOf(fd int) *os.File { return os.NewFile(uintptr(fd), "socket") }

func allowAll(t *testing.T, socket string) {
	t.Helper()
	require.NoError(t, os.Chmod(socket, 0o666))
	for dir := filepath.Dir(socket); dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		require.NoError(t, err)
		require.NoError(t, os.Chmod(dir, st.Mode().Perm()|0o011))
	}
}

// publish replaces the files of a secret as kubelet does: each is a link through
// ..data, which is renamed over.
func publish(t *testing.T, dir, version string, pair authtest.Pair, clients *authtest.CA) {
	t.Helper()
	require.NoError(t, os.Mkdir(filepath.Join(dir, version), 0o755))
	authtest.Write(t, filepath.Join(dir, version), pair, clients)
	require.NoError(t, os.Symlink(version, filepath.Join(dir, "..tmp")))
	require.NoError(t, os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")))
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			require.NoError(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
		}
	}
}

func TestSecretIsReplaced(t *testing.T) {
	server1, server2, clients1, clients2 := authtest.NewCA(t), authtest.NewCA(t), authtest.NewCA(t), authtest.NewCA(t)
	dir := t.TempDir()
	publish(t, dir, "..1", server1.Issue(t, authtest.Leaf{}), clients1)
	keys, err := NewKeyring(filesIn(dir), true, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	keys.every = 0
	_, tcp := serve(t, New(Config{Clients: []ClientRule{{CommonName: "a", Role: RoleController}}}), NewTransport(keys.TLS(), false))
	pair1, pair2 := clients1.Issue(t, authtest.Leaf{CommonName: "a"}), clients2.Issue(t, authtest.Leaf{CommonName: "a"})
	require.WithinDuration(t, time.Now().Add(time.Hour), keys.NotAfter(), time.Minute)
	first := dial(t, tcp, credentials.NewTLS(server1.ClientTLS(t, &pair1)))
	_, err = ask(t, first)
	require.NoError(t, err)

	publish(t, dir, "..2", server2.Issue(t, authtest.Leaf{NotAfter: time.Now().Add(5 * time.Hour)}), clients2)
	require.WithinDuration(t, time.Now().Add(5*time.Hour), keys.NotAfter(), time.Minute)
	_, err = ask(t, dial(t, tcp, credentials.NewTLS(server2.ClientTLS(t, &pair2))))
	require.NoError(t, err, "new keys on both sides")
	_, err = ask(t, dial(t, tcp, credentials.NewTLS(server2.ClientTLS(t, &pair1))))
	require.Equal(t, codes.Unavailable, status.Code(err), "a client of the old authority")
	_, err = ask(t, first)
	require.NoError(t, err, "a connection from before stays")
}

func TestFilesThatCannotBeUsedChangeNothing(t *testing.T) {
	server, clients := authtest.NewCA(t), authtest.NewCA(t)
	tcp, dir, _ := tlsServer(t, Config{Clients: []ClientRule{{CommonName: "a", Role: RoleController}}}, true, server, clients)
	pair := clients.Issue(t, authtest.Leaf{CommonName: "a"})
	works := func() {
		t.Helper()
		_, err := ask(t, dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, &pair))))
		require.NoError(t, err)
	}
	works()
	key, err := os.ReadFile(filepath.Join(dir, "tls.key"))
	require.NoError(t, err)
	for name, data := range map[string][]byte{"tls.key": server.Issue(t, authtest.Leaf{}).Key, "ca.crt": []byte("none"), "tls.crt": nil} {
		before, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
		works()
		require.NoError(t, os.Remove(filepath.Join(dir, name)))
		works()
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), before, 0o600))
		works()
	}
	require.NotEmpty(t, key)
}

func TestKeyringRefuses(t *testing.T) {
	ca := authtest.NewCA(t)
	tests := map[string]func(dir string) error{
		"no key": func(dir string) error { return os.Remove(filepath.Join(dir, "tls.key")) },
		"another's key": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "tls.key"), ca.Issue(t, authtest.Leaf{}).Key, 0o600)
		},
		"empty authority": func(dir string) error { return os.Truncate(filepath.Join(dir, "ca.crt"), 0) },
		"huge file":       func(dir string) error { return os.Truncate(filepath.Join(dir, "ca.crt"), maxPEM+1) },
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			authtest.Write(t, dir, ca.Issue(t, authtest.Leaf{}), ca)
			require.NoError(t, spoil(dir))
			_, err := NewKeyring(filesIn(dir), true, slog.New(slog.DiscardHandler))
			require.ErrorContains(t, err, dir)
		})
	}
}
