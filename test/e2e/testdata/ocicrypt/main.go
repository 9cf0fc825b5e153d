// Command encrypt encrypts a layer as ocicrypt does, for the owner of an RSA key: the layer from standard input to standard
// output, and the annotations that its descriptor needs as JSON to a file.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"

	_ "github.com/containerd/imgcrypt" // of which the tests build cmd/ctd-decoder
	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: encrypt PUBLIC-KEY.pem ANNOTATIONS.json")
		os.Exit(2)
	}
	if err := encrypt(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "encrypt:", err)
		os.Exit(1)
	}
}

func encrypt(keyFile, annotationsFile string) error {
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	plain, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	cc, err := config.EncryptWithJwe([][]byte{key})
	if err != nil {
		return err
	}
	r, finish, err := ocicrypt.EncryptLayer(cc.EncryptConfig, bytes.NewReader(plain), ocispec.Descriptor{Digest: digest.FromBytes(plain)})
	if err != nil {
		return err
	}
	if _, err := io.Copy(os.Stdout, r); err != nil {
		return err
	}
	annotations, err := finish()
	if err != nil {
		return err
	}
	data, err := json.Marshal(annotations)
	if err != nil {
		return err
	}
	return os.WriteFile(annotationsFile, data, 0o600)
}
