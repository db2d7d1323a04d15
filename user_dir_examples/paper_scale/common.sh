# What the paper.sh of every experiment shares. Sourced by them, not run:
#
#     DATA=/data OUT=/out MICRO=32 GPUS=8 bash user_dir_examples/depth/paper.sh
#     MICRO=32 GPUS=8 bash user_dir_examples/depth/paper.sh /data /out
#
# DATA         corpus/*.txt (Wikipedia and BookCorpus as plain text), gpt2/encoder.json and gpt2/vocab.bpe (GPT-2's BPE),
#              glue/MNLI/ and glue/SST-2/ (GLUE's own folders)
# OUT          everything made. With one OUT for all experiments, a model that several ask for is trained once
# MICRO        sequences that go through one GPU at a time: what the largest size can take
# GPUS         GPUs of this machine to pretrain on; the batch of an update is the same for any number (but for translation)
# BUDGET       seconds of pretraining for each size; 1,000,000 unless given (section 4.1). Another asks for another OUT
# SIZES        a part of the experiment's sizes, such as "12l_768h 24l_768h": to divide it among machines. A table or page of
#              several sizes has those of the last call: let it be one without SIZES, which finds the runs done
# SEED         1 unless given; in the name of all that is made with it
# STEPS        a table of `train-large time-steps` made elsewhere; unless given it is measured here, on the first GPU
# DEVICE_FLAGS --fp16 unless given; --cpu to try a script without a GPU
# DRY_RUN=1    print the commands, run nothing
#
# All can be run again after a kill: what is done is skipped, and a run in the middle goes on with what is left of its
# budget. Not two scripts at a time with one OUT.
#
# Where the settings come from. The paper (section 2.1) takes RoBERTa's "pretraining setup and model" with pre-norm,
# sequences of 128 tokens and batches of 8,192; peak rates are its Table 1. What it leaves open is here as in
# fairseq's examples/roberta (config/pretraining/base.yaml for pretraining, README.glue.md and config/finetuning for
# finetuning) or, where that was made for another batch, as in Liu et al. (2019b), Table 9. Each line says which.

set -euo pipefail

DATA=${1:-${DATA:-}}
OUT=${2:-${OUT:-}}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
HERE=user_dir_examples/paper_scale
DEPTHS="3l_768h 6l_768h 12l_768h 18l_768h 24l_768h"       # Figures 2 and 3
WIDTHS="12l_256h 12l_512h 12l_768h 12l_1024h 12l_1536h"   # Figure 4
SPARSITY=0.15,0.30,0.45,0.60,0.75,0.90                    # section 4.3
BITS="32 8 6 4"                                           # section 4.2
ADAM=(--optimizer adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6)  # base.yaml, README.glue.md

fail() {
    echo "error: $*" >&2
    exit 2
}

dry() { [[ ${DRY_RUN:-0} != 0 ]]; }

# run COMMAND ...: print it, and run it unless this is a dry run.
run() {
    local line
    printf -v line '%q ' "$@"
    if dry; then
        echo "${line% }"
    else
        echo "+ ${line% }" >&2
        "$@"
    fi
}

# need NAME VALUE WHAT
need() { [[ -n $2 ]] || fail "$1 is not set: give $3."; }

whole_number() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 is not a number of $3: give a whole number above zero."; }

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

there() { dry || [[ -e $1 ]] || fail "$1 is not there: $2."; }

# run_into FILE COMMAND ...: the same, and what it prints goes into FILE, which appears when it is whole.
run_into() {
    local file=$1 line
    shift
    if dry; then
        printf -v line '%q ' "$@"
        echo "$line> $file"
    else
        run "$@" >"$file.part"
        mv "$file.part" "$file"
    fi
}

# sizes SIZE ...: those of SIZES, or all of these.
sizes() {
    local size
    for size in ${SIZES:-}; do
        [[ " $* " == *" $size "* ]] || fail "SIZES: $size is no size of this experiment, which has $*."
    done
    echo "${SIZES:-$*}"
}

# one_size SIZE: for an experiment that has no other, which SIZES cannot divide.
one_size() { sizes "$1" >/dev/null; }

