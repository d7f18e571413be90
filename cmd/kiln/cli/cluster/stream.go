package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

func asError[T any](err error, target *T) bool { return errors.As(err, target) }

// maxEvent bounds a line of the event stream, in bytes. The result of a build with
// very many steps is the largest.
const maxEvent = 8 << 20

// Events gives the build's events from offset to fn until the result was given,
// or, without follow, until the last that there is. It waits for a build that has
// not started, and comes back when the connection is lost. A build that ends
// without an event, such as one that no node could take, ends it with nil.
func (c *Client) Events(ctx context.Context, name string, offset uint64, follow bool, fn func(*agentv1.Event) error) error {
	for failures := 0; ; {
		next, err := c.stream(ctx, name, offset, follow, fn)
		if next > offset {
			failures = 0
		}
		offset = next
		var stopped *stop
		switch {
		case errors.As(err, &stopped):
			return stopped.err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil && !follow:
			return nil
		case err != nil && !transient(err) && !notYet(err):
			return fmt.Errorf("read log of build %s: %w", name, err)
		}
		// It was cut, or there is nothing to read yet.
		b, gerr := c.Get(ctx, name)
		switch {
		case gerr != nil && !transient(gerr):
			return gerr
		case gerr == nil && b.Ended() && (err != nil || b.Status.StartTime == nil):
			// The log is not to be had any more, or never was.
			if err != nil && b.Status.StartTime != nil && failures < 3 {
				break
			}
			return nil
		case !follow:
			return fmt.Errorf("read log of build %s: %w", name, err)
		}
		if failures++; failures >= maxFailures && (gerr != nil || waitsFor(b) == "") {
			return fmt.Errorf("read log of build %s: %w", name, err)
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
}

// stop carries an error of the reader of events, or nil at the end of the build.
type stop struct{ err error }

func (s *stop) Error() string { return "stop" }

// stream reads one stream and returns the next offset.
func (c *Client) stream(ctx context.Context, name string, offset uint64, follow bool, fn func(*agentv1.Event) error) (uint64, error) {
	body, err := c.streams.Get().Namespace(c.namespace).Resource(buildsResource).Name(name).SubResource("log").
		Param("offset", strconv.FormatUint(offset, 10)).Param("follow", strconv.FormatBool(follow)).Stream(ctx)
	if err != nil {
		return offset, err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(make([]byte, 64<<10), maxEvent)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		ev := &agentv1.Event{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(lines.Bytes(), ev); err != nil {
			return offset, &stop{fmt.Errorf("read log of build %s: %w", name, err)}
		}
		if ev.Offset < offset {
			continue // it was seen before the connection was lost
		}
		if err := fn(ev); err != nil {
			return offset, &stop{err}
		}
		offset = ev.Offset + 1
		if ev.GetResult() != nil {
			return offset, &stop{}
		}
	}
	return offset, lines.Err()
}

// notYet tells whether the log is refused because the build has not started.
func notYet(err error) bool {
	code := status(err)
	return code == http.StatusConflict || code == http.StatusNotFound
}

// waitsFor tells what the build waits for; empty: for nothing.
func waitsFor(b *buildv1.Build) string {
	for _, cond := range b.Status.Conditions {
		if cond.Type == buildv1.ConditionSucceeded && cond.Reason != buildv1.ReasonRunning {
			return cond.Reason
		}
	}
	return ""
}
