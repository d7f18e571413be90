package strategy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	envName   = regexp.MustCompile(`^[A-Za-z_.-][A-Za-z0-9_.-]*$`)
	secretID  = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,253}$`)
	cacheID   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	stepName  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9 _.-]{0,61}[A-Za-z0-9])?$`)
	stageName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	hostName  = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?$`)
	owner     = regexp.MustCompile(`^[0-9]{1,9}(:[0-9]{1,9})?$`)
	userName  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?$`)
	plainDir  = regexp.MustCompile(`^[A-Za-z0-9_./-]*$`)
)

// maxPath bounds a path in bytes; it is the kernel's limit less a margin for what
// it is joined to.
const maxPath = 3072

// checkImage returns a name of an image to read: a tag or a digest or both, and
// the tag latest when there is neither.
func checkImage(s string) (string, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", fmt.Errorf("%s is not an image name: %w", quote(s), err)
	}
	return reference.TagNameOnly(named).String(), nil
}

// checkTarget returns a name of an image to write, with a tag.
func checkTarget(s string) (string, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", fmt.Errorf("%s is not an image name: %w", quote(s), err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fmt.Errorf("%s: a name to store under cannot have a digest", quote(s))
	}
	return reference.TagNameOnly(named).String(), nil
}

// cleanRelative returns a slash-separated path below a directory in its shortest
// form; "." is the directory itself.
func cleanRelative(s string) (string, error) {
	switch {
	case len(s) > maxPath:
		return "", fmt.Errorf("the path is longer than %d bytes", maxPath)
	case strings.ContainsRune(s, 0):
		return "", fmt.Errorf("%s has a zero byte", quote(s))
	case path.IsAbs(s):
		return "", fmt.Errorf("%s is absolute; want a relative path", quote(s))
	}
	for part := range strings.SplitSeq(s, "/") {
		if part == ".." {
			return "", fmt.Errorf("%s leads out with %q", quote(s), "..")
		}
		if len(part) > 255 {
			return "", fmt.Errorf("%s has a name longer than 255 bytes", quote(s))
		}
	}
	return path.Clean(s), nil
}

// checkAbsolute reports why s is not an absolute path without "..".
func checkAbsolute(s string) error {
	if !path.IsAbs(s) {
		return fmt.Errorf("%s is not an absolute path", quote(s))
	}
	_, err := cleanRelative(strings.TrimLeft(s, "/"))
	return err
}

// parseGitURL returns the URL of a repository that may be fetched.
func parseGitURL(s string) (*gitutil.GitURL, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("%s has a space or control character", quote(redact(s)))
	}
	u, err := gitutil.ParseURL(s)
	if err != nil || u.Host == "" || strings.Trim(u.Path, "/") == "" {
		return nil, fmt.Errorf("%s is not a git URL; want https://HOST/PATH or ssh://USER@HOST/PATH", quote(redact(s)))
	}
	if strings.HasPrefix(u.Host, "-") {
		return nil, errors.New("the host begins with a dash")
	}
	if u.Opts != nil || len(u.Query) > 0 || strings.ContainsAny(s, "#?") {
		return nil, errors.New("want a URL without fragment and query; the revision and the context directory have fields of their own")
	}
	_, hasPassword := "", false
	if u.User != nil {
		_, hasPassword = u.User.Password()
	}
	switch u.Scheme {
	case gitutil.HTTPProtocol, gitutil.HTTPSProtocol:
		if u.User != nil {
			return nil, errors.New("want a URL without credentials; name an entry of the credentials")
		}
		if u.Scheme == gitutil.HTTPProtocol && !isLoopback(u.Host) {
			return nil, errors.New("plain HTTP is accepted for loopback addresses only; want https://")
		}
	case gitutil.SSHProtocol:
		if hasPassword {
			return nil, errors.New("want a URL without a password; name an entry of the credentials")
		}
		if u.User != nil && !userName.MatchString(u.User.Username()) {
			return nil, errors.New("the user name is not valid")
		}
	default:
		return nil, fmt.Errorf("scheme %q is not accepted; want https or ssh", u.Scheme)
	}
	return u, nil
}

// checkRevision reports why s cannot be the name of a branch, tag or commit.
// The rules are git's own (git check-ref-format), and no percent sign.
func checkRevision(s string) error {
	bad := len(s) > 255 || strings.HasPrefix(s, "-") || strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/") ||
		strings.HasSuffix(s, ".") || strings.HasSuffix(s, ".lock") || strings.Contains(s, "..") ||
		strings.Contains(s, "//") || strings.Contains(s, "/.") || strings.HasPrefix(s, ".") || strings.Contains(s, "@{") ||
		strings.ContainsAny(s, "~^:?*[\\%#") || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
	if bad {
		return fmt.Errorf("%s is not the name of a branch, tag or commit", quote(s))
	}
	return nil
}

// parseHTTPURL returns a URL to fetch: HTTPS, or HTTP when plain allows it or the
// host is a loopback address.
func parseHTTPURL(s string, plain bool) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, fmt.Errorf("%s is not an HTTP URL", quote(redact(s)))
	}
	if u.User != nil {
		return nil, errors.New("want a URL without credentials")
	}
	if u.Hostname() == sessionHost {
		return nil, fmt.Errorf("the host %s is reserved", sessionHost)
	}
	if u.Scheme == "http" && !plain && !isLoopback(u.Host) {
		return nil, errors.New("want https://, or a digest with http://")
	}
	return u, nil
}

// sessionHost is the name by which an engine asks a session for uploads.
const sessionHost = "buildkit-session"

// isLoopback reports whether host, with or without a port, is this machine.
func isLoopback(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if strings.EqualFold(name, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(name, "[]"))
	return err == nil && addr.Unmap().IsLoopback()
}

// redact hides what is before the last "@" of what should be a URL and is not.
func redact(s string) string {
	at := strings.LastIndex(s, "@")
	if at < 0 {
		return s
	}
	scheme, _, ok := strings.Cut(s[:at], "://")
	if !ok {
		return "…" + s[at:]
	}
	return scheme + "://…" + s[at:]
}

func checkDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil || d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("%s is not a digest; want sha256: and 64 hexadecimal digits", quote(s))
	}
	return d, nil
}

func parsePlatform(s string) (ocispecs.Platform, error) {
	p, err := platforms.Parse(s)
	if err != nil || len(s) > maxQuoted {
		return ocispecs.Platform{}, fmt.Errorf("%s is not a platform; want OS/ARCHITECTURE, such as linux/amd64", quote(s))
	}
	return platforms.Normalize(p), nil
}

// parseAddress returns an IP address.
func parseAddress(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s is not an IP address", quote(s))
	}
	return a.Unmap(), nil
}
