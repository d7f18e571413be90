package inputs

import "fmt"

// Missing says that an object or key which a build names does not exist. It may appear
// later: whoever gets the error decides how long to wait.
type Missing struct {
	// Field of the build that names it.
	Field string
	// Object is its kind and name, and its key if that is what is missing.
	Object string
}

func (m *Missing) Error() string { return fmt.Sprintf("%s: %s does not exist", m.Field, m.Object) }

// Invalid says that what a build names, or its spec, cannot be used as it is.
type Invalid struct {
	// Field of the build.
	Field string
	// Message says what is wrong, without the values of secrets.
	Message string
}

func (e *Invalid) Error() string { return e.Field + ": " + e.Message }
