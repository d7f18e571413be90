package config

const (
	// APIVersion and Kind are the first fields of a file.
	APIVersion = "config.kiln.build/v1alpha1"
	// Kind names the type of the file.
	Kind = "AgentConfiguration"
)

// Agent is the configuration of one agent. Decode reads one from a file; Complete
// then makes it whole and checks it. Nothing else takes one that is not complete.
type Agent struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// Root is the state directory, on a local file system that overlays can lie on.
	Root string `json:"root"`
	// NodeName is the name of the Kubernetes node; empty: the host name.
	NodeName string `json:"nodeName,omitempty"`
	// Listeners say where the agent is reached and who may call.
	Listeners Listeners `json:"listeners"`
	// Sandboxes say which classes of sandbox steps run in.
	Sandboxes Sandboxes `json:"sandboxes"`
	// Frontends lists external Dockerfile front ends that builds may name, each an
	// image reference with a digest. The Dockerfile front end is built in.
	Frontends []string `json:"frontends,omitempty"`
	// Builds bounds how many builds run and wait.
	Builds Builds `json:"builds"`
	// Resources is what all builds together may use of the node.
	Resources NodeResources `json:"resources"`
	// Tenants is the policy of tenants.
	Tenants Tenants `json:"tenants"`
	// GC bounds the disk that the cache occupies.
	GC GC `json:"gc"`
	// Records bounds what is kept of builds that have ended.
	Records Records `json:"records"`
	// Uploads bounds sources that clients upload.
	Uploads Uploads `json:"uploads"`
	// Fetch bounds what the agent itself connects to for a build.
	Fetch Fetch `json:"fetch,omitzero"`
	// NodeRuntime is the container runtime that lends and receives layers.
	NodeRuntime NodeRuntime `json:"nodeRuntime"`
	// Tracing sends spans to a collector.
	Tracing Tracing `json:"tracing"`
	// Metrics is where Prometheus reads.
	Metrics HTTP `json:"metrics"`
	// Health is where probes ask.
	Health HTTP `json:"health"`
	// Logging is how much the agent writes to standard error.
	Logging Logging `json:"logging"`
}

// Listeners are the two ways to the agent. One must be there.
type Listeners struct {
	// Unix is a socket on the node; its peers are known by their user ID.
	Unix *Unix `json:"unix,omitempty"`
	// TCP is reached from other nodes.
	TCP *TCP `json:"tcp,omitempty"`
}

// Unix is a socket in the node's file system. Root is an administrator.
type Unix struct {
	// Path of the socket; its directory is made when it is not there.
	Path string `json:"path"`
	// Mode of the socket, in octal. It need not keep callers out: only root and
	// Peers are served.
	Mode string `json:"mode"`
	// Peers are users and groups other than root that may call. The first that
	// matches counts.
	Peers []Peer `json:"peers,omitempty"`
}

// Peer gives a local user or group a tenant.
type Peer struct {
	// UID is a user ID; unset: any.
	UID *uint32 `json:"uid,omitempty"`
	// GID is the ID of the process's own group; supplementary groups do not count.
	// Unset: any.
	GID *uint32 `json:"gid,omitempty"`
	// Tenant is who it builds for.
	Tenant string `json:"tenant"`
}

// TCP is a listener with TLS 1.3, or a plain one on loopback.
type TCP struct {
	// Address is host:port; with an empty host all addresses of the node.
	Address string `json:"address"`
	// TLS has the keys. It may be unset only with InsecureLoopback.
	TLS *TLS `json:"tls,omitempty"`
	// Clients say who the holder of a verified certificate is. The first that
	// matches counts; who matches none is refused.
	Clients []Client `json:"clients,omitempty"`
	// Tokens accepts ServiceAccount tokens from clients that show no certificate.
	Tokens *Tokens `json:"tokens,omitempty"`
	// InsecureLoopback serves everyone on the node as tenant "default", with no TLS
	// and no authentication. The address must then be on loopback.
	InsecureLoopback bool `json:"insecureLoopback,omitempty"`
}

