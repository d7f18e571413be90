package main

import (
	"bytes"
	"encoding/xml"
	"io"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMedian(t *testing.T) {
	require.True(t, math.IsNaN(median(nil)))
	require.Equal(t, 3.0, median([]float64{3}))
	require.Equal(t, 2.5, median([]float64{4, 1}))
	in := []float64{9, 1, 5}
	require.Equal(t, 5.0, median(in))
	require.Equal(t, []float64{9, 1, 5}, in, "the runs keep their order")
}

func TestRatio(t *testing.T) {
	require.Equal(t, 0.5, ratio(1, 2))
	require.True(t, math.IsNaN(ratio(1, 0)))
}

func sample() *report {
	return &report{
		Machine: "2 cores", Runs: 3,
		Peers: []peerInfo{{Name: "kiln-userns"}, {Name: "buildkit-runc", Note: "daemon", StartSeconds: 0.5}},
		Workloads: []workResult{{Name: "a", About: "a <b> & c", Peers: []peerResult{
			{Name: "kiln-userns", Median: 1, MedianPeak: 1 << 20}, {Name: "buildkit-runc", Median: 4, MedianPeak: 5 << 20},
		}}},
	}
}

func TestChart(t *testing.T) {
	raw := chart(sample())
	var widths []string
	for d := xml.NewDecoder(bytes.NewReader(raw)); ; {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
			for _, a := range e.Attr {
				if a.Name.Local == "width" {
					widths = append(widths, a.Value)
				}
			}
		}
	}
	require.Equal(t, []string{"100%", "12", "12", "140", "560"}, widths)
	require.Contains(t, string(raw), "a &lt;b&gt; &amp; c")
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	require.NoError(t, sample().print(&out))
	require.Regexp(t, `\| a <b> & c +\| 1.00 s +\| 4.00 s +\| 0.25× +\|`, out.String())
	require.Regexp(t, `1 MiB +\| 5 MiB`, out.String())
	require.NotContains(t, out.String(), "gvisor")
}

func TestFailedPeer(t *testing.T) {
	r := sample()
	require.NoError(t, r.failures())
	r.Workloads[0].Peers[0] = peerResult{Name: "kiln-userns", Error: "no"}
	require.EqualError(t, r.failures(), "workload a with kiln-userns failed")
	var out bytes.Buffer
	require.NoError(t, r.print(&out))
	require.Regexp(t, `\| failed +\| 4.00 s +\| failed +\|`, out.String())
	require.Contains(t, string(chart(r)), ">failed<")
}

func TestPick(t *testing.T) {
	id := func(s string) string { return s }
	got, err := pick("-work", []string{"a", "b", "c"}, id, "c,a")
	require.NoError(t, err)
	require.Equal(t, []string{"c", "a"}, got)
	_, err = pick("-work", []string{"a", "b"}, id, "x")
	require.EqualError(t, err, `-work: no "x"; there are a, b`)
}
