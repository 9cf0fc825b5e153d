# managerd: `make demo` shows it, `make test` proves it, `make help` lists the rest.
SHELL := /bin/sh
.DEFAULT_GOAL := help

GO       = $(or $(shell contrib/go.sh),$(error there is no go command to build with; the reason stands above))
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
PREFIX  ?= /usr/local
DESTDIR ?=
BIN      = $(CURDIR)/bin

PKG      = github.com/managerd/managerd
LDFLAGS  = -s -w -X $(PKG)/shimapi/version.Version=$(VERSION) -X $(PKG)/shimapi/version.Revision=$(REVISION)
# The shim runs libcontainer (cgo) and links no gRPC; the other two are pure Go. It is linked statically: it, and every
# container's init, which is the same program again, starts half a millisecond sooner, and it runs on any distribution.
SHIMTAGS = seccomp no_grpc netgo osusergo
TESTTAGS = seccomp netgo osusergo
# vmguest: the tests that run in the VM only, see test/vm.
LINTTAGS = $(TESTTAGS) vmguest

.PHONY: help build demo test race fuzz test-vm test-vm-packages test-vm-zfs test-chaos bench lint protos install uninstall clean deps test-deps

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps:
	@contrib/deps.sh build

test-deps:
	@contrib/deps.sh test

build: deps ## build bin/managerd, bin/shim-runc and bin/mctl
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/managerd ./cmd/managerd
	CGO_ENABLED=1 $(GO) build -trimpath -tags '$(SHIMTAGS)' -ldflags '$(LDFLAGS) -extldflags -static' -o $(BIN)/shim-runc ./cmd/shim-runc
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/mctl ./cmd/mctl

demo: build ## the main job on a private daemon: a container outlives its manager (IMAGE=archive.tar for your own)
	@$(GO) run ./test/demo -bin $(BIN) $(if $(IMAGE),-image $(abspath $(IMAGE)))

test: build test-deps ## unit, integration and end-to-end tests, with real containers and Debian's ctr; needs root
	MANAGERD_BIN_DIR=$(BIN) CGO_ENABLED=1 $(GO) test -tags '$(TESTTAGS)' -timeout 20m $(TESTFLAGS) ./...

race: build test-deps ## the same under the race detector, which is in the programs too. RACEPKG=./reaper/... for some
	@rm -rf $(BIN)/race
	CGO_ENABLED=1 $(GO) build -race -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/race/ ./cmd/managerd ./cmd/mctl
	CGO_ENABLED=1 $(GO) build -race -trimpath -tags '$(SHIMTAGS)' -ldflags '$(LDFLAGS)' -o $(BIN)/race/ ./cmd/shim-runc
	@status=0; GORACE='log_path=$(BIN)/race/report' MANAGERD_BIN_DIR=$(BIN)/race CGO_ENABLED=1 \
		$(GO) test -race -tags '$(TESTTAGS)' -timeout 60m $(TESTFLAGS) $(or $(RACEPKG),./...) || status=$$?; \
	if cat $(BIN)/race/report.* 2>/dev/null; then echo "races, of these processes: $$(cd $(BIN)/race && echo report.*)" >&2; status=1; fi; exit $$status

fuzz: build ## every fuzz test for FUZZTIME (10s) each; FUZZPKG=./shimapi/... for some. make test runs their seeds
	@for p in $$($(GO) list $(or $(FUZZPKG),./...)); do \
		for f in $$(MANAGERD_BIN_DIR=$(BIN) $(GO) test -tags '$(TESTTAGS)' -list '^Fuzz' $$p | grep '^Fuzz'); do \
			echo "$$p $$f"; \
			MANAGERD_BIN_DIR=$(BIN) CGO_ENABLED=1 $(GO) test -tags '$(TESTTAGS)' -run '^$$' -fuzz "^$$f$$" -fuzztime $(or $(FUZZTIME),10s) -fuzzminimizetime 10x $$p || exit 1; \
		done; \
	done

test-vm: build ## systemd and cgroup v2, for real, in a Debian VM (qemu without KVM, image cached); needs root
	@contrib/deps.sh vm
	@GO='$(GO)' BIN='$(BIN)' TAGS='$(TESTTAGS)' test/vm/test.sh systemd

test-vm-packages: build ## in the same VM, what comes out differently there of other packages
	@contrib/deps.sh vm
	@GO='$(GO)' BIN='$(BIN)' TAGS='$(TESTTAGS)' test/vm/test.sh packages

test-vm-zfs: build ## in the same VM, the snapshotter zfs; its modules are compiled first, once, for ten minutes
	@contrib/deps.sh vm
	@GO='$(GO)' BIN='$(BIN)' TAGS='$(TESTTAGS)' test/vm/test.sh zfs

test-chaos: build test-deps ## kill daemon and shims at random under load (DURATION=60s, SEED=0); needs root
	MANAGERD_BIN_DIR=$(BIN) CGO_ENABLED=1 $(GO) test -tags '$(TESTTAGS)' -timeout 0 -count 1 -v -run TestChaos ./test/chaos -args -chaos.duration=$(or $(DURATION),60s) -chaos.seed=$(or $(SEED),0)

bench: build test-deps ## create+start, exec, delete and memory beside Debian's containerd, as ratios
	@$(GO) run ./test/bench -bin $(BIN)

lint: deps ## gofmt, go vet, staticcheck
	@out=$$($$(dirname $(GO))/gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "not gofmt-clean:"; echo "$$out"; exit 1; }
	CGO_ENABLED=1 $(GO) vet -tags '$(LINTTAGS)' ./...
	CGO_ENABLED=1 $(GO) tool staticcheck -tags '$(subst $() ,$(,),$(LINTTAGS))' ./...

protos: ## regenerate protos/*.pb.go (needs protobuf-compiler)
	protos/generate.sh

install: build ## install programs and systemd units to PREFIX (default /usr/local), below DESTDIR
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' BIN='$(BIN)' contrib/install.sh install

uninstall: ## remove them again; containers run on
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' contrib/install.sh uninstall

clean: ## remove bin/
	rm -rf $(BIN)

, := ,
