package record

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// kept lists the builds that are there, the oldest first.
func kept(t *testing.T, s *Store) string {
	t.Helper()
	page, _, err := s.List(Query{PageSize: 1000, PageBytes: 1 << 30})
	require.NoError(t, err)
	names := make([]string, len(page))
	for i, b := range page {
		names[len(page)-1-i] = b.GetTenant() + "/" + b.GetBuildId()
	}
	files, err := os.ReadDir(filepath.Join(s.root.Name(), "events"))
	require.NoError(t, err)
	require.Len(t, files, len(names), "event files")
	return strings.Join(names, " ")
}

func TestOldestEndedBuildsGoFirst(t *testing.T) {
	clk := newClock()
	s := open(t, t.TempDir(), Options{Now: clk.now, Limits: Limits{Builds: 5, BuildsPerTenant: 3, Age: time.Hour}})
	make := func(tenant string, i int, end bool) {
		w := create(t, s, tenant, id(i))
		if end {
			require.NoError(t, w.Finish(succeeded()))
		}
		clk.advance(time.Second)
	}
	make("a", 0, false)
	for i := 1; i < 6; i++ {
		make("a", i, true)
	}
	require.NoError(t, s.Sweep())
	require.Equal(t, "a/b0 a/b4 a/b5", kept(t, s), "per tenant; the one that runs stays")
	make("b", 6, true)
	make("c", 7, true)
	make("d", 8, true)
	require.NoError(t, s.Sweep())
	require.Equal(t, "a/b0 a/b5 b/b6 c/b7 d/b8", kept(t, s), "in all")
	clk.advance(time.Hour - 2*time.Second)
	require.NoError(t, s.Sweep())
	require.Equal(t, "a/b0 c/b7 d/b8", kept(t, s), "by age")
	clk.advance(time.Hour)
	require.NoError(t, s.Sweep())
	require.Equal(t, "a/b0", kept(t, s), "never one that runs")
	// An ID of a build that is forgotten is free.
	make("a", 5, true)
	require.Len(t, events(t, s, "a", "b5", 0), 2)
}

// TestClockThatJumpsBetweenLives opens records of the far past and of the future: both
// are there for some time, and the newest end of this life goes last.
func TestClockThatJumpsBetweenLives(t *testing.T) {
	for name, jump := range map[string]time.Duration{"ahead": 365 * 24 * time.Hour, "back": -365 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			clk, dir := newClock(), t.TempDir()
			opts := Options{Now: clk.now, Limits: Limits{BuildsPerTenant: 2, Age: 24 * time.Hour}}
			s := open(t, dir, opts)
			require.NoError(t, create(t, s, "a", "b0").Finish(succeeded()))
			clk.advance(time.Minute)
			require.NoError(t, create(t, s, "b", "b1").Finish(succeeded()))
			require.NoError(t, create(t, s, "b", "b2").Finish(succeeded()))
			require.NoError(t, s.Close())

			clk.advance(jump)
			s = open(t, dir, opts)
			require.NoError(t, s.Sweep())
			require.Len(t, events(t, s, "a", "b0", 0), 2)
			clk.advance(leastAge - time.Minute)
			require.NoError(t, s.Sweep())
			require.Len(t, events(t, s, "a", "b0", 0), 2)
			require.NoError(t, create(t, s, "b", "b3").Finish(succeeded()))
			require.NoError(t, s.Sweep())
			require.Len(t, events(t, s, "b", "b3", 0), 2, "what has just ended is not the oldest")
			clk.advance(opts.Limits.Age + time.Minute)
			require.NoError(t, s.Sweep())
			require.Empty(t, kept(t, s))
		})
	}
}

func TestWatcherOfARemovedBuildReadsOn(t *testing.T) {
	s := open(t, t.TempDir(), Options{Limits: Limits{Builds: 1}})
	require.NoError(t, create(t, s, "a", "one").Finish(succeeded()))
	c, err := s.Watch(Key{"a", "one"}, 0)
	require.NoError(t, err)
	defer c.Close()
	create(t, s, "a", "two")
	_, err = s.Get(Key{"a", "one"})
	require.ErrorIs(t, err, ErrNotFound)
	for want := range uint64(2) {
		ev, err := c.Next(t.Context(), true)
		require.NoError(t, err)
		require.Equal(t, want, ev.GetOffset())
	}
}