// TLS names files, which are read again when they change.
type TLS struct {
	// CertFile is the server's certificate with its chain, in PEM.
	CertFile string `json:"certFile"`
	// KeyFile is its private key, in PEM.
	KeyFile string `json:"keyFile"`
	// ClientCAFiles hold the authorities of client certificates, in PEM.
	ClientCAFiles []string `json:"clientCAFiles,omitempty"`
}

// Client maps certificates to what their holder may do. All fields that are set
// among CommonName, URI and Organization must match.
type Client struct {
	// CommonName of the certificate's subject.
	CommonName string `json:"commonName,omitempty"`
	// URI is one of its URI names, such as a SPIFFE ID.
	URI string `json:"uri,omitempty"`
	// Organization is one of its subject's organizations.
	Organization string `json:"organization,omitempty"`
	// Role is "controller" or "tenant".
	Role string `json:"role"`
	// Tenant is whom a tenant builds for; empty for a controller.
	Tenant string `json:"tenant,omitempty"`
}

// Tokens has ServiceAccount tokens reviewed by the Kubernetes API server. A
// ServiceAccount's tenant is its namespace, and it must be allowed to create
// builds.kiln.build there.
type Tokens struct {
	// Audiences that a token must be for, one of them.
	Audiences []string `json:"audiences"`
	// Kubeconfig reaches the API server; empty: as a Pod does.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// CacheTTL is how long a verdict holds; at most 10m.
	CacheTTL Duration `json:"cacheTTL"`
	// CacheEntries is how many verdicts are kept.
	CacheEntries int `json:"cacheEntries"`
}

// Sandboxes are the classes of sandbox of the node.
type Sandboxes struct {
	// Default is the class of builds that name none.
	Default string `json:"default"`
	// Enabled lists the classes that builds may use: "gvisor", "userns".
	Enabled []string `json:"enabled"`
	// RunscPath is runsc for gvisor; empty: beside this program or on the PATH.
	RunscPath string `json:"runscPath,omitempty"`
}

// Builds bounds builds of all tenants together.
type Builds struct {
	// Slots is how many builds run at once; 0: one for every two processors, at
	// least two.
	Slots int `json:"slots"`
	// QueueLimit is how many may wait.
	QueueLimit int `json:"queueLimit"`
	// MinFreeDisk is what must be free on the file system of root, besides what a
	// build reserves, for it to start.
	MinFreeDisk Size `json:"minFreeDisk"`
	// DrainTimeout is how long running builds may go on after the agent was told to
	// end; those that have not ended by then end as interrupted.
	DrainTimeout Duration `json:"drainTimeout"`
}

// NodeResources is what builds may use of the node, "auto" or fixed.
type NodeResources struct {
	// CPU in processors, such as "3500m"; "auto": those that the agent may use.
	CPU Size `json:"cpu"`
	// Memory in bytes, or as a percentage of the node's; "auto": 80% of what the
	// agent may use.
	Memory Size `json:"memory"`
	// Disk in bytes, or as a percentage of the file system of root, that running
	// builds may reserve together; "auto": what is free when one starts.
	Disk Size `json:"disk"`
}

// Tenants is the policy of every tenant, and what is other for some.
type Tenants struct {
	// Defaults hold for every tenant.
	Defaults Policy `json:"defaults"`
	// Overrides are by tenant; a field that is set replaces that of Defaults.
	Overrides map[string]Policy `json:"overrides,omitempty"`
	// SandboxPolicies has the cluster's SandboxPolicies hold too, whose namespaces are
	// the tenants; unset: only what is written here holds.
	SandboxPolicies *SandboxPolicies `json:"sandboxPolicies,omitempty"`
}

// SandboxPolicies are objects of the Kubernetes API server. Until they have been read
// every build is refused.
type SandboxPolicies struct {
	// Kubeconfig reaches the API server; empty: as a Pod does.
	Kubeconfig string `json:"kubeconfig,omitempty"`
}

