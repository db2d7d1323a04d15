#!/usr/bin/env bash
# Figure 4: RoBERTa 256 to 1,536 wide, trained for the same time (sections 2.1 and 3).
# The text does not say how many layers the figure's models have: here 12, as those of Table 2 that differ in width.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $WIDTHS)
text
time_steps 8192 none $sizes
runs=()
for size in $sizes; do
    pretrain "$size"
    runs+=("$(pretrained "$size")")
done
report width "${runs[@]}"
