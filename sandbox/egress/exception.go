package egress

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Exception is what may be reached although a rule denies it: addresses, or a
// host by its name, each on one port or on all.
type Exception struct {
	// prefix has the addresses; it is not valid when host is set.
	prefix netip.Prefix
	// host is a name in lower case, without a dot at its end.
	host string
	// port is 0 for all.
	port uint16
}

// hostName is a name that cannot be mistaken for an address: its last label has a
// letter.
var hostName = regexp.MustCompile(`^([a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9])?\.)*[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

// ParseException reads a CIDR ("10.1.0.0/16"), an address ("10.1.2.3"), or a host
// name ("registry.internal"), of which the last two may be followed by a port
// ("10.1.2.3:5000", "[fd00::1]:5000").
func ParseException(s string) (Exception, error) {
	if prefix, err := netip.ParsePrefix(s); err == nil {
		if prefix.Addr().Is4In6() {
			return Exception{}, fmt.Errorf("%q: write it as IPv4", s)
		}
		if prefix != prefix.Masked() {
			return Exception{}, fmt.Errorf("%q has bits set beyond its length; did you mean %q?", s, prefix.Masked())
		}
		return Exception{prefix: prefix}, nil
	}
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return Exception{prefix: single(addr)}, nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Zone() == "" && ap.Port() != 0 {
		return Exception{prefix: single(ap.Addr()), port: ap.Port()}, nil
	}
	host, port, hasPort := strings.Cut(s, ":")
	e := Exception{host: canonical(host)}
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Exception{}, fmt.Errorf("%q has no port from 1 to 65535 after its colon", s)
		}
		e.port = uint16(n)
	}
	if len(e.host) > 253 || !hostName.MatchString(e.host) {
		return Exception{}, fmt.Errorf(`%q: want a CIDR, an IP address or a host name, the last two with a port if need be, such as "10.1.0.0/16" or "registry.internal:5000"`, s)
	}
	return e, nil
}

// ParseExceptions reads a list; the error names the first that cannot be read.
func ParseExceptions(list []string) ([]Exception, error) {
	out := make([]Exception, len(list))
	for i, s := range list {
		var err error
		if out[i], err = ParseException(s); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// String returns e as ParseException reads it.
func (e Exception) String() string {
	switch {
	case e.host != "" && e.port == 0:
		return e.host
	case e.host != "":
		return e.host + ":" + strconv.Itoa(int(e.port))
	case e.port != 0:
		return netip.AddrPortFrom(e.prefix.Addr(), e.port).String()
	}
	return e.prefix.String()
}

// covers tells whether e is about a connection to to that was asked for by the
// name host.
func (e Exception) covers(host string, to netip.AddrPort) bool {
	if e.port != 0 && e.port != to.Port() {
		return false
	}
	if e.host != "" {
		return e.host == canonical(host)
	}
	// A wrapped address is not what the exception says.
	return e.prefix.Contains(to.Addr().WithZone(""))
}

func single(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}

func canonical(host string) string { return strings.TrimSuffix(strings.ToLower(host), ".") }
