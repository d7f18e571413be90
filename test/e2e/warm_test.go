package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// warmBuilds is how many builds of a class tell how long one takes.
const warmBuilds = 5

// testWarm has nodes that have built before tell how long a Build of one short step takes,
// from before kubectl is started until kubectl shows its end: its first step begins before
// that.
func testWarm(t *testing.T, in *installation) {
	for _, class := range []string{"gvisor", "userns"} {
		var took []time.Duration
		for i := range warmBuilds {
			name, began := fmt.Sprintf("warm-%s-%d", class, i), time.Now()
			word := fmt.Sprint("ran-", began.UnixNano())
			in.succeeds(t, name, "  runtimeClassName: "+class+"\n"+in.inline("echo $((1+1))-"+word))
			took = append(took, time.Since(began).Round(10*time.Millisecond))
			_, log, err := in.kiln("logs", "-n", namespace, name)
			require.NoError(t, err, log)
			require.Contains(t, log, "2-"+word, "the step ran for this Build")
		}
		slices.Sort(took)
		t.Logf("%s: kubectl apply to the end of a Build of one step: median %s of %v", class, took[len(took)/2], took)
	}
}
