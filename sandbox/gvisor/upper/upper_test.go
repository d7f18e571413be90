package upper

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var mtime = time.Unix(1600000000, 123456789)

// entry is one entry of a stream, with what it contains.
type entry struct {
	tar.Header
	content string
}

func xattrRecord(name string) string {
	return recordXattr + base64.RawURLEncoding.EncodeToString([]byte(name))
}

func xattrValue(v string) string { return ":" + base64.RawURLEncoding.EncodeToString([]byte(v)) }

func dirEntry(name string, records ...string) entry {
	h := tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: mtime, PAXRecords: map[string]string{}}
	for i := 0; i+1 < len(records); i += 2 {
		h.PAXRecords[xattrRecord(records[i])] = xattrValue(records[i+1])
	}
	return entry{Header: h}
}

func fileEntry(name, content string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: mtime, Size: int64(len(content))}, content}
}

func linkEntry(kind byte, name, target string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: kind, Linkname: target, ModTime: mtime, Mode: 0o777}}
}

func whiteoutEntry(name string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeChar, ModTime: mtime}}
}

func stream(t testing.TB, entries ...entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Format = tar.FormatPAX
		require.NoError(t, w.WriteHeader(&e.Header))
		_, err := w.Write([]byte(e.content))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

type dirs struct{ upper, lower string }

func newDirs(t testing.TB) dirs {
	d := t.TempDir()
	out := dirs{filepath.Join(d, "upper"), filepath.Join(d, "lower")}
	require.NoError(t, os.Mkdir(out.upper, 0o755))
	require.NoError(t, os.Mkdir(out.lower, 0o755))
	return out
}

func (d dirs) apply(t testing.TB, entries ...entry) error {
	_, err := Apply(context.Background(), d.upper, bytes.NewReader(stream(t, entries...)), Options{Lower: []string{d.lower}})
	return err
}

func TestAttributes(t *testing.T) {
	d := newDirs(t)
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 33, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255}
	f := fileEntry("./d/f", "content")
	f.Mode, f.Uid, f.Gid = 0o4755, 33, 44
	f.PAXRecords = map[string]string{}
	for name, value := range map[string]string{
		"user.note": "hello", "user.empty": "", "security.capability": capability,
		"trusted.overlay.redirect": "/etc", "trusted.evil": "x", "security.selinux": "x", "user.overlay.opaque": "y",
		"system.posix_acl_access": string(acl),
	} {
		f.PAXRecords[xattrRecord(name)] = xattrValue(value)
	}
	root := dirEntry("./")
	root.Mode, root.Uid = 0o1777, 5
	require.NoError(t, d.apply(t, root, dirEntry("./d/"), f, linkEntry(tar.TypeLink, "./d/g", "./d/f"), linkEntry(tar.TypeSymlink, "./l", "/etc")))

	var st unix.Stat_t
	require.NoError(t, unix.Stat(d.upper+"/d/f", &st))
	require.EqualValues(t, 0o104755, st.Mode)
	require.EqualValues(t, 33, st.Uid)
	require.EqualValues(t, 44, st.Gid)
	require.EqualValues(t, 2, st.Nlink)
	require.Equal(t, mtime.UnixNano(), st.Mtim.Nano())
	require.Equal(t, []string{"security.capability", "system.posix_acl_access", "user.empty", "user.note"}, xattrs(t, d.upper+"/d/f"))
	buf := make([]byte, 64)
	n, err := unix.Getxattr(d.upper+"/d/f", "security.capability", buf)
	require.NoError(t, err)
	require.Equal(t, capability, string(buf[:n]))
	require.NoError(t, unix.Stat(d.upper, &st))
	require.EqualValues(t, 0o41777, st.Mode)
	require.EqualValues(t, 5, st.Uid)
	for _, p := range []string{"", "/d"} {
		st, err := os.Stat(d.upper + p)
		require.NoError(t, err)
		require.True(t, st.ModTime().Equal(mtime), p)
	}
}

func xattrs(t *testing.T, p string) []string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(p, buf)
	require.NoError(t, err)
	var names []string
	for _, want := range []string{"security.capability", "security.selinux", "system.posix_acl_access", "trusted.evil", "trusted.overlay.opaque", "trusted.overlay.redirect", "user.empty", "user.note", "user.overlay.opaque"} {
		if bytes.Contains(append([]byte{0}, buf[:n]...), []byte("\x00"+want+"\x00")) {
			names = append(names, want)
		}
	}
	return names
}

