# What each target does is in its own line: `make` lists them.
#
# run and test need a Redis, and find their own way to one: the one that a variable names, else Docker
# Compose, else redis-server, which is installed if need be. run-given, run-compose, run-local and the
# same for test take one way without looking for others.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
STATICCHECK ?= v0.8.2
FUZZTIME ?= 10s
TESTFLAGS ?=
TIMEOUT ?= $(if $(RP_SOAK),60m,10m)

port = $(or $(RP_PORT),8080)
go_build = CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
# The race detector needs cgo, whatever the environment says, except on macOS.
go_test = $(if $(filter-out Darwin,$(shell uname)),CGO_ENABLED=1) \
	go test -race -count=1 -parallel 4 -timeout $(TIMEOUT) $(TESTFLAGS) ./...

compose = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || \
	{ command -v docker-compose >/dev/null && echo docker-compose; })
images = $(shell sed -n 's/^FROM \([^ ]*:[^ ]*\).*/\1/p' Dockerfile)
# $(call way,GIVEN): given, compose or local. Without Go, an engine alone will do: Compose is installed.
way = $(if $(1),given,$(shell \
	docker info >/dev/null 2>&1 && { [ -n '$(compose)' ] || ! command -v go >/dev/null; } || { echo local; exit; }; \
	for image in $(images); do \
		docker image inspect $$image >/dev/null 2>&1 || docker pull $$image >&2 || { echo local; exit; }; \
	done; \
	echo compose))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## serve on 127.0.0.1:8080 (RP_PORT), with a Redis behind it (or RP_REDIS_HOST, RP_REDIS_URL)
	@$(MAKE) --no-print-directory run-$(call way,$(value RP_REDIS_URL)$(RP_REDIS_HOST)$(RP_REDIS_PORT))

.PHONY: redis-cli
redis-cli: ## talk to the Redis of make run: ARGS='get KEY', or a prompt
	@read -r pid command 2>/dev/null <.run/redis && kill -0 $$pid 2>/dev/null || \
		{ echo "make run is not running here" >&2; exit 1; }; \
	eval "$$command" '$(subst ','\'',$(value ARGS))'

.PHONY: test
test: ## run every test, race detector on, against a Redis (or RP_TEST_REDIS=host:port); TESTFLAGS='-v -run X'
	@$(MAKE) --no-print-directory test-$(call way,$(RP_TEST_REDIS))

.PHONY: test-unit
test-unit: go cgo ## run the tests that need no Redis
	$(go_test) -skip '^(TestIntegration|FuzzSameBytes)'

.PHONY: fuzz
fuzz: go redis-server ## fuzz every target for FUZZTIME=10s
	@targets=$$(go test -list '^Fuzz' .) || { echo "$$targets"; exit 1; }; \
	for target in $$(echo "$$targets" | grep '^Fuzz'); do \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s . || exit; \
	done

.PHONY: lint
lint: go ## check the code: gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l .) && [ -z "$$unformatted" ] || { echo "not gofmt'ed: $$unformatted" >&2; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK) ./...

.PHONY: bench
bench: go redis-server ## run the benchmarks
	go test -run '^$$' -bench . -benchmem $(TESTFLAGS) ./...

.PHONY: soak
soak: export RP_SOAK = 1
soak: test ## run every test in its long form: up to an hour

.PHONY: build
build: go ## build ./redis_proxy, one static binary
	$(go_build) -o redis_proxy .

