package agent

import (
	"fmt"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// classes are the classes of sandbox by their number in the API.
var classes = map[agentv1.SandboxClass]sandbox.Class{
	agentv1.SandboxClass_SANDBOX_CLASS_GVISOR: sandbox.GVisor,
	agentv1.SandboxClass_SANDBOX_CLASS_USERNS: sandbox.Userns,
}

// className returns the name of a class, empty for the unspecified, and a name that
// no class has for a number that is none.
func className(c agentv1.SandboxClass) string {
	if c == agentv1.SandboxClass_SANDBOX_CLASS_UNSPECIFIED {
		return ""
	}
	if name, ok := classes[c]; ok {
		return string(name)
	}
	return c.String()
}

func sandboxClass(name string) agentv1.SandboxClass {
	for number, class := range classes {
		if string(class) == name {
			return number
		}
	}
	return agentv1.SandboxClass_SANDBOX_CLASS_UNSPECIFIED
}

// networkName returns the name of a network, empty for the unspecified, and a name
// that no network has for a number that is none.
func networkName(m agentv1.NetworkMode) string {
	switch m {
	case agentv1.NetworkMode_NETWORK_MODE_UNSPECIFIED:
		return ""
	case agentv1.NetworkMode_NETWORK_MODE_NONE:
		return networkNone
	case agentv1.NetworkMode_NETWORK_MODE_EGRESS:
		return networkEgress
	}
	return m.String()
}

func networkMode(name string) agentv1.NetworkMode {
	if name == networkNone {
		return agentv1.NetworkMode_NETWORK_MODE_NONE
	}
	return agentv1.NetworkMode_NETWORK_MODE_EGRESS
}

// field is an element of a list.
func field(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }
