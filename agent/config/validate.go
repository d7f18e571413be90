package config

import (
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// Values that fields of text may have.
var (
	logLevels  = []string{"debug", "info", "warn", "error"}
	logFormats = []string{"json", "text"}
	networks   = []string{NetworkEgress, NetworkNone}
	clients    = []string{BuildKitAllow, BuildKitDeny, BuildKitAuto}
)

func (c *Agent) validate() field.ErrorList {
	var e field.ErrorList
	e = append(e, oneOf(field.NewPath("apiVersion"), c.APIVersion, []string{APIVersion})...)
	e = append(e, oneOf(field.NewPath("kind"), c.Kind, []string{Kind})...)
	e = append(e, absolute(field.NewPath("root"), c.Root)...)
	if strings.ContainsAny(c.Root, ":,\\\n") {
		e = append(e, field.Invalid(field.NewPath("root"), c.Root, "colons, commas, backslashes and line breaks cannot be used in overlay mounts"))
	}
	if c.NodeName != "" {
		e = append(e, dns(field.NewPath("nodeName"), c.NodeName, validation.IsDNS1123Subdomain)...)
	}
	e = append(e, c.Listeners.validate(field.NewPath("listeners"))...)
	e = append(e, c.Sandboxes.validate(field.NewPath("sandboxes"))...)
	for i, f := range c.Frontends {
		e = append(e, digested(field.NewPath("frontends").Index(i), f)...)
	}
	e = append(e, c.Builds.validate(field.NewPath("builds"))...)
	e = append(e, c.validateSizes()...)
	e = append(e, c.validateTenants(field.NewPath("tenants"))...)
	e = append(e, c.validateKept()...)
	for i, s := range c.Fetch.Deny {
		if _, err := egress.ParseRange(s, ""); err != nil {
			e = append(e, field.Invalid(field.NewPath("fetch", "deny").Index(i), s, err.Error()))
		}
	}
	for i, s := range c.Fetch.Allow {
		if _, err := egress.ParseException(s); err != nil {
			e = append(e, field.Invalid(field.NewPath("fetch", "allow").Index(i), s, err.Error()))
		}
	}
	e = append(e, c.validateHTTP()...)
	e = append(e, oneOf(field.NewPath("logging", "level"), c.Logging.Level, logLevels)...)
	e = append(e, oneOf(field.NewPath("logging", "format"), c.Logging.Format, logFormats)...)
	return e
}

func (s *Sandboxes) validate(at *field.Path) field.ErrorList {
	e := classes(at.Child("enabled"), s.Enabled)
	if len(s.Enabled) == 0 {
		e = append(e, field.Required(at.Child("enabled"), "at least one class"))
	}
	e = append(e, oneOf(at.Child("default"), s.Default, s.Enabled)...)
	if s.RunscPath != "" {
		e = append(e, absolute(at.Child("runscPath"), s.RunscPath)...)
	}
	return e
}

func (b *Builds) validate(at *field.Path) field.ErrorList {
	e := between(at.Child("slots"), int64(b.Slots), 0, 1024)
	e = append(e, between(at.Child("queueLimit"), int64(b.QueueLimit), 1, 100_000)...)
	e = append(e, size(at.Child("minFreeDisk"), b.MinFreeDisk, allowPercent)...)
	return append(e, duration(at.Child("drainTimeout"), b.DrainTimeout, 0, 24*time.Hour)...)
}

func (c *Agent) validateSizes() field.ErrorList {
	at := field.NewPath("resources")
	e := size(at.Child("cpu"), c.Resources.CPU, allowAuto)
	e = append(e, size(at.Child("memory"), c.Resources.Memory, allowAuto|allowPercent)...)
	e = append(e, size(at.Child("disk"), c.Resources.Disk, allowAuto|allowPercent)...)
	at = field.NewPath("gc")
	e = append(e, size(at.Child("reserved"), c.GC.Reserved, allowPercent)...)
	e = append(e, size(at.Child("maxUsed"), c.GC.MaxUsed, allowPercent)...)
	e = append(e, size(at.Child("minFree"), c.GC.MinFree, allowPercent)...)
	const whole = 1 << 50
	if _, bothPercent := c.GC.MaxUsed.percent(); len(e) == 0 && bothPercent == strings.HasSuffix(string(c.GC.Reserved), "%") &&
		c.GC.Reserved.Bytes(whole) > c.GC.MaxUsed.Bytes(whole) {
		e = append(e, field.Invalid(at.Child("reserved"), c.GC.Reserved, "must not be more than gc.maxUsed"))
	}
	return e
}

func (c *Agent) validateKept() field.ErrorList {
	at := field.NewPath("records")
	e := between(at.Child("maxBuilds"), int64(c.Records.MaxBuilds), 1, 100_000)
	e = append(e, between(at.Child("maxBuildsPerTenant"), int64(c.Records.MaxBuildsPerTenant), 1, int64(c.Records.MaxBuilds))...)
	e = append(e, size(at.Child("maxTotalBytes"), c.Records.MaxTotalBytes, 0)...)
	e = append(e, duration(at.Child("maxAge"), c.Records.MaxAge, time.Minute, 10*365*24*time.Hour)...)
	e = append(e, size(at.Child("maxLogBytes"), c.Records.MaxLogBytes, 0)...)
	at = field.NewPath("uploads")
	e = append(e, size(at.Child("maxBytes"), c.Uploads.MaxBytes, 0)...)
	e = append(e, size(at.Child("maxTotalBytes"), c.Uploads.MaxTotalBytes, 0)...)
	e = append(e, between(at.Child("maxCount"), int64(c.Uploads.MaxCount), 1, 100_000)...)
	e = append(e, duration(at.Child("ttl"), c.Uploads.TTL, time.Minute, time.Hour)...)
	if c.NodeRuntime.Socket != "" {
		e = append(e, absolute(field.NewPath("nodeRuntime", "socket"), c.NodeRuntime.Socket)...)
	}
	return e
}

func (c *Agent) validateHTTP() field.ErrorList {
	var e field.ErrorList
	if a := c.Metrics.Address; a != Off {
		_, bad := hostPort(field.NewPath("metrics", "address"), a)
		e = append(e, bad...)
	}
	if a := c.Health.Address; a != Off {
		_, bad := hostPort(field.NewPath("health", "address"), a)
		e = append(e, bad...)
	}
	at := field.NewPath("tracing")
	if c.Tracing.Endpoint == "" {
		if c.Tracing.Insecure || c.Tracing.SamplingRatePerMillion != nil {
			e = append(e, field.Required(at.Child("endpoint"), "without it nothing is traced"))
		}
		return e
	}
	_, bad := hostPort(at.Child("endpoint"), c.Tracing.Endpoint)
	e = append(e, bad...)
	return append(e, between(at.Child("samplingRatePerMillion"), int64(*c.Tracing.SamplingRatePerMillion), 0, 1_000_000)...)
}

// hostPort checks an address and returns its host.
func hostPort(at *field.Path, s string) (string, field.ErrorList) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", field.ErrorList{field.Invalid(at, s, `want host:port, such as "127.0.0.1:9131" or ":9131"`)}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return host, field.ErrorList{field.Invalid(at, s, "the port must be a number from 0 to 65535")}
	}
	if _, err := netip.ParseAddr(host); host != "" && err != nil && len(validation.IsDNS1123Subdomain(host)) > 0 {
		return host, field.ErrorList{field.Invalid(at, s, "the host must be an IP address or a host name")}
	}
	return host, nil
}

