"""fused_adam against fairseq's adam: the same numbers, the same state, in the order in which fairseq calls them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import OPTIMIZER_REGISTRY, AMPOptimizer, FairseqOptimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq_cli import train as fairseq_train
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

import fairseq_plugins
from fairseq_plugins.optim import fused_adam
from fairseq_plugins.optim.fused_adam import FusedAdam, FusedFairseqAdam, unsupported

SHAPES = [(7, 5), (64, 33), (1,), (17,), (3, 2, 4), (0,), (1025,)]
BETAS = (0.9, 0.98)


def config(**more: Any) -> Any:
    values = {"adam_betas": str(BETAS), "adam_eps": 1e-6, "weight_decay": 0.01, "lr": [1e-3], "tpu": False}
    return OmegaConf.create({**values, "use_old_adam": False, "fp16_adam_stats": False, **more})


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def pair(**more: Any) -> tuple[FairseqAdam, FusedFairseqAdam]:
    return FairseqAdam(config(**more), parameters()), FusedFairseqAdam(config(**more), parameters())


def fill(optimizer: FairseqOptimizer, seed: int, size: float = 1.0, without: tuple[int, ...] = ()) -> None:
    """Add gradients, as a backward pass does."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(optimizer.params):
        gradient = size * torch.randn(parameter.shape, generator=generator)
        if index not in without:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def assert_alike(stock: Any, ours: Any, rtol: float = 2e-6) -> None:
    """Parameters and both averages of two fairseq optimizers."""
    for a, b in zip(stock.params, ours.params, strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=1e-7)
        state_a, state_b = stock.optimizer.state[a], ours.optimizer.state[b]
        assert {k: type(v) for k, v in state_a.items()} == {k: type(v) for k, v in state_b.items()}
        if state_a:
            assert state_a["step"] == state_b["step"]
            # Gradients of this size may have cancelled in the average.
            scale = float(state_a["exp_avg_sq"].max().sqrt()) if a.numel() else 1.0
            torch.testing.assert_close(state_b["exp_avg"], state_a["exp_avg"], rtol=rtol, atol=rtol * scale)
            torch.testing.assert_close(state_b["exp_avg_sq"], state_a["exp_avg_sq"], rtol=2 * rtol, atol=1e-20)


def update(
    optimizer: Any, seed: int, clip: float = 0.0, micro_batches: int = 1, sample_size: Any = 1, without: Any = ()
) -> Tensor:
    """One update in the order of `Trainer.train_step`."""
    optimizer.zero_grad()
    for batch in range(micro_batches):
        fill(optimizer, 100 * seed + batch, without=without)
    optimizer.multiply_grads(1 / sample_size)
    norm = optimizer.clip_grad_norm(clip)
    optimizer.step()
    return norm


@settings(max_examples=25, deadline=None)
@given(
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    clip=st.sampled_from([0.0, 0.1, 1.0, 1e6]),
    micro_batches=st.integers(1, 3),
    sample_size=st.floats(0.01, 1e5),
    as_tensor=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-6, 1e-2]),
    betas=st.sampled_from([(0.9, 0.98), (0.9, 0.999), (0.0, 0.5)]),
    seed=st.integers(0, 1000),
)
def test_twenty_updates_are_those_of_fairseqs_adam(
    decay, clip, micro_batches, sample_size, as_tensor, eps, betas, seed
):
    stock, ours = pair(weight_decay=decay, adam_eps=eps, adam_betas=str(betas))
    assert isinstance(ours.optimizer, FusedAdam)
    for number in range(20):
        for optimizer in (stock, ours):
            optimizer.set_lr(1e-3 * (1 + number % 7))
        size = torch.tensor(sample_size) if as_tensor else sample_size
        norms = [update(o, seed + number, clip, micro_batches, size) for o in (stock, ours)]
        assert norms[0].shape == norms[1].shape == ()
        assert norms[0].dtype == norms[1].dtype == torch.float32
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    assert_alike(stock, ours)


