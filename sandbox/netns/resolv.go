package netns

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// nodeNameservers are the node's resolvers. When the node uses the stub of
// systemd-resolved, those behind it come first.
func nodeNameservers() ([]netip.Addr, error) {
	all, err := readResolvConf("/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	if slices.Contains(all, netip.AddrFrom4([4]byte{127, 0, 0, 53})) {
		behind, err := readResolvConf("/run/systemd/resolve/resolv.conf")
		if err != nil {
			return nil, err
		}
		all = append(behind, all...)
	}
	return all, nil
}

// usable are the resolvers that a step can use: IPv4 and not on a loopback address.
func usable(all []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		a = a.Unmap()
		if a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func readResolvConf(path string) ([]netip.Addr, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read nameservers: %w", err)
	}
	defer f.Close()
	var out []netip.Addr
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil {
			out = append(out, a)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read nameservers of %s: %w", path, err)
	}
	return out, nil
}
