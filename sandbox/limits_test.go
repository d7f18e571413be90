package sandbox

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLimitsThatMakeNoSense(t *testing.T) {
	require.NoError(t, Limits{}.Validate())
	require.NoError(t, Limits{
		CPUMillis: 1, MemoryBytes: 1 << 20, PIDs: 1, OpenFiles: DefaultOpenFiles, Timeout: time.Second, DiskBytes: 1 << 20, Inodes: 64,
		LogBytes: 64 << 20, LogRate: 1, ShmBytes: 4 << 10,
	}.Validate())
	for _, tt := range []struct {
		limits Limits
		want   string
	}{
		{Limits{CPUMillis: -1}, "CPU limit of -1 is negative"},
		{Limits{MemoryBytes: 4096}, "memory limit of 4096 is too small: want 1048576 or more"},
		{Limits{PIDs: -7}, "process limit of -7 is negative"},
		{Limits{OpenFiles: 3}, "open files limit of 3 is too small: want 16 or more"},
		{Limits{OpenFiles: 2 << 20}, "open files limit of 2097152 is too large: want 1048576 or less"},
		{Limits{Timeout: time.Millisecond}, "timeout of 1ms is too short: want 1s or more"},
		{Limits{Timeout: -time.Second}, "timeout of -1s is too short: want 1s or more"},
		{Limits{DiskBytes: 1000}, "disk limit of 1000 is too small: want 1048576 or more"},
		{Limits{Inodes: 2}, "inode limit of 2 is too small: want 64 or more"},
		{Limits{LogBytes: -1}, "log limit of -1 is negative"},
		{Limits{LogBytes: 1 << 30}, "log limit of 1073741824 bytes is too large: want 67108864 or less"},
		{Limits{LogRate: -1}, "log rate limit of -1 is negative"},
		{Limits{ShmBytes: 1}, "/dev/shm limit of 1 is too small: want 4096 or more"},
	} {
		require.EqualError(t, tt.limits.Validate(), tt.want)
	}
}

func TestHoldLimitsOpenFilesAndCoreFiles(t *testing.T) {
	other, core := Rlimit{"RLIMIT_CPU", 1, 2}, Rlimit{"RLIMIT_CORE", 1, 1}
	for _, tt := range []struct {
		name  string
		most  int64
		asked []Rlimit
		want  []Rlimit
	}{
		{"by default", 0, nil, []Rlimit{{"RLIMIT_NOFILE", 1024, 1 << 20}, core}},
		{"few", 100, nil, []Rlimit{{"RLIMIT_NOFILE", 100, 100}, core}},
		{"when something else is asked for", 0, []Rlimit{other}, []Rlimit{{"RLIMIT_NOFILE", 1024, 1 << 20}, core, other}},
		{"when less is asked for", 1000, []Rlimit{{"RLIMIT_NOFILE", 5, 10}}, []Rlimit{{"RLIMIT_NOFILE", 5, 10}, core}},
		{"when no limit is asked for", 1000, []Rlimit{{"RLIMIT_NOFILE", ^uint64(0), ^uint64(0)}}, []Rlimit{{"RLIMIT_NOFILE", 1000, 1000}, core}},
		{"when no limit is asked for and none set", 0, []Rlimit{{"RLIMIT_NOFILE", 7, ^uint64(0)}}, []Rlimit{{"RLIMIT_NOFILE", 7, 1 << 20}, core}},
		{"when core files are asked for", 0, []Rlimit{{"RLIMIT_CORE", 5, ^uint64(0)}}, []Rlimit{{"RLIMIT_NOFILE", 1024, 1 << 20}, core}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.Equal(t, tt.want, Limits{OpenFiles: tt.most}.Hold(Process{Rlimits: tt.asked}).Rlimits)
		})
	}
}

func TestEndedBy(t *testing.T) {
	res, ok := EndedBy(fmt.Errorf("run: %w", &ReachedError{LimitTimeout}))
	require.True(t, ok)
	require.Equal(t, &Result{ExitCode: 137, EndedBy: LimitTimeout, Reached: []Limit{LimitTimeout}}, res)
	res.Reach(LimitDisk)
	res.Reach(LimitDisk)
	require.Equal(t, []Limit{LimitTimeout, LimitDisk}, res.Reached)
	require.True(t, res.Has(LimitDisk))
	require.False(t, res.Has(LimitMemory))
	for _, err := range []error{nil, errors.New("x"), context.Canceled} {
		_, ok = EndedBy(err)
		require.False(t, ok)
	}
}
