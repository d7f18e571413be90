// Package cli is the kiln command: its commands, flags, messages and exit codes.
//
// It promises exit code 0 when the work is done, 1 when it failed, 2 when the
// command line is wrong (and then nothing was started), and 130 when a signal
// ended it. Results go to stdout, everything else to stderr.
package cli
