package buildopt

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
)

// cacheTypes lists the cache backends that kiln's engine has.
var cacheTypes = []string{"registry", "local", "inline"}

// required names, for each cache type, the attribute that an import and an export
// need.
var required = map[string][2]string{
	"registry": {"ref", "ref"},
	"local":    {"src", "dest"},
}

// ParseCacheFrom parses --cache-from values.
func ParseCacheFrom(values []string) ([]client.CacheOptionsEntry, error) {
	out, err := parseCache(values, 0)
	if err != nil {
		return nil, err
	}
	for _, e := range out {
		if e.Type == "inline" {
			return nil, fmt.Errorf("invalid cache %q: an inline cache is imported with type=registry", "type=inline")
		}
		if e.Type == "local" {
			if st, err := os.Stat(e.Attrs["src"]); err == nil && !st.IsDir() {
				return nil, fmt.Errorf("local cache %s is not a directory", e.Attrs["src"])
			}
		}
	}
	return out, nil
}

// ParseCacheTo parses --cache-to values.
func ParseCacheTo(values []string) ([]client.CacheOptionsEntry, error) {
	out, err := parseCache(values, 1)
	if err != nil {
		return nil, err
	}
	for _, e := range out {
		switch mode, ok := e.Attrs["mode"]; {
		case !ok:
			e.Attrs["mode"] = "min"
		case mode != "min" && mode != "max":
			return nil, fmt.Errorf("invalid cache mode %q: want min or max", mode)
		}
	}
	return out, nil
}

func parseCache(values []string, side int) ([]client.CacheOptionsEntry, error) {
	var out []client.CacheOptionsEntry
	for _, s := range values {
		e := client.CacheOptionsEntry{Attrs: map[string]string{}}
		if !strings.ContainsAny(s, "=,") {
			e.Type, e.Attrs["ref"] = "registry", s
		} else {
			fields, err := csvFields(s)
			if err != nil {
				return nil, err
			}
			for _, f := range fields {
				if f.key == "type" {
					e.Type = f.value
				} else {
					e.Attrs[f.key] = f.value
				}
			}
		}
		if !slices.Contains(cacheTypes, e.Type) {
			return nil, fmt.Errorf("invalid cache %q: type must be one of %s", s, strings.Join(cacheTypes, ", "))
		}
		if need := required[e.Type][side]; need != "" && e.Attrs[need] == "" {
			return nil, fmt.Errorf("invalid cache %q: type=%s needs %s=", s, e.Type, need)
		}
		if e.Type == "registry" {
			ref, err := reference.ParseNormalizedNamed(e.Attrs["ref"])
			if err != nil {
				return nil, fmt.Errorf("invalid cache %q: ref: %w", s, err)
			}
			e.Attrs["ref"] = reference.TagNameOnly(ref).String()
		}
		out = append(out, e)
	}
	return out, nil
}
