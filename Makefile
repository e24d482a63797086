# Every target sets up what it needs by itself and is quick when that stands. `make help` lists them.
# ARGS is passed on: make demo ARGS="--s3 ceph", make test ARGS="-k settings", make bench ARGS=memory.

SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
ARGS ?=
BENCHES := memory memory_index policy_sim policy represent ssd origin transport transport_stream lake

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

# What the native copy kernel is built with, where there is none.
.PHONY: compiler
compiler:
	@tools/system.sh cc

.PHONY: venv
venv: compiler  ## .venv with the package (editable) and everything that tests and benchmarks want
	@tools/venv.sh .venv -e '.[dev]'

# DuckDB 1.5 beside DuckDB 2: two versions of one module need two environments.
.PHONY: readers
readers: venv  ## .venv-duckdb15, the second environment of the reader tests and of bench.lake
	@tools/venv.sh .venv-duckdb15 -e '.[s3]' duckdb==1.5.5 duckdb-extension-httpfs pandas pyarrow pytest==9.2.0

# What bench.local, bench.kv and bench.engine measure beside us; large (torch comes along), so only for whoever wants those rows.
.PHONY: peers
peers: venv system  ## .venv-peers: Mooncake, LMCache and a Redis client, for bench.local, bench.kv and bench.engine
	@UNCONSTRAINED=1 tools/venv.sh .venv-peers torch==2.13.0 mooncake-transfer-engine-non-cuda==0.3.13.post1 lmcache==0.5.6 redis

# For tests of transformers and of SGLang's interface, the demo's KV half, and a DataLoader's processes in bench.jobs.
# SGLang comes without what it depends on (CUDA, 10 GB), which its interface does not need; and without its metadata, or pip
# would list all of that as missing whenever it installs something here.
.PHONY: torch
torch: compiler  ## .venv-torch: PyTorch and transformers beside the package
	@tools/venv.sh .venv-torch -e '.[s3,transformers]' torch==2.13.0 transformers==5.23.0 peft==0.21.2 pyarrow \
	    hypothesis==6.170.15 pytest==9.2.0 pytest-timeout==2.4.0
	@[[ -e .venv-torch/.sglang-0.5.23 ]] || { \
	    .venv-torch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23 \
	    && rm -r .venv-torch/lib/python3*/site-packages/sglang-0.5.23.dist-info && touch .venv-torch/.sglang-0.5.23; }

# NIXL without PyTorch, which its metadata demands and its bindings do not need: pip would list that as missing for ever.
.PHONY: nixl
nixl: venv  ## NIXL in .venv, for the tests of the transport nixl and of the UCX inside
	@[[ -e .venv/.nixl-1.5.1 || $$(uname -m) != x86_64 ]] || { \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nixl-cu13==1.5.1 \
	    && sed -i '/^Requires-Dist: /d' .venv/lib/python3*/site-packages/nixl_cu13-1.5.1.dist-info/METADATA \
	    && touch .venv/.nixl-1.5.1; }

.PHONY: system
system:  ## fio, zstd and Ceph from Debian, where this may be done; else says what is skipped
	@tools/system.sh

.PHONY: demo
demo: venv torch  ## TPC-H on a local object store, and a language model's prefix: without the cache, from SSD, from memory
	@$(BIN)/tiercache demo $(ARGS)
	@HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error .venv-torch/bin/python -m tiercache_connectors.demo_kv

.PHONY: test
test: venv nixl readers torch system  ## the whole suite against the built wheel, from an empty directory
	@tools/test.sh $(ARGS)

# vLLM has no wheels that fit beside our tools' pins, and takes 4 GB: an environment of its own.
.PHONY: test-engines
test-engines: compiler  ## real engines: vLLM on the CPU over the cache, as a table of models, doors and cases
	@tools/engines.sh
	@.venv-engines/bin/python -m pytest -q tests/engines
	@.venv-engines/bin/python -m tests.engines $(ARGS)
	@.venv-engines/bin/python -m tests.kv_cross
	@.venv-engines/bin/python -m pytest -q tests/connectors/test_mooncake_store.py
	@.venv-engines/bin/python -m tests.pd_hosts

.PHONY: quick
quick: venv  ## the suite without slow tests, against the working tree
	@$(BIN)/python -m pytest -q -m 'not slow and not nightly' $(ARGS)

.PHONY: check
check: venv  ## ruff, mypy, import-linter, tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_tidy.py

.PHONY: format
format: venv  ## what `make check` can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: data
data: venv  ## real traces and tables, from their public sources or from the folder TIERCACHE_DATA
	@$(BIN)/python -m bench.data $(ARGS)

.PHONY: bench
bench: venv readers system  ## every benchmark, as JSON under build/bench; those without data say so
	@$(BIN)/python -m bench.data || true
	@tools/bench.sh $(if $(ARGS),$(ARGS),$(BENCHES))

.PHONY: nightly
nightly: venv nixl readers torch system  ## 1,200 kills, ten minutes of soaking, long seeds, the suite with asserts off
	$(BIN)/python -m tests.crash --kills 1000
	$(BIN)/python -m tests.crash --owners 200
	$(BIN)/python -m tests.soak --minutes 10
	$(BIN)/python -m tests.two_hosts
	$(BIN)/python -m tests.mooncake_wheel
	TIERCACHE_UCX_LIB=$$(echo .venv/lib/python3*/site-packages/libucx/lib/libucp.so) $(BIN)/python -m pytest -q \
	    tests/contract/test_transports_ucx.py tests/unit/test_net_ucx*.py  # the wheel's UCX beside NIXL's newer one
	HYPOTHESIS_PROFILE=nightly tools/test.sh -m nightly --timeout 3600
	tools/test.sh --optimized
	tools/engines.sh --old
	.venv-engines/bin/python -m tests.engines --old
	tools/sglang.sh && $(BIN)/python -m tests.sglang_engine || echo "SGLang as an engine: FAILED (an unsupported set-up)"

.PHONY: clean
clean:  ## everything that make made
	rm -rf .venv .venv-* build dist .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
