"""The public functions: what they compute, what they accept, and the errors they raise.

B images with N samples each, P proxies, dimension D, temperature T. Every function takes float32
or float64 tensors of any strides; half-precision inputs are converted to, and give, float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from nivmf_fast import _checks, autograd, reference, special
from nivmf_fast._schemas import Normalizer, Precision


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


def log_ppk(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    normalizer: Normalizer = "exact",
    projection: bool = True,
    temperature_outside: bool = False,
    constants: bool = True,
    precision: Precision = "float32",
    workspace: int | None = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log probability-product kernel between sampled images and non-isotropic vMF proxies.

    s_ij = log (1/N) sum_s exp(log p_j(x_is) / T),
    log p_j(x) = log C_D(|K mu|) + (K mu).(K x)/|K x| + sum_d log kappa_d - D log|K x|

    Args:
        samples: [N, B, D] unit vectors of the images, N >= 1.
        loc: [P, D] unit mean directions. concentration: [P, D], the diagonals kappa > 0 of K.
        temperature: T > 0, a number or a 0-d tensor.
        normalizer: "released" replaces the last term by -log|K mu|, as the research code does.
        projection: False replaces the second term by (K mu).x, as the research code does.
        temperature_outside: s_ij = (1/T) log (1/N) sum_s p_j(x_is), in eager PyTorch only.
        constants: False drops the terms common to all pairs; use it before a softmax.
        precision: "fast" lets kernels use cheaper, less accurate products.
        workspace: bytes of scratch, 64 MiB by default on CPUs and 256 MiB on CUDA. Scores are
            kept for the backward if they fit, else computed twice.
        validate, backend: as in `vmf_rsample`.

    Returns:
        [B, P]; differentiable once, in samples, loc, concentration and temperature.

    Raises:
        ValueError, TypeError: wrong shape, dtype, option or value.

    Source: Kirchhof et al. (ECCV 2022), T inside as in its experiments; docs/math.md.

    Example:
        >>> x = vmf_rsample(torch.eye(3), torch.full((3,), 20.0), 8, seed=0)
        >>> log_ppk(x, torch.eye(3), torch.full((3, 3), 5.0)).argmax(1)
        tensor([0, 1, 2])
    """
    _checks.check_proxies(samples, loc, concentration, validate)
    temperature = _checks.temperature_tensor(temperature, samples, validate)
    samples, loc, concentration, T = _checks.computable(samples, loc, concentration, temperature)
    if temperature_outside:  # no kernel: it is not one joint softmax
        with torch.autocast(samples.device.type, enabled=False):
            return reference.log_ppk(
                samples, loc, concentration, T, normalizer, projection, True, constants
            )
    tensors = [t.contiguous() for t in (samples, loc, concentration, T)]
    options = _checks.checked_options(normalizer, projection, precision, workspace, tensors)
    s, _, common = torch.ops.nivmf_fast.log_ppk(*tensors, *options, backend)
    if constants:  # added last: float32 scores would lose their digits to them
        shared = special.log_uniform_density(samples.shape[-1]) + common
        s = s + (shared / T.double()).to(s.dtype)
    values: Tensor = s
    return values


def proxy_nca(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    normalizer: Normalizer = "exact",
    projection: bool = True,
    temperature_outside: bool = False,
    precision: Precision = "float32",
    workspace: int | None = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Proxy-NCA loss of each image over its log-PPK to every proxy, without storing the [B, P].

    loss_i = -s_i,y_i + log sum_j exp s_ij     with s as in `log_ppk`

    Args:
        labels: [B] int64 in 0 .. P - 1. The rest: as in `log_ppk`.

    Returns:
        [B], not reduced; differentiable once. The kernels' backward skips tiles of pairs whose
        softmax weights sum to less than half an ulp of an image's total weight of 1. That bounds
        the error of each image's gradient and of the sum over proxies, not of a single proxy's:
        one with no greater weight in any image gets exactly 0. SGD cannot tell; an optimiser that
        divides by each parameter's own history, such as Adam, may. `log_ppk` followed by
        cross-entropy skips nothing.

    Raises:
        ValueError, TypeError: wrong shape, dtype, option or value.

    Source: Kirchhof et al. (ECCV 2022), equation 9; docs/math.md, "Dead tiles".

    Example:
        >>> x = vmf_rsample(torch.eye(3), torch.full((3,), 20.0), 8, seed=0)
        >>> loss = proxy_nca(x, torch.eye(3), torch.full((3, 3), 5.0), torch.arange(3), 0.1)
        >>> bool((loss < 0.1).all())
        True
    """
    _checks.check_proxies(samples, loc, concentration, validate)
    _checks.check_labels(labels, samples.shape[1], len(loc), validate)
    _checks.check_same_device(samples=samples, labels=labels)
    temperature = _checks.temperature_tensor(temperature, samples, validate)
    samples, loc, concentration, T = _checks.computable(samples, loc, concentration, temperature)
    if temperature_outside:
        with torch.autocast(samples.device.type, enabled=False):
            return reference.proxy_nca(
                samples, loc, concentration, labels, T, normalizer, projection, True
            )
    tensors = [t.contiguous() for t in (samples, loc, concentration, labels, T)]
    options = _checks.checked_options(normalizer, projection, precision, workspace, tensors)
    losses: Tensor = torch.ops.nivmf_fast.proxy_nca(*tensors, *options, backend)[0]
    return losses


def proxy_nca_shard(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    combine: Callable[[Tensor], Tensor],
    normalizer: Normalizer = "exact",
    projection: bool = True,
    precision: Precision = "float32",
    workspace: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`proxy_nca` over all proxies, of which this process holds a contiguous range.

    Args:
        loc, concentration: [P, D], of the range.
        labels: [B], counted from the range's first proxy; out of range for proxies elsewhere.
        combine: turns the float64 [4, B] of this range (each image's maximum and log sum over
            the proxies, then over its own proxy, -inf and 0 if that is elsewhere) into that of
            all ranges, as `combine_partials` does for a list of them.
        The rest: as in `proxy_nca`.

    Returns:
        [B], the losses over all ranges. Their gradients in samples and temperature are this
        range's terms; the sum over the ranges is the whole.

    Raises:
        ValueError, TypeError: wrong shape, dtype or option. Values are not checked.
    """
    _checks.check_proxies(samples, loc, concentration, False)
    _checks.check_labels(labels, samples.shape[1], len(loc), False)
    _checks.check_same_device(samples=samples, labels=labels)
    temperature = _checks.temperature_tensor(temperature, samples, False)
    samples, loc, concentration, T = _checks.computable(samples, loc, concentration, temperature)
    tensors = [t.contiguous() for t in (samples, loc, concentration, labels, T)]
    options = _checks.checked_options(normalizer, projection, precision, workspace, tensors)
    losses: Tensor = autograd.ShardedProxyNCA.apply(*tensors, combine, (*options, backend))
    return losses


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
