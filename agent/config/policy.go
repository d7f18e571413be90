package config

import "slices"

// Networks that a policy may name.
const (
	NetworkEgress = "egress"
	NetworkNone   = "none"
)

// Values of Policy.BuildKitClients.
const (
	BuildKitAllow = "allow"
	BuildKitDeny  = "deny"
	BuildKitAuto  = "auto"
)

// AllowsBuildKit tells whether BuildKit's clients may build for the tenant of p, and
// if not, why.
func (p Policy) AllowsBuildKit() (bool, string) {
	switch {
	case p.BuildKitClients == BuildKitAllow:
		return true, ""
	case p.BuildKitClients == BuildKitDeny:
		return false, "its policy says so (buildKitClients)"
	case p.Network == NetworkNone:
		return false, "its policy allows no network, which they cannot be held to"
	case p.MaxResources != Resources{}:
		return false, "its policy has maxResources, which they cannot be held to"
	case len(p.Registries.Pull)+len(p.Registries.Push) > 0:
		return false, "its policy lists registries, which they cannot be held to"
	}
	return true, ""
}

// Policy returns what holds for tenant: the defaults with the tenant's overrides,
// and every empty field that means another one replaced by it.
func (c *Agent) Policy(tenant string) Policy {
	p := merge(c.Tenants.Defaults, c.Tenants.Overrides[tenant])
	if len(p.Sandboxes) == 0 {
		p.Sandboxes = c.Sandboxes.Enabled
	}
	switch {
	case p.DefaultSandbox != "":
	case slices.Contains(p.Sandboxes, c.Sandboxes.Default):
		p.DefaultSandbox = c.Sandboxes.Default
	case len(p.Sandboxes) > 0:
		p.DefaultSandbox = p.Sandboxes[0]
	}
	return p
}

func merge(base, over Policy) Policy {
	if len(over.Sandboxes) > 0 {
		base.Sandboxes = over.Sandboxes
		if !slices.Contains(over.Sandboxes, base.DefaultSandbox) {
			// The default of others may be one that this tenant may not use.
			base.DefaultSandbox = ""
		}
	}
	override(&base.DefaultSandbox, over.DefaultSandbox)
	override(&base.Network, over.Network)
	if len(over.Destinations.Allow) > 0 {
		base.Destinations.Allow = over.Destinations.Allow
	}
	if len(over.Destinations.Deny) > 0 {
		base.Destinations.Deny = over.Destinations.Deny
	}
	override(&base.MaxTimeout, over.MaxTimeout)
	if over.MaxTimeout != "" && over.DefaultTimeout == "" && base.DefaultTimeout.Value() > base.MaxTimeout.Value() {
		base.DefaultTimeout = base.MaxTimeout
	}
	override(&base.DefaultTimeout, over.DefaultTimeout)
	base.DefaultResources = mergeResources(base.DefaultResources, over.DefaultResources)
	base.MaxResources = mergeResources(base.MaxResources, over.MaxResources)
	override(&base.MaxRunning, over.MaxRunning)
	override(&base.MaxQueued, over.MaxQueued)
	if len(over.Registries.Pull) > 0 {
		base.Registries.Pull = over.Registries.Pull
	}
	if len(over.Registries.Push) > 0 {
		base.Registries.Push = over.Registries.Push
	}
	if len(over.Frontends) > 0 {
		base.Frontends = over.Frontends
	}
	if len(over.Mounts) > 0 {
		base.Mounts = over.Mounts
	}
	if len(over.NodeImages) > 0 {
		base.NodeImages = over.NodeImages
	}
	override(&base.BuildKitClients, over.BuildKitClients)
	return base
}

func mergeResources(base, over Resources) Resources {
	override(&base.CPU, over.CPU)
	override(&base.Memory, over.Memory)
	override(&base.Disk, over.Disk)
	override(&base.PIDs, over.PIDs)
	override(&base.Inodes, over.Inodes)
	override(&base.OpenFiles, over.OpenFiles)
	override(&base.Log, over.Log)
	override(&base.LogRate, over.LogRate)
	override(&base.Shm, over.Shm)
	override(&base.StepTimeout, over.StepTimeout)
	return base
}

func override[T comparable](field *T, value T) {
	var zero T
	if value != zero {
		*field = value
	}
}
