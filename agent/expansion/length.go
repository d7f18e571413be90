package expansion

import (
	"regexp"
	"strings"
)

const (
	// maxDepth bounds replacements within replacements.
	maxDepth = 8
	// maxWork bounds how many bytes of replacements are looked at.
	maxWork = 64 << 20
)

var (
	// reference is the start of one: the name, and whether parts of the value are replaced.
	reference = regexp.MustCompile(`\$\{?(\p{Nd}+|[@*#?$!-]|[\pL_][\pL\p{Nd}_]*)(//?)?`)
	// plainName is a name that is what it says.
	plainName = regexp.MustCompile(`^[\pL_][\pL\p{Nd}_]*$`)
)

// of returns the most bytes that text can have with its variables replaced: all of them,
// also those in quotes, and where a value has parts replaced as if every byte was one.
func (l *lengths) of(text string, depth int) int64 {
	size := int64(len(text))
	if depth > maxDepth {
		return beyond
	}
	for _, m := range reference.FindAllStringSubmatchIndex(text, -1) {
		value := max(l.known[text[m[2]:m[3]]], l.any)
		size += value
		if value > 0 && m[4] >= 0 && text[m[0]+1] == '{' {
			by := replacement(text[m[1]:])
			if l.work += int64(len(by)); l.work > maxWork {
				return beyond
			}
			size += (value + 1) * max(1, l.of(by, depth+1))
		}
		if size > beyond {
			return beyond
		}
	}
	return size
}

// replacement returns text that has what stands for the parts of a value, of the text after
// "${name/". It has more where it is not plain what is quoted.
func replacement(text string) string {
	end := max(closing(text, '\\'), closing(text, '`'))
	if strings.ContainsAny(text[:end], "\\`\"'") {
		return text[:end]
	}
	_, by, _ := strings.Cut(text[:end], "/")
	return by
}

// closing returns where the brace is that closes one which was opened before text, with the
// length of text for none.
func closing(text string, escape byte) int {
	open, quote := 0, byte(0)
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case quote == '\'' && c != quote:
		case c == escape:
			i++
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '{':
			open++
		case c == '}':
			if open--; open < 0 {
				return i
			}
		}
	}
	return len(text)
}
