package buildopt

import (
	"testing"

	"github.com/stretchr/testify/require"
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
