"""What `train-large doctor` asks of torch and fairseq: `python -m fairseq_plugins.doctor` prints JSON, a list of rows
(`train_large.doctor.Row`).

Nothing is read off flags that can be tried: a small model is built and trained for a step as `fairseq-train` would, and
products are computed. torch and fairseq are imported where they are asked, so that what is missing costs its own rows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from train_large.doctor import Row
from train_large.machine import maker, usable_cores

Answer = tuple[bool, str]  # whether it is active, and why

FLAGS = (
    "--task masked_lm --tokens-per-sample 16 --arch prenorm_roberta --criterion budgeted_masked_lm --optimizer "
    "fused_adam --encoder-layers 2 --encoder-embed-dim 32 --encoder-attention-heads 4 --max-positions 16 --lr 1e-3"
)
WORDS = 50

SIDE = 1024  # of the square matrices whose product is timed: larger ones are no quicker
SECONDS = 1.0
NO_REASON = "of something that it does not tell: report this"
FEW_CORES = 4  # of which one process that loads data takes a share that counts


def rows() -> list[Row]:
    """Everything that can be told; what fails becomes a row that says so, and the others follow."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        return [_missing("torch", error, [*OF_FAIRSEQ, *OF_TORCH])]
    try:
        import fairseq_plugins  # noqa: F401
    except (Exception, SystemExit) as error:
        found = [_missing("fairseq", error, [*OF_FAIRSEQ])]
    else:
        found = [_row(what, *each) for what, each in OF_FAIRSEQ.items()]
    return found + [_row(what, *each) for what, each in OF_TORCH.items()]


def _row(what: str, ask: Callable[[], Answer], off_by: str | None) -> Row:
    try:
        return Row(what, *ask(), off_by)
    except (Exception, SystemExit) as error:
        return Row(what, None, f"the attempt failed: {_said(error)}", off_by)


def _missing(package: str, error: BaseException, lost: Sequence[str]) -> Row:
    nothing = f"{', '.join(lost[:-1])} and {lost[-1]}"
    why = f"cannot be imported ({_said(error)}): install this package with its extra fairseq"
    return Row(package, None, f"{why}; without it nothing can be told of {nothing}")


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- what a small model shows


