package record

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// leastLog is what a build may always write, in bytes, also when all records
// together are at their limit.
const leastLog = 64 << 10

// tenantShare is the part of all bytes, as a divisor, that the ended builds of one
// tenant may occupy, so that none makes the agent forget those of all others.
const tenantShare = 2

// leastAge is how long a build that has ended is kept by every process that finds it,
// however old it is: the clock may have jumped meanwhile, and whoever waits for its
// result needs some time to ask.
const leastAge = time.Hour

// agedAtOpen returns from when the age of a build counts that an earlier process saw
// end. A clock that went back makes it no younger than this process.
func (s *Store) agedAtOpen(ended time.Time) time.Time {
	most := s.limits.Age - min(s.limits.Age, leastAge)
	return s.opened.Add(-min(max(s.opened.Sub(ended), 0), most))
}

// makeRoom removes ended builds until the output of w fits beside what is there,
// and returns how many bytes it may take.
func (s *Store) makeRoom(w *Writer) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index[w.key]; e != nil && e.writer == w {
		e.reserve = s.limits.LogBytes
	}
	err := s.sweep()
	free := s.limits.Bytes - s.bytes - s.reserved() + s.limits.LogBytes
	limit := min(max(free, leastLog), s.limits.LogBytes)
	if e := s.index[w.key]; e != nil && e.writer == w {
		e.reserve = limit
	}
	return limit, err
}

// reserved is what builds that run may still write. The caller holds mu.
func (s *Store) reserved() int64 {
	var n int64
	for _, e := range s.index {
		n += e.reserve
	}
	return n
}

// ended stores that the build of w has ended. The caller holds w.mu.
func (s *Store) ended(w *Writer) error {
	if err := syncDir(s.events); err != nil {
		return err
	}
	if err := s.put(w.build); err != nil {
		return fmt.Errorf("store result: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index[w.key]; e != nil {
		e.writer, e.reserve = nil, 0
		e.ended, e.aged = w.build.GetEndedAt().AsTime(), s.now()
		e.bytes = w.events.extent().size + int64(proto.Size(w.build))
		s.bytes += e.bytes
	}
	return w.events.release(nil)
}

// Sweep removes ended builds until what is kept is within the limits, the oldest
// first. Create calls it; it is also for a timer.
func (s *Store) Sweep() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	return errors.Join(s.sweep(), s.sweepScopes())
}

// sweep is Sweep with mu held.
func (s *Store) sweep() error {
	perTenant, bytesOf := map[string]int{}, map[string]int64{}
	var ended []*entry
	for _, e := range s.index {
		perTenant[e.key.Tenant]++
		bytesOf[e.key.Tenant] += e.bytes
		if e.writer == nil {
			ended = append(ended, e)
		}
	}
	slices.SortFunc(ended, func(a, b *entry) int {
		return cmp.Or(a.aged.Compare(b.aged), a.ended.Compare(b.ended), a.created.Compare(b.created), cmp.Compare(a.key.file(), b.key.file()))
	})
	total, size, now := len(s.index), s.bytes+s.reserved(), s.now()
	var gone []*entry
	for _, e := range ended {
		tenant := e.key.Tenant
		if now.Sub(e.aged) <= s.limits.Age && total <= s.limits.Builds && size <= s.limits.Bytes &&
			perTenant[tenant] <= s.limits.BuildsPerTenant && bytesOf[tenant] <= s.limits.Bytes/tenantShare {
			continue
		}
		gone = append(gone, e)
		perTenant[tenant]--
		bytesOf[tenant] -= e.bytes
		total--
		size -= e.bytes
	}
	return s.remove(gone)
}

// remove forgets builds. The caller holds mu.
func (s *Store) remove(gone []*entry) error {
	if len(gone) == 0 {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, e := range gone {
			if err := deleteBuild(tx, e.key); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove old builds: %w", err)
	}
	var errs []error
	for _, e := range gone {
		delete(s.index, e.key)
		s.bytes -= e.bytes
		errs = append(errs, s.removeEvents(e.key))
	}
	return errors.Join(errs...)
}

func deleteBuild(tx *bolt.Tx, key Key) error {
	builds := tx.Bucket(bucketBuilds)
	b := &agentv1.Build{}
	if err := proto.Unmarshal(builds.Get(key.bytes()), b); err != nil {
		return fmt.Errorf("decode build: %w", err)
	}
	if err := tx.Bucket(bucketByTime).Delete(timeKey(b)); err != nil {
		return err
	}
	return builds.Delete(key.bytes())
}
