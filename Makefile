BOOTSTRAP := tools/bootstrap.sh

.DEFAULT_GOAL := help
.PHONY: help setup build cuda demo test test-sanitize fuzz bench lint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install Deno, Debian packages (Chromium too) and npm packages, where missing
	@$(BOOTSTRAP) setup

build: setup ## Build the native library (the CUDA one too if there are nvcc and a GPU) and the page of reports
	@$(BOOTSTRAP) build
	@$(BOOTSTRAP) bundle

cuda: setup ## Build both native libraries (needs nvcc, not a GPU)
	@$(BOOTSTRAP) cuda

demo: build ## Pack a real cache, check the error bound, run its model over such a cache
	@./packhorse demo

test: build ## Run the tests on every backend present
	@$(BOOTSTRAP) native-test
	@$(BOOTSTRAP) deno task test

test-sanitize: setup ## Run the native tests under address and undefined-behaviour sanitizers
	@$(BOOTSTRAP) sanitize

fuzz: build ## Feed broken files to the readers for a minute
	@$(BOOTSTRAP) deno task fuzz

bench: build ## Measure speed on this machine
	@$(BOOTSTRAP) deno task bench

lint: setup ## Check format, lint rules and types
	@$(BOOTSTRAP) deno task lint

clean: ## Remove what was built and installed here
	@rm -rf build dist coverage node_modules .deno
