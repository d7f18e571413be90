package upload

import (
	"errors"
	"fmt"
	"hash"
	"os"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
)

// Writer takes one archive. It is for one goroutine. The caller ends it with Commit
// or Abort; Abort after Commit does nothing.
type Writer struct {
	store *Store
	key   key
	size  int64 // announced
	name  string
	file  *os.File
	hash  hash.Hash
	got   int64
	until time.Time
	done  bool
}

// Create begins to take an archive of a tenant. The tenant's name is valid. The
// error is a *LimitError or a *MismatchError, of which the latter says what is
// wrong with digest or size.
func (s *Store) Create(tenant string, d digest.Digest, size int64) (*Writer, error) {
	if err := s.check(d, size); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.create(key{tenant, d}, size)
}

// check tells what is wrong with what is announced.
func (s *Store) check(d digest.Digest, size int64) error {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return &MismatchError{fmt.Sprintf("digest: want sha256:<64 hexadecimal digits>, not %.80q", d.String())}
	}
	if size <= 0 {
		return &MismatchError{"size: want the number of bytes that follow, above 0"}
	}
	if size > s.limits.Bytes {
		return &LimitError{"upload-size", fmt.Sprintf("size: an upload may have %d bytes, this one has %d", s.limits.Bytes, size)}
	}
	return nil
}

// create takes size from the tenant's quota and makes a file. The caller holds mu.
func (s *Store) create(k key, size int64) (*Writer, error) {
	name, err := s.reserve(k.tenant, size)
	if err != nil {
		return nil, err
	}
	f, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		s.unreserve(k.tenant, size)
		return nil, fmt.Errorf("make file of upload: %w", err)
	}
	return &Writer{
		store: s, key: k, size: size, name: name, file: f,
		hash: digest.SHA256.Hash(), until: s.now().Add(s.limits.Age),
	}, nil
}

// reserve takes size from the tenant's quota and returns the name of a temporary
// file. The caller holds mu.
func (s *Store) reserve(tenant string, size int64) (string, error) {
	if s.freeDisk != nil {
		if free, err := s.freeDisk(); err == nil && free-s.arriving-size < s.limits.MinFree {
			return "", &LimitError{"disk-free", fmt.Sprintf("the node's disk has %d bytes free; uploads leave %d", free, s.limits.MinFree)}
		}
	}
	u := s.used[tenant]
	if u == nil {
		u = &usage{}
	}
	if u.bytes+size > s.limits.TenantBytes {
		return "", &LimitError{"upload-quota", fmt.Sprintf("the uploads of tenant %q occupy %d of %d bytes; those that no build names end after %s", tenant, u.bytes, s.limits.TenantBytes, s.limits.Age)}
	}
	if u.count >= s.limits.TenantCount {
		return "", &LimitError{"upload-count", fmt.Sprintf("tenant %q has %d uploads, which is the limit; those that no build names end after %s", tenant, u.count, s.limits.Age)}
	}
	u.bytes += size
	u.count++
	s.used[tenant] = u
	s.arriving += size
	s.serial++
	return "arriving-" + strconv.FormatUint(s.serial, 10), nil
}

// unreserve takes back what reserve did. The caller holds mu.
func (s *Store) unreserve(tenant string, size int64) {
	s.arriving -= size
	s.giveBack(tenant, size)
}

// Digest is what the archive is to have.
func (w *Writer) Digest() digest.Digest { return w.key.digest }

// Write takes the next piece. The error is a *MismatchError when there is more than
// was announced, or it took too long.
func (w *Writer) Write(p []byte) (int, error) {
	if int64(len(p)) > w.size-w.got {
		return 0, &MismatchError{fmt.Sprintf("data: more than the announced %d bytes arrived", w.size)}
	}
	if w.store.now().After(w.until) {
		return 0, &MismatchError{fmt.Sprintf("data: the upload took longer than %s", w.store.limits.Age)}
	}
	n, err := w.file.Write(p)
	w.got += int64(n)
	w.hash.Write(p[:n])
	if err != nil {
		return n, fmt.Errorf("write upload: %w", err)
	}
	return n, nil
}

// Commit keeps the archive under its digest, and tells until when when no build
// names it. The error is a *MismatchError when what arrived is something else.
func (w *Writer) Commit() (expires time.Time, err error) {
	defer func() { err = errors.Join(err, w.Abort()) }()
	if w.got != w.size {
		return time.Time{}, &MismatchError{fmt.Sprintf("data: %d of the announced %d bytes arrived", w.got, w.size)}
	}
	if got := digest.NewDigest(digest.SHA256, w.hash); got != w.key.digest {
		return time.Time{}, &MismatchError{fmt.Sprintf("data: has the digest %s, not the announced %s", got, w.key.digest)}
	}
	if err := w.file.Close(); err != nil {
		return time.Time{}, fmt.Errorf("write upload: %w", err)
	}
	return w.keep()
}

// keep moves the file to its place. When the same archive is there already, that
// one stays, because a build may read it, and has its time renewed.
func (w *Writer) keep() (time.Time, error) {
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.archives[w.key]; a != nil {
		return s.renew(a), nil
	}
	if err := s.root.Rename(w.name, w.key.file()); err != nil {
		return time.Time{}, fmt.Errorf("store upload: %w", err)
	}
	a := &archive{size: w.size}
	s.archives[w.key] = a
	s.arriving -= w.size
	w.done = true
	return s.renew(a), nil
}

// renew keeps an archive for a build that is still to come. The caller holds mu.
func (s *Store) renew(a *archive) (expires time.Time) {
	a.expires, a.spent = s.now().Add(s.limits.Age), false
	return a.expires
}

// Abort gives up what was not committed.
func (w *Writer) Abort() error {
	if w.done {
		return nil
	}
	w.done = true
	_ = w.file.Close() // closed already when Commit failed after it
	err := w.store.root.Remove(w.name)
	w.store.mu.Lock()
	w.store.unreserve(w.key.tenant, w.size)
	w.store.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove upload: %w", err)
	}
	return nil
}
