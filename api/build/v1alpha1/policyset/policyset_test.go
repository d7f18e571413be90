package policyset

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

func TestLimitsAndRulesOfAPolicy(t *testing.T) {
	var p v1alpha1.SandboxPolicy
	require.NoError(t, yaml.UnmarshalStrict([]byte(`
metadata: {name: p}
spec:
  maxResources:
    limits: {cpu: 1500m, memory: 1Gi, ephemeral-storage: 2Gi, kiln.build/pids: "3", kiln.build/inodes: 4k, kiln.build/open-files: "5",
      kiln.build/log-bytes: 6Ki, kiln.build/log-rate: 7Ki, kiln.build/shm: 8Mi}
  maxTimeout: 1h
  maxStepTimeout: 10m
  frontends: {allowed: [builtin, r.example.com/frontends]}
  mounts: {allowed: [Cache, Secret, SSH, Tmpfs]}
`), &p))
	require.Equal(t, policy.Rules{
		Name: "p", MaxTimeout: time.Hour, Frontends: []string{policy.BuiltIn, "r.example.com/frontends"},
		Mounts: []string{policy.MountCache, policy.MountSecret, policy.MountSSH, policy.MountTmpfs},
		Max: policy.Limits{
			CPUMillis: 1500, MemoryBytes: 1 << 30, DiskBytes: 2 << 30, PIDs: 3, Inodes: 4000, OpenFiles: 5,
			LogBytes: 6 << 10, LogRate: 7 << 10, ShmBytes: 8 << 20, StepTimeout: 10 * time.Minute,
		},
	}, Rules(&p))
}
