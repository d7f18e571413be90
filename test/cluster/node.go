package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// Where a node keeps what the harness writes for it, as the node sees it.
const nodeConfig = "/var/lib/kiln-cluster"

// handlers are the runtime handlers of the nodes' containerd, for RuntimeClass
// objects, by name. Pods run with runc and userns, which are the same. There is no
// shim for runsc: it can be named, and a Pod that asks for it fails with an error
// that says so.
var handlers = []struct{ name, runtime string }{
	{"runc", "io.containerd.runc.v2"},
	{"userns", "io.containerd.runc.v2"},
	{"runsc", "io.containerd.runsc.v1"},
}

const containerdSocket = "/run/containerd/containerd.sock"

// writeNodeFiles writes the configuration of node i.
func (c *Cluster) writeNodeFiles(ca *authority, a addresses, i int) error {
	n := c.Nodes()[i]
	dir := filepath.Join(c.nodeDir(n.name), "lib", filepath.Base(nodeConfig))
	if err := os.MkdirAll(filepath.Join(dir, "tmp"), 0o755); err != nil {
		return fmt.Errorf("configure node: %w", err)
	}
	user := certificate{user: "system:node:" + n.name, groups: []string{"system:nodes"}}
	if err := ca.kubeconfig(filepath.Join(dir, "kubelet.kubeconfig"), a.apiURL(), user); err != nil {
		return err
	}
	if err := ca.kubeconfig(filepath.Join(dir, "kube-proxy.kubeconfig"), a.apiURL(), certificate{user: "system:kube-proxy"}); err != nil {
		return err
	}
	serving := certificate{user: "system:node:" + n.name, names: []string{n.name}, addresses: []netip.Addr{n.address}}
	if err := ca.issue(filepath.Join(dir, "kubelet"), serving); err != nil {
		return err
	}
	caPEM, err := os.ReadFile(filepath.Join(ca.dir, "ca.crt"))
	if err != nil {
		return fmt.Errorf("configure node: %w", err)
	}
	for name, content := range map[string]string{
		"ca.crt":                                string(caPEM),
		"resolv.conf":                           "# The cluster reaches no name server of the outside.",
		"containerd.toml":                       c.containerdConfig(),
		"certs.d/" + c.registry + "/hosts.toml": hostConfig("http://"+c.registry, ""),
		"certs.d/" + c.SecureRegistry() + "/hosts.toml": hostConfig("https://"+c.SecureRegistry(), nodeConfig+"/ca.crt"),
	} {
		if err := writeFile(filepath.Join(dir, name), content); err != nil {
			return fmt.Errorf("configure node: %w", err)
		}
	}
	for name, content := range map[string]any{
		"kubelet.json":           c.kubeletConfig(n),
		"kube-proxy.json":        kubeProxyConfig(n, a),
		"net.d/10-kiln.conflist": networkConfig(a, i),
	} {
		if err := writeJSON(filepath.Join(dir, name), content); err != nil {
			return fmt.Errorf("configure node: %w", err)
		}
	}
	return nil
}

// hostConfig tells containerd how to reach a registry. ca may be empty.
func hostConfig(url, ca string) string {
	config := fmt.Sprintf("server = %q\n[host.%q]\n", url, url)
	if ca != "" {
		config += fmt.Sprintf("ca = %q\n", ca)
	}
	return config
}

func (c *Cluster) containerdConfig() string {
	config := fmt.Sprintf(`version = 4
# Features that would write outside the node's own directories.
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.image-verifier.v1.bindir"]
imports = []

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = %q

[plugins."io.containerd.cri.v1.images".registry]
config_path = %q

[plugins."io.containerd.transfer.v1.local"]
config_path = %[2]q

[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
# A machine without CAP_SYS_RESOURCE cannot lower an OOM score.
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = [%[3]q]
conf_dir = %[4]q
use_internal_loopback = true

[plugins."io.containerd.nri.v1.nri"]
disable = true
`, c.Image("pause"), nodeConfig+"/certs.d", c.bin, nodeConfig+"/net.d")
	for _, h := range handlers {
		config += fmt.Sprintf("\n[plugins.%q.containerd.runtimes.%s]\nruntime_type = %q\n", "io.containerd.cri.v1.runtime", h.name, h.runtime)
		if h.runtime == "io.containerd.runc.v2" {
			config += fmt.Sprintf("options = {BinaryName = %q}\n", filepath.Join(c.bin, "runc"))
		}
	}
	return config
}

