package strategy

import (
	"encoding/base64"
	"maps"
	"slices"
	"strings"

	"github.com/moby/buildkit/util/gitutil"
	"golang.org/x/crypto/ssh"

	"github.com/kiln-build/kiln/agent/strategy/sessions"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// defaultGitUser is who a token belongs to when its user is not named.
const defaultGitUser = "x-access-token"

// CheckCredentials reports as an *InvalidError what the spec names and creds lacks,
// and what is in creds but cannot be used. What no field of the spec names is
// ignored. The errors repeat nothing that is secret.
func CheckCredentials(spec *agentv1.BuildSpec, creds *agentv1.Credentials) error {
	var p problems
	for i, ref := range spec.GetSecrets() {
		value, ok := creds.GetSecrets()[ref.GetId()]
		switch f := entry("credentials.secrets", ref.GetId()); {
		case !ok:
			p.add(f, "is missing; %s declares it", item("spec.secrets", i))
		case len(value) > maxSecretValue:
			p.add(f, "is longer than %d bytes", maxSecretValue)
		}
	}
	for _, host := range slices.Sorted(maps.Keys(creds.GetRegistries())) {
		c, f := creds.GetRegistries()[host], entry("credentials.registries", host)
		switch {
		case host == "" || strings.ContainsAny(host, "/ @"):
			p.add(f, "is not a host name; want the host with its port if there is one, such as registry.example.com:5000")
		case c.GetIdentityToken() == "" && (c.GetUsername() == "") != (c.GetPassword() == ""):
			p.add(f, "wants a user name with a password, or an identity token")
		}
	}
	if g := spec.GetSource().GetGit(); g.GetCredential() != "" {
		checkGitCredential(&p, g, creds)
	}
	return p.err()
}

func checkGitCredential(p *problems, g *agentv1.GitSource, creds *agentv1.Credentials) {
	f := entry("credentials.git", g.GetCredential())
	c, ok := creds.GetGit()[g.GetCredential()]
	if !ok {
		p.add(f, "is missing; spec.source.git.credential names it")
		return
	}
	u, err := parseGitURL(g.GetUrl())
	if err != nil {
		p.add("spec.source.git.url", "%s", err)
		return
	}
	if u.Scheme != gitutil.SSHProtocol {
		if c.GetPassword() == "" {
			p.add(f+".password", "is missing; an HTTPS URL needs a password or token")
		}
		if strings.ContainsAny(c.GetUsername(), ":\r\n\x00") {
			p.add(f+".username", "has a colon, line break or zero byte")
		}
		return
	}
	if _, err := sessions.ParseSSHKey(c.GetSshPrivateKey()); err != nil {
		p.add(f+".ssh_private_key", "%s", err)
	}
	if !hasHostKey(c.GetSshKnownHosts()) {
		p.add(f+".ssh_known_hosts", "has no line with a host's key; the server would not be accepted")
	}
	if len(c.GetSshKnownHosts()) > maxValue {
		p.add(f+".ssh_known_hosts", "is longer than %d bytes", maxValue)
	}
}

// hasHostKey reports whether all lines of a known_hosts file can be read, and one
// of them is a key.
func hasHostKey(file []byte) bool {
	_, _, _, _, rest, err := ssh.ParseKnownHosts(file)
	found := err == nil
	for err == nil && len(rest) > 0 {
		_, _, _, _, rest, err = ssh.ParseKnownHosts(rest)
	}
	return found
}

// newLoan returns what the spec names of creds. The source adds its own to it.
func newLoan(spec *agentv1.BuildSpec, creds *agentv1.Credentials) *sessions.Loan {
	l := &sessions.Loan{
		Registries: map[string]sessions.Credential{}, Secrets: map[string][]byte{},
		SSHKeys: map[string][]byte{}, Uploads: map[string]string{},
	}
	for _, ref := range spec.GetSecrets() {
		l.Secrets[ref.GetId()] = creds.GetSecrets()[ref.GetId()]
	}
	for host, c := range creds.GetRegistries() {
		l.Registries[host] = sessions.Credential{
			Username: c.GetUsername(), Password: c.GetPassword(), IdentityToken: c.GetIdentityToken(),
		}
	}
	return l
}

// basicAuth returns the value of an Authorization header.
func basicAuth(c *agentv1.GitCredential) []byte {
	user := c.GetUsername()
	if user == "" {
		user = defaultGitUser
	}
	return []byte("basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+c.GetPassword())))
}
