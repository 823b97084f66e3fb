"""Log-PPK of non-isotropic vMF proxies, the proxy-NCA loss on it, and the closed forms for vMFs.

Autograd differentiates everything here; `operators` has the same with explicit gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nivmf_fast import special


class Proxies(NamedTuple):
    """Coefficients of `score`, one row per proxy.

    Deviations from a common scale are prepared in float64 and rounded once, because the logits
    are thousands of times as large.
    """

    linear: Tensor  # [P, D], (K mu) K / kbar if projected, else K mu
    spread: Tensor  # [P, D], (kappa / kbar)^2 - 1 with kbar the geometric mean over dimensions
    bias: Tensor  # [P], the part of the score that depends on no sample, less `common`
    common: Tensor  # [], the mean of the biases, without gradient


def prepare_proxies(
    loc: Tensor, concentration: Tensor, normalizer: str = "exact", projection: bool = True
) -> Proxies:
    """Prepare the coefficients of `score` from loc [P, D], unit, and concentration [P, D], > 0."""
    mu, kappa, D = loc.double(), concentration.double(), loc.shape[-1]
    log_kbar = kappa.log().mean(-1, keepdim=True)
    kbar = log_kbar.exp()
    k_mu = kappa * mu
    length = torch.linalg.vector_norm(k_mu, dim=-1)
    bias = special.vmf_log_normalizer(length, D, constants=False)
    if normalizer == "released":
        bias = bias + D * log_kbar[:, 0] - length.log()
    common = bias.detach().mean() if len(bias) else bias.new_zeros(())
    linear = k_mu * kappa / kbar if projection else k_mu
    spread = (kappa / kbar).square() - 1
    dtype = loc.dtype
    return Proxies(linear.to(dtype), spread.to(dtype), (bias - common).to(dtype), common)


def score(samples: Tensor, proxies: Proxies, normalizer: str, projection: bool) -> Tensor:
    """log p_j(x) for every sample and proxy, [.., P], less log C_D(0) and `proxies.common`.

    log p_j(x) = log C_D(|K mu|) + (K mu).(K x)/|K x| + sum_d log kappa_d - D log|K x| (exact),
    with |K x|^2 = kbar^2 (1 + delta), delta = sum_d spread_d x_d^2 for a unit x.
    """
    z = samples @ proxies.linear.T
    if projection or normalizer == "exact":
        delta = samples.square() @ proxies.spread.T
    if projection:
        z = z / torch.sqrt(1 + delta)
    if normalizer == "exact":
        z = z - samples.shape[-1] / 2 * torch.log1p(delta)
    return z + proxies.bias


def log_sum(
    z: Tensor, temperature: Tensor, dim: int | tuple[int, ...] = 0
) -> tuple[Tensor, Tensor]:
    """Maximum of z and log sum exp((z - maximum) / T) over `dim`.

    The maximum stays in raw units: z / T is so large that its rounding error would matter.
    """
    maximum = z.detach().amax(dim, keepdim=True)
    return maximum.squeeze(dim), torch.logsumexp((z - maximum) / temperature, dim)


def own_proxy(labels: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image's own proxy is among the P of z [N, B, P], and its index, [N, B, 1]."""
    known = (labels >= 0) & (labels < z.shape[-1])
    return known, torch.where(known, labels, 0).expand(len(z), -1)[..., None]


def log_ppk(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    normalizer: str = "exact",
    projection: bool = True,
    temperature_outside: bool = False,
    constants: bool = True,
) -> Tensor:
    """s_ij = log (1/N) sum_s exp(log p_j(x_is) / T), [B, P], or with T outside the logarithm."""
    N, _, D = samples.shape
    proxies = prepare_proxies(loc, concentration, normalizer, projection)
    z = score(samples, proxies, normalizer, projection)
    inner = torch.ones_like(temperature) if temperature_outside else temperature
    maximum, lse = log_sum(z, inner)
    s = maximum / inner + lse - math.log(N)
    if temperature_outside:
        s = s / temperature
    if constants:
        shared = special.log_uniform_density(D) + proxies.common
        s = s + (shared / temperature.double()).to(s.dtype)
    return s


def proxy_nca(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    normalizer: str = "exact",
    projection: bool = True,
    temperature_outside: bool = False,
) -> Tensor:
    """loss_i = -s_i,y_i + log sum_j exp s_ij, [B]: one softmax over samples and proxies jointly."""
    proxies = prepare_proxies(loc, concentration, normalizer, projection)
    z = score(samples, proxies, normalizer, projection)
    known, index = own_proxy(labels, z)
    own = z.gather(2, index)  # [N, B, 1]
    if temperature_outside:
        z, own = torch.logsumexp(z, 0, keepdim=True), torch.logsumexp(own, 0, keepdim=True)
    maximum, lse = log_sum(z, temperature, (0, 2))
    own_maximum, own_lse = log_sum(own, temperature, (0, 2))
    loss = (maximum - own_maximum) / temperature + (lse - own_lse)
    return torch.where(known, loss, math.nan)


def vmf_log_ppk(
    one_minus_cosine: Tensor, concentration1: Tensor, concentration2: Tensor, rho: float, dim: int
) -> Tensor:
    """log int v_1^rho v_2^rho of two vMFs, in float64; arguments broadcast.

    rho (log C(k1) + log C(k2)) - log C(rho |k1 mu1 + k2 mu2|)
    """
    k1, k2 = concentration1.double(), concentration2.double()
    length2 = (k1 + k2).square() - 2 * k1 * k2 * one_minus_cosine.double()
    length = length2.clamp(min=1e-30).sqrt()
    g1, g2, g12 = (
        special.vmf_log_normalizer(k, dim, constants=False) for k in (k1, k2, rho * length)
    )
    return rho * (g1 + g2) - g12 + (2 * rho - 1) * special.log_uniform_density(dim)


def vmf_kl(
    one_minus_cosine: Tensor, concentration1: Tensor, concentration2: Tensor, dim: int
) -> Tensor:
    """KL(v_1 | v_2) = log C(k1) - log C(k2) + A(k1) (k1 - k2 mu1 . mu2), in float64."""
    k1, k2 = concentration1.double(), concentration2.double()
    A = special.vmf_mean_resultant_length(k1, dim)
    k1, k2 = torch.broadcast_tensors(k1, k2)
    normalizers = special.vmf_log_normalizer_difference(k1, k2, dim)
    kl: Tensor = normalizers + A * (k1 - k2 + k2 * one_minus_cosine.double())
    return kl
