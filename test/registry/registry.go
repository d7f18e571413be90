// Package registry starts Debian's docker-registry for tests.
package registry

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/bcrypt"
)

// Config says what registry to start.
type Config struct {
	// Host is the address that it listens on; empty: 127.0.0.1.
	Host string
	// User and Password are asked for; empty: nobody is asked.
	User, Password string
}

// Start starts a registry that speaks plain HTTP on a free port, and returns its
// host:port once it answers. It ends with the test.
func Start(t *testing.T, cfg Config) string {
	t.Helper()
	if cfg.Host == "" {
		cfg.Host = "127.0.0.1"
	}
	l, err := net.Listen("tcp", net.JoinHostPort(cfg.Host, "0"))
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	dir := t.TempDir()
	config := fmt.Appendf(nil, "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, addr)
	answers := http.StatusOK
	if cfg.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(cfg.Password), bcrypt.MinCost)
		require.NoError(t, err)
		passwords := filepath.Join(dir, "passwords")
		require.NoError(t, os.WriteFile(passwords, fmt.Appendf(nil, "%s:%s\n", cfg.User, hash), 0o600))
		config = fmt.Appendf(config, "auth: {htpasswd: {realm: private, path: %s}}\n", passwords)
		answers = http.StatusUnauthorized
	}
	file := filepath.Join(dir, "config.yml")
	require.NoError(t, os.WriteFile(file, config, 0o600))
	cmd := exec.Command("docker-registry", "serve", file)
	require.NoError(t, cmd.Start(), "Debian's docker-registry is missing; run `make deps`")
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		r, err := http.Get("http://" + addr + "/v2/")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == answers
	}, 10*time.Second, 20*time.Millisecond, "the registry does not answer")
	return addr
}
