package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/managerd/managerd/cmd/mctl/internal/client"
	"github.com/managerd/managerd/manager/registry"
)

// registryFlags say how a registry is talked to.
type registryFlags struct {
	user, refresh, hostsDir string
	ca, cert, key           string // files
	plainHTTP, skipVerify   bool
	dump, trace             bool
	headers                 []string
}

func (f *registryFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.user, "user", "u", "", "`NAME[:SECRET]` for the registry; a secret that is not given is asked for")
	cmd.Flags().StringVar(&f.refresh, "refresh", "", "refresh `token` for the registry's token server")
	cmd.Flags().BoolVar(&f.plainHTTP, "plain-http", false, "talk to the registry over HTTP")
	cmd.Flags().BoolVarP(&f.skipVerify, "skip-verify", "k", false, "do not verify the registry's certificate")
	cmd.Flags().StringVar(&f.hostsDir, "hosts-dir", "", "`directory` with a hosts.toml for each registry, as the daemon's config_path")
	cmd.Flags().StringVar(&f.ca, "tlscacert", "", "`file` with the authority that the registry's certificate is of")
	cmd.Flags().StringVar(&f.cert, "tlscert", "", "`file` with the certificate that the registry is shown")
	cmd.Flags().StringVar(&f.key, "tlskey", "", "`file` with the key of --tlscert")
	cmd.Flags().BoolVar(&f.dump, "http-dump", false, "show requests to registries and their answers, without bodies and secrets")
	cmd.Flags().BoolVar(&f.trace, "http-trace", false, "show what connections to registries do")
	cmd.Flags().StringArrayVarP(&f.headers, "http-header", "H", nil, "`NAME: VALUE` of a header for the registry")
}

// flagsOfRegistry are those that add adds, for commands that have no use for them, see accepted.
var flagsOfRegistry = []string{
	"user=|u", "refresh=", "plain-http", "skip-verify|k", "hosts-dir=", "tlscacert=", "tlscert=", "tlskey=", "http-dump", "http-trace",
}

// hosts is the directory of host directories that the flags ask for, "" when they ask for none. The returned function is
// to be called when it is of no more use, also when there is an error.
func (f *registryFlags) hosts(cmd *cobra.Command) (dir string, done func(), err error) {
	done = func() {}
	if (f.cert == "") != (f.key == "") {
		return "", done, misused(cmd, "--tlscert and --tlskey are given together or not at all")
	}
	said := map[string]any{}
	if f.skipVerify {
		said["skip_verify"] = true
	}
	if f.ca != "" {
		if said["ca"], err = existing(f.ca); err != nil {
			return "", done, err
		}
	}
	if f.cert != "" {
		cert, cerr := existing(f.cert)
		key, kerr := existing(f.key)
		if err := errors.Join(cerr, kerr); err != nil {
			return "", done, err
		}
		said["client"] = [][]string{{cert, key}}
	}
	switch {
	case f.hostsDir != "" && len(said) > 0:
		return "", done, misused(cmd, "--skip-verify and --tls... cannot be used with --hosts-dir: say skip_verify, ca and client in its hosts.toml")
	case f.hostsDir != "":
		dir, err = filepath.Abs(f.hostsDir)
		return dir, done, err
	case len(said) == 0:
		return "", done, nil
	}
	text, err := toml.Marshal(said)
	if err != nil {
		return "", done, err
	}
	if dir, err = os.MkdirTemp("", "mctl-hosts-"); err != nil {
		return "", done, err
	}
	done = func() { _ = os.RemoveAll(dir) }
	if err := os.Mkdir(filepath.Join(dir, "_default"), 0o700); err != nil {
		return "", done, err
	}
	return dir, done, os.WriteFile(filepath.Join(dir, "_default", "hosts.toml"), text, 0o600)
}

// existing is the path of a file that is there, for a daemon that works elsewhere.
func existing(name string) (string, error) {
	if _, err := os.Stat(name); err != nil {
		return "", err
	}
	return filepath.Abs(name)
}

// header is what --http-header says.
func (f *registryFlags) header(cmd *cobra.Command) (http.Header, error) {
	out := http.Header{}
	for _, h := range f.headers {
		k, v, ok := strings.Cut(h, ":")
		if !ok {
			return nil, misused(cmd, "header %q is not NAME: VALUE", h)
		}
		out.Add(strings.TrimSpace(k), strings.TrimSpace(v))
	}
	return out, nil
}

