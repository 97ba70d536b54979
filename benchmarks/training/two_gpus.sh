#!/bin/sh
# The same short distillation on one GPU, on two, and on two that are killed (SIGKILL) half-way and go on.
# usage: two_gpus.sh TEACHER OUT [CONFIG]. Compare the curves with two_gpus.py OUT. PYTHON names the interpreter.
# The kill waits for a state at half of the steps, so a CONFIG of one's own needs a small save_minutes, too. Without GPUs
# all three run on the CPU.
set -eu
teacher=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
config=${3:-$here/two-gpus.toml}
python=${PYTHON:-python3}
train="-m turbowan train rcm --teacher $teacher --config $config"
two="-m torch.distributed.run --standalone --nproc-per-node 2 $train"
half=$(sed -n 's/^steps *= *\([0-9]*\).*/\1/p' "$config")
half=$((half / 2))

newest() { # step of the newest state of a run, 0 without any
    ls "$1" 2> /dev/null | sed -n 's/^step-0*//p' | sort -n | tail -n 1 | grep . || echo 0
}

mkdir -p "$out"
CUDA_VISIBLE_DEVICES=${ONE:-0} "$python" $train --out "$out/one" > "$out/one.log" 2>&1
"$python" $two --out "$out/two" > "$out/two.log" 2>&1
"$python" $two --out "$out/killed" > "$out/killed.log" 2>&1 &
launcher=$!
while [ "$(newest "$out/killed")" -lt "$half" ] && kill -0 $launcher 2> /dev/null; do sleep 0.1; done
if ! kill -KILL $launcher $(pgrep -P $launcher) 2> /dev/null; then # the launcher and its two processes, by id
    echo "the run ended before it could be killed; see $out/killed.log" >&2
    exit 1
fi
wait $launcher || true
echo "killed at step $(newest "$out/killed")" | tee -a "$out/killed.log"
"$python" $two --out "$out/killed" >> "$out/killed.log" 2>&1
