package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protojson"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve plays an API server with one build, for faults that a real one does not
// make on demand.
func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	config := filepath.Join(t.TempDir(), "config")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q}}]
contexts: [{name: c, context: {cluster: c, namespace: team}}]
current-context: c
`, s.URL), 0o600))
	c, err := New(Config{Kubeconfig: config})
	require.NoError(t, err)
	require.Equal(t, "team", c.Namespace())
	return c
}

func build(succeeded metav1.ConditionStatus, reason string) *buildv1.Build {
	b := &buildv1.Build{TypeMeta: metav1.TypeMeta{APIVersion: "kiln.build/v1alpha1", Kind: "Build"}, ObjectMeta: metav1.ObjectMeta{Name: "b", Namespace: "team"}}
	b.Status.Conditions = []metav1.Condition{{Type: buildv1.ConditionSucceeded, Status: succeeded, Reason: reason}}
	now := metav1.Now()
	b.Status.StartTime = &now
	return b
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, code int) {
	answer(w, code, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Message: "no"})
}

const builds, logs = "/apis/kiln.build/v1alpha1/namespaces/team/builds/b", "/apis/subresources.kiln.build/v1alpha1/namespaces/team/builds/b"

// eventLog writes events from the asked offset, cutting the connection after each
// one until the last.
func eventLog(t *testing.T, n uint64, w http.ResponseWriter, r *http.Request) {
	offset, err := strconv.ParseUint(r.URL.Query().Get("offset"), 10, 64)
	require.NoError(t, err)
	ev := &agentv1.Event{Offset: offset, Kind: &agentv1.Event_Log{Log: &agentv1.LogEvent{Data: []byte("x")}}}
	if offset == n-1 {
		ev.Kind = &agentv1.Event_Result{Result: &agentv1.BuildResult{State: agentv1.BuildState_BUILD_STATE_SUCCEEDED}}
	}
	line, err := protojson.Marshal(ev)
	require.NoError(t, err)
	_, _ = w.Write(append(line, '\n'))
}

func TestEventsComeBackAfterCuts(t *testing.T) {
	var calls atomic.Int32
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == builds:
			answer(w, 200, build(metav1.ConditionUnknown, buildv1.ReasonRunning))
		case r.URL.Path != logs+"/log":
			t.Errorf("unexpected %s", r.URL)
		case calls.Add(1) == 1:
			refuse(w, http.StatusConflict) // it has not started
		case calls.Load()%3 == 0:
			refuse(w, http.StatusServiceUnavailable)
		default:
			eventLog(t, 4, w, r)
		}
	}))
	var got []uint64
	err := c.Events(context.Background(), "b", 0, true, func(ev *agentv1.Event) error {
		got = append(got, ev.Offset)
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, []uint64{0, 1, 2, 3}, got)
}

func TestEventsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"the build ended before it started": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == builds {
				b := build(metav1.ConditionFalse, buildv1.ReasonDenied)
				b.Status.StartTime = nil
				answer(w, 200, b)
				return
			}
			refuse(w, http.StatusConflict)
		}, ""},
		"forbidden":     {func(w http.ResponseWriter, r *http.Request) { refuse(w, http.StatusForbidden) }, "read log of build b"},
		"no such build": {func(w http.ResponseWriter, r *http.Request) { refuse(w, http.StatusNotFound) }, "get build b"},
		"no event":      {func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "{not json}\n") }, "read log of build b"},
		"endless line": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == builds {
				answer(w, 200, build(metav1.ConditionFalse, buildv1.ReasonInternal))
				return
			}
			_, _ = io.WriteString(w, strings.Repeat("x", maxEvent+1))
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			client := serve(t, c.handler)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			err := client.Events(ctx, "b", 0, true, func(*agentv1.Event) error { return nil })
			require.NoError(t, ctx.Err())
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestCancelSetsTheState(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Method != http.MethodPatch || r.URL.Path != builds || string(body) != `{"spec":{"state":"Cancelled"}}` {
			t.Errorf("%s %s %s", r.Method, r.URL, body)
		}
		answer(w, 200, build(metav1.ConditionUnknown, buildv1.ReasonCancelling))
	}))
	require.NoError(t, c.Cancel(context.Background(), "b"))
}
