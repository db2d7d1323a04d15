"""A pre-norm RoBERTa of fairseq in the names and options of Hugging Face's classes.

Two classes compute what fairseq's pre-norm encoder computes. RobertaPreLayerNorm has a layer norm on the embeddings,
XLMRobertaXL has none; apart from that they differ in names only. Linear maps, norms (epsilon 1e-5), positions (from 2
on, padding at 1) and heads are fairseq's own, so the weights are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train_large.data.dictionary import BOS, EOS, PAD
from train_large.errors import UserError

ENCODER = "encoder.sentence_encoder."
LM_HEAD = "encoder.lm_head."
HEADS = "classification_heads."
RESERVED_POSITIONS = 2  # rows of the position embeddings up to the padding index
NORM_EPSILON = 1e-5  # fairseq's, in every norm

# What the classes compute, by the option of fairseq that could say otherwise; True and False for flags without a value.
FIXED = {
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "no_token_positional_embeddings": False,
    "encoder_learned_pos": True,
    "adaptive_input": False,
    "encoder_layers_to_keep": None,
    "quant_noise_pq": 0,
    "quant_noise_scalar": 0,
    "mha_heads_to_keep": -1,
    "ffn_blocks_to_remove": -1,
    "layer_heads": None,
    "layer_ffn": None,
}
FIXED_IN_HEAD = {"pooler_activation_fn": "tanh", "spectral_norm_classification_head": False}


@dataclass(frozen=True)
class Exported:
    """A model in Hugging Face's form.

    config: what config.json holds, label names apart. tensors: by Hugging Face's names, float32, no two of them on the
    same memory. classes: outputs of the head, None for a masked language model.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    classes: int | None


def convert(cfg: Mapping[str, Any], state: Mapping[str, Tensor], head: str | None = None) -> Exported:
    """The model with configuration `cfg` (as `stock_form` gives it) and state dict `state`.

    With classification heads it becomes a classifier: `head` names one where there are several. Without, it becomes a
    masked language model. Shared layers are written out for each layer.
    Raises UserError, which names the flag or the tensor in the way, for what the classes cannot express.
    """
    model, task = cfg["model"], cfg["task"]
    arch = model.get("arch") or model.get("_name")
    if f"{ENCODER}embed_tokens.weight" not in state:
        raise UserError(
            f"--arch {arch} is in the way: only pre-norm RoBERTa (prenorm_roberta, roberta_prenorm) can be exported"
        )
    if f"{ENCODER}layer_norm.weight" not in state:
        raise UserError(
            f"--arch {arch} is in the way: it is post-norm (no --encoder-normalize-before), and only pre-norm models "
            "can be exported; `train-large pack` and `predict` take it as it is"
        )
    head = _choose_head(state, head)
    # An older release's arguments may lack an option that came later: then it had the default, which is fairseq's own.
    _check_options(model, FIXED if head is None else {**FIXED, **FIXED_IN_HEAD})

    norm = f"{ENCODER}layernorm_embedding.weight" in state
    classes = None if head is None else _matrix(state, f"{HEADS}{head}.out_proj.weight")[0]
    config = _config(model, state, norm, classes)
    if head is not None and (task.get("regression_target") or cfg["criterion"].get("regression_target")):
        config["problem_type"] = "regression"
    elif classes is not None and classes > 1:
        config["problem_type"] = "single_label_classification"

    table = list(_modules(config, norm, head, classes))
    taken = dict(_named_tensors(table, state))
    unused = {f"{ENCODER}version", f"{LM_HEAD}weight"}
    if head is not None:
        unused |= {name for name in state if name.startswith((LM_HEAD, HEADS))}
    else:
        _check_shape(state, f"{LM_HEAD}weight", (config["vocab_size"], config["hidden_size"]))
        _check_shape(state, f"{LM_HEAD}bias", (config["vocab_size"],))
        taken["lm_head.bias"] = f"{LM_HEAD}bias"
        config["tie_word_embeddings"] = torch.equal(state[f"{ENCODER}embed_tokens.weight"], state[f"{LM_HEAD}weight"])
        if not config["tie_word_embeddings"]:
            taken |= {"lm_head.decoder.weight": f"{LM_HEAD}weight", "lm_head.decoder.bias": f"{LM_HEAD}bias"}
    left = sorted(state.keys() - taken.values() - unused)
    if left:
        raise UserError(
            f"{left[0]} has no place in Hugging Face's {config['architectures'][0]}: --arch {arch} is in the way"
        )

    base = table[0][1].partition(".")[0]
    tensors = {f"{base}.embeddings.token_type_embeddings.weight": torch.zeros(1, config["hidden_size"])}
    tensors |= _separate({theirs: state[ours] for theirs, ours in taken.items()})
    return Exported(config, tensors, classes)


