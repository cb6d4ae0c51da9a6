package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	keyBlock         = "PRIVATE KEY"
	certificateBlock = "CERTIFICATE"
	// A key, a chain and a few roots have some thousand bytes.
	maxBundle = 1 << 20
)

// bundle is a key with its certificates as one PEM file: with several files a
// crash between two renames would leave a key beside another key's
// certificate. Self-signed certificates are the roots, all others the chain.
type bundle struct {
	key   *ecdsa.PrivateKey
	chain [][]byte // leaf first
	roots [][]byte
}

func (b *bundle) keyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(b.key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}

func certificatesPEM(ders [][]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: certificateBlock, Bytes: der})...)
	}
	return out
}

func parseBundle(data []byte) (*bundle, error) {
	b, err := parseBlocks(data)
	if err == nil && b.key == nil {
		err = errors.New("no private key")
	}
	return b, err
}

// parseBlocks reads a part of a bundle too.
func parseBlocks(data []byte) (*bundle, error) {
	b := &bundle{}
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		switch block.Type {
		case keyBlock:
			if b.key != nil {
				return nil, errors.New("more than one private key")
			}
			key, err := parseKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			b.key = key
		case certificateBlock:
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("certificate: %w", err)
			}
			if isRoot(cert) {
				b.roots = append(b.roots, cert.Raw)
			} else {
				b.chain = append(b.chain, cert.Raw)
			}
		default:
			return nil, fmt.Errorf("unexpected PEM block %q", block.Type)
		}
	}
	// pem.Decode skips what is not PEM; a file cut off in the middle of a
	// block must not pass for a shorter one.
	if strings.TrimSpace(string(data)) != "" {
		return nil, errors.New("something that is not PEM, or a block that is cut off")
	}
	return b, nil
}

func parseKey(pkcs8 []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("private key: must be ECDSA P-256")
	}
	return key, nil
}

func readBundle(path string) (*bundle, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxBundle {
		return nil, fmt.Errorf("%s has %d bytes: not a key with certificates", path, info.Size())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	b, err := parseBundle(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

func (b *bundle) write(path string) error {
	data, err := b.keyPEM()
	if err != nil {
		return err
	}
	data = append(data, certificatesPEM(b.chain)...)
	data = append(data, certificatesPEM(b.roots)...)
	return writeFile(path, data)
}

// writeFile replaces the file in one step and for good: after a crash it is
// the old one or the new one, readable by the owner only.
func writeFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp, err := writeTemp(dir, "."+filepath.Base(path)+".*", data)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	// The new name is a change of the directory, which has its own fsync.
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// writeTemp makes a synced file of mode 0600 with a name of its own; nothing is
// left of it where that fails.
func writeTemp(dir, pattern string, data []byte) (name string, err error) {
	f, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}
