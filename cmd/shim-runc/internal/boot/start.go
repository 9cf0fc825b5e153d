package boot

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/shimapi"
)

// socketState is below which shims started by a foreign daemon put their sockets; ours hands them one.
const socketState = "/run/shim-runc"

// maxVersionEnv is set by daemons that understand BootstrapParams; older ones want the bare address.
const maxVersionEnv = "MAX_SHIM_VERSION"

// isSandbox says whether a bundle is a sandbox's: containerd's contract has no other sign than that its spec, if there is one,
// has no process.
func isSandbox(bundle string) bool {
	data, err := os.ReadFile(filepath.Join(bundle, shimapi.ConfigFile))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	var spec struct{ Process *json.RawMessage }
	return json.Unmarshal(data, &spec) == nil && spec.Process == nil
}

// maxParams is the most that a daemon may have to say on stdin.
const maxParams = 4 << 20

// readParams reads what a daemon says on stdin. From version 2.3 on, containerd sends BootstrapParams and wants a serialised
// BootstrapResult; before, the task's options, which come again with Create, or nothing: then the params are nil. Both parse as
// either; whose params they are tells them apart. A daemon that is not listened to would write to a closed pipe.
func readParams(a *args, stdin io.Reader) (*bootstrap.BootstrapParams, error) {
	in, err := io.ReadAll(io.LimitReader(stdin, maxParams+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read stdin: %w", err)
	}
	if len(in) > maxParams {
		return nil, fmt.Errorf("stdin has more than %d bytes", maxParams)
	}
	p := &bootstrap.BootstrapParams{}
	if len(in) == 0 || proto.Unmarshal(in, p) != nil || p.GetInstanceID() != a.id || p.GetNamespace() != a.namespace {
		return nil, nil
	}
	return p, nil
}

// start is containerd's verb: it binds the socket, leaves a serving process behind, and prints where that listens.
func start(a *args, stdin io.Reader, stdout io.Writer) (err error) {
	asked, err := readParams(a, stdin)
	if err != nil {
		return err
	}
	dir := filepath.Join(socketState, "s")
	if given := asked.GetSocketDir(); given != "" {
		if !filepath.IsAbs(given) {
			return fmt.Errorf("socket_dir %q is not an absolute path", given)
		}
		dir = given
	}
	sum := sha256.Sum256([]byte(filepath.Join(a.address, a.namespace, a.id)))
	path := filepath.Join(dir, hex.EncodeToString(sum[:16]))
	l, err := shimapi.Listen(path)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	defer func() {
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	socket, err := l.File()
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := []string{"-namespace", a.namespace, "-id", a.id, "-address", a.address, "-bundle", a.bundle, "-forward"}
	if a.debug || asked.GetLogLevel() <= bootstrap.LogLevel_LOG_LEVEL_DEBUG {
		argv = append(argv, "-debug")
	}
	if isSandbox(a.bundle) {
		argv = append(argv, "-sandbox")
	}
	cmd := exec.Command(self, append(argv, shimapi.VerbServe)...)
	cmd.Dir = a.bundle
	if address := asked.GetContainerdTtrpcAddress(); address != "" {
		cmd.Env = append(os.Environ(), shimapi.EnvTTRPCAddress+"="+strings.TrimPrefix(address, "unix://"))
	}
	cmd.ExtraFiles = []*os.File{socket} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot spawn %s: %w", self, err)
	}
	defer func() {
		if err != nil {
			_ = cmd.Process.Kill()
		}
		_ = cmd.Process.Release()
	}()

	params := shimapi.BootstrapParams{Version: 3, Address: "unix://" + path, Protocol: "ttrpc"}
	record, err := json.Marshal(params)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		shimapi.BootstrapFile: record, shimapi.AddressFile: []byte(params.Address), "shim.pid": []byte(strconv.Itoa(cmd.Process.Pid)),
	} {
		if err := os.WriteFile(filepath.Join(a.bundle, name), data, 0o644); err != nil {
			return err
		}
	}
	if asked != nil {
		if record, err = proto.Marshal(&bootstrap.BootstrapResult{
			Version: int32(params.Version), Address: params.Address, Protocol: params.Protocol,
		}); err == nil {
			_, err = stdout.Write(record)
		}
		return err
	}
	if v, verr := strconv.Atoi(os.Getenv(maxVersionEnv)); verr == nil && v >= 3 {
		_, err = stdout.Write(record)
	} else {
		_, err = io.WriteString(stdout, params.Address)
	}
	return err
}
