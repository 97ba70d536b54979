#!/bin/sh
# The same short distillation on one GPU, on two, and on two that are killed (SIGKILL) half-way and go on.
# usage: two_gpus.sh TEACHER OUT. Compare the curves with two_gpus.py OUT.
set -eu
teacher=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
train="-m turbowan train rcm --teacher $teacher --config $here/two-gpus.toml"
two="-m torch.distributed.run --standalone --nproc-per-node 2 $train"
mkdir -p "$out"
CUDA_VISIBLE_DEVICES=${ONE:-0} python3 $train --out "$out/one" > "$out/one.log" 2>&1
python3 $two --out "$out/two" > "$out/two.log" 2>&1
python3 $two --out "$out/killed" > "$out/killed.log" 2>&1 &
until [ -d "$out/killed/step-00000025" ] || ! kill -0 $! 2> /dev/null; do sleep 0.1; done
pkill -KILL -f "rcm.*--out $out/killed" || true
wait
python3 $two --out "$out/killed" >> "$out/killed.log" 2>&1
