package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// tlsFlags say how a connection to an agent is protected. Their names are those of
// buildctl.
type tlsFlags struct {
	ca, cert, key, serverName string
}

func (f *tlsFlags) flags(fs *pflag.FlagSet) {
	fs.StringVar(&f.ca, "tlscacert", "", "File of the certificates that the agent's must be signed by (default $KILN_TLS_CACERT)")
	fs.StringVar(&f.cert, "tlscert", "", "File of the certificate to show to the agent (default $KILN_TLS_CERT)")
	fs.StringVar(&f.key, "tlskey", "", "File of the key of --tlscert (default $KILN_TLS_KEY)")
	fs.StringVar(&f.serverName, "tlsservername", "", "Name that the agent's certificate must have (default $KILN_TLS_SERVERNAME, else its host)")
}

func (f *tlsFlags) set() bool { return *f != tlsFlags{} }

// check takes what is missing from the environment, and reports what makes no
// sense for the address.
func (f *tlsFlags) check(addr string) error {
	u, err := url.Parse(addr)
	if err != nil || u.Scheme != "unix" && u.Scheme != "tcp" || u.Scheme == "unix" && u.Path == "" || u.Scheme == "tcp" && u.Port() == "" {
		return fmt.Errorf("--agent %s: want unix:///path or tcp://host:port", addr)
	}
	if u.Scheme == "unix" {
		if f.set() {
			return errors.New("--tls flags are for tcp:// agents")
		}
		return nil
	}
	for name, p := range map[string]*string{"CACERT": &f.ca, "CERT": &f.cert, "KEY": &f.key, "SERVERNAME": &f.serverName} {
		if *p == "" {
			*p = os.Getenv("KILN_TLS_" + name)
		}
	}
	if (f.cert == "") != (f.key == "") {
		return errors.New("--tlscert and --tlskey go together")
	}
	if f.serverName == "" && f.set() {
		f.serverName = u.Hostname()
	}
	if f.cert != "" && f.ca == "" {
		return errors.New("--tlscert needs --tlscacert: an agent's certificate is signed by its own authority")
	}
	return nil
}

// clientOptions returns the flags as options of BuildKit's client.
func (f *tlsFlags) clientOptions(string) []client.ClientOpt {
	if !f.set() {
		return nil
	}
	opts := []client.ClientOpt{client.WithServerConfig(f.serverName, f.ca)}
	if f.cert != "" {
		opts = append(opts, client.WithCredentials(f.cert, f.key))
	}
	return opts
}

// dialBuilds connects to the build API of an agent. The caller closes the
// connection.
func dialBuilds(_ context.Context, addr string, f *tlsFlags) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if f.set() {
		ca, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("read --tlscacert: %w", err)
		}
		config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: f.serverName, RootCAs: x509.NewCertPool()}
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("read --tlscacert %s: no certificate in PEM", f.ca)
		}
		if f.cert != "" {
			pair, err := tls.LoadX509KeyPair(f.cert, f.key)
			if err != nil {
				return nil, fmt.Errorf("read --tlscert: %w", err)
			}
			config.Certificates = []tls.Certificate{pair}
		}
		creds = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(strings.TrimPrefix(addr, "tcp://"), grpc.WithTransportCredentials(creds))
	if err != nil {
		return nil, fmt.Errorf("connect to agent %s: %w", addr, err)
	}
	return conn, nil
}
