package progress

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// FuzzAdd takes news whose texts a Dockerfile, a front end or a step has chosen. Each
// event can be stored, and is of a size that a record takes.
func FuzzAdd(f *testing.F) {
	f.Add([]byte(`{"Vertexes":[{"Digest":"sha256:1","Name":"[1/1] RUN x","Started":"2026-01-01T00:00:00Z","Completed":"2025-01-01T00:00:00Z","Error":"\u0000\ufffd"}],"Logs":[{"Vertex":"sha256:1","Stream":1,"Data":"eA=="}]}`), "\x1b[31m\xff", 3)
	f.Add([]byte(`{"Statuses":[{"ID":"a","Vertex":"b","Total":-1,"Current":9223372036854775807,"Started":"0001-01-01T00:00:00Z"}],"Warnings":[{"Vertex":"x","Short":"eA==","URL":"https://u:p@h/"}]}`), "https://user:secret@host/x", 100000)
	f.Fuzz(func(t *testing.T, data []byte, text string, times int) {
		var s client.SolveStatus
		if json.Unmarshal(data, &s) != nil {
			return
		}
		long := ""
		for range min(max(times, 0)%100_000, 1<<20/(len(text)+1)) {
			long += text
		}
		now := time.Unix(0, 0)
		for _, v := range s.Vertexes {
			if v == nil {
				return // BuildKit's decoder makes none
			}
			if v.Error != "" {
				v.Error = long
			}
			v.Name += long
		}
		for _, v := range s.Statuses {
			if v == nil {
				return
			}
			v.Name += long
		}
		for _, v := range s.Logs {
			if v == nil {
				return
			}
			v.Data = append(v.Data, long...)
		}
		for _, v := range s.Warnings {
			if v == nil {
				return
			}
			v.Short = append(v.Short, long...)
		}
		var events []*agentv1.Event
		tr := New(func(e *agentv1.Event) { events = append(events, e) }, func() time.Time { return now })
		tr.Add(&s)
		tr.Add(&s)
		tr.Flush(true)
		for _, e := range events {
			out, err := proto.Marshal(e)
			require.NoError(t, err)
			require.LessOrEqual(t, len(out), 1<<20)
		}
	})
}
