package config

// Defaults of fields that other programs and documents name.
const (
	DefaultRoot          = "/var/lib/kiln"
	DefaultSocket        = "/run/kiln/agent.sock"
	DefaultMetrics       = "127.0.0.1:9131"
	DefaultHealth        = "127.0.0.1:9132"
	DefaultTokenAudience = "kiln-agent"
)

// setDefaults fills in what c leaves out.
func (c *Agent) setDefaults() {
	fill(&c.APIVersion, APIVersion)
	fill(&c.Kind, Kind)
	fill(&c.Root, DefaultRoot)
	c.Listeners.setDefaults()
	fill(&c.Sandboxes.Default, "gvisor")
	if c.Sandboxes.Enabled == nil {
		c.Sandboxes.Enabled = []string{"gvisor", "userns"}
	}
	fill(&c.Builds.QueueLimit, 100)
	fill(&c.Builds.MinFreeDisk, "2Gi")
	fill(&c.Builds.DrainTimeout, "10m")
	fill(&c.Resources.CPU, Auto)
	fill(&c.Resources.Memory, Auto)
	fill(&c.Resources.Disk, Auto)
	p := &c.Tenants.Defaults
	fill(&p.Network, NetworkEgress)
	fill(&p.MaxTimeout, "4h")
	if p.DefaultTimeout == "" {
		p.DefaultTimeout = "1h"
		if m := p.MaxTimeout.Value(); m > 0 && m < p.DefaultTimeout.Value() {
			p.DefaultTimeout = p.MaxTimeout
		}
	}
	fill(&p.BuildKitClients, BuildKitAuto)
	if p.DefaultResources.PIDs == 0 {
		p.DefaultResources.PIDs = 4096
		if m := p.MaxResources.PIDs; m > 0 {
			p.DefaultResources.PIDs = min(p.DefaultResources.PIDs, m)
		}
	}
	fill(&c.GC.Reserved, "10%")
	fill(&c.GC.MaxUsed, "60%")
	fill(&c.GC.MinFree, "20%")
	fill(&c.Records.MaxBuilds, 2000)
	fill(&c.Records.MaxBuildsPerTenant, min(500, c.Records.MaxBuilds))
	fill(&c.Records.MaxAge, "168h")
	fill(&c.Records.MaxLogBytes, "16Mi")
	fill(&c.Records.MaxTotalBytes, "2Gi")
	fill(&c.Uploads.MaxBytes, "2Gi")
	fill(&c.Uploads.MaxTotalBytes, "8Gi")
	fill(&c.Uploads.MaxCount, 64)
	fill(&c.Uploads.TTL, "1h")
	if c.Tracing.Endpoint != "" && c.Tracing.SamplingRatePerMillion == nil {
		c.Tracing.SamplingRatePerMillion = new(int32(10_000))
	}
	fill(&c.Metrics.Address, DefaultMetrics)
	fill(&c.Health.Address, DefaultHealth)
	fill(&c.Logging.Level, "info")
	fill(&c.Logging.Format, "json")
}

func (l *Listeners) setDefaults() {
	if l.Unix == nil && l.TCP == nil {
		l.Unix = &Unix{}
	}
	if l.Unix != nil {
		fill(&l.Unix.Path, DefaultSocket)
		fill(&l.Unix.Mode, "0660")
	}
	if l.TCP == nil || l.TCP.Tokens == nil {
		return
	}
	t := l.TCP.Tokens
	if t.Audiences == nil {
		t.Audiences = []string{DefaultTokenAudience}
	}
	fill(&t.CacheTTL, "1m")
	fill(&t.CacheEntries, 4096)
}

func fill[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
