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

package systrap

import (
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/hostsyscall"
	"gvisor.dev/gvisor/pkg/sentry/hostcpu"
)

// A task of the sentry and the thread that runs the task's program take turns: one sleeps
// while the other works. The kernel does not know that, and wakes the other one on a
// processor that idles, which takes longer than most of what a program asks for, above
// all in a virtual machine. So both are placed on one processor, and tasks that are awake
// on different ones. That is done where neither spins (--systrap-disable-fast-path), on
// few processors, for programs of one thread.
//
// A program that computes for longer is let go: the kernel may move it.

const (
	// maxPlaces bounds the processors with which tasks are placed: each entry to a
	// program looks at all of them.
	maxPlaces = 8

	// maxPlaced bounds the tasks of a sandbox that are placed: each has a thread of the
	// sentry for itself, also while it sleeps.
	maxPlaced = 64

	// turnsAtPlace is after how many turns the kernel is asked where it would have the
	// task, which counts when the sandbox itself has no preference: it knows of other
	// sandboxes and of the node. It is some hundredths of a second.
	turnsAtPlace = 4096
)

// cpuMask is a set of processors as the kernel wants it.
type cpuMask [16]uint64

// places are the processors of the sandbox; none if tasks are not placed.
var places struct {
	all    cpuMask
	cpus   []uint32
	awake  [maxPlaces]atomic.Int32 // placed tasks there that do not sleep
	placed atomic.Int32
}

// unbound is what place.bound is of a task that is about to be bound.
const unbound = -1

// initPlaces finds the processors, before the sentry may not ask for them any more.
func initPlaces() {
	if !neverEnableFastPath {
		return
	}
	all := &places.all
	n, errno := hostsyscall.RawSyscall(unix.SYS_SCHED_GETAFFINITY, 0, unsafe.Sizeof(*all), uintptr(unsafe.Pointer(all)))
	if errno != 0 {
		return
	}
	var cpus []uint32
	for cpu := range uint32(n) * 8 {
		if all[cpu/64]&(1<<(cpu%64)) != 0 {
			cpus = append(cpus, cpu)
		}
	}
	if len(cpus) > 1 && len(cpus) <= maxPlaces {
		places.cpus = cpus
	}
}

// place is where a task is. Only the task's goroutine uses it.
type place struct {
	at    int32 // index of places.cpus
	bound int32 // 1 + the index to which the goroutine's thread is bound; 0: not placed
	turns uint32
	awake bool
	loose bool // the goroutine's thread may run anywhere until the next turn
}

// enter chooses a place for a task that is about to run its program, and goes there. A
// task stays where it is unless another place has fewer.
func (p *place) enter() {
	if len(places.cpus) == 0 || p.bound == 0 && !p.lock() {
		return
	}
	if p.turns++; p.turns%turnsAtPlace == 0 {
		p.loose = true
		bindAnywhere(0)
		return
	}
	if p.loose {
		p.loose, p.bound = false, unbound
		if here := currentPlace(); here != p.at {
			p.sleep()
			p.at = here
		}
	}
	least, n := p.at, places.awake[p.at].Load()
	if p.awake {
		n-- // itself: it moves only where that makes a difference
	}
	for i := range places.cpus {
		if other := places.awake[i].Load(); other < n {
			least, n = int32(i), other
		}
	}
	if least != p.at || !p.awake {
		p.sleep()
		places.awake[least].Add(1)
		p.at, p.awake = least, true
	}
	if p.bound != p.at+1 {
		p.bound = p.at + 1
		bind(0, p.at)
	}
}

// lock gives the goroutine a thread of its own, if there are not too many of them.
func (p *place) lock() bool {
	if places.placed.Add(1) > maxPlaced {
		places.placed.Add(-1)
		return false
	}
	runtime.LockOSThread()
	p.bound, p.at = unbound, currentPlace()
	return true
}

// currentPlace is where the kernel has the caller.
func currentPlace() int32 {
	cpu := hostcpu.GetCPU()
	for i, c := range places.cpus {
		if c == cpu {
			return int32(i)
		}
	}
	return 0
}

// sleep is called when a task will not run its program for a while.
func (p *place) sleep() {
	if p.awake {
		p.awake = false
		places.awake[p.at].Add(-1)
	}
}

// leave gives the goroutine's thread back when the task has ended.
func (p *place) leave() {
	p.sleep()
	if p.bound != 0 {
		p.bound = 0
		bindAnywhere(0)
		runtime.UnlockOSThread()
		places.placed.Add(-1)
	}
}

// bring places the thread that has run the task's program, if it is the only one.
func (p *place) bring(s *subprocess) {
	if p.bound == 0 || p.loose {
		return
	}
	s.sysmsgThreadsMu.RLock()
	defer s.sysmsgThreadsMu.RUnlock()
	for _, t := range s.sysmsgThreads {
		if len(s.sysmsgThreads) > 1 {
			t.letGo()
		} else if t.bound.Load() != p.bound {
			t.bound.Store(p.bound)
			bind(t.thread.tid, p.at)
		}
	}
}

// letGo lets the thread of a program go where the kernel wants it.
func (t *sysmsgThread) letGo() {
	if t.bound.Load() != 0 && t.bound.Swap(0) != 0 {
		bindAnywhere(t.thread.tid)
	}
}

// letGo lets go what runs the program of this context, which has computed for a while.
func (sc *sharedContext) letGo() {
	s := sc.subprocess
	s.sysmsgThreadsMu.RLock()
	defer s.sysmsgThreadsMu.RUnlock()
	if t, ok := s.sysmsgThreads[sc.threadID()]; ok {
		t.letGo()
	}
}

// bind binds a thread, 0 being the caller, to a processor. That may fail, when the
// sandbox has lost that processor: the thread is then where the kernel wants it.
func bind(tid, at int32) {
	var mask cpuMask
	cpu := places.cpus[at]
	mask[cpu/64] = 1 << (cpu % 64)
	setAffinity(tid, &mask)
}

// bindAnywhere undoes bind.
func bindAnywhere(tid int32) { setAffinity(tid, &places.all) }

func setAffinity(tid int32, mask *cpuMask) {
	hostsyscall.RawSyscallErrno(unix.SYS_SCHED_SETAFFINITY, uintptr(tid), unsafe.Sizeof(*mask), uintptr(unsafe.Pointer(mask)))
}
