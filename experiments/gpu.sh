#!/usr/bin/env bash
# What only a GPU can tell, in one command and eight minutes at most: the tests, the speed of a step, the price of the
# loss, and the first minutes of the preset tinystories.
#
#   bash experiments/gpu.sh                # writes to experiments/results/gpu, or to the folder $OUT
#   bash experiments/gpu.sh --rehearse     # all of it in small, on a CPU, in half a minute
#
# It needs no network. The tests need pytest, one contender of the benchmark transformers. The text is data/tinystories
# if that was prepared, else the source of Python's standard library, in GPT-2's tokens where its vocabulary is at hand.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${OUT:=$root/experiments/results/gpu}"
OUT=$(realpath "$OUT")
export PYTHONUNBUFFERED=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

part() {  # NAME SECONDS COMMAND...: runs it for at most so long; one that fails does not stop the others
    local name=$1 code=0
    SECONDS=0
    timeout -s INT -k 10 "$2" python3 "${@:3}" || { code=$? && failed=1; }
    echo "==== $name: $([ $code = 0 ] && echo "done" || echo "FAILED with code $code") after $SECONDS s"
}

text() {  # sets $data
    data=$root/data/tinystories
    [ ! -e "$data/meta.json" ] || return 0
    local tokenizer=gpt2 library
    data=$work/data
    library=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    timeout 20 python3 -c 'import tiktoken; tiktoken.get_encoding("gpt2")' 2> /dev/null || tokenizer=bytes
    find "$library" -name '*.py' -size +0 ! -path "$library/*test*" ! -path '*-packages/*' -print0 |
        xargs -0 python3 "$root/prepare_data.py" --out "$data" --tokenizer $tokenizer
}

all() {
    failed=0
    tests=(-m gpu) rounds=(--seconds 30)
    steps=(--steps 300 --warmup 50 --eval-every 100 --log-every 20 --save-every 0)
    if [ "${1:-}" = --rehearse ]; then
        export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
        tests=(-m slow -k "loop_over_experts or on_a_cpu") rounds=(--quick --rounds 2) data=$work/data
        python3 "$root/prepare_data.py" demo --out "$data" --max-tokens 20000
        steps=(--steps 4 --warmup 1 --eval-every 2 --log-every 1 --device cpu --context-length 32 --batch-size 2
               --accumulate 1 --n-layers 2 --n-heads 2 --d-model 32 --d-expert 16 --n-experts 4 --top-k 2)
    else
        python3 -c 'import sys, torch
torch.cuda.is_available() or sys.exit("gpu.sh: error: no GPU here; to see the script run, add --rehearse")
print(torch.__version__, torch.cuda.get_device_properties(0))' || return
        text || return
    fi
    part tests 120 -m pytest -c "$root/pytest.ini" -p no:cacheprovider "${tests[@]}" "$root/tests/test_gpu.py"
    part step 60 "$root/experiments/bench.py" --only step "${rounds[@]}" --out "$OUT"
    part erc 60 "$root/experiments/bench.py" --only erc "${rounds[@]}" --out "$OUT"
    part train 200 "$root/train.py" --preset tinystories --data "$data" --out "$work/run" "${steps[@]}"
    cp "$work/run/log.csv" "$OUT/train.csv"
    return $failed
}
all "$@" 2>&1 | tee "$OUT/gpu.log"
