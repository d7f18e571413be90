package upload

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Limits bounds what is kept. Zero fields mean DefaultLimits'.
type Limits struct {
	// Bytes is the most of one archive.
	Bytes int64
	// TenantBytes and TenantCount bound the archives of one tenant, those that still
	// arrive included.
	TenantBytes int64
	TenantCount int
	// Age is how long an archive is kept that no build names, how long one may take to
	// arrive at once, and how long parts are kept when no other comes.
	Age time.Duration
	// MinFree is how many bytes of the disk stay free.
	MinFree int64
}

// DefaultLimits is what a configuration that says nothing gets.
var DefaultLimits = Limits{Bytes: 2 << 30, TenantBytes: 8 << 30, TenantCount: 64, Age: time.Hour, MinFree: 1 << 30}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits
	l.Bytes, l.TenantBytes, l.TenantCount = cmp.Or(l.Bytes, d.Bytes), cmp.Or(l.TenantBytes, d.TenantBytes), cmp.Or(l.TenantCount, d.TenantCount)
	l.Age, l.MinFree = cmp.Or(l.Age, d.Age), cmp.Or(l.MinFree, d.MinFree)
	return l
}

// ErrNotFound says that the tenant has no such archive.
var ErrNotFound = errors.New("no such upload; it may have expired, or belong to a build that has ended: upload it again")

// MismatchError says that what arrived is not what was announced.
type MismatchError struct{ Message string }

func (e *MismatchError) Error() string { return e.Message }

// LimitError says that an archive is not taken.
type LimitError struct {
	// Rule is the limit: "upload-size", "upload-quota", "upload-count" or
	// "disk-free".
	Rule string
	// Message says it for people.
	Message string
}

func (e *LimitError) Error() string { return e.Message }

// key names an archive.
type key struct {
	tenant string
	digest digest.Digest
}

// archive is one that has arrived.
type archive struct {
	size    int64
	expires time.Time
	holds   int  // builds that need it
	spent   bool // a build that named it has ended
}

// usage is what a tenant has, with what still arrives.
type usage struct {
	bytes int64
	count int
}

// Store keeps archives. Its methods may be called concurrently.
type Store struct {
	dir      string
	root     *os.Root
	limits   Limits
	now      func() time.Time
	freeDisk func() (int64, error)

	mu       sync.Mutex
	archives map[key]*archive     // guarded by mu
	partials map[partKey]*partial // guarded by mu
	used     map[string]*usage    // guarded by mu; by tenant
	arriving int64                // guarded by mu; bytes that may still be written
	serial   uint64               // guarded by mu; of temporary files
}

// Open returns an empty store in dir, which it makes, or clears. freeDisk tells
// the free bytes of the disk; nil: it is not looked at. now may be nil.
func Open(dir string, limits Limits, freeDisk func() (int64, error), now func() time.Time) (*Store, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("clear directory of uploads: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of uploads: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of uploads: %w", err)
	}
	if now == nil {
		now = time.Now
	}
	return &Store{
		dir: dir, root: root, limits: limits.withDefaults(), now: now, freeDisk: freeDisk,
		archives: map[key]*archive{}, partials: map[partKey]*partial{}, used: map[string]*usage{},
	}, nil
}

// Close releases the directory. What arrives fails, and parts are gone.
func (s *Store) Close() error {
	for _, p := range s.parts(func(partKey) bool { return true }) {
		p.drop()
	}
	return s.root.Close()
}

// Limits returns the limits, with defaults filled in.
func (s *Store) Limits() Limits { return s.limits }

// file is the name of an archive's file. Tenants have no dot in their names.
func (k key) file() string { return k.tenant + "." + k.digest.Encoded() }

// Has tells whether a tenant has an archive. It keeps nothing.
func (s *Store) Has(tenant string, d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.archives[key{tenant, d}]
	return a != nil && (a.holds > 0 || s.now().Before(a.expires))
}

// Hold is what keeps an archive for a build.
type Hold struct {
	// Path is the file.
	Path string

	store   *Store
	key     key
	archive *archive
	once    sync.Once
}

// Hold keeps an archive for a build, which ends it with Done or Return. The error
// is ErrNotFound.
func (s *Store) Hold(tenant string, d digest.Digest) (*Hold, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := key{tenant, d}
	a := s.archives[k]
	if a == nil || a.holds == 0 && !s.now().Before(a.expires) {
		return nil, ErrNotFound
	}
	a.holds++
	return &Hold{Path: filepath.Join(s.dir, k.file()), store: s, key: k, archive: a}, nil
}

// Done says that the build has ended. The archive is removed unless another build
// holds it too. Only the first call of Done or Return counts.
func (h *Hold) Done() { h.end(true) }

// Return says that there is no build after all. The archive stays as long as it
// would have.
func (h *Hold) Return() { h.end(false) }

func (h *Hold) end(spent bool) {
	h.once.Do(func() {
		s := h.store
		s.mu.Lock()
		defer s.mu.Unlock()
		h.archive.holds--
		h.archive.spent = h.archive.spent || spent
		if h.archive.holds == 0 && (h.archive.spent || !s.now().Before(h.archive.expires)) {
			s.remove(h.key)
		}
	})
}

// remove forgets an archive. The caller holds mu. A file that cannot be removed
// now is removed by the next Open.
func (s *Store) remove(k key) {
	a := s.archives[k]
	if a == nil {
		return
	}
	delete(s.archives, k)
	s.giveBack(k.tenant, a.size)
	_ = s.root.Remove(k.file())
}

func (s *Store) giveBack(tenant string, size int64) {
	u := s.used[tenant]
	u.bytes -= size
	u.count--
	if u.count == 0 {
		delete(s.used, tenant)
	}
}

// Sweep removes archives that no build has named in time, and parts that no other has
// followed. It is for a timer.
func (s *Store) Sweep() {
	for _, p := range s.parts(func(partKey) bool { return true }) {
		p.dropIfIdle()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	for k, a := range s.archives {
		if a.holds == 0 && !now.Before(a.expires) {
			s.remove(k)
		}
	}
}
