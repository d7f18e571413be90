package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// Usage returns what the group's processes, also those that have ended, used since it
// was made, or since Restart, as far as the kernel counts it.
func (g *Group) Usage() (sandbox.Usage, error) {
	u, err := g.total()
	if err == nil && g.peak != nil {
		u.PeakMemory, err = readNumber(g.peak)
	}
	u.CPU -= g.base.CPU
	u.Throttled -= g.base.Throttled
	u.ThrottledTime -= g.base.ThrottledTime
	u.IORead -= g.base.IORead
	u.IOWrite -= g.base.IOWrite
	return u, err
}

// Restart has Usage count from now on. Nobody may use the group meanwhile. It is an
// error where the kernel cannot forget the peak of memory, as before Linux 6.12 with
// version 2.
func (g *Group) Restart() (err error) {
	if m, ok := g.with("memory"); ok && m.unified {
		if g.peak == nil {
			fd, err := unix.Openat(int(m.dir.Fd()), "memory.peak", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("forget the peak of memory: %w", err)
			}
			g.peak = os.NewFile(uintptr(fd), "memory.peak")
		}
		if _, err := g.peak.WriteAt([]byte("reset"), 0); err != nil {
			return fmt.Errorf("forget the peak of memory: %w", err)
		}
	} else if ok {
		if err := m.write("memory.max_usage_in_bytes", "0"); err != nil {
			return fmt.Errorf("forget the peak of memory: %w", err)
		}
	}
	g.base, err = g.total()
	return err
}

// Memory returns what the group's processes use now, in bytes; 0 where nothing counts it.
func (g *Group) Memory() (int64, error) {
	m, ok := g.with("memory")
	if !ok {
		return 0, nil
	}
	if m.unified {
		return m.count("memory.current", "")
	}
	return m.count("memory.usage_in_bytes", "")
}

func readNumber(f *os.File) (int64, error) {
	buf := make([]byte, 64)
	n, err := f.ReadAt(buf, 0)
	if n == 0 && err != nil {
		return 0, fmt.Errorf("read usage of a step: %w", err)
	}
	return number(string(buf[:n]), "")
}

// total returns what was used since the group was made.
func (g *Group) total() (sandbox.Usage, error) {
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
