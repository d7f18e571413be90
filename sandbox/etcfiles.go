package sandbox

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// WriteEtcFiles writes the files under /etc that depend on the step rather than
// on its image into the directory dir on the node. It returns the file on the
// node for each destination in the step; runtimes bind-mount them read-only.
func WriteEtcFiles(dir string, step *Step, nameservers []netip.Addr) (map[string]string, error) {
	hostname := step.Hostname
	if hostname == "" {
		hostname = DefaultHostname
	}
	var hosts, resolv strings.Builder
	fmt.Fprintf(&hosts, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
	for _, h := range step.ExtraHosts {
		if strings.ContainsAny(h.Name, " \t\n\r#\x00") || h.Name == "" {
			return nil, fmt.Errorf("extra host %q: not a host name", h.Name)
		}
		fmt.Fprintf(&hosts, "%s\t%s\n", h.IP, h.Name)
	}
	for _, ns := range nameservers {
		fmt.Fprintf(&resolv, "nameserver %s\n", ns)
	}
	files := map[string]string{}
	for name, content := range map[string]string{"hosts": hosts.String(), "resolv.conf": resolv.String()} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			return nil, fmt.Errorf("write %s of the step: %w", name, err)
		}
		files["/etc/"+name] = file
	}
	return files, nil
}
