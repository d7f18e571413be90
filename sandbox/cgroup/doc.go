// Package cgroup holds processes to limits, and tells what they used.
//
// It works with both versions of the kernel's control groups, also when the
// controllers are spread over them. It mounts the hierarchies that it needs for
// itself, where nobody else sees them, and depends on no mounts of the node. It makes
// groups only in the hierarchies that have a controller it uses, and in the unified
// one.
//
// It promises that a group enforces every limit that Limit accepted, from before the
// call returns until the group is removed, and that a new group has no limits. It
// never touches a group that it was not asked to make.
package cgroup