func TestOutputIsBounded(t *testing.T) {
	s := open(t, t.TempDir(), Options{Limits: Limits{LogBytes: 10 << 10}})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Start())
	for i := range 1000 {
		require.NoError(t, w.Append(logEvent(strings.Repeat("x", 100))))
		if i%100 == 0 {
			require.NoError(t, w.Append(stepEvent(fmt.Sprint(i), true)))
		}
	}
	require.NoError(t, w.Finish(succeeded()))
	all := events(t, s, "a", "one", 0)
	checkWhole(t, all)
	warnings, steps := 0, 0
	for _, ev := range all {
		if ev.GetWarning() != nil {
			warnings++
			require.Contains(t, ev.GetWarning().GetMessage(), "limit of 10240 bytes")
		}
		if ev.GetStep() != nil {
			steps++
		}
	}
	require.Equal(t, 1, warnings)
	require.Equal(t, 10, steps, "steps are not output")
	fi, err := os.Stat(filepath.Join(s.root.Name(), "events", "a.one"))
	require.NoError(t, err)
	require.Less(t, fi.Size(), int64(13<<10))
}

func TestStepsAreBoundedToo(t *testing.T) {
	s := open(t, t.TempDir(), Options{Limits: Limits{LogBytes: leastLog}})
	w := create(t, s, "a", "one")
	require.NoError(t, w.Start())
	long := strings.Repeat("d", 64<<10)
	for range 300 {
		require.NoError(t, w.Append(stepEvent(long, true)))
	}
	require.NoError(t, w.Finish(succeeded()))
	checkWhole(t, events(t, s, "a", "one", 0))
	fi, err := os.Stat(filepath.Join(s.root.Name(), "events", "a.one"))
	require.NoError(t, err)
	require.Less(t, fi.Size(), int64(leastLog+stepAllowance+(1<<20)))
}

func TestAllLogsTogetherAreBounded(t *testing.T) {
	clk := newClock()
	const perBuild, total = 256 << 10, 1 << 20
	s := open(t, t.TempDir(), Options{Now: clk.now, Limits: Limits{LogBytes: perBuild, Bytes: total}})
	for i := range 12 {
		w := create(t, s, "a", id(i))
		require.NoError(t, w.Start())
		for range 100 {
			require.NoError(t, w.Append(logEvent(strings.Repeat("x", 4<<10))))
		}
		require.NoError(t, w.Finish(succeeded()))
		clk.advance(time.Second)
		require.LessOrEqual(t, eventBytes(t, s), int64(total+(1<<10)))
	}
	require.Contains(t, kept(t, s), "a/b11")
	require.NotContains(t, kept(t, s), "a/b0 ")
}

func TestOneTenantsLogsDoNotDriveOutAnothers(t *testing.T) {
	clk := newClock()
	s := open(t, t.TempDir(), Options{Now: clk.now, Limits: Limits{LogBytes: 128 << 10, Bytes: 1 << 20}})
	require.NoError(t, create(t, s, "b", "quiet").Finish(succeeded()))
	for i := range 20 {
		clk.advance(time.Second)
		w := create(t, s, "a", id(i))
		require.NoError(t, w.Start())
		require.NoError(t, w.Append(logEvent(strings.Repeat("x", 120<<10))))
		require.NoError(t, w.Finish(succeeded()))
	}
	require.Contains(t, kept(t, s), "b/quiet")
}

func TestBuildsThatRunShareWhatIsLeft(t *testing.T) {
	const perBuild = 256 << 10
	s := open(t, t.TempDir(), Options{Limits: Limits{LogBytes: perBuild, Bytes: 2 * perBuild}})
	var writers []*Writer
	for i := range 4 {
		w := create(t, s, "a", id(i))
		require.NoError(t, w.Start())
		writers = append(writers, w)
	}
	for range 200 {
		for _, w := range writers {
			require.NoError(t, w.Append(logEvent(strings.Repeat("x", 4<<10))))
		}
	}
	for _, w := range writers {
		require.NoError(t, w.Finish(succeeded()))
	}
	require.LessOrEqual(t, eventBytes(t, s), int64(2*perBuild+2*(leastLog+4<<10)))
}

func eventBytes(t *testing.T, s *Store) int64 {
	t.Helper()
	dir := filepath.Join(s.root.Name(), "events")
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	var n int64
	for _, f := range files {
		fi, err := f.Info()
		require.NoError(t, err)
		n += fi.Size()
	}
	return n
}
