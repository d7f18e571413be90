package userns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// layerOf makes a layer of files; a name that ends with a slash is a directory.
func layerOf(t *testing.T, names ...string) string {
	t.Helper()
	dir := openDir(t)
	for _, n := range names {
		p := filepath.Join(dir, n)
		if n[len(n)-1] == '/' {
			require.NoError(t, os.MkdirAll(p, 0o755))
			continue
		}
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, nil, 0o755))
	}
	return dir
}

func TestLayersThatChangeFacts(t *testing.T) {
	for name, c := range map[string]struct {
		layer string
		want  bool
	}{
		"nothing":                   {layerOf(t), false},
		"elsewhere":                 {layerOf(t, "app/bin/x", "usr/share/x", "etc/hosts", "var/lib/x"), false},
		"a program":                 {layerOf(t, "usr/bin/x"), true},
		"a local program":           {layerOf(t, "usr/local/bin/x"), true},
		"users":                     {layerOf(t, "etc/passwd"), true},
		"the directory of programs": {layerOf(t, "bin/"), true},
		"a file in place of /usr":   {layerOf(t, "usr"), true},
		"no such layer":             {"/no/such/layer", true},
	} {
		require.Equal(t, c.want, touches(c.layer), name)
	}
	hidden := layerOf(t, "usr/")
	require.NoError(t, unix.Setxattr(filepath.Join(hidden, "usr"), "trusted.overlay.opaque", []byte("y"), 0))
	require.True(t, touches(hidden), "hides all of /usr")
	link := layerOf(t, "x")
	require.NoError(t, os.Symlink("/x", filepath.Join(link, "bin")))
	require.True(t, touches(link), "a symlink in place of a directory")
}

func TestRootsWithSymlinksAreNotKept(t *testing.T) {
	root := busybox(t)
	require.True(t, ordinary(root))
	require.NoError(t, os.Symlink("usr/lib", filepath.Join(root, "lib")))
	require.True(t, ordinary(root), "as distributions have it")
	require.NoError(t, os.Symlink("/opt/users", filepath.Join(root, "etc/alternatives")))
	require.False(t, ordinary(root))
	require.NoError(t, os.Remove(filepath.Join(root, "etc/alternatives")))
	require.NoError(t, os.Remove(filepath.Join(root, "bin/sh")))
	require.NoError(t, os.Mkdir(filepath.Join(root, "opt"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "opt/sh"), nil, 0o755))
	require.NoError(t, os.Symlink("/opt/sh", filepath.Join(root, "bin/sh")))
	require.False(t, ordinary(root), "a shell from elsewhere")
}

// TestFactsFollowTheLayers builds up a chain as a build does.
func TestFactsFollowTheLayers(t *testing.T) {
	r := newRuntime(t)
	base := busybox(t)
	chain := []string{base}
	see := func(layer string) (string, *facts) {
		chain = append([]string{layer}, chain...)
		step := newStep(t, "grep NoNewPrivs /proc/self/status | cut -f2; id -u; echo $HOME")
		step.Root.Lower = chain
		step.Process.User = "www"
		out, code := run(t, r, step)
		require.Zero(t, code, out)
		key, _ := chainKeys(chain)
		return out, r.facts.chains[key]
	}
	out, first := see(layerOf(t, "app/x"))
	require.Equal(t, "1\n33\n/\n", out)
	require.NotNil(t, first)
	out, second := see(layerOf(t, "app/y"))
	require.Equal(t, "1\n33\n/\n", out)
	require.Same(t, first, second, "nothing new had to be looked at")

	users := layerOf(t)
	require.NoError(t, os.Mkdir(filepath.Join(users, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(users, "etc/passwd"), []byte("www:x:44:45::/home/www:/bin/sh\n"), 0o644))
	out, third := see(users)
	require.Equal(t, "1\n44\n/home/www\n", out)
	require.NotSame(t, first, third)

	setuid := layerOf(t, "usr/bin/su")
	require.NoError(t, os.Chmod(filepath.Join(setuid, "usr/bin/su"), 0o755|os.ModeSetuid))
	out, _ = see(setuid)
	require.Equal(t, "0\n44\n/home/www\n", out, "setuid programs may work now")
	hide := layerOf(t, "usr/bin/")
	require.NoError(t, unix.Mknod(filepath.Join(hide, "usr/bin/su"), unix.S_IFCHR, 0))
	out, _ = see(hide)
	require.Equal(t, "1\n44\n/home/www\n", out, "and no more")
}

func TestUpperThatIsNotEmptyIsLookedAt(t *testing.T) {
	c := newFactCache()
	tree := sandbox.Tree{Lower: []string{busybox(t)}, Upper: layerOf(t, "etc/passwd")}
	c.of(tree, tree.Lower[0])
	require.Empty(t, c.chains)
	tree.Upper = layerOf(t)
	require.Same(t, c.of(tree, tree.Lower[0]), c.of(tree, tree.Lower[0]))
	require.Len(t, c.chains, 1)
}
