#!/usr/bin/env bash
# Figure 13 and Table 1: 12 layers, 768 wide, at five batch sizes, each with its own learning rate (Appendix A.2).
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
one_size 12l_768h
batches="256 2048 4096 8192 16384"
for batch in $batches; do
    micro "$batch" >/dev/null
done
text
runs=()
for batch in $batches; do
    time_steps "$batch" none 12l_768h
    pretrain 12l_768h "$batch"
    runs+=("$(pretrained 12l_768h "$batch")")
done
report batch_size "${runs[@]}"
