package record

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var (
	bucketBuilds = []byte("builds")  // tenant/id → agentv1.Build
	bucketByTime = []byte("by_time") // nanoseconds of creation, tenant/id → nothing
	bucketScopes = []byte("scopes")  // tenant/scope → time and bytes
)

const (
	// lockWait is how long to wait for another process to close the index.
	lockWait = 2 * time.Second
	// growth is by how much the index file grows, in bytes. It is less than the
	// reserve, so that a result fits on a full disk.
	growth = 1 << 20
)

func openDB(name string) (*bolt.DB, error) {
	db, err := bolt.Open(name, 0o600, &bolt.Options{Timeout: lockWait, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("open index of builds %s: %w (when it is damaged, move it away: builds are then forgotten, caches stay)", name, err)
	}
	db.AllocSize = growth
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketBuilds, bucketByTime, bucketScopes} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare index of builds: %w", err), db.Close())
	}
	return db, nil
}

func (k Key) bytes() []byte { return []byte(k.Tenant + "/" + k.ID) }

func parseKey(b []byte) (Key, error) {
	tenant, id, _ := strings.Cut(string(b), "/")
	k := Key{tenant, id}
	return k, k.Validate()
}

func timeKey(b *agentv1.Build) []byte {
	t := binary.BigEndian.AppendUint64(nil, uint64(b.GetCreatedAt().AsTime().UnixNano()))
	return append(t, keyOf(b).bytes()...)
}

// put stores b in the index.
func (s *Store) put(b *agentv1.Build) error {
	data, err := proto.Marshal(b)
	if err != nil {
		return fmt.Errorf("encode build: %w", err)
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketByTime).Put(timeKey(b), nil); err != nil {
			return err
		}
		return tx.Bucket(bucketBuilds).Put(keyOf(b).bytes(), data)
	})
}

// load reads a build from the index.
func (s *Store) load(key Key) (b *agentv1.Build, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		b, err = decodeBuild(tx.Bucket(bucketBuilds).Get(key.bytes()))
		return err
	})
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		err = ErrClosed
	}
	return b, err
}

func decodeBuild(data []byte) (*agentv1.Build, error) {
	if data == nil {
		return nil, ErrNotFound
	}
	b := &agentv1.Build{}
	if err := proto.Unmarshal(data, b); err != nil {
		return nil, fmt.Errorf("decode build: %w", err)
	}
	return b, nil
}

// Query selects builds.
type Query struct {
	// Tenant is whose builds; empty: everyone's.
	Tenant string
	// States and Labels must match; empty ones match all.
	States []agentv1.BuildState
	Labels map[string]string
	// PageSize is how many at most; PageBytes is how large the page may be, in
	// bytes, when it has more than one build. Both are above 0.
	PageSize, PageBytes int
	// PageToken is what the page before returned; empty: the first page.
	PageToken string
}

func (q Query) matches(b *agentv1.Build) bool {
	if len(q.States) > 0 && !slices.Contains(q.States, b.GetState()) {
		return false
	}
	labels := b.GetSpec().GetLabels()
	for k, v := range q.Labels {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// List returns a page of builds, the youngest first, and the token of the next
// page, which is empty after the last. The error is ErrPageToken for a token that
// is none.
func (s *Store) List(q Query) (page []*agentv1.Build, next string, err error) {
	before, err := base64.RawURLEncoding.DecodeString(q.PageToken)
	if err != nil || len(before) > 0 && len(before) < 8 || len(before) > 8+2*64 {
		return nil, "", ErrPageToken
	}
	// Not in the transaction: a writer may wait for the index.
	live := s.live(q.Tenant)
	err = s.db.View(func(tx *bolt.Tx) error {
		builds, size := tx.Bucket(bucketBuilds), 0
		c := tx.Bucket(bucketByTime).Cursor()
		var last []byte
		for k := seekBefore(c, before); k != nil; k, _ = c.Prev() {
			b, err := s.listed(builds, live, q, k[8:])
			if err != nil {
				return err
			}
			if b == nil {
				continue
			}
			size += proto.Size(b)
			if len(page) == q.PageSize || len(page) > 0 && size > q.PageBytes {
				next = base64.RawURLEncoding.EncodeToString(last)
				return nil
			}
			page = append(page, b)
			last = slices.Clone(k)
		}
		return nil
	})
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		err = ErrClosed
	}
	return page, next, err
}

// seekBefore moves c to the last key before the given one, or to the last of all.
func seekBefore(c *bolt.Cursor, before []byte) []byte {
	if len(before) == 0 {
		k, _ := c.Last()
		return k
	}
	if k, _ := c.Seek(before); k == nil {
		k, _ = c.Last()
		return k
	}
	k, _ := c.Prev()
	return k
}

// listed returns the build of key, or nil when q does not select it.
func (s *Store) listed(builds *bolt.Bucket, live map[Key]*agentv1.Build, q Query, name []byte) (*agentv1.Build, error) {
	if q.Tenant != "" && !strings.HasPrefix(string(name), q.Tenant+"/") {
		return nil, nil
	}
	key, err := parseKey(name)
	if err != nil {
		return nil, err
	}
	b := live[key]
	if b == nil {
		if b, err = decodeBuild(builds.Get(name)); err != nil {
			return nil, fmt.Errorf("list build %s: %w", name, err)
		}
	}
	if !q.matches(b) {
		return nil, nil
	}
	return b, nil
}

// live returns the builds that have not ended, of a tenant or of all.
func (s *Store) live(tenant string) map[Key]*agentv1.Build {
	s.mu.Lock()
	var writers []*Writer
	for k, e := range s.index {
		if e.writer != nil && (tenant == "" || k.Tenant == tenant) {
			writers = append(writers, e.writer)
		}
	}
	s.mu.Unlock()
	live := make(map[Key]*agentv1.Build, len(writers))
	for _, w := range writers {
		live[w.key] = w.Build()
	}
	return live
}
