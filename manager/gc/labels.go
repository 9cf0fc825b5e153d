package gc

import (
	"strings"

	"github.com/managerd/managerd/manager/metadata"
)

// The labels of containerd's collector (its documentation of garbage collection), on content, snapshots, images,
// containers, sandboxes and activations of mounts. NAME is the snapshotter's; x is anything, so that one object can refer to many.
const (
	labelRoot = "containerd.io/gc.root"  // any value: it stays
	labelRef  = "containerd.io/gc.ref."  // content[.x], image[.x], mount[.x], snapshot.NAME[/x]: the digest, image, activation, snapshot that it needs
	labelBack = "containerd.io/gc.bref." // content[.x], image[.x], container[.x], sandbox[.x], snapshot.NAME[/x]: who needs it
)

// node is an object of one namespace.
type node struct{ kind, key string } // kind as in metadata.Change

// forward gives what labels say that an object needs.
func forward(labels map[string]string) (out []node) {
	for k, v := range labels {
		if n, ok := target(k, labelRef, v); ok {
			out = append(out, n)
		}
	}
	return out
}

// backward gives those that labels say need the object.
func backward(labels map[string]string) (out []node) {
	for k, v := range labels {
		if n, ok := target(k, labelBack, v); ok {
			out = append(out, n)
		}
	}
	return out
}

// target reads a label PREFIX KIND[suffix] = key.
func target(label, prefix, key string) (node, bool) {
	rest, ok := strings.CutPrefix(label, prefix)
	if !ok || key == "" {
		return node{}, false
	}
	if name, ok := strings.CutPrefix(rest, "snapshot."); ok {
		name, _, _ = strings.Cut(name, "/")
		return node{metadata.SnapshotKind(name), key}, name != ""
	}
	for word, kind := range map[string]string{"content": metadata.Content, "image": metadata.Images, "container": metadata.Containers, "sandbox": metadata.Sandboxes, "mount": metadata.Mounts} {
		if after, ok := strings.CutPrefix(rest, word); ok && (after == "" || after[0] == '.' || after[0] == '/') {
			return node{kind, key}, true
		}
	}
	return node{}, false
}
