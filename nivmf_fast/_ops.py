"""Registers the ops, which call the backend named by their last argument, and their fake kernels.

The ops are `torch.ops.nivmf_fast.*`, with the schemas of `_schemas.py` and `str backend` appended.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nivmf_fast._backends import choose, implementation
from nivmf_fast._schemas import SCHEMAS, Options

_ops = torch.library.Library("nivmf_fast", "DEF")


def _register(op: str) -> None:
    arguments, returns = SCHEMAS[op]
    _ops.define(f"{op}({arguments}, str backend) -> {returns}")

    def run(first: Tensor, *args: Any) -> Any:
        *others, backend = args
        return implementation(op, first.device.type, backend)(first, *others)

    _ops.impl(op, run, "CompositeExplicitAutograd")


for _name in SCHEMAS:
    _register(_name)


def _saved(op: str, samples: Tensor, loc: Tensor, *rest: Any) -> Tensor:
    *options, backend = rest
    return choose(op, samples.device.type, backend).saved_like(op, samples, loc, Options(*options))


def _log_normalizer(concentration: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(concentration, memory_format=torch.contiguous_format)


def _rsample(loc: Tensor, concentration: Tensor, n: int, *_: Any) -> tuple[Tensor, Tensor]:
    return loc.new_empty(n, *loc.shape), concentration.new_empty(n, *concentration.shape)


def _rsample_backward(
    grad: Tensor, samples: Tensor, one_minus_w: Tensor, loc: Tensor, concentration: Tensor, _: str
) -> tuple[Tensor, Tensor]:
    return loc.new_empty(loc.shape), concentration.new_empty(concentration.shape)


def _log_ppk(
    samples: Tensor, loc: Tensor, concentration: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    values = samples.new_empty(samples.shape[1], len(loc))
    saved = _saved("log_ppk", samples, loc, *rest)
    return values, saved, samples.new_empty((), dtype=torch.float64)


def _proxy_nca(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    B = samples.shape[1]
    partial = samples.new_empty(4, B, dtype=torch.float64)
    return samples.new_empty(B), partial, _saved("proxy_nca", samples, loc, *rest)


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs)


def _log_ppk_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(*rest[:4])


def _proxy_nca_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _gradients(samples, loc, concentration, temperature)


_FAKES: dict[str, Callable[..., Any]] = {
    "vmf_log_normalizer": _log_normalizer,
    "vmf_rsample": _rsample,
    "vmf_rsample_backward": _rsample_backward,
    "log_ppk": _log_ppk,
    "log_ppk_backward": _log_ppk_backward,
    "proxy_nca": _proxy_nca,
    "proxy_nca_backward": _proxy_nca_backward,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"nivmf_fast::{_name}", _fake, lib=_ops)
