package userns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// facts are what a step's root tells about how to run programs in it.
type facts struct {
	setuid  bool // there are setuid programs
	foreign bool // there are programs of another architecture

	// mu guards users, the users that were looked up.
	mu    sync.Mutex
	users map[string]account
}

// account is a user and its home directory.
type account struct {
	ids  sandbox.UserIDs
	home string
}

// user looks up a user in the root at rootfs.
func (f *facts) user(rootfs, name string) (account, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a, ok := f.users[name]; ok {
		return a, nil
	}
	ids, err := sandbox.ResolveUser(rootfs, name)
	if err != nil {
		return account{}, err
	}
	a := account{ids, sandbox.HomeDir(rootfs, ids.UID)}
	if len(f.users) < maxUsers {
		f.users[name] = a
	}
	return a, nil
}

const (
	maxUsers  = 16
	maxChains = 512
)

// factCache keeps the facts of chains of layers, so that not every step of a build
// looks through the same hundreds of programs.
//
// Layers do not change. The facts of a chain are those of the chain below its top
// layer when that layer has nothing in the places that the facts come from.
type factCache struct {
	// mu guards chains.
	mu     sync.Mutex
	chains map[string]*facts
}

func newFactCache() *factCache { return &factCache{chains: map[string]*facts{}} }

// of returns the facts of a root that is mounted at rootfs.
func (c *factCache) of(tree sandbox.Tree, rootfs string) *facts {
	key, rest := "", ""
	if len(tree.Lower) > 0 && (tree.Upper == "" || !touches(tree.Upper)) {
		key, rest = chainKeys(tree.Lower)
	}
	if key == "" {
		return factsOf(rootfs)
	}
	c.mu.Lock()
	f := c.chains[key]
	below := c.chains[rest]
	c.mu.Unlock()
	if f != nil {
		return f
	}
	if f = below; f == nil || touches(tree.Lower[0]) {
		if f = factsOf(rootfs); !ordinary(rootfs) {
			return f
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.chains) >= maxChains {
		clear(c.chains)
	}
	c.chains[key] = f
	return f
}

// factsOf takes the facts from a root.
func factsOf(rootfs string) *facts {
	return &facts{setuid: sandbox.NeedsSetuid(rootfs), foreign: runsForeign(rootfs), users: map[string]account{}}
}

// chainKeys returns what tells a chain of layers from all others, and the same for
// the chain without its top layer. Both are empty when that cannot be told.
func chainKeys(lower []string) (whole, rest string) {
	var b strings.Builder
	top := 0
	for i := range lower {
		dir := lower[len(lower)-1-i]
		var st unix.Stat_t
		if unix.Stat(dir, &st) != nil {
			return "", ""
		}
		top = b.Len()
		fmt.Fprintf(&b, "%d:%d:%d.%d:%s\x00", st.Dev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec, dir)
	}
	return b.String(), b.String()[:top]
}

// factPlaces are where facts come from. A directory stands for all that is in it.
var factPlaces = map[string][]string{
	"":    {"bin", "sbin", "lib", "lib32", "lib64", "libx32"},
	"usr": {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "local"},
	"etc": {"passwd", "group", "alternatives"},
}

// touches reports whether a layer has something in one of factPlaces, or hides it.
func touches(layer string) bool {
	root, err := os.OpenRoot(layer)
	if err != nil {
		return true
	}
	defer root.Close()
	for parent, names := range factPlaces {
		if parent != "" {
			st, err := root.Lstat(parent)
			if os.IsNotExist(err) {
				continue
			}
			if err != nil || !st.IsDir() {
				return true
			}
		}
		dir := filepath.Join(layer, parent)
		if parent != "" && opaque(dir) {
			return true
		}
		for _, name := range names {
			if _, err := root.Lstat(filepath.Join(parent, name)); !os.IsNotExist(err) {
				return true
			}
		}
	}
	return false
}

// opaque reports whether a directory of a layer hides what is below it.
func opaque(dir string) bool {
	for _, attr := range []string{"trusted.overlay.opaque", "user.overlay.opaque"} {
		if _, err := unix.Lgetxattr(dir, attr, make([]byte, 8)); err != unix.ENODATA && err != unix.ENOTSUP {
			return true
		}
	}
	return false
}

// ordinary reports whether no symlink in a root leads from one of factPlaces to
// another place.
func ordinary(rootfs string) bool {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return false
	}
	defer root.Close()
	for parent, names := range factPlaces {
		if st, err := root.Lstat(filepath.Join(".", parent)); err == nil && !st.IsDir() || err != nil && !os.IsNotExist(err) {
			return false
		}
		for _, name := range names {
			st, err := root.Lstat(filepath.Join(parent, name))
			if os.IsNotExist(err) || err == nil && st.Mode()&os.ModeSymlink == 0 {
				continue
			}
			if err != nil {
				return false
			}
			to, err := root.Readlink(filepath.Join(parent, name))
			if err != nil || parent != "" || strings.TrimPrefix(to, "/") != "usr/"+name {
				return false
			}
		}
	}
	return shellInPlace(rootfs)
}

// shellInPlace reports whether the program behind /bin/sh is in one of factPlaces.
func shellInPlace(rootfs string) bool {
	sh, err := pathrs.OpenInRoot(rootfs, "bin/sh")
	if err != nil {
		return os.IsNotExist(err)
	}
	defer sh.Close()
	top, err := os.Open(rootfs)
	if err != nil {
		return false
	}
	defer top.Close()
	at, err := os.Readlink(pathOf(sh))
	root, rerr := os.Readlink(pathOf(top))
	if err != nil || rerr != nil {
		return false
	}
	at = strings.TrimPrefix(at, strings.TrimSuffix(root, "/"))
	for _, dir := range []string{"/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/local/"} {
		if strings.HasPrefix(at, dir) {
			return true
		}
	}
	return false
}
