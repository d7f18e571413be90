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

package overlay

import (
	"sync"

	"gvisor.dev/gvisor/pkg/context"
)

// maxKept bounds how many files and directories the overlays of a sandbox keep: each
// holds a descriptor of the node for every lower layer that has it.
const maxKept = 1024

// kept are the files and directories that nobody uses and that are not dropped all the
// same. gVisor's overlay drops them with their last user, and has to ask every layer
// again when the next path leads there: a compiler resolves hundreds of paths below a
// few directories, one after the other.
var kept struct {
	mu      sync.Mutex
	entries map[*dentry]struct{}

	// leaving is the file system of which nothing is kept any more.
	leaving *filesystem

	// replaced is dropped in favour of another.
	replaced *dentry
}

// stepKeep tells whether d stays although it has no references. checkDropLocked
// asks. What has been changed is not kept, directories excepted: it is in memory.
//
// Preconditions: d.fs.renameMu must be locked for writing; d.refs == 0.
func (d *dentry) stepKeep(ctx context.Context) bool {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	_, known := kept.entries[d]
	if d.vfsd.IsDead() || !d.isDir() && d.isCopiedUp() || d.parent.Load() == nil || d.fs == kept.leaving || d == kept.replaced {
		delete(kept.entries, d)
		return false
	}
	if !known {
		if len(kept.entries) >= maxKept {
			d.replaceLocked(ctx)
		}
		if len(kept.entries) >= maxKept {
			return false
		}
		if kept.entries == nil {
			kept.entries = map[*dentry]struct{}{}
		}
		kept.entries[d] = struct{}{}
	}
	if d.isDir() {
		d.dirMu.Lock()
		d.dirents = nil // may be much larger than the directory itself
		d.dirMu.Unlock()
	}
	return true
}

// replaceLocked drops another file or directory, so that d can be kept, unless that
// one's directory takes its place. Which one is left to the order of the map, which is
// random: what is used much comes back.
//
// Preconditions: as of stepKeep; kept.mu must be locked, and is unlocked meanwhile.
func (d *dentry) replaceLocked(ctx context.Context) {
	if kept.replaced != nil {
		return // d is the parent of what is being dropped
	}
	tries := 8
	for other := range kept.entries {
		if tries--; tries < 0 {
			return
		}
		if other.fs != d.fs || other.refs.Load() != 0 {
			continue // in use, or of a file system that is not locked
		}
		kept.replaced = other
		kept.mu.Unlock()
		other.checkDropLocked(ctx)
		kept.mu.Lock()
		kept.replaced = nil
		return
	}
}

// StepForget drops what is only kept, and with it what that holds of the layers. It is
// for a file system that is mounted nowhere any more.
func (fs *filesystem) StepForget(ctx context.Context) {
	fs.renameMu.Lock()
	defer fs.renameMu.Unlock()
	var entries []*dentry
	kept.mu.Lock()
	kept.leaving = fs
	for d := range kept.entries {
		if d.fs == fs {
			entries = append(entries, d)
		}
	}
	kept.mu.Unlock()
	for _, d := range entries {
		d.checkDropLocked(ctx)
	}
	kept.mu.Lock()
	kept.leaving = nil
	kept.mu.Unlock()
}
