#!/usr/bin/env bash
# Install without network, run the GPU tests, then the benchmark, and leave every result in one folder.
#
#   benchmarks/gpu.sh OUT [--wheels DIR] [--parts "install tests time masks small memory"] [--minutes 9] [--toy]
#
# Needs torch, triton, pytest, numpy, rich and matplotlib. DIR may hold wheels of the peers (trl, datasets, dill,
# multiprocess, xxhash, liger_kernel, cut_cross_entropy), installed without their dependencies; a missing peer is a line
# in the log. Each part runs under what is left of its time; what was measured until then stays in OUT.
# --toy: every part on the CPU at toy shapes, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift
parts="install tests time masks small memory" minutes=9 wheels="" toy=""
known=$parts
while [ $# -gt 0 ]; do
    [ "$1" = --toy ] && toy=1 && shift && continue
    [ $# -ge 2 ] || usage
    case $1 in
        --wheels) wheels=$2 ;;
        --parts) parts=$2 ;;
        --minutes) minutes=$2 ;;
        *) usage ;;
    esac
    shift 2
done
for name in $parts; do
    case " $known " in *" $name "*) ;; *) echo "no part $name; they are: $known"; exit 2 ;; esac
done
case $minutes in ''|*[!0-9]*) echo "--minutes takes a whole number, got $minutes"; exit 2 ;; esac
python=${PYTHON:-python3}
end=$((SECONDS + minutes * 60))
failed=""

# part NAME SECONDS COMMAND...: at most so long, and never past the end
part() {
    local name=$1 most=$2 started=$SECONDS; shift 2
    case " $parts " in *" $name "*) ;; *) return 0 ;; esac
    local left=$((end - SECONDS)); [ $left -lt "$most" ] && most=$left
    if [ "$most" -le 0 ]; then echo "== $name: no time left"; failed="$failed $name"; return 0; fi
    echo "== $name: at most $most s" | tee -a "$out/log.txt"
    timeout --signal=INT --kill-after=15 "$most" "$@" 2>&1 | tee -a "$out/log.txt"
    local code=${PIPESTATUS[0]}
    echo "== $name: exit $code after $((SECONDS - started)) s" | tee -a "$out/log.txt"
    [ "$code" -eq 0 ] || failed="$failed $name"
}

pip_install() { "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$@"; }
install_all() {
    pip_install --no-build-isolation --editable . || return 1
    [ -z "$wheels" ] || pip_install "$wheels"/*.whl
}
export -f pip_install install_all
export python wheels

bench=("$python" -m benchmarks run --out "$out")
if [ -n "$toy" ]; then
    export TRITON_INTERPRET=1
    tests="tests/test_gpu.py tests/test_losses.py"
    shape="--shapes 32x256 --tokens 64 --rounds 1 --device cpu --dtype float32"
    names=(--providers alignloss "full logits")
    time_cases=$shape mask_cases="$shape --masked 0.5" small_cases=$shape memory_cases=$shape
    kind=toy
else
    tests="tests/test_gpu.py tests/test_kernels.py tests/test_exactness.py tests/test_onepass.py"
    names=()
    common="--device cuda --dtype bfloat16"
    time_cases="--shapes llama-3-8b qwen2.5-0.5b llama-3.2-1b gemma-2-2b --tokens 8192 --rounds 11 $common"
    mask_cases="--shapes llama-3-8b --tokens 8192 --masked 0.5 0.9 --rounds 7 $common"
    small_cases="--shapes smollm2-135m --tokens 512 2048 --rounds 51 $common"
    memory_cases="--shapes llama-3-8b --tokens 8192 $common"
    kind=gpu
fi

part install 40 bash -c install_all
# shellcheck disable=SC2086  # the cases are lists of words
{
    part tests 150 "$python" -m pytest -q -W default -p no:cacheprovider --color=no $tests
    part time 150 "${bench[@]}" --name $kind-time $time_cases --measure time error ${names[@]+"${names[@]}"}
    part masks 60 "${bench[@]}" --name $kind-masks $mask_cases --measure time ${names[@]+"${names[@]}"}
    part small 45 "${bench[@]}" --name $kind-small $small_cases --measure time error ${names[@]+"${names[@]}"}
    part memory 110 "${bench[@]}" --name $kind-memory $memory_cases --measure memory ${names[@]+"${names[@]}"}
}
if [ -n "$failed" ]; then echo "== not finished:$failed"; exit 1; fi
echo "== everything finished after $SECONDS s"
