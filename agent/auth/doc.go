// Package auth tells who calls the agent, and what a caller may name.
//
// It promises that a call has an Identity in its context before any service sees
// it, or does not reach a service: over a unix socket from the kernel's word on the
// peer, over TCP from a client certificate that a configured authority signed or
// from a Kubernetes ServiceAccount token that the API server has reviewed. A caller
// that proves who it is and matches no rule is refused; there is no anonymous
// identity. Tokens and keys are in memory only, never in a log, error or cache key.
//
// It never decides what a build may do: that is policy's, for a tenant.
package auth
