package gitcmd

import (
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzSafe wants an argument that is safe to be one word of a shell, that no shell
// changes.
func FuzzSafe(f *testing.F) {
	for _, s := range []string{"host", "a b", "`id`", "$(id)", "git@[::1]", "a'b", "a\\b", "~", "*", "\n", "ü"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		if safe(arg) {
			require.False(t, strings.ContainsAny(arg, " \t\n\r\x00'\"`$\\;&|<>(){}*?!#~^%"), "%q", arg)
		}
	})
}

// FuzzBound wants a proxy that is bound to a host to reach no other.
func FuzzBound(f *testing.F) {
	for _, s := range [][3]string{
		{"https://a.example/r", "a.example:443", "CONNECT"}, {"http://a.example/r", "b.example:80", "GET"}, {"http://a.example:1/r", "A.EXAMPLE:1", "CONNECT"}, {"https://[::1]/r", "[::1]:443", "CONNECT"}, {"x", "", "GET"},
	} {
		f.Add(s[0], s[1], s[2])
	}
	p := &proxy{}
	f.Fuzz(func(t *testing.T, scope, to, method string) {
		host := credentialsFor([]string{"-c", "http." + scope + ".extraheader=Authorization: x", "fetch"})
		if host == "" {
			return
		}
		user, _, _ := strings.Cut(boundTo(host), ":")
		r := &http.Request{Method: http.MethodConnect, Host: to, Header: http.Header{}}
		r.SetBasicAuth(user, "host")
		r.Header.Set("Proxy-Authorization", r.Header.Get("Authorization"))
		if p.mayReach(httptest.NewRecorder(), r) {
			require.True(t, strings.EqualFold(to, host), "%q is bound to %q", to, host)
			_, _, err := net.SplitHostPort(to)
			require.NoError(t, err)
		}
		r.Header = http.Header{}
		require.False(t, p.mayReach(httptest.NewRecorder(), r), "nothing says which host")
	})
}
