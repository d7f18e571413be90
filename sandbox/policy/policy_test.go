package policy

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestBuildIsAllowedWhenEveryPolicyAllowsIt(t *testing.T) {
	gvisorOnly := Rules{Name: "strict", RequiredClass: GVisor}
	noNet := Rules{Name: "offline", Networks: []string{NetworkNone}}
	small := Rules{Name: "small", Max: Limits{CPUMillis: 2000, MemoryBytes: 1 << 30}, MaxTimeout: time.Hour}
	ours := Rules{Name: "ours", Pull: []string{"docker.io", "registry.example.com/base"}, Push: []string{"registry.example.com/team-a"}}
	for _, c := range []struct {
		name  string
		rules []Rules
		in    Request
		want  []string
	}{
		{"no policy", nil, Request{Class: Userns}, nil},
		{"required class by default", []Rules{gvisorOnly}, Request{}, nil},
		{"weaker class than required", []Rules{gvisorOnly}, Request{Class: Userns}, []string{`spec.runtimeClassName: denied by SandboxPolicy "strict", rule sandboxClasses.required: sandbox must be gvisor, not userns`}},
		{"unknown class", []Rules{{Name: "any"}}, Request{Class: "runc"}, []string{`spec.runtimeClassName: denied by SandboxPolicy "any", rule sandboxClasses: sandbox "runc" is unknown`}},
		{"class not chosen where two of two are allowed", []Rules{{Name: "both", Classes: []string{GVisor, Userns}}}, Request{}, []string{`spec.runtimeClassName: denied by SandboxPolicy "both", rule sandboxClasses.allowed: sandbox must be one of gvisor, userns, not the default`}},
		{"network more than allowed", []Rules{noNet}, Request{Network: NetworkEgress}, []string{`spec.network: denied by SandboxPolicy "offline", rule network.allowed: network must be one of none, not egress`}},
		{"host network", []Rules{noNet}, Request{Network: "host"}, []string{`spec.network: denied by SandboxPolicy "offline", rule network: network "host" is unknown`}},
		{"limits and timeout by default", []Rules{small}, Request{}, nil},
		{"memory above limit", []Rules{small}, Request{Limits: Limits{MemoryBytes: 2 << 30}}, []string{`spec.resources.limits[memory]: denied by SandboxPolicy "small", rule maxResources.limits[memory]: at most 1073741824 bytes`}},
		{"negative limit", []Rules{small}, Request{Limits: Limits{CPUMillis: -1}}, []string{`spec.resources.limits[cpu]: denied by SandboxPolicy "small", rule maxResources.limits[cpu]: a limit cannot be negative`}},
		{"timeout above limit", []Rules{small}, Request{Timeout: 2 * time.Hour}, []string{`spec.timeout: denied by SandboxPolicy "small", rule maxTimeout: at most 1h0m0s`}},
		{"registries that are allowed", []Rules{ours}, Request{Pull: []Image{{"f", "debian"}, {"f", "registry.example.com/base/go:1"}}, Push: []Image{{"f", "registry.example.com/team-a/x:1"}}}, nil},
		{"push to a neighbour whose name starts the same", []Rules{ours}, Request{Push: []Image{{"spec.output.image", "registry.example.com/team-ab/x:1"}}},
			[]string{`spec.output.image: denied by SandboxPolicy "ours", rule registries.push: images may not be pushed to registry.example.com/team-ab/x; allowed: registry.example.com/team-a`}},
		{"push to Docker Hub by a short name", []Rules{ours}, Request{Push: []Image{{"spec.output.image", "team-a/x"}}},
			[]string{`spec.output.image: denied by SandboxPolicy "ours", rule registries.push: images may not be pushed to docker.io/team-a/x; allowed: registry.example.com/team-a`}},
		{"two policies, both against", []Rules{gvisorOnly, noNet}, Request{Class: Userns, Network: NetworkEgress}, []string{
			`spec.runtimeClassName: denied by SandboxPolicy "strict", rule sandboxClasses.required: sandbox must be gvisor, not userns`,
			`spec.network: denied by SandboxPolicy "offline", rule network.allowed: network must be one of none, not egress`}},
		{"two policies with disjoint classes allow nothing", []Rules{gvisorOnly, {Name: "other", RequiredClass: Userns}}, Request{}, []string{
			`spec.runtimeClassName: denied by SandboxPolicy "other", rule sandboxClasses.required: sandbox must be userns, not gvisor`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, d := range Check(c.rules, Complete(c.rules, c.in)) {
				got = append(got, d.Error())
			}
			require.Equal(t, c.want, got)
		})
	}
}

func TestCompleteTakesTheTightestLimit(t *testing.T) {
	got := Complete([]Rules{{Max: Limits{CPUMillis: 4000, PIDs: 10}, MaxTimeout: time.Hour}, {Max: Limits{CPUMillis: 1000}, MaxTimeout: time.Minute}}, Request{Limits: Limits{PIDs: 5}})
	require.Equal(t, Request{Limits: Limits{CPUMillis: 1000, PIDs: 5}, Timeout: time.Minute}, got)
}

func TestRegistryPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, image string
		want           bool
	}{
		{"docker.io", "debian", true},
		{"docker.io/library", "debian:12", true},
		{"docker.io/library", "evil/library", false},
		{"registry.example.com", "registry.example.com:5000/a", false},
		{"registry.example.com:5000", "registry.example.com:5000/a", true},
		{"registry.example.com/team-a/", "registry.example.com/team-a/x", true},
		{"registry.example.com/team-a", "registry.example.com/team-a", true},
		{"*.example.com", "registry.example.com/x", true},
		{"*.example.com", "example.com/x", false},
		{"*.example.com", "evilexample.com/x", false},
		{"*.example.com", "example.com.evil.org/x", false},
		{"*.", "a./x", false},
		{"", "debian", false},
	} {
		repo, err := Repository(c.image)
		if err != nil {
			require.False(t, c.want, c.image)
			continue
		}
		require.Equal(t, c.want, Match(c.pattern, repo), "%q %q", c.pattern, c.image)
	}
}

func FuzzMatchNeverLeavesTheHost(f *testing.F) {
	f.Add("registry.example.com/team", "registry.example.com/team/x")
	f.Add("*.example.com", "evilexample.com/x")
	f.Fuzz(func(t *testing.T, pattern, image string) {
		repo, err := Repository(image)
		if err == nil && Match("registry.example.com/team", repo) {
			require.Regexp(t, `^registry\.example\.com/team(/|$)`, repo)
		}
		if err == nil {
			Match(pattern, repo)
		}
	})
}
