package escape

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/buildkit/client/llb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/snapshot"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(entry{
	ID: "archive/bomb-size", Severity: takesNodeDown, Once: noStep,
	Threat: "Few bytes of an archive are gigabytes of zeros, or a header or a sparse map says that a file has 2^60 bytes.",
	Test:   bombSize, Off: bombSizeOff, Without: "the agent's removal of what has filled the disk (in its place: containerd's unpacking)",
})

// sizeDisk is how many mebibytes the file system of the node has that is filled.
const sizeDisk = 64

// onDisk returns e with a node on a small file system of its own, which is on a disk.
func (e *env) onDisk(t *testing.T) *env {
	t.Helper()
	w := *e.world
	w.Root = filepath.Join(smallDisk(t, sizeDisk), "root")
	w.Node = w.open(t, w.Root, func(c *engine.NodeConfig) { c.Space = engine.Space{MaxUsed: sizeDisk / 2 << 20} })
	return &env{world: &w, Class: e.Class}
}

// freeSpace returns how many bytes a file system has room for.
func freeSpace(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	return int64(st.Bavail) * st.Bsize
}

// hasSpace wants a build of another tenant's to succeed that needs some room, although
// nobody has removed anything. after is what may have filled the disk.
func (e *env) hasSpace(t *testing.T, after string) {
	t.Helper()
	body := strings.Repeat(random(t), 20_000)
	r := e.Build(t, build{Tenant: victim, Dockerfile: "FROM scratch\nCOPY f /\n", Files: map[string]string{"f": body}, NoExport: true})
	require.NoError(t, r.Err, "after %s, with %d MiB free", after, freeSpace(t, e.Root)>>20)
}

// zeros are so many mebibytes of zeros, compressed: members of gzip follow each other.
func zeros(mebibytes int) []byte {
	const member = 16
	var one bytes.Buffer
	w := gzip.NewWriter(&one)
	_, _ = w.Write(make([]byte, member<<20))
	_ = w.Close()
	return bytes.Repeat(one.Bytes(), mebibytes/member)
}

// sizeBombs are compressed archives with files that no disk has room for. Those that are
// too large fill it before they end.
func sizeBombs(t *testing.T) map[string][]byte {
	t.Helper()
	const most = 1 << 60
	file := func(size int64, body []byte) []byte {
		var h bytes.Buffer
		require.NoError(t, tar.NewWriter(&h).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: size, Mode: 0o644, Format: tar.FormatGNU}))
		return bytes.Join([][]byte{zipped(h.Bytes()), body, zipped(make([]byte, 1024))}, nil)
	}
	hole := hostile.Entry{Type: hostile.File, Name: "hole", Mode: 0o644, Records: []string{"GNU.sparse.size", "1152921504606846976", "GNU.sparse.numblocks", "1", "GNU.sparse.map", "1152921504606846976,0"}}
	return map[string][]byte{
		"too large: zeros":                   file(4<<30, zeros(4<<10)),
		"too large: hole":                    zipped(hostile.Tar(hostile.Plain, hole)),
		"2^60 bytes, of which few are there": file(most, nil),
	}
}

// sizeBombImage has an archive as its layer, and says another digest of what is in it.
func sizeBombImage(data []byte) hostile.Image {
	im := hostile.Image{Blobs: map[digest.Digest][]byte{}}
	m := &ocispecs.Manifest{MediaType: ocispecs.MediaTypeImageManifest, Layers: []ocispecs.Descriptor{im.Add(ocispecs.MediaTypeImageLayerGzip, data)}}
	m.SchemaVersion = 2
	im.Finish(ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispecs.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(nil)}}}, m)
	return im
}

func bombSize(t *testing.T, e *env) {
	e = e.onDisk(t)
	s := newSolver(t, e)
	grown := peakMemory(t)
	for name, data := range sizeBombs(t) {
		start := time.Now()
		layer, err := s.solve(t.Context(), s.image(sizeBombImage(data)).File(llb.Mkfile("/after", 0o644, nil)))
		require.NoError(t, err, name)
		t.Logf("%s, %d bytes, as a layer: %v: %.300v", name, len(data), time.Since(start).Round(time.Millisecond), layer)
		e.hasSpace(t, name+" as a layer")
		start = time.Now()
		added := e.Build(t, build{Dockerfile: "FROM scratch\nADD x.tgz /\n", Files: map[string]string{"x.tgz": string(data)}, NoExport: true}).Err
		t.Logf("%s by ADD: %v: %.300v", name, time.Since(start).Round(time.Millisecond), added)
		e.hasSpace(t, name+" by ADD")
		want := "unexpected EOF"
		if strings.HasPrefix(name, "too large") {
			want = "no space left"
		}
		require.ErrorContains(t, layer, want, name)
		require.ErrorContains(t, added, want, name)
	}
	e.reclaimed(t)
	require.Less(t, grown(), int64(256<<20), "memory of the agent")
}

// bombSizeOff tells whether a layer fills a disk when containerd alone unpacks it.
func bombSizeOff(t *testing.T, _ *env) bool {
	dir := smallDisk(t, sizeDisk)
	u := newUnpacker(t, filepath.Join(dir, "store"))
	ctx := namespaces.WithNamespace(t.Context(), snapshot.Namespace)
	data := sizeBombs(t)["too large: zeros"]
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromBytes(data), Size: int64(len(data))}
	require.NoError(t, content.WriteBlob(ctx, u.store.DB.ContentStore(), "zeros", bytes.NewReader(data), desc))
	mounts, err := u.store.Snapshots().Prepare(ctx, "zeros", "")
	require.NoError(t, err)
	_, err = u.applier.Apply(ctx, desc, mounts)
	require.ErrorContains(t, err, "no space left")
	return freeSpace(t, dir) < 1<<20
}
