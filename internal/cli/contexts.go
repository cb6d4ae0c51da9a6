package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// userConfig is the user's file, ~/.config/persys/config.yaml.
type userConfig struct {
	CurrentContext string `yaml:"current_context,omitempty"`
	// Defaults of the flags of the same names.
	Output  string `yaml:"output,omitempty"`
	Timeout string `yaml:"timeout,omitempty"`

	Contexts map[string]*clusterContext `yaml:"contexts,omitempty"`
}

// clusterContext is a cluster, and who one is there. Certificates and key are
// either inline PEM or files, relative to the configuration file.
type clusterContext struct {
	Endpoints []string `yaml:"endpoints"`
	CA        string   `yaml:"ca,omitempty"`
	Cert      string   `yaml:"cert,omitempty"`
	Key       string   `yaml:"key,omitempty"`
	CAFile    string   `yaml:"ca_file,omitempty"`
	CertFile  string   `yaml:"cert_file,omitempty"`
	KeyFile   string   `yaml:"key_file,omitempty"`
}

func (c *userConfig) names() []string {
	names := make([]string, 0, len(c.Contexts))
	for n := range c.Contexts {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// configPath is where the user's file is, or would be.
func (a *app) configPath() (string, error) {
	if a.global.config != "" {
		return a.global.config, nil
	}
	dir, err := a.ConfigDir()
	if err != nil {
		return "", usageErrorf("where the configuration file is: %w; name it with --config", err)
	}
	return filepath.Join(dir, "persys", "config.yaml"), nil
}

// loadUserConfig reads the file; where there is none it is empty.
func loadUserConfig(path string) (*userConfig, error) {
	c := &userConfig{}
	data, err := readSmallFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %s", path, yamlMessage(err))
	}
	for name, x := range c.Contexts {
		if x == nil {
			return nil, fmt.Errorf("%s: context %q is empty", path, name)
		}
	}
	return c, nil
}

var unknownField = regexp.MustCompile(`field (\S+) not found in type \S+`)

// yamlMessage says in a user's words what yaml.v3 objects to, the first thing
// only.
func yamlMessage(err error) string {
	text := err.Error()
	var several *yaml.TypeError
	if errors.As(err, &several) {
		text = several.Errors[0]
	}
	return unknownField.ReplaceAllString(text, `unknown key "$1"`)
}

// updateUserConfig changes the file, readable by its owner only, in one step;
// a second command that does so at the same time waits.
func updateUserConfig(path string, change func(*userConfig) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	unlock, err := lockFile(path + ".lock")
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer unlock()
	c, err := loadUserConfig(path)
	if err != nil {
		return err
	}
	if err := change(c); err != nil {
		return err
	}
	data, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if err := replaceFile(path, data); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	return nil
}

func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Closing ends the lock.
	return func() { _ = f.Close() }, nil
}

// replaceFile writes a file of mode 0600 that is the old one or the new one
// after a crash.
func replaceFile(path string, data []byte) error {
	// A link stays a link: dotfiles are often kept elsewhere.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".config-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// pem gives the three parts, from the file itself or from those it names.
func (x *clusterContext) pem(configPath string) (certificate, key, roots []byte, err error) {
	parts := []struct {
		name, inline, file string
		out                *[]byte
	}{
		{"ca", x.CA, x.CAFile, &roots}, {"cert", x.Cert, x.CertFile, &certificate}, {"key", x.Key, x.KeyFile, &key},
	}
	for _, p := range parts {
		switch {
		case p.inline != "" && p.file != "":
			return nil, nil, nil, fmt.Errorf("both %s and %s_file are given", p.name, p.name)
		case p.inline != "":
			*p.out = []byte(p.inline)
		case p.file != "":
			file := p.file
			if !filepath.IsAbs(file) {
				file = filepath.Join(filepath.Dir(configPath), file)
			}
			if *p.out, err = readSmallFile(file); err != nil {
				return nil, nil, nil, fmt.Errorf("%s_file: %w", p.name, err)
			}
		default:
			return nil, nil, nil, fmt.Errorf("%s is missing", p.name)
		}
	}
	return certificate, key, roots, nil
}

// Other servers of the cluster, as last heard of, are kept in a file of their
// own beside the user's, which is not rewritten behind their back. They are
// tried after the context's own endpoints.
func knownServersPath(configPath string) string { return configPath + ".servers" }

func loadKnownServers(configPath, context string) []string {
	var all map[string][]string
	data, err := os.ReadFile(knownServersPath(configPath))
	if err != nil || yaml.Unmarshal(data, &all) != nil {
		return nil // only a hint
	}
	return all[context]
}

// saveKnownServers writes only what is new. No addresses forget the context.
func saveKnownServers(configPath, context string, addresses []string) error {
	if slices.Equal(loadKnownServers(configPath, context), addresses) {
		return nil
	}
	unlock, err := lockFile(configPath + ".lock")
	if err != nil {
		return err
	}
	defer unlock()
	var all map[string][]string
	if data, err := os.ReadFile(knownServersPath(configPath)); err == nil && yaml.Unmarshal(data, &all) != nil {
		all = nil // garbled: begun anew
	}
	if all == nil {
		all = map[string][]string{}
	}
	if len(addresses) == 0 {
		delete(all, context)
	} else {
		all[context] = addresses
	}
	data, err := yaml.Marshal(all)
	if err != nil {
		return err
	}
	return replaceFile(knownServersPath(configPath), data)
}
