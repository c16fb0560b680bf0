#!/usr/bin/env bash
# What runs on a GPU machine: the GPU tests, the benchmarks, then CIFAR-10 pretraining with gcvit_xxtiny in bf16.
#   bash scripts/gpu_suite.sh CIFAR10_FOLDER RESULTS_FOLDER MINUTES [tests] [bench] [pretrain]
# CIFAR10_FOLDER holds train-*.parquet and test-*.parquet; without a part named, all three run. What they measure is in
# RESULTS_FOLDER. Everything is cut at MINUTES; pretraining goes on where it was when the same call is made again.
# EPOCHS (default 100) is the length of a pretraining, OBJECTIVES (default "joint mocov3 simmim") what is pretrained, MORE
# further options of it.
set -uo pipefail
data=$(realpath "$1") results=$(realpath -m "$2") minutes=$3
shift 3
parts="${*:-tests bench pretrain}"
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

if [[ " $parts " == *" tests "* ]]; then
    timeout "$(left 3)" "$python" -m pytest -q -n 8 tests -m gpu 2>&1 | tee "$results/tests.txt" | tail -n 30
fi

if [[ " $parts " == *" bench "* ]]; then
    timeout "$(left)" "$python" -m scripts.bench 2>&1 | tee "$results/bench.txt"
    find docs/results -name "bench-*" -newer "$results/gpu.csv" -exec cp {} "$results" \;
fi

if [[ " $parts " == *" pretrain "* ]]; then
    objectives=(${OBJECTIVES:-joint mocov3 simmim})
    share=${#objectives[@]}
    for objective in "${objectives[@]}"; do
        run=runs/gpu_$objective
        timeout -s TERM "$(left $share)" "$python" pretrain.py configs/pretrain/cifar10_xxtiny.yaml \
            objective.name="$objective" data.path="$data" out="$run" train.epochs="${EPOCHS:-100}" ${MORE:-} 2>&1 |
            tee "$results/$objective.txt" | tail -n 40
        for evaluation in knn linear_probe; do
            timeout "$(left)" "$python" -m gcssl.eval.$evaluation backbone="$run" compare=random 2>&1 |
                tee -a "$results/$objective.txt"
        done
        keep "$run"
        share=$(( share - 1 ))
    done
fi
