package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	apiPort            = 6443
	registryPort       = 5000
	secureRegistryPort = 5443
	clusterDomain      = "cluster.local"
	etcdURL            = "http://127.0.0.1:2379"

	adminUser  = "kubernetes-admin"
	adminGroup = "system:masters"
	// frontProxyUser is the API server as aggregated API servers see it.
	frontProxyUser = "front-proxy-client"
)

// apiURL is where everybody reaches the API server.
func (a addresses) apiURL() string { return fmt.Sprintf("https://%s:%d", a.control(), apiPort) }

// writeControlFiles writes keys, certificates and configuration of the control
// plane, and the administrator's kubeconfig.
func (c *Cluster) writeControlFiles(a addresses) (*authority, error) {
	pki := filepath.Join(c.dir, "pki")
	ca, err := newAuthority(pki)
	if err != nil {
		return nil, err
	}
	err = ca.issue(filepath.Join(pki, "apiserver"), certificate{
		user:      "kube-apiserver",
		names:     []string{"localhost", controlName, "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), a.control(), a.apiService()},
	})
	if err != nil {
		return nil, err
	}
	// The kubelets let this client do everything.
	if err := ca.issue(filepath.Join(pki, "kubelet-client"), certificate{user: "kube-apiserver-kubelet-client", groups: []string{adminGroup}}); err != nil {
		return nil, err
	}
	// Aggregated API servers know the API server by an authority of its own, so that no
	// other client can speak for a user.
	frontProxy, err := newAuthority(filepath.Join(pki, "front-proxy"))
	if err != nil {
		return nil, err
	}
	if err := frontProxy.issue(filepath.Join(pki, "front-proxy", "client"), certificate{user: frontProxyUser}); err != nil {
		return nil, err
	}
	if _, err := writeKey(filepath.Join(pki, "service-account.key")); err != nil {
		return nil, err
	}
	for name, user := range map[string]certificate{
		"kubeconfig":             {user: adminUser, groups: []string{adminGroup}},
		"pki/controller-manager": {user: "system:kube-controller-manager"},
		"pki/scheduler":          {user: "system:kube-scheduler"},
	} {
		if err := ca.kubeconfig(filepath.Join(c.dir, name), a.apiURL(), user); err != nil {
			return nil, err
		}
	}
	if err := c.writeNameServerConfig(a); err != nil {
		return nil, err
	}
	return ca, c.writeRegistryConfigs(ca, a)
}

func (c *Cluster) nameServerConfig() string { return filepath.Join(c.dir, "Corefile") }

// writeNameServerConfig makes the control plane the name server of the cluster's
// names, and of no others.
func (c *Cluster) writeNameServerConfig(a addresses) error {
	return writeFile(c.nameServerConfig(), fmt.Sprintf(`%s:53 {
	bind %s
	errors
	kubernetes {
		kubeconfig %s
	}
}`, clusterDomain, a.control(), c.Kubeconfig()))
}

func (c *Cluster) registryConfig(name string) string { return filepath.Join(c.dir, name+".yml") }

// writeRegistryConfigs configures two doors to one store of images: one of plain
// HTTP, one of TLS.
func (c *Cluster) writeRegistryConfigs(ca *authority, a addresses) error {
	pki := filepath.Join(c.dir, "pki", "registry")
	err := ca.issue(pki, certificate{
		user:      "registry",
		names:     []string{"localhost", controlName},
		addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), a.control()},
	})
	if err != nil {
		return err
	}
	for name, http := range map[string]map[string]any{
		Registry: {"addr": fmt.Sprintf("0.0.0.0:%d", registryPort)},
		SecureRegistry: {
			"addr": fmt.Sprintf("0.0.0.0:%d", secureRegistryPort),
			"tls":  map[string]any{"certificate": pki + ".crt", "key": pki + ".key"},
		},
	} {
		err := writeJSON(c.registryConfig(name), map[string]any{ // JSON is YAML
			"version": "0.1",
			"log":     map[string]any{"level": "warn"},
			"storage": map[string]any{
				"filesystem": map[string]any{"rootdirectory": filepath.Join(c.dir, "registry")},
				"delete":     map[string]any{"enabled": true},
			},
			"http": http,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// startStore starts what the API server and the nodes need first.
func (c *Cluster) startStore(ctx context.Context) error {
	for _, name := range []string{Registry, SecureRegistry} {
		if err := c.Control().Run(ctx, name, "docker-registry", "serve", c.registryConfig(name)); err != nil {
			return err
		}
	}
	return c.Control().Run(ctx, Etcd, "etcd",
		"--name=control",
		"--data-dir="+filepath.Join(c.dir, "etcd"),
		"--listen-client-urls="+etcdURL,
		"--advertise-client-urls="+etcdURL,
		"--listen-peer-urls=http://127.0.0.1:2380",
		"--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=control=http://127.0.0.1:2380",
		"--unsafe-no-fsync",
		"--log-level=warn")
}

func (c *Cluster) startAPIServer(ctx context.Context, cfg Config, a addresses) error {
	pki := filepath.Join(c.dir, "pki")
	return c.Control().Run(ctx, APIServer, "kube-apiserver",
		"--request-timeout="+cmp.Or(cfg.RequestTimeout, time.Minute).String(),
		"--etcd-servers="+etcdURL,
		fmt.Sprintf("--secure-port=%d", apiPort),
		"--advertise-address="+a.control().String(),
		"--service-cluster-ip-range="+a.services().String(),
		"--client-ca-file="+pki+"/ca.crt",
		"--tls-cert-file="+pki+"/apiserver.crt",
		"--tls-private-key-file="+pki+"/apiserver.key",
		"--kubelet-certificate-authority="+pki+"/ca.crt",
		"--kubelet-client-certificate="+pki+"/kubelet-client.crt",
		"--kubelet-client-key="+pki+"/kubelet-client.key",
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file="+pki+"/front-proxy/ca.crt",
		"--requestheader-allowed-names="+frontProxyUser,
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+pki+"/front-proxy/client.crt",
		"--proxy-client-key-file="+pki+"/front-proxy/client.key",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+pki+"/service-account.key",
		"--service-account-signing-key-file="+pki+"/service-account.key",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		// The control plane has no service proxy: webhooks of Services are
		// called at the addresses of their Pods.
		"--enable-aggregator-routing=true",
		"--profiling=false")
}

// startControllers starts what needs the API server.
func (c *Cluster) startControllers(ctx context.Context) error {
	pki := filepath.Join(c.dir, "pki")
	err := c.Control().Run(ctx, ControllerManager, "kube-controller-manager",
		"--kubeconfig="+pki+"/controller-manager",
		"--authentication-kubeconfig="+pki+"/controller-manager",
		"--authorization-kubeconfig="+pki+"/controller-manager",
		"--use-service-account-credentials=true",
		"--root-ca-file="+pki+"/ca.crt",
		"--service-account-private-key-file="+pki+"/service-account.key",
		"--cluster-signing-cert-file="+pki+"/ca.crt",
		"--cluster-signing-key-file="+pki+"/ca.key",
		"--bind-address=127.0.0.1",
		// The usual directory is outside the state directory.
		"--flex-volume-plugin-dir="+filepath.Join(c.dir, "volume-plugins"),
		// A dead node is seen sooner than the usual 50 seconds.
		"--node-monitor-grace-period=20s",
		"--leader-elect=false",
		"--profiling=false")
	if err != nil {
		return err
	}
	err = c.Control().Run(ctx, DNS, "coredns", "-conf="+c.nameServerConfig())
	if err != nil {
		return err
	}
	return c.Control().Run(ctx, Scheduler, "kube-scheduler",
		"--kubeconfig="+pki+"/scheduler",
		"--authentication-kubeconfig="+pki+"/scheduler",
		"--authorization-kubeconfig="+pki+"/scheduler",
		"--bind-address=127.0.0.1",
		"--leader-elect=false",
		"--profiling=false")
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return writeFile(path, string(data))
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if !strings.HasSuffix(content, "\n") {
		content += "\n"
	}
	return os.WriteFile(path, []byte(content), 0o644)
}
