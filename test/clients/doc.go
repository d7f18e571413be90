// Package clients tests an agent with the stock clients of BuildKit, buildctl and
// docker buildx, over its socket. What a stock buildkitd does for them the agent
// does, except what the sandbox forbids on purpose.
package clients
