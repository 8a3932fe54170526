# One verb for each thing a person does here. PYTHON=... builds on that interpreter and uses the torch that it has, if any.
PYTHON ?= python3
VENV   := .venv/bin
READY  := .venv/.ready
ROOMS  := $(notdir $(patsubst %/,%,$(filter-out csrc/common/,$(wildcard csrc/*/))))

.PHONY: env build demo test cpu-tests compat lint format bench bench-models sanitize sanitize-widest sanitize-others \
  cuda-host cuda-host-build cuda-host-tests cuda-check neon profile clean
.DEFAULT_GOAL := test

env: $(READY) build

# .venv holds what development needs; where PYTHON has a torch, its packages are seen through llamakern-host.pth.
$(READY): requirements-dev.txt tools/preflight.py
	$(PYTHON) tools/preflight.py
	$(PYTHON) -m venv .venv
	$(PYTHON) -c "import importlib.util as u, sysconfig as s; print(s.get_paths()['purelib'] if u.find_spec('torch') else '')" \
	  > $$($(VENV)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/llamakern-host.pth
	$(VENV)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

build: $(READY)
	$(VENV)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .

demo: env
	$(VENV)/python -m llamakern demo

# Both suites side by side, each on half of the cores. Passive waiting: on a busy machine a thread that spins at a barrier
# keeps the one it waits for from running.
HALF := $(shell n=$$(nproc 2> /dev/null || echo 2); echo $$((n > 1 ? n / 2 : 1)))
test: env cuda-host-build
	$(MAKE) --no-print-directory -j2 --output-sync=line OMP_NUM_THREADS=$(HALF) HOST_CUDA_THREADS=$(HALF) \
	  cpu-tests cuda-host-tests

cpu-tests:
	OMP_WAIT_POLICY=passive $(VENV)/pytest

# The tests of patch against each transformers named, laid over .venv: make compat COMPAT=5.6.2 for one.
COMPAT ?= 4.57.6 5.0.0 5.6.2 5.17.0
compat: env
	for v in $(COMPAT); do \
	  test -d build/compat/$$v || { $(VENV)/python -m pip install -q --target build/compat/new "transformers==$$v" \
	    && mv build/compat/new build/compat/$$v; } || exit 1; \
	  echo "transformers $$v"; \
	  PYTHONPATH=build/compat/$$v $(VENV)/python -m pytest -p no:cacheprovider $(wildcard tests/test_patch*.py) || exit 1; \
	done

CPP := 'csrc/*' 'bindings/*' 'host_cuda/*' 'tests/neon/*' 'tests/host_cuda/*'
lint: $(READY)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/clang-format --dry-run --Werror $$(git ls-files $(CPP) | grep -E '\.(h|cpp|cu|cuh)$$')

format: $(READY)
	$(VENV)/ruff check --fix -q .
	$(VENV)/ruff format -q .
	$(VENV)/clang-format -i $$(git ls-files $(CPP) | grep -E '\.(h|cpp|cu|cuh)$$')

# All tables, curves and pictures, and one page of them: make bench RESULTS=benchmarks/results/mine keeps them.
RESULTS ?= build/results
BENCH   := $(VENV)/python -m llamakern bench
bench: env
	$(BENCH) --json $(RESULTS) --plot
	$(BENCH) --curve --json $(RESULTS) --plot
	if LLAMAKERN_ISA=avx2 $(VENV)/python -c "import llamakern; llamakern._C.isa()" 2> /dev/null; then \
	  LLAMAKERN_ISA=avx2 $(BENCH) attention nf4 --json $(RESULTS)/avx2 --plot \
	    && $(VENV)/python benchmarks/report.py $(RESULTS)/avx2 --rows > $(RESULTS)/avx2/README.md || exit 1; fi
	$(VENV)/python benchmarks/report.py $(RESULTS) > $(RESULTS)/README.md

# Whole models against transformers, PEFT, bitsandbytes and llama.cpp, all of them in .venv: half an hour.
bench-models: env
	$(VENV)/python benchmarks/bench_generate.py --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_train.py --method qlora --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_train.py --method lora --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_train.py --method adapter --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_train.py --method excitor --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_train.py --method qlora --curve --json $(RESULTS) --plot
	$(VENV)/python benchmarks/bench_transformers.py --json $(RESULTS)/transformers.json
	$(VENV)/python benchmarks/report.py $(RESULTS) > $(RESULTS)/README.md

# The room tests on a build with the address and undefined-behaviour sanitizers. SANITIZE_TESTS=tests/test_rope.py for some
# files, SANITIZE_ONLY=f32 for some tests of each. The narrowest and the widest instruction set, side by side: they
# hold every line of the kernels.
SANITIZE_ONLY ?= test
SANITIZE_TESTS ?= $(ROOMS:%=tests/test_%.py)
WIDEST := $(shell grep -q avx512_bf16 /proc/cpuinfo && echo avx512bf16 || echo avx512)
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=build/sanitize $(VENV)/pytest -x -p no:cacheprovider
sanitize: $(READY)
	LLAMAKERN_SANITIZE=address,undefined LLAMAKERN_BUILD_NAME=cmake-sanitize \
	  $(if $(findstring x86,$(shell uname -m)),LLAMAKERN_ISAS='avx2;$(WIDEST)') $(VENV)/python setup.py -q build --build-lib build/sanitize
	$(MAKE) --no-print-directory -j2 --output-sync=line OMP_NUM_THREADS=$(HALF) sanitize-widest sanitize-others
sanitize-widest:
	$(SANITIZED) -k '($(SANITIZE_ONLY)) and $(WIDEST)' $(SANITIZE_TESTS) || [ $$? = 5 ]  # 5: none of that name
sanitize-others:
	$(SANITIZED) -k '($(SANITIZE_ONLY)) and not $(WIDEST)' $(SANITIZE_TESTS)

# The CUDA kernels on the CPU, under the checks of host_cuda/: the room tests on a build that has no other kernels.
# make cuda-host CUDA_MARKS=large CUDA_TESTS=tests/test_nf4_limits.py runs what is too much work for every day.
CUDA_MARKS ?= not large and not slow
CUDA_ROOMS ?= $(patsubst csrc/%/,%,$(sort $(dir $(wildcard csrc/*/*_cuda.cu))))
CUDA_TESTS ?= $(CUDA_ROOMS:%=tests/test_%.py) $(wildcard $(foreach part,decode limits prompts rows,$(CUDA_ROOMS:%=tests/test_%_$(part).py)))
cuda-host: cuda-host-build cuda-host-tests
cuda-host-build: $(READY)
	LLAMAKERN_HOST_CUDA=ON LLAMAKERN_BUILD_NAME=cmake-cuda-host $(VENV)/python setup.py -q build --build-lib build/cuda-host
