// Package server is the agent on its listeners: the gRPC server with the build API,
// BuildKit's API, health and reflection, and the HTTP pages for probes and
// Prometheus.
//
// It promises that every call of every service, of unknown ones too, is
// authenticated before a handler runs; that a panic of a handler ends one call and
// not the agent; that every call is counted and logged with who made it and how it
// ended, and never with what it carried; and that labels of metrics come from what
// is compiled in, not from callers. The HTTP pages need no authentication and tell
// nothing of what is built; they are on loopback unless configured otherwise.
package server
