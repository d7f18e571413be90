package strategy

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// TestHostileArchives uploads archives that try to reach what is not theirs.
func TestHostileArchives(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	require.NoError(t, os.WriteFile(victim, []byte("untouched"), 0o644))
	up := strings.Repeat("../", 30)
	file := func(name, content string) (tar.Header, string) {
		return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}, content
	}
	type entry func() (tar.Header, string)
	named := func(name, content string) entry { return func() (tar.Header, string) { return file(name, content) } }
	link := func(kind byte, name, target string) entry {
		return func() (tar.Header, string) {
			return tar.Header{Name: name, Typeflag: kind, Linkname: target, Mode: 0o777}, ""
		}
	}
	for name, list := range map[string][]entry{
		"up":                        {named(up+strings.TrimPrefix(victim, "/"), "pwned")},
		"absolute":                  {named(victim, "pwned")},
		"through a link":            {link(tar.TypeSymlink, "d", outside), named("d/victim", "pwned")},
		"through a link up":         {link(tar.TypeSymlink, "d", up+strings.TrimPrefix(outside, "/")), named("d/victim", "pwned")},
		"over a link":               {link(tar.TypeSymlink, "f", victim), named("f", "pwned")},
		"hard link":                 {link(tar.TypeLink, "f", victim), named("f", "pwned")},
		"hard link up":              {link(tar.TypeLink, "f", up+strings.TrimPrefix(victim, "/")), named("f", "pwned")},
		"removed through a link":    {link(tar.TypeSymlink, "d", outside), named("d/.wh.victim", "")},
		"the root becomes a link":   {link(tar.TypeSymlink, ".", outside), named("victim", "pwned")},
		"the root's mode and owner": {func() (tar.Header, string) { return tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0, Uid: 5}, "" }, named("f", "x")},
	} {
		t.Run(name, func(t *testing.T) {
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			for _, e := range list {
				h, content := e()
				require.NoError(t, w.WriteHeader(&h))
				_, err := w.Write([]byte(content))
				require.NoError(t, err)
			}
			h, content := file("Dockerfile", "FROM scratch\nCOPY . /\n")
			require.NoError(t, w.WriteHeader(&h))
			_, err := w.Write([]byte(content))
			require.NoError(t, err)
			require.NoError(t, w.Close())
			archive := filepath.Join(t.TempDir(), "a.tar")
			require.NoError(t, os.WriteFile(archive, buf.Bytes(), 0o600))
			// It may fail or succeed; it changes and shows nothing outside.
			out := run(t, c, Inputs{
				Spec: &agentv1.BuildSpec{
					Source:   &agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: digest.FromBytes(buf.Bytes()).String()}}},
					Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}, Outputs: pushTo(reg.host + "/hostile:1"),
				},
				UploadFile: func(string) (string, error) { return archive, nil },
			})
			data, err := os.ReadFile(victim)
			require.NoError(t, err)
			require.Equal(t, "untouched", string(data))
			left, err := os.ReadDir(outside)
			require.NoError(t, err)
			require.Len(t, left, 1)
			if out.err == nil {
				for path, content := range reg.pull(reg.host + "/hostile:1").files {
					require.NotContains(t, content, "untouched", path)
				}
			}
		})
	}
}

// TestDeviceNodesAreNoDevices puts device nodes into a source and has steps open
// them.
func TestDeviceNodesAreNoDevices(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(nil)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	// The kernel's log, which no sandbox has.
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "kmsg", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 11}))
	require.NoError(t, w.Close())
	archive := filepath.Join(t.TempDir(), "a.tar")
	require.NoError(t, os.WriteFile(archive, buf.Bytes(), 0o600))
	spec := stepsSpec(&agentv1.Source{From: &agentv1.Source_Upload{Upload: &agentv1.UploadedSource{Digest: digest.FromBytes(buf.Bytes()).String()}}}, nil,
		shell("open", busybox, "ls -l kmsg && ! cat kmsg && ! echo x >> kmsg"))
	out := mustRun(t, c, Inputs{Spec: spec, UploadFile: func(string) (string, error) { return archive, nil }})
	require.Contains(t, out.log, "ermission denied")
}
