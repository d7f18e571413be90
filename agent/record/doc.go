// Package record keeps the builds of an agent and their events on disk.
//
// It promises that a build that Create returned is there after any crash, that it
// ends with exactly one result, and that its events are numbered from 0 without
// gaps. A build that had no result when the process ended gets one, INTERRUPTED,
// by the next Open. The spec is stored; credentials are never given to it.
//
// It is bounded: Limits says how much is kept. The oldest ended builds are removed
// first, builds that have not ended never. Output of a build beyond its limit is
// dropped, and one warning event says so.
//
// What is on disk, below one directory that belongs to one process:
//
//	builds.db                  bbolt: one agentv1.Build for each build, and its order in time
//	events/<tenant>.<id>       the build's events, one frame each (see frame.go)
//	reserve                    space that is given up so that results fit on a full disk
//
// A created build and a result are synced before they are returned or shown.
// Other events are written at once and not synced: they survive the end of the
// process, but not all of them a loss of power.
//
// Lock order: Writer.mu, Store.mu, transactions of the index, eventLog.mu.
package record
