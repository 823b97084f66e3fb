"""The public functions: what they compute, what they accept, and what they say when they cannot.

B images with N samples each, P proxies, dimension D, temperature T. Every function takes float32
or float64 tensors of any strides; half-precision inputs are computed in, and give, float32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from nivmf_fast import autograd, reference, special  # noqa: F401  (autograd registers gradients)
from nivmf_fast._partials import loss_of_partial
from nivmf_fast._schemas import PRECISIONS, Normalizer, Options, Precision


def vmf_log_normalizer(
    concentration: Tensor, dim: int, *, constants: bool = True, backend: str = "auto"
) -> Tensor:
    """Log normaliser of the von Mises-Fisher density, exact for every dimension.

    log C_D(k) = (D/2 - 1) log k - (D/2) log 2 pi - log I_{D/2-1}(k)

    Args:
        concentration: k >= 0, any shape. Negative, NaN and beyond 1e18 give NaN.
        dim: D, 2 to 65,536.
        constants: False leaves out log C_D(0), which keeps small differences exact in float32.
        backend: see `which_backend`.

    Returns:
        Same shape; twice differentiable, with first derivative -A_D.

    Raises:
        TypeError, ValueError: not a floating tensor; dim out of range.

    Source: DLMF 10.41 (uniform expansions of Bessel functions).

    Example:
        >>> vmf_log_normalizer(torch.tensor([0.0, 10.0]), 3)  # log 1 / (4 pi) at 0
        tensor([-2.5310, -9.5353])
    """
    g = _derivative(concentration, dim, 0, backend)
    return g + special.log_uniform_density(dim) if constants else g


def vmf_mean_resultant_length(concentration: Tensor, dim: int, *, backend: str = "auto") -> Tensor:
    """Mean of the cosine to the mean direction, A_D(k) = I_{D/2}(k) / I_{D/2-1}(k).

    Arguments and errors as `vmf_log_normalizer`; differentiable once.

    Example:
        >>> vmf_mean_resultant_length(torch.tensor([1.0, 100.0]), 3)  # coth k - 1 / k
        tensor([0.3130, 0.9900])
    """
    return -_derivative(concentration, dim, 1, backend)


def _derivative(concentration: Tensor, dim: int, order: int, backend: str) -> Tensor:
    _check_floating("concentration", concentration)
    special.check_dim(dim)
    k = _computable(concentration)[0].contiguous()
    g: Tensor = torch.ops.nivmf_fast.vmf_log_normalizer(k, dim, order, backend)
    return g


def vmf_log_normalizer_difference(concentration: Tensor, other: Tensor, dim: int) -> Tensor:
    """log C_D(k) - log C_D(k0) without the cancellation of subtracting the two.

    Arguments: two broadcastable tensors of concentrations >= 0, and D; twice differentiable.

    Example:
        >>> vmf_log_normalizer_difference(torch.tensor(100.1), torch.tensor(100.0), 512)
        tensor(-0.0188)
    """
    _check_floating("concentration", concentration)
    _check_floating("other", other)
    special.check_dim(dim)
    k, k0 = _computable(concentration, other)
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
    """Exact samples of von Mises-Fisher distributions with unbiased gradients, [n, B, D].

    x = w mu + sqrt(1 - w^2) u, w by rejection, u uniform on the tangent sphere. Gradients: the
    rotation carrying loc, and the implicit derivative of w in the concentration.

    Args:
        loc: [B, D], normalised inside; D >= 2. concentration: [B], >= 0.
        n: samples per image.
        seed: int or 0-d int64 tensor; one seed gives the same samples on every backend. None
            draws one from `generator` or torch's default one (`torch.manual_seed`).
        image_offset: index of the first image; image i draws the same whatever its batch.
        validate: check values, which synchronises a GPU; None checks on the CPU only.

    Raises:
        ValueError, TypeError: wrong shape, dtype or value. (Unchecked bad values give NaN.)

    Source: Wood (1994); Davidson et al. (2018); Figurnov et al. (2018).

    Example:
        >>> loc, k = torch.eye(3)[:2], torch.tensor([10.0, 100.0])
        >>> vmf_rsample(loc, k, 5, seed=0).shape
        torch.Size([5, 2, 3])
    """
    _check_shape("loc", loc, "[B, D]", 2)
    B, D = loc.shape
    special.check_dim(D)
    _check_shape("concentration", concentration, f"[B] = [{B}]", 1, (B,))
    _check_count("n", n, 0)
    _check_count("image_offset", image_offset, 0, 2**32 - B)
    _check_same_device(loc=loc, concentration=concentration)
    if checks_values(validate, loc):
        check_all("loc", loc, loc.isfinite(), "finite")
        check_all("loc", loc, (loc != 0).any(-1), "of nonzero length")
        check_all("concentration", concentration, concentration >= 0, ">= 0")
        check_all("concentration", concentration, concentration <= 1e18, "at most 1e18")
    loc, concentration = _computable(loc, concentration)
    samples: Tensor = torch.ops.nivmf_fast.vmf_rsample(
        loc.contiguous(),
        concentration.contiguous(),
        n,
        _seed_tensor(seed, generator, loc.device),
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
    """Log probability-product kernel of sampled images and non-isotropic vMF proxies, [B, P].

    s_ij = log (1/N) sum_s exp(log p_j(x_is) / T),
    log p_j(x) = log C_D(|K mu|) + (K mu).(K x)/|K x| + sum_d log kappa_d - D log|K x|

    Args:
        samples: [N, B, D] unit vectors of the images, N >= 1.
        loc: [P, D] unit mean directions. concentration: [P, D], the diagonals kappa > 0 of K.
        temperature: T > 0, a number or a 0-d tensor.
        normalizer: "released" puts -log|K mu| for the last term: the research code's form.
        projection: False puts (K mu).x for the second term: likewise.
        temperature_outside: s_ij = (1/T) log (1/N) sum_s p_j(x_is); computed by the reference.
        constants: False leaves out what all pairs share; use it before a softmax.
        precision: "fast" allows kernels cheaper, less exact products.
        workspace: bytes of scratch, by default 64 MiB on CPUs and 256 MiB on CUDA; the scores are
            kept for the backward if they fit, else computed twice.
        validate: as in `vmf_rsample`.

    Raises:
        ValueError, TypeError: wrong shape, dtype, option or value.

    Source: Kirchhof et al. (ECCV 2022); the temperature stands inside as in its experiments.

    Example:
        >>> x = vmf_rsample(torch.eye(3), torch.full((3,), 20.0), 8, seed=0)
        >>> log_ppk(x, torch.eye(3), torch.full((3, 3), 5.0)).argmax(1)
        tensor([0, 1, 2])
    """
    check_options(normalizer, precision, workspace)
    _check_proxies(samples, loc, concentration, validate)
    temperature = _temperature(temperature, samples, validate)
    samples, loc, concentration, temperature = _computable(samples, loc, concentration, temperature)
    if temperature_outside:  # no joint softmax, hence not fused
        with torch.autocast(samples.device.type, enabled=False):
            return reference.log_ppk(
                samples, loc, concentration, temperature, normalizer, projection, True, constants
            )
    s, _, common = torch.ops.nivmf_fast.log_ppk(
        samples.contiguous(),
        loc.contiguous(),
        concentration.contiguous(),
        temperature,
        *_options(normalizer, projection, precision, workspace, samples),
        backend,
    )
    if constants:  # once, after the sum: in float32 they would drown it
        shared = special.log_uniform_density(samples.shape[-1]) + common
        s = s + (shared / temperature.double()).to(s.dtype)
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
    """Proxy-NCA loss of each image over its log-PPK to every proxy, [B], not reduced.

    loss_i = -s_i,y_i + log sum_j exp s_ij     with s as in `log_ppk`

    Args:
        labels: [B] int64 in 0 .. P - 1; the rest as in `log_ppk`.

    Raises:
        ValueError, TypeError: wrong shape, dtype, option or value.

    Source: Kirchhof et al. (ECCV 2022), equation 9.

    Example:
        >>> x = vmf_rsample(torch.eye(3), torch.full((3,), 20.0), 8, seed=0)
        >>> loss = proxy_nca(x, torch.eye(3), torch.full((3, 3), 5.0), torch.arange(3), 0.1)
        >>> bool((loss < 0.1).all())
        True
    """
    check_options(normalizer, precision, workspace)
    _check_proxies(samples, loc, concentration, validate)
    check_labels(labels, samples.shape[1], len(loc), validate)
    _check_same_device(samples=samples, labels=labels)
    temperature = _temperature(temperature, samples, validate)
    samples, loc, concentration, temperature = _computable(samples, loc, concentration, temperature)
    if temperature_outside:
        with torch.autocast(samples.device.type, enabled=False):
            return reference.proxy_nca(
                samples, loc, concentration, labels, temperature, normalizer, projection, True
            )
    losses: Tensor = torch.ops.nivmf_fast.proxy_nca(
        samples.contiguous(),
        loc.contiguous(),
        concentration.contiguous(),
        labels.contiguous(),
        temperature,
        *_options(normalizer, projection, precision, workspace, samples),
        backend,
    )[0]
    return losses


class _ShardedProxyNCA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, combine, ctx.options = inputs
        _, partial, saved = torch.ops.nivmf_fast.proxy_nca(*tensors, *ctx.options)
        combined = combine(partial)
        ctx.save_for_backward(*tensors, combined, saved)
        return loss_of_partial(combined, tensors[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *into, d_temperature = torch.ops.nivmf_fast.proxy_nca_backward(
            grad.contiguous(), *ctx.saved_tensors, *ctx.options
        )
        return (*into, None, d_temperature, None, None)


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
    """`proxy_nca` over all proxies, of which only a contiguous range is here.

    Args:
        loc, concentration: [P, D], of the range.
        labels: [B], counted from the range's first proxy; out of range for proxies elsewhere.
        combine: makes the float64 [4, B] of all ranges (each image's maximum and log sum over
            the proxies, then over its own proxy, -inf and 0 if that is elsewhere) from that of
            this one, as `combine_partials` does from the list of them.
        The rest: as in `proxy_nca`.

    Returns:
        [B], the losses over all ranges. Their gradients in samples and temperature are this
        range's terms: the sum over the ranges is the whole.
    """
    check_options(normalizer, precision, workspace)
    _check_proxies(samples, loc, concentration, False)
    temperature = _temperature(temperature, samples, False)
    samples, loc, concentration, temperature = _computable(samples, loc, concentration, temperature)
    tensors = [t.contiguous() for t in (samples, loc, concentration, labels, temperature)]
    options = *_options(normalizer, projection, precision, workspace, samples), backend
    losses: Tensor = _ShardedProxyNCA.apply(*tensors, combine, options)
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
        loc1, concentration1: [B, D] unit, [B].
        loc2, concentration2: [P, D] unit, [P].
        rho: > 0; 1 is the expected likelihood, 1/2 the Bhattacharyya kernel.
        pairwise: False pairs row i with row i (B = P) and gives [B].

    Returns:
        [B, P]. The part that is not a matrix product is computed in float64.

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
    args = _check_pairs(loc1, concentration1, loc2, concentration2, pairwise)
    ppk = reference.vmf_log_ppk(*_pairs(*args, pairwise), rho, loc1.shape[-1])
    return ppk.to(args[0].dtype)


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

    Arguments, returns and errors as `vmf_log_ppk`.

    Example:
        >>> loc, k = torch.eye(3), torch.full((3,), 50.0)
        >>> vmf_kl(loc, k, loc, k).diagonal()
        tensor([0., 0., 0.])
    """
    args = _check_pairs(loc1, concentration1, loc2, concentration2, pairwise)
    return reference.vmf_kl(*_pairs(*args, pairwise), loc1.shape[-1]).to(args[0].dtype)


