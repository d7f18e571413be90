package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

// process names one process for as long as the machine runs: its PID may be used
// again, but not with the same start time.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot
}

func findProcess(pid int) (process, error) {
	start, _, err := readStat(pid)
	return process{PID: pid, Start: start}, err
}

// alive tells whether the process runs: one that ended and was not reaped does
// not.
func (p process) alive() bool {
	start, state, err := readStat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// signal sends a signal if the process still runs.
func (p process) signal(sig syscall.Signal) error {
	if !p.alive() {
		return fmt.Errorf("signal process %d: it does not run", p.PID)
	}
	if err := syscall.Kill(p.PID, sig); err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// wait returns when the process runs no more.
func (p process) wait(ctx context.Context) error {
	for p.alive() {
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the end of process %d: %w", p.PID, err)
		}
	}
	return nil
}

// readStat reads the start time and the state from /proc/PID/stat.
func readStat(pid int) (start uint64, state byte, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	return parseStat(data)
}

func parseStat(data []byte) (start uint64, state byte, err error) {
	// The name, in parentheses, may itself hold spaces and parentheses.
	_, rest, ok := bytes.Cut(data[:], []byte("("))
	end := bytes.LastIndexByte(rest, ')')
	if !ok || end < 0 {
		return 0, 0, fmt.Errorf("parse process status %q: no name", data)
	}
	const startField = 22 - 3 // counted from the state, which is field 3
	fields := bytes.Fields(rest[end+1:])
	if len(fields) <= startField || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("parse process status %q: too few fields", data)
	}
	start, err = strconv.ParseUint(string(fields[startField]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("parse process status %q: %w", data, err)
	}
	return start, fields[0][0], nil
}
