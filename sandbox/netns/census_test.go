package netns

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/kiln-build/kiln/sandbox"
)

type census struct {
	links, tables, fds, netns int
	forward                   string
}

func count(t testing.TB) census {
	t.Helper()
	links, err := whole(netlink.LinkList)
	require.NoError(t, err)
	nft, err := nftables.New()
	require.NoError(t, err)
	tables, err := nft.ListTables()
	require.NoError(t, err)
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	forward, err := os.ReadFile(ipForward)
	require.NoError(t, err)
	spaces := map[string]bool{}
	tasks, err := os.ReadDir("/proc/self/task")
	require.NoError(t, err)
	for _, task := range tasks {
		if l, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil {
			spaces[l] = true
		}
	}
	for _, fd := range fds {
		if l, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(l, "net:") {
			spaces[l] = true
		}
	}
	return census{len(links), len(tables), len(fds), len(spaces), strings.TrimSpace(string(forward))}
}

// settled counts when what earlier tests closed is gone.
func settled(t testing.TB) census {
	t.Helper()
	last := count(t)
	for same := 0; same < 5; {
		time.Sleep(50 * time.Millisecond)
		now := count(t)
		if same++; now != last {
			same = 0
		}
		last = now
	}
	return last
}

func TestCloseLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	before := settled(t)
	a, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{nodeResolver}})
	require.NoError(t, err)
	b, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{nodeResolver}})
	require.NoError(t, err)
	require.NotEqual(t, a.claim.prefix, b.claim.prefix)
	for range 5 {
		for _, m := range []*Manager{a, b} {
			require.NoError(t, acquire(t, m, sandbox.NetworkEgress).Release())
			require.NoError(t, acquire(t, m, sandbox.NetworkNone).Release())
		}
	}
	acquire(t, a, sandbox.NetworkEgress) // never released
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	require.Equal(t, "1", count(t).forward, "another manager still forwards")
	_, err = a.Acquire(context.Background(), sandbox.NetworkNone)
	require.ErrorIs(t, err, ErrClosed)
	require.NoError(t, b.Close())
	require.Equal(t, before, count(t))
}

func TestAddressesRunOut(t *testing.T) {
	m := newManager(t, t.TempDir())
	first := acquire(t, m, sandbox.NetworkEgress)
	// Take all slots but those of the pool, without the price of their devices.
	for len(m.slots) > 0 {
		select {
		case <-m.slots:
		default:
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	var err error
	for err == nil {
		_, err = m.Acquire(ctx, sandbox.NetworkEgress)
	}
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, first.Release())
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = m.Acquire(ctx, sandbox.NetworkEgress)
	require.NoError(t, err)
}

// victim makes namespaces and waits to be killed.
func victim(dir string) {
	m, err := New(context.Background(), Config{StateDir: dir, Nameservers: []netip.Addr{nodeResolver}})
	if err == nil {
		_, err = m.Acquire(context.Background(), sandbox.NetworkEgress)
	}
	fmt.Println(err)
	time.Sleep(time.Minute)
	os.Exit(1)
}

func TestRecoverAfterKill(t *testing.T) {
	dir := t.TempDir()
	before := settled(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asVictim+"="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "<nil>\n", line)
	during := count(t)
	require.Greater(t, during.links, before.links)
	require.NoError(t, cmd.Process.Kill())
	cmd.Wait()
	require.Equal(t, before.tables+1, count(t).tables)

	m, err := New(context.Background(), Config{StateDir: dir})
	require.NoError(t, err)
	require.Equal(t, "10.63.0.0/22", m.claim.prefix.String(), "the subnet is free again")
	after := count(t)
	require.Equal(t, before.links, after.links)
	require.Equal(t, before.tables, after.tables)
	require.NoError(t, m.Close())
	require.Equal(t, "1", count(t).forward)

	// The one that uses forwarding next puts it back.
	m = newManager(t, dir)
	acquire(t, m, sandbox.NetworkEgress)
	require.NoError(t, m.Close())
	require.Equal(t, before, count(t))
}
