package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// inEachSandbox runs f once per class of sandbox.
func inEachSandbox(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()
	for _, class := range classes {
		t.Run(class, func(t *testing.T) { f(t, newNode(t, class)) })
	}
}

func TestDockerfileFeatures(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		var archive bytes.Buffer
		tw := tar.NewWriter(&archive)
		require.NoError(t, tw.WriteHeader(&tar.Header{Name: "in/archive", Mode: 0o640, Size: 2, Uid: 7}))
		_, err := tw.Write([]byte("ok"))
		require.NoError(t, err)
		require.NoError(t, tw.Close())
		dir := contextDir(t, `# syntax=docker/dockerfile:1-labs
ARG OUTER=outer
`+base+`
ARG OUTER
ARG INNER=default
RUN <<SH
set -eu
mkdir /out
echo "$OUTER $INNER" > /out/args
SH
COPY <<TEXT /out/here
written here
TEXT
COPY --link --chmod=0750 --chown=12:34 a /out/a
COPY --parents src/deep/b /out/
COPY --exclude=*.log src /out/src
ADD archive.tar /out/archive
COPY . /out/all
RUN stat -c '%a %u %g' /out/a > /out/stat
`, map[string]string{
			"a": "a", "src/deep/b": "b", "src/x.log": "no", "src/x.txt": "yes", "archive.tar": archive.String(),
			"ignored": "no", ".dockerignore": "ignored\n",
		})
		out := n.mustBuildTree(dir, append(withTools(t), "--build-arg", "INNER=given")...)
		require.Equal(t, "outer given", read(t, out, "out/args"))
		require.Equal(t, "written here", read(t, out, "out/here"))
		require.Equal(t, "750 12 34", read(t, out, "out/stat"))
		require.Equal(t, "b", read(t, out, "out/src/deep/b"))
		require.Equal(t, "yes", read(t, out, "out/src/x.txt"))
		require.NoFileExists(t, filepath.Join(out, "out/src/x.log"))
		require.NoFileExists(t, filepath.Join(out, "out/all/ignored"))
		require.Equal(t, "ok", read(t, out, "out/archive/in/archive"))
	})
}

func TestRunMounts(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		secret := filepath.Join(t.TempDir(), "secret")
		require.NoError(t, os.WriteFile(secret, []byte("canary-4711"), 0o600))
		dir := contextDir(t, base+`
ARG RUN
RUN --mount=type=cache,target=/cache echo $RUN >> /cache/runs
RUN --mount=type=cache,target=/cache mkdir /out && wc -l < /cache/runs > /out/runs
RUN --mount=type=secret,id=s cat /run/secrets/s | wc -c > /out/secret
RUN --mount=type=bind,source=a,target=/bound cp /bound /out/bound && if echo x > /bound; then exit 9; fi
RUN --mount=type=bind,target=/ctx,rw echo scratch > /ctx/new && ls /ctx > /out/ctx
RUN --mount=type=tmpfs,target=/t echo x > /t/x && grep ' /t ' /proc/mounts | cut -d' ' -f3 > /out/tmpfs
RUN --network=none ls /sys/class/net 2>/dev/null; cat /proc/net/dev | grep -c eth0 > /out/none || true
RUN test ! -e /cache && test ! -e /bound && test ! -e /ctx && test ! -e /t && test ! -e /run/secrets
`, map[string]string{"a": "bound"})
		args := append(withTools(t), "--secret", "id=s,src="+secret)
		n.mustBuildTree(dir, append(args, "--build-arg", "RUN=1")...)
		out := n.mustBuildTree(dir, append(args, "--build-arg", "RUN=2")...)
		require.Equal(t, "2", read(t, out, "out/runs"), "the cache mount keeps what the first build wrote")
		require.Equal(t, "11", read(t, out, "out/secret"))
		require.Equal(t, "bound", read(t, out, "out/bound"))
		require.Contains(t, read(t, out, "out/ctx"), "new")
		require.Equal(t, "tmpfs", read(t, out, "out/tmpfs"))
		require.Equal(t, "0", read(t, out, "out/none"))
		require.NoFileExists(t, filepath.Join(dir, "new"), "a writable bind mount does not write to the context")
		require.NoError(t, filepath.WalkDir(n.root, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			require.NotContains(t, string(data), "canary-4711", path)
			return err
		}))
	})
}

// TestSSHAgentIsReachable gives a step an agent without keys and has a program in
// the step ask for them.
func TestSSHAgentIsReachable(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		sock := filepath.Join(t.TempDir(), "agent")
		l, err := net.Listen("unix", sock)
		require.NoError(t, err)
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					// An agent's answer to any request: no identities.
					buf := make([]byte, 64)
					if _, err := c.Read(buf); err == nil {
						_, _ = c.Write([]byte{0, 0, 0, 5, 12, 0, 0, 0, 0})
					}
				}()
			}
		}()
		tools := withTools(t)
		_, toolsDir, _ := strings.Cut(tools[1], "=")
		cmd := exec.Command("go", "build", "-o", filepath.Join(toolsDir, "sshask"), "./testdata/sshask")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		msg, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", msg)
		dir := contextDir(t, base+`
COPY --from=tools sshask /bin/sshask
RUN --mount=type=ssh mkdir /out && sshask > /out/answer
RUN test -z "$SSH_AUTH_SOCK"
`, nil)
		out := n.mustBuildTree(dir, append(tools, "--ssh", "default="+sock)...)
		require.Equal(t, "000000050c00000000", read(t, out, "out/answer"), "the agent says that it has no identities")
	})
}

