"""The whole model in eager PyTorch: the specification that every kernel is tested against.

Any device, float32 and float64; nothing here is fast on purpose and nothing is approximate.
B images, N samples each, P proxies, dimension D, temperature T.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nivmf_fast import special

MAX_ATTEMPTS = 64  # at 0.342 or less a failed attempt, 64 in a row have probability 1e-30
_MASK = 0xFFFFFFFF

# --- the random stream: Philox 4x32-10, keyed by the seed, counted by (block, sample, image, part)


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Four words (int64 tensors holding 32 bits) for each counter of four such words.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """

    def multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:  # high and low word of a * m
        upper, lower = a * (m >> 16), a * (m & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _MASK

    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as a number in (0, 1]: word 2^-32 + 2^-33, the word first rounded to `dtype`."""
    return word.to(dtype) * 2.0**-32 + 2.0**-33


def box_muller(word0: Tensor, word1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r = torch.sqrt(-2 * torch.log(uniform(word0, dtype)))
    angle = 2 * math.pi * uniform(word1, dtype)
    return r * torch.cos(angle), r * torch.sin(angle)


# --- the vMF sampler: exact rejection with Wood's proposal, in cancellation-free form


class Draw(NamedTuple):
    samples: Tensor  # [N, B, D], unit
    one_minus_w: Tensor  # [N, B], 1 - loc . sample without cancellation
    margin: Tensor  # [N, B], how near the nearest decision was to going the other way in float32;
    # 0 where the normals lie so nearly along loc that float32 loses their tangent direction


class _Stream:
    """The words of each (sample, image), by block and part; image_offset moves the images."""

    def __init__(self, n: int, B: int, seed: Tensor, image_offset: int, dtype: torch.dtype) -> None:
        self.index = torch.arange(n * B, device=seed.device)
        self.sample = self.index // max(B, 1)
        self.image = (self.index % max(B, 1) + image_offset) & _MASK
        self.seed, self.dtype = seed, dtype

    def words(self, at: Tensor, block: Tensor | int, part: int) -> list[Tensor]:
        sample, image = self.sample[at], self.image[at]
        block = torch.as_tensor(block, device=at.device)
        counter = torch.broadcast_tensors(block, sample, image, torch.full_like(at, part))
        return philox(list(counter), self.seed)

    def uniform(self, word: Tensor) -> Tensor:
        return uniform(word, self.dtype).double()  # rounded once, then exact: kernels take care too

    def normal_pair(self, word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.sqrt(-2 * torch.log(self.uniform(word0)))
        angle = 2 * math.pi * self.uniform(word1)
        return r * torch.cos(angle), r * torch.sin(angle)

    def normals(self, D: int) -> Tensor:  # [N B, D]: the part 0
        blocks = torch.arange((D + 3) // 4, device=self.index.device)
        w = self.words(self.index[:, None], blocks, 0)
        four = (*self.normal_pair(w[0], w[1]), *self.normal_pair(w[2], w[3]))
        return torch.stack(four, dim=-1).flatten(1)[:, :D]


def vmf_rsample(
    loc: Tensor,
    concentration: Tensor,
    n: int,
    seed: Tensor,
    image_offset: int = 0,
    stream_dtype: torch.dtype | None = None,
) -> Draw:
    """N draws from each of B von Mises-Fisher distributions, loc [B, D], concentration [B].

    w = loc . x is drawn by the rejection of Ulrich (1984) and Wood (1994), written so that nothing
    cancels at any concentration; the first proposal comes free with the normals of the tangent
    direction. `stream_dtype=float32` lets float64 arithmetic follow the float32 stream.
    """
    (B, D), dtype, m = loc.shape, loc.dtype, loc.shape[1] - 1
    stream = _Stream(n, B, seed.to(loc.device), image_offset, stream_dtype or dtype)
    mu = loc / torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
    valid = (concentration >= 0) & (concentration <= 1e18) & mu.isfinite().all(-1)

    rows = stream.index % max(B, 1)
    center, k = mu[rows], torch.where(valid, concentration, 0)[rows]
    normals = stream.normals(D).to(dtype)
    g = (normals * center).sum(-1)
    tangent = normals - g[:, None] * center
    tangent = tangent - (tangent * center).sum(-1, keepdim=True) * center  # rounding, at small D
    chi2 = tangent.square().sum(-1).clamp(min=1e-30)
    direction = tangent / chi2.sqrt()[:, None]

    c = torch.hypot(2 * k, torch.full_like(k, m))
    b = m / (2 * k + c)
    one_minus_b = (2 * k + 2 * k * (2 * k / (c + m))) / (2 * k + c)
    one_minus_w, s = torch.zeros_like(k), torch.zeros_like(k)
    lost = (5e-3 if D > 2 else 1e-5) * torch.hypot(g, chi2.sqrt())  # D = 2: but its sign is safe
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
    m: int, stream: _Stream, at: Tensor, attempt: int, boost: Tensor, margin: Tensor
) -> Tensor:
    """chi^2 with m degrees of freedom, 2 Gamma(m/2), by Marsaglia & Tsang (2000); lowers margin."""
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

    The concentration moves w along its quantiles (implicit reparameterisation, Figurnov et al.
    2018); loc moves the samples by the rotation that carries it, dx = w dmu - (x . dmu) mu.
    """
    length = torch.linalg.vector_norm(loc, dim=-1, keepdim=True)
    mu, w = loc / length, 1 - one_minus_w
    along = (grad * mu).sum(-1)  # G . mu
    step = (w[..., None] * grad - along[..., None] * samples).sum(0)
    grad_loc = (step - (step * mu).sum(-1, keepdim=True) * mu) / length
    # G . mu - (w / s) G . u without the s that vanishes at the poles
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
    nodes, weights = (t.to(device, dtype) for t in gauss_legendre(n))
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


@functools.cache
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] in float64, from the Jacobi matrix (Golub & Welsch, 1969)."""
    i = torch.arange(1, n, dtype=torch.float64)
    off_diagonal = i / torch.sqrt(4 * i * i - 1)
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (eigenvalues + 1) / 2, vectors[0].square()


# --- log-PPK, the log probability-product kernel, and the proxy-NCA loss on it


class Proxies(NamedTuple):
    """What a score needs of each proxy; `score` shows how. The deviations from a common scale
    are prepared in float64 and rounded once: the logits are these times thousands."""

    linear: Tensor  # [P, D], (K mu) K / kbar if projected, else K mu
    spread: Tensor  # [P, D], (kappa / kbar)^2 - 1 with kbar the geometric mean over dimensions
    bias: Tensor  # [P], what does not depend on the sample, less `common`
    common: Tensor  # [], the part of the bias that all proxies share, without gradient


def prepare_proxies(
    loc: Tensor, concentration: Tensor, normalizer: str = "exact", projection: bool = True
) -> Proxies:
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
    """s_ij = log (1/N) sum_s exp(log p_j(x_is) / T), [B, P]; the T may stand outside the log."""
    N, _, D = samples.shape
    proxies = prepare_proxies(loc, concentration, normalizer, projection)
    z = score(samples, proxies, normalizer, projection)
    inner = torch.ones_like(temperature) if temperature_outside else temperature
    top = z.detach().amax(0)  # in raw units: a maximum of z / T is too large for its own rounding
    s = top / inner + torch.logsumexp((z - top) / inner, 0) - math.log(N)
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
    known = (labels >= 0) & (labels < len(loc))
    index = torch.where(known, labels, 0).expand(len(z), -1)[..., None]
    own = z.gather(2, index)  # [N, B, 1]
    if temperature_outside:
        z, own = torch.logsumexp(z, 0, keepdim=True), torch.logsumexp(own, 0, keepdim=True)

    def log_sum(values: Tensor) -> tuple[Tensor, Tensor]:  # raw maximum and the rest, per image
        top = values.detach().amax((0, 2))
        return top, torch.logsumexp((values - top[:, None]) / temperature, (0, 2))

    (top, rest), (own_top, own_rest) = log_sum(z), log_sum(own)
    loss = (top - own_top) / temperature + (rest - own_rest)
    return torch.where(known, loss, math.nan)


# The same two as operators with explicit gradients, as the kernels compute them. (Softmax over
# proxies) x (softmax over samples) is one joint softmax over the N P logits of an image, so that
# two numbers per image are all the backward needs: the raw maximum and the log of the rest.


def log_ppk_forward(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    exact: bool,
    projection: bool,
    fast: bool = False,
    workspace: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_ppk less its constants; saved [2, B, P]: raw maximum over samples, log sum; common."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, exact, projection)
    top = z.amax(0)
    rest = torch.logsumexp((z - top) / T, 0)
    s = top / T + rest - math.log(len(samples))
    return s, torch.stack((top, rest)), proxies.common


def log_ppk_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    saved: Tensor,
    exact: bool,
    projection: bool,
    fast: bool = False,
    workspace: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in samples, loc, concentration and temperature from grad [B, P]."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, exact, projection)
    dl = grad * torch.exp((z - saved[0]) / T - saved[1])
    return (
        *_score_backward(dl / T, samples, loc, concentration, proxies, exact, projection),
        -((dl * z).sum(dtype=torch.float64) / T.double().square()).to(T.dtype),
    )


def proxy_nca_forward(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    exact: bool,
    projection: bool,
    fast: bool = False,
    workspace: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B]; [4, B] in float64: maximum and log sum over all, and over the own proxy."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, exact, projection)
    known = (labels >= 0) & (labels < len(loc))
    own = z.gather(2, torch.where(known, labels, 0).expand(len(z), -1)[..., None])
    parts = []
    for values in (z, own):
        top = values.amax((0, 2))
        rest = torch.logsumexp((values - top[:, None]) / T, (0, 2))
        parts += [top.double() + proxies.common, rest.double()]
    partial = torch.stack(parts)
    partial[2] = torch.where(known, partial[2], -math.inf)
    partial[3] = torch.where(known, partial[3], 0)
    return loss_of_partial(partial, T), partial, samples.new_empty(0)


def loss_of_partial(partial: Tensor, temperature: Tensor) -> Tensor:
    """-s_i,y_i + log sum_j exp s_ij; NaN for an image whose own proxy was not there."""
    top, rest, own_top, own_rest = partial
    loss = (top - own_top) / temperature.double() + (rest - own_rest)
    return torch.where(own_top > -math.inf, loss, math.nan).to(temperature.dtype)


def combine_partials(partials: list[Tensor], temperature: Tensor) -> Tensor:
    """`partial` of all proxies from those of contiguous ranges of them, in this order."""
    parts = torch.stack(partials)  # [ranges, 4, B]
    tops = parts[:, ::2].amax(0)  # [2, B]
    shift = torch.where(tops > -math.inf, tops, 0)
    logits = (parts[:, ::2] - shift) / temperature.double() + parts[:, 1::2]
    rests = torch.where(tops > -math.inf, torch.logsumexp(logits, 0), 0)
    return torch.stack((tops, rests), 1).flatten(0, 1)


def proxy_nca_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    partial: Tensor,
    saved: Tensor,
    exact: bool,
    projection: bool,
    fast: bool = False,
    workspace: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients as log_ppk_backward, from grad [B]; NaN where the image's own proxy is nowhere."""
    T, proxies, z = _scores(samples, loc, concentration, temperature, exact, projection)
    top, rest, own_top, own_rest = partial
    known = (labels >= 0) & (labels < len(loc))
    index = torch.where(known, labels, 0).expand(len(z), -1)[..., None]

    def softmax(values: Tensor, top: Tensor, rest: Tensor) -> Tensor:
        near = (top - proxies.common).to(z.dtype)[:, None]
        rest = rest + (top - proxies.common - near[:, 0]) / T.double()
        return torch.exp((values - near) / T - rest.to(z.dtype)[:, None])

    own = softmax(z.gather(2, index), own_top, own_rest)
    own = torch.where(known[:, None], own, 0)
    grad = torch.where(own_top > -math.inf, grad, math.nan)[:, None]
    dl = grad * softmax(z, top, rest).scatter_add(2, index, -own)
    centered = z - (top - proxies.common).to(z.dtype)[:, None]  # the rows of dl sum to zero
    return (
        *_score_backward(dl / T, samples, loc, concentration, proxies, exact, projection),
        -((dl * centered).sum(dtype=torch.float64) / T.double().square()).to(T.dtype),
    )


