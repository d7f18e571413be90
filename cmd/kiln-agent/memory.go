package main

import (
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memoryShare is the part of the cgroup's memory, in percent, from which on Go
// collects garbage eagerly.
const memoryShare = 90

// cgroupRoot is where cgroups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// limitMemory makes Go know the memory limit of this process's cgroup, unless
// GOMEMLIMIT says another.
func limitMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if limit, ok := cgroupMemory("/proc/self/cgroup", cgroupRoot); ok {
		debug.SetMemoryLimit(limit / 100 * memoryShare)
		log.Debug("memory limit of the cgroup", "bytes", limit)
	}
}

// nodeMemory returns the memory in bytes that this process may use: that of its
// cgroup, or of the node.
func nodeMemory() int64 {
	total := int64(math.MaxInt64)
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		total = int64(info.Totalram) * int64(info.Unit)
	}
	if limit, ok := cgroupMemory("/proc/self/cgroup", cgroupRoot); ok {
		total = min(total, limit)
	}
	return total
}

// cgroupMemory returns the least memory limit among the cgroups that the process of
// a /proc/PID/cgroup file is in, and whether there is one.
func cgroupMemory(procFile, root string) (int64, bool) {
	data, err := os.ReadFile(procFile)
	if err != nil {
		return 0, false
	}
	least := int64(math.MaxInt64)
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		dir, file := root, "memory.max"
		if f[0] != "0" || f[1] != "" {
			if f[1] != "memory" {
				continue
			}
			dir, file = path.Join(root, "memory"), "memory.limit_in_bytes"
		}
		// In a container the path may be one of the node that is not mounted; then
		// the top directory is the container's own.
		for p := path.Clean("/" + f[2]); ; p = path.Dir(p) {
			if n, ok := readLimit(path.Join(dir, p, file)); ok {
				least = min(least, n)
			}
			if p == "/" {
				break
			}
		}
	}
	return least, least < math.MaxInt64
}

// readLimit returns the number in a cgroup file. "max" is none, as is the largest
// number of whole pages, with which cgroup v1 says the same.
func readLimit(file string) (int64, bool) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	return n, err == nil && n > 0 && n < math.MaxInt64-1<<20
}
