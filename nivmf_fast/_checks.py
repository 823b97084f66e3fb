"""Checks of the public functions' arguments, and their conversion to one type.

Errors state the value, the values allowed and, unless it is obvious, the remedy. Shapes, types,
devices and Python numbers are always checked; tensor values if `checks_values` allows.
"""

import math

import torch
from torch import Generator, Tensor

from nivmf_fast import special
from nivmf_fast._schemas import NORMALIZERS, PRECISIONS, Normalizer, Options, Precision


def computable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert all tensors to one floating type: float64 if any is, else float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return tuple(t.to(torch.float64 if double else torch.float32) for t in tensors)


def checks_values(validate: bool | None, tensor: Tensor) -> bool:
    """Whether to check tensor values, which on a GPU synchronises and so needs validate=True."""
    if torch.compiler.is_compiling():  # a check is a branch on data, which a graph cannot hold
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must have a floating type (float32, float64, or half types that are computed "
            f"in float32); got {tensor.dtype}. Convert it with {name}.float()"
        )


def check_shape(
    name: str, tensor: Tensor, want: str, ndim: int, shape: tuple[int, ...] | None = None
) -> None:
    check_floating(name, tensor)
    if tensor.ndim != ndim or (shape is not None and tuple(tensor.shape) != shape):
        raise ValueError(f"{name} must have shape {want}; got {list(tensor.shape)}")


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}; got {value}")


def check_same_device(**tensors: Tensor) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"all tensors must be on one device; got {where}")


def check_all(name: str, tensor: Tensor, ok: Tensor, allowed: str) -> None:
    """Raise a ValueError for the first element (or row) of `tensor` where `ok` is false."""
    if bool(ok.all()):
        return
    index = (~ok).nonzero()[0].tolist()
    raise ValueError(f"{name} must be {allowed}; got {tensor[tuple(index)].tolist()} at {index}")


def check_options(normalizer: str, precision: str, workspace: int | None) -> None:
    options = ("normalizer", normalizer, NORMALIZERS), ("precision", precision, PRECISIONS)
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}")
    if workspace is not None:
        check_count("workspace", workspace, 1)


def checked_options(
    normalizer: Normalizer,
    projection: bool,
    precision: Precision,
    workspace: int | None,
    tensors: list[Tensor],
) -> Options:
    """Check the options of a call on `tensors`, and pack them with their defaults.

    Scores are kept if one of the tensors requires a gradient.
    """
    check_options(normalizer, precision, workspace)
    scratch = workspace or (256 if tensors[0].device.type == "cuda" else 64) << 20
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return Options(normalizer == "exact", projection, PRECISIONS.index(precision), scratch, keep)


def check_proxies(
    samples: Tensor, loc: Tensor, concentration: Tensor, validate: bool | None
) -> None:
    check_shape("samples", samples, "[N, B, D]", 3)
    N, _, D = samples.shape
    special.check_dim(D)
    if N < 1:
        raise ValueError("samples must have shape [N, B, D] with N >= 1; got N = 0")
    check_shape("loc", loc, f"[P, D] with D = {D}", 2, (len(loc), D) if loc.ndim else None)
    if len(loc) < 1:
        raise ValueError("loc must have shape [P, D] with P >= 1 proxies; got P = 0")
    want = f"that of loc, [P, D] = {list(loc.shape)}"
    check_shape("concentration", concentration, want, 2, tuple(loc.shape))
    check_same_device(samples=samples, loc=loc, concentration=concentration)
    if checks_values(validate, samples):
        if not _all_between(samples, -math.inf):
            check_all("samples", samples, samples.isfinite(), "finite")
        if not _all_between(loc, -math.inf):
            check_all("loc", loc, loc.isfinite(), "finite")
        if not _all_between(concentration, 0):
            positive = (concentration > 0) & concentration.isfinite()
            check_all("concentration", concentration, positive, "positive and finite")


def _all_between(tensor: Tensor, low: float, high: float = math.inf) -> bool:
    """Whether low < all < high and none is NaN, without temporaries of the tensor's size."""
    if tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor.detach())
    return low < least.item() and most.item() < high


def check_labels(labels: Tensor, B: int, P: int, validate: bool | None) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a torch.int64 tensor; got {got}")
    if tuple(labels.shape) != (B,):
        raise ValueError(f"labels must have shape [B] = [{B}]; got {list(labels.shape)}")
    if checks_values(validate, labels) and not _all_between(labels, -1, P):
        check_all("labels", labels, (labels >= 0) & (labels < P), f"in 0 .. {P - 1}")


def temperature_tensor(temperature: float | Tensor, like: Tensor, validate: bool | None) -> Tensor:
    """Check the temperature; return it as a 0-d tensor on the device of `like`."""
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, "[] (0-d)", 0)
        check_same_device(samples=like, temperature=temperature)
        if checks_values(validate, temperature) and not _all_between(temperature, 0):
            positive = (temperature > 0) & temperature.isfinite()
            check_all("temperature", temperature, positive, "positive and finite")
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a 0-d tensor; got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    return torch.full((), temperature, dtype=computable(like)[0].dtype, device=like.device)


def checked_pairs(
    loc1: Tensor, concentration1: Tensor, loc2: Tensor, concentration2: Tensor, pairwise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check two sets of vMFs; return 1 - mu1 . mu2 and concentrations that broadcast with it."""
    check_shape("loc1", loc1, "[B, D]", 2)
    B, D = loc1.shape
    special.check_dim(D)
    check_shape("concentration1", concentration1, f"[B] = [{B}]", 1, (B,))
    check_shape("loc2", loc2, f"[P, D] with D = {D}", 2, (len(loc2), D) if loc2.ndim else None)
    P = len(loc2)
    check_shape("concentration2", concentration2, f"[P] = [{P}]", 1, (P,))
    if not pairwise and B != P:
        raise ValueError(f"pairwise=False needs as many rows in both; got {B} and {P}")
    tensors = {"loc1": loc1, "concentration1": concentration1}
    tensors |= {"loc2": loc2, "concentration2": concentration2}
    check_same_device(**tensors)
    loc1, k1, loc2, k2 = computable(*tensors.values())
    with torch.autocast(loc1.device.type, enabled=False):
        if pairwise:
            return 1 - loc1 @ loc2.T, k1[:, None], k2
        return (loc1 - loc2).square().sum(-1) / 2, k1, k2  # exact where the directions agree


def seed_tensor(
    seed: int | Tensor | None, generator: Generator | None, device: torch.device
) -> Tensor:
    """Check a seed, or draw one; return it as a 0-d int64 tensor, without synchronising a GPU."""
    if seed is None:
        return torch.randint(
            -(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator
        )
    if generator is not None:
        raise ValueError("give seed or generator, not both: a generator draws the seed")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(
                f"seed must be an int or a 0-d int64 tensor; got {seed.dtype} {list(seed.shape)}"
            )
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits with sign; got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def require(name: str, value: object, ok: bool, rule: str) -> None:
    """Raise a ValueError that states the rule, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {rule}; got {value!r}")


def require_int(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless the value is an int of at least `least`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(name, value, ok, f"an int, at least {least}")
