package policy

import "strings"

// BuiltIn is the Dockerfile front end that is part of kiln. No image can have the name,
// as it has no host.
const BuiltIn = "builtin"

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
