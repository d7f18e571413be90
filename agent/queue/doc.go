// Package queue decides which build may run next on a node.
//
// It promises that no more runs than the limits allow, that tenants get equal
// shares of what runs whatever they ask for, that the builds of one tenant start in
// the order in which they came, that a large build is not overtaken for ever by
// small ones, and that a queue that is full says so at once.
//
// It runs nothing and stores nothing. A build enters, waits for its ticket to be
// admitted, and releases the ticket when it is over.
package queue
