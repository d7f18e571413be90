package policy

import (
	"regexp"
	"slices"
	"testing"

	"github.com/distribution/reference"
	"github.com/stretchr/testify/require"
)

func TestPullPatternsOfSeveralPolicies(t *testing.T) {
	for _, c := range []struct {
		name string
		sets [][]string
		want []string
	}{
		{"one", [][]string{{"docker.io", "r.example.com/a"}}, []string{"docker.io", "r.example.com/a"}},
		{"the narrower path", [][]string{{"r.example.com"}, {"r.example.com/a", "r.example.com/b/c"}}, []string{"r.example.com/a", "r.example.com/b/c"}},
		{"the narrower host", [][]string{{"*.example.com/a"}, {"r.example.com"}}, []string{"r.example.com/a"}},
		{"subdomains", [][]string{{"*.example.com"}, {"*.eu.example.com"}}, []string{"*.eu.example.com"}},
		{"nothing in common", [][]string{{"docker.io"}, {"r.example.com"}}, nil},
		{"neighbours", [][]string{{"r.example.com/team"}, {"r.example.com/teams"}}, nil},
		{"three", [][]string{{"*.example.com"}, {"r.example.com", "docker.io"}, {"r.example.com/x"}}, []string{"r.example.com/x"}},
	} {
		var rules []Rules
		for _, s := range c.sets {
			rules = append(rules, Rules{Pull: s})
		}
		got, restricted := PullPatterns(append(rules, Rules{}))
		require.True(t, restricted, c.name)
		require.Equal(t, c.want, got, c.name)
	}
	_, restricted := PullPatterns([]Rules{{}, {Max: Limits{PIDs: 1}}})
	require.False(t, restricted)
}

// agree checks that the two forms of a policy say the same of an image.
func agree(t *testing.T, p, q, image string) {
	t.Helper()
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return
	}
	repo := named.Name()
	full := reference.TagNameOnly(named).String()
	for _, pattern := range []string{p, q} {
		require.Equal(t, Match(pattern, repo), regexp.MustCompile(Regexp(pattern)).MatchString(full), "%q %q", pattern, full)
	}
	if p == "" || q == "" {
		return
	}
	patterns, _ := PullPatterns([]Rules{{Pull: []string{p}}, {Pull: []string{q}}})
	require.Equal(t, Match(p, repo) && Match(q, repo), MatchAny(patterns, repo), "%q and %q: %q", p, q, repo)
}

func TestExpressionsSayWhatPatternsSay(t *testing.T) {
	patterns := []string{"", "docker.io", "docker.io/library", "docker.io/library/debian", "r.example.com", "r.example.com:5000/a/", "*.example.com", "*.example.com/a", "*.", "r.exampleXcom"}
	images := []string{"debian", "debian:12", "team/app@sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", "r.example.com/a", "r.example.com/a/b:1", "r.example.com:5000/a:1", "r.example.com:5000/ab:1", "example.com/a", "a.r.example.com/a", "r.exampleXcom/a", "evil.org/r.example.com/a", "docker.io.evil.org/library/debian"}
	for _, p := range patterns {
		for _, q := range patterns {
			for _, image := range images {
				agree(t, p, q, image)
			}
		}
	}
	require.False(t, slices.ContainsFunc(images, func(i string) bool { return regexp.MustCompile(Regexp("")).MatchString(i) }))
}

func FuzzExpressionsSayWhatPatternsSay(f *testing.F) {
	f.Add("*.example.com/a", "r.example.com", "r.example.com/a:1")
	f.Fuzz(func(t *testing.T, p, q, image string) { agree(t, p, q, image) })
}
