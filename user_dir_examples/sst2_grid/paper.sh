#!/usr/bin/env bash
# Figure 12: SST-2, the best of 81 finetunings of each size by validation, compressed (Appendix D). "The dropout" of the
# grid is taken to be --dropout; attention's stays at 0.1.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings MICRO GPUS
sizes=$(sizes $(printf '%s\n' $DEPTHS $WIDTHS | sort -uV))
text
task sst-2
time_steps 8192 none $sizes
for size in $sizes; do
    pretrain "$size"
    start=$(pretrained "$size")
    grid=$OUT/sst2_grid/${start##*/}
    for batch in 16 32 64; do
        for rate in 5e-4 3e-4 1e-4; do
            for seed in 100 300 500; do
                for dropout in 0.1 0.2 0.3; do
                    folder=$grid/batch$batch,rate$rate,seed$seed,dropout$dropout
                    [[ ! -e $folder/done ]] || continue
                    finetune sst-2 "$size" "$start/checkpoint_last.pt" "$folder" "$batch" "$rate" "$seed" "$dropout"
                    # The checkpoints of 81 models would fill disks; the logs of all stay.
                    run python $HERE/finetuned.py "$grid"/*/ --best "$grid/best" --remove-others
                done
            done
        done
    done
    run python $HERE/finetuned.py "$grid"/*/ --csv "$grid/accuracies.csv" --best "$grid/best" --remove-others
    best=batch16,rate5e-4,seed100,dropout0.1  # in a dry run, where nothing has been trained: the first
    dry || best=$(readlink "$grid/best")
    IFS=, read -r batch rate seed dropout <<<"$best"
    compress sst-2 "$size" "$grid/best/checkpoint_best.pt" "$grid-compressed" \
        "${batch#batch}" "${rate#rate}" "${seed#seed}" "${dropout#dropout}"
    run python $HERE/compressed.py "$grid-compressed" --csv "$OUT/sst2_grid-$size-seed$SEED.csv"
done
