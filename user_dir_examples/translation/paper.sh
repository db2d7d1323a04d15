#!/usr/bin/env bash
# Figure 5: WMT14 English to French in Tensor2Tensor, 2, 6 and 8 layers, 128 to 2,048 wide (sections 2.1 and 3).
# transformer_base's hyperparameters at every size ("the standard Transformer architecture and hyperparameters").
#
#     DATA=/data OUT=/runs/paper GPUS=8 bash user_dir_examples/translation/paper.sh
#
# DATA/wmt14 holds the archives of WMT14; where one is missing, the first command names it and its address. GPUS share
# an update of 4,096 tokens each: the paper gives no batch for translation, Tensor2Tensor's is so much for a GPU, and
# 8 GPUs have Vaswani et al.'s 25,000 to 32,000 tokens. BUDGET: the paper prints none for translation; 1,000,000 s
# unless given, in seconds. On a TPU the log has neither losses nor BLEU, so not by this script: docs/translation.md has the
# commands. T2T_PYTHON: the Python of `make env-t2t` unless given.
source "$(dirname "${BASH_SOURCE[0]}")/../paper_scale/common.sh"

settings GPUS
[[ $BUDGET =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "BUDGET=$BUDGET: give a number of seconds, for Tensor2Tensor."
sizes=$(sizes {2,6,8}l_{128,256,512,1024,2048}h)
T2T_PYTHON=${T2T_PYTHON:-.venv-t2t/bin/python}
dry || command -v "$T2T_PYTHON" >/dev/null ||
    fail "$T2T_PYTHON is not there: make it with \`make env-t2t\`, or give T2T_PYTHON."
problem=translate_enfr_wmt14
data=$OUT/wmt14
device=(--worker_gpu="$GPUS")

# t2t PROGRAM SIZE FOLDER HPARAMS FLAG ...
t2t() {
    run "$T2T_PYTHON" -m t2t_problems.launch "$1" --problem=$problem --data_dir="$data" --output_dir="$3" \
        --model=transformer_budgeted --hparams_set="transformer_enfr_$2" --hparams="$4" \
        --decode_hparams=beam_size=4,alpha=0.6 "${@:5}"  # Vaswani et al.'s; the paper does not say
}

run "$T2T_PYTHON" -m t2t_problems.launch datagen --problem=$problem --tmp_dir="$DATA/wmt14" --data_dir="$data"
runs=()
for size in $sizes; do
    # Section 2.2: wait until the time of an update is stable, then the mean of 100. On the GPUs that train:
    # Tensor2Tensor's Adam does not accumulate, so one GPU could not make the same update.
    seconds=MEASURED
    timed=$OUT/translate-timed/$size-gpus$GPUS
    [[ -e $timed/done ]] || {
        t2t trainer "$size" "$timed" bleu_sentences=0 --schedule=train --train_steps=300 "${device[@]}"
        run touch "$timed/done"
    }
    dry || seconds=$("$T2T_PYTHON" $HERE/seconds_per_update.py "$timed" --updates 100)
    folder=$OUT/translate/$size-gpus$GPUS-seed$SEED
    same_budget "$folder" "$T2T_PYTHON"
    hparams=budget_seconds=$BUDGET,budget_clock=calibrated,budget_seconds_per_update=$seconds,budget_evaluations=40
    # budget_evaluations: points on the curve, our choice. BLEU of all 3,000 sentences of newstest2013 at each.
    t2t trainer "$size" "$folder" "$hparams,bleu_sentences=3000" --schedule=continuous_train_and_eval \
        --train_steps=1000000000 --eval_steps=1000000 --eval_throttle_seconds=0 --keep_checkpoint_max=2 \
        --random_seed="$SEED" "${device[@]}"
    if [[ ! -e $folder/bleu.txt ]]; then
        dry || rm -rf "$folder/newstest2014"
        run mkdir -p "$folder/newstest2014"
        t2t decoder "$size" "$folder" "$hparams" --decode_from_file="$data/$problem.test.en" \
            --decode_to_file="$folder/newstest2014/test.fr"
        run_into "$folder/bleu.txt" "$T2T_PYTHON" -m t2t_problems.bleu --beam-size 4 --alpha 0.6 --average 1 \
            --translation "$folder"/newstest2014/test.fr* --reference "$data/$problem.test.fr"
    fi
    # The same with its standard error, for paper_scale/claims.py.
    [[ -e $folder/scores.json ]] || run "$T2T_PYTHON" user_dir_examples/pocket_mt/score.py \
        "$folder"/newstest2014/test.fr* "$data/$problem.test.fr" "$folder/scores.json"
    runs+=("$folder")
done
report translation "${runs[@]}"
