// Package upload keeps archives that clients sent for a build that will name them.
//
// It promises that an archive has the digest under which it is found, that a tenant
// finds its own only, that each tenant's archives stay within a quota, and that
// none outlives its time, the build that names it, or the process: Open removes
// what an earlier process left. Only root can read the files.
//
// An archive comes at once (Create) or in parts (Resume). Parts belong to one build of
// one tenant and count against the quota with all that was announced. Each begins where
// the one before ended, so that there is never a gap or an overlap, and of several that
// are sent at a time only the last to begin is taken.
//
// Lock order: partial.mu before Store.mu.
package upload