def test_gradients_are_not_touched_before_the_step_and_multiplied_after_it():
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
    before = [p.grad for p in ours.params]
    values = copy.deepcopy(before)
    for optimizer in (stock, ours):
        optimizer.multiply_grads(1 / 32)
        optimizer.multiply_grads(torch.tensor(0.5))
        optimizer.clip_grad_norm(0.01)
    assert all(p.grad is gradient for p, gradient in zip(ours.params, before, strict=True))
    assert all(map(torch.equal, before, values))
    for optimizer in (stock, ours):
        optimizer.step()
    for a, b in zip(stock.params, ours.params, strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=0)
    assert_alike(stock, ours)
    for optimizer in (stock, ours):  # what is left of this update does not go into the next
        optimizer.step()
    assert_alike(stock, ours)


@pytest.mark.parametrize("clear", ["the optimizer", "torch's within it"])
def test_clearing_gradients_forgets_the_factor(clear):
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        optimizer.multiply_grads(float("nan"))
        optimizer.clip_grad_norm(1.0)
        (optimizer if clear == "the optimizer" else optimizer.optimizer).zero_grad()
        fill(optimizer, 2)
        optimizer.step()
    assert_alike(stock, ours)


def test_clipping_again_sees_what_was_clipped():
    stock, ours = pair()
    norms = []
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        norms.append([optimizer.clip_grad_norm(clip).item() for clip in (0.0, 5.0, 2.0, 3.0)])
        optimizer.multiply_grads(-0.5)
        norms[-1].append(optimizer.clip_grad_norm(0.0).item())
        optimizer.step()
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert norms[1][1:] == pytest.approx([norms[1][0], 5, 2, 1], rel=1e-5)
    assert_alike(stock, ours)


def test_a_backward_pass_after_the_multiplication_adds_to_multiplied_gradients():
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        optimizer.multiply_grads(torch.tensor(1e-2))
        optimizer.clip_grad_norm(0.5)
        optimizer.backward(sum((p * p).sum() for p in optimizer.params))
        optimizer.multiply_grads(0.5)
        optimizer.all_reduce_grads(nn.Linear(1, 1))
        optimizer.step()
    assert_alike(stock, ours)


def test_parameters_without_gradients_stay_and_keep_their_own_count():
    stock, ours = pair()
    for number, without in enumerate([(), (0, 3), (), (1,), (0, 1)]):
        kept = [p.detach().clone() for p in ours.params]
        for optimizer in (stock, ours):
            update(optimizer, number, clip=1.0, sample_size=3, without=without)
        for index in without:
            assert torch.equal(list(ours.params)[index], kept[index])
    assert_alike(stock, ours)
    assert {ours.optimizer.state[p]["step"] for p in ours.params} == {3, 4, 5}


def test_no_gradient_at_all_has_the_norm_zero():
    _, ours = pair()
    kept = [p.detach().clone() for p in ours.params]
    ours.multiply_grads(2.0)
    assert ours.clip_grad_norm(1.0).item() == 0
    ours.step()
    assert all(map(torch.equal, ours.params, kept))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_norm_that_is_not_finite_is_told_and_stepping_anyway_does_what_adam_does(value, clip):
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        next(iter(optimizer.params)).grad[0, 0] = value
        optimizer.multiply_grads(0.5)
        norm = optimizer.clip_grad_norm(clip)
        assert torch.equal(norm.nan_to_num(7.0), torch.tensor(value).nan_to_num(7.0))
        optimizer.step()
    for a, b in zip(stock.params, ours.params, strict=True):
        torch.testing.assert_close(b, a, equal_nan=True)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("updates_before", [0, 3])
