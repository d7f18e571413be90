package policy

import (
	"fmt"
	"slices"
	"strings"
)

// BuiltIn is the Dockerfile front end that is part of kiln. No image can have the name,
// as it has no host.
const BuiltIn = "builtin"

// builtinRepositories are the images whose front end is the built-in one. Naming them pulls
// nothing.
var builtinRepositories = []string{"docker.io/docker/dockerfile", "docker.io/docker/dockerfile-upstream"}

// Frontend returns what runs when a syntax line names image: BuiltIn, or the image.
func Frontend(syntax string) string {
	image, _, _ := strings.Cut(strings.TrimSpace(syntax), " ")
	if repo, err := Repository(image); err == nil && slices.Contains(builtinRepositories, repo) {
		return BuiltIn
	}
	return image
}

// CheckFrontend returns every reason against a front end that is about to run, BuiltIn or
// an image, as *Denied.
func CheckFrontend(all []Rules, name string) []*Denied {
	var out []*Denied
	for _, p := range all {
		checkFrontends(func(field, rule, text string, args ...any) {
			out = append(out, &Denied{Policy: p.Name, Field: field, Name: rule, Rule: fmt.Sprintf(text, args...)})
		}, []Image{{Field: "frontend", Name: name}}, p.Frontends)
	}
	return out
}

func checkFrontends(deny denyFunc, frontends []Image, allowed []string) {
	if len(allowed) == 0 {
		return
	}
	for _, f := range frontends {
		if f.Name == BuiltIn {
			if !MatchAny(allowed, BuiltIn) {
				deny(f.Field, "frontends.allowed", "the built-in Dockerfile front end may not be used; allowed: %s", strings.Join(allowed, ", "))
			}
			continue
		}
		repo, err := Repository(f.Name)
		switch {
		case err != nil:
			deny(f.Field, "frontends.allowed", "front end %q cannot be understood: %v", f.Name, err)
		case !MatchAny(allowed, repo):
			deny(f.Field, "frontends.allowed", "front end %s may not be used; allowed: %s", repo, strings.Join(allowed, ", "))
		}
	}
}
