package engine

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/progress"

	"github.com/kiln-build/kiln/sandbox"
)

const (
	// DefaultLogBytes is how much output of a step is passed on, in bytes, when its
	// limits do not say. This and the next are BuildKit's.
	DefaultLogBytes = 2 << 20
	// DefaultLogRate is how much of it is passed on a second.
	DefaultLogRate = 200 << 10
	// maxLogTail is the most of a step's limit that is kept for its last output.
	maxLogTail = 256 << 10
	// dropRate is how much output is dropped a second. A step that floods its log
	// waits, as it would for a slow terminal: to read and drop as fast as it can write
	// would cost its neighbours a processor.
	dropRate = 16 << 20
)

// stepLog passes the output of a step on, within its limits. What is beyond them is
// dropped, and the step goes on. Of a step that fails the end is passed on in any case,
// for which a part of the limit is kept.
type stepLog struct {
	limit, rate, keep int64
	// pass takes output of one of BuildKit's streams; it owns the data.
	pass  func(stream int, data []byte)
	began time.Time

	// mu guards what follows, as a step writes to two streams.
	mu sync.Mutex
	// written is what the step has written, and passed what of it was passed on.
	written, passed int64
	// clipping is set while output is dropped, and clipped when some was.
	clipping, clipped bool
	// dropped is what was dropped since droppedFrom.
	dropped     int64
	droppedFrom time.Time
	// tail is the last that was dropped, of a stream.
	tail       []byte
	tailStream int
}

// The streams of a step, as BuildKit numbers them.
const (
	stdoutStream = 1
	stderrStream = 2
)

// newStepLog returns the log of a step that begins now.
func newStepLog(l sandbox.Limits, pass func(stream int, data []byte)) *stepLog {
	s := &stepLog{limit: l.LogBytes, rate: l.LogRate, pass: pass, began: time.Now()}
	if s.limit == 0 {
		s.limit = DefaultLogBytes
	}
	if s.rate == 0 {
		s.rate = DefaultLogRate
	}
	s.keep = min(s.limit/4, maxLogTail)
	return s
}

// logStep has the output of a vertex's process logged within limits, and returns what
// is to be called with its result. BuildKit's own writers, which ctx's progress
// replaces, know one limit for all steps.
func logStep(ctx context.Context, p *sandbox.Process, l sandbox.Limits) (ended func(res *sandbox.Result, failed bool)) {
	pw, ok, _ := progress.NewFromContext(ctx)
	if !ok || vertexOf(ctx).digest == "" {
		// A client that runs a process for itself reads what it writes.
		return func(*sandbox.Result, bool) {}
	}
	log := newStepLog(l, func(stream int, data []byte) {
		// Nobody reads any more when this fails.
		_ = pw.Write(identity.NewID(), client.VertexLog{Stream: stream, Data: data})
	})
	if p.Stdout != nil {
		p.Stdout = &logStream{log, stdoutStream}
	}
	if p.Stderr != nil {
		p.Stderr = &logStream{log, stderrStream}
	}
	return func(res *sandbox.Result, failed bool) {
		log.end(failed)
		if res != nil {
			log.account(res)
		}
		pw.Close()
	}
}

type logStream struct {
	log    *stepLog
	stream int
}

var _ io.Writer = (*logStream)(nil)

// Write implements io.Writer. It never fails.
func (s *logStream) Write(p []byte) (int, error) {
	time.Sleep(s.log.write(s.stream, p))
	return len(p), nil
}

// write takes output of a stream, and returns how long that has to wait.
func (s *stepLog) write(stream int, data []byte) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written += int64(len(data))
	most, reason := s.limit-s.keep, units.BytesSize(float64(s.limit))
	seconds := int64(time.Since(s.began)/time.Second) + 1
	// Beyond this the rate is no limit any more.
	if seconds <= most/s.rate && seconds*s.rate < most {
		most, reason = seconds*s.rate, units.BytesSize(float64(s.rate))+"/s"
	}
	n := max(0, min(int64(len(data)), most-s.passed))
	if n > 0 {
		s.passed += n
		s.pass(stream, bytes.Clone(data[:n]))
	}
	if n == int64(len(data)) {
		s.clipping, s.tail = false, nil
		return 0
	}
	if !s.clipping {
		s.clipping, s.clipped = true, true
		s.pass(stream, fmt.Appendf(nil, "\n[output clipped, log limit %s reached]\n", reason))
	}
	s.drop(stream, data[n:])
	return s.pace(int64(len(data)) - n)
}

// pace returns how long to wait after so much was dropped. The caller holds mu.
func (s *stepLog) pace(dropped int64) time.Duration {
	now := time.Now()
	// What was not dropped in a second that is over cannot be made up for.
	if now.Sub(s.droppedFrom) > time.Second {
		s.dropped, s.droppedFrom = 0, now
	}
	s.dropped += dropped
	return time.Duration(float64(s.dropped)/dropRate*float64(time.Second)) - now.Sub(s.droppedFrom)
}

// drop remembers the end of what is dropped. The caller holds mu.
func (s *stepLog) drop(stream int, data []byte) {
	if over := int64(len(data)) - s.keep; over > 0 {
		data = data[over:]
	}
	if over := int64(len(s.tail)+len(data)) - s.keep; over > 0 {
		// A copy of all for each small write would be slow.
		if int64(cap(s.tail)) < 2*s.keep {
			s.tail = append(make([]byte, 0, 2*s.keep), s.tail...)
		}
		if int64(len(s.tail)+len(data)) > 2*s.keep {
			s.tail = append(s.tail[:0], s.tail[over:]...)
		}
	}
	s.tail, s.tailStream = append(s.tail, data...), stream
}

// end passes on what the step wrote last, if it has failed and that was dropped.
func (s *stepLog) end(failed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	tail := s.tail[max(0, int64(len(s.tail))-s.keep):]
	if failed && len(tail) > 0 {
		s.passed += int64(len(tail))
		s.pass(s.tailStream, tail)
	}
	s.tail = nil
}

// account adds to a step's result what it has written.
func (s *stepLog) account(res *sandbox.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	res.Usage.LogBytes = s.written
	if s.clipped {
		res.Reach(sandbox.LimitLog)
	}
}
