package agent

import (
	"bytes"
	"cmp"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	// maxBaseImages bounds how many images a node is asked about for one spec.
	maxBaseImages = 32
	// maxName bounds a name and what it is made from, in bytes: arguments that name
	// each other several times would grow without end.
	maxName = 1024
)

// images are the names of the images that a spec is known to read: those in it, and
// those that its Dockerfile begins stages with, when the text of that is in the spec.
// They are for an estimate; nothing is allowed or refused by them.
func images(spec *agentv1.BuildSpec) []string {
	var names []string
	add := func(name string) {
		name = strings.TrimSpace(name)
		if name != "" && len(names) < maxBaseImages && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, image := range pulls(spec) {
		add(image.Name)
	}
	if d := spec.GetDockerfile(); d != nil {
		for _, name := range stageBases(dockerfileText(spec), d.GetBuildArgs()) {
			add(name)
		}
	}
	return names
}

// dockerfileText returns the Dockerfile of a spec that has it; nil: it is elsewhere.
func dockerfileText(spec *agentv1.BuildSpec) []byte {
	d := spec.GetDockerfile()
	if d.GetInline() != "" {
		return []byte(d.GetInline())
	}
	name := path.Join(spec.GetSource().GetContextDir(), cmp.Or(d.GetPath(), "Dockerfile"))
	for _, f := range spec.GetSource().GetInline().GetFiles() {
		if path.Clean(f.GetPath()) == name {
			return f.GetContent()
		}
	}
	return nil
}

// stageBases returns the images that a Dockerfile's stages begin with. args has the values
// of its arguments that are not the defaults. A name that cannot be told is left out.
func stageBases(text []byte, args map[string]string) []string {
	file, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	var bases []string
	values, stages := map[string]string{}, map[string]bool{"scratch": true}
	for name, given := range args {
		if len(given) <= maxName {
			values[name] = given
		}
	}
	expand := func(word string) string {
		if len(word) > maxName {
			return ""
		}
		if word = os.Expand(word, func(name string) string { return values[name] }); len(word) > maxName {
			return ""
		}
		return word
	}
	for _, n := range file.AST.Children {
		switch strings.ToLower(n.Value) {
		case "arg":
			if len(bases) > 0 {
				continue // it is the stage's own
			}
			for a := n.Next; a != nil; a = a.Next {
				name, byDefault, _ := strings.Cut(a.Value, "=")
				if _, given := values[name]; !given {
					values[name] = expand(strings.Trim(byDefault, `"'`))
				}
			}
		case "from":
			if n.Next == nil {
				continue
			}
			if name := expand(n.Next.Value); name != "" && !stages[strings.ToLower(name)] {
				bases = append(bases, name)
			}
			if as := n.Next.Next; as != nil && as.Next != nil {
				stages[strings.ToLower(as.Next.Value)] = true
			}
		}
	}
	return bases
}
