// Copyright The kiln Authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

package main

// This file is kiln's addition to runsc: a process that starts one sandbox after
// another, where `runsc run` starts one and has to be started itself. It does what
// that does with the same code of gVisor, and nothing else.

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/flag"
	"gvisor.dev/gvisor/runsc/specutils"
)

// starterCommand is the first argument. The second, a directory, is for whoever
// looks for the process; descriptor 3 is the socket that requests come from.
const starterCommand = "kiln-starter"

func init() {
	if len(os.Args) == 3 && os.Args[1] == starterCommand {
		os.Exit(runStarter())
	}
}

// startRequest asks for a sandbox. A stream socket comes with it. The answer on
// that is a startReply and, when the sandbox is gone, the end of the stream. The
// other side shuts its end down to have the sandbox ended.
type startRequest struct {
	// Flags are those that `runsc` takes before the command.
	Flags []string
	// ID is the ID of the container, Bundle its bundle, and Program the file that
	// its process executes.
	ID, Bundle, Program string
	// Enter are files to join the sandbox's cgroups with, Leave those to join our own
	// with again.
	Enter, Leave []string
}

type startReply struct{ Error string }

// messages takes what is said to whoever started the process.
var messages *os.File

// gvisor is held while code of gVisor runs. That is made for a process that starts
// one sandbox: it opens descriptors that a program started meanwhile would inherit.
var gvisor sync.Mutex

// The descriptors that a sandbox makes its standard streams: startingStdioFD of gVisor's
// loader and those after it.
const firstStdio, lastStdio = 253, 255

// collectEvery is after how many sandboxes garbage is collected. The process makes so
// little that it would not be for hundreds of them, and each leaves descriptors that
// only the collector closes: gVisor's code expects to start one.
const collectEvery = 32

// ended counts the sandboxes that have ended.
var ended atomic.Int32

func runStarter() int {
	log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: io.Discard}})
	// The containers get these as their own; messages have another descriptor.
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 128
	}
	// A sandbox inherits some of the descriptors that gVisor's code opens here, and does
	// not start if one of them has such a number.
	for fd := firstStdio; fd <= lastStdio; fd++ {
		if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 128
		}
	}
	messages = os.Stderr
	// The collector closes files that nothing refers to, and their descriptors would be
	// those of something else then.
	defer runtime.KeepAlive([]*os.File{os.Stdin, os.Stdout})
	os.Stdin, os.Stdout, os.Stderr = null, null, null
	unix.CloseOnExec(3)
	socket := os.NewFile(3, "requests")
	conn, err := net.FileConn(socket)
	socket.Close()
	if err != nil {
		fmt.Fprintln(messages, err)
		return 128
	}
	requests, ok := conn.(*net.UnixConn)
	if !ok {
		fmt.Fprintln(messages, "descriptor 3 is not a unix socket")
		return 128
	}
	data, rights := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(4))
	for {
		n, oob, _, _, err := requests.ReadMsgUnix(data, rights)
		if err != nil || n == 0 {
			return 0 // nobody asks any more
		}
		answer, err := receivedConn(rights[:oob])
		if err != nil {
			fmt.Fprintln(messages, err)
			return 128
		}
		handleStart(data[:n], answer)
	}
}

// receivedConn returns the socket that came with a message.
func receivedConn(rights []byte) (*net.UnixConn, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("request without a socket: %v", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("request without a socket: %v", err)
	}
	f := os.NewFile(uintptr(fds[0]), "answer")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	stream, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("answers cannot go to a %T", conn)
	}
	return stream, nil
}

