#!/usr/bin/env bash
# Figure 9: how far 4 bits and 60 % sparsity move the weights of models of 6, 12 and 24 layers, finetuned on MNLI
# (section 5.3). The text does not give their width: here 768, as in Figure 2. Pruned by magnitude, not finetuned after.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes 6l_768h 12l_768h 24l_768h)
text
task mnli
time_steps 8192 none $sizes
for size in $sizes; do
    pretrain "$size"
    start=$(pretrained "$size")
    finetuned=$OUT/finetune/mnli/${start##*/}
    finetune mnli "$size" "$start/checkpoint_last.pt" "$finetuned"
    run python $HERE/weight_errors.py "$finetuned/checkpoint_best.pt" --bits 4 --sparsity 0.60 \
        --csv "$OUT/weight_error-$size-seed$SEED.csv"
done
