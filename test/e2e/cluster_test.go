package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// TestKilnOnKubernetes starts one cluster for everything. Its parts may run alone,
// with -run TestKilnOnKubernetes/part.
func TestKilnOnKubernetes(t *testing.T) {
	in := install(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T, *installation)
	}{
		{"sources in each sandbox", testSources},
		{"warm nodes", testWarm},
		{"images run as Pods on their node", testPods},
		{"push with a Secret", testPushSecret},
		{"steps", testSteps},
		{"policy", testPolicy},
		{"bad input", testBadInput},
		{"cancel and delete", testCancelAndDelete},
		{"command", testCommand},
		{"tokens", testTokens},
		{"upload over a slow line", testSlowUpload},
		{"faults", testFaults},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(t, in) })
	}
}

// dockerfile builds on the cluster's busybox image and proves which kernel ran it.
func (in *installation) dockerfile(run string) string {
	return fmt.Sprintf("FROM %s\nCOPY . /src\nRUN %s\n", in.secure("busybox"), run)
}

// secure returns an image of the cluster by its name at the registry with TLS.
func (in *installation) secure(image string) string {
	return strings.Replace(in.Image(image), in.Registry(), in.SecureRegistry(), 1)
}

// inline is a source with one file and a Dockerfile.
func (in *installation) inline(run string) string {
	return fmt.Sprintf(`  source:
    inline:
    - {path: file, content: from-inline}
    - path: Dockerfile
      content: |
%s`, indent(8, in.dockerfile(run)))
}

func indent(n int, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(strings.Repeat(" ", n) + line)
	}
	return b.String()
}

// kernelCheck is a command that fails unless it runs in the sandbox.
var kernelCheck = map[string]string{
	"gvisor": "dmesg | grep -qi gvisor",
	"userns": "! dmesg 2>/dev/null | grep -qi gvisor && ! grep -q ' 4294967295$' /proc/self/uid_map",
}

func testSources(t *testing.T, in *installation) {
	repo, archive, digest := makeSources(t, in)
	url := in.serve(t, repo)
	in.apply(t, fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: context, namespace: %s}\ndata:\n  file: from-configmap\n  Dockerfile: |\n%s",
		namespace, indent(4, in.dockerfile("grep from-configmap /src/file"))))
	in.kubectl(t, "create", "secret", "generic", "token", "-n", namespace, "--from-literal=value=hunter2")
	sources := map[string]string{
		"inline":    in.inline("grep from-inline /src/file"),
		"configmap": "  source:\n    configMaps: [{name: context}]\n",
		"git":       fmt.Sprintf("  source:\n    git: {url: %s/repo.git, revision: main}\n    contextDir: app\n", url),
		"http":      fmt.Sprintf("  source:\n    http: {url: %s/%s, digest: %q}\n", url, archive, digest),
		"images": fmt.Sprintf("  source:\n    images:\n    - image: %s\n      paths: [{sourcePath: /bin/busybox, destinationDir: from-image}]\n  strategy:\n    dockerfile:\n      inline: |\n%s",
			in.secure("busybox"), indent(8, in.dockerfile("/src/from-image/busybox true"))),
		"secret": "  secrets: [{id: token, secretRef: {name: token, key: value}}]\n" +
			in.inline(`--mount=type=secret,id=token test "$(cat /run/secrets/token)" = hunter2`),
	}
	for _, class := range []string{"gvisor", "userns"} {
		for name, source := range sources {
			t.Run(class+" "+name, func(t *testing.T) {
				b := in.succeeds(t, name+"-"+class, "  runtimeClassName: "+class+"\n"+source)
				require.Equal(t, class, b.Status.Sandbox)
				require.NotEmpty(t, b.Status.Steps)
				require.NotNil(t, b.Status.CompletionTime)
				if name == "git" {
					require.NotNil(t, b.Status.Source)
					require.Regexp(t, "^[0-9a-f]{40}$", b.Status.Source.Git.Revision)
				}
			})
		}
		t.Run(class+" kernel", func(t *testing.T) {
			in.succeeds(t, "kernel-"+class, "  runtimeClassName: "+class+"\n"+in.inline(kernelCheck[class]))
		})
	}
}