@functools.cache
def _small() -> tuple[Any, Any, Any]:
    """What fairseq-train makes of `FLAGS`: configuration, task, and model, on the device that it would take."""
    import torch
    from fairseq import options
    from fairseq.data import Dictionary
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.tasks.masked_lm import MaskedLMTask

    dictionary = Dictionary()
    for word in range(WORDS):
        dictionary.add_symbol(f"w{word}")
    parsed: Namespace = options.parse_args_and_arch(
        options.get_training_parser("masked_lm"), ["data", *shlex.split(FLAGS)]
    )
    cfg = convert_namespace_to_omegaconf(parsed)
    task = MaskedLMTask(cfg.task, dictionary)
    model = task.build_model(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, task, model.train()


def _step() -> set[str]:
    """Compute loss and gradients of one batch, some of it padding, and see that they are there.

    Returns which of fairseq's own ways were taken: "layers", "head". The quick ways call neither.
    """
    import torch
    from fairseq.criterions import CRITERION_REGISTRY

    cfg, task, model = _small()
    device = next(model.parameters()).device
    tokens = torch.randint(4, WORDS, (4, 16), generator=torch.Generator().manual_seed(1))
    tokens[1, 11:] = task.dictionary.pad()
    target = tokens.clone()
    target[:, 1::2] = task.dictionary.pad()
    sample = {"net_input": {"src_tokens": tokens.to(device)}, "target": target.to(device)}
    sample.update(ntokens=int(tokens.numel()), nsentences=len(tokens))
    # The criterion itself is not in training: there it times a run, and there is none.
    criterion = CRITERION_REGISTRY["budgeted_masked_lm"](cfg.criterion, task).eval()
    encoder = model.encoder
    model.zero_grad()
    with _calls({"layers": type(encoder.sentence_encoder.layers[0]), "head": type(encoder.lm_head)}) as called:
        loss, size, _ = criterion(model, sample)
    (loss / size).backward()
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss of a small model is {float(loss)}")
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(torch.isfinite(parameter.grad).all()):
            raise RuntimeError(
                f"{name} of a small model has {'no' if parameter.grad is None else 'an infinite'} gradient"
            )
    if not any(bool(parameter.grad.any()) for parameter in model.parameters()):
        raise RuntimeError("all gradients of a small model are zero")
    return called


@contextlib.contextmanager
def _calls(classes: dict[str, type]) -> Iterator[set[str]]:
    """Which of `classes` (by a name for each) have their `forward` called meanwhile. Not by hooks: layers that have
    some are not computed quickly."""
    called: set[str] = set()
    originals = {name: kind.forward for name, kind in classes.items()}

    def listening(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return originals[name](*args, **kwargs)

        return forward

    own = {name: "forward" in vars(kind) for name, kind in classes.items()}
    for name, kind in classes.items():
        kind.forward = listening(name)
    try:
        yield called
    finally:
        for name, kind in classes.items():
            if own[name]:
                kind.forward = originals[name]
            else:
                del kind.forward


def fast_layers() -> Answer:
    from fairseq_plugins.models import fast_encoder

    model = _small()[-1]
    fast, reason = model.is_fast(), fast_encoder.unsupported(model.encoder)
    slow = "layers" in _step()
    if fast and slow:
        return False, "the model calls them fast, but one step of training went by fairseq's: report this"
    if not fast:
        return False, f"fairseq's compute, because {reason or NO_REASON}"
    return True, "one step of training a small prenorm_roberta went by them, and every weight got its gradient"


def masked_lm_head() -> Answer:
    if "head" in _step():
        return False, "budgeted_masked_lm has the logits of all masked positions in memory, by fairseq's head"
    return True, "budgeted_masked_lm never has the logits of all masked positions in memory"


def fused_adam() -> Answer:
    import torch
    from fairseq import optim

    from fairseq_plugins.optim.fused_adam import FusedAdam, unsupported

    cfg, _, model = _small()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    reason = unsupported(parameters)
    optimizer = optim.build_optimizer(cfg.optimizer, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.multiply_grads(0.5)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    if all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True)):
        raise RuntimeError("an update left every weight as it was")
    if not isinstance(optimizer.optimizer, FusedAdam):
        return False, f"--optimizer fused_adam computes as --optimizer adam, because {reason or NO_REASON}"
    return True, f"--optimizer fused_adam took a step by torch's kernel for {parameters[0].device.type}"


def whole_batches() -> Answer:
    """By data of a few sequences."""
    import torch
    from fairseq.data import indexed_dataset

    from fairseq_plugins import masking

    cfg, task, _ = _small()
    reason = masking.unsupported(cfg.task)
    if reason is not None:
        return False, f"fairseq makes them: {reason}"
    with tempfile.TemporaryDirectory() as folder:
        builder = indexed_dataset.make_builder(f"{folder}/train.bin", impl="mmap", vocab_size=len(task.dictionary))
        for _ in range(8):
            builder.add_item(torch.tensor([*range(5, 18), task.dictionary.eos()], dtype=torch.int32))
        builder.finalize(f"{folder}/train.idx")
        own = type(task)(type(cfg.task)({**cfg.task, "data": folder}), task.dictionary)
        own.load_dataset("train")
        dataset = own.datasets["train"]
        if not isinstance(dataset, masking.WholeBatches):
            return False, "fairseq makes them: the masked_lm task loads data of a kind that is not known here"
        dataset.set_epoch(1)
        batch = dataset.collater(dataset.__getitems__([0, 1, 2]))
        masked = int(batch["target"].ne(task.dictionary.pad()).sum())
        if masked == 0 or batch["net_input"]["src_tokens"].eq(task.mask_idx).sum() > masked:
            raise RuntimeError(f"a batch has {masked} tokens masked")
    return True, "the masks of a batch were drawn once, and the rest done to the whole batch"


# --- what the machine does


def bf16_products() -> Answer:
    import torch

    from fairseq_plugins.models import fast_encoder
    from train_large.compression.products import product

    if torch.cuda.is_available():  # where fairseq would train
        used = fast_encoder.products_dtype("auto", "cuda") == torch.bfloat16
        return (
            used,
            "the GPU has them (not measured)" if used else "fp32 is taken, because this GPU has no bf16 products",
        )
    used = fast_encoder.products_dtype("auto") == torch.bfloat16
    instructions = _bf16_instructions()
    fp32, bf16 = _rates(torch.float32, torch.bfloat16, ways=(product, product))
    measured = f"large products run at {fp32:,.0f} GFLOP/s in fp32 and {bf16:,.0f} in bf16 ({bf16 / fp32:.1f} times)"
    if not used:
        reason = NO_REASON if fast_encoder.has_bf16_instructions() else "this CPU has no instructions for bf16 products"
        return False, f"fp32 is taken, because {reason}; {measured}"
    has = f"this CPU has {' and '.join(instructions) or 'bf16 instructions'}"
    if bf16 <= fp32:
        return True, f"taken, as {has}, but not quicker here: give --matmul-precision fp32; {measured}"
    return True, f"{has}; {measured}"


def float32_products() -> Answer:
    from train_large.compression import products

    reason = products.left_to_torch()
    if reason is not None:
        return False, f"left to torch: {reason}"
    import torch

    own, onednns = _rates(torch.float32, torch.float32, ways=(torch.mm, products.product))
    return True, (
        f"by oneDNN, since MKL has no AVX512 for CPUs of {maker()}: "
        f"large products run at {onednns:,.0f} GFLOP/s, and by MKL at {own:,.0f}"
    )


def _bf16_instructions() -> list[str]:
    import torch

    tests = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return [name for name, test in tests.items() if getattr(torch.cpu, test, bool)()]


def _rates(*dtypes: Any, ways: Sequence[Callable[[Any, Any], Any]]) -> list[float]:
    """GFLOP/s of a large product in each of `dtypes` by each of `ways`, in turns so that what disturbs one disturbs
    all; the quickest of each, since nothing makes a product quicker than it is."""
    import torch

    pairs = [[torch.randn(SIDE, SIDE).to(dtype) for _ in range(2)] for dtype in dtypes]
    for way, pair in zip(ways, pairs):
        way(*pair)  # the first is slower
    best = [float("inf")] * len(pairs)
    end = time.perf_counter() + SECONDS
    while True:
        for number, (way, pair) in enumerate(zip(ways, pairs)):
            start = time.perf_counter()
            way(*pair)
            best[number] = min(best[number], time.perf_counter() - start)
        if time.perf_counter() > end:
            return [2 * SIDE**3 / seconds / 1e9 for seconds in best]


def threads() -> Answer:
    import torch

    count, cores = torch.get_num_threads(), usable_cores()
    said = next(
        (f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None
    )
    # torch takes a thread for a core, not for each of the two that a core with hyper-threading looks like.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    enough = min(cores, int(capabilities.get("num_physical_cores") or cores))
    why = f"{_number(count, 'thread')} of torch for {_number(cores, 'core')} that this process may use"
    if count < enough:
        cause = f"{said} says so: unset it" if said else f"set OMP_NUM_THREADS={enough}"
        return False, f"{why}: {cause}"
    if count > cores:
        cause = f"{said} says so: set it to {cores}" if said else f"set OMP_NUM_THREADS={cores}"
        return False, f"{why}, so that they wait for each other: {cause}"
    return True, why + _competitors(cores)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _competitors(cores: int) -> str:
    """What else wants them, as more clauses."""
    clauses = ""
    with contextlib.suppress(ImportError):
        from fairseq.dataclass.configs import DatasetConfig

        workers = DatasetConfig().num_workers
        if workers and cores <= FEW_CORES:
            clauses += (
                f"; fairseq's --num-workers {workers} (its default) loads data on the same ones, 0 costs less here"
            )
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
        if load > cores / 2:
            clauses += f"; all processes of this machine had {load:.1f} running in the last minute"
    return clauses


def gpus() -> Answer:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return False, "none found" if built else f"none found; torch {torch.__version__} is not built for any"
    names = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        square = torch.ones(64, 64, device=f"cuda:{number}")
        if float((square @ square)[0, 0]) != 64:
            raise RuntimeError(f"GPU {number} multiplies wrongly")
        names.append(f"{torch.cuda.get_device_name(number)} (capability {major}.{minor})")
    bf16 = "bf16 by its own instructions" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    return True, f"{', '.join(names)}; {bf16}"


def tpu() -> Answer:
    if importlib.util.find_spec("torch_xla") is None:
        return False, "torch_xla is not installed (it wants an environment of its own: make env-xla, docs/tpu.md)"
    import torch_xla
    from torch_xla._internal import tpu as system

    chips = system.num_available_chips()
    if chips == 0:
        return False, f"torch_xla {torch_xla.__version__} is installed, and finds no TPU on this machine"
    return True, f"{_number(chips, 'chip')}, by torch_xla {torch_xla.__version__}: python -m xla.pretrain"


def packed_prediction() -> Answer:
    """What `train-large predict` computes in; torch's kernels, as the project compiles none."""
    import torch

    try:
        from train_large.compression import onednn
        from train_large.compression.kernels import BFLOAT16, INT8, WIDE
        from train_large.compression.runtime import AUTO, choose_precision
    except ImportError as error:
        return False, f"{_said(error)}: install this package with its extra pack"
    precision = choose_precision(AUTO, WIDE)
    if precision == INT8 and onednn.available():
        generator = torch.Generator().manual_seed(1)
        one, other = (torch.randint(-128, 128, shape, generator=generator) for shape in ((32, 256), (256, 64)))
        if not torch.equal(torch._int_mm(one.to(torch.int8), other.to(torch.int8)).long(), one @ other):
            raise RuntimeError(f"int8 products of torch {torch.__version__} are wrong on this CPU")
        return True, "int8, by torch's kernels on AVX512-VNNI (nothing is compiled for it)"
    if precision == INT8:
        return True, f"int8, by FBGEMM on AVX2 (no AVX512-VNNI); float32 for models narrower than {WIDE}"
    has_onednn = torch.backends.mkldnn.is_available()
    lacks = "this CPU has neither AVX512-VNNI nor AVX2" if has_onednn else "this torch has neither oneDNN nor FBGEMM"
    if precision == BFLOAT16:
        return True, f"bfloat16, by torch's kernels on AVX512-BF16 (nothing is compiled for it); {lacks} for int8"
    return False, f"float32: {lacks} for int8, and no AVX512-BF16 for bfloat16"


OF_FAIRSEQ: dict[str, tuple[Callable[[], Answer], str | None]] = {
    "fast layers": (fast_layers, "--no-fast-layers"),
    "masked LM head": (masked_lm_head, "--no-fast-layers"),
    "bf16 matrix products": (bf16_products, "--matmul-precision fp32"),
    "fp32 products by oneDNN": (float32_products, "TRAIN_LARGE_PRODUCTS=torch"),
    "fused Adam kernel": (fused_adam, "--optimizer adam"),
    "whole masked batches": (whole_batches, "TRAIN_LARGE_BATCHES=fairseq"),
}
OF_TORCH: dict[str, tuple[Callable[[], Answer], str | None]] = {
    "threads": (threads, None),
    "GPUs": (gpus, None),
    "packed prediction": (packed_prediction, "--activations float32"),
    "TPUs": (tpu, None),
}


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # what is imported may print
        found = rows()
    print(json.dumps([asdict(row) for row in found]))


if __name__ == "__main__":
    main()
