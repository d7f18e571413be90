package hostile

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Goal is what archives try to reach: a directory of the node, and a file in it.
type Goal struct {
	// Dir is absolute and clean.
	Dir string
	// File is in Dir.
	File string
	// Marker is in the name of everything that an archive makes.
	Marker string
	// Name is in the names of cases.
	Name string
}

// Case is one attempt.
type Case struct {
	// Name says what is tried, as ROUTE/PAYLOAD/GOAL/ENCODING/LAYERS.
	Name string
	// Class is its ROUTE/PAYLOAD.
	Class string
	// Layers are archives that are unpacked over each other, lowest first.
	Layers [][]byte
}

// up leads to the root from any directory that is less deep.
var up = strings.Repeat("../", 16)

// route is a way to name the goal's directory: entries that have to be there first,
// and what the names of others begin with.
type route struct {
	name   string
	setup  func(g Goal) []Entry
	prefix func(g Goal) string
}

func symlink(name, target string) Entry {
	return Entry{Type: Symlink, Name: name, Target: target, Mode: 0o777}
}

func file(name, body string) Entry {
	return Entry{Type: File, Name: name, Body: body, Mode: 0o666}
}

// Sparse is a file of size bytes of which only the last ones, body, are in the archive.
func Sparse(name string, size int64, body string) Entry {
	return Entry{Type: File, Name: name, Mode: 0o666, Body: body, Records: []string{
		"GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.size", fmt.Sprint(size), "GNU.sparse.numblocks", "1",
		"GNU.sparse.map", fmt.Sprintf("%d,%d", size-int64(len(body)), len(body)),
	}}
}

func dir(name string) Entry { return Entry{Type: Directory, Name: name, Mode: 0o777} }

// through is a route by a symlink.
func through(name string, setup ...func(g Goal) Entry) route {
	return route{
		name: name,
		setup: func(g Goal) []Entry {
			var out []Entry
			for _, s := range setup {
				out = append(out, s(g))
			}
			return out
		},
		prefix: func(Goal) string { return "s/" },
	}
}

func to(name, format string) func(g Goal) Entry {
	return func(g Goal) Entry { return symlink(name, strings.ReplaceAll(format, "GOAL", g.Dir)) }
}

func always(e Entry) func(Goal) Entry { return func(Goal) Entry { return e } }

var routes = []route{
	{"absolute", nil, func(g Goal) string { return g.Dir + "/" }},
	{"parent", nil, func(g Goal) string { return up + g.Dir[1:] + "/" }},
	{"parent inside", nil, func(g Goal) string { return "d/e/" + up + g.Dir[1:] + "/" }},
	{"parent after absolute", nil, func(g Goal) string { return "/" + up + g.Dir[1:] + "/" }},
	{"parent with dots", nil, func(g Goal) string { return "./." + "/.//" + up + "./" + g.Dir[1:] + "/" }},
	through("symlink", to("s", "GOAL")),
	through("relative symlink", to("s", up+"GOAL")),
	through("symlink to symlink", to("t", "GOAL"), to("s", "t")),
	through("symlink to a name to come", to("s", "t"), to("t", up+"GOAL")),
	through("symlink by proc", to("s", "/proc/self/root/GOAL")),
	through("symlink by another process", to("s", "/proc/1/root/GOAL")),
	through("symlink by working directory", to("s", "/proc/self/cwd/"+up+"GOAL")),
	through("directory becomes symlink", always(dir("s")), always(file("s/x", "x")), to("s", "GOAL")),
	through("whiteout becomes symlink", always(dir("s")), always(file(".wh.s", "")), to("s", "GOAL")),
	through("hard link to symlink", to("q", "GOAL"), always(Entry{Type: Link, Name: "s", Target: "q"})),
	{
		"symlink below", func(g Goal) []Entry { return []Entry{dir("d"), symlink("d/s", up+g.Dir[1:])} },
		func(Goal) string { return "d/s/" },
	},
	{
		"parent of symlink", func(g Goal) []Entry { return []Entry{symlink("s", g.Dir+"/sub")} },
		func(Goal) string { return "s/../" },
	},
}

const evil = "written by an archive\n"

