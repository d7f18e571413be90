package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/progress/progressui"

	"github.com/kiln-build/kiln/cmd/kiln/cli/buildopt"
)

// results writes what the user asked to know about a finished build.
func (a *App) results(ctx context.Context, c *client.Client, f *buildFlags, mode progressui.DisplayMode, req *buildopt.Request, resp map[string]string) error {
	if f.ImageIDFile != "" {
		if err := writeFile(f.ImageIDFile, []byte(imageID(resp))); err != nil {
			return fmt.Errorf("write image ID: %w", err)
		}
	}
	if f.metadata != "" {
		if err := a.writeMetadata(ctx, c, f.metadata, req, resp); err != nil {
			return err
		}
	}
	// An archive on stdout must stay whole: then the ID goes to stderr.
	out := a.Stdout
	if req.StdoutUsed {
		out = a.Stderr
	}
	var err error
	switch {
	case f.quiet:
		_, err = fmt.Fprintln(out, imageID(resp))
	case mode != progressui.QuietMode && mode != progressui.RawJSONMode && resp[exptypes.ExporterImageDigestKey] != "":
		_, err = fmt.Fprintln(out, resp[exptypes.ExporterImageDigestKey])
	}
	return err
}

func (a *App) writeMetadata(ctx context.Context, c *client.Client, name string, req *buildopt.Request, resp map[string]string) error {
	facts := make(map[string]any, len(resp)+2)
	for k, v := range resp {
		facts[k] = decodeFact(v)
	}
	facts["buildx.build.ref"] = "kiln/kiln/" + req.Solve.Ref
	provenance, err := fetchProvenance(ctx, c, req.Solve.Ref)
	if err != nil {
		fmt.Fprintf(a.Stderr, "kiln: the metadata file has no provenance: %s\n", message(err))
	}
	for k, v := range provenance {
		facts[k] = v
	}
	data, err := json.MarshalIndent(facts, "", "  ")
	if err != nil {
		return fmt.Errorf("encode metadata: %w", err)
	}
	if err := writeFile(name, data); err != nil {
		return fmt.Errorf("write metadata: %w", err)
	}
	return nil
}

// decodeFact returns v as the JSON object or list of objects that it is the base64
// of, or as it is.
func decodeFact(v string) any {
	data, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		return v
	}
	var object map[string]any
	if json.Unmarshal(data, &object) == nil && len(object) > 0 {
		return json.RawMessage(data)
	}
	var list []map[string]any
	if json.Unmarshal(data, &list) == nil && len(list) > 0 {
		return json.RawMessage(data)
	}
	return v
}

// writeFile replaces the file name at once, so that a reader never sees half of
// it.
func writeFile(name string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err := tmp.Write(data); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Chmod(0o644); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), name)
}

// warner returns what prints the warnings of a build after its progress.
func (a *App) warner(mode progressui.DisplayMode) func([]client.VertexWarning) {
	return func(warnings []client.VertexWarning) {
		if len(warnings) == 0 || mode == progressui.QuietMode || mode == progressui.RawJSONMode {
			return
		}
		fmt.Fprintf(a.Stderr, "\nWarnings:\n")
		for _, w := range warnings {
			where := ""
			if w.SourceInfo != nil && len(w.Range) > 0 {
				where = fmt.Sprintf(" (%s:%d)", w.SourceInfo.Filename, w.Range[0].Start.Line)
			}
			fmt.Fprintf(a.Stderr, " - %s%s\n", w.Short, where)
		}
	}
}
