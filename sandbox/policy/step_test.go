package policy

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFrontendsAndMounts(t *testing.T) {
	builtin := Rules{Name: "builtin", Frontends: []string{BuiltIn}}
	ours := Rules{Name: "ours", Frontends: []string{"r.example.com/frontends"}}
	secrets := Rules{Name: "secrets", Mounts: []string{MountSecret}}
	for _, c := range []struct {
		name  string
		rules []Rules
		in    Request
		want  []string
	}{
		{"nothing is restricted", []Rules{{}}, Request{Frontends: []Image{{"f", "x"}}, Mounts: []MountType{{"m", MountCache}}}, nil},
		{"built in by its image", []Rules{builtin}, Request{Frontends: []Image{{"f", Frontend("docker/dockerfile:1.7 # x")}}}, nil},
		{"image that is called as what is built in", []Rules{builtin}, Request{Frontends: []Image{{"f", Frontend("evil.org/docker/dockerfile")}}},
			[]string{`f: denied by SandboxPolicy "builtin", rule frontends.allowed: front end evil.org/docker/dockerfile may not be used; allowed: builtin`}},
		{"image of the name builtin", []Rules{builtin}, Request{Frontends: []Image{{"f", "builtin/x"}}},
			[]string{`f: denied by SandboxPolicy "builtin", rule frontends.allowed: front end docker.io/builtin/x may not be used; allowed: builtin`}},
		{"built in where only ours are", []Rules{ours}, Request{Frontends: []Image{{"f", BuiltIn}, {"f", "r.example.com/frontends/go@sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"}}},
			[]string{`f: denied by SandboxPolicy "ours", rule frontends.allowed: the built-in Dockerfile front end may not be used; allowed: r.example.com/frontends`}},
		{"nonsense", []Rules{builtin}, Request{Frontends: []Image{{"f", "A B"}}},
			[]string{`f: denied by SandboxPolicy "builtin", rule frontends.allowed: front end "A B" cannot be understood: invalid reference format: repository name (library/A B) must be lowercase`}},
		{"mounts", []Rules{secrets}, Request{Mounts: []MountType{{"a", MountSecret}, {"b", MountBind}, {"c", MountSSH}}},
			[]string{`c: denied by SandboxPolicy "secrets", rule mounts.allowed: mounts of type ssh may not be used; allowed: secret`}},
		{"mount of an unknown type", []Rules{{Name: "any"}}, Request{Mounts: []MountType{{"a", "nfs"}}},
			[]string{`a: denied by SandboxPolicy "any", rule mounts: mount type "nfs" is unknown`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, d := range Check(c.rules, c.in) {
				got = append(got, d.Error())
			}
			require.Equal(t, c.want, got)
		})
	}
}

func TestEveryLimitHasDefaultMaximumAndName(t *testing.T) {
	one := Limits{CPUMillis: 1, MemoryBytes: 1, PIDs: 1, DiskBytes: 1, Inodes: 1, OpenFiles: 1, LogBytes: 1, LogRate: 1, ShmBytes: 1, StepTimeout: 1}
	two := Limits{CPUMillis: 2, MemoryBytes: 2, PIDs: 2, DiskBytes: 2, Inodes: 2, OpenFiles: 2, LogBytes: 2, LogRate: 2, ShmBytes: 2, StepTimeout: 2}
	require.Equal(t, two, Limits{}.Or(two, Limits{}), "the default")
	require.Equal(t, one, Limits{}.Or(two, one), "the default, cut")
	require.Equal(t, one, Limits{}.Or(Limits{}, one), "the most")
	require.Equal(t, two, two.Or(one, one), "what is asked for")
	require.Equal(t, one, Most([]Rules{{Max: two}, {}, {Max: one}}))
	denied := Check([]Rules{{Name: "p", Max: one}}, Request{Limits: two})
	require.Len(t, denied, len(limits))
	fields := map[string]bool{}
	for _, d := range denied {
		fields[d.Field] = true
		require.Contains(t, d.Error(), "at most 1")
	}
	require.Len(t, fields, len(limits))
	require.Len(t, CheckStep([]Rules{{Name: "p", Max: one}}, Step{Class: GVisor, Network: NetworkNone, Security: "sandbox", Limits: two}), len(limits))
	require.Empty(t, CheckStep([]Rules{{Name: "p", Max: one}}, Step{Class: GVisor, Network: NetworkNone, Security: "sandbox"}), "who asks for nothing gets it from who runs the step")
	late := Check([]Rules{{Name: "p", Max: Limits{StepTimeout: time.Minute}}}, Request{Limits: Limits{StepTimeout: time.Hour}})
	require.Equal(t, `spec.stepTimeout: denied by SandboxPolicy "p", rule maxStepTimeout: at most 1m0s`, late[0].Error())
}

func TestNothingOfAStepIsTrusted(t *testing.T) {
	require.Empty(t, CheckStep(nil, Step{Class: Userns, Network: NetworkEgress, Security: "sandbox", Rlimits: []string{"nofile"}}))
	denied := CheckStep(nil, Step{Limits: Limits{PIDs: -1}, Mounts: []Mount{{Destination: "x"}}})
	var rules []string
	for _, d := range denied {
		rules = append(rules, d.Name)
		require.Contains(t, d.Error(), "denied by rule ")
	}
	require.Equal(t, []string{"sandbox-class", "network-mode", "security-mode", "maxResources.limits[kiln.build/pids]", "mount-source", "mount-destination"}, rules)
}
