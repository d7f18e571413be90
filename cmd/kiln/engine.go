package main

import (
	"context"
	"errors"

	"github.com/kiln-build/kiln/cmd/kiln/cli"
)

// startEngine assembles the engine in this process.
func startEngine(context.Context, cli.EngineConfig) (cli.Engine, error) {
	return nil, errors.New("this build of kiln has no engine: use --agent ADDR")
}
