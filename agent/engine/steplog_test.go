package engine

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// logged is what was passed on.
type logged struct{ out bytes.Buffer }

func (l *logged) take(_ int, data []byte) { l.out.Write(data) }

func TestStepLog(t *testing.T) {
	line := func(i int) string { return fmt.Sprintf("line %06d\n", i) }
	for _, tt := range []struct {
		name    string
		limits  sandbox.Limits
		lines   int
		pause   time.Duration // after each line
		failed  bool
		clipped string
		// first and last are lines that must be there, and none that must not.
		first, last, none int
		most              int
	}{
		{name: "little", limits: sandbox.Limits{LogBytes: 10_000}, lines: 10, first: 0, last: 9, none: -1, most: 120},
		{name: "much", limits: sandbox.Limits{LogBytes: 10_000}, lines: 5000, clipped: "9.766KiB", first: 0, last: 600, none: 4999, most: 10_100},
		{name: "much of a step that fails", limits: sandbox.Limits{LogBytes: 10_000}, lines: 5000, failed: true, clipped: "9.766KiB", first: 0, last: 4999, none: 3000, most: 10_100},
		{name: "fast", limits: sandbox.Limits{LogRate: 1000}, lines: 500, clipped: "1000B/s", first: 0, last: 80, none: 400, most: 1100},
		{name: "slow", limits: sandbox.Limits{LogRate: 1000}, lines: 500, pause: 20 * time.Millisecond, first: 0, last: 499, none: -1, most: 7000},
		{name: "by default", lines: 40_000, clipped: "200KiB/s", first: 0, last: 10_000, none: 39_999, most: 201 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var got logged
				log := newStepLog(tt.limits, got.take)
				w := &logStream{log, stdoutStream}
				for i := range tt.lines {
					_, err := io.WriteString(w, line(i))
					require.NoError(t, err)
					time.Sleep(tt.pause)
				}
				log.end(tt.failed)
				out := got.out.String()
				require.LessOrEqual(t, len(out), tt.most)
				require.Contains(t, out, line(tt.first))
				require.Contains(t, out, line(tt.last))
				require.NotContains(t, out, line(tt.none))
				var res sandbox.Result
				log.account(&res)
				require.EqualValues(t, len(line(0))*tt.lines, res.Usage.LogBytes)
				require.Equal(t, tt.clipped != "", res.Has(sandbox.LimitLog))
				require.Equal(t, min(1, len(tt.clipped)), strings.Count(out, "[output clipped, log limit "+tt.clipped))
			})
		})
	}
}

// TestStepLogGoesOn has a step write much at once, and little later.
func TestStepLogGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got logged
		log := newStepLog(sandbox.Limits{LogRate: 1000}, got.take)
		w := &logStream{log, stderrStream}
		_, _ = w.Write(bytes.Repeat([]byte("x"), 5000))
		time.Sleep(10 * time.Second)
		_, _ = io.WriteString(w, "later\n")
		log.end(true)
		require.True(t, strings.HasSuffix(got.out.String(), "reached]\nlater\n"), "%q", got.out.String())
	})
}

// TestStepLogOfOneLine has 100 MB without a line break, of bytes that are no text.
func TestStepLogOfOneLine(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var got logged
	log := newStepLog(sandbox.Limits{LogBytes: 1 << 20, LogRate: 1 << 30}, got.take)
	chunk := bytes.Repeat([]byte("\x00\x1b[2J\xff\x07"), 4<<10)
	for range 100 << 20 / len(chunk) {
		log.write(stdoutStream, chunk)
	}
	log.end(true)
	runtime.ReadMemStats(&after)
	require.LessOrEqual(t, got.out.Len(), 1<<20+100)
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16<<20), "all that was ever allocated")
}

// TestFloodsAreSlowed has a step write ten seconds' worth of what is dropped, after
// what is not slowed.
func TestFloodsAreSlowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got logged
		w := &logStream{newStepLog(sandbox.Limits{LogBytes: 4 << 20, LogRate: 1 << 30}, got.take), stdoutStream}
		chunk := make([]byte, 32<<10)
		began := time.Now()
		for range 2 << 20 / len(chunk) {
			_, _ = w.Write(chunk)
		}
		require.Zero(t, time.Since(began))
		for range 10 * dropRate / len(chunk) {
			_, _ = w.Write(chunk)
		}
		require.InDelta(t, 10, time.Since(began).Seconds(), 1)
	})
}
