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

// tlsFlags say how a connection to an agent is protected, and by what the caller proves
// who it is. The names of those for TLS are those of buildctl.
type tlsFlags struct {
	ca, cert, key, serverName string
	token                     tokenFile
}

func (f *tlsFlags) flags(fs *pflag.FlagSet) {
	fs.StringVar(&f.ca, "tlscacert", "", "File of the certificates that the agent's must be signed by (default $KILN_TLS_CACERT)")
	fs.StringVar(&f.cert, "tlscert", "", "File of the certificate to show to the agent (default $KILN_TLS_CERT)")
	fs.StringVar(&f.key, "tlskey", "", "File of the key of --tlscert (default $KILN_TLS_KEY)")
	fs.StringVar(&f.serverName, "tlsservername", "", "Name that the agent's certificate must have (default $KILN_TLS_SERVERNAME, else its host)")
	fs.StringVar((*string)(&f.token), "token-file", "", "File of the ServiceAccount token to show to the agent; it is read again for each call (default $KILN_TOKEN_FILE)")
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
			return errors.New("--tls flags and --token-file are for tcp:// agents: on a socket the kernel says who calls")
		}
		return nil
	}
	for name, p := range map[string]*string{
		"TLS_CACERT": &f.ca, "TLS_CERT": &f.cert, "TLS_KEY": &f.key, "TLS_SERVERNAME": &f.serverName, "TOKEN_FILE": (*string)(&f.token),
	} {
		if *p == "" {
			*p = os.Getenv("KILN_" + name)
		}
	}
	if (f.cert == "") != (f.key == "") {
		return errors.New("--tlscert and --tlskey go together")
	}
	if f.serverName == "" && f.set() {
		f.serverName = u.Hostname()
	}
	for flag, set := range map[string]bool{"--tlscert": f.cert != "", "--token-file": f.token != ""} {
		if set && f.ca == "" {
			return fmt.Errorf("%s needs --tlscacert: an agent's certificate is signed by its own authority", flag)
		}
	}
	if f.token != "" {
		_, err := f.token.read()
		return err
	}
	return nil
}

// maxTokenFile bounds the file of a token, in bytes. Agents take no longer one.
const maxTokenFile = 16 << 10

// tokenFile is the path of a file with a bearer token. It implements
// credentials.PerRPCCredentials.
type tokenFile string

func (f tokenFile) read() (string, error) {
	raw, err := os.ReadFile(string(f))
	if err != nil {
		return "", fmt.Errorf("read --token-file: %w", err)
	}
	token := strings.TrimSpace(string(raw))
	if token == "" || len(raw) > maxTokenFile || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("read --token-file %s: it does not hold one token", string(f))
	}
	return token, nil
}

// GetRequestMetadata implements credentials.PerRPCCredentials. The file is read each time:
// Kubernetes replaces the token of a projected volume long before it expires.
func (f tokenFile) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := f.read()
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials: a token never goes
// over a connection that anybody can read.
func (f tokenFile) RequireTransportSecurity() bool { return true }

// clientOptions returns the flags as options of BuildKit's client.
func (f *tlsFlags) clientOptions(string) []client.ClientOpt {
	if !f.set() {
		return nil
	}
	opts := []client.ClientOpt{client.WithServerConfig(f.serverName, f.ca)}
	if f.cert != "" {
		opts = append(opts, client.WithCredentials(f.cert, f.key))
	}
	if f.token != "" {
		opts = append(opts, client.WithGRPCDialOption(grpc.WithPerRPCCredentials(f.token)))
	}
	return opts
}

// dialBuilds connects to the build API of an agent. The caller closes the
// connection.
func dialBuilds(_ context.Context, addr string, f *tlsFlags) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	var opts []grpc.DialOption
	if f.token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(f.token))
	}
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
	conn, err := grpc.NewClient(strings.TrimPrefix(addr, "tcp://"), append(opts, grpc.WithTransportCredentials(creds))...)
	if err != nil {
		return nil, fmt.Errorf("connect to agent %s: %w", addr, err)
	}
	return conn, nil
}
