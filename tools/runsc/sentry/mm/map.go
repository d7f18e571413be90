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

package mm

import (
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/hostarch"
	"gvisor.dev/gvisor/pkg/sentry/memmap"
)

// This file is kiln's addition to the package.
//
// What a program touches for the first time costs a fault: a signal, two turns between
// the program and the sandbox, and a call to map it. Where it is certain enough that a
// program will touch something, it is mapped without waiting for that.

// populateSoonAndUnlock maps what a program is about to use: at most a huge page more of
// its data, or text. The data may be pages that other programs gave back.
//
// Preconditions: mm.mappingMu must be locked; it is unlocked.
func (mm *MemoryManager) populateSoonAndUnlock(ctx context.Context, vseg vmaIterator, ar hostarch.AddrRange) {
	mm.activeMu.Lock()
	if mm.as == nil || !vseg.ValuePtr().effectivePerms.Any() {
		mm.activeMu.Unlock()
		mm.mappingMu.Unlock()
		return
	}
	mm.mappingMu.DowngradeLock()
	pseg, _, err := mm.getPMAsLocked(ctx, vseg, ar, hostarch.NoAccess, true /* callerIndirectCommit */, false /* forPin */)
	mm.mappingMu.RUnlock()
	mm.activeMu.DowngradeLock()
	if err == nil { // otherwise the program's fault tells
		_ = mm.mapASLocked(ctx, pseg, ar, memmap.PlatformEffectDefault)
	}
	mm.activeMu.RUnlock()
}

// isText tells whether a mapping is the code of a program or a library in its place, as
// loaders map it. No part of it is copied or read for that.
func isText(opts *memmap.MMapOpts) bool {
	return opts.Mappable != nil && opts.Private && opts.Fixed && opts.Perms.Execute && !opts.Perms.Write
}

// remapASLocked has what ar is now in effect, after rights to it were taken away or pages
// were copied: loaders read on what they have made read-only, and a call that was patched
// is about to go on there.
//
// Preconditions: mm.activeMu must be locked.
func (mm *MemoryManager) remapASLocked(ar hostarch.AddrRange) {
	if mm.as == nil || ar.Length() == 0 {
		return
	}
	if pseg := mm.pmas.FindSegment(ar.Start); pseg.Ok() && pseg.Range().IsSupersetOf(ar) {
		pma := pseg.ValuePtr()
		perms := pma.effectivePerms
		if pma.needCOW {
			perms.Write = false
		}
		if perms.Any() && mm.as.MapFile(ar.Start, pma.file, pseg.fileRangeOf(ar), perms, false) == nil {
			return
		}
	}
	mm.unmapASLocked(ar)
}
