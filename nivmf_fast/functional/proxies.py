"""Log-PPK of sampled images and non-isotropic vMF proxies, and the proxy-NCA loss on it."""

from collections.abc import Callable

import torch
from torch import Tensor

from nivmf_fast import _checks, autograd, reference, special
from nivmf_fast._schemas import Normalizer, Precision


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
