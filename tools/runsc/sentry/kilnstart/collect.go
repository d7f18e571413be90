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

package kilnstart

import (
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

const (
	// smallHeap is up to what size of the heap, in bytes, memory is worth less than the
	// processor time of a collection.
	smallHeap = 64 << 20

	// mostGarbage is how much garbage a small heap may have, in percent of what is in use.
	mostGarbage = 400
)

// collector is when garbage is collected.
var collector struct {
	sync.Mutex
	holds   int  // how many ask for no collection
	held    bool // there is none below smallHeap
	percent int  // as of debug.SetGCPercent
}

// Hold stops the collection of garbage for some time while the heap is small.
func Hold(d time.Duration) {
	collector.Lock()
	defer collector.Unlock()
	collector.holds++
	if !collector.held && inUse() <= smallHeap/2 {
		collector.held = true
		debug.SetMemoryLimit(smallHeap)
		setPercent(-1)
	}
	time.AfterFunc(d, func() {
		collector.Lock()
		defer collector.Unlock()
		collector.holds--
		decide()
	})
}

// decide says when the next collection is. Those that a limit of memory asks for would
// follow each other where the limit has no room.
//
// Preconditions: collector must be locked.
func decide() {
	used := inUse()
	if collector.held && collector.holds > 0 && used <= smallHeap/2 {
		return
	}
	setPercent(percentOf(used))
	if collector.held {
		collector.held = false
		debug.SetMemoryLimit(math.MaxInt64)
	}
}

// percentOf is how much garbage a heap may have, in percent of the bytes that are in use.
func percentOf(used uint64) int {
	percent := int(smallHeap/max(used, 1))*100 - 100
	return min(max(percent, 100), mostGarbage)
}

// setPercent has an effect only if there is a change, as it stops all goroutines.
func setPercent(percent int) {
	if percent != collector.percent {
		collector.percent = percent
		debug.SetGCPercent(percent)
	}
}

// inUse is what the last collection has found to be in use, in bytes.
func inUse() uint64 {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return smallHeap
	}
	return live[0].Value.Uint64()
}

// mark is what a collection finds to be garbage.
type mark struct{ _ *mark }

// afterCollections has a look after each collection.
func afterCollections() {
	runtime.AddCleanup(new(mark), func(struct{}) {
		afterCollections()
		collector.Lock()
		defer collector.Unlock()
		decide()
	}, struct{}{})
}