// testPods builds on each node and runs the image there before, or without, a push.
func testPods(t *testing.T, in *installation) {
	for i, node := range in.Nodes() {
		image := fmt.Sprintf("%s/team-a/app-%d:1", in.SecureRegistry(), i)
		began := time.Now()
		b := in.succeeds(t, fmt.Sprintf("pod-%d", i), fmt.Sprintf("  nodeSelector: {kubernetes.io/hostname: %s}\n  output: {image: %q, push: false, node: true}\n%s",
			node.Name(), image, strings.Replace(in.inline("echo built-here > /who"), "/who\n", "/who\n        CMD [\"cat\", \"/who\"]\n", 1)))
		t.Logf("kubectl apply to the image on its node: %s", time.Since(began).Round(10*time.Millisecond))
		require.Equal(t, node.Name(), b.Status.Node)
		require.Equal(t, "built-here", in.pod(t, fmt.Sprintf("app-%d", i), image, node.Name()))
	}
}

func testSteps(t *testing.T, in *installation) {
	box := in.secure("busybox")
	image := in.SecureRegistry() + "/team-a/steps:1"
	b := in.succeeds(t, "steps", fmt.Sprintf(`  source:
    inline: [{path: input, content: "1 2 3"}]
  env: [{name: WHO, value: everyone}]
  strategy:
    steps:
      steps:
      - {name: first, image: %[1]s, command: [sh, -c], args: ["tr ' ' '\\n' < input > lines"]}
      - {name: second, image: %[1]s, command: [sh, -c, 'test "$(wc -l < lines)" -ge 2 && echo "$WHO" > result']}
      image:
        base: %[1]s
        copies: [{source: result, destination: /result}]
        entrypoint: [cat, /result]
  output: {image: %[2]q, node: true}
`, box, image))
	require.Equal(t, "everyone", in.pod(t, "steps", image, b.Status.Node))
	b = in.fails(t, "steps-fail", fmt.Sprintf(`  strategy:
    steps:
      steps:
      - {name: breaks, image: %s, command: [sh, -c, 'echo what went wrong; exit 7']}
`, box))
	require.Equal(t, buildv1.ReasonStepFailed, b.Status.FailureDetails.Reason)
	require.EqualValues(t, 7, *b.Status.FailureDetails.ExitCode)
	require.Contains(t, b.Status.FailureDetails.LogTail, "what went wrong")
}

func testCancelAndDelete(t *testing.T, in *installation) {
	long := in.inline("echo it-runs; sleep 300")
	in.apply(t, manifest("cancelled", long))
	in.running(t, "cancelled")
	in.kubectl(t, "patch", "build", "cancelled", "-n", namespace, "--type=merge", "-p", `{"spec":{"state":"Cancelled"}}`)
	b := in.ended(t, "cancelled")
	require.Equal(t, buildv1.PhaseCancelled, b.Status.Phase)
	require.Equal(t, buildv1.ReasonCancelled, reason(b))

	in.apply(t, manifest("deleted", long))
	in.running(t, "deleted")
	in.kubectl(t, "delete", "build", "deleted", "-n", namespace, "--timeout=60s")
	in.noSteps(t)

	b = in.fails(t, "timed-out", "  timeout: 3s\n"+long)
	require.Equal(t, buildv1.ReasonTimeout, b.Status.FailureDetails.Reason)
}

// reason is that of the condition Succeeded.
func reason(b *buildv1.Build) string {
	for _, c := range b.Status.Conditions {
		if c.Type == buildv1.ConditionSucceeded {
			return c.Reason
		}
	}
	return ""
}

// running waits until a Build runs its RUN step.
func (in *installation) running(t *testing.T, name string) {
	t.Helper()
	require.Eventually(t, func() bool {
		b := in.get(t, name)
		require.False(t, b.Ended(), explanation(b))
		for _, s := range b.Status.Steps {
			if strings.Contains(s.Name, "RUN") && s.StartTime != nil {
				return true
			}
		}
		return false
	}, buildTimeout, 200*time.Millisecond, "build %s does not run", name)
}

// noSteps waits until no step runs on any node.
func (in *installation) noSteps(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		for _, n := range in.Nodes() {
			out, err := n.Command(t.Context(), "sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").Output()
			require.NoError(t, err)
			if strings.Contains(string(out), "sleep 300") {
				return false
			}
		}
		return true
	}, time.Minute, 500*time.Millisecond, "a step goes on")
}
