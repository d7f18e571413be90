package auth

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Role says for whom a caller may act.
type Role string

const (
	// RoleAdmin may name any tenant. It is root on the node, by the unix socket.
	RoleAdmin Role = "admin"
	// RoleController may name any tenant. It is the cluster's controller.
	RoleController Role = "controller"
	// RoleTenant may name its own tenant only.
	RoleTenant Role = "tenant"
)

// DefaultTenant is the tenant of root on the node when it names none.
const DefaultTenant = "default"

// Identity is an authenticated caller.
type Identity struct {
	// Name says who it is, for logs: "uid:0", "cn:kiln-controller" or
	// "system:serviceaccount:ns:name".
	Name string
	// Role says for whom it may act.
	Role Role
	// Tenant is its own tenant. Only a controller may have none.
	Tenant string
}

// AllTenants tells whether id may act for every tenant.
func (id Identity) AllTenants() bool {
	return id.Role == RoleAdmin || id.Role == RoleController
}

// TenantFor returns the tenant of a call that names requested, which may be empty:
// then it is the caller's own. The error is a gRPC status: PERMISSION_DENIED for
// another's tenant, INVALID_ARGUMENT for a name that no tenant can have, or for none
// from a caller that has no tenant of its own.
func (id Identity) TenantFor(requested string) (string, error) {
	if requested == "" {
		if id.Tenant == "" {
			return "", status.Errorf(codes.InvalidArgument, "tenant: is required, because %s has none of its own", id.Name)
		}
		return id.Tenant, nil
	}
	if err := ValidateTenant(requested); err != nil {
		return "", status.Errorf(codes.InvalidArgument, "tenant: %v", err)
	}
	if requested != id.Tenant && !id.AllTenants() {
		return "", status.Errorf(codes.PermissionDenied, "%s may not act for tenant %q: its own is %q", id.Name, requested, id.Tenant)
	}
	return requested, nil
}

// LogValue makes an Identity a group of attributes in structured logs.
func (id Identity) LogValue() slog.Value {
	return slog.GroupValue(slog.String("name", id.Name), slog.String("role", string(id.Role)), slog.String("tenant", id.Tenant))
}

// ValidateTenant tells whether name can be a tenant: a tenant is named like a
// Kubernetes namespace, which also makes it a safe file name.
func ValidateTenant(name string) error {
	if problems := validation.IsDNS1123Label(name); len(problems) > 0 {
		return fmt.Errorf("%q is no tenant's name: %s", name, strings.Join(problems, "; "))
	}
	return nil
}

type contextKey struct{}

// NewContext returns a context that carries id.
func NewContext(ctx context.Context, id Identity) context.Context {
	return context.WithValue(ctx, contextKey{}, id)
}

// FromContext returns the identity of the caller whose call ctx belongs to, and
// whether there is one. Without one a service must refuse: the call did not pass
// this package's interceptors.
func FromContext(ctx context.Context) (Identity, bool) {
	id, ok := ctx.Value(contextKey{}).(Identity)
	return id, ok
}
