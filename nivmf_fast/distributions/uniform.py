"""The uniform distribution on the unit sphere."""

from typing import Any, ClassVar

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from nivmf_fast import special
from nivmf_fast.distributions.sphere import unit_vector
from nivmf_fast.functional import vmf_rsample


class HypersphericalUniform(Distribution):
    """Uniform distribution on the unit sphere of R^dim.

    Args:
        dim: D >= 2.
        dtype, device: of the samples.
        batch_shape: of independent copies, as from `expand`; () for a single one.
        validate_args: check the argument of `log_prob`; as in torch.distributions.

    Raises:
        ValueError: dim out of range.

    Example:
        >>> HypersphericalUniform(3).entropy()  # log 4 pi
        tensor(2.5310)
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = True
    support = unit_vector

    def __init__(
        self,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_shape: Any = (),
        validate_args: bool | None = None,
    ) -> None:
        special.check_dim(dim)
        self.dim, self.dtype, self.device = dim, dtype, torch.device(device)
        super().__init__(Size(batch_shape), Size((dim,)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return HypersphericalUniform(
            self.dim,
            dtype=self.dtype,
            device=self.device,
            batch_shape=batch_shape,
            validate_args=self._validate_args,
        )

    def rsample(
        self,
        sample_shape: Any = (),
        *,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw samples [*sample_shape, .., D].

        `seed` and `generator` are those of `vmf_rsample`.
        """
        shape = Size(sample_shape)
        batch = self.batch_shape.numel()
        pole = torch.zeros(batch, self.dim, dtype=self.dtype, device=self.device)
        pole[:, 0] = 1
        k = torch.zeros(batch, dtype=self.dtype, device=self.device)
        x = vmf_rsample(pole, k, shape.numel(), seed=seed, generator=generator, validate=False)
        return x.view(shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value [.., D], the same everywhere."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, special.log_uniform_density(self.dim))

    @property
    def mean(self) -> Tensor:
        return torch.zeros(
            self.batch_shape + self.event_shape, dtype=self.dtype, device=self.device
        )

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.mean, 1 / self.dim)

    def entropy(self) -> Tensor:
        value = -special.log_uniform_density(self.dim)
        return torch.full(self.batch_shape, value, dtype=self.dtype, device=self.device)
