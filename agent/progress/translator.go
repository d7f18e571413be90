package progress

import (
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/agent/failure"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	maxLog    = 64 << 10 // bytes of one LogEvent
	maxName   = 512      // bytes of a step's name
	maxError  = 1 << 10  // bytes of a step's error
	maxTail   = 4 << 10  // bytes of output that are kept of a step that runs
	maxInputs = 256      // inputs of a step that are told
	maxDetail = 64       // lines of a warning
	// interval is the least time between two events of one part's progress.
	interval = time.Second
	// maxResult bounds the steps of a result, in bytes.
	maxResult = 2 << 20
)

// Translator follows one solve. It is for one goroutine.
type Translator struct {
	emit  func(*agentv1.Event)
	now   func() time.Time
	steps map[string]*step
	order []*step
	parts map[string]*part
	first *step // that failed first
	usage func(digest string) *agentv1.StepUsage
}

// step is what is known of a step.
type step struct {
	result *agentv1.StepResult
	tail   []byte
}

// part is a part of a step.
type part struct {
	pending *agentv1.ProgressEvent // not told yet
	told    time.Time
}

// New returns a translator that gives events to emit. now may be nil.
func New(emit func(*agentv1.Event), now func() time.Time) *Translator {
	if now == nil {
		now = time.Now
	}
	return &Translator{emit: emit, now: now, steps: map[string]*step{}, parts: map[string]*part{}}
}

// TellUsage has the end of each step tell what of returns for its digest, if that is not
// nil. It is called before Add.
func (t *Translator) TellUsage(of func(digest string) *agentv1.StepUsage) { t.usage = of }

// Add takes the next piece of news.
func (t *Translator) Add(s *client.SolveStatus) {
	for _, v := range s.Vertexes {
		t.vertex(v)
	}
	for _, p := range s.Statuses {
		t.progress(p)
	}
	for i := 0; i < len(s.Logs); {
		i += t.logs(s.Logs[i:])
	}
	for _, w := range s.Warnings {
		t.warning(w)
	}
}

// Flush tells the progress that is due, or, at the end, all of it.
func (t *Translator) Flush(end bool) {
	now := t.now()
	for id, p := range t.parts {
		if p.pending != nil && (end || now.Sub(p.told) >= interval) {
			t.tell(id, p, now)
		}
	}
}

func (t *Translator) vertex(v *client.Vertex) {
	if v.Started == nil {
		return // it may never run
	}
	digest := v.Digest.String()
	r := &agentv1.StepResult{
		Digest: text(digest, maxName), Name: text(v.Name, maxName), StartedAt: timestamppb.New(*v.Started),
		Cached: v.Cached, Error: text(v.Error, maxError),
	}
	if v.Completed != nil {
		r.EndedAt = timestamppb.New(*v.Completed)
		if t.usage != nil && !v.Cached {
			r.Usage = t.usage(digest)
		}
	}
	s := t.steps[digest]
	if s == nil {
		s = &step{}
		t.steps[digest] = s
		t.order = append(t.order, s)
	} else if proto.Equal(s.result, r) {
		return
	}
	s.result = r
	if r.Error != "" && t.first == nil && !strings.HasSuffix(v.Error, "context canceled") {
		t.first = s
	}
	if r.EndedAt != nil && r.Error == "" {
		s.tail = nil
	}
	ev := &agentv1.StepEvent{Step: r}
	for _, in := range v.Inputs[:min(len(v.Inputs), maxInputs)] {
		ev.Inputs = append(ev.Inputs, text(in.String(), maxName))
	}
	if g := v.ProgressGroup; g != nil {
		ev.Group = text(g.GetName(), maxName)
		if ev.Group == "" {
			ev.Group = text(g.GetId(), maxName)
		}
	}
	t.emit(&agentv1.Event{Kind: &agentv1.Event_Step{Step: ev}})
}

