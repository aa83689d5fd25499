# Needs Python 3.11 or newer with pip and venv, and nothing else: everything is installed under .venv/.
#
#   make demo        what the shim does, in a few minutes and without a GPU
#   make test        the main promises on the newest libraries; a quarter of an hour on two cores
#   make test-all    all tests except the full sweeps, in three environments; three quarters of an hour on two cores
#   make test-sweeps   the cases that test-all leaves out; half an hour on two cores
#   make lint
#   make check-gpu   what only a GPU can show; nine minutes at most, with the PyTorch of $(PYTHON), which installs nothing
#
#   PYTHON=python3.12 make ...   another interpreter
#   TORCH="torch==2.13.0 --index-url ..." make ...   another build of torch

PYTHON ?= python3
export PYTHON
# The record is what tests/durations.py reads.
PYTEST = -m pytest -q -p no:cacheprovider --junitxml=.cache/durations/$@.xml


demo: .venv/new/.finished
	@.venv/new/bin/python benchmarks/demo.py

check-gpu:
	@$(PYTHON) benchmarks/gpu_check $(GPU_CHECK)

# Two parts at a time, as that is how many cores the machines have that this is made for; long ones first, and those of
# ZeRO-3, which start several processes each, not together. A lane is installed when its first part begins.
NEW = new-training new-zero new-rest new-whole new-placement
ALL = new-zero old-rest new-training new-whole old-zero new-placement new-rest swift

# `make test` leaves out the tests that are marked `exhaustive`, and nothing else of lane `new`. Those are further cases
# of what other tests show, so lane `old` leaves them out, too, unless `make test-all "OLD=not swift"` asks for them.
SELECTED = not swift and not sweep
SAMPLE = not swift and not exhaustive and not sweep
OLD = $(SAMPLE)
IN_PARTS = @$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target

.PHONY: demo check-gpu test test-all test-sweeps lint clean $(addprefix part-,$(ALL))

test: .venv/new/.finished
	$(IN_PARTS) "SELECTED=$(SAMPLE)" $(addprefix part-,$(NEW))

# Both large lanes are there before the first part begins: make would put off those of a lane that is still being made.
test-all: .venv/new/.finished .venv/old/.finished
	@echo "$(words $(ALL)) parts, two at a time; each prints its results when it ends" >&2
	$(IN_PARTS) $(addprefix part-,$(ALL))

test-sweeps: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m sweep

WHOLE = tests/end_to_end tests/simulation tests/monitoring
IGNORE = $(addprefix --ignore=,$(1))

# The demo and the GPU check are about the newest libraries. Settings, the solver, virtual and simulated tensors, records
# of the monitor, and how ranks are started and end are about no transformers. The table of combinations under ZeRO-3 is
# that of the newest libraries. Plans as texts, and measured peaks carried into plans, are behind the seams; micro-batches
# in flight are off by default.
ONCE = tests/arming/test_expandable_segments.py tests/arming/test_packaging.py tests/arming/test_run.py \
	tests/cli/test_options.py tests/cli/test_plans.py tests/device_rules tests/doctor/test_doctor.py \
	tests/end_to_end/test_demo.py tests/end_to_end/test_gpu_check.py tests/end_to_end/test_recipes.py \
	tests/memory/test_peak.py tests/memory/test_temporaries.py tests/monitoring/test_diagnosis.py \
	tests/monitoring/test_history.py tests/monitoring/test_monitor.py tests/monitoring/test_trend.py \
	tests/patching/test_guard.py tests/patching/test_import_hooks.py tests/pipeline tests/placement/test_auto.py \
	tests/placement/test_balance.py tests/placement/test_calibration.py tests/placement/test_fits.py \
	tests/placement/test_movable_pieces.py tests/placement/test_solver.py tests/placement/test_timed_balance.py \
	tests/replicas/test_launch.py tests/replicas/test_ranks.py tests/replicas/test_shares.py tests/report \
	tests/seams/test_peft_tokens.py tests/simulation/test_allocator.py tests/simulation/test_clock.py \
	tests/simulation/test_installation.py tests/simulation/test_memory.py tests/simulation/test_report.py \
	tests/simulation/test_tensors.py tests/test_device_spec.py tests/test_devices.py tests/test_docs.py \
	tests/test_map_file.py tests/test_matrix.py tests/test_messages.py tests/test_settings.py \
	tests/test_translations.py tests/test_units.py tests/timing tests/training/test_rebalance.py \
	tests/zero/test_combinations.py tests/zero/test_differences.py tests/zero/test_ends.py \
	tests/zero/test_examples.py tests/zero/test_launchers.py tests/zero/test_rank_faults.py \
	tests/zero/test_relaunch.py tests/zero/test_root_cause.py tests/zero/test_support.py
DESELECT_ONCE = $(addprefix --deselect=,\
	tests/modes/test_auto.py::test_zero3_is_started_where_it_is_predicted_to_be_fastest \
	tests/modes/test_auto.py::test_micro_batches_in_flight_are_chosen \
	tests/placement/test_verification.py::test_layers_that_differ_in_what_they_recompute_are_tried_out_as_they_are \
	tests/replicas/test_training.py::test_ranks_learn_what_one_process_learns[checkpointing] \
	tests/replicas/test_training.py::test_ranks_learn_what_one_process_learns[sft] \
	tests/training/test_micro_batch.py::test_a_number_that_does_not_divide_is_rounded_down \
	tests/zero/test_parts.py::test_one_rank_alone[merge-leave] tests/zero/test_parts.py::test_one_rank_alone[evaluate-wait] \
	tests/zero/test_training.py::test_two_nodes)

part-new-zero: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "$(SELECTED)" tests/zero

part-new-training: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "$(SELECTED)" tests/training

part-new-placement: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "$(SELECTED)" tests/placement

part-new-whole: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "$(SELECTED)" $(WHOLE)

part-new-rest: .venv/new/.finished
	.venv/new/bin/python $(PYTEST) -m "$(SELECTED)" $(call IGNORE,tests/zero tests/training tests/placement $(WHOLE))

part-old-zero: .venv/old/.finished
	.venv/old/bin/python $(PYTEST) -m "$(OLD)" $(call IGNORE,$(ONCE)) $(DESELECT_ONCE) tests/zero

part-old-rest: .venv/old/.finished
	.venv/old/bin/python $(PYTEST) -m "$(OLD)" $(call IGNORE,tests/zero $(ONCE)) $(DESELECT_ONCE)

part-swift: .venv/swift/.finished
	.venv/swift/bin/python $(PYTEST) -m swift tests/end_to_end

lint: .venv/new/.finished
	.venv/new/bin/ruff check .
	.venv/new/bin/ruff format --check .
	.venv/new/bin/mypy
	.venv/new/bin/codespell

# Without this make would delete the inner mark as an intermediate file, and install everything again.
.PRECIOUS: .venv/%/.packages

.venv/%/.packages: requirements/%.txt requirements/install.sh
	@requirements/install.sh $* .venv/$*
	@touch $@

# The lanes share the package's own build folder.
ONE_AT_A_TIME := $(if $(shell command -v flock),flock .venv/lock)

# Again whenever the package's own metadata changed, which is quick.
.venv/%/.finished: .venv/%/.packages setup.cfg pyproject.toml
	@$(ONE_AT_A_TIME) .venv/$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .cache
