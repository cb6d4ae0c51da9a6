package model

import (
	"regexp"
	"strings"
	"testing"
)

func TestIsDNSLabel(t *testing.T) {
	label := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	for _, id := range []string{
		"", "a", "0", "-", "a-", "-a", "a-b", "a--b", "A", "aB", "a.b", "a_b", "a/b", "a b", "ä", "a\n", "a\x00",
		strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("-", 63),
	} {
		if got := IsDNSLabel(id); got != label.MatchString(id) {
			t.Errorf("%q: %t", id, got)
		}
	}
}