// handleStart starts a sandbox and leaves its end to a goroutine.
func handleStart(request []byte, answer *net.UnixConn) {
	c, pidfd, err := startSandbox(request)
	var reply startReply
	if err != nil {
		reply.Error = err.Error()
	}
	sendErr := json.NewEncoder(answer).Encode(reply)
	if err != nil {
		answer.Close()
		return
	}
	if sendErr != nil {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		// Nothing is ever said after the request: what comes is the end.
		_, _ = answer.Read(make([]byte, 1))
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}()
	go func() {
		defer func() {
			answer.Close()
			<-asked
			unix.Close(pidfd)
		}()
		events := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		for {
			if n, err := unix.Poll(events, -1); n > 0 || err != nil && err != unix.EINTR {
				break
			}
		}
		gvisor.Lock()
		defer gvisor.Unlock()
		if err := c.Destroy(); err != nil {
			fmt.Fprintf(messages, "end sandbox: %v\n", err)
		}
		if ended.Add(1)%collectEvery == 0 {
			runtime.GC()
		}
	}()
}

// startSandbox starts a sandbox and returns it with a descriptor of its process.
func startSandbox(data []byte) (_ *container.Container, pidfd int, err error) {
	gvisor.Lock()
	defer gvisor.Unlock()
	var request startRequest
	if err := json.Unmarshal(data, &request); err != nil {
		return nil, -1, fmt.Errorf("decode request: %w", err)
	}
	flags := flag.NewFlagSet("runsc", flag.ContinueOnError)
	config.RegisterFlags(flags)
	if err := flags.Parse(request.Flags); err != nil {
		return nil, -1, err
	}
	conf, err := config.NewFromFlags(flags)
	if err != nil {
		return nil, -1, err
	}
	spec, err := specutils.ReadSpec(request.Bundle, conf)
	if err != nil {
		return nil, -1, fmt.Errorf("read spec: %w", err)
	}
	if err := specutils.FixConfig(conf, spec); err != nil {
		return nil, -1, err
	}
	program, err := os.Open(request.Program)
	if err != nil {
		return nil, -1, err
	}
	defer program.Close()
	// gVisor's code opens descriptors that a program inherits, as the sockets with which a
	// sandbox reaches its network. No other sandbox may have them.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("keep descriptors to this process: %w", err)
	}
	// What is started now is where we are. All threads have to be there: gVisor's code
	// does not start the sandbox from this one.
	defer func() {
		// Who cannot go back starts no more sandboxes: they would share limits.
		if err := join(request.Leave); err != nil {
			fmt.Fprintln(messages, err)
			os.Exit(128)
		}
	}()
	if err := join(request.Enter); err != nil {
		return nil, -1, err
	}
	c, err := container.New(conf, container.Args{ID: request.ID, Spec: spec, BundleDir: request.Bundle, Attached: true, ExecFile: program})
	if err != nil {
		return nil, -1, fmt.Errorf("create sandbox: %w", err)
	}
	if err = c.Start(conf); err == nil {
		pidfd, err = unix.PidfdOpen(c.SandboxPid(), 0)
	}
	if err != nil {
		_ = c.Destroy()
		return nil, -1, fmt.Errorf("start sandbox: %w", err)
	}
	if err := relaxMonitor(c.SandboxPid()); err != nil {
		fmt.Fprintf(messages, "let the monitor of a sandbox sleep longer: %v\n", err)
	}
	return c, pidfd, nil
}

// monitorSlack is by how much the monitor of a sandbox may sleep longer than it asks for,
// in nanoseconds. It takes care of goroutines that are in the kernel or have run for 10
// milliseconds. While programs compute, it would look every 20 microseconds whether one has
// entered the kernel, and each time take the processor from a program.
const monitorSlack = 5_000_000

// relaxMonitor lets the monitor of the Go program with that process ID sleep longer. It is
// the thread that Go starts first; the timers of the others are as exact as before.
func relaxMonitor(pid int) error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	monitor := 0
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		if err == nil && tid != pid && (monitor == 0 || tid < monitor) {
			monitor = tid
		}
	}
	if monitor == 0 {
		return fmt.Errorf("process %d has one thread", pid)
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", monitor), []byte(strconv.Itoa(monitorSlack)), 0)
}

// join moves this process into the cgroups that files belong to.
func join(files []string) error {
	for _, name := range files {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
		_, err = f.WriteString("0")
		f.Close()
		if err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}
