package auth

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/util/cache"
	utilclock "k8s.io/utils/clock"
)

// Reviewer asks the Kubernetes API server.
type Reviewer interface {
	// ReviewToken has a token authenticated and returns the verdict.
	ReviewToken(ctx context.Context, spec authenticationv1.TokenReviewSpec) (authenticationv1.TokenReviewStatus, error)
	// ReviewAccess has a request authorized and returns the verdict.
	ReviewAccess(ctx context.Context, spec authorizationv1.SubjectAccessReviewSpec) (authorizationv1.SubjectAccessReviewStatus, error)
}

// What a ServiceAccount must be allowed to do in its namespace.
const (
	accessVerb     = "create"
	accessGroup    = "kiln.build"
	accessResource = "builds"
)

// reviewTimeout bounds the questions about one token.
const reviewTimeout = 10 * time.Second

// refusalTTL is how long a refusal holds: short, since it may follow a token that
// was used a moment too early.
const refusalTTL = 10 * time.Second

// TokenConfig says how tokens are judged.
type TokenConfig struct {
	// Audiences of which a token must be for one.
	Audiences []string
	// TTL is how long a verdict holds.
	TTL time.Duration
	// Entries is how many verdicts are kept.
	Entries int
	// Clock is for tests; nil: the real one.
	Clock utilclock.PassiveClock
}

// ServiceAccounts is the Tokens of Kubernetes ServiceAccounts. The tenant of one is
// its namespace. It keeps digests of tokens, and no token longer than a review.
type ServiceAccounts struct {
	cfg      TokenConfig
	reviewer Reviewer
	verdicts *cache.LRUExpireCache
	flights  singleflight.Group
}

var _ Tokens = (*ServiceAccounts)(nil)

// verdict is an Identity, or the status that refuses one.
type verdict struct {
	id  Identity
	err error
}

// NewServiceAccounts returns Tokens that asks reviewer.
func NewServiceAccounts(cfg TokenConfig, reviewer Reviewer) *ServiceAccounts {
	if cfg.Clock == nil {
		cfg.Clock = utilclock.RealClock{}
	}
	return &ServiceAccounts{cfg: cfg, reviewer: reviewer, verdicts: cache.NewLRUExpireCacheWithClock(cfg.Entries, cfg.Clock)}
}

// Identify returns who holds token. Callers with the same token share one review.
func (s *ServiceAccounts) Identify(ctx context.Context, token string) (Identity, error) {
	key := sha256.Sum256([]byte(token))
	if v, ok := s.verdicts.Get(key); ok {
		return v.(verdict).id, v.(verdict).err
	}
	// The review serves all who wait, so no single caller's end may end it.
	flight := s.flights.DoChan(string(key[:]), func() (any, error) {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		id, err := s.review(rctx, token)
		switch status.Code(err) {
		case codes.OK:
			s.verdicts.Add(key, verdict{id: id}, s.cfg.TTL)
		case codes.Unauthenticated, codes.PermissionDenied:
			s.verdicts.Add(key, verdict{err: err}, min(s.cfg.TTL, refusalTTL))
		}
		return id, err
	})
	select {
	case <-ctx.Done():
		return Identity{}, status.FromContextError(ctx.Err()).Err()
	case r := <-flight:
		if r.Err != nil {
			return Identity{}, r.Err
		}
		return r.Val.(Identity), nil
	}
}

func (s *ServiceAccounts) review(ctx context.Context, token string) (Identity, error) {
	st, err := s.reviewer.ReviewToken(ctx, authenticationv1.TokenReviewSpec{Token: token, Audiences: s.cfg.Audiences})
	if err != nil {
		return Identity{}, status.Errorf(codes.Unavailable, "the token cannot be reviewed now: %v", withoutToken(err, token))
	}
	if !st.Authenticated {
		return Identity{}, status.Errorf(codes.Unauthenticated, "the token is not valid for audience %s", strings.Join(s.cfg.Audiences, ", "))
	}
	// An API server that does not know audiences returns none: then the token may be
	// one that somebody gave to another service.
	if !slices.ContainsFunc(st.Audiences, func(a string) bool { return slices.Contains(s.cfg.Audiences, a) }) {
		return Identity{}, status.Errorf(codes.Unauthenticated, "the token was not reviewed for audience %s", strings.Join(s.cfg.Audiences, ", "))
	}
	namespace, ok := serviceAccountNamespace(st.User.Username)
	if !ok {
		return Identity{}, status.Error(codes.PermissionDenied, "the token is not that of a ServiceAccount")
	}
	extra := make(map[string]authorizationv1.ExtraValue, len(st.User.Extra))
	for k, v := range st.User.Extra {
		extra[k] = authorizationv1.ExtraValue(v)
	}
	access, err := s.reviewer.ReviewAccess(ctx, authorizationv1.SubjectAccessReviewSpec{
		User: st.User.Username, UID: st.User.UID, Groups: st.User.Groups, Extra: extra,
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: namespace, Verb: accessVerb, Group: accessGroup, Resource: accessResource,
		},
	})
	if err != nil {
		return Identity{}, status.Errorf(codes.Unavailable, "access cannot be reviewed now: %v", withoutToken(err, token))
	}
	if !access.Allowed || access.Denied {
		return Identity{}, status.Errorf(codes.PermissionDenied, "%s may not %s %s.%s in namespace %s: give it a Role that allows it",
			st.User.Username, accessVerb, accessResource, accessGroup, namespace)
	}
	return Identity{Name: st.User.Username, Role: RoleTenant, Tenant: namespace}, nil
}

// serviceAccountNamespace returns the namespace in a ServiceAccount's user name.
func serviceAccountNamespace(user string) (string, bool) {
	rest, ok := strings.CutPrefix(user, "system:serviceaccount:")
	if !ok {
		return "", false
	}
	namespace, name, ok := strings.Cut(rest, ":")
	if !ok || name == "" || strings.Contains(name, ":") || ValidateTenant(namespace) != nil {
		return "", false
	}
	return namespace, true
}

// withoutToken makes sure that no library's error repeats a token.
func withoutToken(err error, token string) error {
	return fmt.Errorf("%s", strings.ReplaceAll(err.Error(), token, "…"))
}
