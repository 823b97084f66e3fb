"""The vMF sampler and its gradients: exact rejection with Wood's proposal, free of cancellation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nivmf_fast import special
from nivmf_fast.reference.random import Stream

MAX_ATTEMPTS = 64  # an attempt fails with probability <= 0.342, 64 in a row with 1e-30


class Draw(NamedTuple):
    """Samples, with the data that their gradients need and the margin that tests need."""

    samples: Tensor  # [N, B, D], unit
    one_minus_w: Tensor  # [N, B], 1 - loc . sample without cancellation
    margin: Tensor  # [N, B], margin of the closest accept/reject decision; 0 if the normals are
    # so nearly parallel to loc that float32 loses their tangent direction


def vmf_rsample(
    loc: Tensor,
    concentration: Tensor,
    n: int,
    seed: Tensor,
    image_offset: int = 0,
    stream_dtype: torch.dtype | None = None,
) -> Draw:
    """Draw N samples of each of B von Mises-Fisher distributions, loc [B, D], concentration [B].

    w = loc . x is drawn by the rejection of Ulrich (1984) and Wood (1994), written so that nothing
    cancels at any concentration; the first proposal comes for free from the normals of the tangent
    direction. `stream_dtype=float32` lets float64 arithmetic follow the float32 stream.
    """
    (B, D), dtype, m = loc.shape, loc.dtype, loc.shape[1] - 1
    stream = Stream(n, B, seed.to(loc.device), image_offset, stream_dtype or dtype)
    mu = loc / torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
    valid = (concentration >= 0) & (concentration <= special.MAX_CONCENTRATION)
    valid = valid & mu.isfinite().all(-1)

    rows = stream.index % max(B, 1)
    center, k = mu[rows], torch.where(valid, concentration, 0)[rows]
    normals = stream.normals(D).to(dtype)
    g = (normals * center).sum(-1)
    tangent = normals - g[:, None] * center
    # again: at small D the rounding of the first matters
    tangent = tangent - (tangent * center).sum(-1, keepdim=True) * center
    chi2 = tangent.square().sum(-1).clamp(min=1e-30)
    direction = tangent / chi2.sqrt()[:, None]

    c = torch.hypot(2 * k, torch.full_like(k, m))
    b = m / (2 * k + c)
    one_minus_b = (2 * k + 2 * k * (2 * k / (c + m))) / (2 * k + c)
    one_minus_w, s = torch.zeros_like(k), torch.zeros_like(k)
    lost = (5e-3 if D > 2 else 1e-5) * torch.hypot(g, chi2.sqrt())  # at D = 2 only the sign matters
    margin = torch.where(chi2.sqrt() < lost, 0.0, math.inf).to(dtype)
    pending = stream.index
    for attempt in range(1, MAX_ATTEMPTS + 1):
        if pending.numel() == 0:
            break
        word = stream.words(pending, 0, attempt)
        if attempt > 1:
            g = stream.normal_pair(word[1], word[2])[0].to(dtype)
            boost = stream.uniform(word[3]).to(dtype)
            chi2 = _chi_square(m, stream, pending, attempt, boost, margin)
        chi, r = chi2.sqrt(), torch.sqrt(g * g + chi2)
        q = torch.where(g >= 0, (r + g) / chi, chi / (r - g))  # exp(asinh(g / chi))
        odds = b[pending] * q * q  # tan^2 of half the angle to loc
        one_minus_w[pending] = 2 * odds / (1 + odds)
        s[pending] = 2 * b[pending].sqrt() * q / (1 + odds)
        y = 0.5 * one_minus_b[pending] * (1 - q * q) / (1 + odds)
        gap = m * _log1p_excess(y) - torch.log(stream.uniform(word[0])).to(dtype)
        margin[pending] = torch.minimum(margin[pending], gap.abs())
        pending = pending[gap < 0]
    x = (1 - one_minus_w)[:, None] * center + s[:, None] * direction
    x = torch.where(valid[rows][:, None], x, math.nan)
    one_minus_w = torch.where(valid[rows], one_minus_w, math.nan)
    return Draw(x.view(n, B, D), one_minus_w.view(n, B), margin.view(n, B))


def _log1p_excess(y: Tensor) -> Tensor:
    """y + log(1 - y), accurate near 0."""
    series = 1 / 2 + y * (1 / 3 + y * (1 / 4 + y * (1 / 5 + y * (1 / 6 + y / 7))))
    return torch.where(y.abs() < 1 / 16, -y * y * series, y + torch.log1p(-y))


def _chi_square(
    m: int, stream: Stream, at: Tensor, attempt: int, boost: Tensor, margin: Tensor
) -> Tensor:
    """Draw chi^2 with m degrees of freedom, 2 Gamma(m/2), by Marsaglia & Tsang (2000).

    Lowers `margin` in place.
    """
    alpha = m / 2 if m > 1 else 1.5
    d = alpha - 1 / 3
    value = torch.zeros_like(boost)
    pending = torch.arange(len(at), device=at.device)
    for round_ in range(1, MAX_ATTEMPTS + 1):
        if pending.numel() == 0:
            break
        word = stream.words(at[pending], round_, attempt)
        z = stream.normal_pair(word[0], word[1])[0].to(boost.dtype)
        v = (1 + z / math.sqrt(9 * d)) ** 3
        value[pending] = 2 * d * v
        log_v = torch.log(v.clamp(min=1e-30))
        gap = z * z / 2 + d - d * v + d * log_v - torch.log(stream.uniform(word[2])).to(z.dtype)
        margin[at[pending]] = torch.minimum(margin[at[pending]], gap.abs())
        pending = pending[(v <= 0) | (gap < 0)]
    return value.clamp(min=1e-30) * (boost**2 if m == 1 else 1)


def vmf_rsample_backward(
    grad: Tensor, samples: Tensor, one_minus_w: Tensor, loc: Tensor, concentration: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients in loc (as given, not normalised) and concentration from G = dL/dsamples.

    The concentration moves w at fixed quantiles (implicit reparameterisation, Figurnov et al.
    2018); loc moves the samples by the rotation that carries it, dx = w dmu - (x . dmu) mu.
    """
    length = torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
    mu, w = loc / length, 1 - one_minus_w
    along = (grad * mu).sum(-1)  # G . mu
    step = (w[..., None] * grad - along[..., None] * samples).sum(0)
    grad_loc = (step - (step * mu).sum(-1, keepdim=True) * mu) / length
    # G . mu - (w / s) G . u, without dividing by s, which vanishes at the poles
    apart = (grad * (mu - samples)).sum(-1)
    across = (one_minus_w * along + w * apart) / (one_minus_w * (1 + w)).clamp(min=1e-30)
    dw = vmf_dw_dconcentration(one_minus_w, concentration, loc.shape[-1])
    return grad_loc, (dw * across).sum(0)


