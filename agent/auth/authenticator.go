package auth

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// PeerRule gives a local user or group a tenant. Fields that are set must match.
type PeerRule struct {
	UID, GID *uint32
	Tenant   string
}

// ClientRule says who the holder of a certificate is. Fields among CommonName, URI
// and Organization that are set must match, and one must be set.
type ClientRule struct {
	CommonName, URI, Organization string
	Role                          Role
	Tenant                        string
}

// Tokens turns a bearer token into who holds it. Errors are gRPC statuses.
type Tokens interface {
	Identify(ctx context.Context, token string) (Identity, error)
}

// Config says who is who. In each list the first rule that matches counts.
type Config struct {
	Peers   []PeerRule
	Clients []ClientRule
	// Tokens is nil when tokens are not accepted.
	Tokens Tokens
	// InsecureLoopback makes everyone on a Plain connection the default tenant.
	InsecureLoopback bool
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Authenticator finds out who calls. It may be used concurrently.
type Authenticator struct {
	cfg Config
}

// New returns an Authenticator that follows cfg.
func New(cfg Config) *Authenticator {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Authenticator{cfg: cfg}
}

// Unary returns the interceptor that gives calls their identity or refuses them.
func (a *Authenticator) Unary() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		ctx, err := a.Authenticate(ctx)
		if err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// Stream is Unary for streams, those of an unknown service among them.
func (a *Authenticator) Stream() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		ctx, err := a.Authenticate(ss.Context())
		if err != nil {
			return err
		}
		return next(srv, &identified{ss, ctx})
	}
}

type identified struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *identified) Context() context.Context { return s.ctx }

// Authenticate returns the context of a call with its Identity. The error is a gRPC
// status: UNAUTHENTICATED when the call does not say who it is from,
// PERMISSION_DENIED when no rule knows that one, UNAVAILABLE when that cannot be
// told now.
func (a *Authenticator) Authenticate(ctx context.Context) (context.Context, error) {
	id, err := a.identify(ctx)
	if err != nil {
		return nil, err
	}
	return NewContext(ctx, id), nil
}

func (a *Authenticator) identify(ctx context.Context) (Identity, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}, status.Error(codes.Unauthenticated, "the connection says nothing of its peer")
	}
	switch info := p.AuthInfo.(type) {
	case PeerCred:
		return a.fromPeer(info)
	case credentials.TLSInfo:
		return a.fromTLS(ctx, info)
	case Plain:
		if a.cfg.InsecureLoopback {
			return Identity{Name: "loopback", Role: RoleTenant, Tenant: DefaultTenant}, nil
		}
	}
	return Identity{}, status.Error(codes.Unauthenticated, "the connection is not authenticated")
}

func (a *Authenticator) fromPeer(cred PeerCred) (Identity, error) {
	if cred.UID == 0 {
		return Identity{Name: "uid:0", Role: RoleAdmin, Tenant: DefaultTenant}, nil
	}
	for _, r := range a.cfg.Peers {
		if (r.UID != nil || r.GID != nil) && (r.UID == nil || *r.UID == cred.UID) && (r.GID == nil || *r.GID == cred.GID) {
			return Identity{Name: fmt.Sprintf("uid:%d", cred.UID), Role: RoleTenant, Tenant: r.Tenant}, nil
		}
	}
	return Identity{}, status.Errorf(codes.PermissionDenied, "user %d of group %d may not use the agent: it is not in listeners.unix.peers", cred.UID, cred.GID)
}

// fromTLS goes by the call's token when it has one, and else by the connection's
// certificate: a token that is refused is never made up for by a certificate.
func (a *Authenticator) fromTLS(ctx context.Context, info credentials.TLSInfo) (Identity, error) {
	token, ok, err := bearer(ctx)
	switch {
	case err != nil:
		return Identity{}, err
	case ok && a.cfg.Tokens == nil:
		return Identity{}, status.Error(codes.Unauthenticated, "this agent accepts no tokens: listeners.tcp.tokens is not configured")
	case ok:
		return a.cfg.Tokens.Identify(ctx, token)
	}
	// VerifiedChains and not PeerCertificates: only what an authority signed counts.
	if len(info.State.VerifiedChains) == 0 {
		return Identity{}, status.Error(codes.Unauthenticated, "the call has neither a client certificate nor a bearer token")
	}
	return a.fromCertificate(info.State.VerifiedChains[0][0])
}

func (a *Authenticator) fromCertificate(cert *x509.Certificate) (Identity, error) {
	if a.cfg.Now().After(cert.NotAfter) {
		return Identity{}, status.Error(codes.Unauthenticated, "the client certificate has expired since the connection was made; connect again with a new one")
	}
	for _, r := range a.cfg.Clients {
		if r.matches(cert) {
			return Identity{Name: certificateName(cert), Role: r.Role, Tenant: r.Tenant}, nil
		}
	}
	return Identity{}, status.Errorf(codes.PermissionDenied, "the holder of the certificate %s may not use the agent: listeners.tcp.clients has no rule for it", certificateName(cert))
}

func (r *ClientRule) matches(cert *x509.Certificate) bool {
	if r.CommonName == "" && r.URI == "" && r.Organization == "" {
		return false
	}
	if r.CommonName != "" && r.CommonName != cert.Subject.CommonName {
		return false
	}
	if r.Organization != "" && !slices.Contains(cert.Subject.Organization, r.Organization) {
		return false
	}
	if r.URI == "" {
		return true
	}
	for _, u := range cert.URIs {
		if u.String() == r.URI {
			return true
		}
	}
	return false
}

// maxName bounds a name that somebody else chose, in bytes.
const maxName = 200

func certificateName(cert *x509.Certificate) string {
	name := "cn:" + cert.Subject.CommonName
	if cert.Subject.CommonName == "" && len(cert.URIs) > 0 {
		name = "uri:" + cert.URIs[0].String()
	}
	if len(name) > maxName {
		name = name[:maxName]
	}
	return strings.ToValidUTF8(name, "?")
}

// maxToken bounds a bearer token, in bytes.
const maxToken = 16 << 10

// bearer returns the token of a call, and whether it has one.
func bearer(ctx context.Context) (token string, ok bool, err error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return "", false, nil
	}
	scheme, token, found := strings.Cut(values[0], " ")
	token = strings.TrimSpace(token)
	if len(values) > 1 || !found || !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return "", false, status.Error(codes.Unauthenticated, `authorization: want one value, "Bearer <token>"`)
	}
	return token, true, nil
}
