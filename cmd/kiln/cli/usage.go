package cli

import (
	"fmt"
	"net"
	"strconv"
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
	if text := refusedText(u.GetNetwork()); text != "" {
		parts = append(parts, text)
	}
	return "used " + strings.Join(parts, ", ")
}

// refusedShown is how many destinations are named.
const refusedShown = 3

// refusedText tells what a step was kept from, such as "was refused 10.0.0.1:80/tcp,
// evil.example and 2 more".
func refusedText(n *agentv1.StepNetwork) string {
	var names []string
	for _, c := range n.GetRefused() {
		name := c.GetName()
		if c.GetAddress() != "" {
			if name = c.GetAddress(); c.GetPort() != 0 {
				name = net.JoinHostPort(name, strconv.Itoa(int(c.GetPort())))
			}
			name += "/" + c.GetProtocol()
		}
		names = append(names, printable(name))
	}
	switch more := len(names) - refusedShown; {
	case len(names) == 0:
		return ""
	case more > 0:
		return fmt.Sprintf("was refused %s and %d more", strings.Join(names[:refusedShown], ", "), more)
	}
	return "was refused " + strings.Join(names, ", ")
}
