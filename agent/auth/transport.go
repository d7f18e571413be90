package auth

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// PeerCred is what the kernel says of the process at the other end of a unix
// socket at the time that it connected.
type PeerCred struct {
	credentials.CommonAuthInfo
	UID, GID uint32
	PID      int32
}

// AuthType names the way of authentication.
func (PeerCred) AuthType() string { return "peercred" }

// Plain is a connection on loopback that nothing is known of.
type Plain struct{ credentials.CommonAuthInfo }

// AuthType names the way of authentication.
func (Plain) AuthType() string { return "plain" }

// transport makes the handshake of each kind of connection that the agent
// accepts. All other kinds are refused.
type transport struct {
	// tls is for TCP; nil: TCP is refused unless plain is set.
	tls credentials.TransportCredentials
	// plain accepts TCP from loopback without TLS.
	plain bool
}

// NewTransport returns the credentials of a gRPC server that listens on a unix
// socket, on TCP, or both. TCP connections speak TLS with config. A nil config
// refuses them, unless insecureLoopback is set: then those from loopback are
// accepted as they are.
func NewTransport(config *tls.Config, insecureLoopback bool) credentials.TransportCredentials {
	t := &transport{}
	switch {
	case config != nil:
		t.tls = credentials.NewTLS(config)
	case insecureLoopback:
		t.plain = true
	}
	return t
}

// ServerHandshake authenticates the other end of conn.
func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if u, ok := conn.(*net.UnixConn); ok {
		cred, err := peerCred(u)
		if err != nil {
			return nil, nil, err
		}
		return conn, cred, nil
	}
	remote, ok := conn.RemoteAddr().(*net.TCPAddr)
	switch {
	case !ok:
		return nil, nil, fmt.Errorf("accept connection: network %q is not served", conn.RemoteAddr().Network())
	case t.tls != nil:
		return t.tls.ServerHandshake(conn)
	case t.plain && remote.IP.IsLoopback():
		return conn, Plain{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
	}
	return nil, nil, errors.New("accept connection: TCP without TLS is not served")
}

func peerCred(conn *net.UnixConn) (PeerCred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return PeerCred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return PeerCred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	return PeerCred{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		UID:            cred.Uid, GID: cred.Gid, PID: cred.Pid,
	}, nil
}

// ClientHandshake refuses: these are a server's credentials.
func (t *transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("connect: credentials of a server")
}

// Info describes the credentials.
func (t *transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "kiln-agent"}
}

// Clone returns t, which does not change.
func (t *transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName does nothing, as for every server.
func (t *transport) OverrideServerName(string) error { return nil }
