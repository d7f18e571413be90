package engine

import (
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/steplimits"
)

// TestDescribe has a definition whose front end has written into it what it may not say.
func TestDescribe(t *testing.T) {
	own := map[string]string{buildKey: "of another build", steplimits.DestinationsKey: "everything", steplimits.Key: "pids=5", "llb.customname": "a name"}
	st := llb.Scratch().Run(llb.Args([]string{"/a"}), llb.WithDescription(own)).Root().File(llb.Mkdir("/d", 0o755))
	def, err := st.Marshal(t.Context())
	require.NoError(t, err)
	out, err := describe(def.ToPB(), map[string]string{buildKey: "1", steplimits.DestinationsKey: "nothing", steplimits.Key: "pids=9"})
	require.NoError(t, err)
	require.Equal(t, def.ToPB().Def, out.Def, "what steps are stays")
	steps := 0
	for _, data := range out.Def {
		var op pb.Op
		require.NoError(t, op.UnmarshalVT(data))
		said := out.Metadata[digest.FromBytes(data).String()].GetDescription()
		if op.GetExec() == nil {
			require.Empty(t, said)
			continue
		}
		steps++
		require.Equal(t, map[string]string{buildKey: "1", steplimits.DestinationsKey: "nothing", steplimits.Key: "pids=5", "llb.customname": "a name"}, said)
	}
	require.Equal(t, 1, steps)
}

func TestExpectedSteps(t *testing.T) {
	var none *expectedSteps
	none.add() // of a node with many builds
	none.begin()
	e := &expectedSteps{}
	require.Equal(t, -1, e.left(), "nobody knows")
	e.add()
	e.add()
	e.begin()
	require.Equal(t, 1, e.left())
	e.begin()
	require.Zero(t, e.left())
}
