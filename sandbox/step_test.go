package sandbox

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func validStep() *Step {
	return &Step{
		ID: "step1", Root: Tree{Lower: []string{"/l"}, Upper: "/u", Work: "/w"}, Network: NetworkNone,
		Process: Process{Args: []string{"true"}, Cwd: "/"},
	}
}

func TestValidateRefuses(t *testing.T) {
	require.NoError(t, validStep().Validate())
	for name, c := range map[string]struct {
		change func(*Step)
		want   string
	}{
		"ID with a slash":             {func(s *Step) { s.ID = "../x" }, "step ID"},
		"ID with a dot":               {func(s *Step) { s.ID = "a.b" }, "step ID"},
		"empty ID":                    {func(s *Step) { s.ID = "" }, "step ID"},
		"no network chosen":           {func(s *Step) { s.Network = "" }, "network"},
		"the node's network":          {func(s *Step) { s.Network = "host" }, "network"},
		"no root":                     {func(s *Step) { s.Root = Tree{} }, "root"},
		"two forms of root":           {func(s *Step) { s.Root.Dir = "/d" }, "root"},
		"tmpfs root":                  {func(s *Step) { s.Root = Tree{Tmpfs: &Tmpfs{}} }, "root"},
		"upper without work":          {func(s *Step) { s.Root.Work = "" }, "root"},
		"relative lower":              {func(s *Step) { s.Root.Lower = []string{"l"} }, "not absolute"},
		"mount over the root":         {func(s *Step) { s.Mounts = []Mount{{Destination: "/a/..", Tree: Tree{Dir: "/d"}}} }, "mount 0"},
		"relative mount":              {func(s *Step) { s.Mounts = []Mount{{Destination: "a", Tree: Tree{Dir: "/d"}}} }, "mount 0"},
		"socket that is no directory": {func(s *Step) { s.Mounts = []Mount{{Destination: "/a", Tree: Tree{Tmpfs: &Tmpfs{}}, Socket: true}} }, "socket"},
		"NUL in a subpath":            {func(s *Step) { s.Mounts = []Mount{{Destination: "/a", Subpath: "\x00", Tree: Tree{Dir: "/d"}}} }, "NUL"},
		"no command":                  {func(s *Step) { s.Process.Args = nil }, "no command"},
		"NUL in the environment":      {func(s *Step) { s.Process.Env = []string{"A=\x00"} }, "NUL"},
		"relative directory":          {func(s *Step) { s.Process.Cwd = "x" }, "working directory"},
	} {
		t.Run(name, func(t *testing.T) {
			s := validStep()
			c.change(s)
			require.ErrorContains(t, s.Validate(), c.want)
		})
	}
}

func TestParseClassListsTheNames(t *testing.T) {
	c, err := ParseClass("userns")
	require.NoError(t, err)
	require.Equal(t, Userns, c)
	_, err = ParseClass("runc")
	require.ErrorContains(t, err, "gvisor, userns")
}

func TestUnavailableErrorTellsWhatAndHow(t *testing.T) {
	cause := errors.New("cause")
	err := &UnavailableError{Class: GVisor, Missing: "runsc", Fix: "install it", Err: cause}
	require.ErrorIs(t, err, cause)
	for _, part := range []string{"gvisor", "runsc", "install it", "cause"} {
		require.ErrorContains(t, err, part)
	}
}

func imageRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(content), 0o644))
	}
	return root
}

func TestResolveUser(t *testing.T) {
	root := imageRoot(t, map[string]string{
		"etc/passwd": "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\nbig:x:65536:0::/:/bin/sh\nbroken\n",
		"etc/group":  "root:x:0:\napp:x:1001:\nextra:x:44:app\n",
	})
	for name, c := range map[string]struct {
		user string
		want UserIDs
		err  string
	}{
		"nobody named":      {"", UserIDs{}, ""},
		"name":              {"app", UserIDs{UID: 1000, GID: 1001, Groups: []uint32{44}}, ""},
		"name and group":    {"app:extra", UserIDs{UID: 1000, GID: 44}, ""},
		"number":            {"7", UserIDs{UID: 7}, ""},
		"numbers":           {"7:8", UserIDs{UID: 7, GID: 8}, ""},
		"unknown name":      {"nobody", UserIDs{}, "nobody"},
		"unknown group":     {"app:none", UserIDs{}, "none"},
		"too large":         {"65536", UserIDs{}, "outside"},
		"too large in file": {"big", UserIDs{}, "outside"},
		"overflow":          {"4294967296", UserIDs{}, "4294967296"},
		"negative":          {"-1", UserIDs{}, "-1"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ResolveUser(root, c.user)
			if c.err != "" {
				require.ErrorContains(t, err, c.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want.UID, got.UID)
			require.Equal(t, c.want.GID, got.GID)
			require.ElementsMatch(t, c.want.Groups, got.Groups)
		})
	}
}

