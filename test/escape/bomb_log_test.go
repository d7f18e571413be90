package escape

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var _ = register(
	entry{
		ID: "exhaustion/log-line", Severity: takesNodeDown,
		Threat: "A step writes a line of 100 MB, for who keeps whole lines in memory.",
		Test: func(t *testing.T, e *env) {
			program := bombProgram(t, e.world)
			peak := memoryGrowth(t)
			r := e.MustBuild(t, build{
				NoExport: true, Files: map[string]string{"bomb": program},
				Dockerfile: "FROM tools\nCOPY bomb /bin/\nRUN [\"/bin/bomb\", \"line\", \"100\"]\n",
			})
			t.Logf("%d bytes are passed on; memory grew by %d MiB", len(r.Log), peak()>>20)
			require.Less(t, len(r.Log), logMost)
			require.Less(t, peak(), int64(150<<20), "memory of the agent and of the client")
		},
		Off: func(t *testing.T, e *env) bool {
			out := e.rawBomb(t, "line", 100)
			t.Logf("without the control %d bytes are passed on", len(out))
			return len(out) >= 100<<20
		},
		Without: "the limit of output",
	},
	entry{
		ID: "exhaustion/log-flood", Severity: takesNodeDown,
		Threat: "A step writes without end, so that logs fill the disk and their keepers all processors.",
		Test: func(t *testing.T, e *env) {
			ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
			defer cancel()
			flood := make(chan result, 1)
			go func() {
				flood <- e.BuildContext(t, ctx, build{NoExport: true, Dockerfile: "FROM tools\nRUN timeout 5 yes 0123456789012345678901234567890123456789; timeout 2 yes >&2; true\n"})
			}()
			e.MustBuild(t, build{Tenant: victim, NoExport: true, Dockerfile: "FROM tools\nRUN sleep 0.5; echo beside a flood\nRUN echo two\n"})
			r := <-flood
			require.NoError(t, r.Err)
			t.Logf("%d bytes are passed on", len(r.Log))
			require.Less(t, len(r.Log), logMost)
		},
	},
	entry{
		ID: "exhaustion/log-bytes", Severity: slowsOthers,
		Threat: "A step writes escape sequences, NUL bytes and bytes that are no text, for who shows or stores them.",
		Test: func(t *testing.T, e *env) {
			r := e.MustBuild(t, build{Dockerfile: "FROM tools\nRUN printf '\\033[2J\\033]0;title\\007\\033[31m\\0\\0\\377\\376\\r\\b\\n%s\\n' after; head -c 100000 /dev/urandom; printf '\\nend\\n'; echo ok > /ok\n"})
			require.Equal(t, "ok\n", r.Read(t, "ok"))
			require.Contains(t, r.Log, "after")
			require.Contains(t, r.Log, "\nend\n")
			r = e.Build(t, build{NoExport: true, Dockerfile: "FROM tools\nRUN printf 'x\\0\\377\\033[2J\\n'; exit 7\n"})
			require.ErrorContains(t, r.Err, "exit code: 7")
			require.True(t, strings.ToValidUTF8(r.Err.Error(), "") == r.Err.Error() && !strings.Contains(r.Err.Error(), "\033"), "%q", r.Err)
		},
	},
)

// logMost is the most output of a step that is passed on when nobody says, in bytes.
const logMost = 17 << 20

// memoryGrowth returns what tells by how many bytes the memory of this process, which is
// the agent and the client, has grown at most since the call.
func memoryGrowth(t *testing.T) func() int64 {
	t.Helper()
	require.NoError(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0))
	read := func(field string) int64 {
		data, err := os.ReadFile("/proc/self/status")
		require.NoError(t, err)
		_, rest, ok := strings.Cut(string(data), "\n"+field+":")
		require.True(t, ok)
		n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		require.NoError(t, err)
		return n << 10
	}
	before := read("VmRSS")
	return func() int64 { return read("VmHWM") - before }
}
