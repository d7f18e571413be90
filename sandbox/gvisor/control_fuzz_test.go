package gvisor

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

type zeros struct{ b byte }

func (z zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = z.b
	}
	return len(p), nil
}

func TestReplyWithoutEnd(t *testing.T) {
	for _, start := range []string{`{"err":"`, `{"result":[`, ``} {
		err := readReply(io.MultiReader(strings.NewReader(start), zeros{' '}), nil)
		require.ErrorContains(t, err, "longer than", start)
	}
	err := readReply(strings.NewReader(`{"err":"`+strings.Repeat("x", 1<<20)+`"}`), nil)
	require.Less(t, len(err.Error()), 5000, "what the sandbox says is cut short")
}

func FuzzReply(f *testing.F) {
	for _, s := range []string{`{"success":true,"result":7}`, `{"success":true}`, `{"err":"x"}`, `{"success":true,"result":{}}`, "", "null", "[", `{"success":true,"result":1e400}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var status uint32
		err := readReply(bytes.NewReader(data), &status)
		if err == nil {
			require.True(t, bytes.Contains(bytes.ToLower(data), []byte("success")))
		}
		_ = readReply(bytes.NewReader(data), nil)
	})
}