func (c *Cluster) kubeletConfig(n *Machine) map[string]any {
	return map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": nodeConfig + "/ca.crt"},
		},
		"authorization":     map[string]any{"mode": "Webhook"},
		"tlsCertFile":       nodeConfig + "/kubelet.crt",
		"tlsPrivateKeyFile": nodeConfig + "/kubelet.key",
		"clusterDNS":        []string{c.Control().address.String()},
		"clusterDomain":     clusterDomain,
		"resolvConf":        nodeConfig + "/resolv.conf",
		"volumePluginDir":   nodeConfig + "/volume-plugins",
		"cgroupRoot":        c.group.path(n.name),
		"cgroupDriver":      "cgroupfs",
		"failCgroupV1":      false,
		"failSwapOn":        false,
		// A quarter of it is how often a node says that it lives.
		"nodeLeaseDurationSeconds": 12,
		// The node's packet filter belongs to kube-proxy and the network plugins.
		"makeIPTablesUtilChains": false,
		"oomScoreAdj":            0,
		"serializeImagePulls":    false,
		// The disk is the machine's: how full it is says nothing about a node.
		"imageGCHighThresholdPercent": 100,
		"evictionHard":                map[string]any{"memory.available": "100Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
	}
}

func kubeProxyConfig(n *Machine, a addresses) map[string]any {
	return map[string]any{
		"apiVersion":       "kubeproxy.config.k8s.io/v1alpha1",
		"kind":             "KubeProxyConfiguration",
		"mode":             "nftables",
		"clientConnection": map[string]any{"kubeconfig": nodeConfig + "/kube-proxy.kubeconfig"},
		"clusterCIDR":      a.pods().String(),
		"hostnameOverride": n.name,
		// These settings are the whole machine's, not a network namespace's.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	}
}

// networkConfig gives every Pod a line to its node, which routes all its traffic.
// Nothing is masqueraded: every machine and the caller know the way to every Pod.
func networkConfig(a addresses, i int) map[string]any {
	return map[string]any{
		"cniVersion": "1.0.0",
		"name":       "kiln",
		"plugins": []any{
			map[string]any{
				"type": "ptp",
				"ipam": map[string]any{
					"type":    "host-local",
					"dataDir": nodeConfig + "/ipam",
					"ranges":  []any{[]any{map[string]any{"subnet": a.podsOf(i).String()}}},
					"routes":  []any{map[string]any{"dst": "0.0.0.0/0"}},
				},
			},
			map[string]any{"type": "portmap", "backend": "nftables", "capabilities": map[string]any{"portMappings": true}},
		},
	}
}

// startRuntime starts a node's containerd.
func (n *Machine) startRuntime(ctx context.Context) error {
	return n.Run(ctx, Containerd, "containerd", "--config="+nodeConfig+"/containerd.toml")
}

// startAgents starts what makes a machine a node of the API server.
func (n *Machine) startAgents(ctx context.Context) error {
	err := n.Run(ctx, Kubelet, "kubelet",
		"--config="+nodeConfig+"/kubelet.json",
		"--kubeconfig="+nodeConfig+"/kubelet.kubeconfig",
		"--hostname-override="+n.name,
		"--node-ip="+n.address.String())
	if err != nil {
		return err
	}
	return n.Run(ctx, KubeProxy, "kube-proxy", "--config="+nodeConfig+"/kube-proxy.json")
}
