package strategy

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// sshKey returns a key and its file.
func sshKey(t *testing.T) (ssh.Signer, []byte) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(key)
	require.NoError(t, err)
	block, err := ssh.MarshalPrivateKey(key, "")
	require.NoError(t, err)
	return signer, pem.EncodeToMemory(block)
}

// serveSSH serves the repository to the owner of a key, and returns its URL and
// the line of known_hosts of the server.
func (r *repository) serveSSH(host ssh.Signer, allowed ssh.PublicKey) (url string, knownHosts []byte) {
	r.t.Helper()
	cfg := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if !bytes.Equal(key.Marshal(), allowed.Marshal()) {
			return nil, fmt.Errorf("unknown key")
		}
		return nil, nil
	}}
	cfg.AddHostKey(host)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(r.t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { r.session(conn, cfg) })
		}
	})
	r.t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	addr := l.Addr().String()
	return "ssh://git@" + addr + r.dir, []byte(knownhosts.Line([]string{addr}, host.PublicKey()) + "\n")
}

// session lets a client run git-upload-pack on the repository.
func (r *repository) session(conn net.Conn, cfg *ssh.ServerConfig) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for nc := range channels {
		ch, reqs, err := nc.Accept()
		if err != nil {
			return
		}
		for req := range reqs {
			ok := req.Type == "exec" && strings.Contains(string(req.Payload), "git-upload-pack")
			_ = req.Reply(ok || req.Type == "env", nil)
			if !ok {
				continue
			}
			cmd := exec.Command("git", "-c", "safe.directory=*", "upload-pack", r.dir)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				return
			}
			cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
			go func() {
				buf := make([]byte, 4096)
				for {
					n, err := ch.Read(buf)
					_, _ = stdin.Write(buf[:n])
					if err != nil {
						_ = stdin.Close()
						return
					}
				}
			}()
			var status struct{ Code uint32 }
			if cmd.Run() != nil {
				status.Code = 1
			}
			_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(&status))
			_ = ch.Close()
		}
	}
}

func TestGitSourceOverSSH(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	repo := newRepository(t)
	commit := repo.commit(map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n", "f": "over ssh"})
	host, _ := sshKey(t)
	owner, ownerFile := sshKey(t)
	_, strangerFile := sshKey(t)
	other, _ := sshKey(t)
	url, known := repo.serveSSH(host, owner.PublicKey())
	addr := strings.TrimPrefix(strings.TrimSuffix(url, repo.dir), "ssh://git@")
	otherKnown := []byte(knownhosts.Line([]string{addr}, other.PublicKey()) + "\n")
	build := func(key, knownHosts []byte, strategy *agentv1.BuildSpec_Dockerfile) outcome {
		src := gitSource(url, "main")
		src.GetGit().Credential = "forge"
		return run(t, c, Inputs{
			Spec:        &agentv1.BuildSpec{Source: src, Strategy: strategy, Outputs: pushTo(reg.host + "/ssh:1")},
			Credentials: &agentv1.Credentials{Git: map[string]*agentv1.GitCredential{"forge": {SshPrivateKey: key, SshKnownHosts: knownHosts}}},
		})
	}
	fromSource := &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{}}
	t.Run("stranger", func(t *testing.T) {
		require.Error(t, build(strangerFile, known, fromSource).err)
	})
	t.Run("another server", func(t *testing.T) {
		require.Error(t, build(ownerFile, otherKnown, fromSource).err)
	})
	t.Run("owner", func(t *testing.T) {
		out := build(ownerFile, known, fromSource)
		require.NoError(t, out.err)
		require.Equal(t, commit, out.response[RevisionKey])
		require.Equal(t, "over ssh", reg.pull(reg.host + "/ssh:1").files["f"])
	})
	t.Run("out of a step's reach", func(t *testing.T) {
		out := build(ownerFile, known, inlineDockerfile("FROM scratch\nRUN --mount=type=ssh,required [\"/x\"]\n"))
		require.ErrorContains(t, out.err, "no such SSH agent")
	})
}