# settings WANTED ...: check what the script is given, and go to the root of the checkout.
settings() {
    need DATA "$DATA" "the folder of the raw data, as the first argument or in the environment"
    need OUT "$OUT" "the folder to write to, as the second argument or in the environment"
    local name
    for name in "$@"; do
        case $name in
            MICRO) need MICRO "${MICRO:-}" "how many sequences go through one GPU at a time, such as MICRO=32" ;;
            GPUS) need GPUS "${GPUS:-}" "how many GPUs to train on, such as GPUS=8" ;;
        esac
        whole_number "$name" "${!name}" "$([[ $name == GPUS ]] && echo GPUs || echo sequences)"
    done
    DATA=$(absolute "$DATA")
    OUT=$(absolute "$OUT")
    BUDGET=${BUDGET:-1000000}
    SEED=${SEED:-1}
    [[ $SEED =~ ^[0-9]+$ ]] || fail "SEED=$SEED is not a whole number."
    [[ " $* " != *" MICRO "* ]] || micro 8192 >/dev/null
    [[ -z ${STEPS:-} ]] || STEPS=$(absolute "$STEPS")
    read -r -a DEVICE <<<"${DEVICE_FLAGS---fp16}"  # base.yaml and README.glue.md have fp16; the paper does not say
    cd "$ROOT"
    [[ ! -d .venv/bin ]] || PATH=$ROOT/.venv/bin:$PATH
    dry && return
    command -v fairseq-train >/dev/null || fail "fairseq-train is not there: make the environment with \`make env\`."
    mkdir -p "$OUT"
}

# ---------------------------------------------------------------------------------------------------------------- data

