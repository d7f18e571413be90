package strategy

import "time"

// Limits of a spec. They bound what planning costs and what a record holds; the
// network and disk that a build uses are bounded by the agent.
const (
	maxValue       = 128 << 10 // bytes of an argument, label or value of a variable
	maxName        = 512       // bytes of the name of a label or annotation
	maxInline      = 1 << 20   // bytes of inline files with their paths, and of an inline Dockerfile
	maxInlineFiles = 4096
	maxImages      = 32 // images that content is taken from
	maxImagePaths  = 64 // paths of one such image
	maxContexts    = 64
	maxBuildArgs   = 1000
	maxEnv         = 1000
	maxImageLabels = 1000
	maxExtraHosts  = 256
	maxSteps       = 256
	maxArgs        = 1024
	maxStepSecrets = 64
	maxStepCaches  = 64
	maxCopies      = 256
	maxSecrets     = 256
	maxOutputs     = 16
	maxAnnotations = 256
	maxCaches      = 64 // caches to read from, and to write to
	maxPlatforms   = 16
	maxLabels      = 64  // labels of the build
	maxLabelValue  = 256 // bytes of a label of the build, and of its cache scope
	maxSecretValue = 500 << 10
	maxTimeout     = 7 * 24 * time.Hour
	minMemory      = 4 << 20 // bytes of a step's memory
)
