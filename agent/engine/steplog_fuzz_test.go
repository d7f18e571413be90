package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// FuzzStepLog has a step write pieces of any size at any time. What is passed on is
// within its limit but for the notes that some was dropped, and the writer never waits
// for long.
func FuzzStepLog(f *testing.F) {
	f.Add([]byte{1, 255, 3, 255, 2, 0, 255}, int64(100), int64(10), true)
	f.Add([]byte{255, 255, 255, 255}, int64(1), int64(1), false)
	f.Fuzz(func(t *testing.T, writes []byte, limit, rate int64, failed bool) {
		limit, rate = 1+limit&(1<<20-1), 1+rate&(1<<20-1)
		synctest.Test(t, func(t *testing.T) {
			var passed int64
			notes := 0
			log := newStepLog(sandbox.Limits{LogBytes: limit, LogRate: rate}, func(_ int, data []byte) {
				if len(data) > 20 && string(data[:8]) == "\n[output" {
					notes++
					return
				}
				passed += int64(len(data))
			})
			for i, w := range writes[:min(len(writes), 64)] {
				wait := log.write(1+i%2, make([]byte, int(w)*int(w)*8))
				require.Less(t, wait, 2*time.Second)
				time.Sleep(max(wait, time.Duration(w%16)*100*time.Millisecond))
			}
			log.end(failed)
			require.LessOrEqual(t, passed, limit)
			require.LessOrEqual(t, notes, 65)
		})
	})
}
