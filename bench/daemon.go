package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// daemon is a builder that serves for many builds.
type daemon struct {
	cmd    *exec.Cmd
	log    bytes.Buffer
	exited chan error
	start  time.Duration
}

// startDaemon runs a program and waits until ready succeeds.
func startDaemon(ctx context.Context, ready func(context.Context) error, program string, args ...string) (*daemon, error) {
	d := &daemon{cmd: exec.Command(program, args...), exited: make(chan error, 1)}
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	begin := time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	name := filepath.Base(program)
	go func() { d.exited <- d.cmd.Wait() }()
	for {
		err := ready(ctx)
		if err == nil {
			d.start = time.Since(begin)
			return d, nil
		}
		select {
		case ended := <-d.exited:
			return nil, fmt.Errorf("%s ended: %w\n%s", name, ended, d.log.String())
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), d.Close())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(begin) > time.Minute {
			return nil, errors.Join(fmt.Errorf("%s does not answer: %w", name, err), d.Close())
		}
	}
}

func (d *daemon) StartTime() time.Duration { return d.start }

// measure runs a client of the daemon as a user. The memory is the daemon's, whose
// high-water mark starts anew.
func (d *daemon) measure(ctx context.Context, uid uint32, client string, args ...string) (usage, error) {
	pid := d.cmd.Process.Pid
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		return usage{}, err
	}
	begin := time.Now()
	err := commandAs(ctx, uid, nil, client, args...)
	return usage{elapsed: time.Since(begin), peak: peakOf(pid)}, err
}

func (d *daemon) Close() error {
	name := filepath.Base(d.cmd.Path)
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	select {
	case <-d.exited:
		return nil
	case <-time.After(30 * time.Second):
		return errors.Join(fmt.Errorf("%s (process %d) does not stop", name, d.cmd.Process.Pid), d.cmd.Process.Kill())
	}
}
