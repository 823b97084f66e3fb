"""The op contract as values: schemas, the options of log-PPK and their names.

Imports nothing of the library, so that every layer may read it.
"""

import math
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch

Normalizer = Literal["exact", "released"]
Precision = Literal["float32", "fast"]

NORMALIZERS: tuple[Normalizer, ...] = get_args(Normalizer)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Options(NamedTuple):
    """How log-PPK is computed; the last arguments of its ops, in this order."""

    exact: bool  # the exact normaliser, not the research code's
    projection: bool  # (K mu).(K x)/|K x|, not (K mu).x
    precision: int  # index into PRECISIONS: the stable ABI has numbers, no strings
    workspace: int  # bytes of scratch, and of scores kept for the backward
    keep: bool  # whether a backward pass follows, for which scores are worth keeping


def dead_log2(dtype: torch.dtype, logits: int) -> float:
    """log2 of the softmax weight below which a tile is dead.

    An image has `logits` = N P weights that sum to 1. Those that lie below this bound sum to less
    than half an ulp of 1, so that leaving them out changes nothing that `dtype` can hold.
    """
    return math.log2(torch.finfo(dtype).eps / 2) - math.log2(logits)


_PROXIES = "Tensor samples, Tensor loc, Tensor concentration"
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())

# Arguments and returns of each op; the public op appends `str backend` to the arguments.
SCHEMAS = {
    "vmf_log_normalizer": ("Tensor concentration, int dim, int order", "Tensor"),
    "vmf_rsample": (
        "Tensor loc, Tensor concentration, int n, Tensor seed, int image_offset",
        "(Tensor, Tensor)",
    ),
    "vmf_rsample_backward": (
        "Tensor grad, Tensor samples, Tensor one_minus_w, Tensor loc, Tensor concentration",
        "(Tensor, Tensor)",
    ),
    # -> s less its constants, saved, the bias that was left out
    "log_ppk": (f"{_PROXIES}, Tensor temperature, {_OPTIONS}", "(Tensor, Tensor, Tensor)"),
    "log_ppk_backward": (
        f"Tensor grad, {_PROXIES}, Tensor temperature, Tensor saved, {_OPTIONS}",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
    # -> losses, partial, saved. `loc` may be any range of all proxies (with labels counted from
    # its first): the rows of `partial` are each image's maximum and log sum over the range, then
    # over its own proxy (-inf, 0 outside the range), and the backward takes the combined ones.
    "proxy_nca": (
        f"{_PROXIES}, Tensor labels, Tensor temperature, {_OPTIONS}",
        "(Tensor, Tensor, Tensor)",
    ),
    "proxy_nca_backward": (
        f"Tensor grad, {_PROXIES}, Tensor labels, Tensor temperature, Tensor partial, "
        f"Tensor saved, {_OPTIONS}",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
}


def takes_options(op: str) -> bool:
    """Whether the last arguments of an op are those of `Options`."""
    return SCHEMAS[op][0].endswith(_OPTIONS)


# The shape of what `proxy_nca` saves in a compiled library, which registers this as
# proxy_nca_saved_cpu or proxy_nca_saved_cuda for the fake kernel.
SAVED_SCHEMA = f"int n, int batch, int proxies, int dim, bool double, {_OPTIONS}"
