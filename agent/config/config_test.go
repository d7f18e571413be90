package config

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const head = "apiVersion: config.kiln.build/v1alpha1\nkind: AgentConfiguration\n"

func full(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile("testdata/full.yaml")
	require.NoError(t, err)
	return string(data)
}

func load(data string) (*Agent, error) {
	c, err := Decode([]byte(data))
	if err != nil {
		return nil, err
	}
	return c, c.Complete()
}

// TestEncodeKeepsEverything reads a file with every field and writes it again.
func TestEncodeKeepsEverything(t *testing.T) {
	c, err := load(full(t))
	require.NoError(t, err)
	out, err := c.Encode()
	require.NoError(t, err)
	require.YAMLEq(t, full(t), string(out))
	again, err := load(string(out))
	require.NoError(t, err)
	require.Equal(t, c, again)
}

func TestDefaults(t *testing.T) {
	c, err := load(head)
	require.NoError(t, err)
	require.Nil(t, c.Listeners.TCP)
	require.Equal(t, &Unix{Path: DefaultSocket, Mode: "0660"}, c.Listeners.Unix)
	require.Equal(t, "127.0.0.1:9131", c.Metrics.Address)
	require.Equal(t, []string{"gvisor", "userns"}, c.Sandboxes.Enabled)
	require.Equal(t, time.Hour, c.Tenants.Defaults.DefaultTimeout.Value())
	out, err := c.Encode()
	require.NoError(t, err)
	again, err := load(string(out))
	require.NoError(t, err)
	require.Equal(t, c, again)
	require.NoError(t, new(Agent).Complete(), "no file at all")
}

