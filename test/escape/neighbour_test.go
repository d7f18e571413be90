package escape

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// neighbour is a step of another tenant, or a process of the node, that runs attack
// serve for as long as entries run.
type neighbour struct {
	// Canary is what it holds, in its environment, in IPC and behind sockets.
	Canary string
	// Addresses are those of its network, but for loopback.
	Addresses []string
	// PID is the process on the node; 0: not known.
	PID int
	out output
}

// Log returns what it has written: signals and connections that it got.
func (n *neighbour) Log() string { return n.out.String() }

var addressLine = regexp.MustCompile(`(?m)^address ([0-9.]+)$`)

func (n *neighbour) serving(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Contains(n.Log(), "serving") }, 30*time.Second, 5*time.Millisecond, "it does not serve: %s", n.Log())
	for _, m := range addressLine.FindAllStringSubmatch(n.Log(), -1) {
		if !strings.HasPrefix(m[1], "127.") {
			n.Addresses = append(n.Addresses, m[1])
		}
	}
}

// Neighbour is a step of the victim in the same class of sandbox.
func (e *env) Neighbour(t *testing.T) *neighbour {
	t.Helper()
	return memo(e.world, "neighbour/"+string(e.Class), func() *neighbour {
		n := &neighbour{Canary: random(t)}
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() {
			_ = e.BuildContext(e.t, ctx, build{
				Tenant: victim, NoExport: true, Secrets: map[string]string{"canary": n.Canary},
				Dockerfile: "FROM tools\nRUN --mount=type=secret,id=canary,env=CANARY exec /bin/attack serve\n",
				Log:        func(text string) { _, _ = n.out.Write([]byte(text)) },
			})
		})
		e.t.Cleanup(func() {
			cancel()
			running.Wait()
		})
		n.serving(t)
		return n
	})
}

// Bystander is a process of the node, in its namespaces and as its root.
func (e *env) Bystander(t *testing.T) *neighbour {
	t.Helper()
	return memo(e.world, "bystander", func() *neighbour {
		n := &neighbour{Canary: random(t)}
		cmd := exec.Command(filepath.Join(e.tools, "bin/attack"), "serve")
		cmd.Env = append(os.Environ(), "CANARY="+n.Canary)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, startBound(cmd))
		var reading sync.WaitGroup
		reading.Go(func() {
			for s := bufio.NewScanner(out); s.Scan(); {
				_, _ = n.out.Write(append(s.Bytes(), '\n'))
			}
		})
		n.PID = cmd.Process.Pid
		e.t.Cleanup(func() {
			_ = cmd.Process.Kill()
			reading.Wait()
			_ = cmd.Wait()
		})
		n.serving(t)
		return n
	})
}

// startBound starts a process that is killed when this one ends. The kernel does so when
// the thread ends that has started it, which therefore stays.
func startBound(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		for err == nil && unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	return <-started
}
