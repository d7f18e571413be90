package controller

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/agenttwin"
	"github.com/kiln-build/kiln/controller/testcluster"
)

// TestControllerKilledAtAnyMoment kills the program between any two of its writes and
// calls: each build is started once and ends once.
func TestControllerKilledAtAnyMoment(t *testing.T) {
	const builds, kills = 40, 15
	dir := t.TempDir()
	program := filepath.Join(dir, "kiln-controller")
	out, err := exec.Command("go", "build", "-o", program, filepath.Join(testcluster.Root(), "cmd", "kiln-controller")).CombinedOutput()
	require.NoError(t, err, string(out))
	cfg := testConfig(t)
	cfg.LeaderElection.Disabled = true // One runs at a time, and nobody is to wait for its lease.
	data, err := yaml.Marshal(cfg)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.yaml"), data, 0o600))
	writeKubeconfig(t, filepath.Join(dir, "kubeconfig"))

	start := func() *exec.Cmd {
		cmd := exec.Command(program, "--config", filepath.Join(dir, "config.yaml"), "--kubeconfig", filepath.Join(dir, "kubeconfig"), "--log-level", "error")
		cmd.Stderr = os.Stderr
		require.NoError(t, cmd.Start())
		return cmd
	}
	kill := func(cmd *exec.Cmd) {
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
	}
	cmd := start()
	defer func() { kill(cmd) }()
	require.True(t, waitFor(30*time.Second, func() bool { return secretExists(t, "kiln-agent-tls") }))
	twins := []*agenttwin.Twin{startAgent(t, 1), startAgent(t, 2)}
	ns := namespace(t, nil)
	made := 0
	for range kills {
		for range builds / kills {
			create(t, newBuild(ns, fmt.Sprintf("app-%d", made), []string{"ok", "fail"}[made%2]))
			made++
		}
		time.Sleep(time.Duration(300+rand.IntN(900)) * time.Millisecond)
		kill(cmd)
		cmd = start()
	}
	require.Eventually(t, func() bool { return ended(t, ns) == made }, time.Minute, 100*time.Millisecond)
	require.Equal(t, made, twins[0].Started()+twins[1].Started(), "each build was started once")
	list := &v1alpha1.BuildList{}
	require.NoError(t, api.List(t.Context(), list, client.InNamespace(ns)))
	for i := range list.Items {
		b := &list.Items[i]
		require.Contains(t, []string{v1alpha1.ReasonSucceeded, v1alpha1.ReasonStepFailed}, condition(b).Reason, condition(b).Message)
	}
}

func ended(t *testing.T, ns string) int {
	list := &v1alpha1.BuildList{}
	require.NoError(t, api.List(t.Context(), list, client.InNamespace(ns)))
	n := 0
	for i := range list.Items {
		if list.Items[i].Ended() {
			n++
		}
	}
	return n
}

// writeKubeconfig writes how the controller's ServiceAccount reaches the API server.
func writeKubeconfig(t *testing.T, file string) {
	t.Helper()
	c, err := cluster.User("system:serviceaccount:kiln-system:kiln-controller")
	require.NoError(t, err)
	k := clientcmdapi.NewConfig()
	k.Clusters["c"] = &clientcmdapi.Cluster{Server: c.Host, CertificateAuthorityData: c.CAData}
	k.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: c.CertData, ClientKeyData: c.KeyData}
	k.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	k.CurrentContext = "c"
	require.NoError(t, clientcmd.WriteToFile(*k, file))
}
