// Package config is the configuration file of the agent.
//
// It promises that a file with an unknown or repeated field, a value that cannot
// be, or two fields that contradict each other is refused with the path of the
// field, all such problems at once; that what a file leaves out has a default that
// exposes nothing beyond the node; and that a configuration written by Encode is
// read back the same. It opens no file that a configuration names.
//
// Durations are written as Go writes them ("90s", "1h30m"), sizes as Kubernetes
// quantities ("512Mi", "20Gi") or, where said, as a percentage ("10%") or "auto".
package config
