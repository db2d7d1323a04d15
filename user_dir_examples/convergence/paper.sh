#!/usr/bin/env bash
# Figure 8: finetuned on MNLI from several epochs of the pretraining, then quantized to 4 bits (section 4.4). The text
# names "3 epochs, 6 epochs, etc." and no sizes: here 6, 12 and 24 layers as in Figure 9, and every third epoch that the
# budget comes to, EPOCHS="3 6 9 12" unless given.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes 6l_768h 12l_768h 24l_768h)
text
task mnli
time_steps 8192 none $sizes
folders=()
for size in $sizes; do
    pretrain "$size"
    start=$(pretrained "$size")
    for epoch in ${EPOCHS:-3 6 9 12}; do
        checkpoint=$start/checkpoint$epoch.pt
        if ! dry && [[ ! -e $checkpoint ]]; then
            echo "$size has no checkpoint of epoch $epoch, only of every third that it came to: left out" >&2
            continue
        fi
        folder=$OUT/convergence/${start##*/}-epoch$epoch
        finetune mnli "$size" "$checkpoint" "$folder"
        quantize mnli "$folder/checkpoint_best.pt" "$folder/quantized" sparsity0 32 4
        folders+=("$folder")
    done
done
((${#folders[@]})) || fail "no size came to an epoch of ${EPOCHS:-3 6 9 12}: give a longer BUDGET or other EPOCHS."
run python $HERE/finetuned.py "${folders[@]}" --csv "$OUT/convergence-finetuned-seed$SEED.csv"
run python $HERE/compressed.py "${folders[@]}" --csv "$OUT/convergence-seed$SEED.csv"