# --- checks


def _computable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in one floating type: float64 if any is, else float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return tuple(t.to(torch.float64 if double else torch.float32) for t in tensors)


def checks_values(validate: bool | None, tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a check is a branch on data, which a graph cannot hold
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must have a floating type (float32, float64, or half types that are computed "
            f"in float32); got {tensor.dtype}. Convert it with {name}.float()"
        )


def _check_shape(
    name: str, tensor: Tensor, want: str, ndim: int, shape: tuple[int, ...] | None = None
) -> None:
    _check_floating(name, tensor)
    if tensor.ndim != ndim or (shape is not None and tuple(tensor.shape) != shape):
        raise ValueError(f"{name} must have shape {want}; got {list(tensor.shape)}")


def _check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}; got {value}")


def _check_same_device(**tensors: Tensor) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"all tensors must be on one device; got {where}")


def check_all(name: str, tensor: Tensor, ok: Tensor, allowed: str) -> None:
    if bool(ok.all()):
        return
    index = (~ok).nonzero()[0].tolist()
    raise ValueError(f"{name} must be {allowed}; got {tensor[tuple(index)].tolist()} at {index}")


def check_options(normalizer: str, precision: str, workspace: int | None) -> None:
    if normalizer not in ("exact", "released"):
        raise ValueError(f"normalizer must be 'exact' or 'released'; got {normalizer!r}")
    if precision not in ("float32", "fast"):
        raise ValueError(f"precision must be 'float32' or 'fast'; got {precision!r}")
    if workspace is not None:
        _check_count("workspace", workspace, 1)