def vmf_dw_dconcentration(one_minus_w: Tensor, concentration: Tensor, dim: int) -> Tensor:
    """Derivative of w = loc . x in the concentration at a fixed quantile, -(dF/dk) / f.

    Gauss-Legendre quadrature in the angle, from the sample towards the nearer pole, over the
    length in which the density falls by exp(-cutoff).
    """
    dtype, device = one_minus_w.dtype, one_minus_w.device
    n, cutoff = (16, 40.0) if dtype == torch.float32 else (48, 72.0)
    rule = special.gauss_legendre(n)
    nodes, weights = (torch.tensor(row, dtype=dtype, device=device) for row in rule)
    k, w = concentration, 1 - one_minus_w
    s = (one_minus_w * (1 + w)).clamp(min=1e-30).sqrt()
    cot = w / s
    mean_gap = 1 - special.vmf_mean_resultant_length(concentration.double(), dim)  # 1 - A
    mean_gap = mean_gap.to(dtype).expand_as(w)
    sign = torch.where(one_minus_w <= mean_gap, -1.0, 1.0).to(dtype)
    slope = sign * (k * s - (dim - 2) * cot)
    curvature = (k * w + (dim - 2) / (s * s)).clamp(min=0.05)
    root = torch.sqrt(slope * slope + 2 * curvature * cutoff)
    length = torch.where(slope >= 0, 2 * cutoff / (slope + root), (root - slope) / curvature)
    length = torch.minimum(length, torch.atan2(s, -sign * w))
    w, s, k, cot, sign, gap = (
        t[..., None] for t in (w, s, k.expand_as(w), cot, sign, mean_gap - one_minus_w)
    )
    angle = length[..., None] * nodes
    versine = 2 * torch.sin(angle / 2).square()
    change = -w * versine - sign * s * torch.sin(angle)  # of w along the way
    log_ratio = torch.log1p((sign * cot * torch.sin(angle) - versine).clamp(min=-1 + 1e-7))
    integrand = (gap + change).abs() * torch.exp(k * change + (dim - 2) * log_ratio)
    return s[..., 0] * length * (integrand * weights).sum(-1)