def _scores(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    exact: bool,
    projection: bool,
) -> tuple[Tensor, Proxies, Tensor]:
    """T, NaN unless positive; the prepared proxies; the raw scores [N, B, P]."""
    normalizer = "exact" if exact else "released"
    proxies = prepare_proxies(loc, concentration, normalizer, projection)
    T = torch.where(temperature > 0, temperature, math.nan)
    return T, proxies, score(samples, proxies, normalizer, projection)


def _score_backward(
    G: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    proxies: Proxies,
    exact: bool,
    projection: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in samples, loc and concentration from G = dL/dz [N, B, P], for unit samples."""
    D = samples.shape[-1]
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
    pull = special.vmf_mean_resultant_length(length, D) / length
    if not exact:
        pull = pull + 1 / length.square()
    scale = kappa / kbar if projection else torch.ones_like(kappa)
    d_loc = kappa * (scale * dM - da * pull * kappa * mu)
    d_concentration = (
        (2 if projection else 1) * mu * scale * dM
        + 2 * kappa / kbar.square() * dQ
        + da * (1 / kappa - pull * kappa * mu.square())
    )
    dtype = samples.dtype
    return d_samples.view_as(samples), d_loc.to(dtype), d_concentration.to(dtype)


def vmf_log_ppk(
    one_minus_cosine: Tensor, concentration1: Tensor, concentration2: Tensor, rho: float, dim: int
) -> Tensor:
    """log of the integral of v_1^rho v_2^rho for two vMFs (arguments broadcast), in float64.

    rho (log C(k1) + log C(k2)) - log C(rho |k1 mu1 + k2 mu2|).
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
