"""Pre-norm RoBERTa in every size of the paper (section 2.1), with the layer sharing of Appendix C, and in the shapes
that structured pruning leaves.

State-dict names and computation are stock RoBERTa's, so stock fairseq loads an unshared checkpoint by
`--arch roberta_prenorm --layernorm-embedding` and the flags for the size.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta.model import RobertaClassificationHead, RobertaModel, base_architecture
from fairseq.tasks import FairseqTask
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fairseq_plugins.models import fast_encoder
from fairseq_plugins.models.narrow_attention import reshape_layers
from fairseq_plugins.run import fail, per_layer
from train_large.allocation import keep_freed_memory
from train_large.data.dictionary import digest
from train_large.errors import UserError
from train_large.sizes import ROBERTA, SHARING, Size, default_ffn, default_heads

logger = logging.getLogger(__name__)

MODEL = "prenorm_roberta"
DEFAULT = Size(12, 768)
BERT_STD = 0.02  # of every weight at the start (`init_bert_params`, fairseq/modules/transformer_sentence_encoder.py)
POSITION_INIT = ("random", "sinusoidal")


@register_model(MODEL)
class PrenormRobertaModel(RobertaModel):
    """RoBERTa with the layer norms at the input of every sub-layer, a final norm, and a norm on the embeddings.

    Losses, heads, finetuning and loading are inherited. Sharing makes layers one module under several names: the
    optimizer sees it once (`parameters()`), a checkpoint holds it under every name.
    """

    _reason_told: str | None = "nothing yet"

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        """No model to download goes by this name."""
        return {}

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        RobertaModel.add_args(parser)
        parser.add_argument(
            "--no-embedding-norm",
            action="store_true",
            help="no layer norm on the embeddings, as in fairseq's own roberta_prenorm",
        )
        parser.add_argument(
            "--share-layers",
            choices=SHARING,
            help="weights that all layers have in common: none, the whole layer, or its attention",
        )

        parser.add_argument(
            "--layer-heads",
            metavar="A,A,...",
            help="attention heads of each layer where they differ, each as wide as --encoder-attention-heads says",
        )
        parser.add_argument(
            "--layer-ffn",
            metavar="F,F,...",
            help="rows of each layer's feed-forward network where they differ",
        )
        parser.add_argument(
            "--embedding-std",
            type=float,
            metavar="STD",
            help="standard deviation of the embeddings at the start (0.02 as in BERT; narrow models want more)",
        )
        parser.add_argument(
            "--checkpoint-activations",
            action="store_true",
            help="keep only the input of each layer and compute the layer again in the backward pass: less memory, "
            "larger batches, a third more time",
        )
        parser.add_argument(
            "--no-fast-layers",
            action="store_true",
            help="compute as fairseq does, not by this project's quicker layers",
        )
        parser.add_argument(
            "--matmul-precision",
            choices=fast_encoder.PRECISIONS,
            help="matrix products of the quicker layers in training: bf16, fp32, or auto, which is bf16 where the CPU "
            "multiplies it; weights, their gradients, norms and validation are fp32 in any case",
        )
        parser.add_argument(
            "--position-init",
            choices=POSITION_INIT,
            help="the position embeddings at the start: random as in BERT, or sinusoids; both are learned",
        )

    @classmethod
    def build_model(cls, args: Namespace | DictConfig, task: FairseqTask) -> PrenormRobertaModel:
        if OmegaConf.is_config(args):
            OmegaConf.set_struct(args, False)  # RobertaModel.build_model sets it again
        prenorm_roberta(args)
        args.dictionary_digest = dictionary_digest(task.source_dictionary)
        model = super().build_model(args, task)
        reshape_layers(
            model.encoder.sentence_encoder.layers,
            *(_per_layer(args, name) for name in ("layer_heads", "layer_ffn")),
            width=args.encoder_embed_dim // args.encoder_attention_heads,
            dropout=args.attention_dropout,
        )
        share_layers(model.encoder.sentence_encoder.layers, args.share_layers)
        init_embeddings(model.encoder.sentence_encoder, args.embedding_std, args.position_init)
        return model

    def is_fast(self) -> bool:
        """Whether the next forward pass goes the quick way: one of training does, where it can. The log says so, and
        why not."""
        if not self.training:
            return False
        asked = not self.args.no_fast_layers
        reason = fast_encoder.unsupported(self.encoder) if asked else "of --no-fast-layers"
        if reason != self._reason_told:
            self._reason_told = reason
            dtype = str(self._products_dtype()).removeprefix("torch.")
            logger.info(
                f"layers: {f'fast, products in {dtype}' if reason is None else f'of fairseq, because {reason}'}"
            )
        return reason is None

    def _products_dtype(self) -> torch.dtype:
        device = self.encoder.sentence_encoder.embed_tokens.weight.device.type
        return fast_encoder.products_dtype(self.args.matmul_precision, device)

    def forward(
        self,
        src_tokens: Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: str | None = None,
        masked_tokens: Tensor | None = None,
        masked_targets: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `RobertaModel.forward` (fairseq/models/roberta/model.py:244, 0.12.3.1), and by quicker layers where they
        can do it.

        With `masked_targets`, (N,), for the N positions of `masked_tokens`, (B, L), the first result is the sum of
        their cross-entropies in place of their logits; where `is_fast()`.
        """
        head = None if classification_head_name is None else self.classification_heads[classification_head_name]
        if (
            return_all_hiddens
            or not self.is_fast()
            or (head is not None and not self._looks_at_first(head, src_tokens))
        ):
            return super().forward(
                *(src_tokens, features_only, return_all_hiddens, classification_head_name),
                masked_tokens=masked_tokens,
                **unused,
            )
        keep_freed_memory()
        dtype = self._products_dtype()
        features = partial(fast_encoder.features, self.encoder.sentence_encoder, src_tokens, dtype)
        if head is not None:
            first = torch.zeros_like(src_tokens, dtype=torch.bool)
            first[:, 0] = True
            x = head(features(first)[:, None])
        elif features_only:
            x = features()
        elif masked_targets is not None:
            x = fast_encoder.masked_lm_loss(self.encoder.lm_head, features(masked_tokens), masked_targets, dtype)
        else:
            x = self.encoder.output_layer(features(masked_tokens))
        return x, {"inner_states": None}

    def _looks_at_first(self, head: nn.Module, src_tokens: Tensor) -> bool:
        """Whether `head` looks at the first tokens alone, as `RobertaClassificationHead` does, and they are tokens."""
        padding = self.encoder.sentence_encoder.padding_idx
        return type(head) is RobertaClassificationHead and not bool(src_tokens[:, 0].eq(padding).any())

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Refuse weights that differ between layers which share them here: loading would keep the last one's."""
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}.encoder.sentence_encoder.layers" if name else "encoder.sentence_encoder.layers"
        shared = {"none": None, "all": "", "attention": "self_attn."}[self.args.share_layers]
        if shared is None:
            return
        first = f"{prefix}.0.{shared}"
        for key in [key for key in state_dict if key.startswith(first)]:
            for layer in range(1, self.args.encoder_layers):
                other = state_dict.get(f"{prefix}.{layer}.{shared}{key[len(first) :]}")
                if other is not None and not torch.equal(state_dict[key], other):
                    raise ValueError(
                        f"--share-layers {self.args.share_layers}: the checkpoint's layers 0 and {layer} differ in "
                        f"{shared}{key[len(first) :]}; give the --share-layers that it was trained with."
                    )


