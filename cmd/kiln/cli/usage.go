package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// usageText tells what a step used, such as "used cpu 0.8s, peak 34MiB, wrote 12MiB"; ""
// when nothing is known.
func usageText(u *agentv1.StepUsage) string {
	if u == nil {
		return ""
	}
	parts := []string{fmt.Sprintf("cpu %.1fs", u.GetCpu().AsDuration().Round(100*time.Millisecond).Seconds())}
	if n := u.GetPeakMemoryBytes(); n > 0 {
		parts = append(parts, "peak "+units.BytesSize(float64(n)))
	}
	if n := u.GetDiskBytes(); n > 0 {
		parts = append(parts, "wrote "+units.BytesSize(float64(n)))
	}
	if l := u.GetLimitsReached(); len(l) > 0 {
		parts = append(parts, "reached its limit of "+printable(strings.Join(l, ", ")))
	}
	return "used " + strings.Join(parts, ", ")
}
