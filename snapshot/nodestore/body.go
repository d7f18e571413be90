package nodestore

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// readAhead is how much is asked of the runtime at a time, in bytes. Each request
// is a call to another process.
const readAhead = 1 << 20

// body is the bytes of a lent blob, verified while they are read. Closing it
// releases the hold.
type body struct {
	reader   io.Reader
	verifier digest.Verifier
	blob     digest.Digest
	corrupt  func()
	// broken is told why the runtime gave no more, and returns what the reader is told.
	broken func(error) error
	close  func() error
}

func newBody(reader content.ReaderAt, blob digest.Digest, size int64, release func() error, corrupt func(), broken func(error) error) *body {
	return &body{
		broken:   broken,
		reader:   bufio.NewReaderSize(io.NewSectionReader(reader, 0, size), readAhead),
		verifier: blob.Verifier(),
		blob:     blob,
		corrupt:  corrupt,
		close:    sync.OnceValue(func() error { return errors.Join(reader.Close(), release()) }),
	}
}

// Read implements io.Reader. At the end it fails when the bytes were not those of
// the blob.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.reader.Read(p)
	_, _ = b.verifier.Write(p[:n]) // a hash takes everything
	if err == io.EOF && !b.verifier.Verified() {
		b.corrupt()
		return n, fmt.Errorf("read blob %s from the node's runtime: its bytes are wrong there; a further try fetches it from the registry: %w", b.blob, errdefs.ErrDataLoss)
	}
	if err != nil && err != io.EOF {
		err = b.broken(fmt.Errorf("read blob %s from the node's runtime: %w", b.blob, err))
	}
	return n, err
}

// Close implements io.Closer.
func (b *body) Close() error { return b.close() }
