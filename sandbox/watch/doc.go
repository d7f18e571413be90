// Package watch ends a step that runs for too long or has too much on the node's disk,
// where no quota refuses that, and counts what it leaves there.
//
// It is cheap for steps that are far from their limits: it asks the file system how
// much it has grown, which is one system call, and counts the step's files when they
// could have reached a limit, every few seconds, and at the end. Counting takes a few
// parts in a hundred of a processor at most, however many files there are.
//
// It promises that a step which ends beyond its limit is refused, and that one that
// runs beyond it is ended soon after, but not when: see docs/sandboxes.md. It follows no
// symlink and changes nothing in the trees that it counts, which the step may change
// meanwhile as it likes.
package watch
