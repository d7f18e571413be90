package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kiln-build/kiln/agent/config"
)

// flags override the configuration file.
type flags struct {
	config      string
	root        string
	listen      []string
	nodeName    string
	logLevel    string
	logFormat   string
	verbosity   int
	printConfig bool
}

// debugVerbosity is the --v from which on everything is logged, as in Kubernetes.
const debugVerbosity = 4

func (f *flags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.config, "config", "", "Configuration file; without one the defaults hold")
	fs.StringVar(&f.root, "root", "", "State directory (root)")
	fs.StringArrayVar(&f.listen, "listen", nil, "Address: unix:///path (listeners.unix.path) or tcp://host:port (listeners.tcp.address); may be repeated")
	fs.StringVar(&f.nodeName, "node-name", "", "Name of the Kubernetes node (nodeName)")
	fs.StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error (logging.level)")
	fs.StringVar(&f.logFormat, "log-format", "", "json or text (logging.format)")
	fs.IntVar(&f.verbosity, "v", 0, fmt.Sprintf("Verbosity; from %d on the same as --log-level debug", debugVerbosity))
	fs.BoolVar(&f.printConfig, "print-config", false, "Print the configuration with defaults and flags, and end")
}

// load returns the configuration that holds.
func (f *flags) load() (*config.Agent, error) {
	cfg := &config.Agent{}
	if f.config != "" {
		data, err := readConfig(f.config)
		if err != nil {
			return nil, err
		}
		if cfg, err = config.Decode(data); err != nil {
			return nil, fmt.Errorf("%s: %w", f.config, err)
		}
	}
	if err := f.apply(cfg); err != nil {
		return nil, err
	}
	if err := cfg.Complete(); err != nil {
		return nil, err
	}
	return cfg, nil
}

func readConfig(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer file.Close()
	// One byte more than Decode takes, so that it refuses what was cut.
	data, err := io.ReadAll(io.LimitReader(file, config.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return data, nil
}

func (f *flags) apply(cfg *config.Agent) error {
	set(&cfg.Root, f.root)
	set(&cfg.NodeName, f.nodeName)
	set(&cfg.Logging.Format, f.logFormat)
	if f.verbosity >= debugVerbosity {
		cfg.Logging.Level = "debug"
	}
	set(&cfg.Logging.Level, f.logLevel)
	for _, l := range f.listen {
		scheme, address, _ := strings.Cut(l, "://")
		switch scheme {
		case "unix":
			if cfg.Listeners.Unix == nil {
				cfg.Listeners.Unix = &config.Unix{}
			}
			cfg.Listeners.Unix.Path = address
		case "tcp":
			if cfg.Listeners.TCP == nil {
				cfg.Listeners.TCP = &config.TCP{}
			}
			cfg.Listeners.TCP.Address = address
		default:
			return fmt.Errorf("--listen %q: want unix:///path or tcp://host:port", l)
		}
	}
	return nil
}

func set(field *string, flag string) {
	if flag != "" {
		*field = flag
	}
}
