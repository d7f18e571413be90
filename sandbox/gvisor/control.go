package gvisor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Methods of the sandbox's control server.
const (
	methodExec    = "containerManager.ExecuteAsync"
	methodWait    = "containerManager.Wait"
	methodWaitPID = "containerManager.WaitPID"
	methodSignal  = "containerManager.Signal"
	// These are kiln's addition to runsc.
	methodProbe = "containerManager.StepProbe"
	methodStart = "containerManager.StepStart"
	methodLayer = "containerManager.StepLayer"
)

// containerID is the ID of the sandbox's own container, and of the sandbox. It is
// short because the path of the control socket holds it.
const containerID = "s"

// control calls the control server of one sandbox: JSON over a unix socket, with
// descriptors beside the first byte. Every call has a connection of its own, so
// that a call that waits does not hold up another.
type control struct{ socket string }

// maxCallFiles is how many files can go with a call.
const maxCallFiles = 128

type controlReply struct {
	Success bool            `json:"success"`
	Err     string          `json:"err"`
	Result  json.RawMessage `json:"result"`
}

// call makes one call. The server gets duplicates of files. When ctx ends, so
// does the call.
func (c control) call(ctx context.Context, method string, arg any, files []*os.File, result any) error {
	conn, err := dialUnix(c.socket)
	if err != nil {
		return fmt.Errorf("connect to the sandbox: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	err = exchange(conn, method, arg, files, result)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("call %s of the sandbox: %w", method, err)
	}
	return nil
}

func exchange(conn *net.UnixConn, method string, arg any, files []*os.File, result any) error {
	request, err := json.Marshal(struct {
		Method string `json:"method"`
		Arg    any    `json:"arg"`
	}{method, arg})
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(request, rights, nil)
	runtime.KeepAlive(files)
	if err == nil && n < len(request) {
		_, err = conn.Write(request[n:])
	}
	if err != nil {
		return err
	}
	return readReply(conn, result)
}

// maxReply bounds a reply in bytes: it is the sandbox's, in which the step may rule.
const maxReply = 4 << 20

// readReply reads what the other end answers into result, which may be nil.
func readReply(r io.Reader, result any) error {
	limited := &io.LimitedReader{R: r, N: maxReply}
	var reply controlReply
	if err := json.NewDecoder(limited).Decode(&reply); err != nil {
		if limited.N == 0 {
			return fmt.Errorf("read the reply: it is longer than %d bytes", maxReply)
		}
		return fmt.Errorf("read the reply: %w", err)
	}
	if !reply.Success {
		return fmt.Errorf("%.4096s", reply.Err)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(reply.Result, result)
}

// dialUnix connects to the socket at path, also when the path is longer than a
// socket address holds.
func dialUnix(path string) (*net.UnixConn, error) {
	f, err := os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	name := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
}

// execArgs are the arguments of methodExec. The files that go with the call are
// the process's GuestFDs, in order.
type execArgs struct {
	Argv             []string `json:"argv"`
	Envv             []string `json:"envv"`
	WorkingDirectory string   `json:"wd"`
	KUID, KGID       uint32
	ExtraKGIDs       []uint32
	NoNewPrivileges  bool
	Capabilities     *taskCapabilities
	StdioIsPty       bool
	GuestFDs         []int
	ContainerID      string
}

// taskCapabilities are bit masks of capability numbers.
type taskCapabilities struct {
	PermittedCaps, InheritableCaps, EffectiveCaps, BoundingCaps, AmbientCaps uint64
}

type waitArgs struct {
	PID int32
	CID string
}

type signalArgs struct {
	CID        string
	Signo, PID int32
	Mode       int
}

// Modes of methodSignal.
const (
	signalProcess    = 0
	signalForeground = 2
)

// startArgs are the arguments of methodStart. The files that go with the call are
// the terminal, or standard input, output and error; the file that backs what is
// written to the root, if there is one; and the connections of the root and of
// the spec's bind mounts, in this order.
type startArgs struct {
	Spec                 *specs.Spec
	CID                  string
	NumGoferFilestoreFDs int
	GoferMountConfs      []mountConf
}

// mountConf tells what is below and above a mount.
type mountConf struct {
	Lower int `json:"lower"`
	Upper int `json:"upper"`
	// Size has options that bound what is above, beginning with its size.
	Size string `json:"size,omitempty"`
}

// Values of mountConf.
const (
	lowerServed  = 1 // by the file server
	upperNone    = 0
	upperPrivate = 3 // an overlay in the sandbox, backed by a file
)

// layerArgs are the arguments of methodLayer, and layerReply is its answer. With Keep the
// sandbox is asked to have another step; Kept says that it can.
type layerArgs struct {
	CID  string
	Keep bool
}

type layerReply struct{ Kept bool }
