package record

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// Limits bounds what is kept. Zero fields mean DefaultLimits'.
type Limits struct {
	// Builds and BuildsPerTenant are numbers of builds.
	Builds, BuildsPerTenant int
	// Age is how long a build is kept after it ended.
	Age time.Duration
	// LogBytes bounds the output of one build.
	LogBytes int64
	// Bytes bounds all records and events together, with LogBytes for each build
	// that runs. It is at least twice LogBytes. One tenant's ended builds have half of
	// it.
	Bytes int64
}

// DefaultLimits is what is kept when a configuration says nothing.
var DefaultLimits = Limits{Builds: 2000, BuildsPerTenant: 500, Age: 7 * 24 * time.Hour, LogBytes: 16 << 20, Bytes: 2 << 30}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits
	l.Builds, l.BuildsPerTenant = cmp.Or(l.Builds, d.Builds), cmp.Or(l.BuildsPerTenant, d.BuildsPerTenant)
	l.Age, l.LogBytes = cmp.Or(l.Age, d.Age), cmp.Or(l.LogBytes, d.LogBytes)
	l.Bytes = max(cmp.Or(l.Bytes, d.Bytes), 2*l.LogBytes)
	return l
}

// Options says how to keep records. Zero fields have defaults.
type Options struct {
	Limits Limits
	// Now tells the time; nil: time.Now.
	Now func() time.Time
	// Logger gets what cannot be returned; nil: slog.Default().
	Logger *slog.Logger
}

// Key names a build. Both parts are RFC 1123 labels, which makes them safe in file
// names.
type Key struct{ Tenant, ID string }

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Validate tells whether k can name a build.
func (k Key) Validate() error {
	if !label.MatchString(k.Tenant) {
		return fmt.Errorf("tenant %q: want 1 to 63 lower-case letters, digits and '-'", k.Tenant)
	}
	return ValidateID(k.ID)
}

// ValidateID tells whether id can be the ID of a build.
func ValidateID(id string) error {
	if !label.MatchString(id) {
		return fmt.Errorf("build ID %q: want 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends", id)
	}
	return nil
}

func (k Key) file() string { return k.Tenant + "." + k.ID }

func keyOf(b *agentv1.Build) Key { return Key{b.GetTenant(), b.GetBuildId()} }

// Store keeps builds. Its methods may be called concurrently.
type Store struct {
	limits Limits
	now    func() time.Time
	log    *slog.Logger
	db     *bolt.DB
	root   *os.Root // of the directory
	events *os.Root // of the event files
	opened time.Time

	mu     sync.Mutex
	index  map[Key]*entry // guarded by mu; every build
	bytes  int64          // guarded by mu; sum of what ended builds occupy
	closed bool           // guarded by mu
}

// entry is what is in memory of a build.
type entry struct {
	key     Key
	created time.Time
	ended   time.Time // zero until then
	// aged is from when the age of an ended build counts. It is a time of this
	// process's own clock, which does not jump, as that of ended may.
	aged    time.Time
	bytes   int64   // of an ended build: record and events
	reserve int64   // of a build that runs: what its output may take
	writer  *Writer // nil when the build has ended
}

// Open opens the records in dir, which it makes when it is missing, and gives
// builds that had not ended their results. The caller sees to it that no other
// process has them open, and closes the store.
func Open(dir string, opts Options) (_ *Store, err error) {
	s := &Store{limits: opts.Limits.withDefaults(), now: opts.Now, log: opts.Logger, index: map[Key]*entry{}}
	if s.now == nil {
		s.now = time.Now
	}
	s.opened = s.now()
	if s.log == nil {
		s.log = slog.Default()
	}
	if err := os.MkdirAll(filepath.Join(dir, "events"), 0o700); err != nil {
		return nil, fmt.Errorf("make directory of builds: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.root, err = os.OpenRoot(dir); err != nil {
		return nil, fmt.Errorf("open directory of builds: %w", err)
	}
	if s.events, err = s.root.OpenRoot("events"); err != nil {
		return nil, fmt.Errorf("open directory of events: %w", err)
	}
	if s.db, err = openDB(filepath.Join(dir, "builds.db")); err != nil {
		return nil, err
	}
	if err := s.recover(); err != nil {
		return nil, err
	}
	s.holdReserve()
	return s, s.Sweep()
}

// Close closes the store. Builds that have not ended get their result, INTERRUPTED,
// at the next Open; those who wait for their events get ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	var writers []*Writer
	for _, e := range s.index {
		if e.writer != nil {
			writers = append(writers, e.writer)
		}
	}
	s.closed = true
	s.mu.Unlock()
	var errs []error
	for _, w := range writers {
		errs = append(errs, w.events.release(ErrClosed))
	}
	if s.db != nil {
		errs = append(errs, s.db.Close())
	}
	for _, r := range []*os.Root{s.events, s.root} {
		if r != nil {
			errs = append(errs, r.Close())
		}
	}
	return errors.Join(errs...)
}

