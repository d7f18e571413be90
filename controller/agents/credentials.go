package agents

import (
	"context"
	"crypto/tls"
	"net"

	"google.golang.org/grpc/credentials"
)

// Credentials are TLS credentials that ask for the configuration at each handshake, so
// that connections made after a rotation use the new certificates.
func Credentials(current func() (*tls.Config, error)) credentials.TransportCredentials {
	return &rotating{current: current}
}

type rotating struct {
	current func() (*tls.Config, error)
}

func (r *rotating) ClientHandshake(ctx context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := r.current()
	if err != nil {
		return nil, nil, err
	}
	// The address is that of a Pod; the certificate has the name of all agents.
	return credentials.NewTLS(cfg).ClientHandshake(ctx, cfg.ServerName, conn)
}

func (r *rotating) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := r.current()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(cfg).ServerHandshake(conn)
}

func (r *rotating) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (r *rotating) Clone() credentials.TransportCredentials { return &rotating{current: r.current} }

// OverrideServerName does nothing: the name is that of the configuration.
func (r *rotating) OverrideServerName(string) error { return nil }