def _options(
    normalizer: Normalizer,
    projection: bool,
    precision: Precision,
    workspace: int | None,
    like: Tensor,
) -> Options:
    scratch = workspace or (256 if like.device.type == "cuda" else 64) << 20
    keep = torch.is_grad_enabled()
    return Options(normalizer == "exact", projection, PRECISIONS.index(precision), scratch, keep)


def _check_proxies(
    samples: Tensor, loc: Tensor, concentration: Tensor, validate: bool | None
) -> None:
    _check_shape("samples", samples, "[N, B, D]", 3)
    N, _, D = samples.shape
    special.check_dim(D)
    if N < 1:
        raise ValueError("samples must have shape [N, B, D] with N >= 1; got N = 0")
    _check_shape("loc", loc, f"[P, D] with D = {D}", 2, (len(loc), D) if loc.ndim else None)
    if len(loc) < 1:
        raise ValueError("loc must have shape [P, D] with P >= 1 proxies; got P = 0")
    want = f"that of loc, [P, D] = {list(loc.shape)}"
    _check_shape("concentration", concentration, want, 2, tuple(loc.shape))
    _check_same_device(samples=samples, loc=loc, concentration=concentration)
    if checks_values(validate, samples):
        if not _all_between(samples, -math.inf):
            check_all("samples", samples, samples.isfinite(), "finite")
        if not _all_between(loc, -math.inf):
            check_all("loc", loc, loc.isfinite(), "finite")
        if not _all_between(concentration, 0):
            positive = (concentration > 0) & concentration.isfinite()
            check_all("concentration", concentration, positive, "positive and finite")


