package main

import (
	"context"
	"os"

	"github.com/sirupsen/logrus"

	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/stepusage"
	"github.com/kiln-build/kiln/cmd/kiln/cli"
)

// debugEnv makes the engine's own log appear on stderr.
const debugEnv = "KILN_DEBUG"

// startEngine assembles the engine in this process.
func startEngine(ctx context.Context, cfg cli.EngineConfig) (cli.Engine, error) {
	// What users have to know is in the progress and in errors; the log of the
	// libraries would only tear the display.
	logrus.SetLevel(logrus.FatalLevel)
	if os.Getenv(debugEnv) != "" {
		logrus.SetLevel(logrus.DebugLevel)
	}
	e, err := engine.New(ctx, engine.Config{
		NodeConfig: engine.NodeConfig{
			Root: cfg.Root, RunscPath: cfg.RunscPath, Frontends: cfg.Frontends, OnLoss: cfg.OnLoss,
			OnStep: func(r engine.StepReport) {
				if r.Result != nil {
					cfg.OnStep(r.Vertex.String(), stepusage.Of(r.Result))
				}
			},
		},
		Sandbox: cfg.Sandbox,
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}
