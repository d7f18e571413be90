package escape

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(

	entry{
		ID: "archive/bomb-entries", Severity: takesNodeDown, Once: noStep,
		Threat: "An archive holds more files than the disk has inodes for.",
		Test:   bombEntries,
	},
	entry{
		ID: "archive/bomb-headers", Severity: takesNodeDown, Once: noStep,
		Threat: "An archive's headers are large: PAX records, extended attributes, names and sparse maps of megabytes.",
		Test:   bombHeaders,
	},
	entry{
		ID: "archive/bomb-depth", Severity: takesNodeDown,
		Threat: "A step nests directories ten thousand deep, so that nothing can read, export or remove its layer.",
		Test:   bombDepth,
	},
)

// tinyDisk is the size in bytes of the file system of a small node, and tinyInodes
// how many files it holds.
const tinyDisk, tinyInodes = 96 << 20, 20_000

// small returns e with a node on a file system that is soon full.
func (e *env) small(t *testing.T) *env {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,nr_inodes=%d,mode=700", tinyDisk, tinyInodes)))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	w := *e.world
	w.Root = filepath.Join(dir, "root")
	w.Node = w.open(t, w.Root, nil)
	return &env{world: &w, Class: e.Class}
}

// healthy wants a build of another tenant to succeed.
func (e *env) healthy(t *testing.T) {
	t.Helper()
	r := e.MustBuild(t, build{Tenant: victim, Dockerfile: "FROM scratch\nCOPY f /\n", Files: map[string]string{"f": random(t)}})
	require.NotEmpty(t, r.Read(t, "f"))
}

// reclaimed wants the file system of a small node to be nearly empty in the end.
func (e *env) reclaimed(t *testing.T) {
	t.Helper()
	eng, release, err := e.Node.Engine(t.Context(), engine.Domain{Tenant: attacker, Sandbox: e.Class})
	require.NoError(t, err)
	c, err := eng.Client(t.Context())
	require.NoError(t, err)
	require.NoError(t, c.Prune(t.Context(), nil, client.PruneAll))
	require.NoError(t, c.Close())
	release()
	var st unix.Statfs_t
	require.Eventually(t, func() bool {
		require.NoError(t, unix.Statfs(e.Root, &st))
		return st.Blocks-st.Bfree < st.Blocks/4 && st.Files-st.Ffree < st.Files/4
	}, 30*time.Second, 100*time.Millisecond, "what the attack has written stays on the disk")
}

func zipped(data []byte) []byte {
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	_, _ = w.Write(data)
	_ = w.Close()
	return out.Bytes()
}

// unpackBombs tries archives as layers and by ADD, on a small disk.
func unpackBombs(t *testing.T, e *env, archives map[string][]byte) {
	t.Helper()
	e = e.small(t)
	s := newSolver(t, e)
	grown := peakMemory(t)
	for name, data := range archives {
		refused, err := s.solve(t.Context(), s.image(hostile.NewImage([][]byte{data}, nil)).File(llb.Mkfile("/after", 0o644, nil)))
		require.NoError(t, err, name)
		t.Logf("%s as a layer: %.400v", name, refused)
		r := e.Build(t, build{Dockerfile: "FROM scratch\nADD x.tar /\n", Files: map[string]string{"x.tar": string(zipped(data))}, NoExport: true})
		t.Logf("%s by ADD: %.400v", name, r.Err)
		if strings.HasPrefix(name, "too large") {
			require.ErrorContains(t, refused, "no space left", name)
			require.ErrorContains(t, r.Err, "no space left", name)
		}
		e.reclaimed(t)
		e.healthy(t)
	}
	require.Less(t, grown(), int64(512<<20), "memory of the agent")
}

func bombEntries(t *testing.T, e *env) {
	var a hostile.Archive
	for i := range 2 * tinyInodes {
		a.Add(hostile.Plain, hostile.Entry{Type: hostile.File, Name: fmt.Sprintf("d%d/%d", i%100, i), Mode: 0o644})
	}
	unpackBombs(t, e, map[string][]byte{"too large: entries": a.Bytes()})
}

