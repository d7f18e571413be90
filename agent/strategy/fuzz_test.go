package strategy

import (
	"encoding/json"
	"path"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func FuzzImageName(f *testing.F) {
	for _, s := range []string{"busybox", "a.example:5000/b/c:t@sha256:" + strings.Repeat("0", 64), "../x", "-x", "A/b", "a.example/x:y:z", "[::1]:5000/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, check := range []func(string) (string, error){checkImage, checkTarget} {
			name, err := check(s)
			if err != nil {
				continue
			}
			require.False(t, strings.HasPrefix(name, "-"), name)
			named, err := reference.ParseNormalizedNamed(name)
			require.NoError(t, err)
			require.Equal(t, name, named.String(), "the name is in its full form")
			again, err := check(name)
			require.NoError(t, err)
			require.Equal(t, name, again)
		}
	})
}

func FuzzRelativePath(f *testing.F) {
	for _, s := range []string{"a/b", "..", "a/../..", "/a", "a//b/./c", "a\x00", ".", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		clean, err := cleanRelative(s)
		if err != nil {
			return
		}
		require.False(t, path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") || strings.ContainsRune(clean, 0), clean)
		require.True(t, strings.HasPrefix(path.Join("/root", clean), "/root"), clean)
		require.NoError(t, checkAbsolute("/"+clean))
	})
}

func FuzzSourceURLs(f *testing.F) {
	for _, s := range []string{
		"https://a.example/r.git", "git@a.example:r.git", "ssh://git@a.example/r", "ext::sh -c id", "--upload-pack=x", "file:///etc", "ssh://-oProxyCommand=x/y", "https://u:p@a.example/r", "http://127.0.0.1/r", "https://a/r#main:x", "-oProxyCommand=x:y", "a::b",
	} {
		f.Add(s, "main")
	}
	f.Add("https://a.example/x", "--upload-pack=x")
	f.Fuzz(func(t *testing.T, s, revision string) {
		if u, err := parseGitURL(s); err == nil {
			require.Contains(t, []string{"http", "https", "ssh"}, u.Scheme)
			require.False(t, strings.HasPrefix(u.Remote, "-") || strings.HasPrefix(u.Host, "-"), "%q", u.Remote)
			require.False(t, strings.ContainsAny(u.Remote, " \n\r\t\x00"), "%q", u.Remote)
			require.False(t, strings.Contains(u.Remote, "::") && !strings.Contains(u.Remote, "://") && !strings.Contains(u.Remote, "@"), "%q is for a helper of git", u.Remote)
			if u.Scheme != "ssh" {
				require.Nil(t, u.User)
			}
		}
		if u, err := parseHTTPURL(s, true); err == nil {
			require.Contains(t, []string{"http", "https"}, u.Scheme)
			require.Nil(t, u.User)
			require.NotEmpty(t, u.Host)
		}
		if checkRevision(revision) == nil {
			require.False(t, strings.HasPrefix(revision, "-") || strings.Contains(revision, "..") || strings.ContainsAny(revision, " :\n\x00"), "%q", revision)
		}
		require.NotContains(t, redact("https://user:secret@"+s), "secret@")
	})
}

// FuzzImageConfig reads configurations of images that steps run in.
func FuzzImageConfig(f *testing.F) {
	for _, s := range []string{
		`{"config":{"Env":["A=b","C"],"Cmd":["x"],"Entrypoint":["y"],"WorkingDir":"../x","User":"-1"},"history":[{}]}`, `{"config":null}`, `{"config":{"Env":["","=","==\u0000"]}}`, `{}`, `[]`, `{"config":{"Labels":null,"Shell":[""]}}`,
	} {
		f.Add([]byte(s), "NAME", "value")
	}
	f.Fuzz(func(t *testing.T, raw []byte, name, value string) {
		im := &stepImage{raw: raw}
		if json.Unmarshal(raw, &im.config) != nil {
			return
		}
		_ = arguments(&agentv1.BuilderStep{}, im.config.Config)
		before := len(im.config.Config.Env)
		b := &stepsBuild{spec: &agentv1.BuildSpec{}}
		out := b.config(&agentv1.StepsImage{Env: map[string]string{name: value}, WorkingDir: value, Labels: map[string]string{name: value}}, im, nil)
		require.Contains(t, out.Config.Env, name+"="+value)
		require.LessOrEqual(t, len(out.Config.Env), before+1)
		_, err := json.Marshal(out)
		require.NoError(t, err)
	})
}
