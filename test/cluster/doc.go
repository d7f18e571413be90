// Package cluster starts a real Kubernetes on one Linux machine, for tests and
// for trying kiln: a control plane, worker nodes and a registry.
//
// Every machine of the cluster (the control plane and each node) is a set of
// namespaces: network, PID, mount and host name. Process 1 of that PID namespace
// does nothing but hold them, so a machine ends, with everything that it runs,
// when that one process is killed.
//
// A node has a /run, /var/lib and /var/log of its own. A Pod that mounts a host
// path below them, such as /run/containerd or /var/lib/kubelet, sees those of its
// own node. All other host paths are the ones of the machine that the cluster runs
// on.
//
// The machines and the caller's network namespace share three networks, each
// chosen so that it does not overlap one the caller has: one of machines, one of
// Pods, one of Services. The caller reaches all three. Nothing routes from the
// cluster to anywhere else.
//
// What the package promises:
//   - Up returns when every node is ready and runs Pods, or it leaves nothing.
//   - Down removes everything that Up made, also what an interrupted Up made. It
//     finds what to remove by the state directory's name alone.
//   - Nothing is mounted in the caller's mount namespace, and no kernel setting
//     of the machine changes.
//
// The cluster is a test bed: its key material lies in the state directory, etcd
// does not sync to disk, and the registry asks nobody for a password.
package cluster