func TestRefused(t *testing.T) {
	tls := "    tls: {certFile: /c, keyFile: /k}\n"
	tests := []struct{ name, file, want string }{
		{"unknown field", head + "listeners:\n  unix:\n    pth: /x\n", `unknown field "listeners.unix.pth"`},
		{"unknown field in a list", head + "listeners:\n  tcp:\n    clients:\n    - cn: x\n", `unknown field "listeners.tcp.clients[0].cn"`},
		{"field in other case", head + "Root: /x\n", `unknown field "Root"`},
		{"repeated field", head + "gc:\n  minFree: 1Gi\n  maxUsed: 1Gi\n  minFree: 2Gi\n", `line 6: duplicate field "gc.minFree", first set in line 4`},
		{"repeated section", head + "gc: {}\ngc: {}\n", `duplicate field "gc"`},
		{"repeated tenant", head + "tenants:\n  overrides:\n    a: {}\n    a: {}\n", `duplicate field "tenants.overrides.a"`},
		{"another kind", strings.Replace(head, "Agent", "Controller", 1), `kind "ControllerConfiguration"`},
		{"no kind", "root: /x\n", `want "config.kiln.build/v1alpha1"`},
		{"a second document", head + "---\n" + head, "want one document"},
		{"alias", head + "gc: &a {}\nrecords: *a\n", "records: aliases are not supported"},
		{"not YAML", "{", "read configuration"},
		{"wrong type", head + "builds: {slots: many}\n", "builds.slots"},
		{"wrong type of size", head + "gc: {minFree: []}\n", "gc.minFree"},
		{"relative root", head + "root: var\n", `root: Invalid value: "var"`},
		{"root that escapes", head + "root: /var/../etc\n", `root: Invalid value`},
		{"root with a colon", head + "root: /a:b\n", "cannot be used in overlay mounts"},
		{"socket path too long", head + "listeners: {unix: {path: /" + strings.Repeat("a", 120) + "}}\n", "listeners.unix.path: Too long"},
		{"mode in decimal", head + "listeners: {unix: {mode: \"0888\"}}\n", "listeners.unix.mode"},
		{"mode with setuid", head + "listeners: {unix: {mode: \"4755\"}}\n", "listeners.unix.mode"},
		{"peer without ID", head + "listeners: {unix: {peers: [{tenant: a}]}}\n", "listeners.unix.peers[0]: Required"},
		{"peer that is root", head + "listeners: {unix: {peers: [{uid: 0, tenant: a}]}}\n", "listeners.unix.peers[0].uid"},
		{"peer that nobody is", head + "listeners: {unix: {peers: [{uid: 65534, tenant: a}]}}\n", "listeners.unix.peers[0].uid"},
		{"peer of a path", head + "listeners: {unix: {peers: [{uid: 1, tenant: ../a}]}}\n", "listeners.unix.peers[0].tenant"},
		{"TCP without TLS", head + "listeners: {tcp: {address: \":1\"}}\n", "listeners.tcp.tls: Required"},
		{"TCP without TLS on loopback", head + "listeners: {tcp: {address: \"127.0.0.1:1\"}}\n", "listeners.tcp.tls: Required"},
		{"insecure beyond the node", head + "listeners: {tcp: {address: \"10.0.0.1:1\", insecureLoopback: true}}\n", "listeners.tcp.insecureLoopback"},
		{"insecure on all addresses", head + "listeners: {tcp: {address: \":1\", insecureLoopback: true}}\n", "listeners.tcp.insecureLoopback"},
		{"insecure on a name", head + "listeners: {tcp: {address: \"localhost:1\", insecureLoopback: true}}\n", "listeners.tcp.insecureLoopback"},
		{"insecure and TLS", head + "listeners:\n  tcp:\n    address: 127.0.0.1:1\n    insecureLoopback: true\n" + tls, "goes with neither"},
		{"TLS for nobody", head + "listeners:\n  tcp:\n    address: \":1\"\n" + tls, "else nobody could call"},
		{"clients without authorities", head + "listeners:\n  tcp:\n    address: \":1\"\n    clients: [{commonName: a, role: controller}]\n" + tls, "listeners.tcp.tls.clientCAFiles: Required"},
		{"client that matches all", head + "listeners:\n  tcp:\n    address: \":1\"\n    clients: [{role: controller}]\n" + tls, "listeners.tcp.clients[0]: Required"},
		{"client that is admin", head + "listeners:\n  tcp:\n    address: \":1\"\n    clients: [{commonName: a, role: admin}]\n" + tls, `listeners.tcp.clients[0].role: Unsupported value: "admin"`},
		{"controller with a tenant", head + "listeners:\n  tcp:\n    address: \":1\"\n    clients: [{commonName: a, role: controller, tenant: a}]\n" + tls, "listeners.tcp.clients[0].tenant: Forbidden"},
		{"client without a tenant", head + "listeners:\n  tcp:\n    address: \":1\"\n    clients: [{commonName: a, role: tenant}]\n" + tls, "listeners.tcp.clients[0].tenant"},
		{"verdicts that hold for long", head + "listeners:\n  tcp:\n    address: \":1\"\n    tokens: {cacheTTL: 1h}\n" + tls, "listeners.tcp.tokens.cacheTTL"},
		{"unknown sandbox", head + "sandboxes: {enabled: [runc], default: runc}\n", `unknown sandbox "runc"`},
		{"no sandbox", head + "sandboxes: {enabled: []}\n", "sandboxes.enabled: Required"},
		{"default sandbox that is off", head + "sandboxes: {enabled: [userns]}\n", `sandboxes.default: Unsupported value: "gvisor"`},
		{"front end without a digest", head + "frontends: [docker/dockerfile]\n", "frontends[0]"},
		{"negative slots", head + "builds: {slots: -1}\n", "builds.slots"},
		{"bad size", head + "resources: {memory: lots}\n", "resources.memory"},
		{"negative size", head + "resources: {memory: -1Gi}\n", "resources.memory"},
		{"huge size", head + "resources: {memory: 9E}\n", "resources.memory"},
		{"size with an exponent", head + "resources: {memory: 1e99999999}\n", "resources.memory"},
		{"percentage of processors", head + "resources: {cpu: 50%}\n", "resources.cpu"},
		{"more than all", head + "gc: {minFree: 101%}\n", "gc.minFree"},
		{"reserved more than used", head + "gc: {reserved: 70%, maxUsed: 60%}\n", "gc.reserved"},
		{"duration that is a number", head + "records: {maxAge: 7}\n", "records.maxAge"},
		{"upload kept too long", head + "uploads: {ttl: 2h}\n", "uploads.ttl"},
		{"denied host name", head + "fetch: {deny: [10.0.0.0/8, kubernetes]}\n", "fetch.deny[1]"},
		{"exception that is no address", head + "fetch: {allow: [a, \"http://b\"]}\n", "fetch.allow[1]"},
		{"exception with bits beyond its length", head + "fetch: {allow: [10.0.0.1/8]}\n", `did you mean "10.0.0.0/8"?`},
		{"relative socket", head + "nodeRuntime: {socket: unix:///x}\n", "nodeRuntime.socket"},
		{"sampling without endpoint", head + "tracing: {samplingRatePerMillion: 1}\n", "tracing.endpoint: Required"},
		{"sampling more than all", head + "tracing: {endpoint: \"a:1\", samplingRatePerMillion: 1000001}\n", "tracing.samplingRatePerMillion"},
		{"address without port", head + "metrics: {address: localhost}\n", "metrics.address"},
		{"port that is none", head + "health: {address: \"1.2.3.4:http\"}\n", "health.address"},
		{"unknown level", head + "logging: {level: loud}\n", "logging.level"},
		{"tenant that is a path", head + "tenants: {overrides: {a/b: {}}}\n", "tenants.overrides[a/b]"},
		{"tenant's sandbox that is off", head + "sandboxes: {enabled: [gvisor]}\ntenants: {overrides: {a: {sandboxes: [userns]}}}\n", "tenants.overrides[a].sandboxes[0]"},
		{"tenant's default that it may not use", head + "tenants: {overrides: {a: {sandboxes: [userns], defaultSandbox: gvisor}}}\n", "tenants.overrides[a].defaultSandbox"},
		{"host network", head + "tenants: {defaults: {network: host}}\n", "tenants.defaults.network"},
		{"destination that is a URL", head + "tenants: {defaults: {destinations: {allow: [a.example, \"https://b\"]}}}\n", "tenants.defaults.destinations.allow[1]"},
		{"denied destination by name", head + "tenants: {overrides: {a: {destinations: {deny: [b.example]}}}}\n", "tenants.overrides[a].destinations.deny[0]"},
		{"timeout above the most", head + "tenants: {defaults: {defaultTimeout: 2h, maxTimeout: 1h}}\n", "tenants.defaults.defaultTimeout"},
		{"resources above the most", head + "tenants: {defaults: {defaultResources: {memory: 2Gi}, maxResources: {memory: 1Gi}}}\n", "tenants.defaults.defaultResources.memory"},
		{"more builds of a tenant than of all", head + "records: {maxBuilds: 10, maxBuildsPerTenant: 11}\n", "records.maxBuildsPerTenant"},
		{"clients that are neither", head + "tenants: {defaults: {buildKitClients: \"yes\"}}\n", "tenants.defaults.buildKitClients"},
		{"image on the node with a tag", head + "tenants: {defaults: {nodeImages: [\"a/b:c\"]}}\n", "tenants.defaults.nodeImages[0]"},
		{"registry that is a URL", head + "tenants: {defaults: {registries: {push: [\"https://a\"]}}}\n", "tenants.defaults.registries.push[0]"},
		{"registry with dots in its path", head + "tenants: {defaults: {registries: {pull: [\"a/../b\"]}}}\n", "tenants.defaults.registries.pull[0]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(tt.file)
			require.ErrorContains(t, err, tt.want)
		})
	}
	_, err := Decode(make([]byte, MaxSize+1))
	require.ErrorContains(t, err, "larger than")
}

