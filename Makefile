# `make help` lists the targets. What development needs: hack/setup.sh.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/persys-dev/persys/internal/server.Version=$(VERSION)
# How long each fuzz target runs in `make fuzz`; `make test` takes less.
FUZZTIME ?= 20s
TESTTIMEOUT ?= 15m
SOAKCHECKS ?= 20000
SOAKFAULTS ?= 1000
PKGS ?= ./...

.PHONY: help
help: ## Show this
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  %-14s %s\n", $$1, $$2}'

.PHONY: build
build: ## Build bin/persys, one static program
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/persys ./cmd/persys

.PHONY: install
install: ## Build and install persys into GOBIN
	CGO_ENABLED=0 go install -trimpath -ldflags '$(LDFLAGS)' ./cmd/persys

.PHONY: demo
demo: build ## Run three servers and two agents on this machine, with the examples
	hack/demo.sh up

.PHONY: demo-stop
demo-stop: ## Stop what `make demo` started
	hack/demo.sh stop

.PHONY: demo-image
demo-image: ## Build the examples' image, persys-demo-web:1
	sh hack/demo-image.sh

.PHONY: test
test: verify-fmt lint verify-proto ## Everything that is checked before a change lands
	go test -race -timeout $(TESTTIMEOUT) $(PKGS)
	hack/fuzz.sh 3s

.PHONY: test-short
test-short: ## Quick tests: no race detector, no end-to-end test
	go test -short $(PKGS)

.PHONY: soak
soak: ## Compare with an etcd, over SOAKCHECKS sequences of requests; check histories over SOAKFAULTS faults
	go test -timeout 12h ./gateway/etcd -run Differential -rapid.checks=$(SOAKCHECKS)
	go test -timeout 12h ./chaos/procs -run EtcdHistory -faults=$(SOAKFAULTS)

.PHONY: bench
bench: ## Measure what docs/performance.md records
	hack/bench.sh

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME
	hack/fuzz.sh $(FUZZTIME)

.PHONY: fmt
fmt: ## Format the Go code
	gofmt -w .

.PHONY: verify-fmt
verify-fmt: ## Check that `make fmt` changes nothing
	@files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "not formatted (make fmt does it):" >&2; echo "$$files" >&2; exit 1; fi

.PHONY: vet
vet: ## go vet
	go vet $(PKGS)

.PHONY: lint
lint: vet bin/staticcheck ## go vet and staticcheck
	bin/staticcheck $(PKGS)

bin/staticcheck: tools/go.mod tools/go.sum
	cd tools && go build -o ../bin/staticcheck honnef.co/go/tools/cmd/staticcheck

.PHONY: proto
proto: ## Generate the Go code and the OpenAPI document from proto/
	sh proto/generate.sh

.PHONY: verify-proto
verify-proto: ## Check that `make proto` changes nothing
	hack/verify-proto.sh

.PHONY: golden
golden: ## Rewrite the recorded answers of tests; the diff is what to review
	go test ./internal/cli -update

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin
