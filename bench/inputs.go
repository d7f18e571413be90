package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

const (
	manyFiles = 20000
	fileSize  = 11700 // 234 MB in all
	cFiles    = 120
	// smallCFiles are those of a small build.
	smallCFiles = 12
)

// inputs are what builds start from.
type inputs struct {
	busybox, gcc string // OCI layouts
	files        string // directory of many incompressible files; changed by runs
	csource      string // directory of C files and a Makefile
}

// prepareInputs makes what is missing in cache. What runs change is made in tmp, the
// many files only when they are needed.
func prepareInputs(ctx context.Context, cache, tmp string, files bool) (*inputs, error) {
	in := &inputs{
		busybox: filepath.Join(cache, "busybox"), gcc: filepath.Join(cache, "gcc"),
		files: filepath.Join(tmp, "files"), csource: filepath.Join(tmp, "csource"),
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	if err := once(in.busybox, func(dir string) error {
		rootfs := filepath.Join(tmp, "busybox.tar")
		if err := busyboxTar(rootfs); err != nil {
			return err
		}
		return writeLayout(dir, rootfs)
	}); err != nil {
		return nil, err
	}
	if err := once(in.gcc, func(dir string) error {
		rootfs := filepath.Join(tmp, "gcc.tar")
		// Unpacked is enough: nothing here needs a package to be configured.
		if err := command(ctx, nil, "mmdebstrap", "--quiet", "--variant=extract",
			"--include=gcc,libc6-dev,make,dash,coreutils", "bookworm", rootfs); err != nil {
			return err
		}
		return writeLayout(dir, rootfs)
	}); err != nil {
		return nil, err
	}
	if files {
		if err := makeFiles(filepath.Join(in.files, "data")); err != nil {
			return nil, err
		}
	}
	// Clients that run as other users read and lock layouts too.
	for _, dir := range []string{in.busybox, in.gcc} {
		if err := share(dir); err != nil {
			return nil, err
		}
	}
	return in, makeCSource(filepath.Join(in.csource, "src"), cFiles)
}

// share lets every user read a layout, and lock it.
func share(layout string) error {
	lock := filepath.Join(layout, "index.json.lock")
	if err := os.WriteFile(lock, nil, 0o666); err != nil {
		return err
	}
	err := filepath.WalkDir(layout, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if d.IsDir() {
			mode = 0o755
		}
		return os.Chmod(path, mode)
	})
	return errors.Join(err, os.Chmod(lock, 0o666))
}

// once makes a directory completely or not at all.
func once(dir string, build func(dir string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := build(part); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return os.Rename(part, dir)
}

func busyboxTar(path string) error {
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w: install busybox-static", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, h := range []*tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))},
		{Name: "bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777},
	} {
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if h.Size > 0 {
			if _, err := w.Write(program); err != nil {
				return err
			}
		}
	}
	return w.Close()
}

func writeLayout(dir, rootfs string) error {
	layer, err := tarball.LayerFromFile(rootfs)
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", "amd64"
	file.Config = v1.Config{Env: []string{"PATH=/usr/bin:/bin"}, Cmd: []string{"/bin/sh"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img)
}

// random is a seeded stream: every machine measures the same bytes.
func random(seed byte) io.Reader { return rand.NewChaCha8([32]byte{seed}) }

func makeFiles(dir string) error {
	buf := make([]byte, fileSize)
	src := random(1)
	for i := range manyFiles {
		sub := filepath.Join(dir, fmt.Sprintf("%03d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return err
			}
		}
		if _, err := io.ReadFull(src, buf); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("%05d.bin", i)), buf, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func makeCSource(dir string, files int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i := range files {
		text := "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"
		for f := range 12 {
			text += fmt.Sprintf("int f%d_%d(int n, char *s) {\n\tint a = n;\n\tfor (int i = 0; i < n; i++) {\n\t\ta = a * %d + s[i %% (int)(strlen(s) + 1)];\n\t\tif (a %% 7 == 3) a ^= atoi(s);\n\t}\n\tprintf(\"%%d\\n\", a);\n\treturn a;\n}\n", i, f, 31+f)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%03d.c", i)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	makefile := "OBJ := $(patsubst %.c,%.o,$(wildcard *.c))\nlib.a: $(OBJ)\n\tar rcs $@ $^\n%.o: %.c\n\tgcc -O1 -c -o $@ $<\n"
	return os.WriteFile(filepath.Join(dir, "Makefile"), []byte(makefile), 0o644)
}
