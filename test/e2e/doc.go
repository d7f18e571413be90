// Package e2e tests kiln as a whole on a real Kubernetes: kiln's images are built
// by kiln, deployed as deploy/ has them, and used through the API server, kubectl
// and the kiln command.
package e2e