func TestOpaqueAndWhiteouts(t *testing.T) {
	d := newDirs(t)
	require.NoError(t, os.MkdirAll(d.lower+"/below", 0o755))
	require.NoError(t, os.WriteFile(d.lower+"/file", nil, 0o644))
	require.NoError(t, os.WriteFile(d.upper+"/mine", nil, 0o644))
	require.NoError(t, os.MkdirAll(d.upper+"/full/of/things", 0o755))
	require.NoError(t, d.apply(t, dirEntry("./"),
		dirEntry("./below/", opaqueXattr, "y"), dirEntry("./fresh/", opaqueXattr, "y"), dirEntry("./full/", opaqueXattr, "y"),
		whiteoutEntry("./file"), linkEntry(tar.TypeLink, "./mine", "./file")))
	require.Equal(t, []string{opaqueXattr}, xattrs(t, d.upper+"/below"))
	require.Empty(t, xattrs(t, d.upper+"/fresh"))
	entries, err := os.ReadDir(d.upper + "/full")
	require.NoError(t, err)
	require.Empty(t, entries)
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(d.upper+"/file", &st))
	require.EqualValues(t, unix.S_IFCHR, st.Mode&unix.S_IFMT)
	require.Zero(t, st.Rdev)
	require.ErrorIs(t, unix.Lstat(d.upper+"/mine", &st), unix.ENOENT)
}

// TestHostile checks that no stream reaches what is outside.
func TestHostile(t *testing.T) {
	device := entry{Header: tar.Header{Name: "./null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}}
	block := entry{Header: tar.Header{Name: "./sda", Typeflag: tar.TypeBlock, Devmajor: 8}}
	for name, entries := range map[string][]entry{
		"parent":            {fileEntry("./../outside", "x")},
		"parent inside":     {dirEntry("./a/"), fileEntry("./a/../../outside", "x")},
		"absolute":          {fileEntry("/tmp/kiln-outside", "x")},
		"through symlink":   {linkEntry(tar.TypeSymlink, "./l", ".."), fileEntry("./l/outside", "x")},
		"dir over symlink":  {linkEntry(tar.TypeSymlink, "./l", ".."), dirEntry("./l/"), fileEntry("./l/outside", "x")},
		"hard link outside": {linkEntry(tar.TypeLink, "./h", "../secret")},
		"hard link unknown": {linkEntry(tar.TypeLink, "./h", "./old")},
		"link via symlink":  {linkEntry(tar.TypeSymlink, "./l", ".."), linkEntry(tar.TypeLink, "./h", "./l/secret")},
		"device":            {device},
		"block device":      {block},
		"twice":             {fileEntry("./a", "1"), fileEntry("./a", "2")},
		"no parent":         {fileEntry("./missing/a", "1")},
		"root is a file":    {fileEntry(".", "1")},
		"negative owner":    {entry{Header: tar.Header{Name: "./o", Typeflag: tar.TypeReg, Uid: -1}}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			parent := filepath.Dir(d.upper)
			require.NoError(t, os.WriteFile(parent+"/secret", []byte("s"), 0o600))
			require.NoError(t, os.WriteFile(d.upper+"/old", nil, 0o600))
			require.Error(t, d.apply(t, entries...))
			require.NoFileExists(t, parent+"/outside")
			require.NoFileExists(t, "/tmp/kiln-outside")
			var st unix.Stat_t
			require.NoError(t, unix.Stat(parent+"/secret", &st))
			require.EqualValues(t, 1, st.Nlink)
		})
	}
}

func TestTruncatedAndDeep(t *testing.T) {
	d := newDirs(t)
	data := stream(t, dirEntry("./"), fileEntry("./f", strings.Repeat("x", 4096)))
	_, err := Apply(context.Background(), d.upper, bytes.NewReader(data[:2048]), Options{})
	require.Error(t, err)

	d = newDirs(t)
	entries := []entry{dirEntry("./")}
	name := "."
	for range 60 {
		name += "/" + strings.Repeat("d", 200)
		entries = append(entries, dirEntry(name+"/"))
	}
	entries = append(entries, fileEntry(name+"/f", "deep"))
	require.NoError(t, d.apply(t, entries...))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = Apply(ctx, d.upper, bytes.NewReader(data), Options{})
	require.ErrorIs(t, err, context.Canceled)
}

func TestSparse(t *testing.T) {
	d := newDirs(t)
	content := strings.Repeat("\x00", 4<<20) + "middle" + strings.Repeat("\x00", 4<<20)
	require.NoError(t, d.apply(t, dirEntry("./"), fileEntry("./s", content), fileEntry("./z", strings.Repeat("\x00", 1<<20))))
	data, err := os.ReadFile(d.upper + "/s")
	require.NoError(t, err)
	require.True(t, string(data) == content)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(d.upper+"/s", &st))
	require.Less(t, st.Blocks*512, int64(1<<20))
	require.NoError(t, unix.Stat(d.upper+"/z", &st))
	require.EqualValues(t, 1<<20, st.Size)
}

