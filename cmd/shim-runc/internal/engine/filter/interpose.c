//go:build cgo && seccomp

// The functions of libseccomp by which libcontainer makes a filter, seccomp_init(3) to seccomp_export_bpf(3), are
// interposed at link time (ld --wrap). All calls that determine the program are written down; a program that was exported
// after the same calls before is exported again, instead of libseccomp computing it anew, which takes tens of milliseconds
// for the usual profiles. The calls are compared whole. Everything behind the export is libcontainer's as ever.
//
// A process makes one filter, in one thread.
#include "interpose.h"

#include <errno.h>
#include <seccomp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

scmp_filter_ctx __real_seccomp_init(uint32_t action);
int __real_seccomp_reset(scmp_filter_ctx ctx, uint32_t action);
int __real_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src);
int __real_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value);
int __real_seccomp_syscall_priority(scmp_filter_ctx ctx, int nr, uint8_t priority);
int __real_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int nr, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int nr, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_load(const scmp_filter_ctx ctx);
int __real_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd);
int __real_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);

enum { CALL_INIT = 1, CALL_ARCH, CALL_ATTR, CALL_RULE };

static enum { PASS, RECORD, OFFER } mode = PASS;
static scmp_filter_ctx filter; // the one that calls are written down of
static struct {
	unsigned char *data;
	size_t len, cap;
} calls;
static int record_fd = -1, exported, used;
static const void *offered_calls, *offered;
static size_t offered_calls_len, offered_len;

void filter_record(int fd) {
	mode = RECORD;
	record_fd = fd;
}

const void *filter_recorded(size_t *len) {
	*len = calls.len;
	return exported ? calls.data : NULL;
}

void filter_offer(const void *c, size_t c_len, const void *program, size_t program_len) {
	mode = OFFER;
	offered_calls = c, offered_calls_len = c_len;
	offered = program, offered_len = program_len;
}

int filter_used(void) { return used; }

static int put(const void *data, size_t len) {
	if (calls.len + len > calls.cap) {
		size_t cap = (calls.len + len) * 2 + 4096;
		void *grown = realloc(calls.data, cap);
		if (!grown)
			return -ENOMEM;
		calls.data = grown, calls.cap = cap;
	}
	memcpy(calls.data + calls.len, data, len);
	calls.len += len;
	return 0;
}

static int put3(uint32_t a, uint32_t b, uint32_t c) {
	uint32_t words[3] = {a, b, c};
	return put(words, sizeof words);
}

// A rule as it is written down behind its CALL_RULE, action and number. scmp_arg_cmp has padding, which means nothing.
struct condition {
	uint32_t arg, op;
	uint64_t a, b;
};

static int put_rule(uint32_t action, int nr, unsigned int n, const struct scmp_arg_cmp *args) {
	size_t before = calls.len;
	int rc = put3(CALL_RULE, action, (uint32_t)nr);
	if (rc == 0)
		rc = put(&n, sizeof n);
	for (unsigned int i = 0; rc == 0 && i < n; i++) {
		struct condition c = {args[i].arg, (uint32_t)args[i].op, args[i].datum_a, args[i].datum_b};
		rc = put(&c, sizeof c);
	}
	if (rc != 0)
		calls.len = before;
	return rc;
}