// Policy is what the builds of a tenant may do.
type Policy struct {
	// Sandboxes are the classes that its builds may ask for; none: all that are
	// enabled.
	Sandboxes []string `json:"sandboxes,omitempty"`
	// DefaultSandbox is the class of builds that ask for none, and of BuildKit's
	// clients, which cannot ask; empty: sandboxes.default if the tenant may use it,
	// else the first that it may.
	DefaultSandbox string `json:"defaultSandbox,omitempty"`
	// Network is the most that steps can reach: "egress" or "none".
	Network string `json:"network,omitempty"`
	// Destinations are what its builds may connect to.
	Destinations Destinations `json:"destinations,omitzero"`
	// DefaultTimeout is how long a build may run that does not say.
	DefaultTimeout Duration `json:"defaultTimeout,omitempty"`
	// MaxTimeout is the most that a build may ask for.
	MaxTimeout Duration `json:"maxTimeout,omitempty"`
	// DefaultResources are the limits of a build that does not say.
	DefaultResources Resources `json:"defaultResources,omitzero"`
	// MaxResources are the most that a build may ask for.
	MaxResources Resources `json:"maxResources,omitzero"`
	// MaxRunning and MaxQueued bound the tenant's builds; 0: as all together.
	MaxRunning int `json:"maxRunning,omitempty"`
	// MaxQueued bounds those that wait.
	MaxQueued int `json:"maxQueued,omitempty"`
	// Registries bound where images come from and go to.
	Registries Registries `json:"registries,omitzero"`
	// Frontends are what may read a build's definition: "builtin", and patterns, as in
	// Registries, of the front ends that the node's frontends list; none: all of these.
	Frontends []string `json:"frontends,omitempty"`
	// Mounts are types of mounts that steps may have besides content of the build:
	// "cache", "secret", "ssh", "tmpfs"; none: all.
	Mounts []string `json:"mounts,omitempty"`
	// NodeImages are patterns, as in Registries, of names under which its builds may
	// store images in the node's runtime, where Pods find them; none: nowhere.
	NodeImages []string `json:"nodeImages,omitempty"`
	// BuildKitClients says whether buildctl and docker buildx may build: "allow",
	// "deny", or "auto". What they build runs in the tenant's default sandbox. Its steps
	// are held to network, maxResources and mounts; but nobody can tell before what it
	// asks for, where its images come from and how long it takes. So "auto" allows them
	// only when network, maxResources and registries limit nothing.
	BuildKitClients string `json:"buildKitClients,omitempty"`
}

// Destinations are what builds may connect to: their steps, and what fetches sources and
// images for them. What is denied to all, as Fetch has it, stays so, except what Allow
// names: an address or CIDR that lies within it.
type Destinations struct {
	// Allow is all that may be reached: CIDRs, addresses, host names and domains
	// ("*.example.org", for its subdomains), each with ":" and a port if need be. Only
	// these names are resolved. None: all that is not denied.
	Allow []string `json:"allow,omitempty"`
	// Deny has CIDRs and addresses that may not be reached besides.
	Deny []string `json:"deny,omitempty"`
}

// Resources are limits of each step of a build. Empty fields are unlimited, or have the
// default of a sandbox.
type Resources struct {
	// CPU in processors.
	CPU Size `json:"cpu,omitempty"`
	// Memory in bytes.
	Memory Size `json:"memory,omitempty"`
	// Disk in bytes.
	Disk Size `json:"disk,omitempty"`
	// PIDs is processes and threads.
	PIDs int64 `json:"pids,omitempty"`
	// Inodes is files and directories that a step makes.
	Inodes int64 `json:"inodes,omitempty"`
	// OpenFiles is files that a process may have open.
	OpenFiles int64 `json:"openFiles,omitempty"`
	// Log is output that is kept, in bytes, and LogRate is that in a second.
	Log     Size `json:"log,omitempty"`
	LogRate Size `json:"logRate,omitempty"`
	// Shm is the size of /dev/shm in bytes.
	Shm Size `json:"shm,omitempty"`
	// StepTimeout is how long a step may run.
	StepTimeout Duration `json:"stepTimeout,omitempty"`
}

