package queue

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// enter puts builds into q, named "tenant/number", and returns their tickets.
func enter(t *testing.T, q *Queue, tickets map[string]*Ticket, names ...string) {
	t.Helper()
	for _, name := range names {
		tenant, _, _ := strings.Cut(name, "/")
		ticket, err := q.Enter(Request{Tenant: tenant})
		require.NoError(t, err)
		tickets[name] = ticket
	}
}

func isAdmitted(t *Ticket) bool {
	select {
	case <-t.Admitted():
		return t.Err() == nil
	default:
		return false
	}
}

// order releases what runs, one at a time, and returns the order in which builds
// started.
func order(tickets map[string]*Ticket, names []string) string {
	var started []string
	seen := map[string]bool{}
	note := func() {
		for _, n := range names {
			if !seen[n] && isAdmitted(tickets[n]) {
				seen[n] = true
				started = append(started, n)
			}
		}
	}
	note()
	for i := 0; i < len(started); i++ {
		tickets[started[i]].Release()
		note()
	}
	return strings.Join(started, " ")
}

func TestOrder(t *testing.T) {
	tests := []struct {
		name  string
		slots int
		enter string
		want  string
	}{
		{"one tenant: first come, first served", 1, "a/1 a/2 a/3", "a/1 a/2 a/3"},
		{"tenants take turns", 1, "a/1 a/2 a/3 a/4 b/1 b/2 c/1", "a/1 b/1 c/1 a/2 b/2 a/3 a/4"},
		{"a tenant that comes late waits no longer than a round", 1, "a/1 a/2 a/3 b/1 b/2 b/3 c/1", "a/1 b/1 c/1 a/2 b/2 a/3 b/3"},
		{"free slots are used by whoever is there", 3, "a/1 a/2 a/3 a/4 b/1", "a/1 a/2 a/3 b/1 a/4"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := New(Limits{Slots: tt.slots}, nil)
			defer q.Close()
			tickets := map[string]*Ticket{}
			names := strings.Fields(tt.enter)
			enter(t, q, tickets, names...)
			require.Equal(t, tt.want, order(tickets, names))
			require.Equal(t, Stats{}, q.Stats())
			require.Empty(t, q.tenants)
		})
	}
}

func TestTenantsGetEqualSharesOfWhatRuns(t *testing.T) {
	q := New(Limits{Slots: 4}, nil)
	defer q.Close()
	tickets := map[string]*Ticket{}
	enter(t, q, tickets, "a/1", "a/2", "a/3", "a/4", "a/5", "b/1", "b/2", "b/3")
	tickets["a/1"].Release()
	tickets["a/2"].Release()
	require.True(t, isAdmitted(tickets["b/1"]))
	require.True(t, isAdmitted(tickets["b/2"]))
	require.False(t, isAdmitted(tickets["a/5"]))
	tickets["a/3"].Release() // a has 1, b has 2
	require.True(t, isAdmitted(tickets["a/5"]))
}

// TestComingBackGainsNothing has one tenant that always has one build in the queue
// among others that have many.
func TestComingBackGainsNothing(t *testing.T) {
	q := New(Limits{Slots: 1}, nil)
	defer q.Close()
	tickets := map[string]*Ticket{}
	for _, tenant := range []string{"a", "b", "c"} {
		for i := range 20 {
			enter(t, q, tickets, fmt.Sprintf("%s/%d", tenant, i))
		}
	}
	enter(t, q, tickets, "d/0")
	shares := map[string]int{}
	for n := 0; n < 40; n++ {
		for name, ticket := range tickets {
			if isAdmitted(ticket) {
				tenant, _, _ := strings.Cut(name, "/")
				shares[tenant]++
				delete(tickets, name)
				ticket.Release()
				if tenant == "d" {
					enter(t, q, tickets, fmt.Sprintf("d/%d", n+1))
				}
				break
			}
		}
	}
	for tenant, n := range shares {
		require.InDelta(t, 10, n, 1, "tenant %s", tenant)
	}
}

func TestLimits(t *testing.T) {
	tests := []struct {
		name   string
		limits Limits
		before []string
		r      Request
		rule   string
	}{
		{"a free slot is no queue", Limits{Slots: 1, Queued: 1}, nil, Request{Tenant: "a"}, ""},
		{"the queue has room", Limits{Slots: 1, Queued: 1}, []string{"a/1"}, Request{Tenant: "a"}, ""},
		{"the queue is full", Limits{Slots: 1, Queued: 1}, []string{"a/1", "a/2"}, Request{Tenant: "b"}, "queue"},
		{"the tenant's queue is full", Limits{Slots: 1, QueuedPerTenant: 1}, []string{"a/1", "a/2"}, Request{Tenant: "a"}, "queue-per-tenant"},
		{"another tenant's is not", Limits{Slots: 1, QueuedPerTenant: 1}, []string{"a/1", "a/2"}, Request{Tenant: "b"}, ""},
		{"a tenant's own limit", Limits{Slots: 1}, []string{"a/1", "a/2"}, Request{Tenant: "a", MaxQueued: 1}, "queue-per-tenant"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := New(tt.limits, nil)
			defer q.Close()
			enter(t, q, map[string]*Ticket{}, tt.before...)
			before := q.Stats()
			check := q.Check(tt.r)
			_, err := q.Enter(tt.r)
			require.Equal(t, check, err)
			var full *FullError
			if tt.rule == "" {
				require.NoError(t, err)
			} else {
				require.ErrorAs(t, err, &full)
				require.Equal(t, tt.rule, full.Rule)
				require.Equal(t, before, q.Stats())
			}
		})
	}
}