// partsEntry is a file of which the stream has content only for some parts.
func partsEntry(name, size, parts, content string) entry {
	e := fileEntry(name, content)
	e.PAXRecords = map[string]string{recordSize: size}
	if parts != "" {
		e.PAXRecords[recordParts] = parts
	}
	return e
}

func TestParts(t *testing.T) {
	d := newDirs(t)
	socket := linkEntry(tar.TypeFifo, "./socket", "")
	socket.PAXRecords = map[string]string{recordSocket: "1"}
	require.NoError(t, d.apply(t, dirEntry("./"), partsEntry("./s", "1099511627776", "4096+3,1099511627775+1", "abcz"),
		partsEntry("./hole", "123456", "", ""), socket, linkEntry(tar.TypeFifo, "./fifo", "")))
	f, err := os.Open(d.upper + "/s")
	require.NoError(t, err)
	defer f.Close()
	buf := make([]byte, 4)
	_, err = f.ReadAt(buf, 4096)
	require.NoError(t, err)
	require.Equal(t, "abc\x00", string(buf))
	_, err = f.ReadAt(buf[:1], 1<<40-1)
	require.NoError(t, err)
	require.Equal(t, "z", string(buf[:1]))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(d.upper+"/hole", &st))
	require.EqualValues(t, 123456, st.Size)
	require.Zero(t, st.Blocks)
	require.NoError(t, unix.Lstat(d.upper+"/socket", &st))
	require.EqualValues(t, unix.S_IFSOCK, st.Mode&unix.S_IFMT)
	require.NoError(t, unix.Lstat(d.upper+"/fifo", &st))
	require.EqualValues(t, unix.S_IFIFO, st.Mode&unix.S_IFMT)
}

func TestHostileRecords(t *testing.T) {
	attr := func(key, value string) entry {
		e := fileEntry("./f", "")
		e.PAXRecords = map[string]string{key: value}
		return e
	}
	for name, e := range map[string]entry{
		"negative size":      partsEntry("./f", "-1", "", ""),
		"no size":            partsEntry("./f", "x", "", ""),
		"part beyond size":   partsEntry("./f", "4", "3+2", "ab"),
		"part that wraps":    partsEntry("./f", "9223372036854775807", "9223372036854775807+9223372036854775807", "ab"),
		"overlap":            partsEntry("./f", "10", "0+3,2+3", "abcdef"),
		"wrong order":        partsEntry("./f", "10", "5+1,0+1", "ab"),
		"negative offset":    partsEntry("./f", "10", "-1+1", "a"),
		"empty part":         partsEntry("./f", "10", "0+0", ""),
		"less than follows":  partsEntry("./f", "10", "0+1", "ab"),
		"nothing of content": partsEntry("./f", "10", "", "ab"),
		"attribute name":     attr(recordXattr+"!", ":"),
		"no attribute name":  attr(recordXattr, ":"),
		"NUL in name":        attr(xattrRecord("user.a\x00b"), ":"),
		"attribute value":    attr(xattrRecord("user.a"), "x"),
		"attribute base64":   attr(xattrRecord("user.a"), ":!"),
	} {
		t.Run(name, func(t *testing.T) {
			require.Error(t, newDirs(t).apply(t, dirEntry("./"), e))
		})
	}
}

// FuzzApply feeds streams and checks that the directory beside stays as it was.
func FuzzApply(f *testing.F) {
	f.Add(stream(f, dirEntry("./"), dirEntry("./a/", opaqueXattr, "y"), fileEntry("./a/b", "x"), linkEntry(tar.TypeLink, "./c", "./a/b"), whiteoutEntry("./w")))
	f.Add(stream(f, linkEntry(tar.TypeSymlink, "./l", ".."), fileEntry("./l/outside", "x")))
	f.Add(stream(f, fileEntry("./../outside", "x")))
	f.Add(stream(f, dirEntry("./"), partsEntry("./s", "100000", "4096+3,99999+1", "abcz")))
	f.Add(stream(f, linkEntry(tar.TypeLink, "./h", "../secret")))
	f.Fuzz(func(t *testing.T, data []byte) {
		d := newDirs(t)
		parent := filepath.Dir(d.upper)
		require.NoError(t, os.WriteFile(parent+"/secret", []byte("s"), 0o600))
		_, _ = Apply(context.Background(), d.upper, bytes.NewReader(data), Options{Lower: []string{d.lower}})
		entries, err := os.ReadDir(parent)
		require.NoError(t, err)
		require.Len(t, entries, 3)
		var st unix.Stat_t
		require.NoError(t, unix.Stat(parent+"/secret", &st))
		require.EqualValues(t, 1, st.Nlink)
		require.NoError(t, unix.Stat(d.lower, &st))
		require.EqualValues(t, 0o40755, st.Mode)
	})
}
