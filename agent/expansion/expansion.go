// Package expansion bounds what a Dockerfile becomes when its variables are replaced. A
// few lines that double a variable would make values beyond any memory, and the front end
// that replaces them runs in the agent. The package computes how long values can be, and
// never the values.
package expansion

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"sync"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

const (
	// MaxValue is the most bytes that a variable may have. The kernel gives no process
	// one of more than 128 KiB.
	MaxValue = 1 << 20
	// MaxTotal is the most bytes that all instructions of a Dockerfile may have with
	// their variables replaced, each RUN with its environment.
	MaxTotal = 64 << 20
	// beyond is any length that is too much. Twice that does not overflow.
	beyond = 4 * MaxTotal
)

// Check is about one Dockerfile and what is read with it. It may be used concurrently.
type Check struct {
	args map[string]string

	mu     sync.Mutex
	texts  [][]byte                    // guarded by mu
	images []dockerspec.DockerOCIImage // guarded by mu
}

// New returns a check of a build with these values for arguments.
func New(args map[string]string) *Check { return &Check{args: args} }

// Text adds a Dockerfile and tells whether it becomes too large, by its line. What is no
// Dockerfile is left to who reads it.
func (c *Check) Text(text []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.texts = append(c.texts, text)
	return c.check()
}

// Image adds the configuration of an image that the Dockerfile builds on: the values of
// its environment can be replaced too, and its triggers are instructions.
func (c *Check) Image(config []byte) error {
	var image dockerspec.DockerOCIImage
	if json.Unmarshal(config, &image) != nil {
		return nil // who uses it says what is wrong
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.images = append(c.images, image)
	return c.check()
}

func (c *Check) check() error {
	for _, text := range c.texts {
		l := &lengths{known: map[string]int64{}}
		for name, value := range c.args {
			l.known[name] = int64(len(value))
		}
		for _, image := range c.images {
			for _, entry := range image.Config.Env {
				name, value, _ := strings.Cut(entry, "=")
				l.learn(name, int64(len(value)))
			}
		}
		for _, image := range c.images {
			if err := l.read([]byte(strings.Join(image.Config.OnBuild, "\n")), "ONBUILD of a base image, line"); err != nil {
				return err
			}
		}
		if err := l.read(text, "Dockerfile line"); err != nil {
			return err
		}
	}
	return nil
}

// lengths has how many bytes variables can have at most, wherever in a Dockerfile they
// are set.
type lengths struct {
	known map[string]int64
	// any is that of a variable whose name is made from others.
	any int64
	// env is that of an environment with all, and total of all instructions so far.
	env, total int64
	// work is how many bytes of replacements were looked at.
	work int64
	// triggers wait for the stage that their own is the base of.
	triggers []*parser.Node
}

// read goes through instructions in their order.
func (l *lengths) read(text []byte, where string) error {
	file, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil // the front end says what is wrong
	}
	for _, n := range file.AST.Children {
		if strings.EqualFold(n.Value, "from") {
			for _, t := range l.triggers {
				if err := l.instruction(t, where); err != nil {
					return err
				}
			}
			l.triggers = nil
		}
		if err := l.instruction(n, where); err != nil {
			return err
		}
	}
	return nil
}

func (l *lengths) instruction(n *parser.Node, where string) error {
	text := n.Original
	if len(n.Heredocs) > 0 {
		text, _, _ = strings.Cut(text, "\n") // they follow
	}
	size := l.of(text, 0)
	for _, doc := range n.Heredocs {
		if doc.Expand && !strings.EqualFold(n.Value, "run") {
			size += l.of(doc.Content, 0)
		} else {
			size += int64(len(doc.Content))
		}
	}
	switch strings.ToLower(n.Value) {
	case "run":
		size += l.env
	case "onbuild":
		if n.Next != nil {
			l.triggers = append(l.triggers, n.Next.Children...)
		}
	case "arg":
		for a := n.Next; a != nil; a = a.Next {
			if name, value, ok := strings.Cut(a.Value, "="); ok {
				if err := l.set(name, value, n, where); err != nil {
					return err
				}
			}
		}
	case "env":
		for a := n.Next; a != nil && a.Next != nil; {
			if err := l.set(a.Value, a.Next.Value, n, where); err != nil {
				return err
			}
			if a = a.Next.Next; a != nil { // between them is what separates name and value
				a = a.Next
			}
		}
	}
	if l.total += min(size, beyond); l.total > MaxTotal {
		return fmt.Errorf("%s %d: with their variables replaced the instructions up to here would have more than %s", where, n.StartLine, units.BytesSize(MaxTotal))
	}
	return nil
}

func (l *lengths) set(name, value string, n *parser.Node, where string) error {
	size := l.of(value, 0)
	if size > MaxValue {
		return fmt.Errorf("%s %d: the value of %.80s would have more than %s", where, n.StartLine, name, units.BytesSize(MaxValue))
	}
	l.learn(name, size)
	return nil
}

// learn notes that a variable can have this length.
func (l *lengths) learn(name string, size int64) {
	if !plainName.MatchString(name) {
		l.any = max(l.any, size)
	}
	if known := l.known[name]; size > known || known == 0 {
		l.env += int64(len(name)) + max(0, size-known)
		l.known[name] = size
	}
}