def _all_between(tensor: Tensor, low: float, high: float = math.inf) -> bool:
    """low < all < high and no NaN, without temporaries of the tensor's size."""
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


def _temperature(temperature: float | Tensor, like: Tensor, validate: bool | None) -> Tensor:
    if isinstance(temperature, Tensor):
        _check_shape("temperature", temperature, "[] (0-d)", 0)
        _check_same_device(samples=like, temperature=temperature)
        if checks_values(validate, temperature) and not _all_between(temperature, 0):
            positive = (temperature > 0) & temperature.isfinite()
            check_all("temperature", temperature, positive, "positive and finite")
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a 0-d tensor; got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    return torch.full((), temperature, dtype=_computable(like)[0].dtype, device=like.device)


def _check_pairs(
    loc1: Tensor, concentration1: Tensor, loc2: Tensor, concentration2: Tensor, pairwise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_shape("loc1", loc1, "[B, D]", 2)
    B, D = loc1.shape
    special.check_dim(D)
    _check_shape("concentration1", concentration1, f"[B] = [{B}]", 1, (B,))
    _check_shape("loc2", loc2, f"[P, D] with D = {D}", 2, (len(loc2), D) if loc2.ndim else None)
    P = len(loc2)
    _check_shape("concentration2", concentration2, f"[P] = [{P}]", 1, (P,))
    if not pairwise and B != P:
        raise ValueError(f"pairwise=False needs as many rows in both; got {B} and {P}")
    _check_same_device(
        loc1=loc1, concentration1=concentration1, loc2=loc2, concentration2=concentration2
    )
    loc1, concentration1, loc2, concentration2 = _computable(
        loc1, concentration1, loc2, concentration2
    )
    return loc1, concentration1, loc2, concentration2


def _pairs(
    loc1: Tensor, k1: Tensor, loc2: Tensor, k2: Tensor, pairwise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """1 - mu1 . mu2 and the two concentrations, shaped to broadcast against it."""
    with torch.autocast(loc1.device.type, enabled=False):
        if pairwise:
            return 1 - loc1 @ loc2.T, k1[:, None], k2
        return (loc1 - loc2).square().sum(-1) / 2, k1, k2  # exact where the directions agree


def _seed_tensor(
    seed: int | Tensor | None, generator: Generator | None, device: torch.device
) -> Tensor:
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
