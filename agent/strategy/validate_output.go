package strategy

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var errNotPair = errors.New("want name=value")

// compressions are the values of RegistryOutput.compression.
var compressions = []string{"", "gzip", "zstd", "estargz", "uncompressed"}

func (v *validator) outputs(field string, list []*agentv1.Output) {
	if steps := v.spec.GetSteps(); steps != nil && steps.GetImage() == nil && len(list) > 0 {
		v.add(field, "need an image; spec.steps.image says what is in it")
	}
	if !v.count(field, len(list), maxOutputs) {
		return
	}
	seen := map[string]bool{}
	for i, o := range list {
		f := item(field, i)
		var kind, image string
		switch to := o.GetTo().(type) {
		case *agentv1.Output_Registry:
			kind, image = ".registry", to.Registry.GetImage()
			v.registry(f+kind, to.Registry)
		case *agentv1.Output_Node:
			kind, image = ".node", to.Node.GetImage()
		default:
			v.add(f, "is empty; want registry or node")
			continue
		}
		name, err := checkTarget(image)
		if !v.check(f+kind+".image", err) {
			continue
		}
		if seen[kind+name] {
			v.add(f+kind+".image", "%s is there twice", quote(name))
		}
		seen[kind+name] = true
	}
}

func (v *validator) registry(field string, r *agentv1.RegistryOutput) {
	if !slices.Contains(compressions, r.GetCompression()) {
		v.add(field+".compression", "%s is not known; want gzip, zstd, estargz or uncompressed", quote(r.GetCompression()))
	}
	v.pairs(field+".annotations", r.GetAnnotations(), maxAnnotations, nil)
	for _, key := range slices.Sorted(maps.Keys(r.GetAnnotations())) {
		if strings.ContainsFunc(key, unicode.IsSpace) {
			v.add(entry(field+".annotations", key), "the name has a space")
		}
	}
}

// cacheAttributes are the attributes of each type of cache: to read from it, and
// to write to it. An inline cache is read as a registry's.
var cacheAttributes = map[string][2][]string{
	"registry": {
		{"ref", "registry.insecure"},
		{"ref", "registry.insecure", "mode", "oci-mediatypes", "image-manifest", "compression", "compression-level", "force-compression", "ignore-error"},
	},
	"inline": {nil, {"compression", "compression-level", "force-compression"}},
}

func (v *validator) caches() {
	for side, list := range [][]*agentv1.CacheRef{v.spec.GetCacheFrom(), v.spec.GetCacheTo()} {
		field := [2]string{"spec.cache_from", "spec.cache_to"}[side]
		if !v.count(field, len(list), maxCaches) {
			continue
		}
		for i, c := range list {
			v.cache(item(field, i), c, side)
		}
	}
}

func (v *validator) cache(field string, c *agentv1.CacheRef, side int) {
	known, ok := cacheAttributes[c.GetType()]
	if !ok {
		v.add(field+".type", "%s is not known; want registry or inline", quote(c.GetType()))
		return
	}
	if side == 0 && c.GetType() == "inline" {
		v.add(field+".type", "an inline cache is read with the type registry and the image's name as ref")
		return
	}
	if c.GetType() == "registry" {
		_, err := checkImage(c.GetAttributes()["ref"])
		v.check(entry(field+".attributes", "ref"), err)
	}
	for _, key := range slices.Sorted(maps.Keys(c.GetAttributes())) {
		f, value := entry(field+".attributes", key), c.GetAttributes()[key]
		switch {
		case !slices.Contains(known[side], key):
			v.add(f, "is not known; there are %s", strings.Join(known[side], ", "))
		case key == "mode" && value != "min" && value != "max":
			v.add(f, "%s is not known; want min or max", quote(value))
		case key == "compression" && !slices.Contains(compressions, value):
			v.add(f, "%s is not known", quote(value))
		case key == "compression-level":
			if _, err := strconv.ParseUint(value, 10, 8); err != nil {
				v.add(f, "%s is not a level", quote(value))
			}
		case key != "ref" && key != "mode" && key != "compression":
			if _, err := strconv.ParseBool(value); err != nil {
				v.add(f, "%s is not true or false", quote(value))
			}
		}
	}
}
