package strategy

import (
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/util/gitutil"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const imageScheme = "docker-image://"

func (v *validator) source(field string, s *agentv1.Source) {
	if s == nil {
		return
	}
	switch from := s.GetFrom().(type) {
	case *agentv1.Source_Git:
		v.git(field+".git", from.Git)
	case *agentv1.Source_Inline:
		v.inline(field+".inline.files", from.Inline.GetFiles())
	case *agentv1.Source_Http:
		v.http(field+".http", from.Http)
	case *agentv1.Source_Upload:
		_, err := checkDigest(from.Upload.GetDigest())
		v.check(field+".upload.digest", err)
	}
	if v.count(field+".images", len(s.GetImages()), maxImages) {
		for i, im := range s.GetImages() {
			v.imageSource(item(field+".images", i), im)
		}
	}
	v.namedContexts(field+".named_contexts", s.GetNamedContexts())
	_, err := cleanRelative(s.GetContextDir())
	v.check(field+".context_dir", err)
}

func (v *validator) git(field string, g *agentv1.GitSource) {
	u, err := parseGitURL(g.GetUrl())
	if v.check(field+".url", err) && u.Scheme == gitutil.SSHProtocol && g.GetCredential() == "" {
		v.add(field+".credential", "is missing; an SSH URL needs a key and the server's known hosts")
	}
	if r := g.GetRevision(); r != "" {
		v.check(field+".revision", checkRevision(r))
	}
	if len(g.GetCredential()) > maxName {
		v.add(field+".credential", "is longer than %d bytes", maxName)
	}
}

func (v *validator) http(field string, h *agentv1.HTTPSource) {
	if h.GetDigest() != "" {
		_, err := checkDigest(h.GetDigest())
		v.check(field+".digest", err)
	}
	_, err := parseHTTPURL(h.GetUrl(), h.GetDigest() != "")
	v.check(field+".url", err)
}

func (v *validator) inline(field string, files []*agentv1.InlineFile) {
	if !v.count(field, len(files), maxInlineFiles) {
		return
	}
	total := 0
	seen := map[string]bool{}
	var names []string
	for i, f := range files {
		name, err := cleanRelative(f.GetPath())
		switch {
		case !v.check(item(field, i)+".path", err):
			continue
		case name == "." || strings.HasSuffix(f.GetPath(), "/"):
			v.add(item(field, i)+".path", "%s is not the name of a file", quote(f.GetPath()))
			continue
		case seen[name]:
			v.add(item(field, i)+".path", "%s is there twice", quote(f.GetPath()))
			continue
		}
		if f.GetMode() > 0o777 {
			v.add(item(field, i)+".mode", "%#o has more than permission bits", f.GetMode())
		}
		seen[name] = true
		names = append(names, name)
		total += len(name) + len(f.GetContent())
	}
	if total > maxInline {
		v.add(field, "have %d bytes; at most %d are allowed, upload an archive instead", total, maxInline)
	}
	for _, name := range names {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if seen[dir] {
				v.add(field, "%s is both a file and a directory", quote(dir))
				return
			}
		}
	}
}

func (v *validator) imageSource(field string, im *agentv1.ImageSource) {
	_, err := checkImage(im.GetImage())
	v.check(field+".image", err)
	if len(im.GetPaths()) == 0 {
		v.add(field+".paths", "is empty; want what to take from the image")
	}
	if !v.count(field+".paths", len(im.GetPaths()), maxImagePaths) {
		return
	}
	for i, p := range im.GetPaths() {
		f := item(field+".paths", i)
		v.check(f+".source_path", checkAbsolute(p.GetSourcePath()))
		_, err := cleanRelative(p.GetDestinationDir())
		v.check(f+".destination_dir", err)
	}
}

func (v *validator) namedContexts(field string, m map[string]string) {
	if len(m) > 0 && v.spec.GetSteps() != nil {
		v.add(field, "are for Dockerfiles; steps have none")
	}
	if !v.count(field, len(m), maxContexts) {
		return
	}
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		f := entry(field, name)
		familiar, ok := contextName(name)
		switch {
		case !ok || familiar == "context" || familiar == "dockerfile":
			v.add(f, "is not a name for a context")
		case seen[familiar]:
			v.add(f, "is there twice as %s", quote(familiar))
		}
		seen[familiar] = true
		value := m[name]
		if image, ok := strings.CutPrefix(value, imageScheme); ok {
			if image != "scratch" {
				_, err := checkImage(image)
				v.check(f, err)
			}
			continue
		}
		if len(value) > maxPath {
			v.add(f, "is longer than %d bytes", maxPath)
			continue
		}
		_, err := parseHTTPURL(value, false)
		v.check(f, err)
	}
}

// contextName returns the name of a context as FROM lines are matched with it.
func contextName(s string) (string, bool) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", false
	}
	return strings.TrimSuffix(reference.FamiliarString(named), ":latest"), true
}