.PHONY: dist
dist: go ## build for all platforms, with checksums, into dist/
	@for platform in linux_amd64 linux_arm64 darwin_arm64; do \
		echo dist/redis_proxy_$$platform; \
		GOOS=$${platform%_*} GOARCH=$${platform#*_} $(go_build) -o dist/redis_proxy_$$platform . || exit; \
	done
	@cd dist && $$(command -v sha256sum || echo shasum -a 256) redis_proxy_* >SHA256SUMS

.PHONY: clean
clean: ## remove what was built
	rm -rf .run redis_proxy dist *.test *.prof

# The ways of run.

# $(call started,COMMAND) notes how make redis-cli reaches the Redis while this process runs.
started = mkdir -p .run; echo $$$$ $(1) >.run/redis; \
	echo "In another terminal: make redis-cli ARGS=\"set Rescale 'We Accelerate Engineering Breakthroughs'\""; \
	echo "                     curl 127.0.0.1:$(port)/Rescale"

# The URL itself is not noted: it may hold a password.
given = $(if $(value RP_REDIS_URL),-u "$${RP_REDIS_URL:?}", \
	-h $(or $(RP_REDIS_HOST),127.0.0.1) -p $(or $(RP_REDIS_PORT),6379))

.PHONY: run-given
run-given: build
	@echo "Redis: the one that RP_REDIS_HOST, RP_REDIS_PORT or RP_REDIS_URL names"
	@$(call started,'redis-cli $(given)'); \
	exec ./redis_proxy --port $(port)

.PHONY: run-compose
run-compose: docker
	@echo "Redis: in a container, with $(compose)"
	@$(compose) build --build-arg VERSION=$(VERSION) redis_proxy
	@$(call started,'$(compose) exec $$([ -t 0 ] || echo -T) redis redis-cli'); \
	exec $(compose) up redis redis_proxy

# The Redis of run-local listens on the first port that it can have, which it is asked for by its process
# id: another one may listen there. The proxy takes the place of the shell, so that signals reach it; a
# process in the background stops Redis when it has gone.
.PHONY: run-local
run-local: build redis-server
	@for redis_port in $$(seq 6379 6399); do \
		redis-server --bind 127.0.0.1 --port $$redis_port --save '' >/dev/null & redis=$$!; \
		while kill -0 $$redis 2>/dev/null; do \
			redis-cli -p $$redis_port info server 2>/dev/null | grep -q "^process_id:$$redis[^0-9]" && break 2; \
			sleep 0.1; \
		done; \
	done; \
	kill -0 $$redis 2>/dev/null || { echo "redis-server does not start on any port from 6379 to 6399" >&2; exit 1; }; \
	(trap '' HUP; while kill -0 $$$$; do sleep 1; done; kill $$redis) >/dev/null 2>&1 & \
	echo "Redis: redis-server on port $$redis_port"; \
	$(call started,redis-cli -p $$redis_port); \
	exec ./redis_proxy --port $(port) --redis-url redis://127.0.0.1:$$redis_port

# The ways of test.

# Tests that stop a Redis start one of their own, in every way.
.PHONY: test-given
test-given: go cgo redis-server
	@echo "Redis: the one that RP_TEST_REDIS names"
	$(go_test)

# A project of its own: whatever runs besides is left alone.
.PHONY: test-compose
test-compose: docker
	@echo "Redis: in a container, with $(compose)"
	@trap : INT TERM; compose="$(compose) --profile test -p redis_proxy_test_$$$$"; \
	$$compose build test && \
	$$compose run -T --rm test -test.timeout $(TIMEOUT) -test.parallel 4 $(patsubst -%,-test.%,$(TESTFLAGS)); \
	code=$$?; $$compose down; exit $$code

.PHONY: test-local
test-local: go cgo redis-server
	@echo "Redis: redis-server, which the tests start"
	$(go_test)

# What the machine must have. $(call need,TEST,NAME,PACKAGES OF APT,PACKAGES OF HOMEBREW) installs what
# TEST does not find.

define need
	@$(1) && exit; \
	su=$$([ "$$(id -u)" = 0 ] || echo sudo -n); \
	if command -v apt-get >/dev/null && $$su true 2>/dev/null; then \
		echo "installing $(2) with apt-get"; \
		$$su apt-get update -qq && $$su env DEBIAN_FRONTEND=noninteractive apt-get install -qq $(3) >/dev/null; \
	elif command -v brew >/dev/null; then \
		echo "installing $(2) with brew"; \
		brew install --quiet $(4); \
	fi; \
	$(1) || { echo "$(2) is missing, and neither apt-get nor brew can install it here" >&2; exit 1; }
endef

.PHONY: go
go:
	@want=$$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/go\1/p' go.mod); \
	go list -f '{{context.ReleaseTags}}' runtime 2>/dev/null | grep -qwF $$want || { \
		found=$$(go version 2>/dev/null || echo none); \
		echo "$$want or later is missing (found: $$found): https://go.dev/dl, or Docker for run and test" >&2; exit 1; }

has_compose = docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null

.PHONY: docker
docker:
	@docker info >/dev/null 2>&1 || { \
		echo "a Docker Engine that answers is missing: https://docs.docker.com/engine/install" >&2; exit 1; }
	$(call need,$(has_compose),Docker Compose,docker-compose,docker-compose)

.PHONY: redis-server
redis-server:
	$(call need,command -v redis-server >/dev/null,redis-server,redis-server,redis)

has_cgo = [ "$$(uname)" = Darwin ] || echo '\#include <stdlib.h>' | $$(go env CC) -E - >/dev/null 2>&1

.PHONY: cgo
cgo: go
	$(call need,$(has_cgo),a C compiler,gcc libc6-dev,gcc)