def test_what_is_held_at_zero_stays_there_and_the_rest_is_fairseqs(amsgrad, updates_before):
    """Against fairseq's Adam with a mask after every step: with momentum and decay, and through a saved state."""
    stock, ours = pair(weight_decay=0.1)
    for group in (*stock.optimizer.param_groups, *ours.optimizer.param_groups):
        group["amsgrad"] = amsgrad
    for number in range(updates_before):
        for optimizer in (stock, ours):
            update(optimizer, number)
    generator = torch.Generator().manual_seed(1)
    gone = [torch.rand(shape, generator=generator) < 0.45 for shape in SHAPES]
    assert all(ours.hold_at_zero(p, where) for p, where in zip(ours.params, gone, strict=True))
    for number in range(10, 15):
        update(ours, number)
        with torch.no_grad():
            for p, where in zip(stock.params, gone, strict=True):
                p.masked_fill_(where, 0)
        update(stock, number)
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b, where in zip(stock.params, ours.params, gone, strict=True):
        assert torch.equal(b[where], torch.zeros_like(b[where]))
        torch.testing.assert_close(b[~where], a[~where], rtol=2e-6, atol=1e-7)


def test_fairseqs_adam_keeps_at_zero_what_a_state_of_ours_holds():
    stock, ours = pair(weight_decay=0.1)
    update(ours, 0)
    gone = [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
    for p, q, where in zip(ours.params, stock.params, gone, strict=True):
        ours.hold_at_zero(p, where)
        q.data.zero_()
    stock.load_state_dict(ours.state_dict())
    for number in range(3):
        update(stock, number)
    assert all(torch.equal(p, torch.zeros_like(p)) for p in stock.params)


def test_a_parameter_of_another_optimizer_is_not_held():
    _, ours = pair()
    other = nn.Parameter(torch.ones(3))
    assert not ours.hold_at_zero(other, torch.ones(3, dtype=torch.bool))
    assert torch.equal(other, torch.ones(3))
    plain = FusedFairseqAdam(config(), parameters(dtype=torch.bfloat16))
    assert not plain.hold_at_zero(next(iter(plain.params)), torch.ones(SHAPES[0], dtype=torch.bool))


def test_nothing_is_held_without_an_average_of_squares():
    """0 times infinity is no number."""
    ours = FusedFairseqAdam(config(adam_betas="(0.9, 0.0)"), parameters())
    first = next(iter(ours.params))
    before = first.detach().clone()
    assert not ours.hold_at_zero(first, torch.ones(first.shape, dtype=torch.bool))
    assert torch.equal(first, before)


def test_groups_keep_their_own_rates():
    def groups() -> list[dict[str, Any]]:
        first = parameters()
        return [{"params": first[:2], "lr": 0.1, "weight_decay": 0.5}, {"params": first[2:], "betas": (0.5, 0.9)}]

    stock, ours = FairseqAdam(config(), groups()), FusedFairseqAdam(config(), groups())
    for number in range(5):
        for optimizer in (stock, ours):
            update(optimizer, number, clip=0.3, sample_size=7)
    assert_alike(stock, ours)


def test_experts_are_clipped_and_not_counted():
    stock, ours = pair()
    norms = []
    for optimizer in (stock, ours):
        next(iter(optimizer.params)).expert = True
        norms.append(update(optimizer, 1, clip=0.3).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert_alike(stock, ours)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("high", [600, 100])  # together more, and less, than is worth sharing
def test_the_norm_is_fairseqs_to_the_last_bit(threads: int, high: int):
    """Added up in another order it would not be: it is the sum of a million squares, in float32."""
    generator = torch.Generator().manual_seed(threads)
    shapes = [(high, 1000), (5,), (1,), (high, 700), (1025,), (high, 800)]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    norms = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in (FairseqAdam, FusedFairseqAdam):
            own = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
            for parameter, gradient in zip(own, gradients):
                parameter.grad = gradient.clone()
            norms.append(kind(config(), own).clip_grad_norm(1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*norms)
    assert norms[0].item() == pytest.approx(sum(float(g.double().square().sum()) for g in gradients) ** 0.5, rel=1e-3)


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 5))
def test_shares_are_even(sizes: list[int], count: int):
    shares = fused_adam._shares(sizes, count)
    assert len(shares) == count
    assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_norms_of_shards_are_put_together_before_clipping():
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        optimizer.multiply_grads(0.25)
        optimizer.clip_grad_norm(1.0, aggregate_norm_fn=lambda norm: 3 * norm)
        optimizer.step()
    assert_alike(stock, ours)


def test_gradients_in_another_order_or_type_are_understood():
    """The kernel itself reads memory in order, whatever the strides say."""
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        for parameter in list(optimizer.params)[:2]:
            parameter.grad = parameter.grad.t().contiguous().t()
        optimizer.multiply_grads(0.1)
        optimizer.step()
    assert_alike(stock, ours)
    for a, b in zip(stock.params, ours.params, strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=0)
    next(iter(ours.params)).grad = torch.zeros(7, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.clip_grad_norm(1.0)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_torch_optimizer_alone_is_fairseqs(amsgrad):
    ours, theirs = parameters(), parameters()
    optimizers = [kind(p, lr=0.01, amsgrad=amsgrad) for kind, p in ((FusedAdam, ours), (Adam, theirs))]
    for seed in range(5):
        for mine, stock in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed)) / (1 + seed)
            stock.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    assert optimizers[0].state_dict()["state"][0].keys() == optimizers[1].state_dict()["state"][0].keys()


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("begun_with", ["adam", "fused_adam"])
def test_a_state_crosses_over(begun_with, tmp_path):
    begun, other = pair()
    if begun_with == "fused_adam":
        begun, other = other, begun
    for number in range(4):
        update(begun, number, clip=1.0, sample_size=5)
    state = through_a_file(begun.state_dict(), tmp_path / "state.pt")
    assert {type(value["step"]) for value in state["state"].values()} == {int}
    with torch.no_grad():
        for new, old in zip(other.params, begun.params, strict=True):
            new.copy_(old)
    other.load_state_dict(state, {"lr": 0.5})
    assert other.get_lr() == 0.5
    other.set_lr(1e-3)
    for number in range(4, 8):
        for optimizer in (begun, other):
            update(optimizer, number, clip=1.0, sample_size=5)
    assert_alike(begun, other)
    assert begun.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert type(begun).__name__ == type(other).__name__  # Trainer.load_checkpoint compares them