func bombHeaders(t *testing.T, e *env) {
	big := strings.Repeat("x", 900<<10)
	many := make([]string, 0, 40_000)
	for i := range 20_000 {
		many = append(many, fmt.Sprintf("SCHILY.xattr.user.a%d", i), "v")
	}
	entry := func(records ...string) []byte {
		return hostile.Tar(hostile.Plain, hostile.Entry{Type: hostile.File, Name: "f", Mode: 0o644, Records: records})
	}
	var global, repeated hostile.Archive
	for range 50 {
		repeated.Add(hostile.Plain, hostile.Entry{Type: hostile.File, Name: "f", Mode: 0o644, Records: []string{"comment", big}})
		global.Add(hostile.Plain, hostile.Entry{Type: 'g', Name: "g", Body: fmt.Sprintf("%d comment=%s\n", len(big)+16, big)})
	}
	unpackBombs(t, e, map[string][]byte{
		"one record":       entry("comment", big),
		"records":          repeated.Bytes(),
		"global records":   global.Bytes(),
		"an attribute":     entry("SCHILY.xattr.user.big", big),
		"attributes":       entry(many...),
		"a name":           hostile.Tar(hostile.GNU, hostile.Entry{Type: hostile.File, Name: big}),
		"a deep name":      hostile.Tar(hostile.PAX, hostile.Entry{Type: hostile.File, Name: strings.Repeat("d/", 10_000) + "f"}),
		"a link":           hostile.Tar(hostile.PAX, hostile.Entry{Type: hostile.Symlink, Name: "l", Target: big}),
		"sparse map":       entry("GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "f", "GNU.sparse.realsize", "9223372036854775807"),
		"old sparse map":   entry("GNU.sparse.numblocks", "1000000000", "GNU.sparse.map", strings.Repeat("0,0,", 100_000)+"0,0", "GNU.sparse.size", "1"),
		"a size that lies": hostile.Tar(hostile.PAX, hostile.Entry{Type: hostile.File, Name: "f", Records: []string{"size", "9223372036854775807"}}),
	})
}

// bombDepth has a step nest directories deeper than a path can name.
func bombDepth(t *testing.T, e *env) {
	e = e.inMemory(t)
	r := e.Build(t, build{Dockerfile: `FROM tools
RUN set -e; mkdir /t; p=$(for i in $(seq 900); do printf d/; done); for i in $(seq 11); do mkdir -p /n/$p; mv /t /n/${p}t; mv /n /t; done
`})
	t.Logf("nested directories: %.300v", r.Err)
	e.CheckNode(t, r)
	e.healthy(t)
	eng, release, err := e.Node.Engine(t.Context(), engine.Domain{Tenant: attacker, Sandbox: e.Class})
	require.NoError(t, err)
	defer release()
	c, err := eng.Client(t.Context())
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.Prune(t.Context(), nil, client.PruneAll))
	require.Eventually(t, func() bool {
		left, err := filepath.Glob(filepath.Join(e.Root, "store/snapshots/snapshots/*/fs/t"))
		require.NoError(t, err)
		return len(left) == 0
	}, 20*time.Second, 100*time.Millisecond, "the layer cannot be removed")
}

// fromImage builds a Dockerfile FROM img, which is an image of the attacker's.
func (e *env) fromImage(t *testing.T, im hostile.Image, dockerfile string) result {
	t.Helper()
	s := newSolver(t, e)
	s.image(im)
	return e.Build(t, build{Dockerfile: dockerfile, Change: func(opt *client.SolveOpt) {
		opt.FrontendAttrs["context:img"] = "oci-layout://" + storeID + "@" + im.Manifest.Digest.String()
		opt.OCIStores = map[string]content.Store{storeID: s.store}
	}})
}
