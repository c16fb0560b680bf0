#!/usr/bin/env bash
# The study of docs/results/cifar10_12k, a part a call (one thread each: two calls keep two cores busy).
#   DATA=cifar10_12k bash scripts/cifar_study.sh pretrain joint        # mocov3 | joint | simmim, then kNN and linear probe
#   DATA=cifar10_12k bash scripts/cifar_study.sh grid joint            # joint, ... or none (supervised), random
#   DATA=cifar10_12k bash scripts/cifar_study.sh final joint 20 light 1.0e-3 0.1   # epochs, augment, lr, drop path
#   DATA=cifar10_12k bash scripts/cifar_study.sh final joint 20 light 1.0e-3 0.1 train.seed=1 name=seed_1   # and more keys
#   LABELS=cifar10_1k DATA=cifar10_12k bash scripts/cifar_study.sh final joint 50 light 1.0e-3 0.1  # fine-tuned on fewer images
# The grid is judged on the held-out slice of train; only `final` reads the test images.
set -euo pipefail
data=$(realpath "${DATA:?the images, see docs/results/README.md}") labels=$(realpath "${LABELS:-$DATA}")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-.venv/bin/python} out=${OUT:-runs/cifar}
step=$1 start=$2
declare -A epochs=([mocov3]=24 [joint]=15 [simmim]=36)  # equal time, not equal epochs; EPOCHS sets another number

finetune() {  # NAME EPOCHS AUGMENT LR DROP_PATH more...
    local from=("backbone=$out/$start")
    case $start in none | random)
        from=("backbone=$start" "out=$out/$start/eval" model.name=gcvit_nano model.img_size=64 'model.window_ratio=[16,16,16,32]') ;;
    esac
    "$python" -m gcssl.eval.finetune configs/eval/finetune_demo.yaml "${from[@]}" "name=$1" "data.path=$labels" data.workers=1 \
        train.batch_size=128 train.lr_base=128 "train.precision=${PRECISION:-bf16}" train.warmup_epochs=1 checkpoint.every=5 \
        "train.epochs=$2" "finetune.augment=$3" "train.blr=$4" "model.drop_path=$5" "${@:6}"
}

case $step in
pretrain)
    "$python" pretrain.py "configs/pretrain/${start}_gcvit_nano.yaml" "data.path=$data" data.workers=1 "out=$out/$start" \
        "train.epochs=${EPOCHS:-${epochs[$start]}}" "train.precision=${PRECISION:-bf16}"
    "$python" -m gcssl.eval.knn "backbone=$out/$start" compare=random
    "$python" -m gcssl.eval.linear_probe "backbone=$out/$start" compare=random
    ;;
grid)
    for cell in light:1.0e-3:0.0 none:1.0e-3:0.0 full:1.0e-3:0.0 light:2.0e-3:0.0 light:1.0e-3:0.1; do
        IFS=: read -r augment lr drop <<<"$cell"
        finetune "grid_${augment}_${lr}_$drop" 10 "$augment" "$lr" "$drop" finetune.holdout=true
    done
    ;;
final) finetune "final_$3_$4_$5_$6" "$3" "$4" "$5" "$6" "${@:7}" ;;
*) echo "given $step, expected pretrain, grid or final" >&2; exit 2 ;;
esac
