"""`--optimizer fused_adam`: fairseq's `--optimizer adam`, its rule, flags and state, in one pass over the parameters.

fairseq's Adam (fairseq/optim/adam.py, 0.12.3.1) goes over every parameter, its gradient and its two averages a dozen
times; torch's fused kernel reads and writes each once. And what fairseq's loop does to the gradients before the step,
dividing by the sample size and clipping, are passes of their own there: here both only change a number, which the
kernel multiplies by as it reads. One pass more is for the norm, which every run needs.

The rule is fairseq's. With b1, b2 the bias corrections 1 - beta1^t and 1 - beta2^t,

    fairseq:  p -= lr * sqrt(b2) / b1 * m / (sqrt(v) + eps)
    torch:    p -= lr / b1 * m / (sqrt(v) / sqrt(b2) + eps)

so torch is given eps / sqrt(b2), a new number every update.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from torch import Tensor

from fairseq_plugins.run import fail
from train_large.compression.parallel import on_all_cores

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
WORTH_SHARING = 1 << 20  # elements whose norm takes longer than to wake other threads
APEX_FLAGS = ("use_old_adam", "fp16_adam_stats")  # of `--optimizer adam`: they choose between its own implementations


def unsupported(parameters: Iterable[Tensor]) -> str | None:
    """Why torch's fused kernel cannot update `parameters` by fairseq's rule, in one clause; None if it can."""
    devices = set()
    for parameter in parameters:
        if parameter.device.type not in DEVICES:
            return f"a parameter is on {parameter.device.type}, and torch's fused kernel is used on cpu and cuda only"
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            return f"a parameter is {kind}, and torch's fused kernel wants it, like fairseq's state, in float32"
        if parameter.layout != torch.strided or not parameter.is_contiguous():
            return "a parameter is not one piece of memory in order"
        devices.add(parameter.device.type)
    return next(filter(None, map(_fault_of_kernel, sorted(devices))), None)


@functools.cache
def _fault_of_kernel(device: str) -> str | None:
    """Why this release of torch has no fused kernel for `device`; None if one step of it comes out right."""
    p, g, m, v = (torch.tensor([x], device=device) for x in (1.0, 8.0, 0.0, 0.0))
    try:
        _kernel([p], [g], [m], [v], [], 1, torch.tensor(4.0, device=device), lr=0.5, betas=(0.5, 0.5), eps=0.0)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} has no fused kernel for {device} ({str(error).splitlines()[0]})"
    if [p.item(), m.item(), v.item()] != [0.5, 1.0, 2.0]:
        return f"the fused kernel of torch {torch.__version__} for {device} does not scale gradients"
    return None


def _kernel(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor],
    step: int,
    divisor: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Update number `step` (from 1) of `parameters` by fairseq's rule, all of them float32 on one device.

    Where `divisor` (0-dim float32) is given, the gradients are divided by it, in place. `largest` is empty, or AMSGrad
    is computed.
    """
    # All have made as many steps, so they share one counter: the kernel only reads it.
    counter = torch.full((), float(step), device=parameters[0].device)
    torch._fused_adamw_(
        parameters,
        gradients,
        averages,
        squares,
        largest,
        [counter] * len(parameters),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps / math.sqrt(1 - betas[1] ** step),
        amsgrad=bool(largest),
        maximize=False,
        grad_scale=divisor,
        found_inf=None,
    )


