package record

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
)

// FuzzReadEvents reads any bytes as an event file: it ends, takes no more memory than
// a frame may have, and what it accepts is what was written.
func FuzzReadEvents(f *testing.F) {
	one, err := encodeFrame(logEvent("hello"))
	require.NoError(f, err)
	f.Add(one)
	f.Add(append(bytes.Clone(one), one...))
	f.Add(one[:len(one)-1])
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		var size int64
		for i := uint64(0); ; i++ {
			ev, n, err := readEvent(r, i)
			if err == io.EOF {
				require.EqualValues(t, len(data), size)
				return
			}
			if err != nil {
				require.ErrorIs(t, err, errTorn)
				return
			}
			size += n
			again, err := encodeFrame(ev)
			require.NoError(t, err)
			payload, err := readFrame(bytes.NewReader(again))
			require.NoError(t, err)
			other := proto.CloneOf(ev)
			proto.Reset(other)
			require.NoError(t, proto.Unmarshal(payload, other))
			require.True(t, proto.Equal(ev, other))
		}
	})
}

func TestFramesThatAreTooLargeAreRefused(t *testing.T) {
	_, err := encodeFrame(logEvent(string(make([]byte, MaxEventBytes))))
	require.ErrorContains(t, err, "is the most")
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

func TestReadErrorsAreNotTornFrames(t *testing.T) {
	broken := errors.New("input/output error")
	_, err := readFrame(failingReader{broken})
	require.ErrorIs(t, err, broken)
	require.NotErrorIs(t, err, errTorn)
}
