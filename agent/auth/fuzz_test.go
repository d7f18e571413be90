package auth

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/metadata"
)

func FuzzServiceAccountNamespace(f *testing.F) {
	for _, s := range []string{"system:serviceaccount:team-a:ci", "system:serviceaccount:../x:ci", "system:serviceaccount::", "system:node:n", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, user string) {
		namespace, ok := serviceAccountNamespace(user)
		if !ok {
			return
		}
		require.NoError(t, ValidateTenant(namespace))
		require.True(t, strings.HasPrefix(user, "system:serviceaccount:"+namespace+":"))
	})
}

func FuzzBearer(f *testing.F) {
	for _, s := range []string{"Bearer abc", "bearer  abc ", "Basic abc", "Bearer", "", "Bearer \x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		token, ok, err := bearer(metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", value)))
		require.NotEqual(t, ok, err != nil, "a value is a token or an error")
		if ok {
			require.NotEmpty(t, token)
			require.LessOrEqual(t, len(token), maxToken)
			require.Contains(t, value, token)
		}
	})
}
