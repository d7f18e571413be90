// Package testcluster starts a real API server for tests: kube-apiserver and etcd from
// bin/, with kiln's resource definitions. No node and no controller of Kubernetes runs.
package testcluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// Cluster is an API server.
type Cluster struct {
	// Config reaches it as an administrator.
	Config *rest.Config
	env    *envtest.Environment
	dir    string
}

// Start starts an API server whose aggregation layer proves itself as "front-proxy". The
// programs come from KUBEBUILDER_ASSETS or the repository's bin; it fails when they are
// missing.
func Start() (*Cluster, error) {
	assets := Assets()
	for _, name := range []string{"kube-apiserver", "etcd"} {
		if _, err := os.Stat(filepath.Join(assets, name)); err != nil {
			return nil, fmt.Errorf("start API server: %w (make bin/kube-apiserver bin/etcd)", err)
		}
	}
	dir, err := os.MkdirTemp("", "kiln-testcluster")
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir}
	if err := c.start(assets); err != nil {
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("start API server: %w", err)
	}
	return c, nil
}

func (c *Cluster) start(assets string) error {
	if err := frontProxy(c.dir); err != nil {
		return err
	}
	c.env = &envtest.Environment{
		CRDDirectoryPaths:     []string{filepath.Join(Root(), "deploy", "base", "crds")},
		ErrorIfCRDPathMissing: true,
		BinaryAssetsDirectory: assets,
		// A race-enabled test on a busy machine is slow.
		ControlPlaneStartTimeout: 2 * time.Minute, ControlPlaneStopTimeout: time.Minute,
		AttachControlPlaneOutput: os.Getenv("KILN_TEST_APISERVER_LOG") != "",
	}
	args := c.env.ControlPlane.GetAPIServer().Configure()
	for flag, value := range map[string]string{
		"requestheader-client-ca-file": filepath.Join(c.dir, "ca.crt"), "requestheader-allowed-names": "front-proxy",
		"requestheader-username-headers": "X-Remote-User", "requestheader-group-headers": "X-Remote-Group", "requestheader-extra-headers-prefix": "X-Remote-Extra-",
		"proxy-client-cert-file": filepath.Join(c.dir, "proxy.crt"), "proxy-client-key-file": filepath.Join(c.dir, "proxy.key"),
	} {
		args.Set(flag, value)
	}
	cfg, err := c.env.Start()
	if err != nil {
		return err
	}
	cfg.QPS = -1
	c.Config = cfg
	return nil
}

// Stop ends everything and removes its files.
func (c *Cluster) Stop() error {
	defer func() { _ = os.RemoveAll(c.dir) }()
	return c.env.Stop()
}

// User returns how a user other than the administrator reaches the API server.
func (c *Cluster) User(name string, groups ...string) (*rest.Config, error) {
	u, err := c.env.AddUser(envtest.User{Name: name, Groups: groups}, nil)
	if err != nil {
		return nil, err
	}
	cfg := rest.CopyConfig(u.Config())
	cfg.QPS = -1
	return cfg, nil
}

// frontProxy writes a CA and the certificate that the aggregation layer shows.
func frontProxy(dir string) error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "front-proxy-ca"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "front-proxy"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	caRaw, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	leafRaw, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return err
	}
	keyRaw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"ca.crt": {Type: "CERTIFICATE", Bytes: caRaw}, "proxy.crt": {Type: "CERTIFICATE", Bytes: leafRaw}, "proxy.key": {Type: "PRIVATE KEY", Bytes: keyRaw},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Root is the repository's directory.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Assets is the directory of the programs.
func Assets() string {
	if dir := os.Getenv("KUBEBUILDER_ASSETS"); dir != "" {
		return dir
	}
	return filepath.Join(Root(), "bin")
}
