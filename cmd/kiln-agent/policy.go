package main

import (
	"cmp"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	"github.com/kiln-build/kiln/agent/steplimits"
	"github.com/kiln-build/kiln/agent/upload"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// rules returns the policy of every tenant. The controller's own policies come on
// top of it: what either refuses is refused.
func rules(cfg *config.Agent) agent.RulePolicy {
	return func(tenant string) agent.TenantRules {
		p := cfg.Policy(tenant)
		networks := []string{policy.NetworkNone}
		if p.Network == config.NetworkEgress {
			networks = append(networks, policy.NetworkEgress)
		}
		return agent.TenantRules{
			Rules: []policy.Rules{{
				Name: "agent-configuration", Classes: p.Sandboxes, DefaultClass: p.DefaultSandbox, Networks: networks, DefaultNetwork: p.Network,
				Destinations: policy.Destinations{Allow: p.Destinations.Allow, Deny: p.Destinations.Deny},
				Pull:         p.Registries.Pull, Push: p.Registries.Push, Frontends: p.Frontends, Mounts: p.Mounts, Max: limits(p.MaxResources), MaxTimeout: p.MaxTimeout.Value(),
			}},
			Defaults: limits(p.DefaultResources), Sandbox: sandbox.Class(p.DefaultSandbox), Network: p.Network, Timeout: p.DefaultTimeout.Value(),
			NodeImages: p.NodeImages, MaxRunning: p.MaxRunning, MaxQueued: p.MaxQueued,
		}
	}
}

func limits(r config.Resources) policy.Limits { return steplimits.FromSandbox(r.Limits()) }

// stepRules returns what holds for the steps of a tenant, also those of BuildKit's clients,
// which ask for what they like.
func stepRules(all agent.RulePolicy) func(engine.Domain) engine.StepRules {
	return func(d engine.Domain) engine.StepRules {
		t := all(d.Tenant)
		return engine.StepRules{Rules: t.Rules, Defaults: t.Defaults}
	}
}

// autoMemory is the part of the memory, in percent, that builds get when the
// configuration leaves it open; the rest is for the agent and the page cache.
const autoMemory = 80

// queueLimits resolves what the configuration leaves to the node. disk is the size
// in bytes of the file system of root.
func queueLimits(cfg *config.Agent, disk int64) queue.Limits {
	cpus := runtime.GOMAXPROCS(0)
	memory := nodeMemory()
	return queue.Limits{
		Slots:           cmp.Or(cfg.Builds.Slots, max(2, cpus/2)),
		Queued:          cfg.Builds.QueueLimit,
		QueuedPerTenant: cfg.Builds.QueueLimit,
		Total: queue.Resources{
			CPUMillis:   cmp.Or(cfg.Resources.CPU.Millis(), int64(cpus)*1000),
			MemoryBytes: cmp.Or(cfg.Resources.Memory.Bytes(memory), memory/100*autoMemory),
			DiskBytes:   cfg.Resources.Disk.Bytes(disk),
		},
		MinFreeDisk: cfg.Builds.MinFreeDisk.Bytes(disk),
	}
}

func space(gc config.GC, disk int64) engine.Space {
	return engine.Space{Reserved: gc.Reserved.Bytes(disk), MaxUsed: gc.MaxUsed.Bytes(disk), MinFree: gc.MinFree.Bytes(disk)}
}

func recordLimits(r config.Records) record.Limits {
	return record.Limits{
		Builds: r.MaxBuilds, BuildsPerTenant: r.MaxBuildsPerTenant, Age: r.MaxAge.Value(),
		LogBytes: r.MaxLogBytes.Bytes(0), Bytes: r.MaxTotalBytes.Bytes(0),
	}
}

func uploadLimits(cfg *config.Agent, disk int64) upload.Limits {
	u := cfg.Uploads
	return upload.Limits{
		Bytes: u.MaxBytes.Bytes(0), TenantBytes: u.MaxTotalBytes.Bytes(0), TenantCount: u.MaxCount, Age: u.TTL.Value(),
		MinFree: cfg.Builds.MinFreeDisk.Bytes(disk),
	}
}

// diskSize returns the size in bytes of the file system that dir is on, and 0 when
// it cannot be told.
func diskSize(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Blocks) * st.Bsize
}
