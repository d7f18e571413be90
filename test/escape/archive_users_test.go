package escape

import (
	"fmt"
	"strings"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(
	entry{
		ID: "archive/image-user", Severity: escapesToNode,
		Threat: "An image's USER overflows, is negative, or has NUL and line breaks, to become root or somebody of the node.",
		Test:   imageUser,
	},
	entry{
		ID: "archive/image-passwd", Severity: takesNodeDown,
		Threat: "An image's passwd or group file is 2 GiB, a device, a pipe, or a symlink to the node's.",
		Test:   imagePasswd,
	},
)

func imageUser(t *testing.T, e *env) {
	passwd := hostile.Entry{Type: hostile.File, Name: "etc/passwd", Mode: 0o644, Body: "over:x:4294967296:4294967296::/:/bin/sh\nneg:x:-1:-1::/:/bin/sh\nbig:x:70000:70000::/:/bin/sh\nwww:x:33:33::/:/bin/sh\n"}
	layer := program(t, passwd)
	users := []string{"33", "www", "-1", "4294967296", "4294967295", "99999999999999999999", "65536", "0:4294967296", "1:-1", "over", "neg", "big", "www\nroot", "www\x00", "$(id)", "../../etc/passwd", "1:2:3", "0x0", " 0", strings.Repeat("x", 1<<20)}
	var attempts []string
	for i, user := range users {
		im := hostile.NewImage([][]byte{layer}, func(c *ocispecs.Image, _ *ocispecs.Manifest) {
			c.Config.User, c.Config.Env = user, []string{"PATH=/bin"}
		})
		r := e.fromImage(t, im, fmt.Sprintf("FROM img\nRUN [\"/bin/id\", \"-u\"]\nRUN echo %d; cat %s; exit 0\n", i, e.CanaryFile))
		e.CheckNode(t, r)
		first, _, _ := strings.Cut(r.Log, "\n")
		attempts = append(attempts, fmt.Sprintf("%.30q: %s", user, first))
		if i < 2 {
			require.NoError(t, r.Err)
			require.Equal(t, "33", first)
		} else if r.Err == nil {
			require.NotEqual(t, "0", first, "USER %.30q is root", user)
		}
	}
	t.Log(attempts)
}

func imagePasswd(t *testing.T, e *env) {
	// The node is the entry's own: others look through all that is on theirs.
	node := e.open(t, e.dir(t), nil)
	grown := peakMemory(t)
	for name, make := range map[string]string{
		"huge": "truncate -s 2G /etc/passwd /etc/group", "pipe": "mkfifo /etc/passwd; mkfifo /etc/group", "directory": "mkdir /etc/passwd /etc/group",
		"node's": "ln -s " + e.CanaryFile + " /etc/passwd; ln -s /proc/self/environ /etc/group", "loop": "ln -s passwd /etc/passwd", "long lines": "head -c 9000000 /dev/zero > /etc/passwd; cp /etc/passwd /etc/group",
	} {
		start := "FROM tools\nRUN rm -f /etc/passwd /etc/group; " + make + "\n"
		for _, then := range []string{"USER www\nRUN id\n", "USER 5:www\nRUN id\n", "COPY --chown=www:www f /\n", "WORKDIR /home/x\nUSER www:www\nCOPY --chown=www f /\n"} {
			r := e.Build(t, build{Node: node, Dockerfile: start + then, Files: map[string]string{"f": "x"}, NoExport: true})
			e.CheckNode(t, r)
			require.NotContains(t, fmt.Sprint(r.Err), "deadline", "%s: %s", name, then)
			require.NotContains(t, r.Log, "uid=0", "%s: %s", name, then)
		}
	}
	require.Less(t, grown(), int64(384<<20), "memory of the agent")
}
