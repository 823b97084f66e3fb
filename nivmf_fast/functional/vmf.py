"""The functions of von Mises-Fisher distributions: normaliser, samples, kernel and divergence."""

import math

import torch
from torch import Generator, Tensor

from nivmf_fast import _checks, reference, special


def vmf_log_normalizer(
    concentration: Tensor, dim: int, *, constants: bool = True, backend: str = "auto"
) -> Tensor:
    """Log normaliser of the von Mises-Fisher density, exact in every dimension.

    log C_D(k) = (D/2 - 1) log k - (D/2) log 2 pi - log I_{D/2-1}(k)

    Args:
        concentration: k >= 0, any shape. Negative or NaN input and values above 1e18 give NaN.
        dim: D, 2 to 65,536.
        constants: False omits log C_D(0), so that float32 resolves small differences.
        backend: "auto" or a name in `backends()`; see `which_backend`.

    Returns:
        A tensor of the same shape; twice differentiable, with first derivative -A_D.

    Raises:
        TypeError: not a floating tensor. ValueError: dim out of range.

    Source: DLMF 10.41 (uniform expansions of Bessel functions); docs/math.md.

    Example:
        >>> vmf_log_normalizer(torch.tensor([0.0, 10.0]), 3)  # log 1 / (4 pi) at 0
        tensor([-2.5310, -9.5353])
    """
    g = _derivative(concentration, dim, 0, backend)
    return g + special.log_uniform_density(dim) if constants else g


def vmf_mean_resultant_length(concentration: Tensor, dim: int, *, backend: str = "auto") -> Tensor:
    """Mean cosine between samples and the mean direction, A_D(k) = I_{D/2}(k) / I_{D/2-1}(k).

    Args:
        concentration: k >= 0, any shape. Negative or NaN input and values above 1e18 give NaN.
        dim: D, 2 to 65,536.
        backend: "auto" or a name in `backends()`.

    Returns:
        A tensor of the same shape, in 0 .. 1; differentiable once.

    Raises:
        TypeError: not a floating tensor. ValueError: dim out of range.

    Source: Mardia & Jupp, Directional Statistics (2000), chapter 9.

    Example:
        >>> vmf_mean_resultant_length(torch.tensor([1.0, 100.0]), 3)  # coth k - 1 / k
        tensor([0.3130, 0.9900])
    """
    return -_derivative(concentration, dim, 1, backend)


def log_normalizer_derivative(
    concentration: Tensor, dim: int, order: int, *, shifted: bool = False, backend: str = "auto"
) -> Tensor:
    """The order-th derivative of g(k) = log C_D(k) - log C_D(0), or of h(k) = g(k) + k if shifted.

    So orders 0, 1, 2, 3 give g, -A, -A', -A'', and shifted ones h, 1 - A, -A', -A''.
    """
    derivative = _derivative(concentration, dim, order, backend)
    if shifted and order < 2:
        return derivative + (concentration if order == 0 else 1)
    return derivative


def _derivative(concentration: Tensor, dim: int, order: int, backend: str) -> Tensor:
    _checks.check_floating("concentration", concentration)
    special.check_dim(dim)
    k = _checks.computable(concentration)[0].contiguous()
    g: Tensor = torch.ops.nivmf_fast.vmf_log_normalizer(k, dim, order, backend)
    return g


def vmf_log_normalizer_difference(concentration: Tensor, other: Tensor, dim: int) -> Tensor:
    """log C_D(k) - log C_D(k0), without the cancellation of subtracting the two.

    Args:
        concentration: k >= 0, any shape.
        other: k0 >= 0, broadcastable with k.
        dim: D, 2 to 65,536.

    Returns:
        A tensor of the broadcast shape; twice differentiable. Computed in eager PyTorch.

    Raises:
        TypeError: not a floating tensor. ValueError: dim out of range.

    Source: docs/math.md, "The normaliser".

    Example:
        >>> vmf_log_normalizer_difference(torch.tensor(100.1), torch.tensor(100.0), 512)
        tensor(-0.0188)
    """
    _checks.check_floating("concentration", concentration)
    _checks.check_floating("other", other)
    special.check_dim(dim)
    k, k0 = _checks.computable(concentration, other)
    return special.vmf_log_normalizer_difference(k, k0, dim)