// payloads are what is done at the end of a route; p is its prefix.
var payloads = []struct {
	name    string
	entries func(g Goal, p string) []Entry
}{
	{"new file", func(g Goal, p string) []Entry { return []Entry{file(p+g.Marker, evil)} }},
	{"file over file", func(g Goal, p string) []Entry { return []Entry{file(p+g.File, evil)} }},
	{"directory", func(g Goal, p string) []Entry { return []Entry{dir(p + g.Marker), dir(p + ".")} }},
	{"directory over file", func(g Goal, p string) []Entry { return []Entry{dir(p + g.File)} }},
	{"symlink over file", func(g Goal, p string) []Entry { return []Entry{symlink(p+g.File, "/dev/null")} }},
	{"hard link from file", func(g Goal, p string) []Entry {
		return []Entry{{Type: Link, Name: g.Marker + "-stolen", Target: p + g.File}}
	}},
	{"write through hard link", func(g Goal, p string) []Entry {
		return []Entry{{Type: Link, Name: g.Marker, Target: p + g.File}, file(g.Marker, evil)}
	}},
	{"hard link into", func(g Goal, p string) []Entry {
		return []Entry{file("own", evil), {Type: Link, Name: p + g.Marker, Target: "own"}}
	}},
	{"write through symlink", func(g Goal, p string) []Entry {
		return []Entry{symlink("f", "/"+p+g.File), symlink("r", p+g.File), file("f", evil), file("r", evil)}
	}},
	{"character device", func(g Goal, p string) []Entry {
		return []Entry{{Type: Char, Name: p + g.Marker, Mode: 0o666, Major: 1, Minor: 3}, {Type: Char, Name: p + g.File, Mode: 0o666, Major: 1, Minor: 7}}
	}},
	{"block device", func(g Goal, p string) []Entry {
		return []Entry{{Type: Block, Name: p + g.Marker, Mode: 0o666, Major: 7, Minor: 200}}
	}},
	{"fifo", func(g Goal, p string) []Entry {
		return []Entry{{Type: Fifo, Name: p + g.Marker, Mode: 0o666}, {Type: Fifo, Name: p + g.File, Mode: 0o666}}
	}},
	{"whiteout", func(g Goal, p string) []Entry { return []Entry{file(p+".wh."+g.File, "")} }},
	{"opaque", func(g Goal, p string) []Entry { return []Entry{file(p+".wh..wh..opq", "")} }},
	{"whiteout of parents", func(g Goal, p string) []Entry { return []Entry{file(p+".wh...", ""), file(p+".wh.."+"/x", "")} }},
	{"whiteout of itself", func(g Goal, p string) []Entry { return []Entry{file(p+".wh..", ""), file(p+".wh.", "")} }},
	{"whiteout of names", func(g Goal, p string) []Entry {
		return []Entry{file(p+".wh..wh.plnk", ""), dir(p + ".wh..wh.plnk"), file(p+".wh..wh.plnk/1.2", evil), file(p+".wh..wh.aufs", "")}
	}},
	{"sparse", func(g Goal, p string) []Entry {
		e := Sparse("sparse", 1<<16, "write")
		e.Records = append(e.Records, "GNU.sparse.name", p+g.File)
		return []Entry{e, {Type: GNUSparse, Name: p + g.File, Mode: 0o666, RealSize: 1 << 16, Map: [][2]int64{{0, 5}}, Body: "write"}}
	}},
	{"attributes", func(g Goal, p string) []Entry {
		return []Entry{{Type: File, Name: p + g.File, Mode: 0o4777, Body: evil, Records: []string{
			"SCHILY.xattr.user.kiln", "x", "SCHILY.xattr.trusted.overlay.redirect", g.Dir, "SCHILY.xattr.trusted.overlay.opaque", "y",
		}}}
	}},
	{"twice", func(g Goal, p string) []Entry {
		return []Entry{dir(p + g.File), file(p+g.File, evil), symlink(p+g.File, g.Dir), file(p+g.File+"/"+g.Marker, evil)}
	}},
}

// Corpus returns every attempt on each of goals: all ways to a goal, with all that
// can be done there, in all encodings, in one layer and in two; and damaged archives
// that seed makes of them.
func Corpus(seed uint64, goals ...Goal) []Case {
	var all []Case
	for _, g := range goals {
		for _, r := range routes {
			for _, p := range payloads {
				var setup []Entry
				if r.setup != nil {
					setup = r.setup(g)
				}
				entries := p.entries(g, r.prefix(g))
				class := r.name + "/" + p.name
				for e := Plain; e <= GNU; e++ {
					name := class + "/" + g.Name + "/" + Encodings[e]
					all = append(all, Case{name + "/one layer", class, [][]byte{Tar(e, append(setup[:len(setup):len(setup)], entries...)...)}})
					if len(setup) > 0 {
						all = append(all, Case{name + "/later layer", class, [][]byte{Tar(e, setup...), Tar(e, entries...)}})
					}
				}
			}
		}
	}
	return append(all, damaged(seed, all)...)
}

// damaged returns archives with bytes of others changed, moved or missing.
func damaged(seed uint64, of []Case) []Case {
	r := rand.New(rand.NewPCG(seed, 0))
	var out []Case
	for i := range len(of) / 10 {
		c := of[r.IntN(len(of))]
		layers := make([][]byte, len(c.Layers))
		for l, data := range c.Layers {
			data = append([]byte(nil), data...)
			switch r.IntN(4) {
			case 0:
				data = data[:r.IntN(len(data))]
			case 1:
				for range 1 + r.IntN(8) {
					data[r.IntN(len(data))] ^= byte(1 << r.IntN(8))
				}
			case 2: // a size that lies, with a sum that does not
				h := data[:block]
				octal(h[124:136], r.Int64N(1<<40)-1<<20)
				var a Archive
				a.body(h, "")
				copy(data, a.buf.Bytes())
			default:
				from, n := r.IntN(len(data)), r.IntN(block)
				data = append(data[:from], data[min(len(data), from+n):]...)
			}
			layers[l] = data
		}
		out = append(out, Case{fmt.Sprintf("damaged %d of %s", i, c.Name), "damaged", layers})
	}
	return out
}

// Tree is a root file system with a link, through which Prefix names a goal.
type Tree struct {
	Case
	Goal   Goal
	Prefix string
}

// Trees returns the trees of all routes that need one.
func Trees(goals ...Goal) []Tree {
	var all []Tree
	for _, g := range goals {
		for _, r := range routes {
			if r.setup == nil {
				continue
			}
			t := Tree{Case: Case{Name: r.name + "/" + g.Name, Class: r.name}, Goal: g, Prefix: r.prefix(g)}
			for _, e := range r.setup(g) {
				t.Layers = append(t.Layers, Tar(Plain, e))
			}
			all = append(all, t)
		}
	}
	return all
}
