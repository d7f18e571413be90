package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	yamlv3 "go.yaml.in/yaml/v3"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// MaxSize bounds a configuration file, in bytes.
const MaxSize = 1 << 20

// maxDepth bounds how deep a file nests.
const maxDepth = 32

// Decode reads a file. It refuses unknown and repeated fields with their path, and
// does nothing else: call Complete when flags have been applied.
func Decode(data []byte) (*Agent, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("read configuration: larger than %d bytes", MaxSize)
	}
	if err := checkDocument(data); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	asJSON, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c := &Agent{}
	strict, err := kjson.UnmarshalStrict(asJSON, c)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if c.APIVersion != APIVersion || c.Kind != Kind {
		return nil, fmt.Errorf("read configuration: apiVersion %q, kind %q: want %q and %q", c.APIVersion, c.Kind, APIVersion, Kind)
	}
	return c, nil
}

// Encode writes c as a file that Decode reads.
func (c *Agent) Encode() ([]byte, error) {
	out, err := yaml.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return out, nil
}

// Complete fills in defaults and validates. The error lists every problem with the
// path of its field.
func (c *Agent) Complete() error {
	c.setDefaults()
	if problems := c.validate(); len(problems) > 0 {
		return fmt.Errorf("check configuration: %w", problems.ToAggregate())
	}
	return nil
}

// checkDocument looks for what the decoder of values would report without a path,
// or not at all.
func checkDocument(data []byte) error {
	dec := yamlv3.NewDecoder(bytes.NewReader(data))
	var doc, rest yamlv3.Node
	if err := dec.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := dec.Decode(&rest); !errors.Is(err, io.EOF) {
		return errors.New("want one document, and nothing after it")
	}
	return checkNode(&doc, "", 0)
}

func checkNode(n *yamlv3.Node, path string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("line %d: %s: nested too deep", n.Line, path)
	}
	switch n.Kind {
	case yamlv3.AliasNode:
		return fmt.Errorf("line %d: %s: aliases are not supported", n.Line, path)
	case yamlv3.DocumentNode:
		for _, c := range n.Content {
			if err := checkNode(c, path, depth+1); err != nil {
				return err
			}
		}
	case yamlv3.SequenceNode:
		for i, c := range n.Content {
			if err := checkNode(c, path+"["+strconv.Itoa(i)+"]", depth+1); err != nil {
				return err
			}
		}
	case yamlv3.MappingNode:
		return checkMapping(n, path, depth)
	}
	return nil
}

func checkMapping(n *yamlv3.Node, path string, depth int) error {
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := key.Value
		if path != "" {
			at = path + "." + key.Value
		}
		if key.Kind != yamlv3.ScalarNode {
			return fmt.Errorf("line %d: %s: a field's name must be text", key.Line, at)
		}
		if first, ok := seen[key.Value]; ok {
			return fmt.Errorf("line %d: duplicate field %q, first set in line %d", key.Line, at, first)
		}
		seen[key.Value] = key.Line
		if err := checkNode(value, at, depth+1); err != nil {
			return err
		}
	}
	return nil
}
