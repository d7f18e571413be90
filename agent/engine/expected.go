package engine

import "sync/atomic"

// expectedSteps counts the steps that the solver knows of and that have not begun. One
// that turns out to be cached stays counted. Its methods may be called concurrently, and
// do nothing for nil.
type expectedSteps struct {
	known, begun atomic.Int64
}

// add counts a step that the solver has come to know.
func (e *expectedSteps) add() {
	if e != nil {
		e.known.Add(1)
	}
}

// begin counts a step that begins.
func (e *expectedSteps) begin() {
	if e != nil {
		e.begun.Add(1)
	}
}

// left returns how many steps may come; -1 before the first is known.
func (e *expectedSteps) left() int {
	known := e.known.Load()
	if known == 0 {
		return -1
	}
	return int(max(known-e.begun.Load(), 0))
}
