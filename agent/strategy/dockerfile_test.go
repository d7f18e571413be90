package strategy

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

func TestDockerfileFromInlineSource(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(nil)
	src := inlineSource(map[string]string{
		"sub/Dockerfile.app": "FROM " + busybox + " AS base\nARG WHO\nRUN echo hello $WHO > /hello && grep example.internal /etc/hosts > /hosts\nCOPY deep/file /file\nCOPY run.sh /run.sh\nFROM base AS last\nRUN false\n",
		"sub/deep/file":      "content",
		"sub/run.sh":         "true",
		"other":              "",
	})
	src.GetInline().Files[3].Mode = 0o750
	src.ContextDir = "./sub/"
	image := reg.host + "/app:1"
	out := mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
		Source: src,
		Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{
			Path: "Dockerfile.app", Target: "base",
			BuildArgs: map[string]string{"WHO": "world, and = all"}, Labels: map[string]string{"team": "a"},
			ExtraHosts: map[string]string{"example.internal": "192.0.2.1"},
		}},
		Outputs: pushTo(image),
	}})
	got := reg.pull(image)
	require.Equal(t, "hello world, and = all\n", got.files["hello"])
	require.Contains(t, got.files["hosts"], "192.0.2.1")
	require.Equal(t, "content", got.files["file"])
	require.Equal(t, int64(0o750), got.headers["run.sh"].Mode&0o777)
	require.Equal(t, "a", got.config.Config.Labels["team"])
	require.NotEmpty(t, out.response["containerimage.digest"])
	require.NotContains(t, out.response, RevisionKey)
}

// TestInlineFilesOfTheSameSize builds twice with files that differ in nothing but
// what is in them.
func TestInlineFilesOfTheSameSize(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	for _, content := range []string{"one", "two"} {
		image := reg.host + "/same:" + content
		mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
			Source:   inlineSource(map[string]string{"f": content}),
			Strategy: inlineDockerfile("FROM scratch\nCOPY f /\n"),
			Outputs:  pushTo(image),
		}})
		require.Equal(t, content, reg.pull(image).files["f"])
	}
	image := reg.host + "/same:fewer"
	mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
		Source: inlineSource(map[string]string{"g": "1"}), Strategy: inlineDockerfile("FROM scratch\nCOPY . /\n"), Outputs: pushTo(image),
	}})
	require.Equal(t, entries{"g": "1"}, reg.pull(image).files, "nothing of an earlier build is there")
}

func inlineDockerfile(s string) *agentv1.BuildSpec_Dockerfile {
	return &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: s}}
}

func TestDockerfileFromUploadedArchive(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	archive := tarOf(t, entries{
		"app/Dockerfile": "FROM scratch\nCOPY . /\n", "app/inside": "yes",
		"escape": "-> ../../../../etc", "absolute": "-> /etc", "outside": "no",
	})
	file := filepath.Join(t.TempDir(), "archive.tar")
	require.NoError(t, os.WriteFile(file, archive, 0o600))
	in := Inputs{
		Spec: &agentv1.BuildSpec{
			Source: &agentv1.Source{
				From:       &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: digest.FromBytes(archive).String()}},
				ContextDir: "app",
			},
			Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}},
		},
		UploadFile: func(d string) (string, error) {
			require.Equal(t, digest.FromBytes(archive).String(), d)
			return file, nil
		},
	}
	in.Spec.Outputs = pushTo(reg.host + "/up:1")
	mustRun(t, c, in)
	require.Equal(t, entries{"Dockerfile": "FROM scratch\nCOPY . /\n", "inside": "yes"}, reg.pull(reg.host+"/up:1").files)

	t.Run("a second build finds it unpacked", func(t *testing.T) {
		in.Spec.Outputs = nil
		require.Contains(t, mustRun(t, c, in).names, "unpack source archive cached=true")
	})
	t.Run("a link out of the archive as context", func(t *testing.T) {
		for _, dir := range []string{"escape", "absolute"} {
			in.Spec.Source.ContextDir = dir
			out := run(t, c, in)
			require.Error(t, out.err)
			require.NotContains(t, out.err.Error(), "passwd")
		}
	})
	t.Run("no archive", func(t *testing.T) {
		in.Spec.Source.ContextDir = ""
		text := []byte("this is text")
		require.NoError(t, os.WriteFile(file, text, 0o600))
		in.Spec.Source.GetUpload().Digest = digest.FromBytes(text).String()
		in.UploadFile = func(string) (string, error) { return file, nil }
		out := run(t, c, in)
		require.ErrorContains(t, out.cause, "spec.source.upload: it is not an archive")
		var fault *SourceError
		require.ErrorAs(t, out.cause, &fault)
	})
}