@torch.no_grad()
def init_embeddings(encoder: nn.Module, std: float, positions: str) -> None:
    """Start token and position embeddings at standard deviation `std`, the positions as `positions` says.

    Sinusoids make "the word before" the same linear map at every position, so that attention finds it sooner. They are
    those of Vaswani et al. (2017) with wavelengths from 2 pi to 200 pi, for sequences of tens to hundreds of tokens,
    without what all positions have in common. Rows of the padding index stay zero.
    """
    tokens, places = encoder.embed_tokens, encoder.embed_positions
    tokens.weight.mul_(std / BERT_STD)
    if positions == "random":
        places.weight.mul_(std / BERT_STD)
        return
    rows, hidden = places.weight.shape
    frequencies = 100.0 ** -torch.linspace(0, 1, (hidden + 1) // 2)
    angles_RxF = torch.arange(rows)[:, None] * frequencies
    sinusoids_RxH = torch.cat([angles_RxF.sin(), angles_RxF.cos()], dim=1)[:, :hidden]
    sinusoids_RxH -= sinusoids_RxH.mean(0)
    places.weight.copy_(std * sinusoids_RxH / sinusoids_RxH.std())
    places.weight[places.padding_idx] = 0


def dictionary_digest(dictionary: Dictionary) -> str:
    """What tells one dictionary from another, order included. Kept in the model's arguments, and so in its checkpoints:
    weights on the data of another dictionary of the same length would load, and be nonsense."""
    return digest(dictionary.symbols)


def share_layers(layers: nn.ModuleList, share: str) -> None:
    """Make all of `layers` the first one (`all`), or give them the first one's attention (`attention`), in place."""
    for i in range(1, len(layers)):
        if share == "all":
            layers[i] = layers[0]
        elif share == "attention":
            layers[i].self_attn = layers[0].self_attn


def prenorm_roberta(args: Namespace | DictConfig) -> None:
    """Fill in what the command line, or the checkpoint that `args` is from, left open. Doing it twice changes nothing.

    Raises ValueError, which names the flag, for what cannot be built.
    """
    args.encoder_layers = safe_getattr(args, "encoder_layers", DEFAULT.layers)
    args.encoder_embed_dim = safe_getattr(args, "encoder_embed_dim", DEFAULT.hidden)
    args.encoder_ffn_embed_dim = safe_getattr(args, "encoder_ffn_embed_dim", default_ffn(args.encoder_embed_dim))
    args.encoder_attention_heads = safe_getattr(args, "encoder_attention_heads", default_heads(args.encoder_embed_dim))
    for name in ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1.")
    if args.encoder_embed_dim % args.encoder_attention_heads:
        raise ValueError(
            f"--encoder-embed-dim {args.encoder_embed_dim} does not divide into {args.encoder_attention_heads} heads: "
            "give an --encoder-attention-heads that divides it."
        )

    args.encoder_normalize_before = True
    embedding_norm = safe_getattr(args, "layernorm_embedding", None)
    args.no_embedding_norm = safe_getattr(args, "no_embedding_norm", embedding_norm is False)
    if args.no_embedding_norm and embedding_norm:
        raise ValueError("--no-embedding-norm and --layernorm-embedding contradict each other: give one of them.")
    args.layernorm_embedding = not args.no_embedding_norm

    args.embedding_std = safe_getattr(args, "embedding_std", BERT_STD)
    if not args.embedding_std > 0:
        raise ValueError(f"--embedding-std {args.embedding_std}: give a number above zero.")
    args.position_init = safe_getattr(args, "position_init", "random")
    if args.position_init not in POSITION_INIT:
        raise ValueError(f"--position-init {args.position_init}: give one of {', '.join(POSITION_INIT)}.")
    args.checkpoint_activations = safe_getattr(args, "checkpoint_activations", False)
    args.no_fast_layers = safe_getattr(args, "no_fast_layers", False)
    args.matmul_precision = safe_getattr(args, "matmul_precision", "auto")
    if args.matmul_precision not in fast_encoder.PRECISIONS:
        raise ValueError(
            f"--matmul-precision {args.matmul_precision}: give one of {', '.join(fast_encoder.PRECISIONS)}."
        )
    args.share_layers = safe_getattr(args, "share_layers", "none")
    if args.share_layers not in SHARING:
        raise ValueError(f"--share-layers {args.share_layers}: give one of {', '.join(SHARING)}.")
    _layer_shapes(args)
    base_architecture(args)


def _layer_shapes(args: Namespace | DictConfig) -> None:
    """Check --layer-heads and --layer-ffn; where all layers have the same, say so by the options of the whole model.

    Raises ValueError, which names the flag.
    """
    args.layer_heads = safe_getattr(args, "layer_heads", None)
    args.layer_ffn = safe_getattr(args, "layer_ffn", None)
    for name, shared in (("layer_heads", ("all", "attention")), ("layer_ffn", ("all",))):
        sizes, flag = _per_layer(args, name), f"--{name.replace('_', '-')}"
        if sizes and args.share_layers in shared and len(set(sizes)) > 1:
            raise ValueError(
                f"--share-layers {args.share_layers} and {flag} {getattr(args, name)} contradict each other: "
                "layers that are shared have one shape."
            )
        if sizes and safe_getattr(args, "encoder_layers_to_keep", None):
            raise ValueError(f"--encoder-layers-to-keep and {flag} cannot be given together: leave one of them out.")
    if set(_per_layer(args, "layer_heads") or ()) == {args.encoder_attention_heads}:
        args.layer_heads = None
    rows = set(_per_layer(args, "layer_ffn") or ())
    if len(rows) == 1:
        [args.encoder_ffn_embed_dim] = rows
        args.layer_ffn = None


def _per_layer(args: Namespace | DictConfig, name: str) -> tuple[int, ...] | None:
    """`args.layer_heads` or `args.layer_ffn` as numbers. Raises ValueError, which names the flag."""
    try:
        return per_layer(args, name)
    except UserError as error:
        raise ValueError(str(error)) from None


def _of_size(args: Namespace | DictConfig, size: Size) -> None:
    """`prenorm_roberta` of the paper's `size`, wherever no flag says otherwise."""
    args.encoder_layers = safe_getattr(args, "encoder_layers", size.layers)
    args.encoder_embed_dim = safe_getattr(args, "encoder_embed_dim", size.hidden)
    prenorm_roberta(args)


def _register(name: str, fill: Callable[[Namespace], None]) -> None:
    """Make `fill` the architecture `name`, by which fairseq fills in a command line, or ends it with one sentence."""

    def filled(args: Namespace) -> None:
        try:
            fill(args)
        except ValueError as error:
            fail(str(error))

    register_model_architecture(MODEL, name)(filled)


_register(MODEL, prenorm_roberta)
for _size in ROBERTA:
    _register(f"{MODEL}_{_size.name}", partial(_of_size, size=_size))
