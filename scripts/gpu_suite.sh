#!/usr/bin/env bash
# What runs on a GPU machine: the GPU tests, the benchmarks, then CIFAR-10 with gcvit_xxtiny in bf16: pretraining, and the
# supervised baseline beside fine-tuning from each.
#   bash scripts/gpu_suite.sh CIFAR10_FOLDER RESULTS_FOLDER MINUTES [tests] [bench] [pretrain] [finetune]
# CIFAR10_FOLDER holds train-*.parquet and test-*.parquet; without a part named, all four run. What they measure is in
# RESULTS_FOLDER. Everything is cut at MINUTES; pretraining goes on where it was when the same call is made again.
# EPOCHS (default 100) is the length of a pretraining, OBJECTIVES (default "joint mocov3 simmim") what is pretrained, MORE
# further options of it; FINETUNE_EPOCHS (default "20 40") the lengths of a fine-tuning, each of all, FINETUNE_MORE its options.
set -uo pipefail
data=$(realpath "$1") results=$(realpath -m "$2") minutes=$3
shift 3
parts="${*:-tests bench pretrain finetune}"
cd "$(dirname "$0")/.."
mkdir -p "$results"
python=${PYTHON:-python3}
"$python" -c "import gcssl.pretrain, datasets, faiss, tensorboard, xdist" || { echo "install what is missing first" >&2; exit 2; }
end=$(( $(date +%s) + minutes * 60 ))
left() { local s=$(( (end - $(date +%s)) / ${1:-1} )); echo $(( s > 1 ? s : 1 )); }  # a part of what is left
keep() {  # the small files of a run folder and of its evaluations
    local out="$results/$(basename "$1")"
    mkdir -p "$out"
    (cd "$1" && find . -maxdepth 3 \( -name "*.json*" -o -name config.yaml \) -not -path "./checkpoints/*" -exec cp --parents {} "$out" \;)
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

if [[ " $parts " == *" finetune "* ]]; then
    for epochs in ${FINETUNE_EPOCHS:-20 40}; do
        for start in none ${OBJECTIVES:-joint mocov3 simmim}; do
            run=runs/gpu_$start from=("backbone=runs/gpu_$start")
            [[ $start == none ]] &&
                from=(backbone=none out=$run/eval model.name=gcvit_xxtiny model.img_size=64 'model.window_ratio=[16,16,16,32]')
            timeout -s TERM "$(left)" "$python" -m gcssl.eval.finetune configs/eval/finetune_demo.yaml "${from[@]}" \
                name="finetune_$epochs" data.path="$data" train.epochs="$epochs" train.warmup_epochs=1 train.batch_size=256 \
                train.lr_base=256 train.precision=bf16 model.drop_path=0.1 data.workers=12 ${FINETUNE_MORE:-} 2>&1 |
                tee "$results/finetune_${start}_$epochs.txt" | tail -n 20
            keep "$run"
        done
    done
fi
