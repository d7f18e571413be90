// Command kiln-controller carries the Builds of a cluster to the nodes' agents.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/kiln-build/kiln/controller"
	"github.com/kiln-build/kiln/controller/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return
		}
		fmt.Fprintln(os.Stderr, "kiln-controller:", err)
		os.Exit(1)
	}
}

// run reads flags and configuration and runs the controller until ctx ends.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := pflag.NewFlagSet("kiln-controller", pflag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", "", "configuration file (ControllerConfiguration); none: the defaults")
	kubeconfig := flags.String("kubeconfig", "", "how to reach the API server; none: as a Pod does")
	level := flags.String("log-level", "", "debug, info, warn or error; overrides the file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg, err := load(*file)
	if err != nil {
		return err
	}
	if *level != "" {
		cfg.Logging.Level = *level
	}
	if err := cfg.Complete(); err != nil {
		return err
	}
	log, err := logger(cfg, stderr)
	if err != nil {
		return err
	}
	restConfig, err := connect(*kubeconfig)
	if err != nil {
		return err
	}
	c, err := controller.New(ctx, cfg, restConfig, log, metrics.Registry)
	if err != nil {
		return err
	}
	return c.Run(ctx)
}

func load(file string) (*config.Controller, error) {
	if file == "" {
		return config.Default(), nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return config.Decode(data)
}

func logger(cfg *config.Controller, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Logging.Level)); err != nil {
		return nil, fmt.Errorf("logging.level: %w", err)
	}
	opts := &slog.HandlerOptions{Level: level}
	if cfg.Logging.Format == "text" {
		return slog.New(slog.NewTextHandler(w, opts)), nil
	}
	return slog.New(slog.NewJSONHandler(w, opts)), nil
}

// connect returns how to reach the API server.
func connect(kubeconfig string) (*rest.Config, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to API server: %w", err)
	}
	cfg.UserAgent = "kiln-controller"
	// The API server's own fairness decides; a client-side limit only adds waiting.
	cfg.QPS = -1
	return cfg, nil
}
