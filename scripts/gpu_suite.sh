#!/usr/bin/env bash
# What runs on a GPU machine, in one call: the GPU tests, then CIFAR-10 pretraining with gcvit_xxtiny in bf16.
#   bash scripts/gpu_suite.sh CIFAR10_FOLDER RESULTS_FOLDER [MINUTES]
# CIFAR10_FOLDER holds train-*.parquet and test-*.parquet. Everything it measures is in RESULTS_FOLDER.
# Runs are cut at MINUTES (default 9) in all and resume when the same call is made again.
set -uo pipefail
data=$(realpath "$1") results=$(realpath -m "$2") minutes=${3:-9}
cd "$(dirname "$0")/.."
mkdir -p "$results"
python=${PYTHON:-python3}
end=$(( $(date +%s) + minutes * 60 ))
left() { local s=$(( (end - $(date +%s)) / ${1:-1} )); echo $(( s > 1 ? s : 1 )); }  # a part of what is left
keep() {  # the small files of a run folder
    local out="$results/$(basename "$1")"
    mkdir -p "$out"
    cp -r "$1"/{config.yaml,env.json,status.json,metrics.jsonl,eval} "$out" 2>/dev/null
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$results/gpu.csv"
timeout "$(left)" "$python" -m pytest -q tests -m gpu 2>&1 | tee "$results/tests.txt"

share=3
for objective in joint mocov3 simmim; do
    run=runs/gpu_$objective
    timeout -s TERM "$(left $share)" "$python" pretrain.py configs/pretrain/cifar10_xxtiny.yaml objective.name=$objective \
        data.path="$data" out="$run" 2>&1 | tee "$results/$objective.txt"
    for evaluation in knn linear_probe; do
        timeout "$(left)" "$python" -m gcssl.eval.$evaluation backbone="$run" compare=random 2>&1 | tee -a "$results/$objective.txt"
    done
    keep "$run"
    share=$(( share - 1 ))
done
