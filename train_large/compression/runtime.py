"""Prediction with a packed model whose weights stay packed in memory.

`activations` says in which numbers the linear maps are computed (`kernels.PRECISIONS`); auto is the first of these that
the CPU has quick instructions for. In float32 the logits are the unpacked model's. The others are nearer to them than
they have to be for most sentences, and where they are not, the model notices: a label whose lead over the next is less
than one of its `doubts` is decided again in finer numbers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train_large.allocation import keep_freed_memory
from train_large.compression import network, vocabulary
from train_large.compression.kernels import FLOAT32, IN_CODES, PRECISIONS, finer, is_quick, supported
from train_large.compression.network import Network, Stored
from train_large.compression.packed import read_packed
from train_large.compression.quantization import Quantized
from train_large.data.dictionary import BOS, EOS, MASK
from train_large.errors import UserError

AUTO = "auto"
ACTIVATIONS = (AUTO, *PRECISIONS)

# Of float32's bytes, for all that is in memory beside the k bits of each weight.
_ALLOWED = 0.03

# Sentences of pseudo-random words on which the error of a precision is measured when a model is loaded, the longest of
# so many tokens; and how many times its root mean square a lead must be to count. The largest error of a few sentences
# would change with the draw by a factor of three; of 10,063 real ones it is 10 times this (bench/close_calls.py). Where
# attention to longer sentences is rougher, there are some of the shortest of those too.
_TRIALS, _TRIAL_TOKENS, CAUTION = 64, 48, 12.0
_ROUGH_TRIALS = 16

_ESCAPED = {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}  # words that would end a line or a column


@dataclass(frozen=True)
class Prediction:
    """A label and its probability, best first. `again`: decided in finer numbers after a close call."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    again: bool = False


