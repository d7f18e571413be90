package escape

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

const noStep = "no step runs"

var _ = register(
	entry{
		ID: "archive/corpus-image", Severity: escapesToNode, Once: noStep,
		Threat:  "Thousands of image layers combine every way to name a place outside (absolute, parent, symlink, hard link, whiteout) with all that can be done there.",
		Test:    corpusImages,
		Off:     corpusPlainTar,
		Without: "a reader of archives that resolves every name below its root (in its place: `tar -P`)",
	},
	entry{
		ID: "archive/corpus-add", Severity: escapesToNode, Once: noStep,
		Threat: "The same archives are unpacked by ADD over what earlier ones have left.",
		Test:   corpusAdd,
	},
	entry{
		ID: "archive/corpus-copy", Severity: escapesToNode, Once: noStep,
		Threat: "COPY, WORKDIR and other file operations read from and write to trees whose symlinks lead outside.",
		Test:   corpusCopy,
	},
)

// corpusSeed makes the damaged archives of the corpus.
const corpusSeed = 20240607

// unpackWorkers is how many archives are unpacked at once.
const unpackWorkers = 4

// addEvery is how many archives there are for one that is tried by ADD, of which each
// is a build. It has no divisor with the encodings in common.
const addEvery = 5

// storeID names the client's content store in references to images.
const storeID = "hostile"

// inMemory returns e with a node whose state is in memory: thousands of builds do
// not wait for a disk.
func (e *env) inMemory(t *testing.T) *env {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1g,mode=700"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	w := *e.world
	w.Root = filepath.Join(dir, "root")
	w.Node = w.open(t, w.Root, nil)
	return &env{world: &w, Class: e.Class}
}

// corpusFor returns the cases of one way: each is tried on one goal by images, and on
// the other by ADD.
func corpusFor(way int, goals []hostile.Goal) []hostile.Case {
	var out []hostile.Case
	for i, g := range goals {
		for n, c := range hostile.Corpus(corpusSeed+uint64(i), g) {
			if (n+i)%2 == way {
				out = append(out, c)
			}
		}
	}
	return out
}

// goals are what archives try to reach: a private file of the node, and a file in
// another tenant's layer.
func goals(t *testing.T, e *env) []hostile.Goal {
	t.Helper()
	e.MustBuild(t, build{Tenant: victim, Dockerfile: "FROM scratch\nCOPY victims-file /\n", Files: map[string]string{"victims-file": e.Canary}, NoExport: true})
	found, err := filepath.Glob(filepath.Join(e.Root, "store/snapshots/snapshots/*/fs/victims-file"))
	require.NoError(t, err)
	require.NotEmpty(t, found, "the other tenant's layer")
	goal := func(name, file string) hostile.Goal {
		return hostile.Goal{Name: name, Dir: filepath.Dir(file), File: filepath.Base(file), Marker: "kiln-marker"}
	}
	return []hostile.Goal{goal("private", e.CanaryFile), goal("victim", found[0])}
}

// solver builds LLB for the attacker, with a store of images.
type solver struct {
	c     *client.Client
	store content.Store
	dir   string
	tally
}

func newSolver(t *testing.T, e *env) *solver {
	t.Helper()
	eng, release, err := e.Node.Engine(t.Context(), engine.Domain{Tenant: attacker, Sandbox: e.Class})
	require.NoError(t, err)
	c, err := eng.Client(t.Context())
	require.NoError(t, err)
	s := &solver{c: c, dir: t.TempDir()}
	s.store, err = local.NewStore(s.dir)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Join(s.dir, "blobs/sha256"), 0o755))
	t.Cleanup(func() {
		require.NoError(t, c.Close())
		release()
	})
	return s
}

// image puts an image into the store.
func (s *solver) image(im hostile.Image) llb.State {
	for d, data := range im.Blobs {
		if err := os.WriteFile(filepath.Join(s.dir, "blobs/sha256", d.Encoded()), data, 0o644); err != nil {
			panic(err) // the test's own directory
		}
	}
	return llb.OCILayout(fmt.Sprintf("hostile.example/image@%s", im.Manifest.Digest), llb.OCIStore("", storeID))
}

// solve builds a state, counts, and returns why it was refused. err is for what must
// not be: a build without an end, or a panic.
func (s *solver) solve(ctx context.Context, st llb.State) (refused, err error) {
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	def, err := st.Marshal(ctx, llb.LinuxAmd64)
	if err != nil {
		return nil, err
	}
	_, refused = s.c.Solve(ctx, def, client.SolveOpt{OCIStores: map[string]content.Store{storeID: s.store}}, nil)
	if ctx.Err() != nil {
		return refused, fmt.Errorf("the build does not end: %w", context.Cause(ctx))
	}
	if refused == nil {
		s.ok.Add(1)
		return nil, nil
	}
	s.failed.Add(1)
	if strings.Contains(refused.Error(), "panic") {
		return refused, refused
	}
	return refused, nil
}

