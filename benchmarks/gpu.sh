#!/usr/bin/env bash
# Install without network, run the GPU tests, then the benchmark, and leave every result in one folder.
#
#   benchmarks/gpu.sh OUT [--wheels DIR] [--parts "install tests ..."] [--minutes 30] [--toy]
#
# By default everything, in an order that puts first what the rest relies on. Where a command may take ten minutes:
#   --minutes 9 --parts "install tests sanitize"
#   --minutes 9 --parts "install time masks small budget profile kernels"
#   --minutes 9 --parts "install tokens vocabulary memory longest"
#   --minutes 9 --parts "install steps trainers"
# Needs torch, triton, pytest, pytest-xdist, numpy, rich, matplotlib, transformers and peft. DIR may hold wheels of the
# peers (trl, datasets, dill, multiprocess, xxhash, liger_kernel, cut_cross_entropy), installed without their
# dependencies; a missing peer is a line in the log. Each part runs under what is left of its time; what was measured
# until then stays in OUT.
# ALIGNLOSS_COMMIT names the commit where the copy has no history.
# --toy: every part on the CPU at toy shapes, to try the script itself.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,17s/^# \{0,1\}//p' "$root/benchmarks/gpu.sh"; exit 2; }
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift
parts="install tests sanitize time masks small budget profile kernels tokens vocabulary memory longest steps trainers"
minutes=30 wheels="" toy="" known=$parts
while [ $# -gt 0 ]; do
    [ "$1" = --toy ] && toy=1 && shift && continue
    [ $# -ge 2 ] || usage
    case $1 in
        --wheels) wheels=$(cd "$2" && pwd) || exit 2 ;;
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
cd "$root"
python=${PYTHON:-python3}
end=$((SECONDS + 10#$minutes * 60))
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
    # without a setuptools that knows this pyproject.toml, the checkout itself is on the path
    pip_install --no-build-isolation --editable . || ln -sfn ../kernels alignloss/kernels || return 1
    [ -z "$wheels" ] || pip_install "$wheels"/*.whl
}
export -f pip_install install_all
export python wheels

pytest=("$python" -m pytest -q -W default -p no:cacheprovider --color=no)
if [ -n "$toy" ]; then
    export TRITON_INTERPRET=1
    small_tests=tests/test_losses.py gpu_tests=tests/test_gpu.py sanitizer="env TOOL="
    on="--device cpu --dtype float32 --rounds 1" kind=toy
    large="--shapes 32x256 --tokens 64" models=$large small=$large long="$large --memory 0.002" grown=$large
    vocabulary="--shapes 32x256 --tokens 64" vocabularies="256 512" tokens="--shapes 32x256 --tokens 64 128"
    steps="--shapes smollm2-135m --lengths 8" deep=$steps largest=$steps
    trainers="--shapes smollm2-135m --lengths 16"
else
    # several processes compile kernels side by side; three hold the largest problems in 80 GB
    small_tests="-n 12 tests/test_kernels.py tests/test_exactness.py tests/test_onepass.py"
    gpu_tests="-n 3 tests/test_gpu.py"
    # without torch's cache of memory an access beyond a tensor is one beyond its allocation
    sanitizer="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=wd_kernel --error-exitcode 9 --tool "
    on="--device cuda --dtype bfloat16" kind=gpu
    large="--shapes llama-3-8b --tokens 8192"
    models="--shapes llama-3-8b qwen2.5-0.5b llama-3.2-1b gemma-2-2b --tokens 8192 --rounds 11"
    small="--shapes smollm2-135m --tokens 512 2048 --rounds 51"
    tokens="--shapes llama-3.2-1b --tokens 2048 8192 32768 --rounds 5"
    vocabulary="--shapes llama-3.2-1b --tokens 8192 --rounds 5" vocabularies="32768 65536 131072 262144"
    grown="--shapes llama-3-8b --tokens 8192 32768 131072"
    long="$large --pairs 1 --most 1048576"
    steps="--shapes qwen2.5-0.5b llama-3.2-1b --lengths 2048 8192 --masked 0.5 --rounds 3"
    deep="--shapes llama-3.2-1b --lengths 32768 --rounds 2"
    largest="--shapes gemma-2-2b llama-3-8b --lengths 4096 --masked 0.5 --rounds 2"
    trainers="--shapes qwen2.5-0.5b --lengths 2048 --pairs 2 --prompts 0.25 0.75 --rounds 3"
fi

# shellcheck disable=SC2086  # the cases are lists of words
bench() {  # PART SECONDS COMMAND NAME ARGUMENTS...
    local name=$1 most=$2 command=$3 file=$4; shift 4
    part "$name" "$most" "$python" -m benchmarks "$command" --out "$out" --name "$kind-$file" $on "$@"
}
few=(--providers alignloss "full logits" TRL)
several=(--providers alignloss "full logits" TRL Liger "CCE exact")
training=(--modes "frozen head" "DPO step")

part install 60 bash -c install_all
# shellcheck disable=SC2086
{
    part tests 240 "${pytest[@]}" $small_tests
    part tests 240 "${pytest[@]}" $gpu_tests
    for tool in memcheck racecheck synccheck; do
        part sanitize 120 $sanitizer$tool "${pytest[@]}" tests/test_kernels.py
    done
    bench time 170 run time $models --measure time error
    bench masks 60 run masks $large --masked 0.5 0.9 --measure time
    bench small 60 run small $small --measure time error
    bench budget 50 run budget $large --workspace 512 --modes "DPO step" --measure time memory \
        --providers alignloss TRL
    bench profile 40 run profile $models --measure profile --providers alignloss
    bench kernels 120 kernels kernels $models
    bench tokens 150 run tokens $tokens --measure time memory error "${training[@]}" "${several[@]}"
    bench vocabulary 150 run vocabulary $vocabulary --vocabulary $vocabularies --measure time memory error \
        "${training[@]}" "${several[@]}"
    bench memory 60 run memory $grown --measure memory --providers alignloss
    bench longest 180 run longest $long --measure longest "${training[@]}" "${several[@]}"
    bench steps 150 step steps $steps --train full lora --optimizer "${few[@]}"
    bench steps 90 step steps-long $deep --train full lora --optimizer --checkpointing "${few[@]}"
    bench steps 90 step steps-largest $largest --train full lora --optimizer --checkpointing "${few[@]}"
    bench trainers 90 step trainers --trainers $trainers
}
# one file to carry, made elsewhere: a folder that changes while it is read is an error to tar
archive=$(mktemp)
tar -czf "$archive" -C "$out" --exclude results.tar.gz . && mv "$archive" "$out/results.tar.gz" || failed="$failed archive"
if [ -n "$failed" ]; then echo "== not finished:$failed"; exit 1; fi
echo "== everything finished after $SECONDS s"
