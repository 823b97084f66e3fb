"""von Mises-Fisher distributions on the unit sphere as torch distributions."""

import math
from typing import Any, ClassVar

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.distributions.constraints import Constraint

from nivmf_fast import special
from nivmf_fast._checks import check_all
from nivmf_fast.functional import vmf_kl, vmf_rsample


class _UnitVector(Constraint):
    """Unit length, to a tolerance that float32 and half-precision rounding stay within."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        tolerance = 1e-5 if torch.finfo(value.dtype).bits > 16 else 2e-2
        length = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float64)
        ok: Tensor = (length - 1).abs() <= tolerance
        return ok


unit_vector = _UnitVector()


class _SphereDistribution(Distribution):
    """Batch and event shapes of a distribution with a mean direction and a concentration."""

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
        own = concentration.shape[: concentration.ndim - self._concentration_dims]
        try:
            batch = torch.broadcast_shapes(loc.shape[:-1], own)
        except RuntimeError:
            raise ValueError(
                f"loc of shape [.., D] = {list(loc.shape)} and concentration of shape "
                f"{list(concentration.shape)} must broadcast in their batch dimensions"
            ) from None
        self.loc = loc.expand(batch + event)
        self.concentration = concentration.expand(
            batch + event if self._concentration_dims else batch
        )
        super().__init__(batch, event, validate_args=False)  # its messages say less than these
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
            loc = torch.nn.functional.normalize(loc.float(), dim=-1)  # unit but for its rounding
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
        check_all("concentration", k, positive & (k <= 1e18), f"{least} and at most 1e18")

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
            validate=False,  # checked when the distribution was made
        )
        return x.view(shape + self.batch_shape + self.event_shape)


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
        return self._flat_rsample(self.loc, self.concentration, sample_shape, seed, generator)

    def log_prob(self, value: Tensor) -> Tensor:
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
        """Of each coordinate: A/k across the mean direction, A' along it."""
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
        """Maximum likelihood: loc is the resultant's direction, A_D(k) its mean length.

        Args:
            samples: [n, .., D] unit vectors, n >= 1. weights: [n], >= 0, or None for equal ones.

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


class NonIsotropicVonMisesFisher(_SphereDistribution):
    """Non-isotropic von Mises-Fisher distribution (nivMF) with diagonal concentration K.

    p(x) = C_D(|K mu|) exp((K mu).(K x) / |K x|) det K / |K x|^D,   K = diag(kappa)

    that is, K x / |K x| is von Mises-Fisher around K mu / |K mu| with concentration |K mu|.

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
        k_mu = self.concentration * self.loc
        length = torch.linalg.vector_norm(k_mu, dim=-1)
        y = self._flat_rsample(k_mu, length, sample_shape, seed, generator)
        return torch.nn.functional.normalize(y / self.concentration, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    def _log_density(self, value: Tensor) -> Tensor:
        # terms of size D log kappa cancel: float64, one vector each
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
        """The point of highest density that ascent from loc and the flattest axis reaches.

        |K x|^-D pulls the mode from loc towards axes of small kappa; a very unequal K can give
        the density a second maximum.
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
        """Exact but for E[log |K x|], which is estimated as `mean` is."""
        kappa = self.concentration.double()
        n = torch.linalg.vector_norm(kappa * self.loc.double(), dim=-1)
        A = special.vmf_mean_resultant_length(n, self.dim)
        log_length = self._antithetic(lambda x, kappa: (kappa * x).norm(dim=-1).log()).double()
        constant = special.vmf_log_normalizer(n, self.dim) + n * A + kappa.log().sum(-1)
        entropy: Tensor = self.dim * log_length - constant
        return entropy.to(self.loc.dtype)

    def _antithetic(self, of: Any) -> Tensor:
        """Mean of a function of samples over pairs mirrored at the mean direction of K x.

        512 to 65,536 pairs of each distribution, as many as 16 M numbers allow.
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
        """Maximum likelihood by L-BFGS from the isotropic fit.

        Args:
            samples: [n, .., D] unit vectors, n >= 1. weights: [n], >= 0, or None for equal ones.
            max_iter: of L-BFGS.

        Example:
            >>> true = NonIsotropicVonMisesFisher(torch.eye(3)[0], torch.tensor([9.0, 9.0, 3.0]))
            >>> fitted = NonIsotropicVonMisesFisher.fit(true.sample((5000,)))
            >>> bool((fitted.concentration - true.concentration).abs().max() < 1)
            True
        """
        x, w = _observations(samples, weights)
        start = VonMisesFisher.fit(x, w.flatten())
        raw = start.loc.clone().requires_grad_()
        kappa = start.concentration.clamp(0.1, 1e6)[..., None].expand(start.loc.shape)
        log_kappa = kappa.log().clone().requires_grad_()

        def model() -> NonIsotropicVonMisesFisher:
            loc = torch.nn.functional.normalize(raw, dim=-1)
            return cls(loc, log_kappa.exp(), validate_args=False)

        optimiser = torch.optim.LBFGS(
            [raw, log_kappa],
            max_iter=max_iter,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -(w[..., 0] * model().log_prob(x)).sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        dtype = samples.dtype if samples.dtype == torch.float64 else torch.float32
        fitted = model()
        return cls(fitted.loc.detach().to(dtype), fitted.concentration.detach().to(dtype))


class HypersphericalUniform(Distribution):
    """Uniform distribution on the unit sphere of R^dim.

    Args:
        dim: D >= 2.
        dtype, device: of the samples.

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
        shape = Size(sample_shape)
        batch = self.batch_shape.numel()
        pole = torch.zeros(batch, self.dim, dtype=self.dtype, device=self.device)
        pole[:, 0] = 1
        k = torch.zeros(batch, dtype=self.dtype, device=self.device)
        x = vmf_rsample(pole, k, shape.numel(), seed=seed, generator=generator, validate=False)
        return x.view(shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
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


def _concentration_of(length: Tensor, dim: int) -> Tensor:
    """The k with A_D(k) = length: Newton from the estimate of Banerjee et al. (2005)."""
    k = length * (dim - length.square()) / (1 - length.square())
    for _ in range(20):  # A is concave: from below the steps never pass the root
        gap = -special.log_normalizer_derivative(k, dim, 1) - length
        k = (k + gap / special.log_normalizer_derivative(k, dim, 2)).clamp(min=0)
    return k


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(batch), q.expand(batch)
    flat = [t for d in (p, q) for t in (d.loc.reshape(-1, d.dim), d.concentration.reshape(-1))]
    return vmf_kl(*flat, pairwise=False).view(batch)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_vmf_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    k = p.concentration.double()
    g = special.vmf_log_normalizer(k, p.dim, constants=False)
    kl = k * special.vmf_mean_resultant_length(k, p.dim) + g
    return kl.to(p.concentration.dtype).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, VonMisesFisher)
def _kl_uniform_vmf(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    kl = -special.vmf_log_normalizer(q.concentration, q.dim, constants=False)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
