package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Keys of the CA's Secret.
const (
	keyCert   = "tls.crt"  // the CA that signs
	keyKey    = "tls.key"  // and its key
	keyNext   = "next.crt" // the CA that will sign
	keyNextK  = "next.key" // and its key
	keyBundle = "ca.crt"   // all CAs that are trusted
)

// Lifetimes.
const (
	caLife   = 365 * 24 * time.Hour
	leafLife = 30 * 24 * time.Hour
	// overlap is how long a new CA is trusted before it signs.
	overlap = 24 * time.Hour
	// skew is how far in the past certificates begin, for clocks that differ.
	skew = 5 * time.Minute
)

// pair is a certificate with its key.
type pair struct {
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	certPEM []byte
	keyPEM  []byte
}

// advance returns the CA Secret's data as they have to be at a time, and whether that
// differs from data. Data that cannot be read are an error: replacing them would cut off
// everybody who trusts them.
func advance(data map[string][]byte, now time.Time) (map[string][]byte, bool, error) {
	out := map[string][]byte{}
	for k, v := range data {
		out[k] = v
	}
	if len(data[keyCert]) == 0 {
		ca, err := newCA(now)
		if err != nil {
			return nil, false, err
		}
		out[keyCert], out[keyKey], out[keyBundle] = ca.certPEM, ca.keyPEM, ca.certPEM
		return out, true, nil
	}
	current, err := parsePair(data[keyCert], data[keyKey])
	if err != nil {
		return nil, false, fmt.Errorf("read CA: %w", err)
	}
	changed := false
	waiting := len(data[keyNext]) > 0
	if waiting {
		next, err := parsePair(data[keyNext], data[keyNextK])
		if err != nil {
			return nil, false, fmt.Errorf("read next CA: %w", err)
		}
		// What the current one signed may be of no use already; then nobody waits.
		if now.After(next.cert.NotBefore.Add(skew+overlap)) || !holds(current.cert, now) && holds(next.cert, now) {
			out[keyCert], out[keyKey], current = data[keyNext], data[keyNextK], next
			waiting, changed = false, true
		}
	}
	if !holds(current.cert, now) || !waiting && due(current.cert, now) {
		next, err := newCA(now)
		if err != nil {
			return nil, false, err
		}
		out[keyNext], out[keyNextK] = next.certPEM, next.keyPEM
		out[keyBundle] = append(bytes.Clone(next.certPEM), out[keyBundle]...)
		if waiting = holds(current.cert, now); !waiting {
			out[keyCert], out[keyKey] = next.certPEM, next.keyPEM
		}
		changed = true
	}
	if !waiting {
		delete(out, keyNext)
		delete(out, keyNextK)
	}
	bundle, pruned, err := prune(out[keyBundle], now)
	if err != nil {
		return nil, false, err
	}
	out[keyBundle] = bundle
	return out, changed || pruned, nil
}

// holds tells whether a certificate is valid at a time. One that is not yet was made when
// the clock was ahead.
func holds(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotBefore) && !now.After(c.NotAfter)
}

// due tells whether two thirds of a certificate's life are over, or it has not begun.
func due(c *x509.Certificate, now time.Time) bool {
	return !holds(c, now) || now.After(c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore)*2/3))
}

// prune leaves out certificates that have ended.
func prune(bundle []byte, now time.Time) ([]byte, bool, error) {
	certs, err := parseBundle(bundle)
	if err != nil {
		return nil, false, err
	}
	var out []byte
	dropped := false
	for _, c := range certs {
		if now.After(c.NotAfter) {
			dropped = true
			continue
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out, dropped, nil
}

func parseBundle(bundle []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		block, bundle = pem.Decode(bundle)
		if block == nil {
			return out, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read certificate of CA bundle: %w", err)
		}
		out = append(out, c)
	}
}

func newCA(now time.Time) (*pair, error) {
	return sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: fmt.Sprintf("kiln-ca-%d", now.Unix())}, NotBefore: now.Add(-skew), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, nil)
}

// leaf signs a certificate for a client (a name and no hosts) or a server.
func (p *pair) leaf(name string, hosts []string, now time.Time) (*pair, error) {
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-skew), NotAfter: now.Add(leafLife), DNSNames: hosts,
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if len(hosts) > 0 {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	if c.NotAfter.After(p.cert.NotAfter) {
		c.NotAfter = p.cert.NotAfter
	}
	return sign(c, p)
}

// sign makes a key and a certificate for it, signed by ca or by itself.
func sign(template *x509.Certificate, ca *pair) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126)); err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	parent, signer := template, key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, fmt.Errorf("sign certificate %q: %w", template.Subject.CommonName, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return parsePair(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func parsePair(certPEM, keyPEM []byte) (*pair, error) {
	t, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	key, ok := t.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the key is not an ECDSA key")
	}
	return &pair{cert: t.Leaf, key: key, certPEM: certPEM, keyPEM: keyPEM}, nil
}

// tls returns p for a handshake.
func (p *pair) tls() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{p.cert.Raw}, PrivateKey: p.key, Leaf: p.cert}
}
