package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// cgroup is the cluster's control group: one directory of the same name in every
// hierarchy. Components are in its child components, a node's Pods in a child with
// the node's name. It is how Down finds every process, whatever became of the
// process that started it.
type cgroup struct {
	name        string   // relative to the root of each hierarchy
	hierarchies []string // mount points
	tracking    string   // the hierarchy that processes are found by
	unified     bool     // version 2
}

func findCgroup(dir string) (cgroup, error) {
	g := cgroup{name: "kiln-cluster-" + identity(dir)}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return g, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var v2 string
	for _, m := range mounts {
		if slices.Contains(g.hierarchies, m.Mountpoint) {
			continue
		}
		g.hierarchies = append(g.hierarchies, m.Mountpoint)
		switch {
		case m.FSType == "cgroup2":
			v2 = m.Mountpoint
		case slices.Contains(strings.Split(m.VFSOptions, ","), "pids"):
			g.tracking = m.Mountpoint
		}
	}
	if g.tracking == "" {
		g.tracking, g.unified = v2, true
	}
	if g.tracking == "" {
		return g, errors.New("find cgroups: no pids hierarchy and no unified one is mounted; mount /sys/fs/cgroup")
	}
	return g, nil
}

// path returns the kubelet's name of the group of a node's Pods.
func (g cgroup) path(node string) string { return "/" + g.name + "/" + node }

// procs is the file that a component writes 0 into to join.
func (g cgroup) procs() string {
	return filepath.Join(g.tracking, g.name, "components", "cgroup.procs")
}

func (g cgroup) create(nodes []string) error {
	for _, h := range g.hierarchies {
		for _, child := range append([]string{"components"}, nodes...) {
			if err := os.MkdirAll(filepath.Join(h, g.name, child), 0o755); err != nil {
				return fmt.Errorf("create cgroup: %w", err)
			}
		}
	}
	if !g.unified {
		return nil
	}
	for _, dir := range []string{g.tracking, filepath.Join(g.tracking, g.name)} {
		have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("create cgroup: %w", err)
		}
		for controller := range strings.FieldsSeq(string(have)) {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
				return fmt.Errorf("enable cgroup controller %s: %w", controller, err)
			}
		}
	}
	return nil
}

// pids lists the processes in the group and below it.
func (g cgroup) pids() ([]int, error) {
	var pids []int
	err := g.walk(g.tracking, func(dir string) error {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil && !gone(err) {
			return err
		}
		for field := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// kill ends every process in the group. It returns when none is left.
func (g cgroup) kill(ctx context.Context) error {
	for {
		pids, err := g.pids()
		if err != nil {
			return fmt.Errorf("list processes of cluster: %w", err)
		}
		left := 0
		for _, pid := range pids {
			if p, err := findProcess(pid); err == nil && p.alive() {
				left++
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if left == 0 {
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return fmt.Errorf("end %d processes of cluster: %w", left, err)
		}
	}
}

// remove removes the empty group from every hierarchy.
func (g cgroup) remove(ctx context.Context) error {
	for _, h := range g.hierarchies {
		for {
			var dirs []string
			err := g.walk(h, func(dir string) error {
				dirs = append(dirs, dir)
				return nil
			})
			if err != nil {
				return fmt.Errorf("list cgroups of cluster: %w", err)
			}
			var last error
			for _, dir := range slices.Backward(dirs) {
				if err := os.Remove(dir); err != nil && !gone(err) {
					last = err
				}
			}
			if last == nil {
				break
			}
			// A killed process leaves its cgroup some moments after it is gone.
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return fmt.Errorf("remove cgroups of cluster: %w", errors.Join(last, err))
			}
		}
	}
	return nil
}

// walk calls visit for the group's directories in one hierarchy, parents first.
func (g cgroup) walk(hierarchy string, visit func(dir string) error) error {
	return filepath.WalkDir(filepath.Join(hierarchy, g.name), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		return visit(path)
	})
}

func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV)
}
