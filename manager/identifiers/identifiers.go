// Package identifiers holds the rules for names and labels that clients choose.
package identifiers

import (
	"fmt"
	"regexp"

	"github.com/containerd/errdefs"
)

// MaxLength is the longest identifier, in bytes: containerd's limit.
const MaxLength = 76

// maxLabel is the most that a label's key and value may have together, in bytes: containerd's limit.
const maxLabel = 4096

var pattern = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*$`)

// Validate checks an identifier (namespace, container, exec or lease id): letters and digits, with '.', '_' and '-'
// between them. The error wraps ErrInvalidArgument and quotes s.
func Validate(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("identifier must not be empty: %w", errdefs.ErrInvalidArgument)
	case len(s) > MaxLength:
		return fmt.Errorf("identifier %q is longer than %d characters: %w", s[:MaxLength]+"...", MaxLength, errdefs.ErrInvalidArgument)
	case !pattern.MatchString(s):
		return fmt.Errorf("identifier %q must be letters and digits, joined by '.', '_' or '-': %w", s, errdefs.ErrInvalidArgument)
	}
	return nil
}

// ValidateLabel checks one label. The error wraps ErrInvalidArgument.
func ValidateLabel(k, v string) error {
	if n := len(k) + len(v); n > maxLabel {
		short := k
		if len(short) > 64 {
			short = short[:64] + "..."
		}
		return fmt.Errorf("label key and value of %q have %d bytes together, the maximum is %d: %w", short, n, maxLabel, errdefs.ErrInvalidArgument)
	}
	return nil
}

// ValidateLabels checks a set of labels.
func ValidateLabels(labels map[string]string) error {
	for k, v := range labels {
		if err := ValidateLabel(k, v); err != nil {
			return err
		}
	}
	return nil
}
