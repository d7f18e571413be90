package controller

import (
	"testing"

	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// raw is an object as a user writes it.
func raw(t *testing.T, kind, ns, name, spec string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{Object: map[string]any{}}
	var s map[string]any
	require.NoError(t, yaml.Unmarshal([]byte(spec), &s), spec)
	o.Object["spec"] = s
	o.SetAPIVersion("kiln.build/v1alpha1")
	o.SetKind(kind)
	o.SetNamespace(ns)
	o.SetName(name)
	return o
}

func TestAPIServerRefusesWhatIsWrongInForm(t *testing.T) {
	ns := namespace(t, nil)
	strict := client.NewNamespacedClient(client.WithFieldValidation(api, "Strict"), ns)
	for spec, want := range map[string]string{
		`{sauce: {}}`: `unknown field "spec.sauce"`,
		`{source: {git: {url: "https://x/y"}, http: {url: "https://x/y"}}}`:                   "spec.source",
		`{source: {git: {url: "https://x/y"}, inline: [{path: a}]}}`:                          "spec.source",
		`{source: {git: {url: "ext::sh -c id"}}}`:                                             "spec.source.git.url",
		`{source: {git: {url: "file:///etc"}}}`:                                               "spec.source.git.url",
		`{source: {git: {url: "-u@host:path"}}}`:                                              "spec.source.git.url",
		`{source: {git: {url: "https://user:pw@host/x"}}}`:                                    "url must have no credentials",
		`{source: {git: {url: "https://x/y", revision: "--upload-pack=x"}}}`:                  "spec.source.git.revision",
		`{source: {http: {url: "http://x/y.tar"}}}`:                                           "an http URL needs a digest",
		`{source: {http: {url: "https://x/y.tar", digest: "md5:0"}}}`:                         "spec.source.http.digest",
		`{source: {upload: {digest: "sha256:short"}}}`:                                        "spec.source.upload.digest",
		`{source: {inline: [{path: "../x"}]}}`:                                                "spec.source.inline[0].path",
		`{source: {inline: [{path: "/x"}]}}`:                                                  "spec.source.inline[0].path",
		`{source: {inline: [{path: "a/./b"}]}}`:                                               "spec.source.inline[0].path",
		`{source: {inline: [{path: a, content: x, binaryContent: eA==}]}}`:                    "content and binaryContent exclude each other",
		`{source: {inline: [{path: a}, {path: a}]}}`:                                          "Duplicate value",
		`{source: {inline: [{path: a, mode: 2541}]}}`:                                         "spec.source.inline[0].mode",
		`{source: {contextDir: "a/../../b"}}`:                                                 "spec.source.contextDir",
		`{source: {configMaps: [{name: a, destinationDir: /etc}]}}`:                           "spec.source.configMaps[0].destinationDir",
		`{source: {images: [{image: a, paths: [{sourcePath: etc}]}]}}`:                        "spec.source.images[0].paths[0].sourcePath",
		`{strategy: {dockerfile: {path: ../../etc/passwd}}}`:                                  "spec.strategy.dockerfile.path",
		`{strategy: {dockerfile: {path: a, inline: b}}}`:                                      "path and inline exclude each other",
		`{strategy: {dockerfile: {}, steps: {steps: [{name: a, image: b}]}}}`:                 "dockerfile and steps exclude each other",
		`{strategy: {steps: {steps: []}}}`:                                                    "spec.strategy.steps.steps",
		`{strategy: {steps: {steps: [{name: A_B, image: b}]}}}`:                               "spec.strategy.steps.steps[0].name",
		`{env: [{name: A, value: b}]}`:                                                        "a Dockerfile takes buildArgs",
		`{buildArgs: [{name: "A=B", value: b}]}`:                                              "spec.buildArgs[0].name",
		`{buildArgs: [{name: A, value: b, valueFrom: {configMapKeyRef: {name: a, key: b}}}]}`: "value and valueFrom exclude each other",
		`{output: {image: a, push: false}}`:                                                   "push or node must be true",
		`{output: {image: ""}}`:                                                               "spec.output.image",
		`{output: {image: a, compression: rar}}`:                                              "spec.output.compression",
		`{network: Host}`:                                                                     "spec.network",
		`{resources: {limits: {nvidia.com/gpu: 1}}}`:                                          "limits are cpu, memory",
		`{resources: {limits: {memory: lots}}}`:                                               "spec.resources.limits",
		`{timeout: 0s}`:                                                                       "spec.timeout",
		`{timeout: soon}`:                                                                     "spec.timeout",
		`{state: Paused}`:                                                                     "spec.state",
		`{onNodeLoss: Panic}`:                                                                 "spec.onNodeLoss",
		`{attestations: {signature: "true"}}`:                                                 "attestations are provenance and sbom",
		`{platforms: ["linux/amd64/../../x"]}`:                                                "spec.platforms[0]",
		`{cache: {from: [{type: local}]}}`:                                                    "spec.cache.from[0].type",
		`{secrets: [{id: "../x", secretRef: {name: a, key: b}}]}`:                             "spec.secrets[0].id",
		`{secrets: [{id: a, secretRef: {name: a, namespace: other, key: b}}]}`:                `unknown field "spec.secrets[0].secretRef.namespace"`,
		`{output: {image: a, pushSecret: {name: b, namespace: other}}}`:                       `unknown field "spec.output.pushSecret.namespace"`,
		`{source: {configMaps: [{name: a, namespace: other}]}}`:                               `unknown field "spec.source.configMaps[0].namespace"`,
	} {
		err := strict.Create(t.Context(), raw(t, "Build", ns, "wrong", spec))
		require.Error(t, err, spec)
		require.ErrorContains(t, err, want, spec)
	}
	require.ErrorContains(t, strict.Create(t.Context(), raw(t, "Build", ns, "a-name-that-has-more-characters-than-a-label-of-kubernetes-may-have", `{}`)), "at most 63 characters")
}

func TestOnlyStateAndRetentionCanChange(t *testing.T) {
	ns := namespace(t, nil)
	b := raw(t, "Build", ns, "app", `{source: {git: {url: "https://x/y"}}, output: {image: a}, buildArgs: [{name: A, value: b}]}`)
	require.NoError(t, api.Create(t.Context(), b))
	patch := func(p string) error {
		return api.Patch(t.Context(), b.DeepCopy(), client.RawPatch("application/merge-patch+json", []byte(p)))
	}
	for field, value := range map[string]string{
		"source": `{"git":{"url":"https://x/z"}}`, "strategy": `{"dockerfile":{}}`, "output": `{"image":"b"}`, "buildArgs": `null`, "secrets": `[{"id":"a","secretRef":{"name":"a","key":"b"}}]`,
		"imagePullSecrets": `[{"name":"a"}]`, "runtimeClassName": `"userns"`, "network": `"Egress"`, "resources": `{"limits":{"cpu":"1"}}`, "timeout": `"1h"`, "nodeSelector": `{"a":"b"}`,
		"tolerations": `[{"operator":"Exists"}]`, "serviceAccountName": `"admin"`, "onNodeLoss": `"Retry"`, "attestations": `{"sbom":"true"}`, "platforms": `["linux/arm64"]`,
		"cache": `{"scope":"x"}`, "noCache": `true`, "pull": `true`, "sourceDateEpoch": `1`,
	} {
		err := patch(`{"spec":{"` + field + `":` + value + `}}`)
		require.True(t, apierrors.IsInvalid(err), "%s: %v", field, err)
		require.ErrorContains(t, err, field+" cannot change")
	}
	require.NoError(t, patch(`{"spec":{"retention":{"ttlAfterFailed":"1h"}}}`))
	require.NoError(t, patch(`{"spec":{"state":"Cancelled"}}`))
	require.ErrorContains(t, patch(`{"spec":{"state":null}}`), "a cancelled build cannot be taken back")
	require.NoError(t, api.Delete(t.Context(), b))
}

func TestDefaultsOfABuild(t *testing.T) {
	ns := namespace(t, nil)
	o := raw(t, "Build", ns, "app", `{output: {image: a}}`)
	require.NoError(t, api.Create(t.Context(), o))
	b := get(t, &v1alpha1.Build{ObjectMeta: newBuild(ns, "app", "").ObjectMeta})
	require.Equal(t, "default", b.Spec.ServiceAccountName)
	require.Equal(t, v1alpha1.FailOnNodeLoss, b.Spec.OnNodeLoss)
	require.True(t, *b.Spec.Output.Push)
	require.NoError(t, api.Delete(t.Context(), b))
}

func TestPoliciesThatContradictThemselves(t *testing.T) {
	for spec, want := range map[string]string{
		`{sandboxClasses: {allowed: [runc]}}`:                     "spec.sandboxClasses.allowed[0]",
		`{sandboxClasses: {allowed: []}}`:                         "spec.sandboxClasses.allowed",
		`{sandboxClasses: {allowed: [gvisor], required: userns}}`: "required must be an allowed class",
		`{sandboxClasses: {required: gvisor, default: userns}}`:   "default must be the required class",
		`{network: {allowed: [None], default: Egress}}`:           "default must be an allowed network",
		`{network: {allowed: [Host]}}`:                            "spec.network.allowed[0]",
		`{maxTimeout: 0s}`:                                        "spec.maxTimeout",
		`{maxResources: {limits: {gpus: 1}}}`:                     "limits are cpu",
		`{registries: {pull: [""]}}`:                              "spec.registries.pull[0]",
	} {
		o := raw(t, "SandboxPolicy", "", "wrong", spec)
		require.ErrorContains(t, api.Create(t.Context(), o), want, spec)
	}
}
