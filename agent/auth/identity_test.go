package auth

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestTenantFor(t *testing.T) {
	admin := Identity{Name: "uid:0", Role: RoleAdmin, Tenant: DefaultTenant}
	controller := Identity{Name: "cn:controller", Role: RoleController}
	tenant := Identity{Name: "cn:a", Role: RoleTenant, Tenant: "a"}
	tests := []struct {
		name      string
		id        Identity
		requested string
		want      string
		code      codes.Code
	}{
		{"admin's own", admin, "", "default", codes.OK},
		{"admin for another", admin, "a", "a", codes.OK},
		{"controller must name one", controller, "", "", codes.InvalidArgument},
		{"controller for a tenant", controller, "a", "a", codes.OK},
		{"tenant's own", tenant, "", "a", codes.OK},
		{"tenant's own by name", tenant, "a", "a", codes.OK},
		{"tenant for another", tenant, "b", "", codes.PermissionDenied},
		{"path in place of a name", controller, "../a", "", codes.InvalidArgument},
		{"name with a slash", tenant, "a/b", "", codes.InvalidArgument},
		{"name with a zero byte", admin, "a\x00", "", codes.InvalidArgument},
		{"name that is too long", admin, strings.Repeat("a", 64), "", codes.InvalidArgument},
		{"unknown role", Identity{Name: "x", Role: "root", Tenant: "a"}, "b", "", codes.PermissionDenied},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.id.TenantFor(tt.requested)
			require.Equal(t, tt.code, status.Code(err), "%v", err)
			require.Equal(t, tt.want, got)
		})
	}
}

func TestContext(t *testing.T) {
	_, ok := FromContext(context.Background())
	require.False(t, ok)
	want := Identity{Name: "n", Role: RoleTenant, Tenant: "t"}
	got, ok := FromContext(NewContext(context.Background(), want))
	require.True(t, ok)
	require.Equal(t, want, got)
}
