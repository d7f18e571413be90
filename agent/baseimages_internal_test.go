package agent

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestImagesOfSpec(t *testing.T) {
	dockerfile := func(text string, args map[string]string) *agentv1.BuildSpec {
		return &agentv1.BuildSpec{Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{Inline: text, BuildArgs: args}}}
	}
	inSource := func(dir, path, file string) *agentv1.BuildSpec {
		s := dockerfile("", nil)
		s.GetDockerfile().Path = path
		s.Source = &agentv1.Source{ContextDir: dir, From: &agentv1.Source_Inline{Inline: &agentv1.InlineSource{Files: []*agentv1.InlineFile{
			{Path: "other", Content: []byte("FROM wrong")}, {Path: file, Content: []byte("FROM right")},
		}}}}
		return s
	}
	var many strings.Builder
	for i := range 2 * maxBaseImages {
		fmt.Fprintf(&many, "FROM image-%d\n", i)
	}
	growing := "ARG A0=aaaaaaaa\n"
	for i := range 60 {
		growing += fmt.Sprintf("ARG A%d=$A%d$A%d\n", i+1, i, i)
	}
	for name, tt := range map[string]struct {
		spec *agentv1.BuildSpec
		want []string
	}{
		"one stage":              {dockerfile("FROM debian:12\nRUN x\n", nil), []string{"debian:12"}},
		"stages":                 {dockerfile("FROM --platform=linux/amd64 golang AS Build\nFROM build\nFROM scratch\nFROM alpine as x\nFROM golang", nil), []string{"golang", "alpine"}},
		"arguments":              {dockerfile("ARG V=1 NAME=\"go\"\nARG FULL=${NAME}:$V\nFROM $FULL AS a\nARG V=3\nFROM x:$V", map[string]string{"V": "2"}), []string{"go:2", "x:2"}},
		"arguments that grow":    {dockerfile(growing+"FROM a$A60\nFROM $A60\nFROM b", nil), []string{"a", "b"}},
		"a digest":               {dockerfile("FROM a@sha256:00", nil), []string{"a@sha256:00"}},
		"a name that is empty":   {dockerfile("FROM ${NONE:-x}\nFROM b", nil), []string{"b"}},
		"no Dockerfile":          {dockerfile("FROM\n", nil), nil},
		"binary":                 {dockerfile("\x00\xff<<", nil), nil},
		"file of the source":     {inSource("", "", "Dockerfile"), []string{"right"}},
		"file in a directory":    {inSource("app", "build/file", "app/build/file"), []string{"right"}},
		"file that is not there": {inSource("", "", "app/Dockerfile"), nil},
		"too many":               {dockerfile(many.String(), nil), nil},
		"steps": {&agentv1.BuildSpec{
			Source:   &agentv1.Source{Images: []*agentv1.ImageSource{{Image: "content"}}, NamedContexts: map[string]string{"c": "docker-image://context", "d": "https://x"}},
			Strategy: &agentv1.BuildSpec_Steps{Steps: &agentv1.StepsStrategy{Steps: []*agentv1.BuilderStep{{Image: "step"}, {Image: "step"}}, Image: &agentv1.StepsImage{Base: "base"}}},
		}, []string{"content", "context", "step", "base"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := images(tt.spec)
			if name == "too many" {
				require.Len(t, got, maxBaseImages)
				return
			}
			require.Equal(t, tt.want, got)
		})
	}
}
