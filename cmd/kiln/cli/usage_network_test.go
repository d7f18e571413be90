package cli

import (
	"testing"

	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestRefusedText(t *testing.T) {
	require.Empty(t, refusedText(nil))
	require.Empty(t, refusedText(&agentv1.StepNetwork{Reached: []*agentv1.StepContact{{Address: "1.2.3.4"}}}))
	n := &agentv1.StepNetwork{Refused: []*agentv1.StepContact{
		{Address: "10.0.0.1", Port: 80, Protocol: "tcp"}, {Name: "evil.example", Protocol: "dns"}, {Address: "10.0.0.2", Name: "a.example", Protocol: "icmp"},
	}}
	require.Equal(t, "was refused 10.0.0.1:80/tcp, evil.example, 10.0.0.2/icmp", refusedText(n))
	n.Refused = append(n.Refused, &agentv1.StepContact{Name: "b"}, &agentv1.StepContact{Name: "c"})
	require.Equal(t, "was refused 10.0.0.1:80/tcp, evil.example, 10.0.0.2/icmp and 2 more", refusedText(n))
}
