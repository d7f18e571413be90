package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent/auth/authtest"
)

// dialAs connects to a unix socket as another user: the kernel takes the IDs of the
// thread that connects.
func dialAs(uid, gid int, socket string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	out := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its IDs
		for _, call := range [][2]uintptr{{unix.SYS_SETRESGID, uintptr(gid)}, {unix.SYS_SETRESUID, uintptr(uid)}} {
			if _, _, errno := unix.RawSyscall(call[0], call[1], call[1], call[1]); errno != 0 {
				out <- result{nil, errno}
				return
			}
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
		}
		if err != nil {
			out <- result{nil, err}
			return
		}
		f := fileOf(fd)
		defer f.Close()
		conn, err := net.FileConn(f)
		out <- result{conn, err}
	}()
	r := <-out
	return r.conn, r.err
}

func TestUnixPeers(t *testing.T) {
	a := New(Config{Peers: []PeerRule{
		{},
		{UID: new(uint32(1000)), GID: new(uint32(7)), Tenant: "both"},
		{UID: new(uint32(1000)), Tenant: "dev"},
		{GID: new(uint32(2000)), Tenant: "ci"},
	}})
	socket, _ := serve(t, a, NewTransport(nil, false))
	allowAll(t, socket)
	tests := []struct {
		name     string
		uid, gid int
		want     string
	}{
		{"root is admin", 0, 0, "uid:0 admin default"},
		{"a listed user", 1000, 1000, "uid:1000 tenant dev"},
		{"user and group", 1000, 7, "uid:1000 tenant both"},
		{"a listed group", 1001, 2000, "uid:1001 tenant ci"},
		{"anyone else", 1001, 1001, ""},
		{"group of root is nobody", 1001, 0, ""},
		{"IDs without a mapping", 65534, 65534, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn := dial(t, "passthrough:agent", nil, grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				return dialAs(tt.uid, tt.gid, socket)
			}))
			got, err := ask(t, conn, "authorization", "Bearer a token does not count here")
			require.Equal(t, tt.want, got)
			if tt.want == "" {
				require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
			} else {
				require.NoError(t, err)
			}
		})
	}
}

func TestPlainTCP(t *testing.T) {
	_, tcp := serve(t, New(Config{InsecureLoopback: true}), NewTransport(nil, true))
	got, err := ask(t, dial(t, tcp, nil))
	require.NoError(t, err)
	require.Equal(t, "loopback tenant default", got)

	_, tcp = serve(t, New(Config{}), NewTransport(nil, false))
	_, err = ask(t, dial(t, tcp, nil))
	require.Equal(t, codes.Unavailable, status.Code(err), "no handshake")

	_, tcp = serve(t, New(Config{}), NewTransport(nil, true))
	_, err = ask(t, dial(t, tcp, nil))
	require.Equal(t, codes.Unauthenticated, status.Code(err), "the rules have the last word")
}

func TestClientCertificates(t *testing.T) {
	server, clients, other := authtest.NewCA(t), authtest.NewCA(t), authtest.NewCA(t)
	tcp, _, _ := tlsServer(t, Config{Clients: []ClientRule{
		{Role: RoleController},
		{CommonName: "controller", Role: RoleController},
		{URI: "spiffe://x/ns/team-a", Role: RoleTenant, Tenant: "team-a"},
		{CommonName: "ci", Organization: "team-b", Role: RoleTenant, Tenant: "team-b"},
		{Organization: "team-c", Role: RoleTenant, Tenant: "team-c"},
	}}, true, server, clients)
	const noHandshake = codes.Unavailable
	tests := []struct {
		name string
		ca   *authtest.CA
		leaf authtest.Leaf
		want string
		code codes.Code
	}{
		{"controller", clients, authtest.Leaf{CommonName: "controller"}, "cn:controller controller ", codes.OK},
		{"by URI", clients, authtest.Leaf{URI: "spiffe://x/ns/team-a"}, "uri:spiffe://x/ns/team-a tenant team-a", codes.OK},
		{"by two names", clients, authtest.Leaf{CommonName: "ci", Organization: []string{"z", "team-b"}}, "cn:ci tenant team-b", codes.OK},
		{"by organization", clients, authtest.Leaf{CommonName: "x", Organization: []string{"team-c"}}, "cn:x tenant team-c", codes.OK},
		{"one of two names", clients, authtest.Leaf{CommonName: "ci"}, "", codes.PermissionDenied},
		{"another name", clients, authtest.Leaf{CommonName: "controller2"}, "", codes.PermissionDenied},
		{"name in other case", clients, authtest.Leaf{CommonName: "Controller"}, "", codes.PermissionDenied},
		{"longer URI", clients, authtest.Leaf{URI: "spiffe://x/ns/team-a/x"}, "", codes.PermissionDenied},
		{"no name at all", clients, authtest.Leaf{}, "", codes.PermissionDenied},
		{"another authority", other, authtest.Leaf{CommonName: "controller"}, "", noHandshake},
		{"the server's authority", server, authtest.Leaf{CommonName: "controller"}, "", noHandshake},
		{"expired", clients, authtest.Leaf{CommonName: "controller", NotAfter: time.Now().Add(-time.Minute)}, "", noHandshake},
		{"a server's certificate", clients, authtest.Leaf{CommonName: "controller", Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, "", noHandshake},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pair := tt.ca.Issue(t, tt.leaf)
			got, err := ask(t, dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, &pair))))
			require.Equal(t, tt.code, status.Code(err), "%v", err)
			require.Equal(t, tt.want, got)
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		_, err := ask(t, dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, nil))))
		require.Equal(t, noHandshake, status.Code(err))
	})
	t.Run("no TLS", func(t *testing.T) {
		_, err := ask(t, dial(t, tcp, nil))
		require.Equal(t, noHandshake, status.Code(err))
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		pair := clients.Issue(t, authtest.Leaf{CommonName: "controller"})
		cfg := server.ClientTLS(t, &pair)
		cfg.MaxVersion = tls.VersionTLS12
		_, err := ask(t, dial(t, tcp, credentials.NewTLS(cfg)))
		require.Equal(t, noHandshake, status.Code(err))
	})
	t.Run("token that is not asked for", func(t *testing.T) {
		pair := clients.Issue(t, authtest.Leaf{CommonName: "controller"})
		_, err := ask(t, dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, &pair))), "authorization", "Bearer x")
		require.Equal(t, codes.Unauthenticated, status.Code(err))
	})
}

// TestCertificateThatExpires lets a connection outlive its certificate.
func TestCertificateThatExpires(t *testing.T) {
	server, clients := authtest.NewCA(t), authtest.NewCA(t)
	now := time.Now()
	tcp, _, _ := tlsServer(t, Config{
		Clients: []ClientRule{{CommonName: "a", Role: RoleTenant, Tenant: "a"}}, Now: func() time.Time { return now },
	}, true, server, clients)
	pair := clients.Issue(t, authtest.Leaf{CommonName: "a"})
	conn := dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, &pair)))
	_, err := ask(t, conn)
	require.NoError(t, err)
	now = now.Add(2 * time.Hour)
	_, err = ask(t, conn)
	require.Equal(t, codes.Unauthenticated, status.Code(err))
	require.Contains(t, message(err), "expired")
}
