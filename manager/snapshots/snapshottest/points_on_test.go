//go:build failpoints

package snapshottest_test

// crashable says whether this binary dies at failpoints.
const crashable = true
