package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
)

// Auto is the Size that stands for what the node offers.
const Auto Size = "auto"

// Size is an amount as it is written: a Kubernetes quantity, a percentage or
// "auto", of which a field may accept all or some. It stays text so that Complete
// can name the field of one that is wrong; after Complete its methods do not fail.
type Size string

// UnmarshalJSON accepts a plain number as well.
func (s *Size) UnmarshalJSON(data []byte) error { return text((*string)(s), data) }

// percent returns the percentage that s is.
func (s Size) percent() (float64, bool) {
	digits, ok := strings.CutSuffix(string(s), "%")
	if !ok {
		return 0, false
	}
	p, err := strconv.ParseFloat(digits, 64)
	return p, err == nil && p >= 0 && p <= 100
}

// quantityText is a quantity without an exponent: parsing one with a large exponent
// takes minutes.
var quantityText = regexp.MustCompile(`^[+-]?[0-9]{1,20}(\.[0-9]{1,9})?(m|k|[KMGTPE]i?)?$`)

func (s Size) quantity() (resource.Quantity, error) {
	if !quantityText.MatchString(string(s)) {
		return resource.Quantity{}, errors.New(`want a quantity, such as "512Mi" or "20Gi"`)
	}
	q, err := resource.ParseQuantity(string(s))
	if err != nil {
		return q, errors.New(`want a quantity, such as "512Mi" or "20Gi"`)
	}
	if q.Sign() < 0 {
		return q, errors.New("must not be negative")
	}
	// Value and MilliValue saturate or wrap beyond this.
	if q.CmpInt64(math.MaxInt64/1000) > 0 {
		return q, errors.New("is too large")
	}
	return q, nil
}

// Bytes returns s in bytes, percentages as a part of total. Auto, and what is
// empty, is 0.
func (s Size) Bytes(total int64) int64 {
	if s == Auto || s == "" {
		return 0
	}
	if p, ok := s.percent(); ok {
		return int64(float64(total) * p / 100)
	}
	q, err := s.quantity()
	if err != nil {
		return 0
	}
	return q.Value()
}

// Millis returns s in thousandths, for processors. Auto, and what is empty, is 0.
func (s Size) Millis() int64 {
	if s == Auto || s == "" {
		return 0
	}
	q, err := s.quantity()
	if err != nil {
		return 0
	}
	return q.MilliValue()
}

// Duration is a length of time as it is written. It stays text for the reason
// that Size does.
type Duration string

// UnmarshalJSON accepts a plain number, which Complete then refuses by name.
func (d *Duration) UnmarshalJSON(data []byte) error { return text((*string)(d), data) }

func (d Duration) parse() (time.Duration, error) {
	v, err := time.ParseDuration(string(d))
	if err != nil {
		return 0, errors.New(`want a duration, such as "90s" or "1h30m"`)
	}
	return v, nil
}

// Value returns d, and 0 when it is empty.
func (d Duration) Value() time.Duration {
	v, err := d.parse()
	if err != nil {
		return 0
	}
	return v
}

// text sets to from a JSON value. What is neither text nor a number is kept as it
// is written, so that Complete refuses it by name.
func text(to *string, data []byte) error {
	data = bytes.TrimSpace(data)
	switch {
	case bytes.Equal(data, []byte("null")):
		return nil
	case len(data) > 0 && data[0] == '"':
		return json.Unmarshal(data, to)
	}
	*to = string(data)
	return nil
}