def test_a_state_of_another_shape_is_refused():
    _, ours = pair()
    update(ours, 1)
    first = next(iter(ours.params))
    ours.optimizer.state[first]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="another model"):
        update(ours, 2)


def test_a_copy_of_the_torch_optimizer_has_no_factor_of_its_own():
    _, ours = pair()
    fill(ours, 1)
    ours.multiply_grads(3.0)
    assert copy.deepcopy(ours.optimizer).factor == 1


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(2, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3).t(), "memory"),
        (torch.zeros(2, 3).to_sparse(), "memory"),
    ],
)
def test_what_the_kernel_cannot_do_is_told(parameter, named):
    assert named in unsupported([torch.zeros(1), parameter])


def test_this_machine_has_the_kernel():
    assert unsupported(parameters()) is None
    assert unsupported([]) is None


def test_a_torch_without_the_kernel_is_told_and_plain_adam_takes_over(monkeypatch, caplog):
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("Could not run 'aten::_fused_adamw_'\nand so on")

    fused_adam._fault_of_kernel.cache_clear()
    monkeypatch.setattr(torch, "_fused_adamw_", missing)
    try:
        stock, ours = pair()
    finally:
        fused_adam._fault_of_kernel.cache_clear()
    assert type(ours.optimizer) is Adam
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"torch {torch.__version__}" in warning
    assert "\n" not in warning
    for number in range(3):
        for optimizer in (stock, ours):
            update(optimizer, number, clip=0.2, sample_size=torch.tensor(9.0))
    assert all(map(torch.equal, ours.params, stock.params))


