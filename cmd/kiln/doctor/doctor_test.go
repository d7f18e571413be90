package doctor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

func ok(context.Context) (string, error) { return "fine", nil }

func bad(context.Context) (string, error) { return "", problem("mend it.", "broken\nbadly") }

func TestReport(t *testing.T) {
	tests := []struct {
		name   string
		checks []Check
		usable bool
		want   []string
	}{
		{"all is well", []Check{{"a", all, ok}}, true, []string{"a      ok", "Sandbox gvisor works", "Sandbox userns works"}},
		{"a warning", []Check{{"a", nil, bad}}, true, []string{"a      warn    broken badly", "a: mend it."}},
		{"one class", []Check{{"a", gvisorOnly, bad}}, true, []string{"a      FAIL", "Sandbox gvisor does not work here: a", "Sandbox userns works"}},
		{"no class", []Check{{"a", gvisorOnly, bad}, {"b", usernsOnly, bad}}, false, []string{"Sandbox userns does not work here: b"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := runAll(context.Background(), tt.checks)
			require.Equal(t, tt.usable, r.Usable())
			var out bytes.Buffer
			require.NoError(t, r.Write(&out))
			for _, w := range tt.want {
				require.Contains(t, out.String(), w)
			}
		})
	}
}

func TestReleaseNumbers(t *testing.T) {
	for in, want := range map[string][2]int{"6.18.44-fc": {6, 18}, "6.1-rc3": {6, 1}, "5.19": {5, 19}, "7": {7, 0}, "": {0, 0}, "x.y": {0, 0}} {
		major, minor := releaseNumbers(in)
		require.Equal(t, want, [2]int{major, minor}, in)
	}
}

func FuzzReleaseNumbers(f *testing.F) {
	f.Add("6.18.44-fc-v657")
	f.Fuzz(func(_ *testing.T, s string) { releaseNumbers(s) })
}

// TestChecksLeaveNothing runs every check on this machine twice.
func TestChecksLeaveNothing(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Root: filepath.Join(dir, "root"), RunscPath: built(t, "runsc")}
	for range 2 {
		report := Run(context.Background(), cfg)
		require.True(t, report.Usable())
		for _, res := range report {
			if len(res.Check.Needs) > 0 {
				require.NoError(t, res.Err, res.Check.Name)
			}
		}
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// built returns the path of a tool that the Makefile builds.
func built(t *testing.T, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "..", "..", "bin", name))
	require.NoError(t, err)
	_, err = os.Stat(p)
	require.NoError(t, err, "run `make build` first")
	return p
}

func TestMissingTools(t *testing.T) {
	report := Run(context.Background(), Config{Root: t.TempDir()})
	require.True(t, report.Usable(), "userns needs no tool")
	for _, res := range report {
		if res.Err == nil {
			continue
		}
		var p *Problem
		require.True(t, errors.As(res.Err, &p), res.Check.Name)
		require.NotEmpty(t, p.Fix, res.Check.Name)
	}
	require.Contains(t, report.broken(sandbox.GVisor), "runsc")
	require.Empty(t, report.broken(sandbox.Userns))
}

func TestStateDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for _, root := range []string{file, filepath.Join(file, "below"), "/proc/none", "/tmp/a:b"} {
		_, err := stateDir(root)
		require.Error(t, err, root)
	}
}

func TestLockHolder(t *testing.T) {
	root := t.TempDir()
	detail, err := lockHolder(root)
	require.NoError(t, err)
	require.Equal(t, "free", detail)
	unlock, err := snapshot.Lock(context.Background(), root, nil)
	require.NoError(t, err)
	_, err = lockHolder(root)
	require.ErrorContains(t, err, "in use by process")
	require.NoError(t, unlock())
}