HOST_CUDA_THREADS ?= 2
cuda-host-tests:
	PYTHONPATH=build/cuda-host HOST_CUDA_THREADS=$(HOST_CUDA_THREADS) OMP_WAIT_POLICY=passive $(VENV)/pytest -x -p no:cacheprovider \
	  -m "$(CUDA_MARKS)" $(CUDA_TESTS)

# What every CUDA kernel takes of a GPU, by nvcc: an error where one spills without a written reason.
cuda-check:
	$(PYTHON) tools/cuda_check.py

# The kernels for 64-bit Arm, which this machine need not be: a kernel of every room against plain loops, under qemu-user.
NEON_CXX     ?= aarch64-linux-gnu-g++
NEON_RUN     ?= qemu-aarch64
NEON_FLAGS   := -std=gnu++20 -O1 -Wall -Wextra -fno-math-errno -fno-trapping-math -fopenmp -DLK_ISA=neon -DLK_ISA_NEON
NEON_OBJECTS := $(patsubst %.cpp,build/neon/%.o,$(wildcard csrc/*/*.cpp tests/neon/*.cpp))
neon: build/neon/smoke
	OMP_NUM_THREADS=2 $(NEON_RUN) $<

build/neon/smoke: $(NEON_OBJECTS)
	$(NEON_CXX) -static -fopenmp $^ -o $@

build/neon/%.o: %.cpp
	@mkdir -p $(@D)
	$(NEON_CXX) $(NEON_FLAGS) -MMD -c $< -o $@
-include $(NEON_OBJECTS:.o=.d)

# Where the cycles of one room's benchmark go: make profile OP=rope (needs perf).
profile: env
	perf record -g -o build/perf.data $(VENV)/python benchmarks/bench_$(OP).py
	perf report -i build/perf.data --stdio | head -60

clean:
	rm -rf build .venv llamakern/*.so
