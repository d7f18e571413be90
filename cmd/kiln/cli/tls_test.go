package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTLSFlags(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) tokenFile {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return tokenFile(path)
	}
	token := file("token", "header.claims.signature\n")
	for name, c := range map[string]struct {
		addr string
		f    tlsFlags
		want string
	}{
		"socket":                  {addr: "unix:///run/kiln/agent.sock"},
		"plain":                   {addr: "tcp://127.0.0.1:7420"},
		"mutual":                  {addr: "tcp://h:1", f: tlsFlags{ca: "a", cert: "b", key: "c"}},
		"no scheme":               {addr: "h:1", want: "want unix:///path"},
		"no port":                 {addr: "tcp://h", want: "want unix:///path"},
		"other scheme":            {addr: "http://h:1", want: "want unix:///path"},
		"TLS on a socket":         {addr: "unix:///s", f: tlsFlags{ca: "a"}, want: "tcp://"},
		"key is missing":          {addr: "tcp://h:1", f: tlsFlags{ca: "a", cert: "b"}, want: "go together"},
		"cert without authority":  {addr: "tcp://h:1", f: tlsFlags{cert: "b", key: "c"}, want: "--tlscacert"},
		"token":                   {addr: "tcp://h:1", f: tlsFlags{ca: "a", token: token}},
		"token on a socket":       {addr: "unix:///s", f: tlsFlags{token: token}, want: "tcp://"},
		"token without authority": {addr: "tcp://h:1", f: tlsFlags{token: token}, want: "--tlscacert"},
		"no token file":           {addr: "tcp://h:1", f: tlsFlags{ca: "a", token: "/nowhere/token"}, want: "read --token-file: open /nowhere/token"},
		"empty token":             {addr: "tcp://h:1", f: tlsFlags{ca: "a", token: file("empty", " \n")}, want: "does not hold one token"},
		"two tokens":              {addr: "tcp://h:1", f: tlsFlags{ca: "a", token: file("two", "one\ntwo\n")}, want: "does not hold one token"},
		"large token":             {addr: "tcp://h:1", f: tlsFlags{ca: "a", token: file("large", strings.Repeat("x", maxTokenFile+1))}, want: "does not hold one token"},
	} {
		err := c.f.check(c.addr)
		if c.want == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.want, name)
	}
	f := tlsFlags{ca: "a"}
	require.NoError(t, f.check("tcp://agent.example:1"))
	require.Equal(t, "agent.example", f.serverName)

	// A token that was replaced is the one that is shown.
	require.Equal(t, token, file("token", "another"))
	got, err := token.GetRequestMetadata(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[string]string{"authorization": "Bearer another"}, got)
	require.True(t, token.RequireTransportSecurity())
}
