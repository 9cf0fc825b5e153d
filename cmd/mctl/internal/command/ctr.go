package command

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// forCtr is the annotation on a flag or a command that only scripts made for ctr need: what it does here. docs/mctl.md lists
// them (TestGrammarOfCtr).
const forCtr = "ctr"

// accepted adds flags of ctr's that change nothing here, and says why. "NAME" has no value, "NAME=" has one; "|X" behind it is
// a letter for it.
func accepted(cmd *cobra.Command, why string, flags ...string) {
	for _, f := range flags {
		addForCtr(cmd.Flags(), f, "changes nothing: "+why, &ctrFlag{})
	}
}

// refused adds flags of ctr's that are an error here, which says why and what to do instead.
func refused(cmd *cobra.Command, why string, flags ...string) {
	for _, f := range flags {
		name, _, _ := strings.Cut(f, "|")
		name = strings.TrimSuffix(name, "=")
		addForCtr(cmd.Flags(), f, "an error: "+why, &ctrFlag{refusal: &refusal{"--" + name + ": " + why}})
	}
}

// refusedCommand is one of ctr's that is an error here.
func refusedCommand(use, why string) *cobra.Command {
	return &cobra.Command{
		Use: use, Hidden: true, DisableFlagParsing: true, Annotations: map[string]string{forCtr: "an error: " + why},
		RunE: func(cmd *cobra.Command, _ []string) error { return misused(cmd, "%w", errors.New(why)) },
	}
}

func addForCtr(flags *pflag.FlagSet, spec, does string, value *ctrFlag) {
	name, letter, _ := strings.Cut(spec, "|")
	name, value.valued = strings.CutSuffix(name, "=")
	f := flags.VarPF(value, name, letter, does)
	f.Hidden, f.Annotations = true, map[string][]string{forCtr: {does}}
	if !value.valued {
		f.NoOptDefVal = "true"
	}
}

// ctrFlag is the value of a flag that only ctr has a use for.
type ctrFlag struct {
	valued  bool
	refusal *refusal // nil: it is accepted
}

// refusal says why a flag is an error.
type refusal struct{ text string }

func (r *refusal) Error() string { return r.text }

// Set is of pflag.Value.
func (f *ctrFlag) Set(value string) error {
	if f.refusal == nil || !f.valued && value == "false" {
		return nil
	}
	return f.refusal
}

func (f *ctrFlag) String() string { return "" }

// Type is of pflag.Value.
func (f *ctrFlag) Type() string {
	if f.valued {
		return "string"
	}
	return "bool"
}
