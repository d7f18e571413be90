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

package pgalloc

import (
	"time"

	"gvisor.dev/gvisor/pkg/sentry/memmap"
)

// This file is kiln's addition to the package.
//
// gVisor's pages go to the kernel as soon as a program gives them back, by punching a
// hole, and the next program gets new ones, which the kernel has to find, clear and charge.
// Programs of a build follow each other, each as large as the one before it. So pages are
// kept for a moment, in which the next program can have them, cleared.

const (
	// wasteDelay is how long pages are kept that nobody has: longer than what is between
	// two programs of a build.
	wasteDelay = 20 * time.Millisecond

	// maxWaste is how many bytes of them are kept.
	maxWaste = 64 << 20

	// maxRecycled is what a fault may get of the pages that are kept, in bytes: they are
	// cleared, also if the program will not touch them.
	maxRecycled = 1 << 20

	// maxRelease is how many bytes go to the kernel at a time.
	maxRelease = 64 << 20
)

// waste is what a MemoryFile knows of the pages that it keeps. MemoryFile.mu protects it.
type waste struct {
	bytes uint64        // that nobody has
	full  chan struct{} // closed when that is too much; nil: nobody waits
}

// add counts pages that were given back.
func (w *waste) add(fr memmap.FileRange) {
	w.bytes += fr.Length()
	if w.bytes >= maxWaste && w.full != nil {
		close(w.full)
		w.full = nil
	}
}

// keepWaste gives pages to the kernel when nobody has wanted them for a while. What is on
// disk goes there at once: its limit counts what is gone, too.
//
// Preconditions: f.mu must be locked; it is unlocked meanwhile.
func (f *MemoryFile) keepWaste() {
	if f.waste.bytes < maxWaste && !f.opts.DiskBackedFile {
		full := make(chan struct{})
		f.waste.full = full
		f.mu.Unlock()
		timeout := time.NewTimer(wasteDelay)
		select {
		case <-full:
		case <-timeout.C:
		}
		timeout.Stop()
		f.mu.Lock()
		f.waste.full = nil
	}
	f.releaseWaste()
}

// releaseWaste gives to the kernel what was given back.
//
// Preconditions: f.mu must be locked; it is unlocked meanwhile.
func (f *MemoryFile) releaseWaste() {
	for i, used := range []*unwasteSet{&f.unwasteSmall, &f.unwasteHuge} {
		for gap := used.LastLargeEnoughGap(1); gap.Ok(); gap = used.LastLargeEnoughGap(1) {
			fr := gap.Range()
			if fr.Length() > maxRelease {
				fr.Start = fr.End - maxRelease
			}
			used.Insert(gap, fr, unwasteInfo{})
			f.waste.bytes -= fr.Length()
			f.releaseLocked(fr, i == 1)
		}
	}
}

// MayRecycle tells whether a fault may have pages that others gave back, of a length in
// bytes.
func MayRecycle(length uint64) bool { return length <= maxRecycled }

// StepRelease gives to the kernel what was given back, as the sandbox's memory is looked
// at when it has no program.
func (f *MemoryFile) StepRelease() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.releaseWaste()
}
