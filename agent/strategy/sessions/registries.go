package sessions

import (
	"context"

	"github.com/moby/buildkit/session/auth"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	dockerHub = "docker.io"
	// dockerHubRegistry is what BuildKit calls Docker Hub.
	dockerHubRegistry = "registry-1.docker.io"
)

// registries answers for credentials of registries. It does not fetch tokens: the
// engine is in this process and fetches them itself, so that no key that proves
// who shares a token need be kept on disk.
type registries struct {
	auth.UnimplementedAuthServer
	loan *Loan
}

// Register implements session.Attachable.
func (r *registries) Register(s *grpc.Server) { auth.RegisterAuthServer(s, r) }

// Credentials implements auth.AuthServer. A host without credentials has empty
// ones.
func (r *registries) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	if !r.loan.open() {
		return nil, status.Error(codes.PermissionDenied, "the build has ended")
	}
	host := req.Host
	if host == dockerHubRegistry {
		host = dockerHub
	}
	c := r.loan.Registries[host]
	if c.IdentityToken != "" {
		return &auth.CredentialsResponse{Secret: c.IdentityToken}, nil
	}
	return &auth.CredentialsResponse{Username: c.Username, Secret: c.Password}, nil
}
