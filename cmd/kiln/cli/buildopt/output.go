package buildopt

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/client"
)

// typeCacheOnly asks for a build without an output.
const typeCacheOnly = "cacheonly"

var (
	imageKeys = []string{
		"name", "name-canonical", "dangling-name-prefix", "compression", "compression-level", "force-compression",
		"oci-mediatypes", "oci-artifact", "prefer-nondist-layers", "rewrite-timestamp", "source-date-epoch", "attestation-inline",
		"buildinfo", "buildinfo-attrs",
	}
	pushKeys = []string{"push", "push-by-digest", "registry.insecure", "store", "unpack"}
	treeKeys = []string{"attestation-prefix", "platform-split", "src", "source-date-epoch"}
)

// outputKeys lists the attributes that each type of output knows.
var outputKeys = map[string][]string{
	"image":               append(slices.Clone(imageKeys), pushKeys...),
	"registry":            append(slices.Clone(imageKeys), pushKeys...),
	client.ExporterOCI:    append(slices.Clone(imageKeys), "tar"),
	client.ExporterDocker: append(slices.Clone(imageKeys), "tar"),
	client.ExporterLocal:  append(slices.Clone(treeKeys), "mode"),
	client.ExporterTar:    treeKeys,
	typeCacheOnly:         nil,
}

// ErrLoad is returned for an output into a Docker daemon.
var ErrLoad = errors.New("loading into a Docker daemon is not supported: kiln needs none; write an archive with --output type=docker,dest=FILE and run docker load -i FILE")

// output is one parsed --output value.
type output struct {
	kind  string
	attrs map[string]string
	dest  string
}

// parseOutput parses one --output value.
func parseOutput(s string) (output, error) {
	o := output{attrs: map[string]string{}}
	if s == "-" {
		return output{kind: client.ExporterTar, attrs: o.attrs, dest: "-"}, nil
	}
	if !strings.ContainsAny(s, ",\"") && !strings.HasPrefix(s, "type=") {
		if s == "" {
			return o, errors.New("invalid output: it is empty; want a directory or type=TYPE,…")
		}
		return output{kind: client.ExporterLocal, attrs: o.attrs, dest: s}, nil
	}
	fields, err := csvFields(s)
	if err != nil {
		return o, err
	}
	for _, f := range fields {
		switch f.key {
		case "type":
			o.kind = f.value
		case "dest":
			o.dest = f.value
		default:
			o.attrs[f.key] = f.value
		}
	}
	known, ok := outputKeys[o.kind]
	if !ok {
		types := slices.Sorted(maps.Keys(outputKeys))
		return o, fmt.Errorf("invalid output %q: type must be one of %s", s, strings.Join(types, ", "))
	}
	for _, key := range slices.Sorted(maps.Keys(o.attrs)) {
		if !slices.Contains(known, key) && !strings.HasPrefix(key, "annotation") {
			return o, fmt.Errorf("invalid output %q: type %s has no option %q: it has dest, %s", s, o.kind, key, strings.Join(known, ", "))
		}
	}
	for _, key := range []string{"push", "push-by-digest", "tar", "unpack", "store", "oci-mediatypes", "force-compression"} {
		if v, ok := o.attrs[key]; ok {
			if _, err := strconv.ParseBool(v); err != nil {
				return o, fmt.Errorf("invalid output %q: %s must be true or false", s, key)
			}
		}
	}
	return o, nil
}

// Stdout is where an output with the destination "-" goes.
type Stdout struct {
	io.Writer
	// Terminal is set when the writer is a terminal, which gets no archives.
	Terminal bool
}

// ParseOutputs parses --output values and checks their destinations. Nothing is
// written before the engine has something to write. The second result tells
// whether an output uses stdout.
func ParseOutputs(values []string, stdout Stdout) ([]client.ExportEntry, bool, error) {
	var out []client.ExportEntry
	used := false
	for _, s := range values {
		o, err := parseOutput(s)
		if err != nil {
			return nil, false, err
		}
		e := client.ExportEntry{Type: o.kind, Attrs: o.attrs}
		file, dir := false, false
		switch o.kind {
		case client.ExporterLocal:
			dir = true
			if m := o.attrs["mode"]; m != "" && m != "copy" {
				return nil, false, fmt.Errorf("invalid output %q: mode must be copy; export to an empty directory instead", s)
			}
		case client.ExporterTar:
			file = true
		case client.ExporterOCI, client.ExporterDocker:
			file = o.attrs["tar"] == "" || isTrue(o.attrs["tar"])
			dir = !file
		case "registry":
			e.Type = client.ExporterImage
			e.Attrs["push"] = "true"
			if _, ok := e.Attrs["unpack"]; !ok {
				e.Attrs["unpack"] = "false"
			}
		}
		switch {
		case dir:
			if o.dest == "" || o.dest == "-" {
				return nil, false, fmt.Errorf("invalid output %q: type %s needs dest=DIRECTORY", s, o.kind)
			}
			if st, err := os.Stat(o.dest); err == nil && !st.IsDir() {
				return nil, false, fmt.Errorf("invalid output %q: %s is not a directory", s, o.dest)
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, false, fmt.Errorf("invalid output %q: %w", s, err)
			}
			e.OutputDir = o.dest
		case file && o.kind == client.ExporterDocker && o.dest == "":
			return nil, false, ErrLoad
		case file && (o.dest == "" || o.dest == "-"):
			if used {
				return nil, false, fmt.Errorf("invalid output %q: another output already writes to stdout", s)
			}
			if stdout.Terminal {
				return nil, false, fmt.Errorf("invalid output %q: refusing to write an archive to a terminal; add dest=FILE or redirect stdout", s)
			}
			used = true
			e.Output = func(map[string]string) (io.WriteCloser, error) { return nopCloser{stdout}, nil }
		case file:
			if st, err := os.Stat(o.dest); err == nil && st.IsDir() {
				return nil, false, fmt.Errorf("invalid output %q: %s is a directory", s, o.dest)
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, false, fmt.Errorf("invalid output %q: %w", s, err)
			}
			e.Output = func(map[string]string) (io.WriteCloser, error) {
				// The umask is that of layers by now.
				f, err := os.OpenFile(o.dest, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
				if err != nil {
					return nil, fmt.Errorf("write output: %w", err)
				}
				return f, nil
			}
		case o.dest != "":
			return nil, false, fmt.Errorf("invalid output %q: type %s has no dest", s, o.kind)
		}
		out = append(out, e)
	}
	return out, used, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func isTrue(s string) bool {
	b, err := strconv.ParseBool(s)
	return err == nil && b
}