// each calls f for all cases, workers at once, and watches the goals meanwhile. Builds
// come one at a time: BuildKit has a race in steps that two builds share.
func each(t *testing.T, e *env, workers int, f func(ctx context.Context, i int, c hostile.Case) error, cases []hostile.Case, watched []hostile.Goal) {
	t.Helper()
	guard := newGuard(t, e, watched)
	memory := peakMemory(t)
	start := time.Now()
	group, ctx := errgroup.WithContext(t.Context())
	group.SetLimit(workers)
	for i, c := range cases {
		group.Go(func() error {
			if err := f(ctx, i, c); err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
			return guard.check(c.Name)
		})
	}
	require.NoError(t, group.Wait())
	guard.finish(t)
	t.Logf("%d archives in %v; memory grew by %d MiB", len(cases), time.Since(start).Round(time.Millisecond), memory()>>20)
	require.Less(t, memory(), int64(512<<20), "memory of the agent")
}

// corpusImages unpacks all images as the engine's worker does, and has the engine
// itself build from some of each kind.
func corpusImages(t *testing.T, e *env) {
	e = e.inMemory(t)
	reached := goals(t, e)
	u := newUnpacker(t, filepath.Join(filepath.Dir(e.Root), "bulk"))
	base := hostile.Tar(hostile.Plain, hostile.Entry{Type: hostile.Directory, Name: "d", Mode: 0o755}, hostile.Entry{Type: hostile.File, Name: "own", Mode: 0o644})
	cases := append(corpusFor(0, reached), corpusFor(1, reached)...)
	require.Greater(t, len(cases), 3000)
	each(t, e, unpackWorkers, func(ctx context.Context, i int, c hostile.Case) error {
		if i%2 == 0 { // a first layer is mounted in another way than those above it
			c.Layers = append([][]byte{base}, c.Layers...)
		}
		return u.unpack(ctx, i, c)
	}, cases, reached)
	tell(t, &u.tally)

	s := newSolver(t, e)
	var some []hostile.Case
	for i, c := range cases {
		if i%31 == 0 {
			some = append(some, c)
		}
	}
	each(t, e, 1, func(ctx context.Context, _ int, c hostile.Case) error {
		_, err := s.solve(ctx, s.image(hostile.NewImage(c.Layers, nil)).File(llb.Mkfile("/after", 0o644, nil)))
		return err
	}, some, reached)
	tell(t, &s.tally)
}

func corpusAdd(t *testing.T, e *env) {
	e = e.inMemory(t)
	reached := goals(t, e)
	var cases []hostile.Case
	for i, c := range corpusFor(1, reached) {
		if i%addEvery == 0 {
			cases = append(cases, c)
		}
	}
	s := newSolver(t, e)
	// The archives are files of one image: they need not be sent for every build.
	var all hostile.Archive
	for i, c := range cases {
		for l, data := range c.Layers {
			all.Add(hostile.Plain, hostile.Entry{Type: hostile.File, Name: fmt.Sprintf("%d-%d.tar", i, l), Mode: 0o644, Body: string(data)})
		}
	}
	archives := s.image(hostile.NewImage([][]byte{all.Bytes()}, nil))
	each(t, e, 1, func(ctx context.Context, i int, c hostile.Case) error {
		st := llb.Scratch()
		for l := range c.Layers {
			st = st.File(llb.Copy(archives, fmt.Sprintf("/%d-%d.tar", i, l), "/", &llb.CopyInfo{AttemptUnpack: true}))
		}
		_, err := s.solve(ctx, st)
		return err
	}, cases, reached)
	tell(t, &s.tally)
}