func TestResolveUserStaysInTheImage(t *testing.T) {
	outside := imageRoot(t, map[string]string{"passwd": "spy:x:42:42::/:/bin/sh\n"})
	for name, target := range map[string]string{"absolute": filepath.Join(outside, "passwd"), "upward": "../../../../../../" + filepath.Join(outside, "passwd")} {
		root := imageRoot(t, map[string]string{"etc/group": ""})
		require.NoError(t, os.Symlink(target, filepath.Join(root, "etc/passwd")))
		_, err := ResolveUser(root, "spy")
		require.Error(t, err, name)
	}
	fifo := imageRoot(t, map[string]string{"etc/group": ""})
	require.NoError(t, unix.Mkfifo(filepath.Join(fifo, "etc/passwd"), 0o644))
	_, err := ResolveUser(fifo, "root")
	require.Error(t, err, "a fifo is not waited for")

	huge := imageRoot(t, map[string]string{"etc/passwd": ""})
	require.NoError(t, os.Truncate(filepath.Join(huge, "etc/passwd"), 2<<30))
	_, err = ResolveUser(huge, "root")
	require.ErrorContains(t, err, "larger than")
}

func TestNeedsSetuid(t *testing.T) {
	root := imageRoot(t, map[string]string{"usr/bin/su": "", "etc/x": ""})
	require.False(t, NeedsSetuid(root))
	require.NoError(t, os.Symlink("usr/bin", filepath.Join(root, "bin")))
	require.NoError(t, os.Chmod(filepath.Join(root, "usr/bin/su"), 0o4755|os.ModeSetuid))
	require.True(t, NeedsSetuid(root))
}

func TestEtcFiles(t *testing.T) {
	s := validStep()
	s.ExtraHosts = []HostEntry{{Name: "db", IP: netip.MustParseAddr("10.1.2.3")}}
	files, err := WriteEtcFiles(t.TempDir(), s, []netip.Addr{netip.MustParseAddr("10.0.0.53")})
	require.NoError(t, err)
	hosts, err := os.ReadFile(files["/etc/hosts"])
	require.NoError(t, err)
	require.Contains(t, string(hosts), "10.1.2.3\tdb\n")
	resolv, err := os.ReadFile(files["/etc/resolv.conf"])
	require.NoError(t, err)
	require.Equal(t, "nameserver 10.0.0.53\n", string(resolv))
	s.ExtraHosts[0].Name = "x\n1.2.3.4 evil"
	_, err = WriteEtcFiles(t.TempDir(), s, nil)
	require.ErrorContains(t, err, "not a host name")
}

func TestStubsRemoveOnlyWhatTheRuntimeMade(t *testing.T) {
	lower := imageRoot(t, map[string]string{"have/file": "x"})
	upper := t.TempDir()
	root := Tree{Lower: []string{lower}, Upper: upper, Work: t.TempDir()}
	stubs := RecordStubs(root, []string{"/have/new/deep", "/used", "/have/file"})
	for _, dir := range []string{"have/new/deep", "used", "proc", "etc"} {
		require.NoError(t, os.MkdirAll(filepath.Join(upper, dir), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(upper, "etc/hosts"), nil, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(upper, "used/by-the-step"), []byte("x"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(upper, "have/kept"), []byte("x"), 0o644))
	require.NoError(t, stubs.Remove())
	require.NoDirExists(t, filepath.Join(upper, "have/new"))
	require.NoDirExists(t, filepath.Join(upper, "proc"))
	require.NoDirExists(t, filepath.Join(upper, "etc"))
	require.FileExists(t, filepath.Join(upper, "used/by-the-step"))
	require.FileExists(t, filepath.Join(upper, "have/kept"))
}

// TestStubsFollowNoSwappedSymlink puts a symlink to the node where a mount point
// was, as a step could before it ends.
func TestStubsFollowNoSwappedSymlink(t *testing.T) {
	node := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(node, "empty"), 0o755))
	upper := t.TempDir()
	stubs := RecordStubs(Tree{Lower: []string{t.TempDir()}, Upper: upper, Work: t.TempDir()}, []string{"/a/empty"})
	require.NoError(t, os.Symlink(node, filepath.Join(upper, "a")))
	_ = stubs.Remove()
	require.DirExists(t, filepath.Join(node, "empty"))
}

// FuzzResolveUser looks for input that makes the lookup panic or give an ID that
// a step does not have.
func FuzzResolveUser(f *testing.F) {
	f.Add("app:extra", "app:x:1:2::/:/bin/sh\n", "extra:x:3:app\n")
	f.Add("", "", "")
	f.Add("0:0", ":::::\n", ":::\n")
	f.Fuzz(func(t *testing.T, name, passwd, group string) {
		if strings.ContainsRune(name, 0) {
			return
		}
		root := t.TempDir()
		require.NoError(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(root, "etc/group"), []byte(group), 0o644))
		ids, err := ResolveUser(root, name)
		if err == nil && (ids.UID > maxUnixID || ids.GID > maxUnixID) {
			t.Fatalf("%q gives %v", name, ids)
		}
	})
}