class FusedAdam(Adam):
    """fairseq's Adam with `step` by the fused kernel; groups, state and their names are its own.

    `factor` is what the gradients are still to be multiplied by. It lives here, not in fairseq's optimizer around
    this one, since fairseq's wrappers for mixed precision clear gradients by this one's `zero_grad`
    (fairseq/optim/fairseq_optimizer.py:137 as AMPOptimizer inherits it, 0.12.3.1).
    """

    factor: float | Tensor = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.factor = 1.0
        super().zero_grad(set_to_none)

    def parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def gradients(self, of: Callable[[Tensor], bool] = lambda _: True) -> list[Tensor]:
        """The gradients there are, not multiplied yet. Raises RuntimeError for a sparse one, as fairseq's Adam does."""
        found = [p.grad.detach() for p in self.parameters() if p.grad is not None and of(p)]
        if any(gradient.is_sparse for gradient in found):
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        return found

    def settle(self) -> None:
        """Multiply the gradients now: a pass over them."""
        factor, self.factor = self.factor, 1.0
        if torch.is_tensor(factor) or factor != 1:
            for gradient in self.gradients():
                gradient.mul_(factor.to(gradient) if torch.is_tensor(factor) else factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(g.dtype != torch.float32 or not g.is_contiguous() for g in self.gradients()):
            self.settle()  # the kernel will see copies of those
        divisors: dict[torch.device, Tensor | None] = {}
        for group in self.param_groups:
            alike: dict[tuple[torch.device, int], list[list[Tensor]]] = defaultdict(lambda: [[], [], [], [], []])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.detach().to(torch.float32).contiguous()
                averages = self._averages(parameter, group["amsgrad"])
                self.state[parameter]["step"] += 1
                lists = alike[parameter.device, self.state[parameter]["step"]]
                for column, tensor in zip(lists, (parameter, gradient, *averages), strict=False):  # three, or two
                    column.append(tensor)
            for (device, step), lists in alike.items():
                if device not in divisors:
                    divisors[device] = self._divisor(device)
                options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
                _kernel(*lists, step, divisors[device], **options)
        self.factor = 1.0  # the kernel has written the gradients back multiplied
        return loss

    def can_hold(self, parameter: Tensor) -> bool:
        """Whether `parameter` is its own, and an infinite average of the squares stays so: beta2 is not 0."""
        groups = [group for group in self.param_groups for own in group["params"] if own is parameter]
        return bool(groups) and groups[0]["betas"][1] > 0

    def hold(self, parameter: Tensor, where: Tensor) -> None:
        """Let no step move `parameter` where `where` (bool, its shape): there the average of the squares is infinite,
        and stays so, and what a step adds is lr * m / infinity, exactly 0. That costs no pass over the weights."""
        [amsgrad] = [group["amsgrad"] for group in self.param_groups for own in group["params"] if own is parameter]
        self._averages(parameter, amsgrad)
        self.state[parameter]["exp_avg_sq"].masked_fill_(where, math.inf)

    def _averages(self, parameter: Tensor, amsgrad: bool) -> list[Tensor]:
        """The averages that `parameter` has in fairseq's state, made where there are none.

        The kernel looks at no shape or type: what it is given must be right.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = 0
        state["step"] = int(state["step"])
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
            elif state[name].shape != parameter.shape:
                shapes = f"{tuple(state[name].shape)}, not {tuple(parameter.shape)}"
                raise RuntimeError(f"the optimizer's state is of another model: {name} has the shape {shapes}")
            else:
                state[name] = state[name].to(parameter).contiguous()
        return [state[name] for name in names]

    def _divisor(self, device: torch.device) -> Tensor | None:
        """1 / factor, which is what the kernel divides by; None for 1."""
        if torch.is_tensor(self.factor):
            return self.factor.to(device, torch.float32).reshape(()).reciprocal()
        if self.factor == 1:
            return None
        return torch.full((), 1 / self.factor if self.factor else math.inf, device=device)


@register_optimizer("fused_adam", dataclass=FairseqAdamConfig)
class FusedFairseqAdam(FairseqAdam):
    """fairseq's side: what `Trainer.train_step` calls, in this order (fairseq/trainer.py:926, 0.12.3.1).

    Between `multiply_grads` and `step`, `p.grad` is what the backward passes left; `step` writes it multiplied.

    Where `unsupported` finds a reason (--tpu, --memory-efficient-fp16 and -bf16), this is `--optimizer adam`, and the
    log says so.
    """

    def __init__(self, cfg: Any, params: Iterable[Any]) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for flag in APEX_FLAGS:
            if getattr(cfg, flag, False):
                fail(f"--{flag.replace('_', '-')} is for --optimizer adam: take that, or leave the flag out.")
        params = list(params)
        self._optimizer = FusedAdam(params, **self.optimizer_config)
        reason = unsupported(self._optimizer.parameters())
        if reason is None:
            logger.info("fused_adam: torch's fused kernel")
        else:
            logger.warning(f"fused_adam: computed as --optimizer adam, since {reason}")
            super().__init__(cfg, params)

    def backward(self, loss: Tensor) -> None:
        self._settle()  # what is added to the gradients now is not to be multiplied
        super().backward(loss)

    def all_reduce_grads(self, module: Any) -> None:
        self._settle()
        super().all_reduce_grads(module)

    def multiply_grads(self, c: float | Tensor) -> None:
        optimizer = self._fused()
        if optimizer is None:
            super().multiply_grads(c)
        elif torch.is_tensor(c) and torch.is_tensor(optimizer.factor):
            optimizer.factor = optimizer.factor * c.to(optimizer.factor)
        else:
            optimizer.factor = optimizer.factor * c

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The norm before clipping, of what `step` will see, as `utils.clip_grad_norm_` computes it
        (fairseq/utils.py:347, 0.12.3.1): a parameter marked `expert` is clipped, but not part of the norm."""
        optimizer = self._fused()
        if optimizer is None:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        gradients = optimizer.gradients(of=lambda parameter: not hasattr(parameter, "expert"))
        if not gradients:
            return next(optimizer.parameters()).new_tensor(0.0)
        norm = _norm(gradients)
        norm = norm * (abs(optimizer.factor).to(norm) if torch.is_tensor(optimizer.factor) else abs(optimizer.factor))
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            self.multiply_grads((float(max_norm) / (norm + 1e-6)).clamp_(max=1))
        return norm

    def hold_at_zero(self, parameter: Tensor, where: Tensor) -> bool:
        """Set `parameter` to zero where `where` (bool, its shape) and keep it there through every step to come. That is
        in the state, and so in the checkpoints. False, with nothing done, where the fused optimizer does not update
        `parameter` itself, or has no average of the squares (beta2 is 0)."""
        optimizer = self._fused()
        if optimizer is None or not optimizer.can_hold(parameter):
            return False
        parameter.data.masked_fill_(where, 0)
        optimizer.hold(parameter, where)
        return True

    def _fused(self) -> FusedAdam | None:
        """None where fairseq's own is used, and where --zero-sharding has put its own around the fused one."""
        return self._optimizer if isinstance(self._optimizer, FusedAdam) else None

    def _settle(self) -> None:
        optimizer = self._fused()
        if optimizer is not None:
            optimizer.settle()


# `Trainer.state_dict` writes the class's name beside the state, and `load_checkpoint` goes on only under the same name
# (fairseq/trainer.py:419 and 614, 0.12.3.1). The state is FairseqAdam's, so that is its name: a run begun with either
# goes on with the other.
FusedFairseqAdam.__name__ = FairseqAdam.__name__


def _norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all `gradients` together, 0-dim float32 on the first one's device."""
    alike = defaultdict(list)
    for gradient in gradients:
        alike[gradient.device, gradient.dtype].append(gradient)
    device = gradients[0].device
    norms = torch.cat([torch.stack(_norms(some)).to(device) for some in alike.values()])
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)


def _norms(alike: list[Tensor]) -> Sequence[Tensor]:
    """The norm of each, float32; all of one type on one device."""
    if alike[0].device.type != "cpu":
        return torch._foreach_norm(alike, 2, dtype=torch.float32)
    if sum(gradient.numel() for gradient in alike) < WORTH_SHARING:
        return [_norm_of(gradient) for gradient in alike]
    shares = _shares([gradient.numel() for gradient in alike], torch.get_num_threads())
    found = on_all_cores(lambda share: {number: _norm_of(alike[number]) for number in share}, shares)
    norms = {number: norm for some in found for number, norm in some.items()}
    return [norms[number] for number in range(len(alike))]


def _norm_of(gradient: Tensor) -> Tensor:
    """By one thread, as torch does it, and to the last bit as fairseq has it: what rounding leaves off a norm (1e-5 of
    that of 6M elements, 1e-3 of 40M's) scales every update, and a sum in another order gives losses that part from
    fairseq's by 1e-3 within 300 updates."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Which tensors each of `count` threads takes, such that none has much more to do than the others."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += sizes[number]
    return shares
