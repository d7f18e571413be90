// Package strategy turns a BuildSpec into what BuildKit's client runs.
//
// Validate says everything that is wrong with a spec, by field, and needs nothing
// but the spec. New makes a Plan of a valid one. Neither opens a connection or
// writes a file; what a plan needs from the network is fetched by the engine when
// the plan runs.
//
// The package promises that:
//
//   - no spec makes it panic, and a spec that Validate accepts makes a plan;
//   - credentials stay in memory, are served to the session of the plan only, and
//     end with it. A git credential has a name that no Dockerfile can guess, so a
//     step cannot mount what fetched its source;
//   - a path of a spec never leads out of the source, image or workspace that it
//     is in, whatever symbolic links are there;
//   - what a spec does not name is not fetched, run, read or exported.
//
// # Sources
//
// A source is one state of LLB: the main part, the paths of images copied over it
// in order, and then the context directory taken out. It is the input of the
// Dockerfile front end, or the first content of /workspace.
//
// Git URLs are https://, ssh:// or user@host:path; http:// is accepted for
// loopback addresses, as it is of registries. What a loopback address may reach is
// the engine's decision, as for every URL. An SSH URL needs a credential with
// known hosts: nothing is learnt from the network. Submodules are fetched, and .git
// is not kept unless the build argument BUILDKIT_CONTEXT_KEEP_GIT_DIR is 1.
// A .dockerignore file of a source has no effect, as with any remote context of
// BuildKit; whoever uploads an archive applies it first. The engine runs the
// programs git, ssh and xz for the sources that need them.
//
// The query of an HTTP URL is shown to nobody who follows the build; BuildKit's
// provenance has it all the same, so that a URL is no place for a secret.
//
// # Steps
//
// /workspace is a directory of its own that every step gets as the one before left
// it. It belongs to root at first: a step of another user only reads it, until a
// step as root has given it away with chown.
//
// A step's secrets are files that only its user reads, or variables. A cache is the
// one that `RUN --mount=type=cache,id=…` of the same tenant has. It is shared by
// builds that run at the same time, and no_cache empties it, as BuildKit does. A
// step that does not run as root has another one, that everyone may write to.
//
// A step's timeout counts from the end of the step before it and includes fetching
// its image. With a source_date_epoch the environment has SOURCE_DATE_EPOCH, unless
// the spec gives it another value.
//
// # Outputs
//
// Names that differ in nothing but themselves are pushed by one export. When
// outputs differ in compression or annotations, so do their digests; the response
// has that of the first. With a source_date_epoch files of layers that the build
// makes are not younger than it.
package strategy
