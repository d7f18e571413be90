// Package config is the configuration file of the controller.
//
// It promises that a file with an unknown or repeated field or a value that cannot be
// is refused with the path of the field, all such problems at once, and that what a file
// leaves out has a default. Durations are written as Go writes them ("90s", "1h30m").
package config

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/sandbox/policy"
)

const (
	// APIVersion and Kind are the first fields of a file.
	APIVersion = "config.kiln.build/v1alpha1"
	// Kind names the type of the file.
	Kind = "ControllerConfiguration"
	// MaxSize bounds a file, in bytes.
	MaxSize = 1 << 20
)

// Controller is the configuration of the controller.
type Controller struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// Namespace that kiln runs in.
	Namespace string `json:"namespace"`
	// Agents says where agents are.
	Agents Agents `json:"agents"`
	// Sandboxes says what RuntimeClasses mean.
	Sandboxes Sandboxes `json:"sandboxes"`
	// Builds says how long builds wait for what.
	Builds Builds `json:"builds"`
	// LeaderElection makes one of several controllers act.
	LeaderElection LeaderElection `json:"leaderElection"`
	// Webhook answers the API server's questions about new objects.
	Webhook Webhook `json:"webhook"`
	// Subresources is the aggregated API of logs and uploads.
	Subresources Subresources `json:"subresources"`
	// Metrics is where Prometheus reads.
	Metrics HTTP `json:"metrics"`
	// Health is where probes ask.
	Health HTTP `json:"health"`
	// Logging is how much is written to standard error.
	Logging Logging `json:"logging"`
}

// Agents says where agents are.
type Agents struct {
	// Labels of their Pods, in the namespace.
	Labels map[string]string `json:"labels"`
	// Port that they listen on.
	Port int `json:"port"`
	// ServerName in their certificate; empty: kiln-agent.<namespace>.svc.
	ServerName string `json:"serverName"`
}

// Sandboxes says what RuntimeClasses mean.
type Sandboxes struct {
	// Handlers maps the handler of a RuntimeClass to a class of sandbox, "gvisor" or
	// "userns".
	Handlers map[string]string `json:"handlers"`
	// Default is the class of builds that name none where no SandboxPolicy decides.
	Default string `json:"default"`
}

// Builds says how long builds wait for what.
type Builds struct {
	// MaxConcurrentReconciles is how many builds are looked at at once.
	MaxConcurrentReconciles int `json:"maxConcurrentReconciles"`
	// MissingInputGrace is how long a new build waits for what it names.
	MissingInputGrace metav1.Duration `json:"missingInputGrace"`
	// NodeLossGrace is how long an agent may be silent before its builds are lost.
	NodeLossGrace metav1.Duration `json:"nodeLossGrace"`
	// ProbeTimeout is how long agents have to answer whether they can run a build.
	ProbeTimeout metav1.Duration `json:"probeTimeout"`
	// RetryInterval is how long a build that no node can take waits before they are asked
	// again.
	RetryInterval metav1.Duration `json:"retryInterval"`
	// StatusInterval is the shortest time between two writes of a running build's status,
	// but for changes of state.
	StatusInterval metav1.Duration `json:"statusInterval"`
	// SweepInterval is how often agents are asked for builds that no Build knows.
	SweepInterval metav1.Duration `json:"sweepInterval"`
}

// LeaderElection makes one of several controllers act.
type LeaderElection struct {
	// Disabled lets this one act without asking.
	Disabled bool `json:"disabled,omitempty"`
	// LeaseName is the name of the Lease in the namespace.
	LeaseName string `json:"leaseName"`
	// LeaseDuration is how long others wait for a leader that is silent.
	LeaseDuration metav1.Duration `json:"leaseDuration"`
	// RenewDeadline is how long a leader tries to renew before it gives up.
	RenewDeadline metav1.Duration `json:"renewDeadline"`
	// RetryPeriod is how often it is tried.
	RetryPeriod metav1.Duration `json:"retryPeriod"`
}

// Webhook answers the API server's questions.
type Webhook struct {
	// Address is host:port.
	Address string `json:"address"`
	// Service that reaches it.
	Service string `json:"service"`
	// Configuration is the name of the ValidatingWebhookConfiguration whose CA is kept
	// current.
	Configuration string `json:"configuration"`
}

// Subresources is the aggregated API.
type Subresources struct {
	// Address is host:port.
	Address string `json:"address"`
	// APIService is the name of the APIService whose CA is kept current.
	APIService string `json:"apiService"`
	// MaxUploadBytes bounds one upload.
	MaxUploadBytes int64 `json:"maxUploadBytes"`
}

// HTTP is where a plain HTTP server listens.
type HTTP struct {
	// Address is host:port; "0": nowhere.
	Address string `json:"address"`
}

// Logging is how much is written to standard error.
type Logging struct {
	// Level is debug, info, warn or error.
	Level string `json:"level"`
	// Format is json or text.
	Format string `json:"format"`
}

