"""The backend named "reference": log-PPK and proxy-NCA as operators with explicit gradients.

(Softmax over proxies) x (softmax over samples) is one joint softmax over the N P logits of an
image, so that the backward needs two numbers per image: the raw maximum and the log of the sum.
The kernels compute the same. The options `workspace` and `keep` have no effect here.
"""

import math

import torch
from torch import Tensor

from nivmf_fast import special
from nivmf_fast._partials import loss_of_partial
from nivmf_fast._schemas import Options
from nivmf_fast.reference.model import Proxies, log_sum, own_proxy, prepare_proxies, score


def log_ppk_forward(
    samples: Tensor, loc: Tensor, concentration: Tensor, temperature: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """log_ppk without its constants; saved [2, B, P], maximum and log sum over samples; common."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, options)
    maximum, lse = log_sum(z, T)
    s = maximum / T + lse - math.log(len(samples))
    return s, torch.stack((maximum, lse)), proxies.common


def log_ppk_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    saved: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in samples, loc, concentration and temperature from grad [B, P]."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, options)
    maximum, lse = saved
    dl = grad * torch.exp((z - maximum) / T - lse)
    return (
        *_score_backward(dl / T, samples, loc, concentration, proxies, options),
        -((dl * z).sum(dtype=torch.float64) / T.double().square()).to(T.dtype),
    )


def proxy_nca_forward(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B]; partial [4, B] of `_partials.py`; an empty tensor, as nothing is saved."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, options)
    known, index = own_proxy(labels, z)
    parts = []
    for values in (z, z.gather(2, index)):
        maximum, lse = log_sum(values, T, (0, 2))
        parts += [maximum.double() + proxies.common, lse.double()]
    partial = torch.stack(parts)
    partial[2] = torch.where(known, partial[2], -math.inf)
    partial[3] = torch.where(known, partial[3], 0)
    return loss_of_partial(partial, T), partial, samples.new_empty(0)


def proxy_nca_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    partial: Tensor,
    saved: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `log_ppk_backward` from grad [B]; NaN for an image without an own proxy."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, options)
    maximum, lse, own_maximum, own_lse = partial
    known, index = own_proxy(labels, z)

    def softmax(values: Tensor, maximum: Tensor, lse: Tensor) -> Tensor:
        near = (maximum - proxies.common).to(z.dtype)[:, None]
        lse = lse + (maximum - proxies.common - near[:, 0]) / T.double()
        return torch.exp((values - near) / T - lse.to(z.dtype)[:, None])

    own = softmax(z.gather(2, index), own_maximum, own_lse)
    own = torch.where(known[:, None], own, 0)
    grad = torch.where(own_maximum > -math.inf, grad, math.nan)[:, None]
    dl = grad * softmax(z, maximum, lse).scatter_add(2, index, -own)
    centered = z - (maximum - proxies.common).to(z.dtype)[:, None]  # dl sums to 0 per image
    return (
        *_score_backward(dl / T, samples, loc, concentration, proxies, options),
        -((dl * centered).sum(dtype=torch.float64) / T.double().square()).to(T.dtype),
    )


def _scores(
    samples: Tensor, loc: Tensor, concentration: Tensor, temperature: Tensor, options: Options
) -> tuple[Tensor, Proxies, Tensor]:
    """T, NaN unless positive; the prepared proxies; the raw scores [N, B, P]."""
    form = "exact" if options.exact else "released", options.projection
    proxies = prepare_proxies(loc, concentration, *form)
    T = torch.where(temperature > 0, temperature, math.nan)
    return T, proxies, score(samples, proxies, *form)


def _score_backward(
    G: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    proxies: Proxies,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in samples, loc and concentration from G = dL/dz [N, B, P], for unit samples."""
    exact, projection, D = options.exact, options.projection, samples.shape[-1]
    G, x = G.flatten(0, 1), samples.flatten(0, 1)
    num, squares = x @ proxies.linear.T, x.square()
    den = torch.sqrt(1 + squares @ proxies.spread.T)
    G1 = G / den if projection else G
    slope = (num / den if projection else 0) + (D if exact else 0)
    G2 = -0.5 * G * slope / den.square()  # dL/ddelta
    d_samples = G1 @ proxies.linear + 2 * x * (G2 @ proxies.spread)

    dM, dQ = (G1.T @ x).double(), (G2.T @ squares).double()
    da = G.sum(0, dtype=torch.float64)[:, None]
    mu, kappa = loc.double(), concentration.double()
    kbar = kappa.log().mean(-1, keepdim=True).exp()
    length = torch.linalg.vector_norm(kappa * mu, dim=-1, keepdim=True)
    # (d bias / d|K mu|) / |K mu|
    bias_slope = -special.vmf_mean_resultant_length(length, D) / length
    if not exact:
        bias_slope = bias_slope - 1 / length.square()
    scale = kappa / kbar if projection else torch.ones_like(kappa)
    d_loc = kappa * (scale * dM + da * bias_slope * kappa * mu)
    d_concentration = (
        (2 if projection else 1) * mu * scale * dM
        + 2 * kappa / kbar.square() * dQ
        + da * (1 / kappa + bias_slope * kappa * mu.square())
    )
    dtype = samples.dtype
    return d_samples.view_as(samples), d_loc.to(dtype), d_concentration.to(dtype)
