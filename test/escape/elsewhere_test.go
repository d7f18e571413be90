package escape

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// elsewhere is a threat of the register that another package's tests try, since they
// have what it takes: an API server, several agents, a cluster.
type elsewhere struct {
	Threat   string
	Severity severity
	// Tests are those that try it, each as PACKAGE.TEST.
	Tests []string
}

var others = []elsewhere{
	{"A Build names the Secret, ServiceAccount, volume or ConfigMap of another namespace.", reachesTenant, []string{"controller.TestAPIServerRefusesWhatIsWrongInForm", "controller.TestRolesOfPeople"}},
	{"A Build asks for what policy denies its namespace, also past admission.", reachesTenant, []string{"controller.TestPolicyRefusesAtAdmissionAndBehindIt", "cmd/kiln-agent.TestRulesOfTheClusterComeOnTop"}},

	{"A token or certificate of somebody else, of another audience, or one that has expired.", reachesTenant, []string{"agent/auth.TestTokenVerdicts", "agent/auth.TestClientCertificates", "agent/auth.TestCertificateThatExpires"}},
	{"A build fetches from the cluster's API server, Pods or Services.", readsNode, []string{"cmd/kiln-agent.TestFetchPolicy", "sandbox/egress.TestAdditionalRanges"}},
	{"A step connects to the cluster's Pods and Services, or to what a policy's lists do not have.", readsNode, []string{"sandbox/netns.TestDeniedRanges", "test/integration.TestDestinationsAreAllThatStepsReach"}},
	{"The agent is killed at any moment.", takesNodeDown, []string{"test/agent.TestKilledAtAnyMoment", "test/agent.TestNothingIsLeftOfAnyEnd", "agent/record.TestCutAtEveryByte"}},
	{"The controller is killed at any moment.", takesNodeDown, []string{"controller.TestControllerKilledAtAnyMoment"}},
	{"Two controllers work at once.", takesNodeDown, []string{"controller.TestTwoControllersAndManyBuilds"}},
	{"The API server is away for minutes, or a watch is lost.", takesNodeDown, []string{"test/e2e.TestKilnOnKubernetes"}},
	{"A node is gone for ever, or comes back without its records.", takesNodeDown, []string{"controller.TestAgentThatDies", "controller.TestAgentThatLostItsRecords", "controller.TestBuildDeletedWhileItsAgentIsAwayIsSwept"}},
	{"Certificates of the cluster are made by a clock that is ahead, or are not renewed in time.", takesNodeDown, []string{"controller/pki.TestClockThatJumps", "controller/pki.TestControllerThatSleptFindsItsWayBack"}},
	{"The registry that a build pushes to stalls, refuses or ends early.", takesNodeDown, []string{"test/integration.TestRegistryThatRefusesOrStallsOrTruncates"}},
}

// elsewhereTable is the part of the register that other packages try.
func elsewhereTable() string {
	var b strings.Builder
	b.WriteString("\n## Tried by tests of other packages\n\n`make test` runs them; `make security-results` only makes sure that they are there.\n\n| threat | severity | tests |\n| --- | --- | --- |\n")
	for _, o := range others {
		fmt.Fprintf(&b, "| %s | %s | `%s` |\n", o.Threat, o.Severity, strings.Join(o.Tests, "`, `"))
	}
	return b.String()
}

// TestOthersAreThere looks for what elsewhere names.
func TestOthersAreThere(t *testing.T) {
	for _, o := range others {
		for _, name := range o.Tests {
			dir, test, ok := strings.Cut(name, ".")
			require.True(t, ok, name)
			files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
			require.NoError(t, err)
			found := false
			for _, f := range files {
				text, err := os.ReadFile(f)
				require.NoError(t, err)
				found = found || strings.Contains(string(text), "\nfunc "+test+"(")
			}
			require.True(t, found, "there is no test %s", name)
		}
	}
}
