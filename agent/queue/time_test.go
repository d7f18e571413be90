package queue

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPlacesAreReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := New(Limits{Slots: 1, PositionInterval: time.Second}, nil)
		defer q.Close()
		reports := map[string][]int{}
		tickets := map[string]*Ticket{}
		for _, name := range []string{"a/1", "a/2", "a/3", "a/4", "b/1"} {
			tenant, _, _ := strings.Cut(name, "/")
			ticket, err := q.Enter(Request{Tenant: tenant, Moved: func(p int, _ string) { reports[name] = append(reports[name], p) }})
			require.NoError(t, err)
			tickets[name] = ticket
		}
		require.Equal(t, []int{0, 1, 2, 3, 1}, places(tickets, "a/1", "a/2", "a/3", "a/4", "b/1"))
		pass(1100 * time.Millisecond)
		require.Equal(t, map[string][]int{"a/2": {2}, "a/3": {3}, "a/4": {4}}, reports)
		// Two changes within a second are one report.
		tickets["a/1"].Release()
		tickets["b/1"].Release()
		pass(time.Second)
		require.Equal(t, []int{3, 1}, reports["a/3"])
		require.Equal(t, []int{4, 2}, reports["a/4"])
		tickets["a/3"].Release() // leaves the queue
		pass(time.Second)
		require.Equal(t, []int{4, 2, 1}, reports["a/4"])
		require.Zero(t, tickets["a/2"].Position())
	})
}

// pass lets a time pass, and what happens meanwhile be over.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func places(tickets map[string]*Ticket, names ...string) []int {
	var out []int
	for _, n := range names {
		out = append(out, tickets[n].Position())
	}
	return out
}

func TestDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var free atomic.Int64
		free.Store(1000)
		q := New(Limits{Slots: 2, MinFreeDisk: 100, DiskPatience: time.Minute, DiskInterval: time.Second},
			func() (int64, error) { return free.Load(), nil })
		defer q.Close()
		var told string
		in := func(disk int64) (*Ticket, error) {
			return q.Enter(Request{Tenant: "a", Needs: Resources{DiskBytes: disk}, Moved: func(_ int, m string) { told = m }})
		}
		first, err := in(800)
		require.NoError(t, err)
		require.True(t, isAdmitted(first))
		free.Store(300)
		second, err := in(500)
		require.NoError(t, err)
		pass(time.Hour) // it waits as long as one runs
		require.False(t, isAdmitted(second))
		require.Equal(t, "waits for free disk: 300 bytes are free, 600 are needed", told)
		free.Store(700)
		pass(2 * time.Second)
		require.True(t, isAdmitted(second))
		first.Release()
		second.Release()

		free.Store(200)
		third, err := in(500)
		require.NoError(t, err)
		pass(50 * time.Second)
		require.Equal(t, 1, third.Position())
		pass(15 * time.Second)
		<-third.Admitted()
		var disk *DiskError
		require.ErrorAs(t, third.Err(), &disk)
		require.EqualValues(t, 600, disk.Wanted)
		require.Equal(t, Stats{}, q.Stats())
		third.Release()
		third.Release()

		free.Store(99)
		var full *FullError
		_, err = in(0)
		require.ErrorAs(t, err, &full)
		require.Equal(t, "disk-free", full.Rule)
	})
}

func TestUnknownFreeDiskStopsNobody(t *testing.T) {
	q := New(Limits{MinFreeDisk: 100}, func() (int64, error) { return 0, errors.New("broken") })
	defer q.Close()
	ticket, err := q.Enter(Request{Tenant: "a"})
	require.NoError(t, err)
	require.True(t, isAdmitted(ticket))
}