func TestResources(t *testing.T) {
	total := Resources{CPUMillis: 4000, MemoryBytes: 1000, DiskBytes: 1000}
	q := New(Limits{Slots: 10, Total: total, Overtakes: 2}, nil)
	defer q.Close()
	in := func(needs Resources) *Ticket {
		ticket, err := q.Enter(Request{Tenant: "a", Needs: needs})
		require.NoError(t, err)
		return ticket
	}
	for _, tt := range []struct {
		needs    Resources
		resource string
	}{
		{Resources{CPUMillis: 4001}, "cpu_millis"}, {Resources{MemoryBytes: 1001}, "memory_bytes"}, {Resources{DiskBytes: 1001}, "disk_bytes"},
	} {
		_, err := q.Enter(Request{Tenant: "a", Needs: tt.needs})
		var large *TooLargeError
		require.ErrorAs(t, err, &large)
		require.Equal(t, tt.resource, large.Resource)
	}
	first, second := in(Resources{MemoryBytes: 600}), in(Resources{MemoryBytes: 600})
	require.True(t, isAdmitted(first))
	require.False(t, isAdmitted(second))
	require.Equal(t, Resources{MemoryBytes: 600}, q.Stats().Used)
	third := in(Resources{}) // of the same tenant: it waits its turn
	require.False(t, isAdmitted(third))
	first.Release()
	require.True(t, isAdmitted(second))
	require.True(t, isAdmitted(third))
	second.Release()
	third.Release()
	require.Equal(t, Stats{}, q.Stats())
}

func TestALargeBuildIsNotOvertakenForEver(t *testing.T) {
	q := New(Limits{Slots: 10, Total: Resources{MemoryBytes: 100}, Overtakes: 3}, nil)
	defer q.Close()
	in := func(tenant string, memory int64) *Ticket {
		ticket, err := q.Enter(Request{Tenant: tenant, Needs: Resources{MemoryBytes: memory}})
		require.NoError(t, err)
		return ticket
	}
	running := in("a", 50)
	large := in("b", 100)
	var small []*Ticket
	for i := range 5 {
		small = append(small, in(fmt.Sprintf("c%d", i), 1))
	}
	for i, s := range small {
		require.Equal(t, i < 3, isAdmitted(s), "small build %d", i)
	}
	running.Release()
	for _, s := range small[:3] {
		require.False(t, isAdmitted(large))
		s.Release()
	}
	require.True(t, isAdmitted(large))
	require.False(t, isAdmitted(small[3]))
	large.Release()
	require.True(t, isAdmitted(small[4]))
}

func TestATenantsOwnLimitKeepsNobodyElse(t *testing.T) {
	q := New(Limits{Slots: 3}, nil)
	defer q.Close()
	var tickets []*Ticket
	for range 3 {
		ticket, err := q.Enter(Request{Tenant: "a", MaxRunning: 1})
		require.NoError(t, err)
		tickets = append(tickets, ticket)
	}
	other, err := q.Enter(Request{Tenant: "b"})
	require.NoError(t, err)
	require.True(t, isAdmitted(tickets[0]))
	require.False(t, isAdmitted(tickets[1]))
	require.True(t, isAdmitted(other))
	tickets[0].Release()
	require.True(t, isAdmitted(tickets[1]))
	require.False(t, isAdmitted(tickets[2]))
}

// TestInvariants has random builds come and go: no limit is ever exceeded, everyone
// is admitted once, and nothing is left.
func TestInvariants(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		limits := Limits{Slots: 1 + rng.IntN(4), Queued: 20, Total: Resources{1000, 1000, 1000}, Overtakes: 1 + rng.IntN(4)}
		q := New(limits, nil)
		var live []*Ticket
		admitted := 0
		for range 500 {
			if rng.IntN(2) == 0 || len(live) == 0 {
				ticket, err := q.Enter(Request{
					Tenant: string(rune('a' + rng.IntN(4))), MaxRunning: rng.IntN(3),
					Needs: Resources{rng.Int64N(1001), rng.Int64N(1001), rng.Int64N(1001)},
				})
				if err == nil {
					live = append(live, ticket)
				}
			} else {
				i := rng.IntN(len(live))
				live[i].Release()
				if rng.IntN(10) == 0 {
					live[i].Release()
				}
				live = append(live[:i], live[i+1:]...)
			}
			running := 0
			var used Resources
			for _, ticket := range live {
				if isAdmitted(ticket) {
					running++
					used = used.plus(ticket.request.Needs)
				}
			}
			require.Equal(t, Stats{Running: running, Queued: len(live) - running, Used: used}, q.Stats())
			require.LessOrEqual(t, running, limits.Slots)
			require.True(t, used.within(limits.Total))
			if running == 0 {
				require.Empty(t, live, "nothing runs and somebody waits")
			}
			admitted += running
		}
		for len(live) > 0 { // the ones that run end; the others follow
			done := false
			for i, ticket := range live {
				if isAdmitted(ticket) {
					ticket.Release()
					live = append(live[:i], live[i+1:]...)
					done = true
					break
				}
			}
			require.True(t, done)
		}
		require.NotZero(t, admitted)
		require.Equal(t, Stats{}, q.Stats())
		require.Empty(t, q.tenants)
		q.Close()
	}
}
