package upload

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a store whose time and free disk a test sets.
type fixture struct {
	*Store
	at   time.Time
	free int64
}

func newFixture(t *testing.T, limits Limits) *fixture {
	t.Helper()
	f := &fixture{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), free: 1 << 40}
	var err error
	f.Store, err = Open(filepath.Join(t.TempDir(), "uploads"), limits,
		func() (int64, error) { return f.free, nil }, func() time.Time { return f.at })
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, f.Close()) })
	return f
}

// put stores data whole.
func (f *fixture) put(tenant, data string) (digest.Digest, error) {
	d := digest.FromString(data)
	w, err := f.Create(tenant, d, int64(len(data)))
	if err != nil {
		return d, err
	}
	if _, err := w.Write([]byte(data)); err != nil {
		return d, errors.Join(err, w.Abort())
	}
	_, err = w.Commit()
	return d, err
}

// files lists what is on disk.
func (f *fixture) files(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(f.dir)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		fi, err := e.Info()
		require.NoError(t, err)
		require.Zero(t, fi.Mode().Perm()&0o077, "readable by others")
		names = append(names, e.Name())
	}
	return names
}

// empty fails unless nothing is left, on disk and in accounts.
func (f *fixture) empty(t *testing.T) {
	t.Helper()
	require.Empty(t, f.files(t))
	require.Empty(t, f.used)
	require.Empty(t, f.archives)
	require.Zero(t, f.arriving)
}

func TestAnArchiveLastsAsLongAsItsBuild(t *testing.T) {
	f := newFixture(t, Limits{})
	d, err := f.put("a", "data")
	require.NoError(t, err)
	require.True(t, f.Has("a", d))
	require.False(t, f.Has("b", d), "another tenant has it not")
	_, err = f.Hold("b", d)
	require.ErrorIs(t, err, ErrNotFound)

	one, err := f.Hold("a", d)
	require.NoError(t, err)
	two, err := f.Hold("a", d)
	require.NoError(t, err)
	data, err := os.ReadFile(one.Path)
	require.NoError(t, err)
	require.Equal(t, "data", string(data))
	f.at = f.at.Add(2 * time.Hour)
	f.Sweep()
	require.True(t, f.Has("a", d), "a build holds it")
	one.Done()
	one.Done()
	require.True(t, f.Has("a", d))
	two.Return() // a build that held it has ended all the same
	f.empty(t)
}

func TestAnArchiveThatNoBuildNamesExpires(t *testing.T) {
	f := newFixture(t, Limits{Age: time.Minute})
	d, err := f.put("a", "data")
	require.NoError(t, err)
	h, err := f.Hold("a", d)
	require.NoError(t, err)
	h.Return()
	require.True(t, f.Has("a", d))
	f.at = f.at.Add(59 * time.Second)
	_, err = f.put("a", "data") // again: it lasts longer
	require.NoError(t, err)
	f.at = f.at.Add(59 * time.Second)
	f.Sweep()
	require.True(t, f.Has("a", d))
	f.at = f.at.Add(time.Second)
	require.False(t, f.Has("a", d))
	_, err = f.Hold("a", d)
	require.ErrorIs(t, err, ErrNotFound)
	f.Sweep()
	f.empty(t)
}

func TestWhatIsNotAnnouncedIsRefused(t *testing.T) {
	good := digest.FromString("data")
	tests := []struct {
		name   string
		digest digest.Digest
		size   int64
		data   string
		want   string
	}{
		{"no digest", "", 4, "data", "digest: want"},
		{"a digest that is none", "sha256:xyz", 4, "data", "digest: want"},
		{"a path as digest", "sha256:../../../../etc/passwd", 4, "data", "digest: want"},
		{"another algorithm", digest.SHA512.FromString("data"), 4, "data", "digest: want"},
		{"no size", good, 0, "data", "size: want"},
		{"a negative size", good, -4, "data", "size: want"},
		{"more than announced", good, 3, "data", "more than the announced 3 bytes"},
		{"less than announced", good, 5, "data", "4 of the announced 5 bytes"},
		{"other data", good, 4, "atad", "not the announced"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, Limits{})
			var mismatch *MismatchError
			w, err := f.Create("a", tt.digest, tt.size)
			if err == nil {
				if _, err = w.Write([]byte(tt.data)); err == nil {
					_, err = w.Commit()
				}
				require.NoError(t, w.Abort())
			}
			require.ErrorAs(t, err, &mismatch)
			require.ErrorContains(t, err, tt.want)
			f.empty(t)
		})
	}
}

func TestLimits(t *testing.T) {
	limits := Limits{Bytes: 100, TenantBytes: 150, TenantCount: 3, MinFree: 1000}
	tests := []struct {
		name   string
		before []int
		free   int64
		size   int
		rule   string
	}{
		{"as large as may be", nil, 1 << 20, 100, ""},
		{"too large", nil, 1 << 20, 101, "upload-size"},
		{"the tenant's quota", []int{100}, 1 << 20, 51, "upload-quota"},
		{"just within", []int{100}, 1 << 20, 50, ""},
		{"too many", []int{1, 2, 3}, 1 << 20, 1, "upload-count"},
		{"disk", nil, 1050, 51, "disk-free"},
		{"enough disk", nil, 1050, 50, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, limits)
			for i, n := range tt.before {
				_, err := f.put("a", strings.Repeat(string(rune('a'+i)), n))
				require.NoError(t, err)
			}
			f.free = tt.free
			_, err := f.put("a", strings.Repeat("x", tt.size))
			var limit *LimitError
			if tt.rule == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorAs(t, err, &limit)
			require.Equal(t, tt.rule, limit.Rule)
			if tt.rule != "disk-free" {
				_, err = f.put("b", "y")
				require.NoError(t, err, "another tenant's quota is its own")
			}
		})
	}
}

func TestWhatArrivesCounts(t *testing.T) {
	f := newFixture(t, Limits{Bytes: 100, TenantBytes: 150, Age: time.Minute})
	w, err := f.Create("a", digest.FromString("x"), 100)
	require.NoError(t, err)
	_, err = f.Create("a", digest.FromString("y"), 100)
	var limit *LimitError
	require.ErrorAs(t, err, &limit)
	_, err = w.Write(make([]byte, 50))
	require.NoError(t, err)
	f.at = f.at.Add(2 * time.Minute)
	_, err = w.Write(make([]byte, 50))
	require.ErrorContains(t, err, "took longer than")
	require.NoError(t, w.Abort())
	require.NoError(t, w.Abort())
	f.empty(t)
}

func TestOpenClears(t *testing.T) {
	f := newFixture(t, Limits{})
	_, err := f.put("a", "data")
	require.NoError(t, err)
	again, err := Open(f.dir, Limits{}, nil, nil)
	require.NoError(t, err)
	defer again.Close()
	entries, err := os.ReadDir(f.dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}
