"""The op contract as values: the schemas, and the options of log-PPK with their names.

Imports nothing from the library, so that every layer may import it.
"""

import math
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch

Normalizer = Literal["exact", "released"]
Precision = Literal["float32", "fast"]

NORMALIZERS: tuple[Normalizer, ...] = get_args(Normalizer)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Options(NamedTuple):
    """Options of log-PPK: the last arguments of its ops, in this order."""

    exact: bool  # normaliser; False: the research code's
    projection: bool  # score with (K mu).(K x)/|K x|; False: with (K mu).x
    precision: int  # index into PRECISIONS: the stable ABI has no strings
    workspace: int  # bytes of scratch, and of scores kept for the backward
    keep: bool  # whether a backward follows, so that scores are worth keeping


def dead_log2(dtype: torch.dtype, logits: int) -> float:
    """log2 of the softmax weight below which a tile is dead.

    An image has `logits` = N P weights that sum to 1. Those below this bound sum to less than half
    an ulp of 1, so that omitting them changes nothing that `dtype` can represent.
    """
    return math.log2(torch.finfo(dtype).eps / 2) - math.log2(logits)


_PROXIES = "Tensor samples, Tensor loc, Tensor concentration"
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())

# Arguments and returns of each op. The public op appends `str backend` to the arguments.
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
    # -> s without its constants, saved, the bias left out of s
    "log_ppk": (f"{_PROXIES}, Tensor temperature, {_OPTIONS}", "(Tensor, Tensor, Tensor)"),
    "log_ppk_backward": (
        f"Tensor grad, {_PROXIES}, Tensor temperature, Tensor saved, {_OPTIONS}",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
    # -> losses, partial, saved. `loc` may be any range of all proxies, with labels counted from its
    # first. `partial` is that of _partials.py over the range; the backward takes the one combined
    # over all ranges.
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


# Arguments of proxy_nca_saved_cpu and proxy_nca_saved_cuda: a compiled library's shape of the array
# that its `proxy_nca` saves, for the fake kernel.
SAVED_SCHEMA = f"int n, int batch, int proxies, int dim, bool double, {_OPTIONS}"
