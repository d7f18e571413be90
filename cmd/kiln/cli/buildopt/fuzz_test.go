package buildopt

import (
	"strings"
	"testing"

	"github.com/tonistiigi/go-csvvalue"
)

// A parser of foreign text either returns an error or a value that its reader
// takes apart the same way; it never panics.

func FuzzParseHosts(f *testing.F) {
	for _, s := range []string{"a:1.2.3.4", "a=[::1],1.2.3.4", "a:", "host-gateway"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out, err := ParseHosts([]string{s})
		if err != nil {
			return
		}
		for part := range strings.SplitSeq(out, ",") {
			if host, ip, ok := strings.Cut(part, "="); !ok || host == "" || ip == "" || strings.ContainsAny(part, "\n\r") {
				t.Fatalf("%q gives the entry %q", s, part)
			}
		}
	})
}

func FuzzParseOutput(f *testing.F) {
	for _, s := range []string{"-", "dir", "type=local,dest=x", `type=oci,"dest=a,b"`, "type=image,push=true"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := parseOutput(s)
		if err != nil {
			return
		}
		if _, ok := outputKeys[o.kind]; !ok {
			t.Fatalf("%q gives the unknown type %q", s, o.kind)
		}
	})
}

func FuzzParseAttests(f *testing.F) {
	for _, s := range []string{"type=sbom", `type=sbom,"generator=a,b"`, `type=provenance,mode="max"`, "type=sbom,disabled=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out, err := ParseAttests([]string{s})
		if err != nil {
			return
		}
		for _, v := range out {
			if v == nil {
				continue
			}
			in, err1 := csvFields(s)
			back, err2 := csvvalue.Fields(*v, nil)
			if err1 != nil || err2 != nil || len(back) > len(in)+1 {
				t.Fatalf("%q becomes %q, which has other fields (%v, %v)", s, *v, err1, err2)
			}
		}
	})
}

func FuzzParseAnnotations(f *testing.F) {
	f.Add("index[linux/amd64],manifest:k=v")
	f.Fuzz(func(t *testing.T, s string) {
		out, err := ParseAnnotations([]string{s})
		for k := range out {
			if err == nil && !strings.HasPrefix(k, "annotation") {
				t.Fatalf("%q gives the attribute %q", s, k)
			}
		}
	})
}

func FuzzParseOCILayout(f *testing.F) {
	f.Add("oci-layout:///a/b:tag@sha256:00")
	f.Fuzz(func(t *testing.T, s string) {
		dir, tag, dgst, err := parseOCILayout(s)
		if err == nil && (dir == "" || tag == "" && dgst == "") {
			t.Fatalf("%q names nothing", s)
		}
	})
}

func FuzzParseCache(f *testing.F) {
	for _, s := range []string{"user/app:cache", "type=registry,ref=a/b", "type=local,src=x", `type=inline`, "type=gha,token=x", "mode=max"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for side := range 2 {
			out, err := parseCache([]string{s}, side)
			if err != nil {
				continue
			}
			for _, o := range out {
				if o.Type == "" {
					t.Fatalf("%q gives a cache without a type", s)
				}
			}
		}
	})
}

func FuzzParseSizes(f *testing.F) {
	for _, s := range []string{"1g", "-1", "0", "1e9", "99999999999999999999g", "0.5", "1.5.5", "10m", "nan", "inf"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil && n < 0 {
			t.Fatalf("%q gives the size %d", s, n)
		}
		if n, err := ParsePIDs(s); err == nil && n < 0 {
			t.Fatalf("%q gives %d processes", s, n)
		}
		if n, err := parseCPUs(s); err == nil && n < 0 {
			t.Fatalf("%q gives %d CPUs", s, n)
		}
		if n, err := parseTimeout(s); err == nil && n < 0 {
			t.Fatalf("%q gives the time %d", s, n)
		}
	})
}
