package hostile

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestArchivesAreReadAsTheyAreMeant(t *testing.T) {
	long := up + "a/b/c"
	for e := range Encodings {
		tr := tar.NewReader(bytes.NewReader(Tar(e,
			file(long, "body"), symlink("s", "/target"), Entry{Type: Char, Name: "/c", Major: 1, Minor: 7, Mode: 0o666},
			Entry{Type: GNUSparse, Name: "sparse", RealSize: 1 << 16, Map: [][2]int64{{0, 5}}, Body: "write"})))
		h, err := tr.Next()
		require.NoError(t, err)
		require.Equal(t, long, h.Name)
		body, err := io.ReadAll(tr)
		require.NoError(t, err)
		require.Equal(t, "body", string(body))
		h, err = tr.Next()
		require.NoError(t, err)
		require.Equal(t, "/target", h.Linkname)
		h, err = tr.Next()
		require.NoError(t, err)
		require.EqualValues(t, 7, h.Devminor)
		require.Equal(t, "/c", h.Name)
		h, err = tr.Next()
		require.NoError(t, err)
		require.EqualValues(t, 1<<16, h.Size)
		_, err = tr.Next()
		require.ErrorIs(t, err, io.EOF)
	}
}

func TestCorpusIsTheSameEachTime(t *testing.T) {
	g := Goal{Dir: "/goal", File: "file", Marker: "marker"}
	a, b := Corpus(1, g), Corpus(1, g)
	require.Equal(t, a, b)
	require.NotEqual(t, a, Corpus(2, g))
	names := map[string]bool{}
	for _, c := range a {
		require.False(t, names[c.Name], c.Name)
		names[c.Name] = true
	}
	t.Log(len(a))
}
