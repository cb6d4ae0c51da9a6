package model

import (
	"fmt"
	"net/netip"
	"path"
	"strconv"
	"strings"
)

const (
	dnsLabelAllowed   = "a DNS label: 1 to 63 lower case letters, digits and inner hyphens"
	labelKeyAllowed   = "1 to 253 letters, digits and -_./, beginning and ending with a letter or digit"
	labelValueAllowed = "at most 253 letters, digits and -_./:+@, or nothing"
	envNameAllowed    = "letters, digits and -_., not beginning with a digit"

	maxLabel   = 253
	maxEnvName = 256
)

func checkID(errs *FieldErrors, path, id string) {
	switch {
	case id == "":
		errs.add(path, "missing; allowed: %s", dnsLabelAllowed)
	case !IsDNSLabel(id):
		errs.add(path, "%q is not allowed; allowed: %s", clip(id), dnsLabelAllowed)
	}
}

func isLabelKey(s string) bool {
	return s != "" && len(s) <= maxLabel && alphanumeric(s[0]) && alphanumeric(s[len(s)-1]) && consistsOf(s, "-_./")
}

func checkLabels(errs *FieldErrors, path string, labels map[string]string) {
	for _, k := range sortedKeys(labels) {
		if !isLabelKey(k) {
			errs.add(path, "name %q is not allowed; allowed: %s", clip(k), labelKeyAllowed)
		}
		checkLabelValue(errs, path+"."+clip(k), labels[k])
	}
}

// ValidateLabels says what is wrong with the labels of a node, as FieldErrors.
func ValidateLabels(path string, labels map[string]string) error {
	var errs FieldErrors
	checkLabels(&errs, path, labels)
	return errs.err()
}

func checkLabelValue(errs *FieldErrors, path, v string) {
	if len(v) > maxLabel || !consistsOf(v, "-_./:+@") {
		errs.add(path, "value %q is not allowed; allowed: %s", clip(v), labelValueAllowed)
	}
}

func checkEnv(errs *FieldErrors, path string, env map[string]string) {
	for _, name := range sortedKeys(env) {
		switch {
		case name == "" || len(name) > maxEnvName || digit(name[0]) || !consistsOf(name, "-_."):
			errs.add(path, "name %q is not allowed; allowed: %s", clip(name), envNameAllowed)
		case strings.HasPrefix(name, "PERSYS_"):
			errs.add(path+"."+clip(name), "names that begin with PERSYS_ are given by the system; allowed: any other")
		}
	}
}

// checkAbsolute wants a path in its shortest form, for two spellings of one
// path would pass for two paths.
func checkAbsolute(errs *FieldErrors, at, p string) {
	switch {
	case p == "":
		errs.add(at, "missing; allowed: an absolute path")
	case !path.IsAbs(p):
		errs.add(at, "%q is relative; allowed: an absolute path", clip(p))
	case path.Clean(p) != p:
		errs.add(at, "%q is not in its shortest form; allowed: %q", clip(p), clip(path.Clean(p)))
	}
}

// checkUser accepts name or number, with an optional group where grouped.
func checkUser(errs *FieldErrors, at, user string, grouped bool) {
	allowed := "a user's name or number"
	name, group, both := strings.Cut(user, ":")
	if grouped {
		allowed += `, also with a group ("1000:1000")`
	}
	ok := name != "" && alphanumericOr(name[0], '_') && consistsOf(name, "-_.") && (!both || grouped && group != "" && consistsOf(group, "-_."))
	if user != "" && !ok {
		errs.add(at, "%q is not allowed; allowed: %s", clip(user), allowed)
	}
}

func checkHostIP(errs *FieldErrors, at, ip string) {
	if ip == "" {
		return
	}
	if a, err := netip.ParseAddr(ip); err != nil || a.Zone() != "" {
		errs.add(at, "%q is not an IP address; allowed: an IPv4 or IPv6 address of the node, or nothing for its default", clip(ip))
	}
}

var signals = map[string]bool{
	"HUP": true, "INT": true, "QUIT": true, "ABRT": true, "KILL": true, "USR1": true, "USR2": true,
	"ALRM": true, "TERM": true, "CONT": true, "WINCH": true, "PWR": true, "RTMIN": true, "RTMAX": true,
}

func checkSignal(errs *FieldErrors, at, s string) {
	if s == "" {
		return
	}
	name := strings.TrimPrefix(s, "SIG")
	if offset, ok := strings.CutPrefix(name, "RTMIN+"); ok {
		if n, err := strconv.ParseUint(offset, 10, 8); err == nil && n <= 30 {
			return
		}
	}
	if n, err := strconv.ParseUint(s, 10, 8); err == nil && n >= 1 && n <= 64 {
		return
	}
	if !signals[name] {
		errs.add(at, `%q is not a signal that stops; allowed: a name such as "SIGTERM", "SIGQUIT", "SIGRTMIN+3", or a number from 1 to 64`, clip(s))
	}
}

// checkRange refuses n outside of [low, high].
func checkRange[N int32 | int64](errs *FieldErrors, at string, n, low, high N) {
	if n < low || n > high {
		errs.add(at, "%d is out of range; allowed: %d to %d", n, low, high)
	}
}

// SelectLabels reads a label selector, "key=value,key=value"; all must hold.
func SelectLabels(selector string) (map[string]string, error) {
	want := map[string]string{}
	if selector == "" {
		return want, nil
	}
	for pair := range strings.SplitSeq(selector, ",") {
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, FieldErrors{{Path: "label_selector", Message: fmt.Sprintf("%q has no =; allowed: key=value pairs, separated by commas", clip(pair))}}
		}
		var errs FieldErrors
		checkLabels(&errs, "label_selector", map[string]string{k: v})
		if other, twice := want[k]; twice && other != v {
			errs.add("label_selector", "%q is wanted to be both %q and %q; allowed: each name once", clip(k), clip(other), clip(v))
		}
		if err := errs.err(); err != nil {
			return nil, err
		}
		want[k] = v
	}
	return want, nil
}

func lower(c byte) bool        { return c >= 'a' && c <= 'z' }
func digit(c byte) bool        { return c >= '0' && c <= '9' }
func alphanumeric(c byte) bool { return lower(c) || digit(c) || c >= 'A' && c <= 'Z' }

func alphanumericOr(c, other byte) bool { return alphanumeric(c) || c == other }

func consistsOf(s, others string) bool {
	for i := range len(s) {
		if !alphanumeric(s[i]) && strings.IndexByte(others, s[i]) < 0 {
			return false
		}
	}
	return true
}
