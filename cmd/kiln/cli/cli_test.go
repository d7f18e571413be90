package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

func TestDisplayMode(t *testing.T) {
	tests := []struct {
		progress, env string
		quiet         bool
		want          progressui.DisplayMode
		wantQuiet     bool
		err           string
	}{
		{"auto", "", false, progressui.AutoMode, false, ""},
		{"auto", "plain", false, progressui.PlainMode, false, ""},
		{"auto", "nonsense", false, "", false, "unknown progress"},
		{"auto", "plain", true, progressui.QuietMode, true, ""},
		{"plain", "tty", false, progressui.PlainMode, false, ""},
		{"quiet", "", false, progressui.QuietMode, true, ""},
		{"none", "", false, progressui.QuietMode, false, ""},
		{"plain", "", true, "", true, "exclude"},
		{"loud", "", false, "", false, "unknown progress"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			t.Setenv("BUILDKIT_PROGRESS", tt.env)
			f := &buildFlags{progress: tt.progress, quiet: tt.quiet}
			got, err := f.displayMode()
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
			require.Equal(t, tt.wantQuiet, f.quiet)
		})
	}
}

func TestTarget(t *testing.T) {
	tests := []struct {
		in    target
		class sandbox.Class
		err   string
	}{
		{target{}, sandbox.GVisor, ""},
		{target{sandbox: "userns"}, sandbox.Userns, ""},
		{target{sandbox: "none"}, "", "want one of gvisor, userns"},
		{target{agent: "unix:///x"}, "", ""},
		{target{agent: "x"}, "", "unix:///path"},
		{target{agent: "unix:///x", root: "/r"}, "", "exclude each other"},
		{target{agent: "unix:///x", sandbox: "gvisor"}, "", "exclude each other"},
	}
	for _, tt := range tests {
		class, err := tt.in.check()
		if tt.err != "" {
			require.ErrorContains(t, err, tt.err)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, tt.class, class)
	}
}

func TestReport(t *testing.T) {
	interrupted, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("interrupted by signal: interrupt"))
	tests := []struct {
		name string
		ctx  context.Context
		err  error
		code int
		want string
	}{
		{"done", context.Background(), nil, ExitOK, ""},
		{"usage", context.Background(), usage(errors.New("no such flag")), ExitUsage, "no such flag"},
		{"failed", context.Background(), errors.New("failed to solve: oh"), ExitFailed, "kiln: oh\n"},
		{"already printed", context.Background(), silentError{}, ExitFailed, ""},
		{"interrupted", interrupted, errors.New("context canceled"), ExitInterrupted, "interrupted by signal"},
		{"full disk", context.Background(), errors.New("write: no space left on device"), ExitFailed, "kiln prune"},
		{"no sandbox", context.Background(), fmt.Errorf("build: %w", &sandbox.UnavailableError{Class: sandbox.GVisor, Missing: "runsc"}), ExitFailed, "kiln doctor"},
		{"file not in context", context.Background(), errors.New(`failed to calculate checksum of ref a::b: "/x": not found`), ExitFailed, ".dockerignore"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			a := &App{Stderr: &out}
			require.Equal(t, tt.code, a.report(tt.ctx, a.command(), tt.err))
			require.Contains(t, out.String(), tt.want)
		})
	}
}

func TestPruneOptions(t *testing.T) {
	f := &pruneFlags{all: true, filters: []string{"until=24h", "type==regular"}, keep: "1GB", maxUsed: "2GB", minFree: "512m"}
	opts, err := f.options()
	require.NoError(t, err)
	info := &client.PruneInfo{}
	for _, o := range opts {
		o.SetPruneOption(info)
	}
	require.Equal(t, &client.PruneInfo{
		All: true, Filter: []string{"type==regular"}, KeepDuration: 24 * time.Hour,
		ReservedSpace: 1 << 30, MaxUsedSpace: 2 << 30, MinFreeSpace: 512 << 20,
	}, info)
	for _, bad := range []pruneFlags{
		{keep: "1", reserved: "1"}, {maxUsed: "lots"}, {minFree: "-1"}, {filters: []string{"until=yesterday"}}, {filters: []string{"==x"}},
	} {
		_, err := bad.options()
		require.Error(t, err)
	}
}

func TestWriteUsage(t *testing.T) {
	now := time.Unix(1700000000, 0)
	used := now.Add(-3 * time.Hour)
	var out bytes.Buffer
	require.NoError(t, writeUsage(&out, []*client.UsageInfo{
		{ID: "aaa", Size: 1500, RecordType: client.UsageRecordTypeRegular, LastUsedAt: &used, Description: "RUN \x1b[31mred\tx " + strings.Repeat("y", 100)},
		{ID: "bbb", Size: 500, InUse: true, Mutable: true, Shared: true, RecordType: client.UsageRecordTypeCacheMount},
	}, now))
	s := out.String()
	require.Contains(t, s, "3 hours ago")
	require.Contains(t, s, "bbb*")
	require.Contains(t, s, "Total: 2kB in 2 records, of which 1.5kB can be freed and 500B is shared")
	require.NotContains(t, s, "\x1b")
	require.Contains(t, s, "…")
}

