package steplimits

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox/policy"
)

func TestLimitsComeBackAsTheyWere(t *testing.T) {
	for _, l := range []policy.Limits{
		{},
		{PIDs: 100},
		{PIDs: 1, DiskBytes: 2, Inodes: 3, OpenFiles: 4, LogBytes: 5, LogRate: 6, ShmBytes: 7, StepTimeout: 90 * time.Second},
	} {
		got, err := Decode(Encode(l))
		require.NoError(t, err)
		require.Equal(t, l, got)
	}
	require.Equal(t, "pids=100,timeout=1m30s", Encode(policy.Limits{CPUMillis: 1, MemoryBytes: 2, PIDs: 100, StepTimeout: 90 * time.Second}))
}

func TestWhatIsNotUnderstoodIsNoMissingLimit(t *testing.T) {
	for _, s := range []string{"pids", "pids=", "pids=0", "pids=-1", "pids=1e3", "pids=99999999999999999999", "timeout=5", "timeout=-1s", "memory=1", "PIDS=1", "pids=1,", ",", " pids=1", "pids=1,pids=2"} {
		_, err := Decode(s)
		require.ErrorContains(t, err, Key, s)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("pids=1,timeout=1s")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := Decode(s)
		if err != nil {
			require.Zero(t, l)
			return
		}
		again, err := Decode(Encode(l))
		require.NoError(t, err)
		require.Equal(t, l, again)
	})
}