// Create stores a build that waits in the queue, with its first event, and returns
// its writer. It fills in what the store decides: state and time of creation. The
// error is an *ExistsError when there is a build of that tenant and ID.
func (s *Store) Create(b *agentv1.Build) (*Writer, error) {
	key := keyOf(b)
	if err := key.Validate(); err != nil {
		return nil, err
	}
	b = proto.CloneOf(b)
	now := s.now()
	b.State, b.CreatedAt, b.Events, b.Result = agentv1.BuildState_BUILD_STATE_QUEUED, timestamppb.New(now), 1, nil
	w := &Writer{store: s, key: key, build: b, decided: make(chan struct{})}
	if err := s.claim(w, now); err != nil {
		return nil, err
	}
	defer close(w.decided)
	if err := s.create(w, now); err != nil {
		s.forget(key)
		return nil, fmt.Errorf("store build: %w", err)
	}
	w.ready.Store(true)
	if err := s.Sweep(); err != nil {
		s.log.Warn("cannot remove old builds", "error", err)
	}
	return w, nil
}

// claim takes the key of w for it, or says which build has it.
func (s *Store) claim(w *Writer, now time.Time) error {
	for {
		holder, err := s.tryClaim(w, now)
		if err != nil || holder == nil {
			return err
		}
		if holder.writer != nil {
			<-holder.writer.decided
		}
		there, err := s.Get(w.key)
		if err == nil {
			return &ExistsError{Build: there}
		}
		if !errors.Is(err, ErrNotFound) {
			return err
		}
	}
}

func (s *Store) tryClaim(w *Writer, now time.Time) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if e := s.index[w.key]; e != nil {
		there := *e
		return &there, nil
	}
	s.index[w.key] = &entry{key: w.key, created: now, writer: w}
	return nil, nil
}

func (s *Store) forget(key Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.index, key)
}

func (s *Store) create(w *Writer, now time.Time) (err error) {
	if w.events, err = s.newEventLog(w.key, w.build.GetQueuePosition(), now); err != nil {
		return err
	}
	if err = s.put(w.build); err != nil {
		return errors.Join(err, w.events.release(ErrNotFound), s.removeEvents(w.key))
	}
	return nil
}

// newEventLog makes the event file of a build with its first event.
func (s *Store) newEventLog(key Key, position int32, now time.Time) (*eventLog, error) {
	f, err := s.events.OpenFile(key.file(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make event file: %w", err)
	}
	l := &eventLog{name: key.file(), file: f, size: int64(len(fileMagic)), limit: s.limits.LogBytes}
	if _, err = f.WriteAt([]byte(fileMagic), 0); err == nil {
		_, err = l.append(queuedEvent(position, ""), vital, now, false)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), s.removeEvents(key))
	}
	return l, nil
}

func (s *Store) removeEvents(key Key) error {
	if err := s.events.Remove(key.file()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove event file: %w", err)
	}
	return nil
}

// Get returns a build as it is now, or ErrNotFound. The caller may change it.
func (s *Store) Get(key Key) (*agentv1.Build, error) {
	s.mu.Lock()
	e, ok := s.index[key]
	if !ok {
		s.mu.Unlock()
		return nil, ErrNotFound
	}
	w := e.writer
	s.mu.Unlock()
	switch {
	case w == nil:
	case !w.ready.Load():
		return nil, ErrNotFound
	default:
		return w.Build(), nil
	}
	return s.load(key)
}

// Watch returns a cursor at an event of a build, which may be one that is not
// there yet. The error is ErrNotFound, or a *RangeError when the build has ended
// before that event. The caller closes the cursor.
func (s *Store) Watch(key Key, offset uint64) (*Cursor, error) {
	l, f, err := s.openEvents(key)
	if err != nil {
		return nil, err
	}
	return newCursor(l, f, offset)
}

func (s *Store) openEvents(key Key) (*eventLog, *os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.index[key]
	if !ok || e.writer != nil && !e.writer.ready.Load() {
		return nil, nil, ErrNotFound
	}
	if s.closed {
		return nil, nil, ErrClosed
	}
	f, err := s.events.Open(key.file())
	if err != nil {
		return nil, nil, fmt.Errorf("open events: %w: %v", ErrDamaged, err)
	}
	if e.writer != nil {
		return e.writer.events, f, nil
	}
	b, err := s.load(key)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("look at events: %w", err), f.Close())
	}
	return &eventLog{name: key.file(), size: fi.Size(), events: b.GetEvents(), ended: true}, f, nil
}
