package cluster

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// entries returns what is in an archive.
func entries(t *testing.T, a *Archive) map[string]*tar.Header {
	t.Helper()
	_, err := a.File.Seek(0, io.SeekStart)
	require.NoError(t, err)
	digest := sha256.New()
	n, err := io.Copy(digest, a.File)
	require.NoError(t, err)
	require.Equal(t, a.Size, n)
	require.Equal(t, a.Digest, "sha256:"+hex.EncodeToString(digest.Sum(nil)))
	_, err = a.File.Seek(0, io.SeekStart)
	require.NoError(t, err)
	zip, err := gzip.NewReader(a.File)
	require.NoError(t, err)
	out := map[string]*tar.Header{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(t, err)
		out[h.Name] = h
	}
}

func TestPackTakesWhatABuildContextIs(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(content), mode))
	}
	write("Dockerfile", "FROM scratch\n", 0o644)
	write("run", "#!/bin/sh\n", 0o755)
	write("secret/key", "k", 0o600)
	write("src/a.o", "", 0o644)
	write("src/a.c", "", 0o644)
	write(".dockerignore", "secret\n**/*.o\nDockerfile\n", 0o644)
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	require.NoError(t, os.Chown(filepath.Join(dir, "run"), 1234, 1234))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	require.NoError(t, err)
	defer l.Close()

	a, err := Pack(context.Background(), dir, "")
	require.NoError(t, err)
	defer a.Close()
	got := entries(t, a)
	for _, name := range []string{"Dockerfile", ".dockerignore", "run", "src/", "src/a.c", "link", "fifo", "socket"} {
		require.Contains(t, got, name)
	}
	for _, name := range []string{"secret/", "secret/key", "src/a.o"} {
		require.NotContains(t, got, name)
	}
	require.Equal(t, 0, got["run"].Uid, "files of a context are root's")
	require.EqualValues(t, 0o755, got["run"].Mode&0o777)
	require.EqualValues(t, tar.TypeReg, got["socket"].Typeflag, "as kiln build sends a socket")
	require.Equal(t, "/etc/passwd", got["link"].Linkname, "a link is kept, not followed")
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "kiln-context-*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestPackUsesTheDockerfilesOwnIgnoreFile(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"my.Dockerfile": "", "my.Dockerfile.dockerignore": "b", ".dockerignore": "a", "a": "", "b": ""} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
	a, err := Pack(context.Background(), dir, "my.Dockerfile")
	require.NoError(t, err)
	defer a.Close()
	got := entries(t, a)
	require.Contains(t, got, "a")
	require.NotContains(t, got, "b")
	require.Contains(t, got, "my.Dockerfile")
}

func TestPackRefuses(t *testing.T) {
	_, err := Pack(context.Background(), filepath.Join(t.TempDir(), "missing"), "")
	require.ErrorContains(t, err, "missing")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, ".dockerignore"), []byte("[a\n"), 0o644))
	_, err = Pack(context.Background(), dir, "")
	require.ErrorContains(t, err, ".dockerignore")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir = t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), nil, 0o644))
	_, err = Pack(ctx, dir, "")
	require.ErrorIs(t, err, context.Canceled)
}
