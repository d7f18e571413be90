package config

import (
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// Off is the address of an HTTP listener that is not wanted.
const Off = "0"

// overflowID is what the kernel shows of a peer whose ID has no mapping in the
// agent's user namespace, whoever it is.
const overflowID = 65534

// maxSocketPath is the longest path that a socket's address holds.
const maxSocketPath = 107

func (l *Listeners) validate(at *field.Path) field.ErrorList {
	var e field.ErrorList
	if l.Unix != nil {
		e = append(e, l.Unix.validate(at.Child("unix"))...)
	}
	if l.TCP != nil {
		e = append(e, l.TCP.validate(at.Child("tcp"))...)
	}
	return e
}

func (u *Unix) validate(at *field.Path) field.ErrorList {
	e := absolute(at.Child("path"), u.Path)
	if len(u.Path) > maxSocketPath {
		e = append(e, field.TooLong(at.Child("path"), u.Path, maxSocketPath))
	}
	if _, err := u.FileMode(); err != nil {
		e = append(e, field.Invalid(at.Child("mode"), u.Mode, `want permissions in octal, such as "0660", in quotes`))
	}
	for i, p := range u.Peers {
		at := at.Child("peers").Index(i)
		if p.UID == nil && p.GID == nil {
			e = append(e, field.Required(at, "a uid or a gid"))
		}
		e = append(e, notOverflow(at.Child("uid"), p.UID)...)
		e = append(e, notOverflow(at.Child("gid"), p.GID)...)
		if p.UID != nil && *p.UID == 0 {
			e = append(e, field.Invalid(at.Child("uid"), 0, "root is the administrator"))
		}
		e = append(e, dns(at.Child("tenant"), p.Tenant, validation.IsDNS1123Label)...)
	}
	return e
}

func notOverflow(at *field.Path, id *uint32) field.ErrorList {
	if id == nil || *id != overflowID {
		return nil
	}
	return field.ErrorList{field.Invalid(at, *id, "is what the kernel shows of every ID that it cannot map, so it names nobody")}
}

// FileMode returns the permissions of the socket.
func (u *Unix) FileMode() (uint32, error) {
	n, err := strconv.ParseUint(u.Mode, 8, 32)
	if err == nil && n&^0o777 != 0 {
		err = strconv.ErrRange
	}
	return uint32(n), err
}

func (t *TCP) validate(at *field.Path) field.ErrorList {
	host, e := hostPort(at.Child("address"), t.Address)
	for i, c := range t.Clients {
		e = append(e, c.validate(at.Child("clients").Index(i))...)
	}
	if t.Tokens != nil {
		e = append(e, t.Tokens.validate(at.Child("tokens"))...)
	}
	if t.InsecureLoopback {
		if a, err := netip.ParseAddr(host); err != nil || !a.IsLoopback() {
			e = append(e, field.Invalid(at.Child("insecureLoopback"), true, "the address must have the IP address of a loopback interface, such as 127.0.0.1 or ::1"))
		}
		if t.TLS != nil || t.Tokens != nil || len(t.Clients) > 0 {
			e = append(e, field.Forbidden(at.Child("insecureLoopback"), "goes with neither tls, clients nor tokens"))
		}
		return e
	}
	if t.TLS == nil {
		return append(e, field.Required(at.Child("tls"), "without TLS only insecureLoopback is served, on a loopback address"))
	}
	tls := at.Child("tls")
	e = append(e, absolute(tls.Child("certFile"), t.TLS.CertFile)...)
	e = append(e, absolute(tls.Child("keyFile"), t.TLS.KeyFile)...)
	for i, f := range t.TLS.ClientCAFiles {
		e = append(e, absolute(tls.Child("clientCAFiles").Index(i), f)...)
	}
	switch cas := len(t.TLS.ClientCAFiles) > 0; {
	case !cas && len(t.Clients) > 0:
		e = append(e, field.Required(tls.Child("clientCAFiles"), "the authorities that sign the certificates of clients"))
	case cas && len(t.Clients) == 0:
		e = append(e, field.Required(at.Child("clients"), "who the holders of certificates are; without it all are refused"))
	case !cas && t.Tokens == nil:
		e = append(e, field.Required(at.Child("clients"), "clients with tls.clientCAFiles, or tokens: else nobody could call"))
	}
	return e
}

func (c *Client) validate(at *field.Path) field.ErrorList {
	var e field.ErrorList
	if c.CommonName == "" && c.URI == "" && c.Organization == "" {
		e = append(e, field.Required(at, "a commonName, uri or organization"))
	}
	e = append(e, oneOf(at.Child("role"), c.Role, []string{"controller", "tenant"})...)
	if c.Role == "controller" {
		if c.Tenant != "" {
			e = append(e, field.Forbidden(at.Child("tenant"), "a controller acts for all"))
		}
		return e
	}
	return append(e, dns(at.Child("tenant"), c.Tenant, validation.IsDNS1123Label)...)
}

func (t *Tokens) validate(at *field.Path) field.ErrorList {
	var e field.ErrorList
	if len(t.Audiences) == 0 || slices.Contains(t.Audiences, "") {
		e = append(e, field.Required(at.Child("audiences"), "the audiences that tokens are made for"))
	}
	if t.Kubeconfig != "" {
		e = append(e, absolute(at.Child("kubeconfig"), t.Kubeconfig)...)
	}
	e = append(e, duration(at.Child("cacheTTL"), t.CacheTTL, time.Second, 10*time.Minute)...)
	return append(e, between(at.Child("cacheEntries"), int64(t.CacheEntries), 1, 1_000_000)...)
}

func (c *Agent) validateTenants(at *field.Path) field.ErrorList {
	e := c.validatePolicy(at.Child("defaults"), c.Tenants.Defaults, c.Policy(""))
	for _, name := range slices.Sorted(maps.Keys(c.Tenants.Overrides)) {
		p := c.Tenants.Overrides[name]
		at := at.Child("overrides").Key(name)
		e = append(e, dns(at, name, validation.IsDNS1123Label)...)
		e = append(e, c.validatePolicy(at, p, c.Policy(name))...)
	}
	return e
}

// longest is the most that a build or a step may run.
const longest = 7 * 24 * time.Hour

// validatePolicy checks p, and that what comes of it with the defaults holds
// together.
func (c *Agent) validatePolicy(at *field.Path, p, whole Policy) field.ErrorList {
	e := classes(at.Child("sandboxes"), p.Sandboxes)
	for i, s := range p.Sandboxes {
		if !slices.Contains(c.Sandboxes.Enabled, s) {
			e = append(e, field.Invalid(at.Child("sandboxes").Index(i), s, "is not in sandboxes.enabled"))
		}
	}
	if p.DefaultSandbox != "" {
		e = append(e, oneOf(at.Child("defaultSandbox"), p.DefaultSandbox, whole.Sandboxes)...)
	}
	e = append(e, oneOf(at.Child("network"), whole.Network, networks)...)
	e = append(e, p.Destinations.validate(at.Child("destinations"))...)
	e = append(e, duration(at.Child("maxTimeout"), whole.MaxTimeout, time.Second, longest)...)
	e = append(e, duration(at.Child("defaultTimeout"), whole.DefaultTimeout, time.Second, longest)...)
	if len(e) == 0 && whole.DefaultTimeout.Value() > whole.MaxTimeout.Value() {
		e = append(e, field.Invalid(at.Child("defaultTimeout"), whole.DefaultTimeout, "must not be more than maxTimeout, "+string(whole.MaxTimeout)))
	}
	e = append(e, p.DefaultResources.validate(at.Child("defaultResources"))...)
	e = append(e, p.MaxResources.validate(at.Child("maxResources"))...)
	if len(e) == 0 {
		e = append(e, within(at.Child("defaultResources"), whole.DefaultResources, whole.MaxResources)...)
	}
	e = append(e, between(at.Child("maxRunning"), int64(p.MaxRunning), 0, 1024)...)
	e = append(e, between(at.Child("maxQueued"), int64(p.MaxQueued), 0, 100_000)...)
	e = append(e, registries(at.Child("registries", "pull"), p.Registries.Pull)...)
	e = append(e, registries(at.Child("nodeImages"), p.NodeImages)...)
	e = append(e, registries(at.Child("frontends"), p.Frontends)...)
	for i, m := range p.Mounts {
		e = append(e, oneOf(at.Child("mounts").Index(i), m, []string{policy.MountCache, policy.MountSecret, policy.MountSSH, policy.MountTmpfs})...)
	}
	e = append(e, oneOf(at.Child("buildKitClients"), whole.BuildKitClients, clients)...)
	return append(e, registries(at.Child("registries", "push"), p.Registries.Push)...)
}

func (d Destinations) validate(at *field.Path) field.ErrorList {
	var e field.ErrorList
	lists := map[string][]string{"allow": d.Allow, "deny": d.Deny}
	for _, p := range (policy.Destinations{Allow: d.Allow, Deny: d.Deny}).Problems() {
		if p.Index < 0 {
			e = append(e, field.Invalid(at.Child(p.List), len(lists[p.List]), p.Err.Error()))
		} else {
			e = append(e, field.Invalid(at.Child(p.List).Index(p.Index), lists[p.List][p.Index], p.Err.Error()))
		}
	}
	return e
}

func (r *Resources) validate(at *field.Path) field.ErrorList {
	e := size(at.Child("cpu"), r.CPU, allowEmpty)
	e = append(e, size(at.Child("memory"), r.Memory, allowEmpty)...)
	e = append(e, size(at.Child("disk"), r.Disk, allowEmpty)...)
	e = append(e, between(at.Child("pids"), r.PIDs, 0, 4<<20)...)
	e = append(e, between(at.Child("inodes"), r.Inodes, 0, 1<<40)...)
	e = append(e, between(at.Child("openFiles"), r.OpenFiles, 0, sandbox.DefaultOpenFiles)...)
	e = append(e, size(at.Child("log"), r.Log, allowEmpty)...)
	e = append(e, size(at.Child("logRate"), r.LogRate, allowEmpty)...)
	e = append(e, size(at.Child("shm"), r.Shm, allowEmpty)...)
	if r.StepTimeout != "" {
		e = append(e, duration(at.Child("stepTimeout"), r.StepTimeout, time.Second, longest)...)
	}
	if len(e) > 0 {
		return e
	}
	if err := r.Limits().Validate(); err != nil {
		e = append(e, field.Invalid(at, "", err.Error()))
	}
	return e
}

// Limits returns r in the terms of a sandbox.
func (r *Resources) Limits() sandbox.Limits {
	return sandbox.Limits{
		CPUMillis: r.CPU.Millis(), MemoryBytes: r.Memory.Bytes(0), DiskBytes: r.Disk.Bytes(0), PIDs: r.PIDs, Inodes: r.Inodes, OpenFiles: r.OpenFiles,
		LogBytes: r.Log.Bytes(0), LogRate: r.LogRate.Bytes(0), ShmBytes: r.Shm.Bytes(0), Timeout: r.StepTimeout.Value(),
	}
}

// within checks that what a build gets is not more than it may ask for.
func within(at *field.Path, r, limit Resources) field.ErrorList {
	var e field.ErrorList
	for _, f := range []struct {
		name      string
		is, limit int64
	}{
		{"cpu", r.CPU.Millis(), limit.CPU.Millis()}, {"memory", r.Memory.Bytes(0), limit.Memory.Bytes(0)},
		{"disk", r.Disk.Bytes(0), limit.Disk.Bytes(0)}, {"pids", r.PIDs, limit.PIDs}, {"inodes", r.Inodes, limit.Inodes},
		{"openFiles", r.OpenFiles, limit.OpenFiles}, {"log", r.Log.Bytes(0), limit.Log.Bytes(0)}, {"logRate", r.LogRate.Bytes(0), limit.LogRate.Bytes(0)},
		{"shm", r.Shm.Bytes(0), limit.Shm.Bytes(0)}, {"stepTimeout", int64(r.StepTimeout.Value()), int64(limit.StepTimeout.Value())},
	} {
		if f.limit > 0 && f.is > f.limit {
			e = append(e, field.Invalid(at.Child(f.name), f.is, "must not be more than maxResources."+f.name))
		}
	}
	return e
}

// registries checks patterns of image names.
func registries(at *field.Path, patterns []string) field.ErrorList {
	var e field.ErrorList
	for i, p := range patterns {
		host, repo, hasRepo := strings.Cut(p, "/")
		host = strings.TrimPrefix(host, "*.")
		name, port, hasPort := strings.Cut(host, ":")
		_, portErr := strconv.ParseUint(port, 10, 16)
		if len(validation.IsDNS1123Subdomain(name)) > 0 || hasPort && portErr != nil || hasRepo && (repo == "" || path.Clean("/"+repo) != "/"+repo || strings.ContainsAny(repo, "*:@")) {
			e = append(e, field.Invalid(at.Index(i), p, `want a host, or a host and the start of a path, such as "registry.example.com/team-a"`))
		}
	}
	return e
}
