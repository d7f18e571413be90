package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// joinCgroups puts the file server into the cgroups that runsc made for the
// sandbox, so that one limit holds for both.
func (b *box) joinCgroups() error {
	if b.r.cfg.CgroupParent == "" {
		return nil
	}
	st, err := readState(b.runscRoot())
	if err != nil {
		return err
	}
	dirs, err := cgroupsOf(st.Sandbox.PID, b.id)
	if err != nil {
		return fmt.Errorf("find cgroups of the sandbox: %w", err)
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(b.files.cmd.Process.Pid)), 0); err != nil {
			return fmt.Errorf("join cgroup of the sandbox: %w", err)
		}
	}
	return nil
}

// cgroupsOf returns the directories of those cgroups of a process that are called
// name.
func cgroupsOf(pid int, name string) ([]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 || filepath.Base(fields[2]) != name {
			continue
		}
		for _, m := range mounts {
			below, inside := strings.CutPrefix(fields[2], strings.TrimSuffix(m.Root, "/"))
			if inside && serves(m, fields[1]) {
				dirs = append(dirs, filepath.Join(m.Mountpoint, below))
				break
			}
		}
	}
	return dirs, nil
}

// serves tells whether a mount shows the hierarchy of the given controllers, none
// for the one of version 2.
func serves(m *mountinfo.Info, controllers string) bool {
	if controllers == "" {
		return m.FSType == "cgroup2"
	}
	options := strings.Split(m.VFSOptions, ",")
	for c := range strings.SplitSeq(controllers, ",") {
		if !slices.Contains(options, c) {
			return false
		}
	}
	return m.FSType == "cgroup"
}
