package nodestore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a node that has blobs of repositories in memory.
type memory struct {
	// blobs has what the node says it has by digest, by repository.
	blobs map[string]map[digest.Digest][]byte
	// down makes every call fail.
	down error
	// ends, if it is not 0, is after how many bytes of a blob reading fails.
	ends int64

	mu            sync.Mutex
	lent, holding int
}

func newMemory() *memory { return &memory{blobs: map[string]map[digest.Digest][]byte{}} }

// add makes data, which may be wrong, the blob of a repository.
func (m *memory) add(repo string, blob digest.Digest, data []byte) {
	if m.blobs[repo] == nil {
		m.blobs[repo] = map[digest.Digest][]byte{}
	}
	m.blobs[repo][blob] = data
}

func (m *memory) Info(context.Context) (Info, error) { return Info{Runtime: "memory"}, m.down }

func (m *memory) Probe(_ context.Context, blobs ...digest.Digest) (map[digest.Digest]int64, error) {
	has := map[digest.Digest]int64{}
	for _, all := range m.blobs {
		for _, blob := range blobs {
			if data, ok := all[blob]; ok {
				has[blob] = int64(len(data))
			}
		}
	}
	return has, m.down
}

func (m *memory) Bytes(_ context.Context, image reference.Named) (size int64, err error) {
	for _, data := range m.blobs[image.Name()] {
		size += int64(len(data))
	}
	return size, m.down
}

func (m *memory) Lend(_ context.Context, image reference.Named) (Hold, error) {
	blobs, ok := m.blobs[image.Name()]
	if !ok {
		return nil, fmt.Errorf("lend %s: %w", image, errdefs.ErrNotFound)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.holding++
	return &memoryHold{node: m, blobs: blobs}, nil
}

func (m *memory) Receive(context.Context, Image) (digest.Digest, error) {
	return "", errdefs.ErrNotImplemented
}

func (m *memory) Close() error { return nil }

// counts returns how many blobs were opened, and how many holds are not released.
func (m *memory) counts() (lent, holding int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lent, m.holding
}

type memoryHold struct {
	node  *memory
	blobs map[digest.Digest][]byte
	once  sync.Once
}

func (h *memoryHold) Info(_ context.Context, blob digest.Digest) (content.Info, error) {
	data, ok := h.blobs[blob]
	if !ok {
		return content.Info{}, errdefs.ErrNotFound
	}
	return content.Info{Digest: blob, Size: int64(len(data))}, nil
}

func (h *memoryHold) ReaderAt(_ context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	data, ok := h.blobs[desc.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	h.node.mu.Lock()
	defer h.node.mu.Unlock()
	h.node.lent++
	return readerAt{bytes.NewReader(data), h.node.ends}, nil
}

func (h *memoryHold) Layers(context.Context, digest.Digest) ([]string, error) {
	return nil, errdefs.ErrNotImplemented
}

func (h *memoryHold) Release(context.Context) error {
	h.once.Do(func() {
		h.node.mu.Lock()
		defer h.node.mu.Unlock()
		h.node.holding--
	})
	return nil
}

type readerAt struct {
	*bytes.Reader
	ends int64
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	if r.ends == 0 || off+int64(len(p)) <= r.ends {
		return r.Reader.ReadAt(p, off)
	}
	n, _ := r.Reader.ReadAt(p[:max(0, min(int64(len(p)), r.ends-off))], off)
	return n, errors.New("connection reset by peer")
}

func (readerAt) Close() error { return nil }

var _ io.ReaderAt = readerAt{}
