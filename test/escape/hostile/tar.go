// Package hostile makes archives and images that try to get out of where they are
// unpacked. What it makes follows from its arguments alone, so that a test that
// failed can be run again. It writes nothing itself.
package hostile

import (
	"bytes"
	"fmt"
	"strings"
)

// Types of entries; package archive/tar has the same, but writes few of them as
// they are given.
const (
	File      = '0'
	Link      = '1'
	Symlink   = '2'
	Char      = '3'
	Block     = '4'
	Directory = '5'
	Fifo      = '6'
	GNUSparse = 'S'
	Unknown   = 'Z'
)

// Encoding is where an entry's names are written.
type Encoding int

// Encodings of names.
const (
	// Plain has them in the entry's own header, where they fit.
	Plain Encoding = iota
	// PAX has them in a PAX header before an entry that is called something harmless.
	PAX
	// GNU has them in GNU's entries for long names.
	GNU
)

// Encodings are all of them, with what a test is called by.
var Encodings = map[Encoding]string{Plain: "plain", PAX: "pax", GNU: "gnu"}

// Entry is one entry of an archive, written as it is: nothing is checked.
type Entry struct {
	Type         byte
	Name, Target string
	Mode         int64
	Body         string
	// Size is what the header says of the body's length; nil: the truth.
	Size         *int64
	Major, Minor int64
	// Records are further PAX records, in order: name, value, name, value.
	Records []string
	// RealSize and Map are of sparse entries as GNU tar writes them.
	RealSize int64
	Map      [][2]int64
}

const block = 512

// Archive is a tar that is being written.
type Archive struct{ buf bytes.Buffer }

// Tar returns an archive of entries whose names are encoded as e says.
func Tar(e Encoding, entries ...Entry) []byte {
	var a Archive
	for _, entry := range entries {
		a.Add(e, entry)
	}
	return a.Bytes()
}

// Bytes returns the archive with its end.
func (a *Archive) Bytes() []byte {
	return append(bytes.Clone(a.buf.Bytes()), make([]byte, 2*block)...)
}

// Add writes an entry.
func (a *Archive) Add(e Encoding, entry Entry) {
	name, target, records := entry.Name, entry.Target, entry.Records
	switch e {
	case PAX:
		records = append([]string{"path", name}, records...)
		if target != "" {
			records = append(records, "linkpath", target)
		}
		name, target = "harmless", ""
	case GNU:
		a.special('L', "././@LongLink", name+"\x00")
		if target != "" {
			a.special('K', "././@LongLink", target+"\x00")
		}
		name, target = "harmless", ""
	}
	if e == Plain && len(target) > 100 {
		records = append(records[:len(records):len(records)], "linkpath", target)
	}
	if e == Plain && !fits(name) {
		records = append(records[:len(records):len(records)], "path", name)
	}
	if len(records) > 0 {
		a.special('x', "PaxHeaders/x", paxRecords(records))
	}
	size := int64(len(entry.Body))
	if entry.Size != nil {
		size = *entry.Size
	}
	h := header(entry.Type, name, target, entry.Mode, size, entry.Major, entry.Minor)
	if entry.Type == GNUSparse {
		sparse(h, entry)
	}
	a.body(h, entry.Body)
}

func (a *Archive) special(kind byte, name, body string) {
	a.body(header(kind, name, "", 0o644, int64(len(body)), 0, 0), body)
}

func (a *Archive) body(h []byte, body string) {
	sum := 0
	copy(h[148:156], "        ")
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	a.buf.Write(h)
	a.buf.WriteString(body)
	if rest := len(body) % block; rest > 0 {
		a.buf.Write(make([]byte, block-rest))
	}
}

func header(kind byte, name, target string, mode, size, major, minor int64) []byte {
	h := make([]byte, block)
	prefix, rest := split(name)
	copy(h[345:500], prefix)
	copy(h[0:100], rest)
	octal(h[100:108], mode)
	octal(h[108:116], 0)
	octal(h[116:124], 0)
	octal(h[124:136], size)
	octal(h[136:148], 1_000_000_000)
	h[156] = kind
	copy(h[157:257], target)
	copy(h[257:265], "ustar\x0000")
	octal(h[329:337], major)
	octal(h[337:345], minor)
	return h
}

// split divides a name that is too long for one field at a slash.
func split(name string) (prefix, rest string) {
	if len(name) <= 100 {
		return "", name
	}
	i := strings.LastIndexByte(name[:min(len(name), 156)], '/')
	if i <= 0 {
		return "", name
	}
	return name[:i], name[i+1:]
}

func fits(name string) bool {
	_, rest := split(name)
	return len(rest) <= 100
}

// octal writes a number; negative and large ones in GNU's binary form.
func octal(field []byte, n int64) {
	digits := len(field) - 1
	if text := fmt.Sprintf("%0*o", digits, n); n >= 0 && len(text) <= digits {
		copy(field, text)
		return
	}
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = byte(n)
		n >>= 8
	}
	field[0] |= 0x80
}

func paxRecords(pairs []string) string {
	var out strings.Builder
	for i := 0; i+1 < len(pairs); i += 2 {
		rest := fmt.Sprintf(" %s=%s\n", pairs[i], pairs[i+1])
		n := len(rest) + 1
		for len(fmt.Sprint(n))+len(rest) != n {
			n = len(fmt.Sprint(n)) + len(rest)
		}
		fmt.Fprintf(&out, "%d%s", n, rest)
	}
	return out.String()
}

// sparse makes h a header of GNU's old form of sparse files.
func sparse(h []byte, e Entry) {
	copy(h[257:265], "ustar  \x00")
	for i, part := range e.Map[:min(len(e.Map), 4)] {
		octal(h[386+24*i:398+24*i], part[0])
		octal(h[398+24*i:410+24*i], part[1])
	}
	octal(h[483:495], e.RealSize)
}
