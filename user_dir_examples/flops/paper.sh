#!/usr/bin/env bash
# Figure 10: the runs of Figures 2, 4 and 13 against FLOPs (Appendix A.1). Every run log counts them, so these are the
# runs of depth, width and batch_size; with their OUT none is trained again.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
text
runs=()
for size in $DEPTHS $WIDTHS; do
    [[ " ${runs[*]-} " != *" $(pretrained "$size") "* ]] || continue
    time_steps 8192 none "$size"
    pretrain "$size"
    runs+=("$(pretrained "$size")")
done
for batch in 256 2048 4096 16384; do
    time_steps "$batch" none 12l_768h
    pretrain 12l_768h "$batch"
    runs+=("$(pretrained 12l_768h "$batch")")
done
report flops "${runs[@]}"
