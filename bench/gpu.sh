#!/usr/bin/env bash
# Everything that a GPU can tell about this package, in one command and under nine minutes:
#
#     bash bench/gpu.sh [FOLDER]
#
# Builds the extension, runs the gpu tests (once more under compute-sanitizer where it is there), then the gpu bench
# file by file, each with a budget of seconds. Rows, tables and plots are in FOLDER (default: out/gpu) after every file,
# so a run cut short keeps what it had. Needs a compiler, torch, triton, numpy and pytest; no network. What needs a
# package that is missing is skipped with the reason; wheels put into bench/wheels/ are installed first.
# Without a GPU it is a dry run: builds, collects, says why nothing is measured, and succeeds.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${1:-out/gpu}")
mkdir -p "$out"
SECONDS=0
TOTAL=520
failed=0
# pytest-timeout, whose setting pyproject.toml has, may be missing
pytest=("$python" -m pytest -q -ra -p no:cacheprovider -W ignore::pytest.PytestConfigWarning)

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"; }

# within SECONDS COMMAND...: runs it in what is left of the whole time; its output goes to the log
within() {
    local limit=$1 left=$((TOTAL - SECONDS))
    shift
    [ "$left" -gt 5 ] || { say "out of time: $*"; return 124; }
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >>"$out/log.txt" 2>&1
}

# importable FILES...: those whose imports are there, into $able; says of the others what is missing
importable() {
    able=()
    while read -r verdict file why; do
        if [ "$verdict" = able ]; then able+=("$file"); else say "skipped: $file: $why"; fi
    done < <("$python" - "$@" <<'END'
import importlib, sys

for file in sys.argv[1:]:
    try:
        importlib.import_module(file.removesuffix(".py").replace("/", "."))
        print("able", file)
    except Exception as error:
        print("not", file, " ".join(str(error).split()))
END
    )
}

: >"$out/log.txt"
rm -f "$out/rows.jsonl"
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

mapfile -t tests < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | sort)
mapfile -t benches < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' bench | sort)
importable "${tests[@]}"
able_tests=("${able[@]}")
importable "${benches[@]}"
able_benches=("${able[@]}")

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >>"$out/log.txt" 2>&1; then
    "${pytest[@]}" -q --collect-only -m gpu "${able_tests[@]}" "${able_benches[@]}" 2>&1 | tee -a "$out/log.txt" | tail -n 3
    collected=${PIPESTATUS[0]}
    say "dry run: no CUDA device, so nothing was run and nothing was measured"
    exit "$collected"
fi
nvidia-smi | tee -a "$out/log.txt"

say "correctness: ${able_tests[*]}"
within 150 "${pytest[@]}" -m gpu "${able_tests[@]}" || { failed=1; say "gpu tests failed or took too long, see log.txt"; }
if command -v compute-sanitizer >/dev/null; then
    for file in tests/kernels/test_mask_loss_gpu.py; do
        within 45 compute-sanitizer --error-exitcode 9 "${pytest[@]}" -x -m gpu "$file" ||
            say "compute-sanitizer: $file: exit code $? (124: out of time, 9: it found something)"
    done
else
    say "skipped: compute-sanitizer is not there"
fi

declare -A budget=([mask_loss]=50 [bridged_attention]=40 [attention]=50 [label_map]=40 [models]=60 [train_step]=50 [systems]=60)
export FASTZS_BENCH_ROWS="$out/rows.jsonl"
for file in "${able_benches[@]}"; do
    name=${file#bench/test_} name=${name%.py}
    say "bench: $file"
    within "${budget[$name]:-30}" "${pytest[@]}" -m gpu "$file" || { failed=1; say "$file: exit code $?, see log.txt"; }
    if [ -s "$FASTZS_BENCH_ROWS" ]; then
        "$python" -m bench report "$FASTZS_BENCH_ROWS" --folder "$out" --no-readme --command "bash bench/gpu.sh" \
            >>"$out/log.txt" 2>&1 || say "no table of $name"
    fi
done
say "done: $out"
exit "$failed"
