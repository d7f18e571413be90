package record

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// readAhead is the buffer of a cursor, in bytes.
const readAhead = 64 << 10

// Cursor reads the events of a build in order. It reads the file and holds nothing
// that the build's writer waits for. It is for one goroutine. The caller closes it.
type Cursor struct {
	log  *eventLog
	file *os.File
	in   *bufio.Reader
	tail *tail
	next uint64
	done int64  // position of event next
	want uint64 // events before it are not wanted
	last bool   // the result was returned
}

// tail is a file up to a position that grows.
type tail struct {
	file     *os.File
	pos, end int64
}

func (t *tail) Read(p []byte) (int, error) {
	if t.pos >= t.end {
		return 0, io.EOF
	}
	n, err := t.file.ReadAt(p[:min(int64(len(p)), t.end-t.pos)], t.pos)
	t.pos += int64(n)
	if n > 0 {
		return n, nil
	}
	return 0, err
}

// newCursor returns a cursor at event offset of log, which may be one that is not
// there yet. It owns file.
func newCursor(log *eventLog, file *os.File, offset uint64) (*Cursor, error) {
	x := log.extent()
	if x.ended && offset >= x.events {
		file.Close()
		return nil, &RangeError{Offset: offset, Events: x.events}
	}
	c := &Cursor{log: log, file: file, want: offset, tail: &tail{file: file, end: x.size}}
	c.next, c.done = log.mark(min(offset, x.events))
	c.tail.pos = c.done
	c.in = bufio.NewReaderSize(c.tail, readAhead)
	for c.next < min(offset, x.events) {
		if err := c.skip(); err != nil {
			file.Close()
			return nil, fmt.Errorf("find event %d: %w", offset, damaged(err))
		}
	}
	return c, nil
}

// skip passes over one frame.
func (c *Cursor) skip() error {
	head, err := c.in.Peek(frameHeader)
	if err != nil {
		return tornOr(err)
	}
	n := binary.LittleEndian.Uint32(head)
	if n > MaxEventBytes {
		return errTorn
	}
	if _, err := c.in.Discard(frameHeader + int(n)); err != nil {
		return tornOr(err)
	}
	c.next++
	c.done += int64(frameHeader) + int64(n)
	return nil
}

// Next returns the next event. With wait it waits for one that is not there yet,
// until ctx ends or the store is closed (ErrClosed). The error is io.EOF after the
// result and, without wait, after the last event there is; it is a *RangeError when
// the build ended before the first event that is wanted.
func (c *Cursor) Next(ctx context.Context, wait bool) (*agentv1.Event, error) {
	for {
		ev, err := c.read(ctx, wait)
		if err != nil {
			if err == io.EOF && c.next < c.want && c.log.extent().ended {
				return nil, &RangeError{Offset: c.want, Events: c.next}
			}
			return nil, err
		}
		if ev.Offset >= c.want {
			return ev, nil
		}
	}
}

func (c *Cursor) read(ctx context.Context, wait bool) (*agentv1.Event, error) {
	if c.last {
		return nil, io.EOF
	}
	for c.done >= c.tail.end {
		x, changed := c.log.beyond(c.tail.end)
		switch {
		case x.size > c.tail.end:
			c.tail.end = x.size
		case x.ended || !wait:
			return nil, io.EOF
		case x.closed != nil:
			return nil, x.closed
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
	ev, n, err := readEvent(c.in, c.next)
	if err != nil {
		return nil, fmt.Errorf("read event %d: %w", c.next, damaged(err))
	}
	c.next++
	c.done += n
	c.last = ev.GetResult() != nil
	return ev, nil
}

// Close releases the cursor.
func (c *Cursor) Close() error { return c.file.Close() }

// damaged marks an error in what was written whole.
func damaged(err error) error {
	if errors.Is(err, errTorn) || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %v", ErrDamaged, err)
	}
	return err
}