func (t *Translator) progress(s *client.VertexStatus) {
	ev := &agentv1.ProgressEvent{
		Step: text(s.Vertex.String(), maxName), Id: text(s.ID, maxName), Action: text(s.Name, maxName),
		Current: s.Current, Total: s.Total,
	}
	if s.Started != nil {
		ev.StartedAt = timestamppb.New(*s.Started)
	}
	if s.Completed != nil {
		ev.CompletedAt = timestamppb.New(*s.Completed)
	}
	id := ev.Step + "\x00" + ev.Id
	p := t.parts[id]
	if p == nil {
		p = &part{}
		t.parts[id] = p
	}
	p.pending = ev
	if now := t.now(); s.Completed != nil || now.Sub(p.told) >= interval {
		t.tell(id, p, now)
	}
}

func (t *Translator) tell(id string, p *part, now time.Time) {
	t.emit(&agentv1.Event{Kind: &agentv1.Event_Progress{Progress: p.pending}})
	if p.pending.GetCompletedAt() != nil {
		delete(t.parts, id)
		return
	}
	p.pending, p.told = nil, now
}

// logs tells the first output of list together with what follows it from the same
// step and stream, and returns how many entries that were.
func (t *Translator) logs(list []*client.VertexLog) int {
	first, n := list[0], 1
	data := first.Data
	for n < len(list) && list[n].Vertex == first.Vertex && list[n].Stream == first.Stream && len(data)+len(list[n].Data) <= maxLog {
		data = append(data[:len(data):len(data)], list[n].Data...)
		n++
	}
	digest := first.Vertex.String()
	if s := t.steps[digest]; s != nil {
		s.keep(data)
	}
	stream := agentv1.LogStream_LOG_STREAM_STDOUT
	if first.Stream == 2 {
		stream = agentv1.LogStream_LOG_STREAM_STDERR
	}
	for len(data) > 0 {
		piece := data[:min(len(data), maxLog)]
		data = data[len(piece):]
		t.emit(&agentv1.Event{Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{
			Step: text(digest, maxName), Stream: stream, Data: piece,
		}}})
	}
	return n
}

// keep remembers the end of a step's output.
func (s *step) keep(data []byte) {
	if len(data) >= maxTail {
		s.tail = append(s.tail[:0], data[len(data)-maxTail:]...)
		return
	}
	if over := len(s.tail) + len(data) - maxTail; over > 0 {
		s.tail = append(s.tail[:0], s.tail[over:]...)
	}
	s.tail = append(s.tail, data...)
}

func (t *Translator) warning(w *client.VertexWarning) {
	ev := &agentv1.WarningEvent{
		Step: text(w.Vertex.String(), maxName), Message: text(string(w.Short), maxError), Url: text(w.URL, maxError),
	}
	for _, line := range w.Detail[:min(len(w.Detail), maxDetail)] {
		ev.Detail = append(ev.Detail, text(string(line), maxError))
	}
	if w.SourceInfo != nil && len(w.Range) > 0 {
		loc := &agentv1.SourceLocation{File: text(w.SourceInfo.GetFilename(), maxName)}
		for _, r := range w.Range {
			start, end := r.GetStart().GetLine(), max(r.GetStart().GetLine(), r.GetEnd().GetLine())
			if loc.StartLine == 0 || start < loc.StartLine {
				loc.StartLine = start
			}
			loc.EndLine = max(loc.EndLine, end)
		}
		ev.Location = loc
	}
	t.emit(&agentv1.Event{Kind: &agentv1.Event_Warning{Warning: ev}})
}

// Results returns the steps in the order in which they started, as many as a result
// may hold.
func (t *Translator) Results() []*agentv1.StepResult {
	var out []*agentv1.StepResult
	size := 0
	for _, s := range t.order {
		if size += proto.Size(s.result); size > maxResult {
			break
		}
		out = append(out, s.result)
	}
	return out
}

// Step implements failure.Steps.
func (t *Translator) Step(digest string) (failure.Step, bool) {
	s := t.steps[digest]
	if s == nil {
		return failure.Step{}, false
	}
	return s.failure(), true
}

// Failed implements failure.Steps.
func (t *Translator) Failed() (failure.Step, bool) {
	if t.first == nil {
		return failure.Step{}, false
	}
	return t.first.failure(), true
}

func (s *step) failure() failure.Step {
	return failure.Step{Name: s.result.GetName(), Error: s.result.GetError(), LogTail: strings.ToValidUTF8(string(s.tail), "?")}
}

// text makes s fit for an event.
func text(s string, most int) string {
	s = failure.Text(s)
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most-3], "") + "…"
}
