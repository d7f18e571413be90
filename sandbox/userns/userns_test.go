package userns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

func TestEcho(t *testing.T) {
	r := newRuntime(t)
	step := newStep(t, "echo hello; id -u; hostname; cat")
	step.Process.Stdin = io.NopCloser(strings.NewReader("input"))
	out, code := run(t, r, step)
	require.Equal(t, "hello\n0\n"+sandbox.DefaultHostname+"\ninput", out)
	require.Zero(t, code)
	entries, err := os.ReadDir(step.Root.Upper)
	require.NoError(t, err)
	require.Len(t, entries, 1, "the layer holds what the step wrote only")
	entries, err = os.ReadDir(filepath.Join(step.Root.Upper, "etc")) // copied up for the mount points in it
	require.NoError(t, err)
	require.Empty(t, entries)
}

func BenchmarkRunTrue(b *testing.B) {
	r := newRuntime(b)
	step := newStep(b, "true")
	step.Owner = "bench"
	keep, err := r.ranges.acquire(step.Owner)
	require.NoError(b, err)
	defer r.ranges.release(keep)
	for b.Loop() {
		res, err := r.Run(context.Background(), step, nil)
		require.NoError(b, err)
		require.Zero(b, res.ExitCode)
	}
}

var _ = []any{bytes.NewReader, errors.New, fmt.Sprint, filepath.Join, syscall.SIGKILL, time.Now, unix.SIGKILL}
