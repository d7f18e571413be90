package translate

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/inputs"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// specOf reads a BuildSpec as users write it.
func specOf(t *testing.T, text string) *v1alpha1.Build {
	t.Helper()
	b := &v1alpha1.Build{ObjectMeta: metav1.ObjectMeta{Namespace: "team-a", Name: "app", UID: "u1"}}
	require.NoError(t, yaml.UnmarshalStrict([]byte(text), &b.Spec))
	return b
}

func TestSpecOfEverySource(t *testing.T) {
	labels := `"labels":{"kiln.build/name":"app","kiln.build/namespace":"team-a","kiln.build/uid":"u1"}`
	rest := `"sandbox":"SANDBOX_CLASS_GVISOR","network":"NETWORK_MODE_EGRESS","resources":{},` + labels
	for _, c := range []struct{ name, spec, want string }{
		{"nothing", `{}`, `{"dockerfile":{},` + rest + `}`},
		{"git", `{source: {git: {url: "https://git.example.com/a.git", revision: v1, secretRef: {name: s}}, contextDir: sub}}`,
			`{"source":{"git":{"url":"https://git.example.com/a.git","revision":"v1","credential":"source"},"contextDir":"sub"},"dockerfile":{},"cacheScope":"git:https://git.example.com/a.git#sub",` + rest + `}`},
		{"http", `{source: {http: {url: "https://example.com/a.tar", digest: "sha256:00"}}}`, `{"source":{"http":{"url":"https://example.com/a.tar","digest":"sha256:00"}},"dockerfile":{},` + rest + `}`},
		{"upload", `{source: {upload: {digest: "sha256:00"}}}`, `{"source":{"upload":{"digest":"sha256:00"}},"dockerfile":{},` + rest + `}`},
		{"inline under ConfigMaps", `{source: {inline: [{path: a, content: x, mode: 493}, {path: conf/b, content: lost}], configMaps: [{name: c, destinationDir: conf}]}}`,
			`{"source":{"inline":{"files":[{"path":"a","content":"eA==","mode":493},{"path":"conf/b","content":"ZnJvbSBtYXA="}]}},"dockerfile":{},` + rest + `}`},
		{"images", `{source: {images: [{image: "debian:12", paths: [{sourcePath: /etc/., destinationDir: etc}]}]}}`,
			`{"source":{"images":[{"image":"debian:12","paths":[{"sourcePath":"/etc/.","destinationDir":"etc"}]}]},"dockerfile":{},` + rest + `}`},
		{"dockerfile", `{strategy: {dockerfile: {path: Dockerfile.prod, target: app, labels: {a: b}, extraHosts: {h: 192.0.2.1}}}, buildArgs: [{name: A, value: "1"}, {name: B, valueFrom: {configMapKeyRef: {name: c, key: k}}}]}`,
			`{"dockerfile":{"path":"Dockerfile.prod","target":"app","buildArgs":{"A":"1","B":"value of c"},"labels":{"a":"b"},"extraHosts":{"h":"192.0.2.1"}},` + rest + `}`},
		{"outputs", `{output: {image: "r.example.com/a:1", additionalImages: ["r.example.com/a:2"], node: true, compression: zstd, annotations: {x: z}}}`,
			`{"dockerfile":{},"outputs":[{"registry":{"image":"r.example.com/a:1","compression":"zstd","annotations":{"x":"z"}}},{"node":{"image":"r.example.com/a:1"}},{"registry":{"image":"r.example.com/a:2","compression":"zstd","annotations":{"x":"z"}}},{"node":{"image":"r.example.com/a:2"}}],"cacheScope":"image:r.example.com/a",` + rest + `}`},
		{"output to the node only", `{output: {image: "a:1", push: false, node: true}}`, `{"dockerfile":{},"outputs":[{"node":{"image":"a:1"}}],"cacheScope":"image:docker.io/library/a",` + rest + `}`},
		{"cache and the rest", `{cache: {scope: s, from: [{type: registry, attributes: {ref: r}}], to: [{type: inline}]}, platforms: [linux/arm64], attestations: {sbom: "true"}, noCache: true, pull: true, sourceDateEpoch: 5}`,
			`{"dockerfile":{},"cacheFrom":[{"type":"registry","attributes":{"ref":"r"}}],"cacheTo":[{"type":"inline"}],"platforms":["linux/arm64"],"cacheScope":"s","attestations":{"sbom":"true"},"noCache":true,"pull":true,"sourceDateEpoch":"5",` + rest + `}`},
		{"steps", `{env: [{name: ALL, value: "1"}, {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: k}}}], secrets: [{id: npm, secretRef: {name: s, key: k}}], strategy: {steps: {
		    steps: [{name: one, image: golang, command: [go], args: [build], workingDir: src, user: "1", env: [{name: X, value: z}], secrets: [{id: npm, path: /n}], caches: [{id: c, path: /c}], timeout: 5m},
		            {name: two, image: busybox, env: [{name: TOKEN, value: own}]}],
		    image: {base: scratch, copies: [{source: bin, destination: /bin, chown: "1:1"}], entrypoint: [/bin/app], cmd: [x], env: {E: f}, workingDir: /w, user: u, labels: {l: m}}}}}`,
			`{"steps":{"steps":[{"name":"one","image":"golang","command":["go"],"args":["build"],"env":{"X":"z"},"workingDir":"src","user":"1","secrets":[{"id":"kiln.env.s.k","env":"TOKEN"},{"id":"npm","path":"/n"}],"caches":[{"id":"c","path":"/c"}],"timeout":"300s"},
			  {"name":"two","image":"busybox","env":{"TOKEN":"own"}}],
			  "image":{"copies":[{"source":"bin","destination":"/bin","chown":"1:1"}],"env":{"E":"f"},"entrypoint":["/bin/app"],"cmd":["x"],"workingDir":"/w","user":"u","labels":{"l":"m"}},"env":{"ALL":"1"}},
			  "secrets":[{"id":"kiln.env.s.k"},{"id":"npm"}],` + rest + `}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := specOf(t, c.spec)
			require.NoError(t, Validate(b))
			in := &inputs.Inputs{Credentials: &agentv1.Credentials{Secrets: map[string][]byte{}}, Values: map[v1alpha1.KeyReference]string{{Name: "c", Key: "k"}: "value of c"}}
			if b.Spec.Source != nil && len(b.Spec.Source.ConfigMaps) > 0 {
				in.Files = []*agentv1.InlineFile{{Path: "conf/b", Content: []byte("from map")}}
			}
			if len(b.Spec.Secrets) > 0 {
				in.Credentials.Secrets = map[string][]byte{"npm": nil, inputs.SecretID(v1alpha1.KeyReference{Name: "s", Key: "k"}): nil}
			}
			got, err := Spec(b, in, policy.Request{Class: policy.GVisor, Network: policy.NetworkEgress})
			require.NoError(t, err)
			want := &agentv1.BuildSpec{}
			require.NoError(t, protojson.Unmarshal([]byte(c.want), want))
			require.True(t, proto.Equal(want, got), protojson.Format(got))
		})
	}
}

func TestSpecHasWhatPolicyDecided(t *testing.T) {
	got, err := Spec(specOf(t, `{}`), &inputs.Inputs{}, policy.Request{Class: policy.Userns, Network: policy.NetworkNone, Timeout: time.Minute, Limits: policy.Limits{CPUMillis: 1, MemoryBytes: 2, PIDs: 3, DiskBytes: 4, Inodes: 5, OpenFiles: 6, LogBytes: 7, LogRate: 8, ShmBytes: 9, StepTimeout: time.Second}})
	require.NoError(t, err)
	require.Equal(t, agentv1.SandboxClass_SANDBOX_CLASS_USERNS, got.Sandbox)
	require.Equal(t, agentv1.NetworkMode_NETWORK_MODE_NONE, got.Network)
	require.Equal(t, time.Minute, got.Timeout.AsDuration())
	require.True(t, proto.Equal(&agentv1.Resources{CpuMillis: 1, MemoryBytes: 2, Pids: 3, DiskBytes: 4, Inodes: 5, OpenFiles: 6, LogBytes: 7, LogRate: 8, ShmBytes: 9, StepTimeout: durationpb.New(time.Second)}, got.Resources))
	for _, r := range []policy.Request{{}, {Class: "runc", Network: policy.NetworkNone}, {Class: policy.GVisor, Network: "host"}} {
		_, err := Spec(specOf(t, `{}`), &inputs.Inputs{}, r)
		require.Error(t, err, "%+v", r)
	}
}

func TestWrongSpecsNameTheField(t *testing.T) {
	for spec, want := range map[string]string{
		`{output: {image: "Registry/APP"}}`:                                       "spec.output.image: ",
		`{output: {image: "a", additionalImages: ["b", "-"]}}`:                    "spec.output.additionalImages[1]: ",
		`{source: {images: [{image: "a b", paths: []}]}}`:                         "spec.source.images[0].image: ",
		`{strategy: {steps: {steps: [{name: a, image: ""}]}}}`:                    "spec.strategy.steps.steps[0].image: ",
		`{strategy: {steps: {steps: [{name: a, image: b, secrets: [{id: x}]}]}}}`: "spec.strategy.steps.steps[0].secrets[0].id: ",
		`{strategy: {steps: {steps: [{name: a, image: b, timeout: 1ms}]}}}`:       "spec.strategy.steps.steps[0].timeout: ",
		`{timeout: 0s}`:      "spec.timeout: ",
		`{stepTimeout: 1ms}`: "spec.stepTimeout: ",
		`{secrets: [{id: kiln.env.s.k, secretRef: {name: a, key: b}}]}`:                   "spec.secrets[0].id: ",
		`{buildArgs: [{name: A, valueFrom: {secretKeyRef: {name: secret, key: token}}}]}`: "spec.buildArgs[0].valueFrom.secretKeyRef: ",
	} {
		require.ErrorContains(t, Validate(specOf(t, spec)), want, spec)
	}
}

func TestFailureOfTheAgent(t *testing.T) {
	for r := range agentv1.FailureReason_name {
		d := Failure(&agentv1.Failure{Reason: agentv1.FailureReason(r)})
		require.NotEmpty(t, d.Reason)
		require.Regexp(t, `^[A-Za-z]+$`, d.Reason, "as a condition's reason has to be")
	}
	require.Equal(t, v1alpha1.ReasonInternal, Failure(&agentv1.Failure{Reason: 9999}).Reason)
	require.Equal(t, v1alpha1.ReasonInternal, Failure(nil).Reason)
}

func TestUsageOfAStep(t *testing.T) {
	require.Nil(t, Step(&agentv1.StepResult{}).Usage)
	got := Step(&agentv1.StepResult{Usage: &agentv1.StepUsage{
		Cpu: durationpb.New(1500 * time.Millisecond), PeakMemoryBytes: 1, DiskBytes: 2, LimitsReached: append(make([]string, 99), "pids"),
	}}).Usage
	require.Len(t, got.LimitsReached, 16)
	got.LimitsReached = nil
	require.Equal(t, &v1alpha1.StepUsage{CPUMilliseconds: 1500, PeakMemoryBytes: 1, DiskBytes: 2}, got)
}

func TestOutputOfTheAgent(t *testing.T) {
	require.Nil(t, Output(nil, &agentv1.BuildResult{}))
	names := make([]string, 1000)
	got := Output(&v1alpha1.Output{Image: "a"}, &agentv1.BuildResult{ImageDigest: "sha256:short", ImageNames: names})
	require.Empty(t, got.ShortDigest)
	require.Len(t, got.Names, 64)
}

func FuzzText(f *testing.F) {
	f.Add("a\x00b\x1b[31m\xff", 4)
	f.Add(strings.Repeat("ü", 100), 7)
	f.Fuzz(func(t *testing.T, s string, most int) {
		most = max(0, most%4096)
		got := Text(s, most)
		require.LessOrEqual(t, len(got), most)
		require.True(t, utf8.ValidString(got))
		require.NotContains(t, got, "\x1b")
		require.LessOrEqual(t, len(name(s)), 256)
	})
}
