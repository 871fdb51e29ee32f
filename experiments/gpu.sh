#!/usr/bin/env bash
# All that needs a GPU, in one command and 8 minutes: tests, benchmark, a longer miniature, a run on real text.
#
#   bash experiments/gpu.sh                # writes to experiments/results/gpu, or to the folder $OUT
#   bash experiments/gpu.sh long text      # only these of: tests bench long text compiled
#   bash experiments/gpu.sh --rehearse     # all parts in small, on a CPU, in about a minute
#
# It needs torch, tiktoken and tqdm, and no network; the tests need pytest, one contender of the benchmark transformers.
# TEXT names a folder of .txt files to train on. Without it, the text is the source of Python's standard library. Tokens
# are GPT-2's where their vocabulary is at hand (TIKTOKEN_CACHE_DIR), else bytes. LIMIT, in seconds, is for all parts
# together. Each part is bounded, so that a late one cannot cost an early one what it has written.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${OUT:=$root/experiments/results/gpu}"
OUT=$(realpath "$OUT") TEXT=${TEXT:+$(realpath "$TEXT")} LIMIT=${LIMIT:-470}
[[ -z ${TIKTOKEN_CACHE_DIR:-} ]] || TIKTOKEN_CACHE_DIR=$(realpath "$TIKTOKEN_CACHE_DIR")
export PYTHONUNBUFFERED=1 PYTHONPATH=$root:$root/experiments
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

rehearse= failed=0
[[ ${1:-} != --rehearse ]] || { rehearse=yes; shift; }
parts=" ${*:-tests bench long text compiled} "
tests=(-m gpu) rounds=(--rounds 30 --seconds 6)
text=(--steps 600 --warmup 100 --eval-every 200 --log-every 50)
long=("$root/experiments/reproduce.py" --long --out "$OUT" --budget 60)
if [[ $rehearse ]]; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    tests=(-m slow -k "loop_over_experts or formula") rounds=(--quick --rounds 2)
    text=(--steps 4 --warmup 1 --eval-every 2 --log-every 1 --device cpu --context-length 32 --batch-size 2 --accumulate
          1 --n-layers 2 --n-heads 2 --d-model 32 --d-expert 16 --n-experts 4 --top-k 2 --sample-tokens 20)
    long=(-c "import reproduce; reproduce.long_runs(1, '$OUT', 1)")
fi

prepare() {  # the data of all parts, while the tests run
    local tokenizer=gpt2 files=() folder
    if [[ $rehearse ]]; then
        mkdir text
        printf 'The fox number %s sings under the moon.\n<|endoftext|>\n' {1..200} > text/fox.txt
        python3 "$root/prepare_data.py" text --out data/demo --tokenizer bytes
        cp -r data/demo data/long
        TEXT=$work/text
    else
        timeout -k 5 60 python3 "$root/prepare_data.py" demo
        timeout -k 5 90 python3 -c 'import pathlib, reproduce
if __name__ == "__main__": reproduce.prepare_long(pathlib.Path("data/long"), 7_000_000)'
    fi
    timeout -k 5 20 python3 -c 'import tiktoken; tiktoken.get_encoding("gpt2")' 2> /dev/null || tokenizer=bytes
    folder=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    mapfile -t files < <(find "$folder" -name '*.py' -type f -size +0 ! -path "$folder/*test*" ! -path '*-packages/*')
    [[ -z $TEXT ]] || files=("$TEXT")
    timeout -k 5 100 python3 "$root/prepare_data.py" "${files[@]}" --out data/text --tokenizer "$tokenizer"
}

part() {  # NAME SECONDS COMMAND...: runs it for at most so long; one that fails does not stop the others
    local name=$1 seconds=$2 from=$SECONDS code=0
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    (( seconds < LIMIT - SECONDS )) || seconds=$((LIMIT - SECONDS))
    echo "==== $name: at $SECONDS s, for at most $seconds s"
    if (( seconds > 15 )); then timeout -s INT -k 10 "$seconds" python3 "$@" || code=$?; else code=124; fi
    (( code == 0 )) || failed=1
    if (( code == 0 )); then code="done"; else code="FAILED with code $code"; fi
    echo "==== $name: $code after $((SECONDS - from)) s"
}

all() {
    date -u
    echo "sha256 of the code: $(cat "$root"/*.py "$root"/experiments/*.py "$root/tests/test_gpu.py" | sha256sum)"
    python3 - "$rehearse" << 'END' || exit 1
import importlib.util, platform, sys, torch
gpu = torch.cuda.is_available()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Python", platform.python_version(), *(
    f"{name} {bool(importlib.util.find_spec(name))}" for name in ("pytest", "transformers")))
if gpu:
    print(torch.cuda.get_device_properties(0))
elif not sys.argv[1]:
    sys.exit("gpu.sh: error: no GPU here; to see the script run, add --rehearse")
END
    prepare > prepare.log 2>&1 &
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} part tests 100 -m pytest -c "$root/pytest.ini" -p no:cacheprovider \
        "${tests[@]}" "$root/tests/test_gpu.py"
    wait
    cat prepare.log
    part bench 110 "$root/experiments/bench.py" "${rounds[@]}" --out "$OUT"
    part long 110 "${long[@]}"
    part text 80 "$root/train.py" --preset tinystories --data data/text --out run --save-every 0 "${text[@]}"
    part compiled "$LIMIT" "$root/experiments/bench.py" "${rounds[@]}" --out "$OUT" --compile --only presets
    [[ ! -f run/log.csv ]] || cat run/log.csv
    return $failed
}
all 2>&1 | tee -a "$OUT/gpu.log"
