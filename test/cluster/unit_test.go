package cluster

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
)

func TestForeignDirectoryIsNeverTaken(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "precious")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err := Up(t.Context(), Config{Dir: dir})
	require.ErrorContains(t, err, "holds no cluster")
	require.ErrorContains(t, Down(t.Context(), dir), "holds no cluster")
	require.FileExists(t, file)
}

// A Down that was killed leaves at least the marker for the next one.
func TestHalfRemovedStateIsRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	require.NoError(t, claim(dir))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "nodes/node1/lib"), 0o755))
	require.NoError(t, Down(t.Context(), dir))
	require.NoDirExists(t, dir)
}

func TestConfigIsChecked(t *testing.T) {
	for _, test := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"too many nodes", Config{Nodes: 9}, "use 1 to 8"},
		{"negative nodes", Config{Nodes: -1}, "use 1 to 8"},
		{"missing parent", Config{Dir: "/nonexistent/state"}, "/nonexistent"},
		{"missing programs", Config{Bin: t.TempDir()}, "make cluster-tools"},
		{"programs that nodes do not see", Config{Bin: "/var/lib"}, "outside /var/lib"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.cfg.Dir == "" {
				test.cfg.Dir = filepath.Join(t.TempDir(), "state")
			}
			_, err := Up(t.Context(), test.cfg)
			require.ErrorContains(t, err, test.want)
			require.NoDirExists(t, test.cfg.Dir)
		})
	}
}

func TestNetworksAvoidTheCallers(t *testing.T) {
	for _, test := range []struct {
		name   string
		routes []string
		want   int // -1 for none
	}{
		{"nothing", nil, 0},
		{"default route", []string{"0.0.0.0/0"}, 0},
		{"machines of the first", []string{"10.213.0.0/24"}, 1},
		{"one Pod of the first", []string{"10.215.7.9/32"}, 1},
		{"services of the second and all of the first", []string{"10.214.1.0/24", "10.213.0.0/24", "10.214.0.0/24", "10.215.0.0/21"}, 2},
		{"a wide network", []string{"10.0.0.0/8"}, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			var routes []netlink.Route
			for _, r := range test.routes {
				routes = append(routes, netlink.Route{Dst: ipNet(netip.MustParsePrefix(r))})
			}
			a, err := choose(append(routes, netlink.Route{}))
			if test.want < 0 {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, addresses{byte(test.want)}, a)
		})
	}
}

func TestNetworksOfClustersAreApart(t *testing.T) {
	var all []netip.Prefix
	for n := range maxClusters {
		a := addresses{byte(n)}
		all = append(all, a.machines(), a.services(), a.pods())
		for i := range maxNodes {
			require.True(t, a.pods().Overlaps(a.podsOf(i)))
			require.True(t, a.machines().Contains(a.node(i)))
		}
	}
	for i, p := range all {
		for _, q := range all[:i] {
			require.False(t, p.Overlaps(q), "%s and %s", p, q)
		}
	}
}

func TestProcessStatus(t *testing.T) {
	const tail = " 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 8 9"
	for _, test := range []struct {
		name, stat string
		start      uint64
		state      byte
	}{
		{"plain", "12 (sleep) S" + tail, 4711, 'S'},
		{"name with a parenthesis and a state", "12 (a) Z (b) R" + tail, 4711, 'R'},
		{"ended", "12 (sh) Z" + tail, 4711, 'Z'},
		{"empty", "", 0, 0},
		{"cut", "12 (sleep) S 1 2", 0, 0},
		{"no end of name", "12 (sleep S" + tail, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			start, state, err := parseStat([]byte(test.stat))
			require.Equal(t, test.start == 0, err != nil, "%v", err)
			require.Equal(t, test.start, start)
			require.Equal(t, test.state, state)
		})
	}
}

func FuzzProcessStatus(f *testing.F) {
	f.Add([]byte("12 (sleep) S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 8 9"))
	f.Add([]byte("12 (a) Z (b) R"))
	f.Add([]byte(")("))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, state, err := parseStat(data); err == nil && state == 0 {
			t.Fatal("no state and no error")
		}
	})
}