@pytest.mark.parametrize("flag", ["use_old_adam", "fp16_adam_stats"])
def test_flags_that_choose_another_adam_are_refused(flag):
    with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} .*--optimizer adam"):
        FusedFairseqAdam(config(**{flag: True}), parameters())


def test_the_flags_are_those_of_adam():
    assert OPTIMIZER_REGISTRY["fused_adam"] is FusedFairseqAdam
    words = ["data", "--task", "masked_lm", "--arch", "roberta_base", "--optimizer", "fused_adam", "--lr", "0.25"]
    words += ["--adam-betas", "(0.5, 0.75)", "--adam-eps", "0.125", "--weight-decay", "0.0625"]
    parsed = options.parse_args_and_arch(options.get_training_parser("masked_lm"), words)
    section = convert_namespace_to_omegaconf(parsed).optimizer
    assert section._name == "fused_adam"
    assert set(section) - {"_name"} == set(FairseqAdamConfig.__dataclass_fields__) - {"_name"}
    (group,) = FusedFairseqAdam(section, parameters()).param_groups
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay")] == [0.25, (0.5, 0.75), 0.125, 0.0625]


# -- within fairseq's wrappers --


def wrapped(kind: str, name: str, dtype: torch.dtype) -> Any:
    root = OmegaConf.create(
        {
            "common": {"fp16": False, "bf16": True, "fp16_no_flatten_grads": True, "fp16_scale_window": 4}
            | {"fp16_init_scale": 4, "min_loss_scale": 1e-4, "fp16_scale_tolerance": 0.0, "threshold_loss_scale": None},
            "optimization": {"update_freq": [1]},
            "distributed_training": {"distributed_world_size": 1},
            "optimizer": {"_name": name, **config()},
        }
    )
    kinds = {"bf16": FP16Optimizer, "memory": MemoryEfficientFP16Optimizer, "amp": AMPOptimizer}
    return kinds[kind].build_optimizer(root, parameters(dtype=dtype))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "dtype", "fused"),
    [("bf16", torch.bfloat16, True), ("memory", torch.bfloat16, False), ("amp", torch.float32, True)],
)
def test_fairseqs_wrappers_of_mixed_precision_give_what_they_give_around_adam(kind, dtype, fused):
    stock, ours = wrapped(kind, "adam", dtype), wrapped(kind, "fused_adam", dtype)
    assert isinstance(ours.optimizer, FusedAdam) is fused
    assert ours.supports_flat_params
    models = [getattr(o, "fp16_params", None) or list(o.params) for o in (stock, ours)]
    for number in range(5):
        norms = []
        for optimizer, model in zip((stock, ours), models, strict=True):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(number)
            loss = sum((p * torch.randn(p.shape, generator=generator).to(dtype)).sum() for p in model)
            optimizer.backward(loss)
            optimizer.multiply_grads(1 / torch.tensor(3.0))
            norms.append(optimizer.clip_grad_norm(0.3).item())
            optimizer.step()
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for a, b in zip(*models, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert_alike(stock, ours)


# -- real runs --

USER_DIR = str(Path(fairseq_plugins.__file__).parent)
RUN = "--task masked_lm --criterion masked_lm --arch roberta_prenorm --encoder-layers 2 --encoder-embed-dim 32"
RUN += " --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --max-positions 16 --tokens-per-sample 16 --cpu"
RUN += " --batch-size 4 --update-freq 2 --required-batch-size-multiple 1 --num-workers 0 --no-progress-bar --seed 1"
RUN += " --log-format json --log-interval 1 --no-epoch-checkpoints --disable-validation --weight-decay 0.01"
RUN += " --lr 0.003 --lr-scheduler inverse_sqrt --warmup-updates 5 --adam-betas (0.9,0.98) --adam-eps 1e-6"


def losses(text: Path, save_dir: Path, updates: int, optimizer: str, *more: str) -> list[tuple[float, float]]:
    """Train in this process; the loss of each update, in fairseq's base 2, and the norm of its gradients."""
    seen = []
    upstream = fairseq_train.Trainer._reduce_and_log_stats

    def reduce_and_log_stats(self: Any, logging_outputs: Any, sample_size: Any, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            seen.append((float(sum(log["loss"] for log in logging_outputs) / sample_size), float(grad_norm)))
        return upstream(self, logging_outputs, sample_size, grad_norm)

    words = [str(text), *RUN.split(), "--user-dir", USER_DIR, "--save-dir", str(save_dir), *more]
    words += ["--max-update", str(updates), "--optimizer", optimizer]
    parsed = options.parse_args_and_arch(options.get_training_parser(), words)
    torch.serialization.add_safe_globals([type(parsed)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fairseq_train.Trainer, "_reduce_and_log_stats", reduce_and_log_stats)
        fairseq_train.main(convert_namespace_to_omegaconf(parsed))
    return seen


def assert_same_run(ours: list[tuple[float, float]], stock: list[tuple[float, float]]) -> None:
    assert len(ours) == len(stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--clip-norm", "0.5"), ("--clip-norm", "0"), ("--clip-norm", "0.5", "--amp")])
def test_a_run_loses_what_it_loses_with_adam(text, tmp_path, more):
    stock = losses(text, tmp_path / "adam", 20, "adam", *more)
    ours = losses(text, tmp_path / "fused_adam", 20, "fused_adam", *more)
    assert len(stock) == 20
    assert max(norm for _, norm in stock) > 0.5  # something was clipped
    assert stock[0][0] - stock[19][0] > 0.1  # and learnt
    assert_same_run(ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("adam", "fused_adam"), ("fused_adam", "adam")])
def test_a_run_goes_on_with_the_other(text, tmp_path, first, then):
    whole = losses(text, tmp_path / "whole", 20, "adam")
    begun = losses(text, tmp_path / "crossed", 10, first)
    gone_on = losses(text, tmp_path / "crossed", 20, then)
    assert (len(begun), len(gone_on)) == (10, 10)
    assert_same_run(begun + gone_on, whole)
    saved = torch.load(tmp_path / "crossed" / "checkpoint_last.pt", weights_only=True)
    assert [entry["optimizer_name"] for entry in saved["optimizer_history"]] == ["FairseqAdam"] * 2
    assert saved["cfg"]["optimizer"]["_name"] == then


@pytest.mark.slow
def test_a_run_whose_gradients_are_not_finite_ends_as_with_adam(text, tmp_path, monkeypatch):
    """Whatever `NanDetector`, which then runs the batch again, makes of this torch."""
    upstream = MaskedLmLoss.forward

    def forward(self: Any, model: Any, sample: Any, reduce: bool = True) -> Any:
        loss, size, log = upstream(self, model, sample, reduce)
        return loss * float("inf"), size, log

    monkeypatch.setattr(MaskedLmLoss, "forward", forward)
    raised = {}
    for name in ("adam", "fused_adam"):
        with pytest.raises(Exception) as ending:  # noqa: PT011 - adam's is not known
            losses(text, tmp_path / name, 3, name)
        error: BaseException | None = ending.value
        raised[name] = []
        while error is not None:
            raised[name].append((type(error), str(error)))
            error = error.__context__
        assert (tmp_path / name / "crash.pt").exists()
    assert raised["fused_adam"] == raised["adam"]
    assert (FloatingPointError, "gradients are Nan/Inf") in raised["adam"]


def test_gradients_multiplied_by_zero_are_zero():
    """As an update of nothing but stand-ins is."""
    stock, ours = pair()
    for optimizer in (stock, ours):
        fill(optimizer, 1)
        optimizer.multiply_grads(0.0)
        optimizer.step()
    assert_alike(stock, ours)
