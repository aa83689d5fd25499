# Needs Python 3.11 or newer with pip and venv, and nothing else: everything is installed under .venv/.
#
#   make demo        what the shim does, in a few minutes and without a GPU
#   make test        all tests, in three environments; about three quarters of an hour on two cores
#   make test-fast   without the slow ones; minutes
#   make lint
#   make check-gpu   what only a GPU can show; nine minutes at most, with the PyTorch of $(PYTHON), which installs nothing
#
#   PYTHON=python3.12 make ...   another interpreter
#   TORCH="torch==2.13.0 --index-url ..." make ...   another build of torch

PYTHON ?= python3
export PYTHON
PYTEST = -m pytest -q -p no:cacheprovider

.PHONY: demo check-gpu test test-new test-old test-swift test-fast lint clean

demo: .venv/new/.finished
	@.venv/new/bin/python benchmarks/demo.py

check-gpu:
	@$(PYTHON) benchmarks/gpu_check $(GPU_CHECK)

# Side by side, as that is how many cores the machines have that this is made for; the shorter two take turns, and are
# installed when it is theirs.
test: .venv/new/.finished
	@mkdir -p .cache
	@$(MAKE) --no-print-directory --keep-going test-old test-swift >.cache/test-others.log 2>&1 & others=$$!; \
	$(MAKE) --no-print-directory test-new; new=$$?; \
	wait $$others; others=$$?; cat .cache/test-others.log; \
	test "$$new$$others" = 00 || { echo "exit codes: new $$new, old and swift $$others"; exit 1; }

test-new: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "not swift"

# The demo and the GPU check are about the newest libraries. Settings, the solver, virtual and simulated tensors, records
# of the monitor, and how ranks are started and end are about no transformers. The table of combinations under ZeRO-3 is
# that of the newest libraries.
ONCE = tests/activation/test_expandable_segments.py tests/activation/test_packaging.py tests/activation/test_run.py \
	tests/device_rules tests/end_to_end/test_demo.py tests/end_to_end/test_gpu_check.py tests/memory/test_compose.py \
	tests/memory/test_temporaries.py tests/monitoring/test_growth.py tests/monitoring/test_history.py \
	tests/monitoring/test_steady.py tests/placement/test_fits.py tests/placement/test_map_file.py \
	tests/placement/test_measured.py tests/placement/test_movable.py tests/placement/test_solver.py \
	tests/seams/test_guard.py tests/seams/test_hooks.py tests/simulation/test_allocator.py \
	tests/simulation/test_installation.py tests/simulation/test_memory.py tests/simulation/test_report.py \
	tests/simulation/test_spec.py tests/simulation/test_tensors.py tests/test_devices.py tests/test_docs.py \
	tests/test_settings.py tests/test_units.py tests/zero/test_combinations.py tests/zero/test_ends.py \
	tests/zero/test_examples.py tests/zero/test_launchers.py tests/zero/test_relaunch.py tests/zero/test_support.py
ONCE_OF_ZERO = tests/zero/test_training.py::test_two_nodes

# Its trainings in several processes come first, because those of the other lane come last.
test-old: .venv/old/.finished
	.venv/old/bin/python $(PYTEST) $(addprefix --ignore=,$(ONCE)) --deselect $(ONCE_OF_ZERO) tests/zero; zero=$$?; \
	.venv/old/bin/python $(PYTEST) -m "not swift" --ignore=tests/zero $(addprefix --ignore=,$(ONCE)); \
	test "$$zero$$?" = 00

test-swift: .venv/swift/.finished
	.venv/swift/bin/python $(PYTEST) -m swift tests/end_to_end

test-fast: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "not swift and not slow"

lint: .venv/new/.finished
	.venv/new/bin/ruff check .
	.venv/new/bin/ruff format --check .
	.venv/new/bin/mypy

# One at a time: the lanes share the package's own build folder.
.NOTPARALLEL:
# Without this make would delete the inner mark as an intermediate file, and install everything again.
.PRECIOUS: .venv/%/.packages

.venv/%/.packages: requirements/%.txt requirements/install.sh
	@requirements/install.sh $* .venv/$*
	@touch $@

# Again whenever the package's own metadata changed, which is quick.
.venv/%/.finished: .venv/%/.packages setup.cfg pyproject.toml
	@.venv/$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .cache
