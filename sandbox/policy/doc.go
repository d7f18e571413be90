// Package policy decides whether a build may use what it asks for.
//
// It promises that the same rules give the same decision wherever they are evaluated:
// at admission, in the controller and on the node. It is pure: no clock, no network, no
// Kubernetes. Several sets of rules all hold; a request is allowed when each of them
// allows it, and a refusal names the rule that refuses. What is unknown is refused: a class,
// network or image name that cannot be understood never passes as if it were unset.
package policy
