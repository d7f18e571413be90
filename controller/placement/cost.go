package placement

import (
	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// What the estimate of Cost assumes. They need not be right, only in proportion.
const (
	fetchRate     = 50 << 20         // bytes of base images fetched and unpacked in a second
	cacheRate     = 20 << 20         // bytes of step cache made in a second
	mostCached    = 5 * time.Minute  // what a step cache saves at most
	builtHere     = 30 * time.Second // what an earlier build of the same scope saves besides
	typicalBuild  = time.Minute      // how long a build in the queue keeps a slot
	neighbourCost = 5 * time.Second  // what a build that runs beside costs
)

// Cost estimates how much later than on an idle node without any cache a build would
// end on a node that answered p and has placed more builds that it does not know yet. It is
// negative where work saved is more than the wait.
func Cost(p *agentv1.ProbeResponse, placed int) time.Duration {
	slots := max(1, int(p.GetSlots()))
	busy := int(p.GetRunning()) + int(p.GetQueued()) + placed
	cost := time.Duration(min(busy, slots)) * neighbourCost / time.Duration(slots)
	if waiting := busy - slots; waiting >= 0 {
		cost += time.Duration(waiting+1) * typicalBuild / time.Duration(slots)
	}
	cost -= seconds(p.GetLocalBaseBytes(), fetchRate)
	cost -= min(seconds(p.GetLocalCacheBytes(), cacheRate), mostCached)
	if p.GetLastBuiltAt().IsValid() {
		cost -= builtHere
	}
	return cost
}

func seconds(bytes, rate int64) time.Duration {
	return time.Duration(float64(max(0, bytes)) / float64(rate) * float64(time.Second))
}
