package server

import (
	"errors"
	"io"
	"log/slog"
	"net"

	"google.golang.org/grpc/credentials"
)

// handshakes logs connections that did not authenticate.
type handshakes struct {
	credentials.TransportCredentials
	log *slog.Logger
}

func logHandshakes(creds credentials.TransportCredentials, log *slog.Logger) credentials.TransportCredentials {
	return &handshakes{creds, log}
}

func (h *handshakes) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := h.TransportCredentials.ServerHandshake(conn)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		// A load balancer that looks whether the port is open.
		h.log.Debug("connection ended before its handshake", "peer", conn.RemoteAddr().String())
	default:
		h.log.Warn("connection refused", "peer", conn.RemoteAddr().String(), "error", shown(err.Error()))
	}
	return secured, info, err
}

func (h *handshakes) Clone() credentials.TransportCredentials {
	return &handshakes{h.TransportCredentials.Clone(), h.log}
}
