// Package failure tells programs and people why a build failed.
//
// It reads the typed errors that the engine sends, and, where those say nothing,
// the name of the step that failed and what it said. It promises that a message
// holds no credentials of a URL, is valid UTF-8 and is bounded.
package failure
