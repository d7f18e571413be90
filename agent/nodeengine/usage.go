package nodeengine

import (
	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/stepusage"
)

// Reporter returns what an engine.Node is to call for each step (OnStep), so that steps
// learns of it.
func Reporter(steps *agent.Steps) func(engine.StepReport) {
	return func(r engine.StepReport) {
		if r.Result == nil {
			return
		}
		steps.Report(agent.Domain{Tenant: r.Domain.Tenant, Sandbox: r.Domain.Sandbox}, r.Vertex.String(), stepusage.Of(r.Result))
	}
}
