// Package sandbox starts build steps in isolation from the node.
//
// It holds the contract (Runtime, Step) and what every runtime shares: the OCI
// runtime spec of a step, the lookup of its user, its /etc/hosts and
// /etc/resolv.conf, and the removal of mount points that a step leaves in its
// layer. The runtimes live below it: sandbox/userns and sandbox/gvisor.
//
// The package promises that a step gets nothing from the node that Step does
// not name. It never falls back from one class of sandbox to another and there
// is no class weaker than userns. It knows nothing of BuildKit, of the snapshot
// store or of Kubernetes.
package sandbox