// settle adds the rules that were put off to ctx, and puts nothing off any more.
static int settle(scmp_filter_ctx ctx) {
	if (mode != OFFER || ctx != filter)
		return 0;
	mode = PASS;
	for (const unsigned char *at = calls.data, *end = at + calls.len; at < end;) {
		uint32_t words[3], n;
		memcpy(words, at, sizeof words);
		at += sizeof words;
		if (words[0] != CALL_RULE)
			continue;
		memcpy(&n, at, sizeof n);
		at += sizeof n;
		struct scmp_arg_cmp args[6];
		if (n > 6)
			return -EINVAL;
		for (uint32_t i = 0; i < n; i++) {
			struct condition c;
			memcpy(&c, at, sizeof c);
			at += sizeof c;
			args[i] = (struct scmp_arg_cmp){c.arg, (enum scmp_compare)c.op, c.a, c.b};
		}
		int rc = __real_seccomp_rule_add_array(ctx, words[1], (int)words[2], n, args);
		if (rc < 0)
			return rc;
	}
	return 0;
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t action) {
	scmp_filter_ctx ctx = __real_seccomp_init(action);
	if (!ctx || mode == PASS)
		return ctx;
	const struct scmp_version *v = seccomp_version();
	if (filter || put3(CALL_INIT, action, seccomp_api_get()) ||
	    put3(CALL_INIT, v->major << 16 | v->minor, v->micro)) {
		settle(filter); // a second filter, or no memory: all as without us
		mode = PASS;
	} else {
		filter = ctx;
	}
	return ctx;
}

int __wrap_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch) {
	if (mode != PASS && ctx == filter && put3(CALL_ARCH, arch, 0)) {
		int rc = settle(ctx);
		mode = PASS;
		if (rc < 0)
			return rc;
	}
	return __real_seccomp_arch_add(ctx, arch);
}

int __wrap_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value) {
	if (mode != PASS && ctx == filter && put3(CALL_ATTR, attr, value)) {
		int rc = settle(ctx);
		mode = PASS;
		if (rc < 0)
			return rc;
	}
	return __real_seccomp_attr_set(ctx, attr, value);
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int nr, unsigned int n, const struct scmp_arg_cmp *args) {
	if (mode != PASS && ctx == filter) {
		if (n <= 6 && put_rule(action, nr, n, args) == 0) {
			if (mode == OFFER)
				return 0;
		} else {
			int rc = settle(ctx);
			mode = PASS;
			if (rc < 0)
				return rc;
		}
	}
	return __real_seccomp_rule_add_array(ctx, action, nr, n, args);
}

static int write_all(int fd, const unsigned char *data, size_t len) {
	while (len > 0) {
		ssize_t n = write(fd, data, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		data += n, len -= (size_t)n;
	}
	return 0;
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd) {
	if (mode == OFFER && ctx == filter && calls.len == offered_calls_len && memcmp(calls.data, offered_calls, calls.len) == 0) {
		used = 1;
		return write_all(fd, offered, offered_len);
	}
	int rc = settle(ctx);
	if (rc < 0)
		return rc;
	if (mode != RECORD || ctx != filter)
		return __real_seccomp_export_bpf(ctx, fd);
	rc = __real_seccomp_export_bpf(ctx, record_fd);
	exported = rc == 0;
	return rc < 0 ? rc : -ECANCELED;
}

// The rest of what can be done to a filter. It is not written down: with it, all is as without us.
#define SETTLED(ctx, call) \
	do { \
		int rc = settle(ctx); \
		mode = PASS; \
		return rc < 0 ? rc : (call); \
	} while (0)

int __wrap_seccomp_reset(scmp_filter_ctx ctx, uint32_t action) { SETTLED(ctx, __real_seccomp_reset(ctx, action)); }
int __wrap_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch) { SETTLED(ctx, __real_seccomp_arch_remove(ctx, arch)); }
int __wrap_seccomp_load(const scmp_filter_ctx ctx) { SETTLED(ctx, __real_seccomp_load(ctx)); }
int __wrap_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd) { SETTLED(ctx, __real_seccomp_export_pfc(ctx, fd)); }

int __wrap_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src) {
	int rc = settle(src);
	if (rc < 0)
		return rc;
	SETTLED(dst, __real_seccomp_merge(dst, src));
}

int __wrap_seccomp_syscall_priority(scmp_filter_ctx ctx, int nr, uint8_t priority) {
	SETTLED(ctx, __real_seccomp_syscall_priority(ctx, nr, priority));
}

int __wrap_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int nr, unsigned int n, const struct scmp_arg_cmp *args) {
	SETTLED(ctx, __real_seccomp_rule_add_exact_array(ctx, action, nr, n, args));
}
