package policy

import (
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// PullPatterns returns patterns of the repositories that every one of all lets images be
// pulled from; false says that nothing restricts it. No pattern at all: nothing may be pulled.
func PullPatterns(all []Rules) ([]string, bool) {
	var patterns []string
	restricted := false
	for _, r := range all {
		switch {
		case len(r.Pull) == 0:
		case !restricted:
			patterns, restricted = slices.Clone(r.Pull), true
		default:
			patterns = intersect(patterns, r.Pull)
		}
	}
	return patterns, restricted
}

func intersect(a, b []string) []string {
	var out []string
	for _, p := range a {
		for _, q := range b {
			if both, ok := narrow(p, q); ok && !slices.Contains(out, both) {
				out = append(out, both)
			}
		}
	}
	return out
}

// narrow returns the pattern of what is in both p and q.
func narrow(p, q string) (string, bool) {
	pHost, pPath := split(p)
	qHost, qPath := split(q)
	host, ok := inner(pHost, qHost, func(a, b string) bool {
		domain, wild := strings.CutPrefix(b, "*.")
		return a == b || (wild && domain != "" && strings.HasSuffix(a, "."+domain))
	})
	if !ok {
		return "", false
	}
	path, ok := inner(pPath, qPath, func(a, b string) bool { return b == "" || a == b || strings.HasPrefix(a, b+"/") })
	if !ok {
		return "", false
	}
	if path == "" {
		return host, true
	}
	return host + "/" + path, true
}

// inner returns the one of a and b that is within the other.
func inner(a, b string, within func(a, b string) bool) (string, bool) {
	switch {
	case within(a, b):
		return a, true
	case within(b, a):
		return b, true
	}
	return "", false
}

func split(pattern string) (host, path string) {
	host, path, _ = strings.Cut(strings.TrimSuffix(pattern, "/"), "/")
	return host, path
}

// Regexp returns a regular expression, anchored, for full references (host, path, and tag
// or digest) of the repositories that Match finds in pattern.
func Regexp(pattern string) string {
	host, path := split(pattern)
	if host == "" || host == "*." || !utf8.ValidString(pattern) {
		return `^\b\B$` // matches nothing
	}
	expr := regexp.QuoteMeta(host)
	if domain, ok := strings.CutPrefix(host, "*."); ok {
		expr = `[^/]+\.` + regexp.QuoteMeta(domain)
	}
	if path == "" {
		expr += `/[^:@]+`
	} else {
		expr += "/" + regexp.QuoteMeta(path) + `(/[^:@]+)?`
	}
	return "^" + expr + `(:[^/@]+)?(@.+)?$`
}