// TestAllProblemsAtOnce wants one run to show everything that is wrong.
func TestAllProblemsAtOnce(t *testing.T) {
	_, err := load(head + "root: x\ngc: {minFree: 1Zi}\nlogging: {level: z}\n")
	require.ErrorContains(t, err, "root: ")
	require.ErrorContains(t, err, "gc.minFree: ")
	require.ErrorContains(t, err, "logging.level: ")
}

func TestPolicy(t *testing.T) {
	c, err := load(full(t))
	require.NoError(t, err)

	other := c.Policy("other")
	require.Equal(t, c.Tenants.Defaults, other)

	a := c.Policy("team-a")
	require.Equal(t, []string{"gvisor", "userns"}, a.Sandboxes)
	require.Equal(t, "gvisor", a.DefaultSandbox)
	require.Equal(t, 8*time.Hour, a.MaxTimeout.Value())
	require.Equal(t, 30*time.Minute, a.DefaultTimeout.Value())
	require.Equal(t, []string{"registry.example.com:5000/team-a"}, a.Registries.Push)
	require.Equal(t, other.Registries.Pull, a.Registries.Pull)

	u := c.Policy("untrusted")
	require.Equal(t, NetworkNone, u.Network)
	require.Equal(t, 10*time.Minute, u.DefaultTimeout.Value(), "the default is no more than the most")

	c, err = load(head + "tenants:\n  defaults: {defaultSandbox: gvisor}\n  overrides:\n    b: {sandboxes: [userns]}\n")
	require.NoError(t, err)
	require.Equal(t, "userns", c.Policy("b").DefaultSandbox)
	require.Equal(t, []string{"gvisor", "userns"}, c.Policy("").Sandboxes)
}

