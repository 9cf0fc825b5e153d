// Package failpoint names the moments at which a program may be killed: one behind every step that outlives it. Built with
// the tag "failpoints", Hit kills its own process where a test has asked for it; in every other build it is nothing, and the
// names are not in the program.
//
// A test asks by a file of that name in the directory that the environment variable MANAGERD_FAILPOINTS names. Whoever hits
// the point first takes the file away and is killed (SIGKILL): the next one goes on.
package failpoint
