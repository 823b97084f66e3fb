"""The non-isotropic von Mises-Fisher distribution."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from nivmf_fast import special
from nivmf_fast.distributions.sphere import _observations, _SphereDistribution, unit_vector
from nivmf_fast.distributions.von_mises_fisher import VonMisesFisher


class NonIsotropicVonMisesFisher(_SphereDistribution):
    """Non-isotropic von Mises-Fisher distribution (nivMF) with diagonal concentration K.

    p(x) = C_D(|K mu|) exp((K mu).(K x) / |K x|) det K / |K x|^D,   K = diag(kappa)

    Equivalently, K x / |K x| is von Mises-Fisher around K mu / |K mu| with concentration |K mu|.

    Args:
        loc: mu, [.., D], unit vectors, D >= 2.
        concentration: kappa > 0, [.., D].
        validate_args: check values now (synchronises a GPU); as in torch.distributions.

    Raises:
        ValueError, TypeError: loc not of unit length, kappa not positive, shapes that clash.

    Source: Kirchhof et al., ECCV 2022, with the normaliser that makes it a density.

    Example:
        >>> kappa = torch.tensor([20.0, 20.0, 5.0])
        >>> d = NonIsotropicVonMisesFisher(torch.eye(3)[0], kappa)
        >>> d.log_prob(d.rsample((7,))).shape
        torch.Size([7])
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {
        "loc": unit_vector,
        "concentration": constraints.independent(constraints.positive, 1),
    }
    _concentration_dims = 1

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
        k_mu = self.concentration * self.loc
        length = torch.linalg.vector_norm(k_mu, dim=-1)
        y = self._flat_rsample(k_mu, length, sample_shape, seed, generator)
        return torch.nn.functional.normalize(y / self.concentration, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value [.., D]."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    def _log_density(self, value: Tensor) -> Tensor:
        # in float64, because terms of size D log kappa cancel
        kappa, mu, x = self.concentration.double(), self.loc.double(), value.double()
        log_kbar = kappa.log().mean(-1)
        scaled = kappa / log_kbar.exp()[..., None]
        k_mu, k_x = kappa * mu, scaled * x
        length, x_length = (torch.linalg.vector_norm(v, dim=-1) for v in (k_mu, k_x))
        log_prob = special.vmf_log_normalizer(length, self.dim) + (k_mu * k_x).sum(-1) / x_length
        exact: Tensor = log_prob - self.dim * x_length.log()
        return exact.to(value.dtype)

    @property
    def mean(self) -> Tensor:
        """Estimated from antithetic samples with a fixed seed: there is no closed form."""
        return self._antithetic(lambda x, _: x)

    @property
    def mode(self) -> Tensor:
        """Highest point of the density reached by ascent from loc and from the flattest axis.

        |K x|^-D pulls the mode from loc towards axes of small kappa; with a very unequal K the
        density can have a second maximum.
        """
        with torch.no_grad():
            kappa, mu, D = self.concentration.double(), self.loc.double(), self.dim
            k_mu = kappa * mu
            n = torch.linalg.vector_norm(k_mu, dim=-1, keepdim=True)
            flat = torch.nn.functional.one_hot(kappa.argmin(-1), D).to(mu)
            sides = torch.where((mu * flat).sum(-1, keepdim=True) < 0, -flat, flat)
            starts = torch.stack([mu, sides, -sides])
            y = torch.nn.functional.normalize(kappa * starts, dim=-1)
            inverse2 = kappa.reciprocal().square()
            # maximise k_mu . y + D log |y / kappa|; the shift D + n makes each step an ascent
            for _ in range(10_000):
                quadratic = (inverse2 * y.square()).sum(-1, keepdim=True)
                step = k_mu + (D * inverse2 / quadratic + D + n) * y
                step = torch.nn.functional.normalize(step, dim=-1)
                moved = (step - y).abs().max() if y.numel() else y.new_zeros(())
                y = step
                if moved < 1e-12:
                    break
            x = torch.nn.functional.normalize(y / kappa, dim=-1)
            best = self._log_density(x).argmax(0)
            return x.gather(0, best[None, ..., None].expand(1, *x.shape[1:]))[0].to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy; exact except for E[log |K x|], which is estimated as in `mean`."""
        kappa = self.concentration.double()
        n = torch.linalg.vector_norm(kappa * self.loc.double(), dim=-1)
        A = special.vmf_mean_resultant_length(n, self.dim)
        log_length = self._antithetic(lambda x, kappa: (kappa * x).norm(dim=-1).log()).double()
        constant = special.vmf_log_normalizer(n, self.dim) + n * A + kappa.log().sum(-1)
        entropy: Tensor = self.dim * log_length - constant
        return entropy.to(self.loc.dtype)

    def _antithetic(self, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean of `of(x, kappa)` over pairs of samples mirrored at the mean direction of K x.

        Takes 512 to 65,536 pairs per distribution, as many as fit 16 M numbers.
        """
        per_pair = max(self.dim * self.batch_shape.numel(), 1)
        pairs = min(max(2**24 // per_pair, 512), 65_536)
        kappa, k_mu = self.concentration, self.concentration * self.loc
        length = torch.linalg.vector_norm(k_mu, dim=-1)
        axis = k_mu / length[..., None]
        y = self._flat_rsample(k_mu, length, (pairs,), 0, None)
        mirrored = 2 * (y * axis).sum(-1, keepdim=True) * axis - y
        sides = (torch.nn.functional.normalize(v / kappa, dim=-1) for v in (y, mirrored))
        first, second = (of(x, kappa).mean(0) for x in sides)
        mean: Tensor = (first + second) / 2
        return mean

    @classmethod
    def fit(
        cls, samples: Tensor, weights: Tensor | None = None, *, max_iter: int = 200
    ) -> "NonIsotropicVonMisesFisher":
        """Fit by maximum likelihood: L-BFGS from the isotropic fit.

        Args:
            samples: [n, .., D] unit vectors, n >= 1.
            weights: [n], >= 0, or None for equal ones.
            max_iter: largest number of L-BFGS iterations.

        Returns:
            The distribution of batch shape [..], in float64 for float64 samples, else float32.

        Raises:
            ValueError: samples not of unit length, weights of the wrong shape or negative.

        Example:
            >>> true = NonIsotropicVonMisesFisher(torch.eye(3)[0], torch.tensor([9.0, 9.0, 3.0]))
            >>> fitted = NonIsotropicVonMisesFisher.fit(true.sample((5000,)))
            >>> bool((fitted.concentration - true.concentration).abs().max() < 1)
            True
        """
        x, w = _observations(samples, weights)
        start = VonMisesFisher.fit(x, w.flatten())
        raw_loc = start.loc.clone().requires_grad_()
        kappa = start.concentration.clamp(0.1, 1e6)[..., None].expand(start.loc.shape)
        log_kappa = kappa.log().clone().requires_grad_()

        def model() -> NonIsotropicVonMisesFisher:
            loc = torch.nn.functional.normalize(raw_loc, dim=-1)
            return cls(loc, log_kappa.exp(), validate_args=False)

        def negative_log_likelihood() -> Tensor:
            return -(w[..., 0] * model().log_prob(x)).sum()

        _minimise(negative_log_likelihood, [raw_loc, log_kappa], max_iter)
        dtype = samples.dtype if samples.dtype == torch.float64 else torch.float32
        fitted = model()
        return cls(fitted.loc.detach().to(dtype), fitted.concentration.detach().to(dtype))


@torch.enable_grad()
def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], max_iter: int) -> None:
    """Move the parameters to a minimum of the objective, by L-BFGS."""
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)
