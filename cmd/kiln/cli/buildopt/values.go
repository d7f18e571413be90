package buildopt

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/go-units"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/go-csvvalue"

	"github.com/kiln-build/kiln/sandbox/policy"
)

// field is one key=value pair of a comma-separated flag value.
type field struct{ key, value string }

// csvFields splits a flag value in CSV form into its pairs. Keys are lower-cased.
func csvFields(s string) ([]field, error) {
	parts, err := csvvalue.Fields(s, nil)
	if err != nil {
		return nil, fmt.Errorf("invalid value %q: %w", s, err)
	}
	out := make([]field, 0, len(parts))
	for _, p := range parts {
		key, value, ok := strings.Cut(p, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		if !ok || key == "" {
			return nil, fmt.Errorf("invalid field %q in %q: want key=value", p, s)
		}
		out = append(out, field{key, value})
	}
	return out, nil
}

// csvQuote writes key=value so that csvFields reads it back.
func csvQuote(key, value string) string {
	s := key + "=" + value
	if strings.ContainsAny(s, ",\"\r\n") {
		return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
	}
	return s
}

// ParsePairs parses key=value entries. A key without a value has the value of the
// environment variable of that name when fromEnv is set, and is left out when
// there is none; otherwise its value is empty.
func ParsePairs(values []string, fromEnv bool) (map[string]string, error) {
	out := make(map[string]string, len(values))
	for _, s := range values {
		key, value, ok := strings.Cut(s, "=")
		if key == "" {
			return nil, fmt.Errorf("invalid value %q: the key is empty; want key=value", s)
		}
		if !ok && fromEnv {
			if value, ok = os.LookupEnv(key); !ok {
				continue
			}
		}
		out[key] = value
	}
	return out, nil
}

// ParseHosts parses HOST:IP and HOST=IP[,IP] entries into what the Dockerfile
// front end takes.
func ParseHosts(values []string) (string, error) {
	var out []string
	for _, s := range values {
		host, ips, ok := strings.Cut(s, "=")
		if !ok {
			host, ips, ok = strings.Cut(s, ":")
		}
		if !ok || host == "" || ips == "" || strings.ContainsAny(host, ", \t\r\n") {
			return "", fmt.Errorf("invalid host %q: want HOST:IP", s)
		}
		if ips == "host-gateway" {
			return "", fmt.Errorf("invalid host %q: host-gateway would give a step the node's address, which kiln never does; write an IP address", s)
		}
		for ip := range strings.SplitSeq(ips, ",") {
			ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
			if _, err := netip.ParseAddr(ip); err != nil {
				return "", fmt.Errorf("invalid host %q: %q is not an IP address", s, ip)
			}
			out = append(out, host+"="+ip)
		}
	}
	return strings.Join(out, ","), nil
}

// ParseUlimits parses TYPE=SOFT[:HARD] entries into what the Dockerfile front end
// takes.
func ParseUlimits(values []string) (string, error) {
	out := make([]string, 0, len(values))
	for _, s := range values {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return "", fmt.Errorf("invalid ulimit %q: %w", s, err)
		}
		if !policy.AllowsRlimit(u.Name) {
			return "", fmt.Errorf("ulimit %q is refused: a step may set %s", u.Name, strings.Join(policy.Rlimits(), ", "))
		}
		out = append(out, u.String())
	}
	return strings.Join(out, ","), nil
}

// ParseSize parses a size such as 64m. An empty string is 0.
func ParseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("invalid size %q: want a number with an optional unit, such as 64m", s)
	}
	return n, nil
}

// ParsePlatforms parses entries of comma-separated platforms; "local" is this
// machine's.
func ParsePlatforms(values []string) ([]string, error) {
	var out []string
	for _, v := range values {
		for s := range strings.SplitSeq(v, ",") {
			s = strings.TrimSpace(s)
			if s == "" {
				continue
			}
			var p ocispecs.Platform
			if s == "local" {
				p = platforms.DefaultSpec()
			} else {
				var err error
				if p, err = platforms.Parse(s); err != nil {
					return nil, fmt.Errorf("invalid platform %q: %w", s, err)
				}
			}
			out = append(out, platforms.FormatAll(platforms.Normalize(p)))
		}
	}
	return out, nil
}

// ParseTags checks image names and returns them in full form.
func ParseTags(values []string) ([]string, error) {
	out := make([]string, 0, len(values))
	for _, s := range values {
		ref, err := reference.ParseNormalizedNamed(s)
		if err != nil {
			return nil, fmt.Errorf("invalid tag %q: %w", s, err)
		}
		if _, ok := ref.(reference.Digested); ok {
			return nil, fmt.Errorf("invalid tag %q: a name to build cannot have a digest", s)
		}
		out = append(out, reference.TagNameOnly(ref).String())
	}
	return out, nil
}

// ParseContexts parses NAME=VALUE entries of named contexts. Names are shortened
// as image references are, so that they match FROM lines.
func ParseContexts(values []string) (map[string]string, error) {
	out := make(map[string]string, len(values))
	for _, s := range values {
		name, value, ok := strings.Cut(s, "=")
		if !ok || value == "" {
			return nil, fmt.Errorf("invalid build context %q: want NAME=VALUE", s)
		}
		ref, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return nil, fmt.Errorf("invalid build context %q: name: %w", s, err)
		}
		out[strings.TrimSuffix(reference.FamiliarString(ref), ":latest")] = value
	}
	return out, nil
}