# text: BookCorpus and Wikipedia in RoBERTa's BPE, 0.5 % held out (section 2.1); 5 % and 1 % of the rest (section 5.1).
text() {
    local corpus=("$DATA"/corpus/*.txt) file
    there "${corpus[0]}" "put the text of Wikipedia and BookCorpus there, as files of UTF-8 that end in .txt"
    for file in encoder.json vocab.bpe; do
        there "$DATA/gpt2/$file" "put GPT-2's BPE there, from https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/$file"
    done
    run train-large prepare-text "${corpus[@]}" --out "$OUT/text" --valid-fraction 0.005 --subsets 0.05,0.01 \
        --encoder-json "$DATA/gpt2/encoder.json" --vocab-bpe "$DATA/gpt2/vocab.bpe"
}

# task mnli|sst-2
task() {
    there "$(glue "$1")" "put GLUE's folder of the task there, with train.tsv"
    run train-large prepare-task "$(glue "$1")" --task "$1" --text "$OUT/text" --out "$OUT/$1"
}

glue() { case $1 in mnli) echo "$DATA/glue/MNLI" ;; sst-2) echo "$DATA/glue/SST-2" ;; esac; }

# --------------------------------------------------------------------------------------------------------- pretraining

# rate BATCH: Table 1.
rate() {
    case $1 in
        256) echo 0.0002 ;;
        2048) echo 0.001 ;;
        4096) echo 0.00125 ;;
        8192) echo 0.0015 ;;
        16384) echo 0.001875 ;;
        *) fail "Table 1 has no learning rate for a batch of $1." ;;
    esac
}

# micro BATCH: sequences on one GPU at a time, such that GPUS and a whole number of accumulations make up the batch.
micro() {
    local most=$(($1 / GPUS)) sequences
    sequences=$((MICRO < most ? MICRO : most))
    ((sequences > 0 && $1 % (sequences * GPUS) == 0)) ||
        fail "MICRO=$MICRO on GPUS=$GPUS does not divide a batch of $1: give numbers whose product does."
    echo "$sequences"
}

# steps SHARE: the table of seconds per update.
steps() { if [[ $1 == none ]]; then echo "${STEPS:-$OUT/steps.csv}"; else echo "$OUT/steps-share_$1.csv"; fi; }

# time_steps BATCH SHARE SIZE ...: section 2.2: one GPU, the largest micro-batch that fits, the mean of 100 updates.
time_steps() {
    local batch=$1 share=$2 flags=("${DEVICE[@]}")
    shift 2
    [[ $share == none ]] || flags+=(--share-layers "$share")
    [[ $share == none && -n ${STEPS:-} ]] ||
        run env CUDA_VISIBLE_DEVICES=0 train-large time-steps "$OUT/text/data-bin" "$@" --batch "$batch" --length 128 \
            --out "$(steps "$share")" -- "${flags[@]}"
}

# pretrained SIZE [BATCH [SHARE [PERCENT [PERPLEXITY]]]]: the folder of a pretraining.
pretrained() {
    local name=$1-batch${2:-8192}
    [[ ${3:-none} == none ]] || name+=-share_$3
    [[ ${4:-100} == 100 ]] || name+=-data$4
    [[ -z ${5:-} ]] || name+=-to$5
    echo "$OUT/pretrain/$name-seed$SEED"
}

# same_budget FOLDER [PYTHON]: refuse a run that was begun with another BUDGET. No folder's name has the budget in it, so
# what was made from that run would count as made from this one.
same_budget() { [[ ! -e $1/run.jsonl ]] || "${2:-python}" $HERE/same_budget.py "$1" "$BUDGET" || exit 2; }

# once FOLDER COMMAND ...: run it, unless it came to its end before. A run in fairseq that has ended by a perplexity or
# by a number of updates would, run again, train on for a while, past what others have been made from.
once() {
    [[ ! -e $1/done ]] || return 0
    "${@:2}"
    run touch "$1/done"
}

# pretrain SIZE [BATCH [SHARE [PERCENT [PERPLEXITY]]]]: for BUDGET seconds, or until a perplexity is reached.
pretrain() {
    local size=$1 batch=${2:-8192} share=${3:-none} percent=${4:-100} target=${5:-} data=$OUT/text/data-bin sequences
    local interval=$((500 * 8192 / batch)) flags=()
    sequences=$(micro "$batch")
    same_budget "$(pretrained "$@")"
    [[ $percent == 100 ]] || data+=-${percent}pct
    [[ -z $target ]] || flags+=(--target-ppl "$target")
    if [[ $batch-$share-$percent$target == 8192-none-100 ]]; then
        flags+=(--save-interval 3 --validate-interval 3)  # every third epoch is kept: Figure 8
    else
        flags+=(--no-epoch-checkpoints --save-interval 1000000 --validate-interval 1000000)
    fi
    # Sequences of exactly 128 tokens, as the paper's batch and clock count them; base.yaml has complete sentences of up
    # to 512, and cutting at sentences would leave an update with fewer than 8,192 x 128 tokens.
    # The paper gives no warm-up: Liu et al. have 30,000 of 500,000 updates, 0.06 (of the large model), and base.yaml
    # 10,000 of 125,000. Their linear decay ends with the budget here. Points on the curve, every 4,096,000 sequences: our choice.
    once "$(pretrained "$@")" run fairseq-train "$data" --user-dir fairseq_plugins --save-dir "$(pretrained "$@")" \
        --task masked_lm --mask-prob 0.15 --arch "prenorm_roberta_$size" --share-layers "$share" \
        --tokens-per-sample 128 --max-positions 128 --sample-break-mode none \
        --batch-size "$sequences" --update-freq "$((batch / sequences / GPUS))" --distributed-world-size "$GPUS" \
        --required-batch-size-multiple 1 \
        --criterion budgeted_masked_lm --budget "$BUDGET" --budget-clock calibrated \
        --seconds-per-update "$(steps "$share")" \
        "${ADAM[@]}" --clip-norm 0 --weight-decay 0.01 --dropout 0.1 --attention-dropout 0.1 \
        --lr-scheduler budget_linear --warmup-fraction 0.06 --lr "$(rate "$batch")" \
        --validate-interval-updates "$interval" --save-interval-updates "$interval" --keep-interval-updates 1 \
        --log-format simple --log-interval 100 --seed "$SEED" "${flags[@]}" "${DEVICE[@]}"
}

# report NAME RUN ...: the curves of these runs, as a page and as a table.
report() {
    local name=$1
    shift
    run train-large report "$@" --page "$OUT/$name-seed$SEED.html" --csv "$OUT/$name-seed$SEED.csv"
}

# ---------------------------------------------------------------------------------------------------------- finetuning

classes() { if [[ $1 == mnli ]]; then echo 3; else echo 2; fi; }

# Updates of fairseq's README.glue.md, for batches of 32 and ten epochs: as many examples with another batch.
updates() {
    local all
    if [[ $1 == mnli ]]; then all=123873; else all=20935; fi
    echo $((all * 32 / $2))
}

# classification TASK SIZE START FOLDER BATCH RATE SEED DROPOUT FLAG ...: what finetuning and pruning have in common,
# by README.glue.md. Sentences longer than the model's 128 positions are cut.
classification() {
    run fairseq-train "$OUT/$1" --user-dir fairseq_plugins --save-dir "$4" --finetune-from-model "$3" \
        --arch "prenorm_roberta_$2" --max-positions 128 --shorten-method truncate \
        --init-token 0 --separator-token 2 --num-classes "$(classes "$1")" --criterion budgeted_sentence_prediction \
        --batch-size "$5" --batch-size-valid 32 --required-batch-size-multiple 1 --distributed-world-size 1 \
        "${ADAM[@]}" --clip-norm 0 --weight-decay 0.1 --lr "$6" --seed "$7" --dropout "$8" --attention-dropout 0.1 \
        --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints \
        --log-format simple --log-interval 100 --fp16-init-scale 4 --threshold-loss-scale 1 --fp16-scale-window 128 \
        "${@:9}" "${DEVICE[@]}"
}

# finetune TASK SIZE START FOLDER [BATCH [RATE [SEED [DROPOUT]]]]: RoBERTa's setting for MNLI and SST-2 unless given.
finetune() {
    local batch=${5:-32} updates
    updates=$(updates "$1" "$batch")
    once "$4" classification "$1" "$2" "$3" "$4" "$batch" "${6:-1e-5}" "${7:-$SEED}" "${8:-0.1}" \
        --task sentence_prediction --lr-scheduler polynomial_decay \
        --warmup-updates $((updates * 6 / 100)) --total-num-update "$updates" --max-update "$updates" --max-epoch 10
}

# --------------------------------------------------------------------------------------------------------- compression

# prune TASK SIZE FINETUNED FOLDER [BATCH [RATE [SEED [DROPOUT]]]]: section 4.3. The paper does not say at which rate
# it finetunes between two levels: here it is the peak of the finetuning, constant.
prune() {
    classification "$1" "$2" "$3" "$4" "${5:-32}" "${6:-1e-5}" "${7:-$SEED}" "${8:-0.1}" \
        --task pruning_sentence_prediction --sparsity-levels "$SPARSITY" --recovery 0.995 --recovery-epochs 1 \
        --prune-scope global --lr-scheduler fixed --save-interval-updates 1000 --keep-interval-updates 1
}

# quantize TASK CHECKPOINT FOLDER NAME BITS ...: for each width, NAME-BITSbits.safetensors, the packed file, and
# NAME-BITSbits.log, what fairseq-validate says of the quantized model.
quantize() {
    local task=$1 checkpoint=$2 folder=$3 name=$4 bits stem
    shift 4
    for bits in "$@"; do
        stem=$folder/$name-${bits}bits
        [[ ! -e $stem.log ]] || continue
        run mkdir -p "$folder"
        run train-large pack "$checkpoint" "$stem.safetensors" --bits "$bits"
        run train-large quantize "$checkpoint" "$stem.pt" --bits "$bits"
        validate "$task" "$stem.pt" "$stem.log"
        run rm "$stem.pt"  # as large as the model in 32 bits; `train-large unpack` makes it again
    done
}

# validate TASK CHECKPOINT LOG: the accuracy on the task's validation set (MNLI: the matched one), in 32 bits.
validate() {
    local flags=()
    [[ " ${DEVICE[*]} " != *" --cpu "* ]] || flags=(--cpu)
    run_into "$3" fairseq-validate "$OUT/$1" --user-dir fairseq_plugins --path "$2" --task sentence_prediction \
        --criterion sentence_prediction --num-classes "$(classes "$1")" --batch-size 32 \
        --required-batch-size-multiple 1 --log-format json "${flags[@]}"
}

# compress TASK SIZE FINETUNED FOLDER [BATCH [RATE [SEED [DROPOUT]]]]: quantization, pruning, and both.
compress() {
    local level
    prune "$@"
    quantize "$1" "$3" "$4/quantized" sparsity0 $BITS
    for level in ${SPARSITY//,/ }; do
        level=${level#0.}
        quantize "$1" "$4/checkpoint_sparsity_$level.pt" "$4/quantized" "sparsity$level" $BITS
    done
}
