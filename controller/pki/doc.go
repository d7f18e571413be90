// Package pki makes and rotates kiln's certificates: a CA in a Secret, the agents'
// serving certificate in another, and in memory the controller's client and serving
// certificates.
//
// It promises that a certificate is replaced after two thirds of its life; that a new CA
// is trusted everywhere for a day before it signs anything, and an old one as long as what
// it signed can be valid; and that replicas which do the same at the same moment end up
// with the same Secrets. Private keys are in these Secrets and in memory only.
package pki
