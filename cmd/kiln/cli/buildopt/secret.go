package buildopt

import (
	"fmt"
	"os"

	bkbuild "github.com/moby/buildkit/cmd/buildctl/build"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
)

// ParseSecrets parses --secret values and checks that each can be read.
func ParseSecrets(values []string) (session.Attachable, error) {
	sources := make([]secretsprovider.Source, 0, len(values))
	for _, s := range values {
		fields, err := csvFields(s)
		if err != nil {
			return nil, fmt.Errorf("secret: %w", err)
		}
		var src secretsprovider.Source
		var kind string
		for _, f := range fields {
			switch f.key {
			case "id":
				src.ID = f.value
			case "src", "source":
				src.FilePath = f.value
			case "env":
				src.Env = f.value
			case "type":
				if kind = f.value; kind != "file" && kind != "env" {
					return nil, fmt.Errorf("invalid secret type %q: want file or env", kind)
				}
			default:
				return nil, fmt.Errorf("invalid secret: unknown key %q: want id, src, env or type", f.key)
			}
		}
		if src.ID == "" {
			return nil, fmt.Errorf("invalid secret: it has no id")
		}
		if kind == "env" && src.Env == "" {
			src.Env, src.FilePath = src.FilePath, ""
		}
		if src.Env != "" {
			if _, ok := os.LookupEnv(src.Env); !ok {
				return nil, fmt.Errorf("secret %s: environment variable %s is not set", src.ID, src.Env)
			}
		}
		sources = append(sources, src)
	}
	store, err := secretsprovider.NewStore(sources)
	if err != nil {
		return nil, fmt.Errorf("secret: %w", err)
	}
	return secretsprovider.NewSecretProvider(store), nil
}

// ParseSSH parses --ssh values and checks that each agent or key is there.
func ParseSSH(values []string) (session.Attachable, error) {
	configs, err := bkbuild.ParseSSH(values)
	if err != nil {
		return nil, fmt.Errorf("ssh: %w", err)
	}
	p, err := sshprovider.NewSSHAgentProvider(configs)
	if err != nil {
		return nil, fmt.Errorf("ssh: %w", err)
	}
	return p, nil
}
