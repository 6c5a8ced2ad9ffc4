#!/usr/bin/env bash
# Everything that a GPU can tell about this package, in one command and under nine minutes:
#
#     bash bench/gpu.sh [FOLDER]            # default: out/gpu; once more: goes on where it was cut short
#     bash bench/gpu.sh FOLDER --again      # everything anew
#
# Builds the extension (within 40 seconds on 16 cores), then runs the stages of bench/gpu_stages.py, each with a budget of
# seconds: correctness op by op, tiles, the bench file by file, profiles. Results are in FOLDER as they come, and
# FOLDER/gpu.md is the page made of them. Needs torch, triton, numpy and pytest, a C compiler for Triton, nvcc for the
# CUDA backends; no network. Stages whose program is missing are skipped with the reason; wheels in bench/wheels/ are
# installed first. Without a GPU it is a dry run: every stage in a small form, nothing measured.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${1:-out/gpu}")
mkdir -p "$out"
SECONDS=0
TOTAL=520

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"; }

within() {
    local limit=$1
    shift
    timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1
}

if compgen -G "bench/wheels/*.whl" >/dev/null; then
    within 60 "$python" -m pip install --no-index --no-deps bench/wheels/*.whl || say "some wheels could not be installed"
fi
say "build (FASTZS_BUILD=${FASTZS_BUILD:-auto})"
if ! within 240 "$python" -m pip install --no-index --no-deps --no-build-isolation -e .; then
    say "no editable install: built in place, and the packages linked together"
    within 240 "$python" setup.py build_ext --inplace || say "the extension was not built: Triton and PyTorch only"
    mkdir -p "$out/path/fastzs"
    ln -sfn "$PWD"/fastzs/* "$PWD/kernels" "$out/path/fastzs/"
    export PYTHONPATH="$out/path:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c "import json; from fastzs.kernels import extension; print(json.dumps(extension.build_report()))" |
    tee -a "$out/log.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true
if command -v nvidia-smi >/dev/null; then nvidia-smi >"$out/nvidia-smi.txt" 2>&1; fi
within 60 "$python" -m fastzs doctor && say "doctor: see log.txt"

"$python" -m bench.gpu_stages "$out" --total $((TOTAL - SECONDS)) "${@:2}" | tee -a "$out/log.txt"
failed=${PIPESTATUS[0]}
"$python" -m bench gpu-report "$out" >>"$out/log.txt" 2>&1 || say "no page: see log.txt"
say "done: $out/gpu.md"
exit "$failed"
