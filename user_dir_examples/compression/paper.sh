#!/usr/bin/env bash
# Figures 2 (right), 6 and 7: every size pretrained for 1,000,000 seconds, finetuned, quantized, pruned, and both
# (sections 4.1 to 4.3), on MNLI and SST-2. TASKS=mnli does one of them. The text names 24l_768h and 12l_1536h; here all
# sizes of Figures 2 and 4. For SST-2 the paper's own figure (12) is of the best of a grid: ../sst2_grid/paper.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $(printf '%s\n' $DEPTHS $WIDTHS | sort -uV))
for task in ${TASKS:-mnli sst-2}; do
    [[ $task == mnli || $task == sst-2 ]] || fail "TASKS: $task is neither mnli nor sst-2."
done
text
time_steps 8192 none $sizes
for task in ${TASKS:-mnli sst-2}; do
    task "$task"
done
for size in $sizes; do
    pretrain "$size"
    start=$(pretrained "$size")
    for task in ${TASKS:-mnli sst-2}; do
        finetuned=$OUT/finetune/$task/${start##*/}
        finetune "$task" "$size" "$start/checkpoint_last.pt" "$finetuned"
        compress "$task" "$size" "$finetuned/checkpoint_best.pt" "$OUT/compress/$task/${start##*/}"
        run python $HERE/compressed.py "$OUT/compress/$task/${start##*/}" --csv "$OUT/compression-$task-$size-seed$SEED.csv"
    done
done
