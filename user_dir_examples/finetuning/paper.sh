#!/usr/bin/env bash
# Table 2: sizes stopped at about the same perplexity, then finetuned on MNLI and SST-2 by RoBERTa's setting (section 3,
# Appendix B). Each stops at the perplexity that the table prints; TARGET_PPL=4.3 stops all at one.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

# perplexity SIZE: Table 2.
perplexity() {
    case $1 in
        12l_768h) echo 4.3 ;;
        18l_768h) echo 4.1 ;;
        24l_768h) echo 4.0 ;;
        12l_1024h) echo 3.9 ;;
        12l_1536h) echo 4.3 ;;
    esac
}

settings MICRO GPUS
sizes=$(sizes 12l_768h 18l_768h 24l_768h 12l_1024h 12l_1536h)
text
for task in mnli sst-2; do
    task "$task"
done
time_steps 8192 none $sizes
runs=() finetunings=()
for size in $sizes; do
    target=${TARGET_PPL:-$(perplexity "$size")}
    pretrain "$size" 8192 none 100 "$target"
    start=$(pretrained "$size" 8192 none 100 "$target")
    runs+=("$start")
    for task in mnli sst-2; do
        folder=$OUT/finetune/$task/${start##*/}
        finetune "$task" "$size" "$start/checkpoint_last.pt" "$folder"
        finetunings+=("$folder")
    done
done
report finetuning "${runs[@]}"
run python $HERE/finetuned.py "${finetunings[@]}" --csv "$OUT/finetuning-accuracies-seed$SEED.csv"
