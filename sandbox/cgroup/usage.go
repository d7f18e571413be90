package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/kiln-build/kiln/sandbox"
)

// Usage returns what the group's processes, also those that have ended, used since it
// was made, as far as the kernel counts it.
func (g *Group) Usage() (sandbox.Usage, error) {
	var u sandbox.Usage
	var errs []error
	count := func(controller, v1, v1Key string, v2, v2Key string, unit int64) int64 {
		m, ok := g.with(controller)
		if !ok {
			return 0
		}
		name, key, scale := v1, v1Key, int64(1)
		if m.unified {
			name, key, scale = v2, v2Key, unit
		}
		if name == "" {
			return 0
		}
		n, err := m.count(name, key)
		errs = append(errs, err)
		return n * scale
	}
	u.ThrottledTime = time.Duration(count("cpu", "cpu.stat", "throttled_time", "cpu.stat", "throttled_usec", 1000))
	u.Throttled = count("cpu", "cpu.stat", "nr_throttled", "cpu.stat", "nr_throttled", 1)
	// Version 1 counts nanoseconds, version 2 microseconds.
	cpu := count("cpuacct", "cpuacct.usage", "", "", "", 1) + count("cpu", "", "", "cpu.stat", "usage_usec", 1000)
	u.CPU = time.Duration(cpu)
	u.PeakMemory = count("memory", "memory.max_usage_in_bytes", "", "memory.peak", "", 1)
	var err error
	u.IORead, u.IOWrite, err = g.transferred()
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return u, fmt.Errorf("read usage of a step: %w", err)
	}
	return u, nil
}

// Events returns how many processes of the group the kernel has killed because no
// memory was left, and how many it has not started because of their limit. Both are 0
// when it does not tell.
func (g *Group) Events() (oomKills, pidsRefused int64, err error) {
	if m, ok := g.with("memory"); ok {
		name := "memory.oom_control"
		if m.unified {
			name = "memory.events"
		}
		if oomKills, err = m.count(name, "oom_kill"); err != nil {
			return 0, 0, fmt.Errorf("read events of a step: %w", err)
		}
	}
	if m, ok := g.with("pids"); ok {
		if pidsRefused, err = m.count("pids.events", "max"); err != nil {
			return 0, 0, fmt.Errorf("read events of a step: %w", err)
		}
	}
	return oomKills, pidsRefused, nil
}

// Account completes the result of a step whose processes were those of the group.
func (g *Group) Account(res *sandbox.Result) error {
	kills, refused, err := g.Events()
	if err != nil {
		return err
	}
	if kills > 0 {
		res.Reach(sandbox.LimitMemory)
	}
	if refused > 0 {
		res.Reach(sandbox.LimitPIDs)
	}
	res.Usage, err = g.Usage()
	return err
}

// transferred returns what was read from and written to disks, in bytes. Version 1 knows
// of no writes that pass through memory.
func (g *Group) transferred() (read, written int64, err error) {
	name, m, ok := "io.stat", member{}, false
	if m, ok = g.with("io"); !ok {
		if m, ok = g.with("blkio"); !ok {
			return 0, 0, nil
		}
		name = "blkio.throttle.io_service_bytes"
	}
	text, err := m.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	read, written = transfers(text)
	return read, written, err
}

// transfers sums up the bytes of all disks in a file of either version: lines such as
// "8:0 rbytes=1 wbytes=2", or "8:0 Read 1" and "8:0 Write 2".
func transfers(text string) (read, written int64) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(strings.ReplaceAll(line, "=", " "))
		for i := 1; i+1 < len(fields); i += 2 {
			n, err := strconv.ParseInt(fields[i+1], 10, 64)
			switch {
			case err != nil: // the first page ends here
			case fields[i] == "rbytes" || fields[i] == "Read":
				read += n
			case fields[i] == "wbytes" || fields[i] == "Write":
				written += n
			}
		}
	}
	return read, written
}

// count reads a number: all of a file, or that after key. A file or key that the
// kernel does not have counts 0.
func (m member) count(name, key string) (int64, error) {
	data, err := m.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return number(data, key)
}

// number finds the number after key at the start of a line, or the one that is all of
// text when there is no key.
func number(text, key string) (int64, error) {
	if key == "" {
		return strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	}
	for line := range strings.Lines(text) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == key {
			return strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, nil
}
