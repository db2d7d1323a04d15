#!/usr/bin/env bash
# Figure 10: the runs of Figures 2, 4 and 13 against FLOPs (Appendix A.1). Every run log counts them, so these are the
# runs of depth, width and batch_size; with their OUT none is trained again.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $(printf '%s\n' $DEPTHS $WIDTHS | sort -uV))
batches=
[[ " $sizes " != *" 12l_768h "* ]] || batches="256 2048 4096 16384"
for batch in $batches; do
    micro "$batch" >/dev/null
done
text
runs=()
for size in $sizes; do
    time_steps 8192 none "$size"
    pretrain "$size"
    runs+=("$(pretrained "$size")")
done
for batch in $batches; do
    time_steps "$batch" none 12l_768h
    pretrain 12l_768h "$batch"
    runs+=("$(pretrained 12l_768h "$batch")")
done
report flops "${runs[@]}"
