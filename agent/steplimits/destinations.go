package steplimits

import (
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// DestinationsKey names the front end's option, and the entry of a description, by which a
// build says what alone its steps may connect to.
const DestinationsKey = "kiln.destinations"

// EncodeDestinations returns a list with commas between its entries.
func EncodeDestinations(list []string) string { return strings.Join(list, ",") }

// DecodeDestinations reads what EncodeDestinations writes, such as
// "packages.example.com:80,*.example.org,198.51.100.0/24:443".
func DecodeDestinations(s string) ([]egress.Exception, error) {
	if s == "" {
		return nil, nil
	}
	entries := strings.Split(s, ",")
	if len(entries) > policy.MaxDestinations {
		return nil, fmt.Errorf("%s has %d destinations: at most %d", DestinationsKey, len(entries), policy.MaxDestinations)
	}
	out, err := egress.ParseExceptions(entries)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", DestinationsKey, err)
	}
	return out, nil
}
