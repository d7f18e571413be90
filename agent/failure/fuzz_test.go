package failure

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// FuzzMessage takes errors that repeat what a server or a Dockerfile said.
func FuzzMessage(f *testing.F) {
	f.Add("failed to solve: https://user:canary@host/x: \xff\n", "canary")
	f.Add("rpc error: code = Unknown desc = x", "p")
	f.Add("ssh://a:b@c", "b@d")
	f.Fuzz(func(t *testing.T, s, password string) {
		got := Message(errors.New(s))
		require.True(t, utf8.ValidString(got))
		require.LessOrEqual(t, len(got), maxText)
		if len(password) < 4 || strings.ContainsAny(password, "/@\"' \t\n\r\v\f") || !utf8.ValidString(password) || strings.Contains(s, password) {
			return
		}
		got = Message(errors.New(s + " https://someone:" + password + "@host.example/x"))
		require.NotContains(t, got, ":"+password+"@")
	})
}
