package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// warmBuilds is how many builds of a class tell how soon a step runs.
const warmBuilds = 5

var stepBegan = regexp.MustCompile(`began-at (\d+)\.(\d{3})`)

// testWarm has the nodes that have built before tell when the first command of a Build's
// first step runs, from before kubectl is started, and that each Build has its own step.
func testWarm(t *testing.T, in *installation) {
	for _, class := range []string{"gvisor", "userns"} {
		var took []time.Duration
		for i := range warmBuilds {
			name := fmt.Sprintf("warm-%s-%d", class, i)
			began := time.Now()
			in.succeeds(t, name, "  runtimeClassName: "+class+"\n"+in.inline(fmt.Sprintf("echo began-at $(date +%%s.%%N) %d", began.UnixNano())))
			_, log, err := in.kiln("logs", "-n", namespace, name)
			require.NoError(t, err, log)
			at := stepBegan.FindStringSubmatch(log)
			require.NotNil(t, at, log)
			seconds, err := strconv.ParseInt(at[1], 10, 64)
			require.NoError(t, err)
			milliseconds, err := strconv.ParseInt(at[2], 10, 64)
			require.NoError(t, err)
			first := time.Unix(seconds, milliseconds*1e6).Sub(began).Round(10 * time.Millisecond)
			require.Positive(t, first, "the step ran for this Build")
			took = append(took, first)
		}
		slices.Sort(took)
		t.Logf("%s: kubectl apply to the first command of the first step: median %s of %v", class, took[len(took)/2], took)
	}
}