// treeOps exercises everything that a layer can hold.
const treeOps = base + `
RUN mkdir -p /d/keep /d/gone /d/replaced && echo 1 > /d/keep/f && echo 2 > /d/gone/f && echo 3 > /d/replaced/old && echo 4 > /d/deleted && echo 5 > /d/moved
RUN rm -r /d/gone /d/deleted && rm -r /d/replaced && mkdir /d/replaced && echo new > /d/replaced/new && mv /d/moved /d/moved-away
RUN echo x > /d/linked && ln /d/linked /d/link && ln -s /nowhere /d/symlink && mkfifo /d/fifo && touch /d/empty
RUN chown 33:44 /d/keep/f && chmod 4755 /d/linked && chmod 1777 /d/keep && chmod 2750 /d/replaced
RUN dd if=/dev/zero of=/d/big bs=1024 count=2048 2>/dev/null && touch -d '2020-02-03 04:05:06' /d/empty && adduser -D -H someone 2>/dev/null || echo someone:x:1000:1000::/:/bin/sh >> /etc/passwd
USER 1000:1000
WORKDIR /home/made
RUN id -u > /tmp/uid 2>/dev/null || true
`

// TestLayersAreTheSameInBothSandboxes builds one Dockerfile in each sandbox and
// compares every layer, entry by entry.
func TestLayersAreTheSameInBothSandboxes(t *testing.T) {
	var want []string
	for _, class := range classes {
		n := newNode(t, class)
		out := filepath.Join(t.TempDir(), "oci")
		n.mustBuild(contextDir(t, treeOps, nil), append(withTools(t), "--provenance=false", "-o", "type=oci,tar=false,compression=uncompressed,dest="+out)...)
		got := layerEntries(t, out)
		require.Greater(t, len(got), 20)
		if want == nil {
			want = got
			continue
		}
		require.Equal(t, strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
}

type descriptor struct{ Digest string }

func blob(t *testing.T, layout, digest string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(layout, "blobs", strings.ReplaceAll(digest, ":", "/")))
	require.NoError(t, err)
	return data
}

// layerEntries lists the entries of every layer of the one image in an OCI
// layout: all that a layer says but times.
func layerEntries(t *testing.T, layout string) []string {
	t.Helper()
	var index struct{ Manifests []descriptor }
	data, err := os.ReadFile(filepath.Join(layout, "index.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &index))
	var manifest struct{ Layers []descriptor }
	require.NoError(t, json.Unmarshal(blob(t, layout, index.Manifests[0].Digest), &manifest))
	var out []string
	for i, l := range manifest.Layers {
		tr := tar.NewReader(bytes.NewReader(blob(t, layout, l.Digest)))
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			require.NoError(t, err)
			content, err := io.ReadAll(tr)
			require.NoError(t, err)
			if len(content) > 40 {
				content = []byte(fmt.Sprint(len(content), " bytes"))
			}
			delete(h.PAXRecords, "mtime")
			delete(h.PAXRecords, "path")
			out = append(out, fmt.Sprintf("layer %d: %c %s -> %q mode %o owner %d:%d xattrs %v content %q", i, h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.PAXRecords, content))
		}
	}
	return out
}

func TestMultiPlatformIndexWithoutExecution(t *testing.T) {
	n := newNode(t, "gvisor")
	out := filepath.Join(t.TempDir(), "oci")
	n.mustBuild(contextDir(t, "FROM scratch\nARG TARGETARCH\nCOPY a /a-$TARGETARCH\n", map[string]string{"a": "a"}),
		"--platform", "linux/amd64,linux/arm64,linux/riscv64", "--provenance=false", "-o", "type=oci,tar=false,dest="+out)
	var index struct {
		Manifests []struct{ descriptor }
	}
	require.NoError(t, json.Unmarshal([]byte(read(t, out, "index.json")), &index))
	var inner struct {
		Manifests []struct{ Platform struct{ Architecture string } }
	}
	require.NoError(t, json.Unmarshal(blob(t, out, index.Manifests[0].Digest), &inner))
	require.Len(t, inner.Manifests, 3)
}

func TestSourceDateEpochMakesEqualImages(t *testing.T) {
	var digests []string
	dir := contextDir(t, base+"RUN mkdir /out && echo same > /out/file\n", nil)
	tools := withTools(t)
	for range 2 {
		n := newNode(t, "gvisor")
		n.env = []string{"SOURCE_DATE_EPOCH=1000000000"}
		meta := filepath.Join(t.TempDir(), "meta.json")
		n.mustBuild(dir, append(tools, "--provenance=false", "--metadata-file", meta, "-o", "type=oci,rewrite-timestamp=true,dest="+filepath.Join(t.TempDir(), "x.tar"))...)
		var m struct {
			Digest string `json:"containerimage.digest"`
		}
		require.NoError(t, json.Unmarshal([]byte(read(t, meta)), &m))
		require.NotEmpty(t, m.Digest)
		digests = append(digests, m.Digest)
	}
	require.Equal(t, digests[0], digests[1])
}

// TestOnbuildRunsInTheChild gives a child the triggers of an image in an OCI
// layout.
func TestOnbuildRunsInTheChild(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, n *node) {
		layout := filepath.Join(t.TempDir(), "parent")
		n.mustBuild(contextDir(t, base+"ONBUILD COPY a /from-child\nONBUILD RUN cat /from-child > /triggered\n", nil),
			append(withTools(t), "--provenance=false", "-o", "type=oci,tar=false,dest="+layout)...)
		out := n.mustBuildTree(contextDir(t, "FROM parent\n", map[string]string{"a": "child"}), "--build-context", "parent=oci-layout://"+layout)
		require.Equal(t, "child", read(t, out, "triggered"))
	})
}
