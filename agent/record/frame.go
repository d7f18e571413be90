package record

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// An event file is fileMagic and then frames: the length of the payload, a
// CRC-32C of length and payload, both 4 bytes little-endian, and the payload, one
// agentv1.Event.
const (
	fileMagic   = "kilnevt1"
	frameHeader = 8
)

// MaxEventBytes is the largest event that is stored. It stays below what gRPC's
// clients accept by default.
const MaxEventBytes = 3 << 20

// errTorn says that there is no whole frame where one was expected.
var errTorn = errors.New("frame is incomplete or damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeFrame returns the frame that holds ev.
func encodeFrame(ev *agentv1.Event) ([]byte, error) {
	frame, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, frameHeader, 256), ev)
	if err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	if n := len(frame) - frameHeader; n > MaxEventBytes {
		return nil, fmt.Errorf("encode event: it has %d bytes, %d is the most", n, MaxEventBytes)
	}
	binary.LittleEndian.PutUint32(frame, uint32(len(frame)-frameHeader))
	binary.LittleEndian.PutUint32(frame[4:], frameSum(frame[:4], frame[frameHeader:]))
	return frame, nil
}

func frameSum(length, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(length, castagnoli), castagnoli, payload)
}

// readFrame reads the frame that r is at and returns its payload. The error is
// io.EOF at the end of r, and wraps errTorn when what is there is no frame.
func readFrame(r io.Reader) ([]byte, error) {
	var head [frameHeader]byte
	if n, err := io.ReadFull(r, head[:]); err != nil {
		if n == 0 && errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		return nil, tornOr(err)
	}
	length := binary.LittleEndian.Uint32(head[:])
	if length > MaxEventBytes {
		return nil, fmt.Errorf("%w: length %d", errTorn, length)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(r, payload); err != nil {
		return nil, tornOr(err)
	}
	if frameSum(head[:4], payload) != binary.LittleEndian.Uint32(head[4:]) {
		return nil, fmt.Errorf("%w: checksum does not match", errTorn)
	}
	return payload, nil
}

// readEvent reads the frame that r is at as the event number offset.
func readEvent(r io.Reader, offset uint64) (*agentv1.Event, int64, error) {
	payload, err := readFrame(r)
	if err != nil {
		return nil, 0, err
	}
	ev := &agentv1.Event{}
	if err := proto.Unmarshal(payload, ev); err != nil {
		return nil, 0, fmt.Errorf("%w: %v", errTorn, err)
	}
	if ev.Offset != offset {
		return nil, 0, fmt.Errorf("%w: event %d where %d was expected", errTorn, ev.Offset, offset)
	}
	return ev, int64(frameHeader + len(payload)), nil
}

func tornOr(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errTorn
	}
	return err
}

// readMagic checks the start of an event file.
func readMagic(r io.Reader) error {
	var head [len(fileMagic)]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return tornOr(err)
	}
	if string(head[:]) != fileMagic {
		return fmt.Errorf("%w: not an event file", errTorn)
	}
	return nil
}
