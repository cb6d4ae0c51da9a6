package model

import (
	"fmt"
	"strings"
)

// FieldError is one thing that is wrong with what a user wrote.
type FieldError struct {
	// Line of the input, from 1; 0 where it is not known.
	Line int
	// Path of the field, such as "container.ports[0].host_port"; empty: the whole.
	Path    string
	Message string
}

func (e FieldError) Error() string {
	var b strings.Builder
	if e.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", e.Line)
	}
	if e.Path != "" {
		fmt.Fprintf(&b, "%s: ", e.Path)
	}
	return b.String() + e.Message
}

// FieldErrors are all things wrong with one input, in its order.
type FieldErrors []FieldError

func (e FieldErrors) Error() string {
	lines := make([]string, len(e))
	for i, f := range e {
		lines[i] = f.Error()
	}
	return strings.Join(lines, "\n")
}

// err is nil where nothing is wrong: a nil FieldErrors in an error is not nil.
func (e FieldErrors) err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

func (e *FieldErrors) add(path, format string, args ...any) {
	*e = append(*e, FieldError{Path: path, Message: fmt.Sprintf(format, args...)})
}
