//go:build race

package shimbin

// Race says that the test was built with the race detector.
const Race = true
