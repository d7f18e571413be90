package record

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	neverStarted = "The agent ended while the build waited in the queue: it never started. Start it again under a new ID."
	interrupted  = "The agent ended while the build ran. Steps that had ended are in the cache: start the build again under a new ID."
)

// recover reads the index, gives builds without a result one, and removes event
// files that belong to no build.
func (s *Store) recover() error {
	var open []*agentv1.Build
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketBuilds).ForEach(func(k, v []byte) error {
			key, err := parseKey(k)
			if err != nil {
				return err
			}
			b, err := decodeBuild(v)
			if err != nil {
				return fmt.Errorf("build %s: %w", k, err)
			}
			if b.GetResult() == nil {
				open = append(open, b)
				return nil
			}
			return s.admit(key, b, int64(len(v)))
		})
	})
	if err != nil {
		return fmt.Errorf("read index of builds: %w", err)
	}
	for _, b := range open {
		if err := s.interrupt(b); err != nil {
			return fmt.Errorf("recover build %s of tenant %s: %w", b.GetBuildId(), b.GetTenant(), err)
		}
	}
	return s.removeOrphans()
}

// admit puts a build that has ended into memory's index.
func (s *Store) admit(key Key, b *agentv1.Build, size int64) error {
	fi, err := s.events.Stat(key.file())
	switch {
	case err == nil:
		size += fi.Size()
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look at events: %w", err)
	}
	ended := b.GetEndedAt().AsTime()
	s.index[key] = &entry{key: key, created: b.GetCreatedAt().AsTime(), ended: ended, aged: s.agedAtOpen(ended), bytes: size}
	s.bytes += size
	return nil
}

// interrupt ends a build that had not ended when the process did.
func (s *Store) interrupt(b *agentv1.Build) error {
	key := keyOf(b)
	past, err := s.replay(key)
	if err != nil {
		return err
	}
	w := &Writer{store: s, key: key, build: b, events: past.log, decided: make(chan struct{})}
	w.ready.Store(true)
	close(w.decided)
	s.index[key] = &entry{key: key, created: b.GetCreatedAt().AsTime(), writer: w}
	if past.started != nil {
		b.StartedAt = past.started.GetTime()
	}
	if past.result != nil {
		w.end(past.result.GetResult(), past.result.GetTime().AsTime())
		return w.Finish(nil)
	}
	if past.log.events == 0 {
		if _, err := past.log.append(queuedEvent(0, ""), vital, b.GetCreatedAt().AsTime(), false); err != nil {
			return err
		}
	}
	message := neverStarted
	if past.started != nil {
		message = interrupted
	}
	return w.Finish(&agentv1.BuildResult{
		State:   agentv1.BuildState_BUILD_STATE_INTERRUPTED,
		Failure: &agentv1.Failure{Reason: agentv1.FailureReason_FAILURE_REASON_INTERRUPTED, Message: message},
		Steps:   past.steps,
	})
}

// past is what the event file of a build that had not ended tells.
type past struct {
	log     *eventLog
	started *agentv1.Event // the build left the queue
	result  *agentv1.Event // it ended, and only the index does not know
	steps   []*agentv1.StepResult
}

// replay reads the events of a build and cuts off what was not written whole.
func (s *Store) replay(key Key) (_ *past, err error) {
	f, err := s.events.OpenFile(key.file(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	p := &past{log: &eventLog{name: key.file(), file: f, limit: s.limits.LogBytes, size: int64(len(fileMagic))}}
	in := bufio.NewReaderSize(f, readAhead)
	if err := readMagic(in); err != nil {
		if !errors.Is(err, errTorn) {
			return nil, fmt.Errorf("read events: %w", err)
		}
		if _, err := f.WriteAt([]byte(fileMagic), 0); err != nil {
			return nil, fmt.Errorf("write event file: %w", err)
		}
	} else if err := p.read(in); err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	if err := f.Truncate(p.log.size); err != nil {
		return nil, fmt.Errorf("cut event file: %w", err)
	}
	return p, nil
}

// read takes all whole events from in.
func (p *past) read(in io.Reader) error {
	at := map[string]int{}
	for p.result == nil {
		ev, n, err := readEvent(in, p.log.events)
		if err == io.EOF || errors.Is(err, errTorn) {
			return nil
		}
		if err != nil {
			return err
		}
		if p.log.events%markEvery == 0 {
			p.log.marks = append(p.log.marks, p.log.size)
		}
		p.log.events++
		p.log.size += n
		switch {
		case ev.GetResult() != nil:
			p.result, p.log.ended = ev, true
		case ev.GetStatus().GetState() == agentv1.BuildState_BUILD_STATE_RUNNING && p.started == nil:
			p.started = ev
		case ev.GetStep().GetStep() != nil:
			p.keepStep(at, ev.GetStep().GetStep())
		}
	}
	return nil
}

func (p *past) keepStep(at map[string]int, step *agentv1.StepResult) {
	i, ok := at[step.GetDigest()]
	if !ok {
		at[step.GetDigest()] = len(p.steps)
		p.steps = append(p.steps, proto.CloneOf(step))
		return
	}
	p.steps[i] = step
}

// removeOrphans removes event files that belong to no build: their build was never
// acknowledged, or was removed.
func (s *Store) removeOrphans() error {
	d, err := s.events.Open(".")
	if err != nil {
		return fmt.Errorf("open directory of events: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read directory of events: %w", err)
	}
	known := make(map[string]bool, len(s.index))
	for k := range s.index {
		known[k.file()] = true
	}
	var errs []error
	for _, name := range names {
		if !known[name] {
			errs = append(errs, s.events.RemoveAll(name))
		}
	}
	return errors.Join(errs...)
}