@dataclass(frozen=True)
class Model:
    """A packed classifier or masked language model, ready to predict.

    precision: what linear maps are computed in. doubts: of this and of the finer ones, in which they are computed after
    a close call, the lead of a label under which the next decides; the last has none, and is not in here. head: the
    name of the classification head, None for a masked language model. task: the options of fairseq's task.
    """

    network: Network
    files: Mapping[str, str]
    task: Mapping[str, Any]
    precision: str
    head: str | None
    doubts: tuple[float, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Stored],
        checkpoint: Mapping[str, Any],
        files: Mapping[str, str],
        activations: str = AUTO,
        head: str | None = None,
    ) -> Model:
        """A model from its tensors by fairseq's names, names of the same weights sharing one object.

        checkpoint: its `cfg`, as `stock_form` gives it. files: dict.txt, encoder.json, vocab.bpe and labels.txt, none
        of which ids need. head: a classification head; it can be left out where there is one, or none.
        Raises UserError for a model that is not computed here, an unknown head, and activations the CPU has not.
        """
        cfg = checkpoint.get("cfg") or {}
        built = network.build(tensors, cfg.get("model") or {})
        precision = choose_precision(activations, built.tokens.shape[1])
        task = dict(cfg.get("task") or {})
        task["regression_target"] = bool({**(cfg.get("criterion") or {}), **task}.get("regression_target"))
        model = cls(built, files, task, precision, _choose_head(built, head))
        again = () if model.head is None or model.regression else finer(precision, built.is_exact_in_codes)
        if precision in IN_CODES:
            ready = network.keep_ready(built, _allowed_bytes(tensors), {precision, *again})
            model = replace(model, network=ready)
        return replace(model, doubts=_doubts(model, again)) if again else model

    @property
    def classes(self) -> int:
        """Outputs of the head: of a regression the scores."""
        return 0 if self.head is None else self.network.heads[self.head].out.weight.shape[0]

    @property
    def regression(self) -> bool:
        """Whether the head gives scores, and no classes."""
        return self.classes == 1 or bool(self.task.get("regression_target"))

    def resident_bytes(self) -> int:
        """Bytes that the weights take in memory: codes, grids, masks, biases and norms, and what is unpacked."""
        return self.network.nbytes + max(map(self.network.scratch_nbytes, self.deciding))

    @property
    def deciding(self) -> tuple[str, ...]:
        """The precision, and those in which close calls are decided after it, in order."""
        return (self.precision, *finer(self.precision, self.network.is_exact_in_codes)[: len(self.doubts)])

    @torch.inference_mode()
    def logits(self, sentences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """float32 (B, classes) for sentences of ids, of any lengths, and bool (B,): which were decided again.

        Raises ValueError for a sentence that is empty or has more than `network.max_length` ids.
        """
        ids = [torch.tensor(sentence, dtype=torch.int64) for sentence in sentences]
        logits = self._logits(ids, self.precision)
        again, open_ones = torch.zeros(len(ids), dtype=torch.bool), torch.arange(len(ids))
        for doubt, precision in zip(self.doubts, self.deciding[1:], strict=True):
            best = logits[open_ones].topk(2).values
            open_ones = open_ones[best[:, 0] - best[:, 1] < doubt]
            if len(open_ones):
                logits[open_ones] = self._logits([ids[i] for i in open_ones.tolist()], precision)
                again[open_ones] = True
        return logits, again

    def classify(self, lines: Sequence[str], top: int = 1) -> list[Prediction]:
        """The `top` labels of each line of text; of a pair of sentences the two parts have a tab between them.

        A regression model gives its scores, all of them and as labels, with probability 1.
        """
        if not lines:
            return []
        texts, labels = self._vocabulary, () if self.regression else self._labels
        parts = [[part.strip() for part in line.split("\t", 1)] for line in lines]
        if any(pair[1:] and pair[1].rpartition("\t")[2] in labels for pair in parts):
            _tell_of_labels()
        ids = iter(texts.encode([part for pair in parts for part in pair]))
        sentences = [vocabulary.sentence([next(ids) for _ in pair], self.task) for pair in parts]
        logits, again = self.logits([self._shorten(sentence) for sentence in sentences])
        if self.regression:
            return [Prediction(tuple(f"{score:.4f}" for score in row), (1.0,) * len(row)) for row in logits.tolist()]
        best = logits.softmax(1).topk(min(top, self.classes))
        return [
            Prediction(tuple(labels[i] for i in indices), tuple(probabilities), bool(repeated))
            for indices, probabilities, repeated in zip(best.indices.tolist(), best.values.tolist(), again.tolist())
        ]

    @torch.inference_mode()
    def fill_mask(self, lines: Sequence[str], top: int = 5) -> list[Prediction]:
        """The `top` words for the <mask> in each line of text, with their probabilities.

        Raises UserError for a line without one <mask>, and for a model without the head of masked language modelling.
        """
        head, texts = self.network.word_head, self._vocabulary
        if head is None:
            raise UserError(f"the model has no head for {MASK}: give one of masked language modelling.")
        if not lines:
            return []
        sentences, places = [], []
        for line in lines:
            pieces = line.strip().split(MASK)
            if len(pieces) != 2:
                raise UserError(f"a line has {len(pieces) - 1} times {MASK}: give one in each line; it is {line!r}.")
            # A word brings the space before it, so the mask stands for that too.
            before, after = texts.encode([pieces[0].rstrip(), pieces[1].rstrip()])
            sentence = self._shorten([BOS, *before, texts.mask, *after, EOS])
            if len(before) + 1 >= len(sentence):
                raise UserError(f"{MASK} stands after the {self.network.max_length} tokens that the model can read.")
            sentences.append(torch.tensor(sentence))
            places.append(torch.tensor([len(before) + 1]))
        found = network.features(self.network, sentences, places, self.precision)
        probabilities = network.word_logits(head, found).softmax(1)
        best = probabilities.topk(min(top, probabilities.shape[1]))
        return [
            Prediction(tuple(texts.word(i) for i in indices), tuple(values))
            for indices, values in zip(best.indices.tolist(), best.values.tolist())
        ]

    def check_files(self) -> None:
        """Raise UserError unless the file has what reading text and naming classes needs."""
        symbols, rows = len(self._vocabulary.symbols), self.network.tokens.shape[0]
        if symbols != rows:
            raise UserError(
                f"{vocabulary.DICTIONARY} and what fairseq adds are {symbols} symbols, and the model has {rows}: pack "
                "it again with its own dictionary."
            )
        for name in ("init_token", "separator_token"):
            token = self.task.get(name)
            if self.head is not None and token is not None and not 0 <= int(token) < rows:
                raise UserError(f"--{name.replace('_', '-')} {token}: the model has symbols from 0 to {rows - 1}.")
        if self.head is not None and not self.regression:
            _ = self._labels

    def _logits(self, sentences: Sequence[Tensor], precision: str) -> Tensor:
        assert self.head is not None
        first = [torch.zeros(1, dtype=torch.int64)] * len(sentences)
        return network.classify(
            self.network.heads[self.head], network.features(self.network, sentences, first, precision)
        )

    def _shorten(self, sentence: list[int]) -> list[int]:
        """As fairseq's --shorten-method truncate."""
        longest = self.network.max_length
        if len(sentence) > longest:
            _tell_of_cutting(longest)
        return sentence[:longest]

    @cached_property
    def _vocabulary(self) -> vocabulary.Vocabulary:
        return vocabulary.read_vocabulary(self.files)

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return vocabulary.read_labels(self.files, self.classes)


def load_model(path: Path, activations: str = AUTO, head: str | None = None) -> Model:
    """The model in the packed file at `path`, and malloc set for predicting with it (`keep_freed_memory`).

    Raises UserError as `read_packed` and `Model.from_tensors` do.
    """
    choose_precision(activations, 0)  # refuse a bad one before reading a large file
    packed = read_packed(path)
    try:
        model = Model.from_tensors(packed.tensors, packed.checkpoint, packed.files, activations, head)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    keep_freed_memory()  # not before: what reading took is given back
    return model


def predict_lines(
    path: Path,
    lines: Iterable[str],
    activations: str = AUTO,
    batch: int = 32,
    top: int = 1,
    head: str | None = None,
) -> Iterator[str]:
    """For every line of text the line to print: its `top` labels, or words for its <mask>, each with its probability.

    Labels and probabilities have tabs between them, and words keep the space before them. `batch` lines are read and
    computed together; what is printed does not depend on it, and no more is held in memory.
    Raises UserError for bad input, with the number of its line, when it is reached.
    """
    for flag, value in (("--batch", batch), ("--top", top)):
        if value < 1:
            raise UserError(f"{flag} {value}: give at least 1.")
    model = load_model(path, activations, head)
    try:
        model.check_files()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    predict = model.fill_mask if model.head is None else model.classify

    def predicted(together: Sequence[str], first: int) -> Iterator[Prediction]:
        try:
            yield from predict(together, top)
        except UserError as error:
            if len(together) == 1:
                raise UserError(f"line {first}: {error}") from error
            for i, line in enumerate(together):  # those before the bad one are good
                yield from predicted([line], first + i)

    for number, together in enumerate(_batches(lines, batch)):
        for prediction in predicted(together, number * batch + 1):
            pairs = zip(prediction.labels, prediction.probabilities)
            yield "\t".join(f"{label.translate(_ESCAPED)}\t{probability:.4f}" for label, probability in pairs)


def _batches(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """`size` lines at a time; where one cannot be read, those before it come first."""
    rest, failed = iter(lines), None
    while failed is None:
        together: list[str] = []
        try:
            for line in itertools.islice(rest, size):
                together.append(line)
        except UserError as error:
            failed = error
        if together:
            yield together
        elif failed is None:
            return
    raise failed


def choose_precision(activations: str, width: int) -> str:
    """What `--activations` comes to on this CPU for a model with hidden states of so many numbers.

    Raises UserError for what the CPU has no instructions for.
    """
    if activations not in ACTIVATIONS:
        raise UserError(f"--activations {activations}: give one of {', '.join(ACTIVATIONS)}.")
    if activations == AUTO:
        return next(precision for precision in PRECISIONS if supported(precision) and is_quick(precision, width))
    if not supported(activations):
        raise UserError(f"--activations {activations}: this CPU has no instructions for it; give {AUTO} or {FLOAT32}.")
    return activations


def _allowed_bytes(tensors: Mapping[str, Stored]) -> int:
    """What weights may take in memory, made ready for quick products: their bits, and a share of their float32."""
    distinct = {id(stored): stored for stored in tensors.values()}.values()
    quantized = [q for q in distinct if isinstance(q, Quantized)]
    plain = [t for t in distinct if isinstance(t, Tensor)]
    bits = sum(q.indices.numel() * q.bits for q in quantized) + sum(32 * t.numel() for t in plain if t.dim() > 1)
    weights = sum(q.indices.numel() for q in quantized) + sum(t.numel() for t in plain)
    return int(bits / 8 + _ALLOWED * 4 * weights)


def _choose_head(built: Network, head: str | None) -> str | None:
    if head is None and len(built.heads) > 1:
        raise UserError(f"the model has several heads ({', '.join(built.heads)}): name one by --head.")
    if head is not None and head not in built.heads:
        raise UserError(f"--head {head}: the model has {', '.join(built.heads) or 'no classification head'}.")
    return next(iter(built.heads), None) if head is None else head


@torch.inference_mode()
def _doubts(model: Model, again: Sequence[str]) -> tuple[float, ...]:
    """`Model.doubts`, where the precisions `again` decide after close calls, from the errors of the lead of any class
    over any other on the trial sentences."""
    trials = [_errors(model, again, _TRIALS, 1, _TRIAL_TOKENS)]
    rough = network.rough_lengths(model.precision)
    if rough and rough.start <= model.network.max_length:
        trials.append(_errors(model, again, _ROUGH_TRIALS, rough.start, rough.start))
    return tuple(CAUTION * max(of_precision) for of_precision in zip(*trials))


def _errors(model: Model, again: Sequence[str], count: int, shortest: int, longest: int) -> list[float]:
    """Of each precision but the last of `again`, root mean squares, on `count` sentences of such lengths."""
    draw = torch.Generator().manual_seed(1)
    longest, words = min(longest, model.network.max_length), model.network.tokens.shape[0]
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    sentences = [torch.randint(words, (length,), generator=draw) for length in lengths]
    for sentence in sentences:
        sentence[-1], sentence[0] = EOS, BOS
    *rough, exact = (model._logits(sentences, precision) for precision in (model.precision, *again))
    errors = [logits - exact for logits in rough]
    return [float((error.amax(1) - error.amin(1)).square().mean().sqrt()) for error in errors]


@cache
def _tell_of_labels() -> None:
    print(
        "note: there are lines with a label behind a tab, which is read as text; `cut -f 1` takes it away, of pairs "
        "`cut -f 1,2`",
        file=sys.stderr,
    )


@cache
def _tell_of_cutting(longest: int) -> None:
    print(f"note: sentences are cut after {longest} tokens, all that the model can read", file=sys.stderr)