func FuzzShorten(f *testing.F) {
	f.Add("RUN \x1b[2J\xff…")
	f.Fuzz(func(t *testing.T, s string) {
		out := shorten(s)
		if strings.ContainsAny(out, "\x1b\n\t\r") || len([]rune(out)) > maxDescription {
			t.Fatalf("%q becomes %q", s, out)
		}
	})
}

func TestDecodeFact(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	require.JSONEq(t, `{"a":1}`, fmt.Sprintf("%s", decodeFact(b64(`{"a":1}`))))
	require.JSONEq(t, `[{"a":1}]`, fmt.Sprintf("%s", decodeFact(b64(`[{"a":1}]`))))
	for _, s := range []string{"sha256:00", "", "abcd", b64(`{}`), b64(`"x"`)} {
		require.Equal(t, s, decodeFact(s))
	}
}

func TestDecodeProvenance(t *testing.T) {
	doc, err := decodeProvenance([]byte(`{"buildDefinition":{"buildType":"t"},"runDetails":{"builder":{"id":"me"},"metadata":{"invocationID":"i"}}}`), "https://slsa.dev/provenance/v1")
	require.NoError(t, err)
	require.Nil(t, doc.Metadata)
	require.Equal(t, "me", doc.Builder.ID)
	_, err = decodeProvenance([]byte(`{`), "https://slsa.dev/provenance/v0.2")
	require.ErrorContains(t, err, "decode provenance")
}

func FuzzDecodeProvenance(f *testing.F) {
	f.Add([]byte(`{"buildDefinition":{}}`), true)
	f.Fuzz(func(_ *testing.T, data []byte, v1 bool) {
		predicate := "https://slsa.dev/provenance/v0.2"
		if v1 {
			predicate = "https://slsa.dev/provenance/v1"
		}
		_, _ = decodeProvenance(data, predicate)
	})
}

func TestWriteFileReplacesAtOnce(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "out")
	for _, s := range []string{"one", "two"} {
		require.NoError(t, writeFile(name, []byte(s)))
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Equal(t, s, string(data))
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Error(t, writeFile(filepath.Join(dir, "no", "such"), nil))
}

func TestFindTool(t *testing.T) {
	t.Setenv("KILN_RUNSC", "/some/where")
	require.Equal(t, "/some/where", findTool("runsc"))
	t.Setenv("KILN_RUNSC", "")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "runsc"), nil, 0o755))
	t.Setenv("PATH", dir)
	require.Equal(t, filepath.Join(dir, "runsc"), findTool("runsc"))
	t.Setenv("PATH", t.TempDir())
	require.Empty(t, findTool("runsc"))
}

// TestMainIsolatesOnce checks the order: a usage error starts nothing, and what
// starts the process anew comes before stdin is read.
func TestMainIsolatesOnce(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\n"), 0o644))
	t.Setenv("KILN_AGENT", "")
	stdin := strings.NewReader("FROM scratch\n")
	var out bytes.Buffer
	isolated, started := 0, 0
	a := &App{
		Stdin: stdin, Stdout: &out, Stderr: &out,
		Isolate: func() error {
			isolated++
			require.Equal(t, int64(stdin.Len()), stdin.Size())
			return nil
		},
		Start: func(context.Context, EngineConfig) (Engine, error) {
			started++
			return nil, errors.New("no engine today")
		},
	}
	require.Equal(t, ExitUsage, a.Main(context.Background(), []string{"build", "--root", dir, "--sandbox", "x", "-"}))
	require.Zero(t, isolated)
	require.Equal(t, ExitFailed, a.Main(context.Background(), []string{"build", "--root", dir, "-"}))
	require.Contains(t, out.String(), "no engine today")
	require.Equal(t, []int{1, 1}, []int{isolated, started})
}

// TestTimesOfTheFuture lists builds of a node whose clock is ahead, or went back.
func TestTimesOfTheFuture(t *testing.T) {
	now := time.Now()
	later := now.Add(time.Hour)
	var out bytes.Buffer
	require.NoError(t, writeBuilds(&out, []listed{{Name: "a", Created: later, Started: &later, Ended: &now}}, false, now))
	require.NotContains(t, out.String(), "-")
	require.Contains(t, out.String(), "0s")
}
