package config

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDocumentation wants docs/agent.md to have every field, and its example to be
// one that the agent takes.
func TestDocumentation(t *testing.T) {
	data, err := os.ReadFile("../../docs/agent.md")
	require.NoError(t, err)
	doc := string(data)
	_, rest, ok := strings.Cut(doc, "```yaml\n")
	require.True(t, ok)
	example, _, ok := strings.Cut(rest, "```")
	require.True(t, ok)
	_, err = load(example)
	require.NoError(t, err)

	_, rest, ok = strings.Cut(doc, "| field | default | meaning |")
	require.True(t, ok)
	table, _, ok := strings.Cut(rest, "\n\n")
	require.True(t, ok)
	eachField(reflect.TypeFor[Agent](), "", func(path, name string) {
		if name == "apiVersion" || name == "kind" {
			return
		}
		require.Truef(t, strings.Contains(table, name+"`") || strings.Contains(table, name+".") || strings.Contains(table, name+"["),
			"%s is not in docs/agent.md", path)
	})
}

func eachField(typ reflect.Type, path string, visit func(path, name string)) {
	switch typ.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		eachField(typ.Elem(), path, visit)
	case reflect.Struct:
		for f := range typ.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			at := strings.TrimPrefix(path+"."+name, ".")
			visit(at, name)
			eachField(f.Type, at, visit)
		}
	}
}
