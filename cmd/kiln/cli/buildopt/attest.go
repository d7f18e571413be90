package buildopt

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
)

// Shorthand returns the --attest value that a --provenance or --sbom value stands
// for.
func Shorthand(kind, value string) string {
	if b, err := strconv.ParseBool(value); err == nil {
		return fmt.Sprintf("type=%s,disabled=%t", kind, !b)
	}
	return "type=" + kind + "," + value
}

// ParseAttests parses --attest values. The result has the attributes of each kind
// in CSV form, or nil when that kind is turned off. The last value of a kind
// counts.
func ParseAttests(values []string) (map[string]*string, error) {
	out := make(map[string]*string, len(values))
	for _, s := range values {
		fields, err := csvFields(s)
		if err != nil {
			return nil, err
		}
		var kind string
		disabled := false
		attrs := []string{}
		for _, f := range fields {
			switch f.key {
			case "type":
				kind = f.value
			case "disabled":
				if disabled, err = strconv.ParseBool(f.value); err != nil {
					return nil, fmt.Errorf("invalid attestation %q: disabled: want true or false", s)
				}
			default:
				attrs = append(attrs, csvQuote(f.key, f.value))
			}
		}
		if kind != "provenance" && kind != "sbom" {
			return nil, fmt.Errorf("invalid attestation %q: type must be provenance or sbom", s)
		}
		if disabled {
			out[kind] = nil
			continue
		}
		slices.Sort(attrs)
		v := strings.Join(append([]string{"type=" + kind}, attrs...), ",")
		out[kind] = &v
	}
	return out, nil
}

var annotationTarget = regexp.MustCompile(`^([a-z-]+)(?:\[([A-Za-z0-9_/-]+)\])?$`)

var annotationTypes = []string{
	exptypes.AnnotationIndex, exptypes.AnnotationIndexDescriptor,
	exptypes.AnnotationManifest, exptypes.AnnotationManifestDescriptor,
}

// ParseAnnotations parses [TYPE[PLATFORM],…:]KEY=VALUE entries into attributes of
// an image exporter.
func ParseAnnotations(values []string) (map[string]string, error) {
	out := make(map[string]string, len(values))
	for _, s := range values {
		left, value, ok := strings.Cut(s, "=")
		if !ok || left == "" {
			return nil, fmt.Errorf("invalid annotation %q: want KEY=VALUE", s)
		}
		targets, key, ok := strings.Cut(left, ":")
		if !ok {
			out[exptypes.AnnotationKey{Key: left}.String()] = value
			continue
		}
		if key == "" {
			return nil, fmt.Errorf("invalid annotation %q: the key is empty", s)
		}
		for target := range strings.SplitSeq(targets, ",") {
			m := annotationTarget.FindStringSubmatch(target)
			if m == nil || !slices.Contains(annotationTypes, m[1]) {
				return nil, fmt.Errorf("invalid annotation %q: unknown type %q: want one of %s, with an optional [platform]",
					s, target, strings.Join(annotationTypes, ", "))
			}
			k := exptypes.AnnotationKey{Type: m[1], Key: key}
			if m[2] != "" {
				p, err := platforms.Parse(m[2])
				if err != nil {
					return nil, fmt.Errorf("invalid annotation %q: platform: %w", s, err)
				}
				k.Platform = &p
			}
			out[k.String()] = value
		}
	}
	return out, nil
}
