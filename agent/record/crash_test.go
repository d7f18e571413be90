package record

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestBuildsWithoutResultAreInterrupted(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	create(t, s, "a", "queued")
	w := create(t, s, "a", "runs")
	require.NoError(t, w.Start())
	require.NoError(t, w.Append(stepEvent("one", false)))
	require.NoError(t, w.Append(stepEvent("two", false)))
	require.NoError(t, w.Append(stepEvent("one", true)))
	require.NoError(t, create(t, s, "a", "ended").Finish(succeeded()))
	require.NoError(t, s.Close())

	for range 2 { // and again: nothing more happens
		s = open(t, dir, Options{})
		for _, tt := range []struct {
			id, message string
			events      int
			started     bool
		}{{"queued", "never started", 2, false}, {"runs", "are in the cache", 6, true}} {
			all := events(t, s, "a", tt.id, 0)
			require.Len(t, all, tt.events)
			result := checkWhole(t, all)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, result.GetState())
			require.Equal(t, agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, result.GetFailure().GetReason())
			require.Contains(t, result.GetFailure().GetMessage(), tt.message)
			b, err := s.Get(Key{"a", tt.id})
			require.NoError(t, err)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, b.GetState())
			require.EqualValues(t, tt.events, b.GetEvents())
			require.Equal(t, tt.started, b.GetStartedAt() != nil)
			if tt.started {
				require.Len(t, result.GetSteps(), 2)
				require.True(t, result.GetSteps()[0].GetCached(), "the last that is known of a step")
			}
		}
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, checkWhole(t, events(t, s, "a", "ended", 0)).GetState())
		require.NoError(t, s.Close())
	}
}

// TestCutAtEveryByte cuts the event file of a build that runs at each byte, and adds
// garbage: what was written whole stays, and the build ends once.
func TestCutAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Start())
	for i := range 3 {
		require.NoError(t, w.Append(logEvent(strings.Repeat("y", 10*i))))
	}
	require.NoError(t, s.Close())
	name := filepath.Join(dir, "events", "a.one")
	whole, err := os.ReadFile(name)
	require.NoError(t, err)
	index, err := os.ReadFile(filepath.Join(dir, "builds.db"))
	require.NoError(t, err)
	ends := frameEnds(t, whole)
	garbage := []string{"", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\xff\xff\xff\xff\xff\xff\xff\xff", "\x04\x00\x00\x00abcdefgh"}
	for cut := range len(whole) + 1 {
		data := append(bytes.Clone(whole[:cut]), garbage[cut%len(garbage)]...)
		require.NoError(t, os.WriteFile(name, data, 0o600))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "builds.db"), index, 0o600))
		s, err := Open(dir, Options{})
		require.NoError(t, err, "cut at %d", cut)
		all := events(t, s, "a", "one", 0)
		result := checkWhole(t, all)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, result.GetState())
		want := 0
		for _, end := range ends {
			if end <= cut {
				want++
			}
		}
		require.Len(t, all, max(want, 1)+1, "cut at %d", cut)
		require.NoError(t, s.Close())
	}
}

// TestResultThatOnlyTheLogHas is a crash between the two places where a result is
// stored.
func TestResultThatOnlyTheLogHas(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Start())
	index := filepath.Join(dir, "builds.db")
	before, err := os.ReadFile(index)
	require.NoError(t, err)
	require.NoError(t, w.Finish(succeeded()))
	require.NoError(t, s.Close())
	require.NoError(t, os.WriteFile(index, before, 0o600))
	s = open(t, dir, Options{})
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, checkWhole(t, events(t, s, "a", "one", 0)).GetState())
	b, err := s.Get(Key{"a", "one"})
	require.NoError(t, err)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, b.GetState())
	require.NotNil(t, b.GetStartedAt())
}

func TestDamageOfAnEndedBuildIsTold(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	require.NoError(t, create(t, s, "a", "one").Finish(succeeded()))
	name := filepath.Join(dir, "events", "a.one")
	data, err := os.ReadFile(name)
	require.NoError(t, err)
	data[len(data)-1] ^= 1
	require.NoError(t, os.WriteFile(name, data, 0o600))
	c, err := s.Watch(Key{"a", "one"}, 1)
	require.NoError(t, err)
	_, err = c.Next(context.Background(), true)
	require.ErrorIs(t, err, ErrDamaged)
	require.NoError(t, c.Close())
	require.NoError(t, os.Remove(name))
	_, err = s.Watch(Key{"a", "one"}, 0)
	require.ErrorIs(t, err, ErrDamaged)
}

func TestOrphansAreRemoved(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, open(t, dir, Options{}).Close())
	orphan := filepath.Join(dir, "events", "a.never-acknowledged")
	require.NoError(t, os.WriteFile(orphan, []byte("x"), 0o600))
	open(t, dir, Options{})
	require.NoFileExists(t, orphan)
}

func frameEnds(t *testing.T, data []byte) []int {
	t.Helper()
	var ends []int
	r := bytes.NewReader(data)
	require.NoError(t, readMagic(r))
	for {
		_, err := readFrame(r)
		if err == io.EOF {
			return ends
		}
		require.NoError(t, err)
		ends = append(ends, len(data)-r.Len())
	}
}

// appendUntilKilled is a process that acknowledges builds on stdout and never ends.
func appendUntilKilled(dir string) {
	s, err := Open(dir, Options{})
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("p%d-%d", os.Getpid(), i)
		w, err := s.Create(build("a", name))
		if err != nil {
			panic(err)
		}
		fmt.Println("created", name)
		if err := w.Start(); err != nil {
			panic(err)
		}
		for j := range 20 {
			if err := w.Append(logEvent(strings.Repeat("z", j*50))); err != nil {
				panic(err)
			}
		}
		if i%3 != 0 {
			if err := w.Finish(succeeded()); err != nil {
				panic(err)
			}
			fmt.Println("finished", name)
		}
	}
}

// TestKilledProcess kills a process that appends, at random moments: what it
// acknowledged is there, and every build has one end.
func TestKilledProcess(t *testing.T) {
	dir := t.TempDir()
	created, finished := map[string]bool{}, map[string]bool{}
	for range 12 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), appenderDir+"="+dir)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, os.Stderr
		require.NoError(t, cmd.Start())
		time.Sleep(60*time.Millisecond + time.Duration(rand.IntN(120))*time.Millisecond)
		require.NoError(t, cmd.Process.Signal(unix.SIGKILL))
		require.Error(t, cmd.Wait())
		for line := range strings.Lines(out.String()) {
			verb, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			created[name] = true
			if verb == "finished" {
				finished[name] = true
			}
		}
	}
	require.NotEmpty(t, finished)
	s := open(t, dir, Options{Limits: Limits{Builds: 1 << 20, BuildsPerTenant: 1 << 20}})
	for name := range created {
		if _, err := s.Get(Key{"a", name}); err != nil && len(created) > DefaultLimits.BuildsPerTenant {
			continue // the process itself has removed it
		}
		result := checkWhole(t, events(t, s, "a", name, 0))
		if finished[name] {
			require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), name)
		}
	}
	t.Logf("%d builds created, %d of them finished", len(created), len(finished))
}
