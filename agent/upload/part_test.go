package upload

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

const content = "all of the archive"

var contentDigest = digest.FromString(content)

// part sends a part of content as the build one of tenant a, wherever it belongs.
func (f *fixture) part(t *testing.T, from, to int) Arrived {
	t.Helper()
	p, err := f.Resume("a", "one", contentDigest, int64(len(content)))
	require.NoError(t, err)
	require.EqualValues(t, from, p.Arrived().Bytes)
	_, err = p.Write([]byte(content[from:to]))
	require.NoError(t, err)
	arrived, err := p.End()
	require.NoError(t, err)
	require.EqualValues(t, to, arrived.Bytes)
	return arrived
}

func TestPartsMakeAnArchive(t *testing.T) {
	f := newFixture(t, Limits{Age: time.Minute})
	require.False(t, f.part(t, 0, 4).Whole)
	require.False(t, f.Has("a", contentDigest))
	f.at = f.at.Add(59 * time.Second)
	f.Sweep()
	require.False(t, f.part(t, 4, 4).Whole, "a part of nothing asks")
	f.at = f.at.Add(59 * time.Second)
	f.Sweep()
	arrived := f.part(t, 4, len(content))
	require.Equal(t, Arrived{Bytes: int64(len(content)), Whole: true, Expires: f.at.Add(time.Minute)}, arrived)
	require.Empty(t, f.partials)
	h, err := f.Hold("a", contentDigest)
	require.NoError(t, err)
	data, err := os.ReadFile(h.Path)
	require.NoError(t, err)
	require.Equal(t, content, string(data))

	p, err := f.Resume("a", "two", contentDigest, int64(len(content)))
	require.NoError(t, err)
	require.True(t, p.Arrived().Whole, "another build of the tenant need not send it")
	_, err = p.Write([]byte("x"))
	require.ErrorContains(t, err, "more than the announced 18 bytes")
	again, err := p.End()
	require.NoError(t, err)
	require.True(t, again.Whole)
	_, err = f.Resume("a", "two", contentDigest, 3)
	require.ErrorContains(t, err, "18 bytes were announced before, not 3")
	other, err := f.Resume("b", "two", contentDigest, int64(len(content)))
	require.NoError(t, err)
	require.Zero(t, other.Arrived(), "another tenant has nothing of it")
	f.Forget("b", "two")
	h.Done()
	f.empty(t)
}

func TestWhatIsWrongInParts(t *testing.T) {
	tests := []struct {
		name  string
		size  int64
		parts []string
		want  string
		stays int64 // bytes that are still there
	}{
		{"more than announced", 18, []string{content[:10], content[10:] + "x"}, "more than the announced 18 bytes", 10},
		{"other data", 18, []string{content[:10], strings.ToUpper(content[10:])}, "not the announced", 0},
		{"a total that is too small", 10, []string{content[:10]}, "not the announced", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, Limits{})
			var err error
			for _, data := range tt.parts {
				require.NoError(t, err)
				var p *Part
				p, err = f.Resume("a", "one", contentDigest, tt.size)
				require.NoError(t, err)
				_, err = p.Write([]byte(data))
				_, endErr := p.End()
				err = errors.Join(err, endErr)
			}
			var mismatch *MismatchError
			require.ErrorAs(t, err, &mismatch)
			require.ErrorContains(t, err, tt.want)
			if tt.stays == 0 {
				f.empty(t)
			}
			p, err := f.Resume("a", "one", contentDigest, tt.size)
			require.NoError(t, err)
			require.Equal(t, tt.stays, p.Arrived().Bytes)
			_, err = f.Resume("a", "one", contentDigest, tt.size+1)
			require.ErrorAs(t, err, &mismatch, "another total")
			f.Forget("a", "one")
			f.empty(t)
		})
	}
}

