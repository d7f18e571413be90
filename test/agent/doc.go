// Package agent has the kiln-agent that the Makefile built do many builds at once.
package agent
