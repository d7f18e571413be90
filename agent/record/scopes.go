package record

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// mostScopes bounds how many cache scopes are remembered.
const mostScopes = 10000

// Scope is what is known of the builds of one cache scope.
type Scope struct {
	// LastBuilt is when one of them last ended well.
	LastBuilt time.Time
	// CacheBytes is what that build used of the step cache.
	CacheBytes int64
}

// scopeKey is of fixed length, whatever a scope is named.
func scopeKey(tenant, scope string) []byte {
	sum := sha256.Sum256([]byte(tenant + "/" + scope))
	return sum[:]
}

// SetScope stores what is known of a tenant's cache scope.
func (s *Store) SetScope(tenant, scope string, known Scope) error {
	value := binary.BigEndian.AppendUint64(nil, uint64(known.LastBuilt.UnixNano()))
	value = binary.BigEndian.AppendUint64(value, uint64(known.CacheBytes))
	err := s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketScopes).Put(scopeKey(tenant, scope), value)
	})
	if err != nil {
		return fmt.Errorf("store cache scope: %w", err)
	}
	return nil
}

// Scope returns what is known of a tenant's cache scope, and whether anything is.
func (s *Store) Scope(tenant, scope string) (Scope, bool) {
	var known Scope
	var ok bool
	// The only error is that of a closed store, which knows nothing.
	_ = s.db.View(func(tx *bolt.Tx) error {
		known, ok = decodeScope(tx.Bucket(bucketScopes).Get(scopeKey(tenant, scope)))
		return nil
	})
	return known, ok
}

func decodeScope(value []byte) (Scope, bool) {
	if len(value) != 16 {
		return Scope{}, false
	}
	return Scope{
		LastBuilt:  time.Unix(0, int64(binary.BigEndian.Uint64(value))),
		CacheBytes: int64(binary.BigEndian.Uint64(value[8:])),
	}, true
}

// sweepScopes forgets scopes that are older than builds are kept, and any when
// there are too many.
func (s *Store) sweepScopes() error {
	var old [][]byte
	now := s.now()
	err := s.db.View(func(tx *bolt.Tx) error {
		n := 0
		return tx.Bucket(bucketScopes).ForEach(func(k, v []byte) error {
			n++
			if known, ok := decodeScope(v); !ok || n > mostScopes || now.Sub(known.LastBuilt) > s.limits.Age {
				old = append(old, append([]byte(nil), k...))
			}
			return nil
		})
	})
	if err != nil || len(old) == 0 {
		return err
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, k := range old {
			if err := tx.Bucket(bucketScopes).Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
}
