"""The base of the distributions on the unit sphere that have a mean direction."""

import math
from typing import Any

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from nivmf_fast import special
from nivmf_fast._checks import check_all
from nivmf_fast.functional import vmf_rsample


class _UnitVector(Constraint):
    """Unit length, within a tolerance that allows for rounding in float32 and half precision."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        tolerance = 1e-5 if torch.finfo(value.dtype).bits > 16 else 2e-2
        length = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float64)
        ok: Tensor = (length - 1).abs() <= tolerance
        return ok


unit_vector = _UnitVector()


class _SphereDistribution(Distribution):
    """A distribution with a mean direction and a concentration: parameters, shapes, sampling."""

    has_rsample = True
    support = unit_vector
    _concentration_dims = 0  # event dimensions of the concentration

    loc: Tensor
    concentration: Tensor

    def __init__(
        self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None
    ) -> None:
        loc, concentration = self._parameters(loc, concentration)
        event = loc.shape[-1:]
        batch_of_k = concentration.shape[: concentration.ndim - self._concentration_dims]
        try:
            batch = torch.broadcast_shapes(loc.shape[:-1], batch_of_k)
        except RuntimeError:
            raise ValueError(
                f"loc of shape [.., D] = {list(loc.shape)} and concentration of shape "
                f"{list(concentration.shape)} must broadcast in their batch dimensions"
            ) from None
        self.loc = loc.expand(batch + event)
        self.concentration = concentration.expand(
            batch + event if self._concentration_dims else batch
        )
        super().__init__(batch, event, validate_args=False)  # _check_values says more
        self._validate_args = (
            Distribution._validate_args if validate_args is None else validate_args
        )
        if self._validate_args:
            self._check_values()

    def _parameters(self, loc: Tensor, concentration: Tensor | float) -> tuple[Tensor, Tensor]:
        if not isinstance(loc, Tensor) or not loc.is_floating_point():
            got = loc.dtype if isinstance(loc, Tensor) else type(loc).__name__
            raise TypeError(f"loc must be a floating tensor of shape [.., D]; got {got}")
        if loc.ndim < 1 or not 2 <= loc.shape[-1] <= special.MAX_DIM:
            raise ValueError(
                f"loc must have shape [.., D] with D from 2 to {special.MAX_DIM:,}; "
                f"got {list(loc.shape)}"
            )
        concentration = torch.as_tensor(concentration, device=loc.device)
        if not concentration.is_floating_point():
            concentration = concentration.to(loc.dtype)
        if self._concentration_dims and concentration.shape[-1:] != loc.shape[-1:]:
            raise ValueError(
                f"concentration must have shape [.., D] with D = {loc.shape[-1]} as loc; "
                f"got {list(concentration.shape)}"
            )
        if torch.finfo(loc.dtype).bits == 16 and bool(unit_vector.check(loc).all()):
            loc = torch.nn.functional.normalize(loc.float(), dim=-1)  # unit up to rounding
        double = torch.float64 in (loc.dtype, concentration.dtype)
        dtype = torch.float64 if double else torch.float32
        return loc.to(dtype), concentration.to(dtype)

    def _check_values(self) -> None:
        ok = unit_vector.check(self.loc)
        if not bool(ok.all()):
            where = (~ok).nonzero()[0].tolist()
            length = torch.linalg.vector_norm(self.loc[tuple(where)]).item()
            raise ValueError(
                f"loc must consist of unit vectors; got length {length:.6g} at {where}. "
                "Normalise it: torch.nn.functional.normalize(loc, dim=-1)"
            )
        k, least = self.concentration, ">= 0" if self._concentration_dims == 0 else "> 0"
        positive = k >= 0 if self._concentration_dims == 0 else k > 0
        ok = positive & (k <= special.MAX_CONCENTRATION)
        check_all("concentration", k, ok, f"{least} and at most 1e18")

    @property
    def dim(self) -> int:
        return self.event_shape[0]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)  # type: ignore[no-untyped-call]
        batch = Size(batch_shape)
        new.loc = self.loc.expand(batch + self.event_shape)
        new.concentration = self.concentration.expand(
            batch + self.event_shape if self._concentration_dims else batch
        )
        Distribution.__init__(new, batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _flat_rsample(
        self,
        loc: Tensor,
        concentration: Tensor,
        sample_shape: Any,
        seed: int | Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """vMF samples for loc [batch.., D] (of any length) and concentration [batch..]."""
        shape = Size(sample_shape)
        x = vmf_rsample(
            loc.reshape(-1, self.dim),
            concentration.reshape(-1),
            shape.numel(),
            seed=seed,
            generator=generator,
            validate=False,  # checked by the constructor
        )
        return x.view(shape + self.batch_shape + self.event_shape)


def _observations(samples: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples [n, .., D] and weights [n, 1 ..] that sum to 1, in float64."""
    if not isinstance(samples, Tensor) or samples.ndim < 2 or len(samples) < 1:
        got = list(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"samples must be a tensor [n, .., D] with n >= 1; got {got}")
    check_all("samples", samples, unit_vector.check(samples), "unit vectors")
    x = samples.detach().double()
    w = x.new_ones(len(x)) if weights is None else weights.detach().double()
    if tuple(w.shape) != (len(x),) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < math.inf:
        raise ValueError(f"weights must be [n] = [{len(x)}], >= 0 and not all 0; got {weights}")
    return x, (w / w.sum()).view(-1, *(1 for _ in x.shape[1:]))
