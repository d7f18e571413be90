package record

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	// stepAllowance is what events of steps and of the queue may take beyond a
	// log's limit, in bytes. Their number follows from the spec and from time, so
	// it needs a bound of its own.
	stepAllowance = 8 << 20
	// markEvery is the number of events between two remembered positions.
	markEvery = 256
)

// eventLog is the events of one build: a file, and how much of it may be read.
type eventLog struct {
	name string   // of the file, below the directory of all of them
	file *os.File // open for writing until the build has ended; nil after

	mu      sync.Mutex
	size    int64         // guarded by mu; bytes of the file that hold whole frames
	events  uint64        // guarded by mu; number of them
	marks   []int64       // guarded by mu; position of every markEvery-th event
	ended   bool          // guarded by mu; the last event is the result
	closed  error         // guarded by mu; no more events come in this process
	dropped bool          // guarded by mu; output was dropped, and a warning said so
	limit   int64         // guarded by mu; of output, in bytes
	changed chan struct{} // guarded by mu; closed at the next change; nil: nobody waits
}

// weight says how dear an event is.
type weight int

const (
	output    weight = iota // may be dropped at the log's limit
	structure               // may be dropped when the allowance is used up too
	vital                   // is always stored
)

// append writes ev as the next event and reports whether it was stored. With sync
// it is on disk before anyone can read it.
func (l *eventLog) append(ev *agentv1.Event, w weight, now time.Time, sync bool) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.file == nil {
		return false, fmt.Errorf("append to events of %s: the build has ended", l.name)
	}
	frame, err := l.frame(ev, now)
	if err != nil {
		return false, err
	}
	most := l.limit
	if w == structure {
		most += stepAllowance
	}
	if w != vital && l.size+int64(len(frame)) > most {
		if l.dropped {
			return false, nil
		}
		l.dropped = true
		if ev, frame, err = l.droppedWarning(now); err != nil {
			return false, err
		}
		return false, l.write(ev, frame, false)
	}
	return true, l.write(ev, frame, sync)
}

func (l *eventLog) frame(ev *agentv1.Event, now time.Time) ([]byte, error) {
	ev.Offset, ev.Time = l.events, timestamppb.New(now)
	return encodeFrame(ev)
}

func (l *eventLog) droppedWarning(now time.Time) (*agentv1.Event, []byte, error) {
	ev := &agentv1.Event{Kind: &agentv1.Event_Warning{Warning: &agentv1.WarningEvent{
		Message: fmt.Sprintf("The build's log has reached its limit of %d bytes. Output after this is not kept.", l.limit),
	}}}
	frame, err := l.frame(ev, now)
	return ev, frame, err
}

// write puts frame where the file ends. What a write that fails leaves there is
// taken back.
func (l *eventLog) write(ev *agentv1.Event, frame []byte, sync bool) error {
	if _, err := l.file.WriteAt(frame, l.size); err != nil {
		return errors.Join(fmt.Errorf("write event: %w", err), l.file.Truncate(l.size))
	}
	if sync {
		if err := l.file.Sync(); err != nil {
			return fmt.Errorf("sync events: %w", err)
		}
	}
	if l.events%markEvery == 0 {
		l.marks = append(l.marks, l.size)
	}
	l.size += int64(len(frame))
	l.events++
	l.ended = ev.GetResult() != nil
	l.announce()
	return nil
}

// announce wakes those that wait. The caller holds mu.
func (l *eventLog) announce() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// release closes the file. Events of a build that has not ended do not come any
// more: those that wait get reason.
func (l *eventLog) release(reason error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if l.file != nil {
		err = l.file.Close()
		l.file = nil
	}
	l.closed = reason
	l.announce()
	return err
}

// extent is what of a log can be read.
type extent struct {
	size   int64
	events uint64
	ended  bool
	closed error
}

func (l *eventLog) extent() extent {
	l.mu.Lock()
	defer l.mu.Unlock()
	return extent{l.size, l.events, l.ended, l.closed}
}

// beyond returns what can be read, and, when that is not more than size, what is
// closed when it may be.
func (l *eventLog) beyond(size int64) (extent, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	x := extent{l.size, l.events, l.ended, l.closed}
	if x.size > size || x.ended || x.closed != nil {
		return x, nil
	}
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return x, l.changed
}

// mark returns the last remembered event that is not after offset, and where it
// is.
func (l *eventLog) mark(offset uint64) (uint64, int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := offset / markEvery
	if n := uint64(len(l.marks)); i >= n {
		if n == 0 {
			return 0, int64(len(fileMagic))
		}
		i = n - 1
	}
	return i * markEvery, l.marks[i]
}