// Default returns the configuration of an empty file.
func Default() *Controller {
	seconds := func(n int) metav1.Duration { return metav1.Duration{Duration: time.Duration(n) * time.Second} }
	return &Controller{
		APIVersion: APIVersion, Kind: Kind, Namespace: "kiln-system",
		Agents:    Agents{Labels: map[string]string{"app.kubernetes.io/name": "kiln-agent"}, Port: 7420},
		Sandboxes: Sandboxes{Handlers: map[string]string{"runsc": policy.GVisor, "kiln-gvisor": policy.GVisor, "runc": policy.Userns, "kiln-userns": policy.Userns}, Default: policy.GVisor},
		Builds: Builds{
			MaxConcurrentReconciles: 16, MissingInputGrace: seconds(30), NodeLossGrace: seconds(60), ProbeTimeout: seconds(2),
			RetryInterval: seconds(5), StatusInterval: seconds(1), SweepInterval: seconds(60),
		},
		LeaderElection: LeaderElection{LeaseName: "kiln-controller", LeaseDuration: seconds(15), RenewDeadline: seconds(10), RetryPeriod: seconds(2)},
		Webhook:        Webhook{Address: ":9443", Service: "kiln-controller", Configuration: "kiln-controller"},
		Subresources:   Subresources{Address: ":9444", APIService: "v1alpha1.subresources.kiln.build", MaxUploadBytes: 1 << 30},
		Metrics:        HTTP{Address: ":9131"}, Health: HTTP{Address: ":9132"},
		Logging: Logging{Level: "info", Format: "json"},
	}
}

// Decode reads a file over the defaults. Maps that a file sets replace the default's.
func Decode(data []byte) (*Controller, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("read configuration: larger than %d bytes", MaxSize)
	}
	c := Default()
	labels, handlers := c.Agents.Labels, c.Sandboxes.Handlers
	c.Agents.Labels, c.Sandboxes.Handlers = nil, nil
	if err := yaml.UnmarshalStrict(data, c); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if c.Agents.Labels == nil {
		c.Agents.Labels = labels
	}
	if c.Sandboxes.Handlers == nil {
		c.Sandboxes.Handlers = handlers
	}
	if c.APIVersion != APIVersion || c.Kind != Kind {
		return nil, fmt.Errorf("read configuration: apiVersion %q, kind %q: want %q and %q", c.APIVersion, c.Kind, APIVersion, Kind)
	}
	return c, nil
}

// Complete fills in what depends on other fields, and checks everything.
func (c *Controller) Complete() error {
	if c.Agents.ServerName == "" {
		c.Agents.ServerName = "kiln-agent." + c.Namespace + ".svc"
	}
	if problems := c.problems(); len(problems) > 0 {
		return fmt.Errorf("check configuration: %w", problems.ToAggregate())
	}
	return nil
}

func (c *Controller) problems() field.ErrorList {
	var all field.ErrorList
	bad := func(path string, value any, message string) {
		all = append(all, field.Invalid(field.NewPath(path), value, message))
	}
	for _, m := range validation.IsDNS1123Label(c.Namespace) {
		bad("namespace", c.Namespace, m)
	}
	if len(c.Agents.Labels) == 0 {
		bad("agents.labels", "", "at least one label is needed")
	}
	if c.Agents.Port < 1 || c.Agents.Port > 65535 {
		bad("agents.port", c.Agents.Port, "must be from 1 to 65535")
	}
	for handler, class := range c.Sandboxes.Handlers {
		if class != policy.GVisor && class != policy.Userns {
			bad("sandboxes.handlers["+handler+"]", class, "must be gvisor or userns")
		}
	}
	if c.Sandboxes.Default != policy.GVisor && c.Sandboxes.Default != policy.Userns {
		bad("sandboxes.default", c.Sandboxes.Default, "must be gvisor or userns")
	}
	if n := c.Builds.MaxConcurrentReconciles; n < 1 || n > 1024 {
		bad("builds.maxConcurrentReconciles", n, "must be from 1 to 1024")
	}
	b, l := &c.Builds, &c.LeaderElection
	for path, d := range map[string]metav1.Duration{
		"builds.missingInputGrace": b.MissingInputGrace, "builds.nodeLossGrace": b.NodeLossGrace, "builds.probeTimeout": b.ProbeTimeout,
		"builds.retryInterval": b.RetryInterval, "builds.statusInterval": b.StatusInterval, "builds.sweepInterval": b.SweepInterval,
		"leaderElection.leaseDuration": l.LeaseDuration, "leaderElection.renewDeadline": l.RenewDeadline, "leaderElection.retryPeriod": l.RetryPeriod,
	} {
		if d.Duration <= 0 {
			bad(path, d.Duration.String(), "must be more than 0")
		}
	}
	if l.RenewDeadline.Duration >= l.LeaseDuration.Duration {
		bad("leaderElection.renewDeadline", l.RenewDeadline.Duration.String(), "must be less than leaderElection.leaseDuration")
	}
	for path, addr := range map[string]string{"webhook.address": c.Webhook.Address, "subresources.address": c.Subresources.Address} {
		if _, _, err := SplitAddress(addr); err != nil {
			bad(path, addr, err.Error())
		}
	}
	if c.Subresources.MaxUploadBytes <= 0 {
		bad("subresources.maxUploadBytes", c.Subresources.MaxUploadBytes, "must be more than 0")
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Logging.Level) {
		bad("logging.level", c.Logging.Level, "must be debug, info, warn or error")
	}
	if !slices.Contains([]string{"json", "text"}, c.Logging.Format) {
		bad("logging.format", c.Logging.Format, "must be json or text")
	}
	slices.SortFunc(all, func(x, y *field.Error) int {
		if x.Field < y.Field {
			return -1
		}
		return 1
	})
	return all
}

// SplitAddress returns host and port of an address.
func SplitAddress(addr string) (string, int, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("port %q: must be from 0 to 65535", port)
	}
	return host, int(n), nil
}
