"""The von Mises-Fisher distribution."""

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from nivmf_fast import special
from nivmf_fast.distributions.sphere import _observations, _SphereDistribution, unit_vector


class VonMisesFisher(_SphereDistribution):
    """von Mises-Fisher distribution on the unit sphere of R^D.

    p(x) = C_D(k) exp(k mu.x)

    Args:
        loc: mean direction mu, [.., D], unit vectors, D >= 2.
        concentration: k >= 0, [..]; 0 is the uniform distribution.
        validate_args: check values now (synchronises a GPU); as in torch.distributions.

    Raises:
        ValueError, TypeError: loc not of unit length, k negative or NaN, shapes that clash.

    Source: Mardia & Jupp, Directional Statistics (2000); sampling as `vmf_rsample`.

    Example:
        >>> d = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(10.0))
        >>> x = d.rsample((1000,))  # [1000, 3], differentiable in both parameters
        >>> d.log_prob(x).shape, d.mean
        (torch.Size([1000]), tensor([0.0000, 0.0000, 0.9000]))
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {
        "loc": unit_vector,
        "concentration": constraints.nonnegative,
    }

    def rsample(
        self,
        sample_shape: Any = (),
        *,
        seed: int | Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw samples [*sample_shape, .., D], differentiable in both parameters.

        `seed` and `generator` are those of `vmf_rsample`.
        """
        return self._flat_rsample(self.loc, self.concentration, sample_shape, seed, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value [.., D]."""
        if self._validate_args:
            self._validate_sample(value)
        # k mu.x = k - k |x - mu|^2 / 2, and log C + k is small where both terms are huge
        k = self.concentration.double()
        at_mode = special.vmf_log_normalizer(k, self.dim) + k
        chord2 = (value - self.loc).square().sum(-1)
        return at_mode.to(chord2.dtype) - self.concentration * chord2 / 2

    @property
    def mean(self) -> Tensor:
        A = special.vmf_mean_resultant_length(self.concentration, self.dim)
        return A[..., None] * self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate: A/k across the mean direction, A' along it."""
        k = self.concentration.double()
        A = special.vmf_mean_resultant_length(k, self.dim)
        along = -special.log_normalizer_derivative(k, self.dim, 2)
        across = (1 - A.square() - along) / (self.dim - 1)  # A / k without dividing by k
        mu2 = self.loc.square()
        along, across = (v.to(mu2.dtype)[..., None] for v in (along, across))
        return across + (along - across) * mu2

    def entropy(self) -> Tensor:
        k = self.concentration.double()
        A = special.vmf_mean_resultant_length(k, self.dim)
        entropy = k * (1 - A) - (special.vmf_log_normalizer(k, self.dim) + k)
        return entropy.to(self.concentration.dtype)

    @classmethod
    @torch.no_grad()
    def fit(cls, samples: Tensor, weights: Tensor | None = None) -> "VonMisesFisher":
        """Fit by maximum likelihood: loc is the resultant's direction, A_D(k) its mean length.

        Args:
            samples: [n, .., D] unit vectors, n >= 1.
            weights: [n], >= 0, or None for equal ones.

        Returns:
            The distribution of batch shape [..], in float64 for float64 samples, else float32.

        Raises:
            ValueError: samples not of unit length, weights of the wrong shape or negative.

        Example:
            >>> true = VonMisesFisher(torch.eye(8)[0], torch.tensor(30.0))
            >>> bool((VonMisesFisher.fit(true.sample((9999,))).concentration - 30).abs() < 2)
            True
        """
        x, w = _observations(samples, weights)
        total = (w * x).sum(0)
        length = torch.linalg.vector_norm(total, dim=-1)
        axis = torch.nn.functional.one_hot(torch.tensor(0), x.shape[-1]).to(x)
        loc = torch.where(length[..., None] > 0, total / length[..., None], axis)
        k = _concentration_of(length.clamp(max=1 - 1e-15), x.shape[-1])
        dtype = samples.dtype if samples.dtype == torch.float64 else torch.float32
        return cls(loc.to(dtype), k.to(dtype))


def _concentration_of(length: Tensor, dim: int) -> Tensor:
    """Solve A_D(k) = length, by Newton's method from the estimate of Banerjee et al. (2005)."""
    k = length * (dim - length.square()) / (1 - length.square())
    for _ in range(20):  # A is concave: steps from below never overshoot the root
        gap = -special.log_normalizer_derivative(k, dim, 1) - length
        k = (k + gap / special.log_normalizer_derivative(k, dim, 2)).clamp(min=0)
    return k