// Registries are patterns of image names: a host ("registry.example.com:5000"), a
// host and the start of a path that ends where a name does
// ("registry.example.com/team-a"), or either after "*." for any subdomain. Docker
// Hub is "docker.io", its official images "docker.io/library".
type Registries struct {
	// Pull is where base images may come from; none: anywhere.
	Pull []string `json:"pull,omitempty"`
	// Push is where images may go; none: anywhere.
	Push []string `json:"push,omitempty"`
}

// GC bounds the cache of all tenants. Each is a size or a percentage of the file
// system of root.
type GC struct {
	// Reserved is what the cache may always keep.
	Reserved Size `json:"reserved"`
	// MaxUsed is what the cache may occupy.
	MaxUsed Size `json:"maxUsed"`
	// MinFree is what must stay free on the file system.
	MinFree Size `json:"minFree"`
}

// Records bounds what is kept of builds that have ended.
type Records struct {
	// MaxBuilds is how many are kept, and MaxBuildsPerTenant how many of one tenant.
	MaxBuilds          int `json:"maxBuilds"`
	MaxBuildsPerTenant int `json:"maxBuildsPerTenant"`
	// MaxAge is how long they are kept.
	MaxAge Duration `json:"maxAge"`
	// MaxLogBytes bounds the event log of one build, which says when it is cut.
	MaxLogBytes Size `json:"maxLogBytes"`
	// MaxTotalBytes bounds all records and event logs together.
	MaxTotalBytes Size `json:"maxTotalBytes"`
}

// Uploads bounds sources that clients upload.
type Uploads struct {
	// MaxBytes of one upload.
	MaxBytes Size `json:"maxBytes"`
	// MaxTotalBytes of all uploads of one tenant that are kept.
	MaxTotalBytes Size `json:"maxTotalBytes"`
	// MaxCount is how many of one tenant are kept.
	MaxCount int `json:"maxCount"`
	// TTL is how long one is kept that no build names, or parts of one that no other
	// follows; at most 1h.
	TTL Duration `json:"ttl"`
}

// Fetch bounds, by address, where sources by HTTP and git come from, which registries
// are reached, and what steps connect to. Never reached are the node's loopback and its
// other addresses, link-local addresses with metadata services, multicast, and the
// address that Pods have of the Kubernetes API server.
type Fetch struct {
	// Deny has more CIDRs, such as those of the cluster's Pods and Services.
	Deny []string `json:"deny,omitempty"`
	// Allow has exceptions for what the agent fetches, and not for steps: "10.1.0.0/16",
	// "10.1.2.3:5000", "registry.internal:5000", "*.internal". A host name may then lead
	// to any address.
	Allow []string `json:"allow,omitempty"`
	// DenyPrivate denies the addresses of private networks, such as 10.0.0.0/8, too.
	DenyPrivate bool `json:"denyPrivate,omitempty"`
}

// NodeRuntime is the container runtime next to the agent.
type NodeRuntime struct {
	// Socket is the path of its CRI socket; "" means that none is used.
	Socket string `json:"socket"`
}

// Tracing sends spans by OTLP over gRPC.
type Tracing struct {
	// Endpoint is host:port; empty: no tracing.
	Endpoint string `json:"endpoint,omitempty"`
	// Insecure sends without TLS.
	Insecure bool `json:"insecure,omitempty"`
	// SamplingRatePerMillion is how many of a million traces that begin here are
	// sent; those that callers sample are always sent.
	SamplingRatePerMillion *int32 `json:"samplingRatePerMillion,omitempty"`
}

// HTTP is a plain listener.
type HTTP struct {
	// Address is host:port; "0": none. Both listeners may have the same.
	Address string `json:"address"`
}

// Logging says what is logged.
type Logging struct {
	// Level is "debug", "info", "warn" or "error".
	Level string `json:"level"`
	// Format is "json" or "text".
	Format string `json:"format"`
}
