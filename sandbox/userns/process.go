package userns

import (
	"context"
	"fmt"
	"syscall"

	"github.com/kiln-build/kiln/sandbox"
)

// supervise waits for a process that runs p, and returns how it ended.
func supervise(ctx context.Context, c *child, p sandbox.Process, streams *streams) (*sandbox.Result, error) {
	streams.run()
	cancelled := ctx.Done()
	for running := true; running; {
		select {
		case <-c.ended:
			running = false
		case s := <-p.Signal:
			_ = c.proc.Signal(s) // it may have ended
		case size := <-p.Resize:
			streams.resize(size)
		case <-cancelled:
			cancelled = nil
			_ = c.proc.Kill()
		}
	}
	if err := streams.finish(); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("copy output: %w", err)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c.err != nil {
		return nil, fmt.Errorf("wait for process: %w", c.err)
	}
	status := c.state.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return &sandbox.Result{ExitCode: 128 + int(status.Signal())}, nil
	}
	return &sandbox.Result{ExitCode: status.ExitStatus()}, nil
}