def vmf_rsample(
    loc: Tensor,
    concentration: Tensor,
    n: int,
    *,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
    image_offset: int = 0,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draw exact samples of von Mises-Fisher distributions, with unbiased gradients.

    x = w mu + sqrt(1 - w^2) u, w by rejection, u uniform on the tangent sphere. Gradients: by the
    rotation that carries loc, and by the implicit derivative of w in the concentration.

    Args:
        loc: [B, D], normalised inside; D >= 2. concentration: [B], 0 to 1e18.
        n: samples per image.
        seed: int or 0-d int64 tensor; one seed gives the same samples on every backend. None
            draws one from `generator`, or from torch's default one (`torch.manual_seed`).
        image_offset: index of the first image; image i gets the same samples in any batch.
        validate: check values, which synchronises a GPU; None checks on CPUs only. Unchecked bad
            values give NaN.
        backend: "auto" or a name in `backends()`.

    Returns:
        [n, B, D] unit vectors, float64 if an input is float64, else float32.

    Raises:
        ValueError, TypeError: wrong shape, dtype or value.

    Source: Wood (1994); Davidson et al. (2018); Figurnov et al. (2018); docs/math.md.

    Example:
        >>> loc, k = torch.eye(3)[:2], torch.tensor([10.0, 100.0])
        >>> vmf_rsample(loc, k, 5, seed=0).shape
        torch.Size([5, 2, 3])
    """
    _checks.check_shape("loc", loc, "[B, D]", 2)
    B, D = loc.shape
    special.check_dim(D)
    _checks.check_shape("concentration", concentration, f"[B] = [{B}]", 1, (B,))
    _checks.check_count("n", n, 0)
    _checks.check_count("image_offset", image_offset, 0, 2**32 - B)
    _checks.check_same_device(loc=loc, concentration=concentration)
    if _checks.checks_values(validate, loc):
        _checks.check_all("loc", loc, loc.isfinite(), "finite")
        _checks.check_all("loc", loc, (loc != 0).any(-1), "of nonzero length")
        _checks.check_all("concentration", concentration, concentration >= 0, ">= 0")
        small = concentration <= special.MAX_CONCENTRATION
        _checks.check_all("concentration", concentration, small, "at most 1e18")
    loc, concentration = _checks.computable(loc, concentration)
    samples: Tensor = torch.ops.nivmf_fast.vmf_rsample(
        loc.contiguous(),
        concentration.contiguous(),
        n,
        _checks.seed_tensor(seed, generator, loc.device),
        image_offset,
        backend,
    )[0]
    return samples


def vmf_log_ppk(
    loc1: Tensor,
    concentration1: Tensor,
    loc2: Tensor,
    concentration2: Tensor,
    rho: float = 1.0,
    *,
    pairwise: bool = True,
) -> Tensor:
    """Log probability-product kernel of von Mises-Fisher distributions, in closed form.

    log int v_1^rho v_2^rho = rho (log C(k1) + log C(k2)) - log C(rho |k1 mu1 + k2 mu2|)

    Args:
        loc1: [B, D] unit vectors. concentration1: [B], >= 0.
        loc2: [P, D] unit vectors. concentration2: [P], >= 0.
        rho: > 0; 1 is the expected likelihood, 1/2 the Bhattacharyya kernel.
        pairwise: False pairs row i with row i (B = P).

    Returns:
        [B, P], or [B] if not pairwise. All but the matrix product is computed in float64.

    Raises:
        ValueError, TypeError: wrong shape, dtype or rho.

    Source: Jebara et al. (2004); Kirchhof et al. (ECCV 2022).

    Example:
        >>> loc, k = torch.eye(3), torch.full((3,), 50.0)
        >>> vmf_log_ppk(loc, k, loc, k, rho=0.5).diagonal()  # a density with itself
        tensor([0., 0., 0.])
    """
    if not (isinstance(rho, (int, float)) and 0 < rho < math.inf):
        raise ValueError(f"rho must be a positive number; got {rho!r}")
    pairs = _checks.checked_pairs(loc1, concentration1, loc2, concentration2, pairwise)
    return reference.vmf_log_ppk(*pairs, rho, loc1.shape[-1]).to(pairs[0].dtype)


def vmf_kl(
    loc1: Tensor,
    concentration1: Tensor,
    loc2: Tensor,
    concentration2: Tensor,
    *,
    pairwise: bool = True,
) -> Tensor:
    """Kullback-Leibler divergence KL(v_1 | v_2) of von Mises-Fisher distributions.

    KL = log C(k1) - log C(k2) + A(k1) (k1 - k2 mu1.mu2)

    Args:
        loc1: [B, D] unit vectors. concentration1: [B], >= 0.
        loc2: [P, D] unit vectors. concentration2: [P], >= 0.
        pairwise: False pairs row i with row i (B = P).

    Returns:
        [B, P], or [B] if not pairwise. All but the matrix product is computed in float64.

    Raises:
        ValueError, TypeError: wrong shape or dtype.

    Source: Diethe, A note on the Kullback-Leibler divergence for the vMF distribution (2015).

    Example:
        >>> loc, k = torch.eye(3), torch.full((3,), 50.0)
        >>> vmf_kl(loc, k, loc, k).diagonal()
        tensor([0., 0., 0.])
    """
    pairs = _checks.checked_pairs(loc1, concentration1, loc2, concentration2, pairwise)
    return reference.vmf_kl(*pairs, loc1.shape[-1]).to(pairs[0].dtype)
