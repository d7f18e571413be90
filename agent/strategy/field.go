package strategy

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// FieldError is what is wrong with one field of a spec or of its credentials.
type FieldError struct {
	// Field is the path of the field, such as "spec.source.git.url". Names are those
	// of the proto; elements of lists and maps are in brackets.
	Field string
	// Message says what is wrong and what is wanted. It holds no credential.
	Message string
}

// Error implements error.
func (e *FieldError) Error() string { return e.Field + ": " + e.Message }

// InvalidError is everything that is wrong with a spec, in the order of its
// fields. It has at least one field.
type InvalidError struct {
	Fields []*FieldError
}

// Error implements error.
func (e *InvalidError) Error() string {
	parts := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		parts[i] = f.Error()
	}
	return strings.Join(parts, "; ")
}

// Unwrap returns the fields' errors.
func (e *InvalidError) Unwrap() []error {
	out := make([]error, len(e.Fields))
	for i, f := range e.Fields {
		out[i] = f
	}
	return out
}

// Fields returns the fields that err is about: none when it is about something
// else.
func Fields(err error) []*FieldError {
	var invalid *InvalidError
	if errors.As(err, &invalid) {
		return invalid.Fields
	}
	var one *FieldError
	if errors.As(err, &one) {
		return []*FieldError{one}
	}
	return nil
}

// maxFieldErrors bounds how many errors are collected: a spec that is wrong in
// more places is not read further.
const maxFieldErrors = 32

// maxQuoted bounds how much of a value an error repeats, in bytes.
const maxQuoted = 100

// problems collects what is wrong.
type problems struct {
	fields []*FieldError
}

func (p *problems) full() bool { return len(p.fields) >= maxFieldErrors }

func (p *problems) add(field, format string, args ...any) {
	if !p.full() {
		p.fields = append(p.fields, &FieldError{Field: field, Message: fmt.Sprintf(format, args...)})
	}
}

func (p *problems) err() error {
	if len(p.fields) == 0 {
		return nil
	}
	return &InvalidError{Fields: p.fields}
}

// quote returns s for a message: quoted, and not longer than a line.
func quote(s string) string { return fmt.Sprintf("%q", shorten(s, maxQuoted)) }

// shorten cuts s at n bytes, between characters.
func shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// item returns the path of an element of a list.
func item(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

// entry returns the path of an element of a map.
func entry(field, key string) string { return field + "[" + quote(key) + "]" }
