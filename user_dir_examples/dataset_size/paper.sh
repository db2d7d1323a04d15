#!/usr/bin/env bash
# Figure 14: on all, 5 % and 1 % of the text (section 5.1, Appendix A.3). The text names 3, 12 and 24 layers of the
# models "of various sizes"; here all five depths.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $DEPTHS)
text
time_steps 8192 none $sizes
for percent in 100 5 1; do
    runs=()
    for size in $sizes; do
        pretrain "$size" 8192 none "$percent"
        runs+=("$(pretrained "$size" 8192 none "$percent")")
    done
    report "dataset_size-$percent" "${runs[@]}"
done
