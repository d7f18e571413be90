// Copyright The kiln Authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

package tmpfs

// This file is kiln's addition to the package: it writes a file system as a tar
// stream that holds all of it, where TarUpperLayer leaves out or rounds what tar
// has no place for.
//
// The stream is PAX with records of its own:
//
//	KILN.xattr.NAME  value of an extended attribute, after a colon, both in base64
//	KILN.size        size of a file of which only some parts follow
//	KILN.parts       those parts, as OFFSET+LENGTH separated by commas
//	KILN.socket      the entry, a fifo, stands for a socket
import (
	"archive/tar"
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"
)

// StepLayer writes a tmpfs to w. Nothing may change it meanwhile.
func StepLayer(ctx context.Context, vfsfs *vfs.Filesystem, w io.Writer) error {
	fs, ok := vfsfs.Impl().(*filesystem)
	if !ok {
		return errors.New("the upper layer is not a tmpfs")
	}
	buffer := bufio.NewWriterSize(w, 256<<10)
	l := &layerWriter{ctx: ctx, tar: tar.NewWriter(buffer), names: map[*inode]string{}, buf: make([]byte, 256<<10)}
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	if err := l.tree(fs.root, "."); err != nil {
		return err
	}
	if err := l.tar.Close(); err != nil {
		return err
	}
	return buffer.Flush()
}

type layerWriter struct {
	ctx context.Context
	tar *tar.Writer
	// names are the first names of inodes that have more than one.
	names map[*inode]string
	buf   []byte
}

// tree writes d, whose name is given, and everything below it.
func (l *layerWriter) tree(d *dentry, name string) error {
	if err := l.entry(d.inode, name); err != nil {
		return fmt.Errorf("write %.256q: %w", name, err)
	}
	dir, ok := d.inode.impl.(*directory)
	if !ok {
		return nil
	}
	for _, child := range slices.Sorted(maps.Keys(dir.childMap)) {
		if err := l.tree(dir.childMap[child], name+"/"+child); err != nil {
			return err
		}
	}
	return nil
}

func (l *layerWriter) entry(i *inode, name string) error {
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, ModTime: time.Unix(0, i.mtime.Load()),
		Mode: int64(i.mode.Load() &^ linux.S_IFMT), Uid: int(i.uid.Load()), Gid: int(i.gid.Load()),
		PAXRecords: map[string]string{},
	}
	if first, ok := l.names[i]; ok {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return l.tar.WriteHeader(h)
	}
	if _, dir := i.impl.(*directory); !dir && i.nlink.Load() > 1 {
		l.names[i] = name
	}
	for attr, value := range i.xattrs.RawXattrs() {
		addXattr(h, attr, value)
	}
	// The owners in access lists are those of the root user namespace.
	ids := auth.NewRootUserNamespace()
	if acl := i.accessACL.Load(); acl != nil {
		addXattr(h, linux.XATTR_NAME_POSIX_ACL_ACCESS, string(acl.Serialize(ids)))
	}
	if acl := i.defaultACL.Load(); acl != nil {
		addXattr(h, linux.XATTR_NAME_POSIX_ACL_DEFAULT, string(acl.Serialize(ids)))
	}
	switch impl := i.impl.(type) {
	case *directory:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case *symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, impl.target
	case *namedPipe:
		h.Typeflag = tar.TypeFifo
	case *socketFile:
		h.Typeflag = tar.TypeFifo
		h.PAXRecords["KILN.socket"] = "1"
	case *deviceFile:
		h.Typeflag = tar.TypeChar
		if impl.kind == vfs.BlockDevice {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(impl.major), int64(impl.minor)
	case *regularFile:
		return l.file(impl, h)
	default:
		return fmt.Errorf("unknown kind of file %T", impl)
	}
	return l.tar.WriteHeader(h)
}

func addXattr(h *tar.Header, name, value string) {
	h.PAXRecords["KILN.xattr."+base64.RawURLEncoding.EncodeToString([]byte(name))] = ":" + base64.RawURLEncoding.EncodeToString([]byte(value))
}

// part is a range of a file that may hold other bytes than zeros.
type part struct{ start, end uint64 }

func (l *layerWriter) file(f *regularFile, h *tar.Header) error {
	size := f.size.Load()
	parts := partsOf(f, size)
	h.Typeflag = tar.TypeReg
	if len(parts) == 1 && parts[0] == (part{0, size}) || size == 0 {
		h.Size = int64(size)
	} else {
		list := make([]string, len(parts))
		for i, p := range parts {
			h.Size += int64(p.end - p.start)
			list[i] = strconv.FormatUint(p.start, 10) + "+" + strconv.FormatUint(p.end-p.start, 10)
		}
		h.PAXRecords["KILN.size"] = strconv.FormatUint(size, 10)
		if len(list) > 0 {
			h.PAXRecords["KILN.parts"] = strings.Join(list, ",")
		}
	}
	if err := l.tar.WriteHeader(h); err != nil {
		return err
	}
	for _, p := range parts {
		for at := p.start; at < p.end; {
			buf := l.buf[:min(uint64(len(l.buf)), p.end-at)]
			rw := getRegularFileReadWriter(f, int64(at), 0)
			n, err := usermem.BytesIOSequence(buf).CopyOutFrom(l.ctx, rw)
			putRegularFileReadWriter(rw)
			if int(n) != len(buf) {
				return fmt.Errorf("read %d bytes at %d: got %d: %v", len(buf), at, n, err)
			}
			if _, err := l.tar.Write(buf); err != nil {
				return err
			}
			at += uint64(n)
		}
	}
	return nil
}

// maxParts bounds the parts of one file, so that their list is never large.
const maxParts = 4096

// partsOf lists the parts of a file in order. Small gaps count as data.
func partsOf(f *regularFile, size uint64) []part {
	f.dataMu.RLock()
	defer f.dataMu.RUnlock()
	for gap := uint64(64 << 10); ; gap *= 4 {
		var parts []part
		for seg := f.data.FirstSegment(); seg.Ok() && seg.Start() < size && len(parts) <= maxParts; seg = seg.NextSegment() {
			p := part{seg.Start(), min(seg.End(), size)}
			if last := len(parts) - 1; last >= 0 && p.start-parts[last].end < gap {
				parts[last].end = p.end
			} else {
				parts = append(parts, p)
			}
		}
		if len(parts) <= maxParts {
			return parts
		}
	}
}
