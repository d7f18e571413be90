// Package upload keeps archives that clients sent for a build that will name them.
//
// It promises that an archive has the digest under which it is found, that a tenant
// finds its own only, that each tenant's archives stay within a quota, and that
// none outlives its time, the build that names it, or the process: Open removes
// what an earlier process left. Only root can read the files.
package upload
