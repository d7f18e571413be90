// Package agentv1 is the build API of a kiln agent, kiln.agent.v1.BuildService.
//
// The .proto files are its reference. Everything but this file is generated from
// them; `make generate` does it.
package agentv1

//go:generate sh -c "cd ../../.. && buf generate"
