// Package escape attacks kiln as the people do who write Dockerfiles, contexts,
// images and calls for it.
//
// Every attack is an entry of one register: what it threatens, how bad that would
// be, and a test that really tries it, in both classes of sandbox where it applies.
// Many entries also show that the attack succeeds when the control that stops it is
// taken away, by code that only the test has. docs/security-results.md is the
// register with its results; `make security-results` writes it.
//
// The tests are a node of their own: the test binary executes itself again in a
// network and a mount namespace, with a metadata service, a network outside, and
// files that only root may read. What they find there is compared before and after.
package escape
