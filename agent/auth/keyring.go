package auth

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// maxPEM bounds a file of keys or certificates, in bytes.
const maxPEM = 4 << 20

// recheck is how often files are looked at, at most.
const recheck = time.Second

// Files name the server's key pair and the authorities of client certificates, all
// in PEM.
type Files struct {
	Cert, Key string
	// ClientCAs may be empty: then certificates of clients are not asked for.
	ClientCAs []string
}

// Keyring holds what Files had, and reads them again when they change. Handshakes
// after that use the new keys; connections that are there stay.
//
// Files that cannot be used, such as those of a rotation that is half done, leave
// the keys as they are, and are tried again. A Keyring may be used concurrently.
type Keyring struct {
	files Files
	log   *slog.Logger
	// every is recheck, but for tests.
	every time.Duration

	// mu guards what follows.
	mu      sync.Mutex
	checked time.Time
	// stamps are those of the files that config was made of, or that failed last.
	stamps []stamp
	config *tls.Config
	// notAfter is when the certificate of config ends.
	notAfter time.Time
	// clientAuth is what every config has.
	clientAuth tls.ClientAuthType
}

// stamp tells whether a file is the one that was read.
type stamp struct {
	dev, ino    uint64
	size        int64
	modify, chg time.Time
}

// NewKeyring reads files. certificateNeeded refuses clients that show none;
// otherwise one that is shown must verify all the same.
func NewKeyring(files Files, certificateNeeded bool, log *slog.Logger) (*Keyring, error) {
	k := &Keyring{files: files, log: log, every: recheck, clientAuth: tls.VerifyClientCertIfGiven}
	switch {
	case len(files.ClientCAs) == 0:
		k.clientAuth = tls.NoClientCert
	case certificateNeeded:
		k.clientAuth = tls.RequireAndVerifyClientCert
	}
	var err error
	if k.stamps, err = k.stat(); err != nil {
		return nil, err
	}
	if k.config, k.notAfter, err = k.load(); err != nil {
		return nil, err
	}
	k.checked = time.Now()
	return k, nil
}

// TLS returns a configuration for a server, whose handshakes use the files as they
// are then. It speaks TLS 1.3 only and resumes no session, so that every connection
// proves its certificate against today's authorities.
func (k *Keyring) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		GetConfigForClient:     func(*tls.ClientHelloInfo) (*tls.Config, error) { return k.current(), nil },
	}
}

// NotAfter returns when the server's certificate ends, for a warning before it does.
func (k *Keyring) NotAfter() time.Time {
	k.current()
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.notAfter
}

func (k *Keyring) current() *tls.Config {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.checked) < k.every {
		return k.config
	}
	k.checked = time.Now()
	// Stamps are taken before the files are read: a change in between is seen next
	// time.
	stamps, err := k.stat()
	if err == nil && equal(stamps, k.stamps) {
		return k.config
	}
	var config *tls.Config
	var notAfter time.Time
	if err == nil {
		config, notAfter, err = k.load()
	}
	if err != nil {
		// The stamps stay, so that this is tried again, and said again.
		k.log.Error("TLS files cannot be used; those read before stay in use", "error", err)
		return k.config
	}
	k.config, k.notAfter, k.stamps = config, notAfter, stamps
	k.log.Info("TLS files were read again")
	return k.config
}

func (k *Keyring) paths() []string {
	return append([]string{k.files.Cert, k.files.Key}, k.files.ClientCAs...)
}

func (k *Keyring) stat() ([]stamp, error) {
	var out []stamp
	for _, p := range k.paths() {
		s, err := stampOf(p)
		if err != nil {
			return nil, fmt.Errorf("read TLS files: %w", err)
		}
		out = append(out, s)
	}
	return out, nil
}

func (k *Keyring) load() (*tls.Config, time.Time, error) {
	cert, err := readPEM(k.files.Cert)
	if err != nil {
		return nil, time.Time{}, err
	}
	key, err := readPEM(k.files.Key)
	if err != nil {
		return nil, time.Time{}, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		// The library's error tells what does not fit, and no part of the key.
		return nil, time.Time{}, fmt.Errorf("read TLS files %s and %s: %w", k.files.Cert, k.files.Key, err)
	}
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		Certificates:           []tls.Certificate{pair},
		ClientAuth:             k.clientAuth,
	}
	if len(k.files.ClientCAs) == 0 {
		return config, pair.Leaf.NotAfter, nil
	}
	config.ClientCAs = x509.NewCertPool()
	for _, p := range k.files.ClientCAs {
		data, err := readPEM(p)
		if err != nil {
			return nil, time.Time{}, err
		}
		if !config.ClientCAs.AppendCertsFromPEM(data) {
			return nil, time.Time{}, fmt.Errorf("read TLS file %s: no certificate of an authority in it", p)
		}
	}
	return config, pair.Leaf.NotAfter, nil
}

func readPEM(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read TLS file: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err == nil && len(data) > maxPEM {
		err = errors.New("too large")
	}
	if err != nil {
		return nil, fmt.Errorf("read TLS file %s: %w", path, err)
	}
	return data, nil
}
