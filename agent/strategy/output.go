package strategy

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// outputs makes one export of each kind of output: names that differ in nothing
// else are pushed by one. The export of the first output is the last, because what
// the engine answers is what the last one says.
func (p *planner) outputs() {
	defer func() { slices.Reverse(p.opt.Exports) }()
	for _, o := range p.spec.GetOutputs() {
		var e client.ExportEntry
		if r := o.GetRegistry(); r != nil {
			e = registryExport(r)
		} else {
			e = nodeExport(o.GetNode())
		}
		if epoch := p.spec.GetSourceDateEpoch(); epoch > 0 {
			e.Attrs[string(exptypes.OptKeySourceDateEpoch)] = strconv.FormatInt(epoch, 10)
			e.Attrs[string(exptypes.OptKeyRewriteTimestamp)] = "true"
		}
		p.images = append(p.images, e.Attrs[string(exptypes.OptKeyName)])
		p.addExport(e)
	}
}

func (p *planner) addExport(e client.ExportEntry) {
	name := string(exptypes.OptKeyName)
	for _, other := range p.opt.Exports {
		a, b := maps.Clone(other.Attrs), maps.Clone(e.Attrs)
		delete(a, name)
		delete(b, name)
		if maps.Equal(a, b) {
			other.Attrs[name] += "," + e.Attrs[name]
			return
		}
	}
	p.opt.Exports = append(p.opt.Exports, e)
}

// registryExport pushes and keeps no image.
func registryExport(r *agentv1.RegistryOutput) client.ExportEntry {
	name, _ := checkTarget(r.GetImage())
	attrs := map[string]string{
		string(exptypes.OptKeyName):   name,
		string(exptypes.OptKeyPush):   "true",
		string(exptypes.OptKeyUnpack): "false",
		string(exptypes.OptKeyStore):  "false",
	}
	if r.GetInsecure() {
		attrs[string(exptypes.OptKeyInsecure)] = "true"
	}
	if c := r.GetCompression(); c != "" {
		attrs[string(exptypes.OptKeyLayerCompression)] = c
	}
	if c := r.GetCompression(); c == "zstd" || c == "estargz" || len(r.GetAnnotations()) > 0 {
		attrs[string(exptypes.OptKeyOCITypes)] = "true"
	}
	if r.GetForceCompression() {
		attrs[string(exptypes.OptKeyForceCompression)] = "true"
	}
	for key, value := range r.GetAnnotations() {
		attrs[exptypes.AnnotationKey{Key: key}.String()] = value
	}
	return client.ExportEntry{Type: client.ExporterImage, Attrs: attrs}
}

// nodeExport stores the image and pushes nothing.
func nodeExport(n *agentv1.NodeOutput) client.ExportEntry {
	name, _ := checkTarget(n.GetImage())
	return client.ExportEntry{Type: client.ExporterImage, Attrs: map[string]string{
		string(exptypes.OptKeyName):   name,
		string(exptypes.OptKeyPush):   "false",
		string(exptypes.OptKeyUnpack): "false",
		string(exptypes.OptKeyStore):  "true",
	}}
}

func (p *planner) caches() {
	for _, c := range p.spec.GetCacheFrom() {
		p.opt.CacheImports = append(p.opt.CacheImports, cacheEntry(c))
	}
	for _, c := range p.spec.GetCacheTo() {
		e := cacheEntry(c)
		if e.Type == "registry" && e.Attrs["mode"] == "" {
			e.Attrs["mode"] = "min"
		}
		p.opt.CacheExports = append(p.opt.CacheExports, e)
	}
}

func cacheEntry(c *agentv1.CacheRef) client.CacheOptionsEntry {
	e := client.CacheOptionsEntry{Type: c.GetType(), Attrs: map[string]string{}}
	maps.Copy(e.Attrs, c.GetAttributes())
	if ref, ok := e.Attrs["ref"]; ok {
		e.Attrs["ref"], _ = checkImage(ref)
	}
	return e
}

// attestations sets what BuildKit attests. Nothing is attested unless the spec
// says so.
func (p *planner) attestations() {
	for kind, value := range p.spec.GetAttestations() {
		attrs, on, err := parseAttestation(value)
		if err != nil || !on {
			continue
		}
		delete(attrs, "disabled")
		delete(attrs, "type")
		fields := make([]string, 0, len(attrs))
		for _, name := range slices.Sorted(maps.Keys(attrs)) {
			fields = append(fields, csvQuote(name+"="+attrs[name]))
		}
		p.opt.FrontendAttrs["attest:"+kind] = strings.Join(fields, ",")
	}
}

// csvQuote returns a field of a line in CSV.
func csvQuote(s string) string {
	if strings.ContainsAny(s, ",\"\r\n") {
		return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
	}
	return s
}
