# Everything needs Go and root on a Debian machine; what else is missing is installed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
BIN     := $(CURDIR)/bin
LDFLAGS := -s -w
PACKAGES := gcc libc6-dev libseccomp-dev pkg-config ca-certificates git busybox-static mmdebstrap docker-registry skopeo iproute2 nftables
BENCH_ARGS ?=
FUZZTIME ?= 20s

# Programs of the test cluster.
KUBERNETES := $(addprefix $(BIN)/,etcd kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubectl kubelet)
CONTAINERD := $(addprefix $(BIN)/,containerd containerd-shim-runc-v2 ctr host-local portmap ptp)

.PHONY: help build deps kiln quickstart test security-results lint generate fuzz bench clean test-tools cluster-tools cluster-up cluster-down cluster-deploy images generated

help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

deps: ## Install the Debian packages that building and testing need
	@missing=(); for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; fi

build: deps kiln $(BIN)/runc $(BIN)/runsc ## Build kiln, runsc, and runc for tests into bin/

kiln:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

# runc is what tests compare sandboxes with, and run images in. The OCI runtimes are modules of their
# own, so that their requirements are not kiln's.
$(BIN)/runc: tools/runc/go.mod tools/runc/go.sum
	cd tools/runc && CGO_ENABLED=1 $(GO) build -trimpath -tags seccomp -ldflags '$(LDFLAGS)' -o $@ github.com/opencontainers/runc

# runsc has files and changes of kiln's; see tools/runsc/build.sh.
$(BIN)/runsc: tools/runsc/go.mod tools/runsc/go.sum $(wildcard tools/runsc/*.sh tools/runsc/*/*.patch tools/runsc/*/*.go tools/runsc/*/*/*.go)
	GO=$(GO) tools/runsc/build.sh $@

$(BIN)/staticcheck: tools/lint/go.mod
	cd tools/lint && $(GO) build -o $@ honnef.co/go/tools/cmd/staticcheck

$(BIN)/buildkitd: tools/buildkit/go.mod
	cd tools/buildkit && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ github.com/moby/buildkit/cmd/buildkitd github.com/moby/buildkit/cmd/buildctl

$(KUBERNETES) &: tools/kubernetes/go.mod tools/kubernetes/go.sum
	tools/build-cached kubernetes $(BIN)

$(CONTAINERD) &: tools/containerd/go.mod tools/containerd/go.sum
	tools/build-cached containerd $(BIN)

$(BIN)/coredns: tools/coredns/go.mod tools/coredns/go.sum tools/coredns/main.go
	tools/build-cached coredns $(BIN)

cluster-tools: deps $(BIN)/runc $(KUBERNETES) $(CONTAINERD) $(BIN)/coredns ## Build the programs of the test cluster

cluster-up: cluster-tools ## Start a Kubernetes cluster on this machine (CLUSTER_ARGS="-dir DIR -nodes N")
	@$(GO) run ./test/cluster/kilncluster $(CLUSTER_ARGS) up

cluster-down: ## Remove that cluster
	@$(GO) run ./test/cluster/kilncluster $(CLUSTER_ARGS) down

# Stock clients and an external front end, for tests.
test-tools: $(BIN)/buildkitd $(BIN)/buildx $(BIN)/dockerfile-frontend

$(BIN)/buildx: tools/buildx/go.mod tools/buildx/go.sum
	cd tools/buildx && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ github.com/docker/buildx/cmd/buildx

$(BIN)/dockerfile-frontend: tools/buildkit/go.mod
	cd tools/buildkit && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ github.com/moby/buildkit/frontend/dockerfile/cmd/dockerfile-frontend

quickstart: build ## Build examples/hello in a gVisor sandbox and run the result
	examples/quickstart.sh

# The packages of BuildKit where its own goroutines race: progress of pulls, and records of
# the cache that builds finalize at once. All others, and all of kiln, are watched, but for a
# function (.ci/race-suppressions).
RACE = -race $(foreach p,cache util/pull util/pull/pullprogress,-gcflags=github.com/moby/buildkit/$(p)=-race=false)

test: build cluster-tools test-tools ## Run every test
	CGO_ENABLED=1 $(GO) build $(RACE) ./...
	GORACE="suppressions=$(CURDIR)/.ci/race-suppressions" CGO_ENABLED=1 $(GO) test $(RACE) -ldflags=-w -count=1 -p 1 -timeout 30m ./...

security-results: build $(CONTAINERD) ## Attack kiln, and write docs/security-results.md
	GORACE="suppressions=$(CURDIR)/.ci/race-suppressions" CGO_ENABLED=1 $(GO) test $(RACE) -count=1 -timeout 30m ./test/escape -write

lint: $(BIN)/staticcheck $(BIN)/buf generated ## Check formatting, vet, staticcheck, the build API, generated code and documents
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(BIN)/staticcheck ./...
	$(BIN)/buf lint
	$(BIN)/buf breaking --against api/agent/v1/baseline.binpb
	$(GO) test -count=1 -run '^TestResultsAreCurrent$$' ./test/escape

$(BIN)/buf: tools/proto/go.mod
	cd tools/proto && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ github.com/bufbuild/buf/cmd/buf google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc

$(BIN)/controller-gen: tools/controller-gen/go.mod
	cd tools/controller-gen && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ sigs.k8s.io/controller-tools/cmd/controller-gen

generate: $(BIN)/buf $(BIN)/controller-gen ## Regenerate generated code
	PATH=$(BIN):$$PATH $(GO) generate ./...

generated: $(BIN)/controller-gen
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	$(BIN)/controller-gen object paths=./api/build/... output:object:dir=$$tmp && \
	$(BIN)/controller-gen crd:crdVersions=v1,generateEmbeddedObjectMeta=false paths=./api/build/... output:crd:dir=$$tmp/crds && \
	diff $$tmp/zz_generated.deepcopy.go api/build/v1alpha1/zz_generated.deepcopy.go && diff -r $$tmp/crds deploy/base/crds || \
	{ echo "generated code of api/build is not current: run make generate"; exit 1; }

images: build ## Build kiln's own images with kiln (REGISTRY=HOST/PATH TAG=... pushes them)
	deploy/images/build.sh

cluster-deploy: build $(BIN)/kubectl ## Build kiln's images and deploy them to the cluster of cluster-up
	deploy/overlays/test/deploy.sh $(CLUSTER_DIR)

fuzz: ## Run every fuzz target for a while (FUZZTIME=30s each)
	$(GO) list -f '{{.Dir}}' ./... | while read -r dir; do \
		for target in $$(grep -hos '^func Fuzz[A-Za-z0-9_]*' "$$dir"/*_test.go | cut -d' ' -f2); do \
			echo "$${dir#$(CURDIR)/} $$target"; (cd "$$dir" && $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -parallel 2 .); \
		done; \
	done

bench: build $(BIN)/buildkitd ## Measure kiln beside BuildKit (BENCH_ARGS="-work NAME -n RUNS")
	$(GO) run ./bench -kiln $(BIN)/kiln -agent $(BIN)/kiln-agent -buildkitd $(BIN)/buildkitd -buildctl $(BIN)/buildctl -runc $(BIN)/runc -runsc $(BIN)/runsc -out bench/results $(BENCH_ARGS)

clean: ## Remove what was built
	rm -rf $(BIN) bench/results
