package sandbox

import (
	"reflect"
	"slices"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// Successor is what a step must be to follow another one directly: the next step of the
// same build, with the same network, whose root is what the other has made. Whoever took
// over, by the first step, something that both use has taken over the second one already:
// its programs are files that the first could write.
type Successor struct {
	build   string
	network NetworkMode
	// reach is what its network may; nil: what all do.
	reach *egress.Reach
	// lower are the layers of its root.
	lower []string
}

// SuccessorOf returns what the direct successor of a step must be; nil: it can have none.
func SuccessorOf(step *Step) *Successor {
	if step.Build == "" || step.Root.Upper == "" || step.ReadonlyRoot || len(step.Root.Lower) == 0 || step.Egress != nil && step.Egress.Restricted() {
		return nil
	}
	return &Successor{
		build: step.Build, network: step.Network, reach: reachOf(step),
		lower: append([]string{step.Root.Upper}, step.Root.Lower...),
	}
}

// Network returns the mode of its network.
func (n *Successor) Network() NetworkMode { return n.network }

// Is reports whether step is the successor.
func (n *Successor) Is(step *Step) bool {
	return step.Build == n.build && step.Network == n.network && (step.Egress == nil || !step.Egress.Restricted()) &&
		reflect.DeepEqual(reachOf(step), n.reach) && slices.Equal(step.Root.Lower, n.lower)
}

func reachOf(step *Step) *egress.Reach {
	if step.Egress == nil {
		return nil
	}
	reach := step.Egress.Reach()
	return &reach
}
