// Package testcluster starts a real API server for tests: kube-apiserver and etcd from
// bin/, with kiln's resource definitions. No node and no controller of Kubernetes runs.
package testcluster

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// Start starts an API server and stops it when the test ends. The programs come from
// KUBEBUILDER_ASSETS or the repository's bin; a test fails when they are missing.
func Start(t testing.TB, webhooks ...envtest.WebhookInstallOptions) (*envtest.Environment, *rest.Config) {
	t.Helper()
	root := Root()
	env := &envtest.Environment{
		CRDDirectoryPaths:     []string{filepath.Join(root, "deploy", "base", "crds")},
		ErrorIfCRDPathMissing: true,
		BinaryAssetsDirectory: Assets(),
	}
	for _, w := range webhooks {
		env.WebhookInstallOptions = w
	}
	for _, name := range []string{"kube-apiserver", "etcd"} {
		if _, err := os.Stat(filepath.Join(env.BinaryAssetsDirectory, name)); err != nil {
			t.Fatalf("%v (make bin/kube-apiserver bin/etcd)", err)
		}
	}
	if os.Getenv("KILN_TEST_APISERVER_LOG") != "" {
		env.AttachControlPlaneOutput = true
	}
	cfg, err := env.Start()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, env.Stop()) })
	return env, cfg
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
