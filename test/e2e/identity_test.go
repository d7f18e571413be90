package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// controllerIdentity makes a client certificate with the controller's name, signed
// by the authority that the controller keeps in a Secret: what somebody has who can
// read Secrets of kiln-system.
func controllerIdentity(t *testing.T, caCert, caKey []byte) tls.Certificate {
	t.Helper()
	return sign(t, caCert, caKey, &x509.Certificate{
		Subject: pkix.Name{CommonName: "kiln-controller"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// sign makes a key and a certificate for it.
func sign(t *testing.T, caCert, caKey []byte, template *x509.Certificate) tls.Certificate {
	t.Helper()
	ca, err := tls.X509KeyPair(caCert, caKey)
	require.NoError(t, err)
	parent, err := x509.ParseCertificate(ca.Certificate[0])
	require.NoError(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), ca.PrivateKey)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
