package strategy

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/tonistiigi/go-csvvalue"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent/steplimits"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Validate reports everything that is wrong with a spec as an *InvalidError, or
// nil. It needs nothing but the spec, and does not say whether a node, a policy or
// a registry allows what the spec wants.
func Validate(spec *agentv1.BuildSpec) error {
	v := &validator{spec: spec}
	if spec == nil {
		v.add("spec", "is missing")
		return v.err()
	}
	v.source("spec.source", spec.GetSource())
	v.secrets("spec.secrets", spec.GetSecrets())
	switch s := spec.GetStrategy().(type) {
	case *agentv1.BuildSpec_Dockerfile:
		v.dockerfile("spec.dockerfile", s.Dockerfile)
	case *agentv1.BuildSpec_Steps:
		v.steps("spec.steps", s.Steps)
	default:
		v.add("spec.strategy", "is missing; want dockerfile or steps")
	}
	v.enums()
	v.resources("spec.resources", spec.GetResources())
	v.destinations("spec.destinations", spec.GetDestinations())
	v.duration("spec.timeout", spec.GetTimeout(), maxTimeout)
	v.outputs("spec.outputs", spec.GetOutputs())
	v.caches()
	v.platforms("spec.platforms", spec.GetPlatforms())
	v.labels("spec.labels", spec.GetLabels())
	if len(spec.GetCacheScope()) > maxLabelValue {
		v.add("spec.cache_scope", "is longer than %d bytes", maxLabelValue)
	}
	v.attestations("spec.attestations", spec.GetAttestations())
	if spec.GetSourceDateEpoch() < 0 {
		v.add("spec.source_date_epoch", "is negative; want seconds since 1970")
	}
	return v.err()
}

// validator collects what is wrong with one spec.
type validator struct {
	problems
	spec *agentv1.BuildSpec
	// declared holds the IDs of spec.secrets.
	declared map[string]bool
}

// check adds err, if there is one, as the message of field.
func (v *validator) check(field string, err error) bool {
	if err != nil {
		v.add(field, "%s", err)
	}
	return err == nil
}

// count reports a list or map of more than limit elements. What is too long is not
// looked at further.
func (v *validator) count(field string, n, limit int) bool {
	if n > limit {
		v.add(field, "has %d entries; at most %d are allowed", n, limit)
	}
	return n <= limit && !v.full()
}

// value checks a value that ends up in a process's arguments or environment.
func (v *validator) value(field, s string) {
	if len(s) > maxValue {
		v.add(field, "is longer than %d bytes", maxValue)
	} else if strings.ContainsRune(s, 0) {
		v.add(field, "has a zero byte")
	}
}

