package buildopt

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/steplimits"
	"github.com/kiln-build/kiln/sandbox/policy"
)

func TestLimits(t *testing.T) {
	dir := contextDir(t)
	req, err := New(Flags{Context: dir, Memory: "64m", CPUs: "1.5"}, env(""))
	require.NoError(t, err)
	for k, v := range map[string]string{"memory": "67108864", "cpuperiod": "100000", "cpuquota": "150000"} {
		require.Equal(t, v, req.Solve.FrontendAttrs[k], k)
	}
	req, err = New(Flags{Context: dir}, env(""))
	require.NoError(t, err)
	for _, k := range []string{"memory", "cpuperiod", "cpuquota"} {
		require.NotContains(t, req.Solve.FrontendAttrs, k)
	}
	for _, bad := range []Flags{{Memory: "x"}, {Memory: "-1"}, {Memory: "0"}, {Memory: "1k"}, {CPUs: "0"}, {CPUs: "-1"}, {CPUs: "NaN"}, {CPUs: "1e9"}, {CPUs: "two"}} {
		bad.Context = dir
		_, err := New(bad, env(""))
		require.Error(t, err, "%+v", bad)
		require.Regexp(t, "^--(memory|cpus)", err.Error())
	}
}

// TestLimitsWithoutWordsOfBuildKit has limits that go beside its options.
func TestLimitsWithoutWordsOfBuildKit(t *testing.T) {
	dir := contextDir(t)
	req, err := New(Flags{Context: dir, PIDsLimit: "500", Disk: "10g", StepTimeout: "90s", Ulimits: []string{"nofile=1024:4096"}}, env(""))
	require.NoError(t, err)
	require.Equal(t, "pids=500,disk=10737418240,timeout=1m30s", req.Solve.FrontendAttrs[steplimits.Key])
	require.Equal(t, "nofile=1024:4096", req.Solve.FrontendAttrs["ulimit"])
	for _, none := range []string{"", "0", "-1"} {
		req, err = New(Flags{Context: dir, PIDsLimit: none}, env(""))
		require.NoError(t, err)
		require.NotContains(t, req.Solve.FrontendAttrs, steplimits.Key)
	}
	for want, bad := range map[string]Flags{
		"--pids-limit: invalid number":        {PIDsLimit: "many"},
		"--pids-limit: invalid number \"-2\"": {PIDsLimit: "-2"},
		"--disk: invalid size":                {Disk: "much"},
		"too small":                           {Disk: "1k"},
		"--step-timeout: invalid time":        {StepTimeout: "5"},
		"want a time from 1s":                 {StepTimeout: "10ms"},
		`ulimit "rtprio" is refused`:          {Ulimits: []string{"rtprio=5"}},
	} {
		bad.Context = dir
		_, err := New(bad, env(""))
		require.ErrorContains(t, err, want)
	}
}

func TestDestinations(t *testing.T) {
	dir := contextDir(t)
	for want, list := range map[string][]string{
		"packages.example.com:443":                                        {"packages.example.com:443"},
		"198.51.100.0/24,198.51.100.7:80,*.example.org,[2001:db8::1]:443": {"198.51.100.0/24", "198.51.100.7:80", "*.example.org", "[2001:db8::1]:443"},
	} {
		req, err := New(Flags{Context: dir, Destinations: list}, env(""))
		require.NoError(t, err)
		text := req.Solve.FrontendAttrs[steplimits.DestinationsKey]
		require.Equal(t, want, text)
		back, err := steplimits.DecodeDestinations(text)
		require.NoError(t, err)
		require.Len(t, back, len(list))
	}
	req, err := New(Flags{Context: dir}, env(""))
	require.NoError(t, err)
	require.NotContains(t, req.Solve.FrontendAttrs, steplimits.DestinationsKey)
	for want, list := range map[string][]string{
		`--destination: "": want a CIDR`:                    {""},
		`--destination: "a b": want a CIDR`:                 {"good.example", "a b"},
		`--destination: "a.example,b.example": want a CIDR`: {"a.example,b.example"},
		`--destination: "a.example:80,b.example:80": want`:  {"a.example:80,b.example:80"},
		`--destination: "https://a.example"`:                {"https://a.example"},
		`--destination: "198.51.100.7/24" has bits set`:     {"198.51.100.7/24"},
		`--destination: "a.example:0" has no port`:          {"a.example:0"},
		`--destination: 257 entries: at most 256`:           slices.Repeat([]string{"a.example"}, policy.MaxDestinations+1),
	} {
		_, err := New(Flags{Context: dir, Destinations: list}, env(""))
		require.ErrorContains(t, err, want)
	}
}
