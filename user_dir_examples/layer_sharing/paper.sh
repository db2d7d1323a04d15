#!/usr/bin/env bash
# Figure 11: all weights of the layers in common, their attention, or nothing (Appendix C); and the memory that it saves
# at a batch of 32. The paper does not name the size: here RoBERTa's base, 12 layers 768 wide.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
one_size 12l_768h
text
runs=()
for share in none all attention; do
    # peak_memory_bytes in the table: of the GPU, at 32 sequences at a time
    run env CUDA_VISIBLE_DEVICES=0 train-large time-steps "$OUT/text/data-bin" 12l_768h --batch 32 --length 128 \
        --max-micro-batch 32 --out "$OUT/memory-$share.csv" -- --share-layers "$share" "${DEVICE[@]}"
    time_steps 8192 "$share" 12l_768h
    pretrain 12l_768h 8192 "$share"
    runs+=("$(pretrained 12l_768h 8192 "$share")")
done
report layer_sharing "${runs[@]}"