func oneOf(at *field.Path, s string, allowed []string) field.ErrorList {
	if slices.Contains(allowed, s) {
		return nil
	}
	return field.ErrorList{field.NotSupported(at, s, allowed)}
}

func classes(at *field.Path, names []string) field.ErrorList {
	var e field.ErrorList
	for i, n := range names {
		if _, err := sandbox.ParseClass(n); err != nil {
			e = append(e, field.Invalid(at.Index(i), n, err.Error()))
		}
		if slices.Contains(names[:i], n) {
			e = append(e, field.Duplicate(at.Index(i), n))
		}
	}
	return e
}

func dns(at *field.Path, s string, check func(string) []string) field.ErrorList {
	var e field.ErrorList
	for _, problem := range check(s) {
		e = append(e, field.Invalid(at, s, problem))
	}
	return e
}

func absolute(at *field.Path, path string) field.ErrorList {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return field.ErrorList{field.Invalid(at, path, `want an absolute path without "." and ".."`)}
	}
	return nil
}

func between(at *field.Path, n, low, high int64) field.ErrorList {
	if n < low || n > high {
		return field.ErrorList{field.Invalid(at, n, "must be from "+strconv.FormatInt(low, 10)+" to "+strconv.FormatInt(high, 10))}
	}
	return nil
}

func duration(at *field.Path, d Duration, low, high time.Duration) field.ErrorList {
	v, err := d.parse()
	if err != nil {
		return field.ErrorList{field.Invalid(at, d, err.Error())}
	}
	if v < low || v > high {
		return field.ErrorList{field.Invalid(at, d, "must be from "+low.String()+" to "+high.String())}
	}
	return nil
}

// What a Size may be besides a quantity.
const (
	allowAuto = 1 << iota
	allowPercent
	allowEmpty
)

func size(at *field.Path, s Size, allow int) field.ErrorList {
	switch {
	case s == Auto && allow&allowAuto != 0, s == "" && allow&allowEmpty != 0:
		return nil
	case strings.HasSuffix(string(s), "%"):
		if _, ok := s.percent(); !ok || allow&allowPercent == 0 {
			return field.ErrorList{field.Invalid(at, s, "is no percentage, or cannot be one here")}
		}
		return nil
	}
	if _, err := s.quantity(); err != nil {
		return field.ErrorList{field.Invalid(at, s, err.Error())}
	}
	return nil
}

func digested(at *field.Path, ref string) field.ErrorList {
	named, err := reference.ParseNormalizedNamed(ref)
	if err == nil {
		if _, ok := named.(reference.Digested); ok {
			return nil
		}
	}
	return field.ErrorList{field.Invalid(at, ref, "want an image reference with a digest, as in name@sha256:…")}
}
