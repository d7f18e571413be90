package script

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// FuzzAnswer takes answers that no interpreter gives: what runs where it ran may.
func FuzzAnswer(f *testing.F) {
	f.Add(make([]byte, 24))
	f.Add([]byte("\x00\x00\x01\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, data []byte) {
		data = data[:min(len(data), 4096)]
		for _, wantFile := range []bool{false, true} {
			conn, theirs, err := Pair()
			require.NoError(t, err)
			_, err = theirs.Write(data)
			require.NoError(t, err)
			require.NoError(t, unix.Shutdown(int(theirs.Fd()), unix.SHUT_WR))
			s := New()
			s.Do(unix.SYS_GETPID)
			if wantFile {
				file, err := conn.RunForFile(s, "x")
				require.Error(t, err, "there was none")
				require.Nil(t, file)
			} else if _, err := conn.Run(s); len(data) < 24 {
				require.Error(t, err)
				// A part of an answer is no end: Execute takes that for a program that runs.
				require.Equal(t, len(data) == 0, errors.Is(err, ErrEnded))
			}
			require.NoError(t, conn.Close())
			require.NoError(t, theirs.Close())
		}
	})
}
