package gitcmd

import (
	"encoding/hex"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/sirupsen/logrus"
)

// git repeats a header with credentials that it was told on its command line to
// whatever server the first one redirects to. A git with such a header is therefore
// given a proxy that connects to the header's host only: redirects on that host work,
// and no other host gets a request at all.

// credentialsFor returns the host and port of the server that args have a header with
// credentials for, or nothing. Submodules are on other hosts by right: git sends the
// header to none of them, as it belongs to the URL of the repository.
func credentialsFor(args []string) string {
	host := ""
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "-C", "--git-dir", "--work-tree", "--namespace":
			i++
			continue
		case "-c":
			i++
		case "submodule":
			return ""
		default:
			if strings.HasPrefix(args[i], "-") {
				continue
			}
			return host // at the command; what follows is its own
		}
		if i == len(args) {
			break
		}
		rest, ok := strings.CutPrefix(args[i], "http.")
		scope, _, found := strings.Cut(rest, ".extraheader=")
		if u, err := url.Parse(scope); ok && found && err == nil && u.Host != "" {
			host = strings.ToLower(hostPort(u))
		}
	}
	return host
}

// boundTo is the user of a proxy that says which host its connections are for.
func boundTo(host string) string { return hex.EncodeToString([]byte(host)) + ":host" }

// mayReach tells whether a request is to the host that it is bound to, and answers it
// otherwise.
func (p *proxy) mayReach(w http.ResponseWriter, r *http.Request) bool {
	// The header is that of a proxy, and read as the one of a server is.
	as := &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	user, _, _ := as.BasicAuth()
	want, err := hex.DecodeString(user)
	if err != nil || len(want) == 0 {
		w.Header().Set("Proxy-Authenticate", `Basic realm="git"`)
		http.Error(w, "the host is missing that credentials are for", http.StatusProxyAuthRequired)
		return false
	}
	r.Header.Del("Proxy-Authorization")
	to := r.Host
	if r.Method != http.MethodConnect {
		to = hostPort(r.URL)
	}
	if _, _, err := net.SplitHostPort(to); err == nil && strings.EqualFold(to, string(want)) {
		return true
	}
	logrus.WithField("host", to).Warn("git was kept from taking credentials to another host")
	http.Error(w, "connect to "+to+": the credentials of this fetch are for "+string(want)+" only, which redirects there; use the URL that it redirects to, with its own credentials", http.StatusForbidden)
	return false
}