// pairs checks a map of values by name.
func (v *validator) pairs(field string, m map[string]string, limit int, name *regexp.Regexp) {
	if !v.count(field, len(m), limit) {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(m)) {
		f := entry(field, key)
		switch {
		case key == "" || len(key) > maxName:
			v.add(f, "the name must have 1 to %d bytes", maxName)
		case strings.ContainsFunc(key, isControl):
			v.add(f, "the name has a control character")
		case name != nil && !name.MatchString(key):
			v.add(f, "the name must consist of letters, digits, '_', '.' and '-', and not begin with a digit")
		}
		v.value(f, m[key])
	}
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// values checks a list of arguments.
func (v *validator) values(field string, list []string) {
	if !v.count(field, len(list), maxArgs) {
		return
	}
	for i, s := range list {
		v.value(item(field, i), s)
	}
}

func (v *validator) duration(field string, d *durationpb.Duration, limit time.Duration) {
	switch {
	case d == nil:
	case d.CheckValid() != nil || d.AsDuration() <= 0:
		v.add(field, "want a positive duration")
	case d.AsDuration() > limit:
		v.add(field, "is longer than %s", limit)
	}
}

func (v *validator) enums() {
	s := v.spec
	if _, ok := agentv1.SandboxClass_name[int32(s.GetSandbox())]; !ok {
		v.add("spec.sandbox", "has the unknown value %d", int32(s.GetSandbox()))
	}
	if _, ok := agentv1.NetworkMode_name[int32(s.GetNetwork())]; !ok {
		v.add("spec.network", "has the unknown value %d", int32(s.GetNetwork()))
	}
}

func (v *validator) destinations(field string, list []string) {
	for _, p := range (policy.Destinations{Allow: list}).Problems() {
		if p.Index < 0 {
			v.add(field, "has %v", p.Err)
		} else {
			v.add(item(field, p.Index), "%v", p.Err)
		}
	}
}

func (v *validator) resources(field string, r *agentv1.Resources) {
	for _, p := range steplimits.Check(r) {
		v.add(field+"."+p.Field, "%s", p.Err)
	}
	if m := r.GetMemoryBytes(); m > 0 && m < minMemory {
		v.add(field+".memory_bytes", "is less than %d bytes, which no step can run in", minMemory)
	}
}

func (v *validator) secrets(field string, refs []*agentv1.SecretRef) {
	v.declared = map[string]bool{}
	if !v.count(field, len(refs), maxSecrets) {
		return
	}
	for i, r := range refs {
		f := item(field, i) + ".id"
		switch {
		case !validSecretID(r.GetId()):
			v.add(f, "%s is not the ID of a secret; want 1 to 253 letters, digits, '.', '_' and '-'", quote(r.GetId()))
		case v.declared[r.GetId()]:
			v.add(f, "%s is declared twice", quote(r.GetId()))
		}
		v.declared[r.GetId()] = true
	}
}

func validSecretID(id string) bool { return secretID.MatchString(id) && id != "." && id != ".." }

func (v *validator) platforms(field string, list []string) {
	if !v.count(field, len(list), maxPlatforms) {
		return
	}
	seen := map[string]bool{}
	for i, s := range list {
		p, err := parsePlatform(s)
		if !v.check(item(field, i), err) {
			continue
		}
		if key := platforms.FormatAll(p); seen[key] {
			v.add(item(field, i), "%s is named twice", quote(s))
		} else {
			seen[key] = true
		}
	}
	if v.spec.GetSteps() != nil && len(list) > 1 {
		v.add(field, "steps build for one platform; start a build for each")
	}
}

func (v *validator) labels(field string, m map[string]string) {
	if !v.count(field, len(m), maxLabels) {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if key == "" || len(key) > maxLabelValue || strings.ContainsFunc(key, isControl) {
			v.add(entry(field, key), "the name must have 1 to %d bytes and no control characters", maxLabelValue)
		}
		if len(m[key]) > maxLabelValue {
			v.add(entry(field, key), "is longer than %d bytes", maxLabelValue)
		}
	}
}

// attestationKeys lists what may be said about each kind of attestation. Who built
// an image is not for a spec to say.
var attestationKeys = map[string][]string{
	"provenance": {"mode", "version", "inline-only", "reproducible", "disabled", "type"},
	"sbom":       {"generator", "disabled", "type"},
}

func (v *validator) attestations(field string, m map[string]string) {
	for _, kind := range slices.Sorted(maps.Keys(m)) {
		f := entry(field, kind)
		keys, ok := attestationKeys[kind]
		if !ok {
			v.add(f, "is not known; want provenance or sbom")
			continue
		}
		attrs, _, err := parseAttestation(m[kind])
		if err != nil {
			v.add(f, "%s is not a list of name=value", quote(m[kind]))
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(attrs)) {
			value := attrs[name]
			switch {
			case kind == "sbom" && strings.HasPrefix(name, "scan-"):
			case !slices.Contains(keys, name):
				v.add(f, "has the unknown option %s", quote(name))
			case name == "mode" && value != "min" && value != "max":
				v.add(f, "mode must be min or max")
			case name == "type" && value != kind:
				v.add(f, "type must be %s", kind)
			case name == "generator":
				_, err := checkImage(value)
				v.check(f, err)
			}
		}
	}
}

// parseAttestation reads the value of an attestation, which may also be a boolean.
// on is false when it is turned off.
func parseAttestation(s string) (attrs map[string]string, on bool, err error) {
	attrs = map[string]string{}
	switch s {
	case "", "true":
		return attrs, true, nil
	case "false":
		return attrs, false, nil
	}
	fields, err := csvvalue.Fields(s, nil)
	if err != nil {
		return nil, false, err
	}
	for _, f := range fields {
		name, value, ok := strings.Cut(f, "=")
		if !ok || name == "" {
			return nil, false, errNotPair
		}
		attrs[name] = value
	}
	return attrs, attrs["disabled"] != "true", nil
}
