// Package metadata has the records that the daemon keeps in its database (metadata.proto). Package manager/metadata draws
// the buckets that hold them.
package metadata
