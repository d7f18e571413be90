package cluster

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/moby/patternmatcher/ignorefile"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

// Archive is a directory as one compressed tar file, ready to be uploaded.
type Archive struct {
	// File is positioned anywhere; it has no name on disk.
	File *os.File
	// Digest is that of File, as "sha256:<hex>".
	Digest string
	// Size is File's, in bytes.
	Size int64
}

// Close releases the file.
func (a *Archive) Close() error { return a.File.Close() }

// Pack makes an archive of a directory, without what .dockerignore leaves out, but
// with the Dockerfile. Owners are root, as for any build context.
func Pack(ctx context.Context, dir, dockerfile string) (_ *Archive, err error) {
	root, err := fsutil.NewFS(dir)
	if err != nil {
		return nil, fmt.Errorf("read build context: %w", err)
	}
	excludes, err := ignored(dir, dockerfile)
	if err != nil {
		return nil, err
	}
	files, err := fsutil.NewFilterFS(root, &fsutil.FilterOpt{
		ExcludePatterns: excludes,
		Map: func(_ string, st *types.Stat) fsutil.MapResult {
			st.Uid, st.Gid = 0, 0
			return fsutil.MapResultKeep
		},
	})
	if err != nil {
		return nil, fmt.Errorf("read .dockerignore: %w", err)
	}
	f, err := os.CreateTemp("", "kiln-context-")
	if err != nil {
		return nil, fmt.Errorf("make archive: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	// From here on only the descriptor keeps it.
	if err := os.Remove(f.Name()); err != nil {
		return nil, fmt.Errorf("make archive: %w", err)
	}
	digest, counter := sha256.New(), &count{}
	zip, err := gzip.NewWriterLevel(io.MultiWriter(f, digest, counter), gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := fsutil.WriteTar(ctx, files, zip); err != nil {
		return nil, fmt.Errorf("pack %s: %w", dir, err)
	}
	if err := zip.Close(); err != nil {
		return nil, fmt.Errorf("pack %s: %w", dir, err)
	}
	return &Archive{File: f, Digest: "sha256:" + hex.EncodeToString(digest.Sum(nil)), Size: counter.n}, nil
}

// ignored returns the patterns of what is left out: those of the Dockerfile's own
// ignore file, else those of .dockerignore.
func ignored(dir, dockerfile string) ([]string, error) {
	if dockerfile == "" {
		dockerfile = "Dockerfile"
	}
	for _, name := range []string{dockerfile + ".dockerignore", ".dockerignore"} {
		f, err := os.Open(filepath.Join(dir, filepath.FromSlash(name)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		patterns, err := ignorefile.ReadAll(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		keep := []string{dockerfile, dockerfile + ".dockerignore", ".dockerignore"}
		for _, k := range keep {
			patterns = append(patterns, "!"+strings.TrimPrefix(path.Clean("/"+k), "/"))
		}
		return patterns, nil
	}
	return nil, nil
}

type count struct{ n int64 }

func (c *count) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
