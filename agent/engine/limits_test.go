package engine

import (
	"context"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

func TestLimitsOf(t *testing.T) {
	tests := []struct {
		name  string
		asked *pb.LinuxResources
		most  sandbox.Limits
		want  sandbox.Limits
		err   string
	}{
		{name: "nothing is asked for", want: sandbox.Limits{PIDs: DefaultPIDs}},
		{
			name: "what is asked for", asked: &pb.LinuxResources{Memory: 1 << 30, CpuQuota: 150_000, CpuPeriod: 100_000},
			want: sandbox.Limits{MemoryBytes: 1 << 30, CPUMillis: 1500, PIDs: DefaultPIDs},
		},
		{name: "a quota without a period", asked: &pb.LinuxResources{CpuQuota: 50_000}, want: sandbox.Limits{CPUMillis: 500, PIDs: DefaultPIDs}},
		{name: "hardly any", asked: &pb.LinuxResources{CpuQuota: 1, CpuPeriod: 1 << 40}, want: sandbox.Limits{CPUMillis: 1, PIDs: DefaultPIDs}},
		{
			name: "more than there may be", asked: &pb.LinuxResources{Memory: 1 << 40, CpuQuota: math.MaxInt64, CpuPeriod: math.MaxInt64},
			most: sandbox.Limits{MemoryBytes: 1 << 30, CPUMillis: 500, PIDs: 10}, want: sandbox.Limits{MemoryBytes: 1 << 30, CPUMillis: 500, PIDs: 10},
		},
		{
			name: "less than there may be", asked: &pb.LinuxResources{Memory: 1 << 20},
			most: sandbox.Limits{MemoryBytes: 1 << 30}, want: sandbox.Limits{MemoryBytes: 1 << 20, PIDs: DefaultPIDs},
		},
		{name: "no limits where there are some", most: sandbox.Limits{MemoryBytes: 7, CPUMillis: 9}, want: sandbox.Limits{MemoryBytes: 7, CPUMillis: 9, PIDs: DefaultPIDs}},
		{name: "weights and swap", asked: &pb.LinuxResources{CpuShares: 5, MemorySwap: -1}, want: sandbox.Limits{PIDs: DefaultPIDs}},
		{name: "processors", asked: &pb.LinuxResources{CpusetCpus: "0"}, err: "is refused:"},
		{name: "negative", asked: &pb.LinuxResources{Memory: -1}, err: "negative"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := limitsOf(tt.asked, tt.most)
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
		})
	}
}

func TestExitErrorTellsTheLimit(t *testing.T) {
	ended, end := context.WithCancelCause(context.Background())
	end(errors.New("somebody ended it"))
	l := sandbox.Limits{MemoryBytes: 64 << 20, PIDs: 7, DiskBytes: 1 << 20, Inodes: 99, Timeout: time.Minute}
	for _, tt := range []struct {
		ctx  context.Context
		res  sandbox.Result
		l    sandbox.Limits
		want string
	}{
		{context.Background(), sandbox.Result{ExitCode: 137, Reached: []sandbox.Limit{sandbox.LimitMemory}}, l, "exit code: 137: out of memory: the limit of 64MiB was reached"},
		{context.Background(), sandbox.Result{ExitCode: 1, Reached: []sandbox.Limit{sandbox.LimitMemory}}, sandbox.Limits{}, "exit code: 1: out of memory: the node has none left for the step"},
		{context.Background(), sandbox.Result{ExitCode: 2, Reached: []sandbox.Limit{sandbox.LimitPIDs}}, l, "exit code: 2: the limit of 7 processes and threads was reached"},
		{context.Background(), sandbox.Result{ExitCode: 2, Reached: []sandbox.Limit{sandbox.LimitPIDs, sandbox.LimitDisk}}, l, "exit code: 2: out of disk: the limit of 1MiB was reached"},
		{context.Background(), sandbox.Result{ExitCode: 1, Reached: []sandbox.Limit{sandbox.LimitInodes}}, l, "exit code: 1: out of disk: the limit of 99 files was reached"},
		{context.Background(), sandbox.Result{ExitCode: 137, EndedBy: sandbox.LimitTimeout, Reached: []sandbox.Limit{sandbox.LimitPIDs, sandbox.LimitTimeout}}, l, "exit code: 137: timed out: the limit of 1m0s was reached"},
		{context.Background(), sandbox.Result{EndedBy: sandbox.LimitDisk}, l, "exit code: 0: out of disk: the limit of 1MiB was reached"},
		{context.Background(), sandbox.Result{ExitCode: 2, Reached: []sandbox.Limit{sandbox.LimitLog}}, l, "exit code: 2"},
		{context.Background(), sandbox.Result{ExitCode: 2}, l, "exit code: 2"},
		{ended, sandbox.Result{ExitCode: 137, Reached: []sandbox.Limit{sandbox.LimitMemory}}, l, "somebody ended it"},
	} {
		require.EqualError(t, exitError(tt.ctx, &tt.res, tt.l, nil), tt.want)
	}
	require.NoError(t, exitError(context.Background(), &sandbox.Result{Reached: []sandbox.Limit{sandbox.LimitMemory}}, l, nil), "who went on without the killed process ends well")
	require.NoError(t, exitError(context.Background(), &sandbox.Result{ExitCode: 3}, l, []int{3}))
}
