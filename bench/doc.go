// Command bench measures kiln beside stock BuildKit on one machine.
//
// All peers do the same work with the same inputs in alternating runs, after a
// warm-up that counts for nobody. It prints medians and ratios, and writes the
// single figures and a chart to the output directory. It needs root, the programs
// that `make bench` builds, and Debian's busybox-static, mmdebstrap and
// docker-registry; it talks to loopback only. Everything it makes is below a
// temporary directory, but for the inputs, which are kept for the next time.
package main