def _config(model: Mapping[str, Any], state: Mapping[str, Tensor], norm: bool, classes: int | None) -> dict[str, Any]:
    """config.json: sizes are those of the weights, what weights do not show is the configuration's."""
    vocabulary, hidden = _matrix(state, f"{ENCODER}embed_tokens.weight")
    heads = model.get("encoder_attention_heads")
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise UserError(
            f"--encoder-attention-heads {heads} does not divide a hidden size of {hidden}: give a checkpoint with "
            "its own configuration"
        )
    return {
        "architectures": [_class_name(norm, classes is None)],
        "model_type": "roberta-prelayernorm" if norm else "xlm-roberta-xl",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": len({name.split(".")[3] for name in state if name.startswith(f"{ENCODER}layers.")}),
        "num_attention_heads": heads,
        "intermediate_size": _matrix(state, f"{ENCODER}layers.0.fc1.weight")[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.get("dropout", 0.1),
        "attention_probs_dropout_prob": model.get("attention_dropout", 0.1),
        "classifier_dropout": model.get("pooler_dropout", 0.0),
        "max_position_embeddings": _matrix(state, f"{ENCODER}embed_positions.weight")[0],
        "type_vocab_size": 1,
        "layer_norm_eps": NORM_EPSILON,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _class_name(norm: bool, language_model: bool) -> str:
    family = "RobertaPreLayerNorm" if norm else "XLMRobertaXL"
    return f"{family}For{'MaskedLM' if language_model else 'SequenceClassification'}"


def _choose_head(state: Mapping[str, Tensor], head: str | None) -> str | None:
    heads = sorted({name.split(".")[1] for name in state if name.startswith(HEADS)})
    if head is None and len(heads) > 1:
        raise UserError(f"the checkpoint has several classification heads: choose one by --head {'|'.join(heads)}")
    if head is not None and head not in heads:
        raise UserError(f"--head {head}: the checkpoint has {', '.join(heads) or 'no classification head'}")
    return head or (heads[0] if heads else None)


def _check_options(model: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for option, wanted in fixed.items():
        given = model.get(option, wanted)
        if (given or None) != (wanted or None):
            way_out = f"trained with {_as_flag(option, wanted)}"
            if option.startswith("layer_"):
                way_out = "as it was before heads or rows were removed: it computes the same"
            raise UserError(
                f"{_as_flag(option, given)} is in the way, Hugging Face's pre-norm RoBERTa cannot express it: give a "
                f"model {way_out}"
            )


def _as_flag(option: str, value: Any) -> str:
    flag = f"--{option.replace('_', '-')}"
    if value is True:
        return flag
    return f"no {flag}" if value is None or value is False else f"{flag} {value}"


def _modules(
    config: Mapping[str, Any], norm: bool, head: str | None, classes: int | None
) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """Every module with weights: fairseq's name, Hugging Face's, the weight's shape, and whether it has a bias."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    base = "roberta_prelayernorm." if norm else "roberta."
    square, vector = (hidden, hidden), (hidden,)
    yield f"{ENCODER}embed_tokens", f"{base}embeddings.word_embeddings", (config["vocab_size"], hidden), False
    yield (
        f"{ENCODER}embed_positions",
        f"{base}embeddings.position_embeddings",
        (config["max_position_embeddings"], hidden),
        False,
    )
    if norm:
        yield f"{ENCODER}layernorm_embedding", f"{base}embeddings.LayerNorm", vector, True
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"{ENCODER}layers.{layer}.", f"{base}encoder.layer.{layer}."
        yield f"{ours}self_attn.q_proj", f"{theirs}attention.self.query", square, True
        yield f"{ours}self_attn.k_proj", f"{theirs}attention.self.key", square, True
        yield f"{ours}self_attn.v_proj", f"{theirs}attention.self.value", square, True
        yield f"{ours}self_attn.out_proj", f"{theirs}attention.output.dense", square, True
        attention_norm = "attention.LayerNorm" if norm else "attention.self_attn_layer_norm"
        yield f"{ours}self_attn_layer_norm", f"{theirs}{attention_norm}", vector, True
        yield f"{ours}final_layer_norm", f"{theirs}{'intermediate.' if norm else ''}LayerNorm", vector, True
        yield f"{ours}fc1", f"{theirs}intermediate.dense", (ffn, hidden), True
        yield f"{ours}fc2", f"{theirs}output.dense", (hidden, ffn), True
    yield f"{ENCODER}layer_norm", f"{base}{'' if norm else 'encoder.'}LayerNorm", vector, True
    if head is None:
        yield f"{LM_HEAD}dense", "lm_head.dense", square, True
        yield f"{LM_HEAD}layer_norm", "lm_head.layer_norm", vector, True
    else:
        yield f"{HEADS}{head}.dense", "classifier.dense", square, True
        yield f"{HEADS}{head}.out_proj", "classifier.out_proj", (classes or 0, hidden), True


def _named_tensors(
    table: list[tuple[str, str, tuple[int, ...], bool]], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Hugging Face's name of every tensor of the modules, and fairseq's; checks their shapes."""
    for ours, theirs, shape, bias in table:
        _check_shape(state, f"{ours}.weight", shape)
        yield f"{theirs}.weight", f"{ours}.weight"
        if bias:
            _check_shape(state, f"{ours}.bias", shape[:1])
            yield f"{theirs}.bias", f"{ours}.bias"


def _find(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError(f"{name} is missing in the checkpoint, so it is not a whole pre-norm RoBERTa of fairseq")
    return state[name]


def _matrix(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = tuple(_find(state, name).shape)
    if len(shape) != 2:
        raise UserError(f"{name} has {len(shape)} dimensions and not 2, so it is not one of fairseq's RoBERTa")
    return shape


def _check_shape(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    if tuple(_find(state, name).shape) != shape:
        raise UserError(
            f"{name} is {'x'.join(map(str, state[name].shape))} and not {'x'.join(map(str, shape))}: "
            "Hugging Face's classes have the same sizes in every layer, and whole attention heads"
        )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32, with a copy for each name after the first on the same memory, which safetensors refuses."""
    result: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().to(torch.float32).contiguous()
        memory = whole.untyped_storage().data_ptr()
        result[name] = whole.clone() if memory in seen or whole.untyped_storage().nbytes() != whole.nbytes else whole
        seen.add(memory)
    return result
