package gvisor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
)

// The first container of every sandbox holds nothing of any step; its root is an
// EROFS image with one empty directory, which needs no process to serve it.

const (
	erofsMagic      = 0xe0f5e1e2
	erofsBlockBits  = 12
	erofsSuperBlock = 1024
	// erofsRoot is where the root's inode is, after the superblock of 128 bytes.
	erofsRoot     = erofsSuperBlock + 128
	erofsSlot     = 32
	erofsInline   = 2 << 1
	erofsDirEntry = 2 // the file type of a directory
)

// emptyImage returns the image.
func emptyImage() []byte {
	const nid = erofsRoot / erofsSlot
	entries := new(bytes.Buffer)
	le := func(values ...any) {
		for _, v := range values {
			_ = binary.Write(entries, binary.LittleEndian, v) // a buffer takes all
		}
	}
	le(uint64(nid), uint16(24), uint8(erofsDirEntry), uint8(0)) // "."
	le(uint64(nid), uint16(25), uint8(erofsDirEntry), uint8(0)) // ".."
	entries.WriteString("...")

	img := make([]byte, 1<<erofsBlockBits)
	sb := img[erofsSuperBlock:]
	binary.LittleEndian.PutUint32(sb, erofsMagic)
	sb[12] = erofsBlockBits
	binary.LittleEndian.PutUint16(sb[14:], nid)
	binary.LittleEndian.PutUint64(sb[16:], 1) // inodes
	binary.LittleEndian.PutUint32(sb[36:], 1) // blocks
	root := img[erofsRoot:]
	binary.LittleEndian.PutUint16(root, erofsInline)
	binary.LittleEndian.PutUint16(root[4:], 0o40555)
	binary.LittleEndian.PutUint16(root[6:], 2) // links
	binary.LittleEndian.PutUint32(root[8:], uint32(entries.Len()))
	copy(root[erofsSlot:], entries.Bytes())
	return img
}

// writeImage writes the image below dir and returns its path.
func writeImage(dir string) (string, error) {
	name := filepath.Join(dir, "empty.erofs")
	if err := os.RemoveAll(name); err != nil {
		return "", fmt.Errorf("write the root of sandboxes: %w", err)
	}
	if err := os.WriteFile(name, emptyImage(), 0o444); err != nil {
		return "", fmt.Errorf("write the root of sandboxes: %w", err)
	}
	return name, nil
}