// corpusCopy has trees with links of all kinds to the goals, and works in them.
func corpusCopy(t *testing.T, e *env) {
	e = e.inMemory(t)
	reached := goals(t, e)
	s := newSolver(t, e)
	files := llb.Scratch().File(llb.Mkfile("/kiln-marker", 0o666, []byte("x"))).File(llb.Mkdir("/tree/kiln-marker", 0o777, llb.WithParents(true)))
	var cases []hostile.Case
	var states []llb.State
	for n, tree := range hostile.Trees(reached...) {
		img := s.image(hostile.NewImage(tree.Layers, nil))
		g, p := tree.Goal, "/"+strings.TrimPrefix(tree.Prefix, "/")
		info := func(change func(*llb.CopyInfo)) *llb.CopyInfo {
			i := &llb.CopyInfo{CreateDestPath: true, AllowWildcard: true, FollowSymlinks: true}
			if change != nil {
				change(i)
			}
			return i
		}
		for name, st := range map[string]llb.State{
			"copy out":         llb.Scratch().File(llb.Copy(img, p+g.File, "/out", info(nil))),
			"copy out all":     llb.Scratch().File(llb.Copy(img, p, "/out", info(func(i *llb.CopyInfo) { i.CopyDirContentsOnly = true }))),
			"copy out by name": llb.Scratch().File(llb.Copy(img, p+"*", "/out", info(func(i *llb.CopyInfo) { i.AllowEmptyWildcard = true }))),
			"copy out links":   llb.Scratch().File(llb.Copy(img, p+g.File, "/out", info(func(i *llb.CopyInfo) { i.FollowSymlinks = false }))),
			"copy all":         llb.Scratch().File(llb.Copy(img, "/", "/out", info(func(i *llb.CopyInfo) { i.CopyDirContentsOnly = true }))),
			"copy in":          img.File(llb.Copy(files, "/kiln-marker", p, info(nil))),
			"copy over":        img.File(llb.Copy(files, "/kiln-marker", p+g.File, info(nil))),
			"copy tree in":     img.File(llb.Copy(files, "/tree", p, info(func(i *llb.CopyInfo) { i.CopyDirContentsOnly = true }))),
			"own all":          img.File(llb.Copy(files, "/tree", p, info(func(i *llb.CopyInfo) { i.CopyDirContentsOnly = true }), llb.WithUser("0:0"))),
			"make file":        img.File(llb.Mkfile(p+g.File, 0o666, []byte("x"))),
			"make directory":   img.File(llb.Mkdir(p+"kiln-marker/x", 0o777, llb.WithParents(true))),
			"make symlink":     img.File(llb.Symlink("/x", p+"kiln-marker")),
			"remove":           img.File(llb.Rm(p+g.File, llb.WithAllowNotFound(true))),
			"remove all":       img.File(llb.Rm(p+"*", llb.WithAllowWildcard(true), llb.WithAllowNotFound(true))),
			"merge":            llb.Merge([]llb.State{img, files}).File(llb.Mkfile("/after", 0o644, nil)),
			"diff":             llb.Diff(files, img).File(llb.Mkfile("/after", 0o644, nil)),
		} {
			// All of them on the one goal, and half on the other.
			if tree.Goal.Name == reached[0].Name || (n+len(name))%2 == 0 {
				cases = append(cases, hostile.Case{Name: tree.Name + "/" + name})
				states = append(states, st)
			}
		}
	}
	each(t, e, 1, func(ctx context.Context, i int, _ hostile.Case) error {
		_, err := s.solve(ctx, states[i])
		return err
	}, cases, reached)
	tell(t, &s.tally)
}

// corpusPlainTar unpacks one archive of each class with a tar that trusts names, and
// tells whether it gets out by every route.
func corpusPlainTar(t *testing.T, e *env) bool {
	_ = e
	goal := hostile.Goal{Name: "off", File: "file", Marker: "kiln-marker"}

	hits, routes := 0, map[string]bool{}
	base := t.TempDir()
	goal.Dir = filepath.Join(base, "goal")
	for _, c := range hostile.Corpus(corpusSeed, goal) {
		if !strings.HasSuffix(c.Name, "/plain/one layer") || c.Class == "damaged" {
			continue
		}
		require.NoError(t, os.RemoveAll(goal.Dir))
		require.NoError(t, os.Mkdir(goal.Dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(goal.Dir, goal.File), []byte("before"), 0o400))
		before := tree(t, goal.Dir)
		root := t.TempDir()
		cmd := exec.Command("tar", "-xPf", "-", "-C", root)
		cmd.Stdin = strings.NewReader(string(c.Layers[0]))
		_ = cmd.Run()
		if !slices.Equal(before, tree(t, goal.Dir)) {
			hits++
			route, _, _ := strings.Cut(c.Class, "/")
			routes[route] = true
		}
	}
	t.Logf("tar -P was led out by %d classes of archives, by %d routes", hits, len(routes))
	return hits > 100 && len(routes) >= 10
}

// tree lists a directory with all that a write to it changes.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		line := fmt.Sprint(path, " ", st.Mode())
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += " " + string(data) + fmt.Sprintf(" %d", links(st))
		}
		out = append(out, line)
		return nil
	}))
	return out
}
