package engine

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// proof says what becomes of fields of config.json, and which test shows it: with cgroup v1 on a machine without AppArmor, SELinux
// and resctrl, with v2 in the VM of test/vm. The fields are one path, in which {a,b} stands for a path with each; words after it
// say which case of the field is meant.
type proof struct {
	field, v1, v2, test string
}

const (
	honouredWord = "honoured"
	refusedWord  = "refused"
	notShown     = "not shown: " // and why not
)

// proofs are all there are.
func proofs() []proof {
	const (
		hooks = "hooks.{prestart,createRuntime,createContainer,startContainer,poststart,poststop}"
		ids   = "{uidMappings,gidMappings}.{containerID,hostID,size}"
	)
	var all []proof
	for _, row := range fieldRows {
		all = append(all, proof{row.field, honouredWord, honouredWord, "TestFields"})
	}
	for _, row := range refusedRows {
		p := proof{row.field, refusedWord, refusedWord, "TestFieldsRefused"}
		if u, ok := unless[row.field]; ok {
			p.v1 += " where the kernel lacks " + u.kernel
			p.v2 = p.v1
			if u.vm {
				p.v2 = notShown + "the kernel has " + u.kernel
			}
		}
		all = append(all, p)
	}
	for _, row := range limitRows {
		word := func(want string) string {
			if strings.HasPrefix(want, "!") {
				return refusedWord
			}
			return honouredWord
		}
		p := proof{row.field, word(row.v1), word(row.v2), "TestLimits"}
		if row.systemd != "" {
			p.v2 += "; by systemd " + word(row.systemd)
		}
		all = append(all, p)
	}
	for field, test := range map[string]string{
		"process.terminal": "TestTerminal", "process.consoleSize.{height,width}": "TestTerminal",
		"process.execCPUAffinity.{initial,final}": "TestExecAffinity", "process of an exec": "TestExecFields",
		"process.scheduler.priority": "TestRealtime", "process.capabilities unknown: left out and logged": "TestUnknownCapability",
		"mounts." + ids: "TestIDMappedMounts", "mounts.options, each": "TestMountOptions", "mounts.options idmap, ridmap": "TestIDMappedMounts",
		"mounts.options tmpcopyup": "TestCopyUp", hooks + ".path": "TestHooks", hooks + ".{args,env}": "TestHookFields",
		hooks + ".timeout": "TestHookTimeLimits", "annotations": "TestHookFields", "linux.namespaces.{type,path}": "TestNamespaces",
		"linux.namespaces user, joined, with mappings": "TestUserNamespaceMappings", "linux.rootfsPropagation": "TestRootfsPropagation",
		"linux.netDevices.name": "TestNetDevices", "linux.seccomp.{listenerPath,listenerMetadata}": "TestSeccompListener",
		"linux.seccomp.architectures": "TestSeccompArchitectures", "linux.seccomp.flags, each": "TestSeccompFlags",
		"linux.resources.devices.{allow,type,major,minor,access}": "TestDeviceRules", "linux.cgroupsPath": "TestCgroupsPath",
		"linux.resources.memory.checkBeforeUpdate": "TestCheckBeforeUpdate", "linux.resources.cpu.idle through updates": "TestUpdateIdle",
		"hooks.poststop after one that failed": "TestPoststopHooks", "linux.resources.devices on systemd's scope": "TestScopeDevices",
	} {
		all = append(all, proof{field, honouredWord, honouredWord, test})
	}
	all = append(all,
		proof{"linux.resources.devices changed by an update", refusedWord, refusedWord, "TestUpdateRefused"},
		proof{"linux.resources.blockIO.weightDevice.{major,minor,weight} of a disk with BFQ", notShown + "no disk has BFQ", honouredWord, "TestWeightDevice"},
		proof{"process.execCPUAffinity.initial alone, after the cgroup was changed", "as the kernel does: kept", "as the kernel does: not kept before Linux 6.2", "TestExecAffinity"},
		proof{"process.apparmorProfile where the kernel has AppArmor", notShown + "the kernel lacks AppArmor", honouredWord, "TestAppArmor"},
	)
	slices.SortFunc(all, func(a, b proof) int {
		return strings.Compare(a.field+"\x00"+a.v1+a.test, b.field+"\x00"+b.v1+b.test)
	})
	return all
}

// expand gives the paths that a field of a proof stands for.
func expand(field string) []string {
	path, _, _ := strings.Cut(field, " ")
	path = strings.TrimSuffix(path, ",")
	before, rest, ok := strings.Cut(path, "{")
	if !ok {
		return []string{path}
	}
	choice, after, _ := strings.Cut(rest, "}")
	var paths []string
	for _, c := range strings.Split(choice, ",") {
		paths = append(paths, expand(before+c+after)...)
	}
	return paths
}

// leaves are the paths of all fields of a type that have no fields of their own. What is for other platforms is one.
func leaves(t reflect.Type, path string) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return leaves(t.Elem(), path)
	case reflect.Struct:
	default:
		return []string{path}
	}
	var all []string
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		next := strings.TrimPrefix(path+"."+name, ".")
		switch platform := f.Tag.Get("platform"); {
		case f.Anonymous:
			all = append(all, leaves(f.Type, path)...)
		case platform != "" && !strings.Contains(platform, "linux"):
			all = append(all, next)
		default:
			all = append(all, leaves(f.Type, next)...)
		}
	}
	return all
}

// TestTable: every field of the runtime specification has a row, and every row is of a field.
func TestTable(t *testing.T) {
	shown := map[string]bool{}
	for _, p := range proofs() {
		for _, path := range expand(p.field) {
			shown[path] = true
		}
	}
	known := map[string]bool{}
	for _, leaf := range leaves(reflect.TypeFor[specs.Spec](), "") {
		known[leaf] = true
		for at := leaf; strings.Contains(at, "."); {
			at = at[:strings.LastIndexByte(at, '.')]
			known[at] = true
		}
		if !shown[leaf] {
			t.Errorf("%s has no row", leaf)
		}
	}
	for path := range shown {
		if !known[path] {
			t.Errorf("a row is of %s, which the specification does not have", path)
		}
	}
}
