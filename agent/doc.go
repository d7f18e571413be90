// Package agent runs builds on one node. Agent implements the build API,
// kiln.agent.v1.BuildService, over the engines of the node's tenants.
//
// It promises that
//
//   - a build that StartBuild has acknowledged ends with exactly one result, across
//     crashes of the process and full disks;
//   - what is refused is refused before anything is stored, with a status that names
//     the field, the rule or the limit;
//   - a caller sees and touches the builds, archives and caches of the tenants that it
//     may act for, and does not learn that others exist;
//   - credentials are in memory only, and only until their build has ended.
//
// # The life of a build
//
//	StartBuild: validate → complete with the tenant's defaults → policy → queue → record
//	run:        wait for a slot → engine → plan → solve, with events → result → record
//
// The goroutine that StartBuild starts owns the build's place in the queue, its
// archive, its engine and its record's writer, and gives all of them back when the
// result is on disk. CancelBuild, the timeout and Drain end the build's context with
// a cause of package failure, which becomes the result.
package agent
