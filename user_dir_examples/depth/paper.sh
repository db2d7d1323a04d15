#!/usr/bin/env bash
# Figures 2 (left) and 3: RoBERTa of 3 to 24 layers, all 768 wide, trained for the same time (sections 2.1 and 3).
# The paper does not print for how long the curves go on: here as long as in section 4.1, 1,000,000 seconds.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $DEPTHS)
text
time_steps 8192 none $sizes
runs=()
for size in $sizes; do
    pretrain "$size"
    runs+=("$(pretrained "$size")")
done
report depth "${runs[@]}"