// resolver is what the daemon is told of the flags. The returned function is to be called when the daemon is done.
func (f *registryFlags) resolver(cmd *cobra.Command) (_ *wire.RegistryResolver, done func(), err error) {
	r := &wire.RegistryResolver{Headers: map[string]string{}}
	if f.plainHTTP {
		r.DefaultScheme = "http"
	}
	header, err := f.header(cmd)
	if err != nil {
		return nil, func() {}, err
	}
	for name, values := range header {
		r.Headers[name] = values[len(values)-1]
	}
	switch {
	case f.dump && f.trace:
		r.HttpDebug = wire.HTTPDebug_BOTH
	case f.dump:
		r.HttpDebug = wire.HTTPDebug_DEBUG
	case f.trace:
		r.HttpDebug = wire.HTTPDebug_TRACE
	}
	r.HostDir, done, err = f.hosts(cmd)
	return r, done, err
}

// withRepository calls f with the repository of ref, which mctl talks to itself.
func (f *registryFlags) withRepository(cmd *cobra.Command, c *cli, ref reference.Named, call func(*registry.Repository) error) error {
	o := registry.Options{PlainHTTP: f.plainHTTP}
	credential, err := f.credential(cmd, c, ref)
	if err != nil {
		return err
	}
	o.Credentials = credential
	if o.Headers, err = f.header(cmd); err != nil {
		return err
	}
	dir, done, err := f.hosts(cmd)
	defer done()
	if err != nil {
		return err
	}
	o.HostDir = dir
	if f.dump || f.trace {
		o.Debug = &registry.Debug{Messages: f.dump, Connections: f.trace, Say: func(text string) { _, _ = io.WriteString(c.err, text) }}
	}
	r := registry.New(registry.Config{UserAgent: "mctl"})
	defer r.Close()
	p, err := r.Repository(ref.String(), o)
	if err != nil {
		return err
	}
	return call(p)
}

// credential gives what hosts are shown: the registry of ref what the flags say, and any other, or without such flags, what
// the user's Docker configuration has for it.
func (f *registryFlags) credential(cmd *cobra.Command, c *cli, ref reference.Named) (func(context.Context, string) (registry.Credential, error), error) {
	var given registry.Credential
	if f.user != "" && f.refresh != "" {
		return nil, misused(cmd, "--user and --refresh cannot both be given")
	}
	if given.RefreshToken = f.refresh; f.user != "" {
		name, secret, ok := strings.Cut(f.user, ":")
		if !ok {
			var err error
			if secret, err = c.secret(); err != nil {
				return nil, err
			}
			f.user += ":" + secret // of several images, the first asks
		}
		if given.Username, given.Password = name, secret; name == "" {
			given = registry.Credential{RefreshToken: secret}
		}
	}
	domain := reference.Domain(ref)
	return func(ctx context.Context, host string) (registry.Credential, error) {
		if given != (registry.Credential{}) && (host == domain || domain == "docker.io" && host == "registry-1.docker.io") {
			return given, nil
		}
		return registry.DockerCredential(ctx, dockerConfig(), host)
	}, nil
}

// secret asks the user for one.
func (c *cli) secret() (string, error) {
	in, isFile := c.in.(*os.File)
	if !isFile || !term.IsTerminal(int(in.Fd())) {
		return "", errors.New("--user has no secret, and there is no terminal to ask for it: give NAME:SECRET")
	}
	_, _ = fmt.Fprint(c.err, "Secret: ")
	typed, err := term.ReadPassword(int(in.Fd()))
	_, _ = fmt.Fprintln(c.err)
	return string(typed), err
}

// dockerConfig is where the user's configuration file of Docker would be.
func dockerConfig() string {
	dir := os.Getenv("DOCKER_CONFIG")
	if home, err := os.UserHomeDir(); dir == "" && err == nil {
		dir = filepath.Join(home, ".docker")
	}
	return filepath.Join(dir, "config.json")
}

// asked answers a daemon that asks on behalf of registries. What it has no answer for is told to the user.
func (f *registryFlags) asked(cmd *cobra.Command, c *cli, ref reference.Named) (client.Asked, error) {
	credential, err := f.credential(cmd, c, ref)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, host string) (*wire.AuthResponse, error) {
		a, err := credential(ctx, host)
		switch {
		case err != nil:
			c.notice(err.Error())
			return nil, err
		case a.AccessToken != "":
			return &wire.AuthResponse{AuthType: wire.AuthType_HEADER, Secret: "Bearer " + a.AccessToken}, nil
		case a.RefreshToken != "":
			return &wire.AuthResponse{AuthType: wire.AuthType_REFRESH, Secret: a.RefreshToken}, nil
		case a.Username != "":
			return &wire.AuthResponse{AuthType: wire.AuthType_CREDENTIALS, Username: a.Username, Secret: a.Password}, nil
		}
		return &wire.AuthResponse{AuthType: wire.AuthType_NONE}, nil
	}, nil
}
