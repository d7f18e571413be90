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

// maxKept bounds how many directories the overlays of a sandbox keep: each holds a
// descriptor of the node for every lower layer that has it.
const maxKept = 512

// kept are the directories that nobody uses and that are not dropped all the same.
// gVisor's overlay drops a directory with its last user, and has to ask every layer
// again when the next path leads through it: a compiler resolves hundreds of paths
// below a few directories, one after the other.
var kept struct {
	mu      sync.Mutex
	dirs    map[*dentry]struct{}
	leaving *filesystem
}

// stepKeep tells whether d stays although it has no references. checkDropLocked
// asks.
//
// Preconditions: d.fs.renameMu must be locked for writing; d.refs == 0.
func (d *dentry) stepKeep() bool {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	_, known := kept.dirs[d]
	if d.vfsd.IsDead() || !d.isDir() || d.parent.Load() == nil || d.fs == kept.leaving {
		delete(kept.dirs, d)
		return false
	}
	if !known {
		if len(kept.dirs) >= maxKept {
			return false
		}
		if kept.dirs == nil {
			kept.dirs = map[*dentry]struct{}{}
		}
		kept.dirs[d] = struct{}{}
	}
	d.dirMu.Lock()
	d.dirents = nil // may be much larger than the directory itself
	d.dirMu.Unlock()
	return true
}

// StepForget drops the directories that are only kept, and with them what they hold
// of the layers. It is for a file system that is mounted nowhere any more.
func (fs *filesystem) StepForget(ctx context.Context) {
	fs.renameMu.Lock()
	defer fs.renameMu.Unlock()
	var dirs []*dentry
	kept.mu.Lock()
	kept.leaving = fs
	for d := range kept.dirs {
		if d.fs == fs {
			dirs = append(dirs, d)
		}
	}
	kept.mu.Unlock()
	for _, d := range dirs {
		d.checkDropLocked(ctx)
	}
	kept.mu.Lock()
	kept.leaving = nil
	kept.mu.Unlock()
}
