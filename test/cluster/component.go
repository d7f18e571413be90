package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// Names of components, for Machine.Component. The first seven run on the control
// plane, the others on every node.
const (
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Registry          = "registry"
	SecureRegistry    = "registry-tls"
	DNS               = "coredns"

	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy"
)

// Component is a program of the cluster that runs, or was killed, on a machine.
// Nothing starts it again but Start.
type Component struct {
	machine *Machine
	name    string
}

// Component returns a component of the machine by its name.
func (m *Machine) Component(name string) (*Component, error) {
	k := &Component{m, name}
	_, err := k.record()
	return k, err
}

func (k *Component) record() (*componentRecord, error) {
	r, err := readRecord(k.machine.cluster.dir)
	if err != nil {
		return nil, fmt.Errorf("find component %s: %w", k, err)
	}
	return k.find(r)
}

func (k *Component) find(r *record) (*componentRecord, error) {
	if m := r.machine(k.machine.name); m != nil {
		if rec := m.component(k.name); rec != nil {
			return rec, nil
		}
	}
	return nil, fmt.Errorf("find component %s: the machine has none of that name", k)
}

// String returns machine/component.
func (k *Component) String() string { return k.machine.name + "/" + k.name }

// PID returns the component's process as the caller numbers it, or an error if
// it does not run.
func (k *Component) PID() (int, error) {
	rec, err := k.record()
	if err != nil {
		return 0, err
	}
	if !rec.Process.alive() {
		return 0, fmt.Errorf("find process of %s: it does not run", k)
	}
	return rec.Process.PID, nil
}

// Signal sends a signal to the component, for instance SIGSTOP.
func (k *Component) Signal(sig syscall.Signal) error {
	rec, err := k.record()
	if err != nil {
		return err
	}
	return rec.Process.signal(sig)
}

// Kill ends the component with SIGKILL and returns when its process is gone. The
// processes that it started go on. It is no error if it does not run.
func (k *Component) Kill(ctx context.Context) error {
	rec, err := k.record()
	if err != nil {
		return err
	}
	if rec.Process.alive() {
		if err := rec.Process.signal(syscall.SIGKILL); err != nil && rec.Process.alive() {
			return err
		}
	}
	return rec.Process.wait(ctx)
}

// Start starts the component with the arguments that it had, if it does not run.
// It does not wait until the component serves; see Cluster.WaitReady.
func (k *Component) Start(ctx context.Context) error {
	return k.machine.cluster.update(ctx, func(r *record) error {
		rec, err := k.find(r)
		if err != nil {
			return err
		}
		return k.start(rec)
	})
}

func (k *Component) start(rec *componentRecord) error {
	if rec.Process.alive() {
		return nil
	}
	p, err := k.machine.start(k.LogPath(), rec.Args)
	if err != nil {
		return fmt.Errorf("start %s: %w", k, err)
	}
	rec.Process = p
	return nil
}

// Restart is Kill, then Start.
func (k *Component) Restart(ctx context.Context) error {
	if err := k.Kill(ctx); err != nil {
		return err
	}
	return k.Start(ctx)
}

// LogPath returns the file that has all output of the component, of all its
// starts.
func (k *Component) LogPath() string {
	return filepath.Join(k.machine.cluster.dir, "logs", k.machine.name+"-"+k.name+".log")
}

// logTail returns the last lines of the log, about 2 KiB, for an error message.
func (k *Component) logTail() string {
	f, err := os.Open(k.LogPath())
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-2048), io.SeekStart)
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(data))
}

// Run starts a program on the machine as one more component of the cluster. Its
// name must be new to the machine. It ends with the machine at the latest, and as
// long as it does not run, no wait for the cluster succeeds.
func (m *Machine) Run(ctx context.Context, name string, args ...string) error {
	return m.cluster.update(ctx, func(r *record) error {
		mr := r.machine(m.name)
		if mr == nil || mr.component(name) != nil || name != filepath.Base(name) || len(args) == 0 {
			return fmt.Errorf("run component %q on %s: the name is taken or not a file name, or there is no program", name, m.name)
		}
		rec := &componentRecord{Name: name, Args: args}
		if err := (&Component{m, name}).start(rec); err != nil {
			return err
		}
		mr.Components = append(mr.Components, rec)
		return nil
	})
}

// checkAlive returns an error with the end of the log for the first component
// that does not run.
func (c *Cluster) checkAlive() error {
	r, err := readRecord(c.dir)
	if err != nil {
		return err
	}
	for _, m := range c.machines {
		for _, rec := range r.machine(m.name).Components {
			if !rec.Process.alive() {
				k := &Component{m, rec.Name}
				return fmt.Errorf("%s ended; the end of its log:\n%s", k, k.logTail())
			}
		}
	}
	return nil
}