func TestPartsThatNobodyFollowsGo(t *testing.T) {
	for name, end := range map[string]func(f *fixture){
		"with time": func(f *fixture) {
			f.at = f.at.Add(time.Minute)
			f.Sweep()
		},
		"with their build": func(f *fixture) {
			f.Forget("a", "another")
			f.Forget("b", "one")
			require.Len(t, f.partials, 1)
			f.Forget("a", "one")
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, Limits{Age: time.Minute})
			f.part(t, 0, 4)
			p, err := f.Resume("a", "one", contentDigest, int64(len(content)))
			require.NoError(t, err)
			end(f)
			f.empty(t)
			<-p.TakenOver()
			_, err = p.Write([]byte("x"))
			require.ErrorIs(t, err, ErrTakenOver)
			_, err = p.End()
			require.ErrorIs(t, err, ErrTakenOver)
			f.part(t, 0, 4)
		})
	}
	f := newFixture(t, Limits{})
	f.part(t, 0, 4)
	require.NoError(t, f.Close())
	f.empty(t)
}

func TestPartsCountWithAllThatIsAnnounced(t *testing.T) {
	f := newFixture(t, Limits{Bytes: 100, TenantBytes: 150, TenantCount: 2, MinFree: 1000})
	resume := func(tenant, build, data string, size int64) string {
		var limit *LimitError
		_, err := f.Resume(tenant, build, digest.FromString(data), size)
		if err != nil {
			require.ErrorAs(t, err, &limit)
			return limit.Rule
		}
		return ""
	}
	require.Equal(t, "upload-size", resume("a", "one", "x", 101))
	require.Empty(t, resume("a", "one", "x", 100))
	require.Empty(t, resume("a", "one", "x", 100), "again is not once more")
	require.Equal(t, "upload-quota", resume("a", "two", "x", 100), "each build has its own")
	require.Empty(t, resume("a", "two", "y", 1))
	require.Equal(t, "upload-count", resume("a", "three", "z", 1))
	f.free = 1150
	require.Equal(t, "disk-free", resume("b", "one", "x", 100))
	f.Forget("a", "one")
	f.Forget("a", "two")
	f.empty(t)
}

func TestTheLastOfTwoPartsIsTaken(t *testing.T) {
	f := newFixture(t, Limits{})
	first, err := f.Resume("a", "one", contentDigest, int64(len(content)))
	require.NoError(t, err)
	_, err = first.Write([]byte(content[:4]))
	require.NoError(t, err)
	second, err := f.Resume("a", "one", contentDigest, int64(len(content)))
	require.NoError(t, err)
	<-first.TakenOver()
	require.EqualValues(t, 4, second.Arrived().Bytes, "what the first has sent counts")
	_, err = first.Write([]byte(content[4:]))
	require.ErrorIs(t, err, ErrTakenOver)
	_, err = second.Write([]byte(content[4:]))
	require.NoError(t, err)
	_, err = first.End()
	require.ErrorIs(t, err, ErrTakenOver)
	arrived, err := second.End()
	require.NoError(t, err)
	require.True(t, arrived.Whole)
}

// TestManyWritersMakeOneArchive has many send the same archive at once, in pieces of
// every size, with a sweep and a cancelled build between: whatever wins, what is there
// in the end has the digest.
func TestManyWritersMakeOneArchive(t *testing.T) {
	f := newFixture(t, Limits{})
	var data []byte
	for i := range 1 << 16 {
		data = append(data, byte(i), byte(i>>8))
	}
	d := digest.FromBytes(data)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := 0; ; n++ {
				p, err := f.Resume("a", "one", d, int64(len(data)))
				if err != nil {
					t.Error(err)
					return
				}
				from := p.Arrived().Bytes
				if !p.Arrived().Whole {
					_, err = p.Write(data[from:min(from+int64(1000*(i+1)), int64(len(data)))])
				}
				arrived, endErr := p.End()
				if err = errors.Join(err, endErr); err != nil && !errors.Is(err, ErrTakenOver) {
					t.Error(err)
					return
				}
				if err == nil && arrived.Whole {
					return
				}
				if i == 0 && n == 5 {
					f.Forget("a", "one")
				}
				f.Sweep()
			}
		})
	}
	wg.Wait()
	h, err := f.Hold("a", d)
	require.NoError(t, err)
	got, err := os.ReadFile(h.Path)
	require.NoError(t, err)
	require.Equal(t, d, digest.FromBytes(got))
	require.Empty(t, f.partials)
	h.Done()
	f.empty(t)
}
