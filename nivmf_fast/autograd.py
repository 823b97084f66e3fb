"""Backward formulas of the ops, and the autograd function of proxy-NCA over shards."""

from typing import Any

import torch
from torch import Tensor

from nivmf_fast import _ops, special  # noqa: F401  (_ops defines the operators)
from nivmf_fast._partials import loss_of_partial

DOUBLE_BACKWARD = (
    "{op} can be differentiated once: {why}; a second derivative was asked for (create_graph=True?)"
)


def _save_normalizer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    concentration, ctx.dim, ctx.order, ctx.backend = inputs
    ctx.save_for_backward(concentration)


def _log_normalizer(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    if ctx.order == 2:
        raise RuntimeError(special.THIRD_DERIVATIVE)
    (concentration,) = ctx.saved_tensors
    derivative = torch.ops.nivmf_fast.vmf_log_normalizer(
        concentration, ctx.dim, ctx.order + 1, ctx.backend
    )
    return grad * derivative, None, None, None


def _save_rsample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    loc, concentration, _, _, _, ctx.backend = inputs
    samples, one_minus_w = output
    ctx.mark_non_differentiable(one_minus_w)
    ctx.save_for_backward(samples, one_minus_w, loc, concentration)
    ctx.set_materialize_grads(False)


def _rsample(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    into = torch.ops.nivmf_fast.vmf_rsample_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.backend
    )
    return (*into, None, None, None, None)


# The number of tensors among an op's arguments. Options and backend follow, which the backward op
# takes unchanged.
_LOG_PPK_TENSORS, _PROXY_NCA_TENSORS = 4, 5


def _save_log_ppk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, saved, common = output
    ctx.mark_non_differentiable(saved, common)
    ctx.save_for_backward(*inputs[:_LOG_PPK_TENSORS], saved)
    ctx.options = inputs[_LOG_PPK_TENSORS:]
    ctx.set_materialize_grads(False)


def _log_ppk(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    no_gradients = (None,) * len(ctx.options)
    if grad is None:
        return (None,) * _LOG_PPK_TENSORS + no_gradients
    backward = torch.ops.nivmf_fast.log_ppk_backward
    return (*backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), *no_gradients)


def _save_proxy_nca(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, partial, saved = output
    ctx.mark_non_differentiable(partial, saved)
    ctx.save_for_backward(*inputs[:_PROXY_NCA_TENSORS], partial, saved)
    ctx.options = inputs[_PROXY_NCA_TENSORS:]
    ctx.set_materialize_grads(False)


def _proxy_nca(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    no_gradients = (None,) * len(ctx.options)
    if grad is None:
        return (None,) * _PROXY_NCA_TENSORS + no_gradients
    return (*_proxy_nca_gradients(ctx, grad), *no_gradients)


def _proxy_nca_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *into, d_temperature = torch.ops.nivmf_fast.proxy_nca_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (*into, None, d_temperature)


class ShardedProxyNCA(torch.autograd.Function):
    """`proxy_nca` over all proxies, of which only a range is here.

    Between the forward and the loss, `combine` turns the partial of this range into that of all.
    Takes the op's five tensors, `combine`, and a tuple of the op's flat options and backend.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, combine, ctx.options = inputs
        _, partial, saved = torch.ops.nivmf_fast.proxy_nca(*tensors, *ctx.options)
        combined = combine(partial)
        ctx.save_for_backward(*tensors, combined, saved)
        return loss_of_partial(combined, tensors[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_proxy_nca_gradients(ctx, grad), None, None)


def _refuse(op: str, why: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(DOUBLE_BACKWARD.format(op=op, why=why))

    return backward


_register = torch.library.register_autograd
_register("nivmf_fast::vmf_log_normalizer", _log_normalizer, setup_context=_save_normalizer)
_register("nivmf_fast::vmf_rsample", _rsample, setup_context=_save_rsample)
_register("nivmf_fast::log_ppk", _log_ppk, setup_context=_save_log_ppk)
_register("nivmf_fast::proxy_nca", _proxy_nca, setup_context=_save_proxy_nca)
for _op, _why in (
    ("vmf_rsample", "its gradient is itself an estimate from the same draws"),
    ("log_ppk", "its gradient is a fused kernel"),
    ("proxy_nca", "its gradient is a fused kernel"),
):
    _register(f"nivmf_fast::{_op}_backward", _refuse(_op, _why))
