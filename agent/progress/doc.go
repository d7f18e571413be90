// Package progress turns what BuildKit's client tells of a solve into events of a
// build.
//
// It promises that a step has an event when it starts and when it ends and none for
// what has not changed, that output comes in pieces of at most 64 KiB, that
// progress of one part comes at most once a second and at its end, and that text is
// valid UTF-8 and bounded, whatever a step is called.
package progress