func TestValues(t *testing.T) {
	require.EqualValues(t, 512<<20, Size("512Mi").Bytes(0))
	require.EqualValues(t, 1<<29, Size("50%").Bytes(1<<30))
	require.EqualValues(t, 3500, Size("3500m").Millis())
	require.EqualValues(t, 2000, Size("2").Millis())
	require.Zero(t, Auto.Bytes(1))
	require.Zero(t, Auto.Millis())
	require.Zero(t, Duration("").Value())
	c, err := load(head + "gc: {minFree: 1000000}\n")
	require.NoError(t, err)
	require.EqualValues(t, 1000000, c.GC.MinFree.Bytes(0))
}

func FuzzDecode(f *testing.F) {
	f.Add(full(f))
	f.Add(head)
	f.Add(head + "gc: {minFree: 1e400}\nrecords: {maxAge: 9999999h}\n")
	f.Add(head + "listeners: {tcp: {address: \"[::1]:1\", insecureLoopback: true}}\n")
	f.Add("a: &a [*a]\n")
	f.Fuzz(func(t *testing.T, data string) {
		c, err := load(data)
		if err != nil {
			return
		}
		out, err := c.Encode()
		require.NoError(t, err)
		again, err := load(string(out))
		require.NoError(t, err, "%s", out)
		require.Equal(t, c, again)
	})
}

func TestBuildKitClientsAreHeldToPolicy(t *testing.T) {
	tests := map[string]bool{
		"{}":                                      true,
		"{sandboxes: [userns]}":                   true,
		"{network: none}":                         false,
		"{maxResources: {memory: 1Gi}}":           false,
		"{registries: {push: [a.example.com]}}":   false,
		"{network: none, buildKitClients: allow}": true,
		"{buildKitClients: deny}":                 false,
	}
	for policy, want := range tests {
		c, err := load(head + "tenants: {overrides: {a: " + policy + "}}\n")
		require.NoError(t, err, policy)
		got, why := c.Policy("a").AllowsBuildKit()
		require.Equal(t, want, got, policy)
		require.Equal(t, want, why == "", policy)
	}
}
