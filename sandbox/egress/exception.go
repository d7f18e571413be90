package egress

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Exception is what may be reached although a rule denies it, or what an allow-list
// has: addresses, or hosts by name, each on one port or on all.
type Exception struct {
	// prefix has the addresses; it is not valid when host is set.
	prefix netip.Prefix
	// host is a name in lower case, without a dot at its end.
	host string
	// subdomains says that all names below host are meant, and not host itself.
	subdomains bool
	// port is 0 for all.
	port uint16
}

// hostName is a name that cannot be mistaken for an address: its last label has a
// letter.
var hostName = regexp.MustCompile(`^([a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9])?\.)*[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

// ParseException reads a CIDR ("10.1.0.0/16"), an address ("10.1.2.3"), a host name
// ("registry.internal") or a domain whose subdomains are meant ("*.example.org"). Each
// may be followed by a port ("10.1.0.0/16:443", "[fd00::1]:5000", "*.example.org:443").
func ParseException(s string) (Exception, error) {
	host, port, err := cutPort(s)
	if err != nil {
		return Exception{}, err
	}
	e := Exception{port: port}
	if prefix, err := netip.ParsePrefix(host); err == nil {
		if prefix.Addr().Is4In6() {
			return Exception{}, fmt.Errorf("%q: write it as IPv4", s)
		}
		if prefix != prefix.Masked() {
			return Exception{}, fmt.Errorf("%q has bits set beyond its length; did you mean %q?", s, prefix.Masked())
		}
		e.prefix = prefix
		return e, nil
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.Zone() == "" {
		e.prefix = single(addr)
		return e, nil
	}
	e.host, e.subdomains = strings.CutPrefix(canonical(host), "*.")
	if len(e.host) > 253 || !hostName.MatchString(e.host) {
		return Exception{}, fmt.Errorf(`%q: want a CIDR, an IP address, a host name or "*." and a domain, each with a port if need be, such as "10.1.0.0/16", "registry.internal:5000" or "*.example.org:443"`, s)
	}
	return e, nil
}

// cutPort splits s at the colon before a port, if there is one. An IPv6 address or CIDR
// with a port is in brackets.
func cutPort(s string) (host string, port uint16, err error) {
	colon := strings.LastIndexByte(s, ':')
	bracketed := strings.HasPrefix(s, "[")
	if colon < 0 || !bracketed && strings.IndexByte(s, ':') != colon {
		return s, 0, nil
	}
	if host = s[:colon]; bracketed {
		inner, closed := strings.CutSuffix(host[1:], "]")
		if !closed || !strings.Contains(inner, ":") {
			return "", 0, fmt.Errorf("%q: brackets are for an IPv6 address that a port follows", s)
		}
		host = inner
	}
	n, err := strconv.ParseUint(s[colon+1:], 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("%q has no port from 1 to 65535 after its colon", s)
	}
	return host, uint16(n), nil
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
	to := e.host
	switch {
	case e.subdomains:
		to = "*." + e.host
	case e.host != "":
	case e.prefix.IsSingleIP() && e.port != 0:
		to = e.prefix.Addr().String()
	default:
		to = e.prefix.String()
	}
	if e.port == 0 {
		return to
	}
	return net.JoinHostPort(to, strconv.Itoa(int(e.port)))
}

// named tells whether e is about hosts by their names.
func (e Exception) named() bool { return e.host != "" }

// names tells whether e is about the host of that name.
func (e Exception) names(host string) bool {
	host = canonical(host)
	if e.subdomains {
		sub, found := strings.CutSuffix(host, "."+e.host)
		return found && sub != ""
	}
	return e.named() && e.host == host
}

// covers tells whether e is about a connection to to that was asked for by the
// name host.
func (e Exception) covers(host string, to netip.AddrPort) bool {
	if e.port != 0 && e.port != to.Port() {
		return false
	}
	if e.named() {
		return e.names(host)
	}
	// A wrapped address is not what the exception says.
	return e.prefix.Contains(to.Addr().WithZone(""))
}

func single(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}

func canonical(host string) string { return strings.TrimSuffix(strings.ToLower(host), ".") }
