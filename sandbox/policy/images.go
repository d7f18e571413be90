package policy

import (
	"strings"

	"github.com/distribution/reference"
)

// Repository returns the full name of an image's repository with its host, such as
// "docker.io/library/debian", from a reference as users write it.
func Repository(image string) (string, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", err
	}
	return named.Name(), nil
}

// MatchAny tells whether one of patterns matches a repository that Repository returned.
func MatchAny(patterns []string, repository string) bool {
	for _, p := range patterns {
		if Match(p, repository) {
			return true
		}
	}
	return false
}

// Match tells whether a repository is in pattern: a host, a host and the start of a path
// that ends where a name ends, or either with "*." before it for any subdomain, but not for
// the domain itself. An empty pattern matches nothing.
func Match(pattern, repository string) bool {
	host, path, _ := strings.Cut(strings.TrimSuffix(pattern, "/"), "/")
	repoHost, repoPath, _ := strings.Cut(repository, "/")
	if host == "" {
		return false
	}
	if domain, ok := strings.CutPrefix(host, "*."); ok {
		sub, found := strings.CutSuffix(repoHost, "."+domain)
		if domain == "" || !found || sub == "" {
			return false
		}
	} else if host != repoHost {
		return false
	}
	return path == "" || repoPath == path || strings.HasPrefix(repoPath, path+"/")
}
