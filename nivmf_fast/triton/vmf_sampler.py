"""The vMF sampler and its gradient: one launch each, rejection on the device, no host sync.

Forward. The work is arithmetic: 10 Philox rounds, two logarithms, roots and sine-cosine pairs for
every four normals, against 4 bytes written a normal, and the writes hide behind it. So the normals
of a row (one sample of one image) are made once and stay in registers, four neighbours a thread as
Philox yields them, which is also the 16-byte store. Up to 16 elements a thread keep a row within
one warp as far as D = 512 (float64: 256): its sums are shuffles, and the rejection loop, uniform
over the row, waits for no other warp; at 64 registers, 32 of these one-warp blocks fill a
multiprocessor. Below D = 128 a warp takes several rows, a thread at most one of them. A row beyond
one block is walked twice and its normals made again, cheaper than a trip to memory.

Backward. The work is reading G and x once: the samples of an image are loaded as one block, so that
one memory latency is paid for up to 16 of them. What depends on the row alone (dw/dk) is small: a
polynomial, or in low dimension a quadrature with its 16 nodes side by side in the lanes.

The order of every sum follows from D, n and the type alone: bitwise the same for any batch split.
"""

# The types of what a kernel takes are known to the Triton compiler alone.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast import special

# --- the random stream


@triton.jit
def _philox(block, sample, image, part, key0, key1):
    """Words of a counter; block and part may be narrower than sample and image, or ints."""
    zero = sample ^ sample
    return tl.philox_impl(zero + block, sample, image, zero + part, key0, key1)


@triton.jit
def _uniform(word, dtype: tl.constexpr):
    return word.to(dtype) * 2.0**-32 + 2.0**-33  # exact product: the same with and without FMA


# Taylor coefficients of cos and sin of a quarter turn times f, in f^2
_COS = tl.constexpr(
    tuple((-1) ** i * (math.pi / 2) ** (2 * i) / math.factorial(2 * i) for i in range(9))
)
_SIN = tl.constexpr(
    tuple((-1) ** i * (math.pi / 2) ** (2 * i + 1) / math.factorial(2 * i + 1) for i in range(9))
)


@triton.jit
def _cos_sin(turns):
    """Of 2 pi turns. tl.sin reduces any argument, by a slow path through local memory."""
    TERMS: tl.constexpr = 5 if turns.dtype == tl.float32 else 9
    nearest = tl.floor(4 * turns + 0.5)
    f = 4 * turns - nearest
    f2 = f * f
    cos, sin = tl.zeros_like(f) + _COS[TERMS - 1], tl.zeros_like(f) + _SIN[TERMS - 1]
    for i in tl.static_range(TERMS - 2, -1, -1):
        cos = cos * f2 + _COS[i]
        sin = sin * f2 + _SIN[i]
    sin *= f
    quadrant = nearest.to(tl.int32)
    odd = (quadrant & 1) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    return first, tl.where((quadrant & 2) != 0, -second, second)


@triton.jit
def _normal_pair(word0, word1, dtype: tl.constexpr):
    r = tl.sqrt(-2 * tl.log(_uniform(word0, dtype)))
    cos, sin = _cos_sin(_uniform(word1, dtype))
    return r * cos, r * sin


@triton.jit
def _normals(
    start, sample, image, key0, key1, dtype: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Normals start .. start + BLOCK_D - 1 of each row, zero from D on."""
    block = (start // 4 + tl.arange(0, BLOCK_D // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = _philox(block, sample[:, None], image[:, None], 0, key0, key1)
    n0, n1 = _normal_pair(w0, w1, dtype)
    n2, n3 = _normal_pair(w2, w3, dtype)
    four = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    normals = tl.reshape(four, (sample.shape[0], BLOCK_D))
    return tl.where((start + tl.arange(0, BLOCK_D))[None, :] < D, normals, 0.0)


# --- the radial law: w = loc . x by rejection, in cancellation-free form


@triton.jit
def _log1p(t):
    """The interpreter has no libdevice; the second term is what rounding 1 + t lost."""
    u = 1 + t
    return tl.log(u) + (t - (u - 1)) / u


@triton.jit
def _log1p_tail(t, FIRST: tl.constexpr):
    """log(1 + t) less the terms of its series below t^FIRST, FIRST even."""
    LAST: tl.constexpr = FIRST + (8 if t.dtype == tl.float32 else 18)
    head, tail, power = 0.0, 0.0, -1.0
    for i in tl.static_range(FIRST - 1, 0, -1):
        head = (1 / i - head) * t
        power = power * -t
    for i in tl.static_range(LAST - 1, FIRST - 1, -1):
        tail = (1 / i - tail) * t
    return tl.where(tl.abs(t) < 0.125, -power * tail, _log1p(t) - head)


@triton.jit
def _envelope(k, m: tl.constexpr):
    """b and 1 - b; the cosine (1 - b) / (1 + b) is where k w + m/2 log(1 - w^2) is largest."""
    root = tl.sqrt(4 * k * k + m * m)
    total = tl.maximum(2 * k + root, 1e-30)  # 0 at k = m = 0
    return m / total, (2 * k + 2 * k * (2 * k / (root + m))) / total


@triton.jit
def _propose(g, chi2, word, b, one_minus_b, m: tl.constexpr):
    """1 - w, sqrt(1 - w^2) and whether it is accepted (Wood, 1994; the ratio is ((1-y) e^y)^m)."""
    chi, r = tl.sqrt(chi2), tl.sqrt(g * g + chi2)
    q = tl.where(g >= 0, r + g, chi) / tl.where(g >= 0, chi, r - g)  # exp(asinh(g / chi))
    odds = b * q * q
    inverse = 1 / (1 + odds)
    y = 0.5 * one_minus_b * (1 - q * q) * inverse
    accepted = tl.log(_uniform(word, g.dtype)) <= m * _log1p_tail(-y, 2)
    return 2 * odds * inverse, 2 * tl.sqrt(b) * q * inverse, accepted


@triton.jit
def _chi_square(pending, attempt, boost, sample, image, key0, key1, m: tl.constexpr):
    """chi^2 with m degrees of freedom where pending (Marsaglia & Tsang, 2000).

    With v = (1 + t)^3 their test log u <= z^2/2 + d - d v + d log v is
    log u <= 3 d (log(1 + t) - t + t^2/2 - t^3/3): written so, nothing cancels at large m.
    """
    alpha: tl.constexpr = m / 2 if m > 1 else 1.5
    d: tl.constexpr = alpha - 1 / 3
    c: tl.constexpr = 1 / (9 * d) ** 0.5
    chi2 = tl.zeros_like(boost)
    round_ = 1
    while (tl.max(pending.to(tl.int32), 0) > 0) & (round_ <= 64):
        word = _philox(round_, sample, image, attempt, key0, key1)
        z = _normal_pair(word[0], word[1], boost.dtype)[0]
        t = c * z
        log_u = tl.log(_uniform(word[2], boost.dtype))
        log_ratio = 3 * d * _log1p_tail(tl.where(t > -1, t, 0.0), 4)
        accepted = (t > -1) & (log_u <= log_ratio)
        chi2 = tl.where(pending, 2 * d * (1 + t) * (1 + t) * (1 + t), chi2)
        pending = pending & (accepted == 0)
        round_ += 1
    chi2 = tl.maximum(chi2, 1e-30)
    return chi2 * boost * boost if m == 1 else chi2


@triton.jit
def _draw_radial(g, chi2, k, valid, sample, image, key0, key1, D: tl.constexpr):
    """1 - w and sqrt(1 - w^2); the first proposal is (g, chi2), later ones are drawn afresh."""
    m: tl.constexpr = D - 1
    b, one_minus_b = _envelope(k, m)
    first = _philox(0, sample, image, 1, key0, key1)
    one_minus_w, s, accepted = _propose(g, chi2, first[0], b, one_minus_b, m)
    pending = valid & (accepted == 0)
    attempt = 2
    while (tl.max(pending.to(tl.int32), 0) > 0) & (attempt <= 64):
        word = _philox(0, sample, image, attempt, key0, key1)
        g = _normal_pair(word[1], word[2], k.dtype)[0]
        boost = _uniform(word[3], k.dtype)
        chi2 = _chi_square(pending, attempt, boost, sample, image, key0, key1, m)
        new_one_minus_w, new_s, accepted = _propose(g, chi2, word[0], b, one_minus_b, m)
        one_minus_w = tl.where(pending, new_one_minus_w, one_minus_w)
        s = tl.where(pending, new_s, s)
        pending = pending & (accepted == 0)
        attempt += 1
    return one_minus_w, s


@triton.jit
def _check(length2, k):
    """Whether a loc of that squared length and k make a distribution; 1 / length and k, tame."""
    valid = (length2 > 0) & (length2 < float("inf")) & (k >= 0) & (k <= 1e18)
    return valid, 1 / tl.sqrt(tl.where(valid, length2, 1)), tl.where(valid, k, 0)


@triton.jit(
    do_not_specialize=["n", "B", "image_offset"],
    do_not_specialize_on_alignment=["concentration", "seed"],
)
def _rsample_kernel(
    loc,
    concentration,
    seed,
    samples,
    one_minus_w,
    n,
    B,
    image_offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = loc.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n.to(tl.int64) * B
    sample, image = row // B, row % B
    k = tl.load(concentration + image, mask=inside, other=-1)
    key = tl.load(seed)
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    loc += image[:, None] * D
    samples += row[:, None] * D
    sample, image = sample.to(tl.uint32), (image + image_offset).to(tl.uint32)
    d = tl.arange(0, BLOCK_D)[None, :]

    if D <= BLOCK_D:
        mask = inside[:, None] & (d < D)
        mu = tl.load(loc + d, mask=mask, other=0)
        valid, scale, k = _check(tl.sum(mu * mu, 1), k)
        mu *= scale[:, None]
        v = _normals(0, sample, image, key0, key1, dtype, D, BLOCK_D)
        g = tl.sum(v * mu, 1)
        v -= g[:, None] * mu
        v -= tl.sum(v * mu, 1)[:, None] * mu  # the rounding of the first, seen at small D
        chi2 = tl.maximum(tl.sum(v * v, 1), 1e-30)
    else:
        products = tl.zeros((ROWS, BLOCK_D), dtype)
        squares = tl.zeros((ROWS, BLOCK_D), dtype)
        lengths = tl.zeros((ROWS, BLOCK_D), dtype)
        for start in range(0, D, BLOCK_D):
            mu = tl.load(loc + start + d, mask=inside[:, None] & (start + d < D), other=0)
            v = _normals(start, sample, image, key0, key1, dtype, D, BLOCK_D)
            products += v * mu
            squares += v * v
            lengths += mu * mu
        valid, scale, k = _check(tl.sum(lengths, 1), k)
        g = tl.sum(products, 1) * scale
        chi2 = tl.sum(squares, 1) - g * g  # thousands less a few: nothing cancels here

    p, s = _draw_radial(g, chi2, k, valid, sample, image, key0, key1, D)
    p = tl.where(valid, p, float("nan"))
    tl.store(one_minus_w + row, p, mask=inside)
    along, across = (1 - p)[:, None], (s / tl.sqrt(chi2))[:, None]
    if D <= BLOCK_D:
        tl.store(samples + d, along * mu + across * v, mask=mask)
    else:
        for start in range(0, D, BLOCK_D):
            mask = inside[:, None] & (start + d < D)
            mu = tl.load(loc + start + d, mask=mask, other=0) * scale[:, None]
            v = _normals(start, sample, image, key0, key1, dtype, D, BLOCK_D) - g[:, None] * mu
            tl.store(samples + start + d, along * mu + across * v, mask=mask)


# --- the gradient of w in the concentration: phi = (dw/dk) / (1 - w^2) at a fixed quantile of w


_RULE = special.gauss_legendre(16)
_NODES, _WEIGHTS = tl.constexpr(_RULE[0]), tl.constexpr(_RULE[1])


@triton.jit
def _angle(sin, cos):
    """atan2(sin, cos), sin >= 0: the tangent of a 16th of the angle, then Taylor's series."""
    TERMS: tl.constexpr = 6 if sin.dtype == tl.float32 else 12
    tan = tl.where(cos >= 0, sin, 1 - cos) / tl.where(cos >= 0, 1 + cos, sin)
    for _ in tl.static_range(3):
        tan = tan / (1 + tl.sqrt(1 + tan * tan))
    series = tl.zeros_like(tan)
    for i in tl.static_range(TERMS - 1, -1, -1):
        series = 1 / (2 * i + 1) - tan * tan * series
    return 16 * tan * series


@triton.jit
def _tail(one_minus_w, k, sign, D: tl.constexpr):
    """Integrals of f(w') / f(w) and of (w' - w) f(w') / f(w) over the angles from w towards a pole
    (sign -1: w' = 1, +1: -1), as far as a quadratic of log f, seldom too steep, falls by CUTOFF.
    16 Gauss-Legendre nodes a panel, side by side in a dimension of their own."""
    dtype: tl.constexpr = one_minus_w.dtype
    PANELS: tl.constexpr = 1 if dtype == tl.float32 else 4
    CUTOFF: tl.constexpr = 24.0 if dtype == tl.float32 else 72.0
    w = 1 - one_minus_w
    s2 = tl.maximum(one_minus_w * (2 - one_minus_w), 1e-30)
    s = tl.sqrt(s2)
    slope = sign * (k * s - (D - 2) * w / s)
    curvature = tl.maximum(k * w + (D - 2), 0.05)
    root = tl.sqrt(slope * slope + 2 * curvature * CUTOFF)
    above = tl.where(slope >= 0, 2 * CUTOFF, root - slope)
    length = above / tl.where(slope >= 0, slope + root, curvature)
    chord = tl.minimum(length / 2, 1)  # k (1 - cos a) = 2 k sin^2(a / 2): no parabola far out
    length = tl.minimum(2 * _angle(chord, tl.sqrt(1 - chord * chord)), _angle(s, -sign * w))

    index = tl.arange(0, 16)
    node, weight = tl.zeros((16,), dtype), tl.zeros((16,), dtype)
    for i in tl.static_range(16):
        node = tl.where(index == i, tl.full((16,), _NODES[i], dtype), node)
        weight = tl.where(index == i, tl.full((16,), _WEIGHTS[i], dtype), weight)
    node, weight = node[None, None, :], weight[None, None, :]
    half_turns = (length * (0.25 / 3.141592653589793 / PANELS))[:, :, None]
    across, cot = (sign * s)[:, :, None], (sign * w / s)[:, :, None]
    w, k = w[:, :, None], k[:, :, None]
    mass, moment = tl.zeros_like(half_turns + node), tl.zeros_like(half_turns + node)
    for panel in range(PANELS):
        cos, sin = _cos_sin(half_turns * (node + panel))  # of half the angle
        versine, sin = 2 * sin * sin, 2 * sin * cos
        change = -w * versine - across * sin
        log_ratio = _log1p(tl.maximum(cot * sin - versine, -1 + 1e-7))
        density = weight * tl.exp(k * change + (D - 2) * log_ratio)
        mass += density
        moment += density * change
    length = length / PANELS
    return length * tl.sum(mass, 2), length * tl.sum(moment, 2)


@triton.jit
def _quadrature(one_minus_w, k, D: tl.constexpr):
    """phi from the nearer tail of F: -(dF/dk) / f / (1 - w^2). There dF/dk is the tail of
    (w' - A) f; A, the mean of w', is integrated likewise, from the mode both ways."""
    b = _envelope(k, D - 2)[0]
    mode = 2 * b / (1 + b)  # 1 - w there
    both = 2 * tl.arange(0, 2)[None, :] - 1
    mass, moment = _tail(mode, k, both.to(k.dtype), D)
    mean = tl.sum(moment, 1, keep_dims=True) / tl.sum(mass, 1, keep_dims=True)
    gap = mode - mean - one_minus_w  # w - A
    mass, moment = _tail(one_minus_w, k, tl.where(gap >= 0, -1.0, 1.0).to(k.dtype), D)
    s2 = tl.maximum(one_minus_w * (2 - one_minus_w), 1e-30)
    return tl.abs(gap * mass + moment) / tl.sqrt(s2)


@triton.jit
def _series(one_minus_w, k, D: tl.constexpr):
    """phi by its expansion in 1 / (D - 1) to order 3: relative error 2e-5 at D = 16, 4e-12 at 512.

    Each order is a polynomial in i = 1 / (1 + x0 w), the first rho i, and yields the next:
    sum c_j i^j becomes rho i0 sum_a i^(a+2) sum_j j c_j e_(j-a).
    """
    m: tl.constexpr = D - 1
    b, one_minus_b = _envelope(k, m)
    inverse = 1 / (1 + b)
    x0 = one_minus_b * inverse
    beta = 4 * b * inverse * inverse
    i0 = 1 / (1 + x0 * x0)
    rho = beta / m
    step = rho * i0
    e0, e1, e2 = -beta, 2 - beta * i0, i0 * i0 * beta * x0 * x0
    e3, e4, e5 = e2 * i0, e2 * i0 * i0, e2 * i0 * i0 * i0

    p2, p3 = 2 * step * rho * e1, 3 * step * rho * e0  # j c_j of order 1
    q2 = 2 * step * (p2 * e2 + p3 * e3)  # of order 2
    q3 = 3 * step * (p2 * e1 + p3 * e2)
    q4 = 4 * step * (p2 * e0 + p3 * e1)
    q5 = 5 * step * p3 * e0
    c2 = p2 / 2 + q2 / 2 + step * (q2 * e2 + q3 * e3 + q4 * e4 + q5 * e5)
    c3 = p3 / 3 + q3 / 3 + step * (q2 * e1 + q3 * e2 + q4 * e3 + q5 * e4)
    c4 = q4 / 4 + step * (q2 * e0 + q3 * e1 + q4 * e2 + q5 * e3)
    c5 = q5 / 5 + step * (q3 * e0 + q4 * e1 + q5 * e2)
    c6 = step * (q4 * e0 + q5 * e1)
    c7 = step * q5 * e0
    i = 1 / (2 * b * inverse + x0 * (2 - one_minus_w))
    return i * (rho + i * (c2 + i * (c3 + i * (c4 + i * (c5 + i * (c6 + i * c7))))))


@triton.jit
def _into_concentration(one_minus_w, k, along, apart, radial, D: tl.constexpr):
    """dw/dk (G.mu - w/s G.u), s u = x - w mu, from G.mu, G.(mu - x) and mu.(mu - x).

    The last is 1 - w but for the rounding of x, which then drops out of the radial part of G.
    """
    EXPAND: tl.constexpr = D >= 16 if k.dtype == tl.float32 else D >= 512
    phi = _series(one_minus_w, k, D) if EXPAND else _quadrature(one_minus_w, k, D)
    s2 = one_minus_w * (2 - one_minus_w)
    return phi * (s2 * along + (1 - one_minus_w) * (apart - along * radial))


@triton.jit
def _load_rows(one_minus_w, first, image, inside, n, B, SAMPLES: tl.constexpr):
    sample = (first + tl.arange(0, SAMPLES))[None, :]
    row = sample.to(tl.int64) * B + image
    mask = inside & (sample < n)
    return row, mask, tl.load(one_minus_w + row, mask=mask, other=1)


@triton.jit
def _load_block(grad, samples, row, mask, d, D: tl.constexpr):
    at, mask = (row * D)[:, :, None] + d, mask[:, :, None] & (d < D)
    return tl.load(grad + at, mask=mask, other=0), tl.load(samples + at, mask=mask, other=0)


@triton.jit
def _products(G, x, mu):
    return tl.sum(G * mu, 2), tl.sum(G * (mu - x), 2), tl.sum(mu * (mu - x), 2)


@triton.jit
def _step(G, x, one_minus_w, along):
    terms = (1 - one_minus_w)[:, :, None] * G - along[:, :, None] * x
    return tl.sum(terms, 1, keep_dims=True)


@triton.jit(
    do_not_specialize=["n", "B"],
    do_not_specialize_on_alignment=["one_minus_w", "concentration"],
)
def _backward_kernel(
    grad,
    samples,
    one_minus_w,
    loc,
    concentration,
    scratch,  # [n, B], used only if D > BLOCK_D
    grad_loc,
    grad_concentration,
    n,
    B,
    D: tl.constexpr,
    IMAGES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks are [image, sample, dimension]. With mu the unit loc and t = sum w G - (G.mu) x, loc
    gets (t - mu (mu.t)) / |loc|. (`while`, because triton 3.6 cannot interpret range(0, n, ..).)
    """
    dtype: tl.constexpr = loc.dtype.element_ty
    image = (tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES))[:, None]
    inside = image < B
    image_mask = inside[:, :, None]
    k = tl.load(concentration + image, mask=inside, other=-1)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    loc += (image * D)[:, :, None]
    grad_loc += (image * D)[:, :, None]
    grad_k = tl.zeros((IMAGES, 1), dtype)
    first = 0

    if D <= BLOCK_D:
        mu = tl.load(loc + d, mask=image_mask & (d < D), other=0)
        valid, scale, k = _check(tl.sum(mu * mu, 2), k)
        mu *= scale[:, :, None]
        step = tl.zeros((IMAGES, 1, BLOCK_D), dtype)
        while first < n:
            row, mask, p = _load_rows(one_minus_w, first, image, inside, n, B, SAMPLES)
            G, x = _load_block(grad, samples, row, mask, d, D)
            along, apart, radial = _products(G, x, mu)
            step += _step(G, x, p, along)
            grad_k += tl.sum(_into_concentration(p, k, along, apart, radial, D), 1, keep_dims=True)
            first += SAMPLES
        step -= tl.sum(step * mu, 2, keep_dims=True) * mu
        step = tl.where(valid[:, :, None], step * scale[:, :, None], float("nan"))
        tl.store(grad_loc + d, step, mask=image_mask & (d < D))
    else:
        squares = tl.zeros((IMAGES, 1, BLOCK_D), dtype)
        for start in range(0, D, BLOCK_D):
            mu = tl.load(loc + start + d, mask=image_mask & (start + d < D), other=0)
            squares += mu * mu
        valid, scale, k = _check(tl.sum(squares, 2), k)
        normal = tl.zeros((IMAGES, 1), dtype)  # mu . t
        while first < n:
            row, mask, p = _load_rows(one_minus_w, first, image, inside, n, B, SAMPLES)
            along, apart, radial = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
            for start in range(0, D, BLOCK_D):
                mu = tl.load(loc + start + d, mask=image_mask & (start + d < D), other=0)
                G, x = _load_block(grad, samples, row, mask, start + d, D)
                sums = _products(G, x, mu * scale[:, :, None])
                along += sums[0]
                apart += sums[1]
                radial += sums[2]
            tl.store(scratch + row, along, mask=mask)
            normal += tl.sum(along * (radial - p), 1, keep_dims=True)
            grad_k += tl.sum(_into_concentration(p, k, along, apart, radial, D), 1, keep_dims=True)
            first += SAMPLES
        tl.debug_barrier()  # every thread sees the scratch
        for start in range(0, D, BLOCK_D):
            mu = tl.load(loc + start + d, mask=image_mask & (start + d < D), other=0)
            step = -normal[:, :, None] * mu * scale[:, :, None]
            first = 0
            while first < n:
                row, mask, p = _load_rows(one_minus_w, first, image, inside, n, B, SAMPLES)
                G, x = _load_block(grad, samples, row, mask, start + d, D)
                step += _step(G, x, p, tl.load(scratch + row, mask=mask, other=0))
                first += SAMPLES
            step = tl.where(valid[:, :, None], step * scale[:, :, None], float("nan"))
            tl.store(grad_loc + start + d, step, mask=image_mask & (start + d < D))

    grad_k = tl.where(valid, grad_k, float("nan"))
    tl.store(grad_concentration + image, grad_k, mask=inside)


# --- launchers: the shapes of blocks below keep registers from spilling, which a test watches


def _next_power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


_LARGEST_BLOCK = {4: 4096, 8: 1024}  # elements, by the bytes of one


def _row(D: int, itemsize: int) -> tuple[int, int]:
    """Elements of a row in one block, and rows that a warp takes with one a thread at most."""
    block = min(max(4, _next_power(D)), _LARGEST_BLOCK[itemsize])
    return block, max(1, 32 * math.gcd(D, 16 // itemsize) // block)


def _forward_shape(D: int, itemsize: int) -> dict[str, int]:
    block, rows = _row(D, itemsize)
    warps = max(1, block * itemsize // 2048)
    return {"D": D, "ROWS": rows, "BLOCK_D": block, "num_warps": warps}


def _backward_shape(n: int, D: int, itemsize: int) -> dict[str, int]:
    block, rows = _row(D, itemsize)
    if itemsize == 8 and D < 512:  # quadrature in float64
        rows = min(rows, 2)
        samples = min(_next_power(n), rows)
    else:
        samples = min(_next_power(n), 16, _LARGEST_BLOCK[itemsize] // block)
    images = rows // samples or 1
    work = images * samples * (block if D >= 16 else 32)  # 16 nodes of quadrature count as 32
    warps = max(1, work * itemsize // 2048)
    return {"D": D, "IMAGES": images, "SAMPLES": samples, "BLOCK_D": block, "num_warps": warps}


def _aligned(tensor: Tensor) -> Tensor:
    """The compiler's layout, and with it the order of sums, depends on 16-byte alignment."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def vmf_rsample(
    loc: Tensor, concentration: Tensor, n: int, seed: Tensor, image_offset: int
) -> tuple[Tensor, Tensor]:
    B, D = loc.shape
    samples, one_minus_w = loc.new_empty(n, B, D), loc.new_empty(n, B)
    if n * B > 0:
        shape = _forward_shape(D, loc.element_size())
        with torch.cuda.device_of(loc):
            _rsample_kernel[(triton.cdiv(n * B, shape["ROWS"]),)](
                _aligned(loc),
                concentration,
                seed,
                samples,
                one_minus_w,
                n,
                B,
                image_offset,
                **shape,
                enable_fp_fusion=True,
            )
    return samples, one_minus_w


def vmf_rsample_backward(
    grad: Tensor, samples: Tensor, one_minus_w: Tensor, loc: Tensor, concentration: Tensor
) -> tuple[Tensor, Tensor]:
    n, B, D = samples.shape
    grad_loc, grad_concentration = torch.empty_like(loc), torch.empty_like(concentration)
    if B > 0:
        shape = _backward_shape(n, D, loc.element_size())
        scratch = torch.empty_like(one_minus_w) if shape["BLOCK_D"] < D else one_minus_w
        with torch.cuda.device_of(loc):
            _backward_kernel[(triton.cdiv(B, shape["IMAGES"]),)](
                _aligned(grad),
                _aligned(samples),
                one_minus_w,
                _aligned(loc),
                concentration,
                scratch,
                grad_loc,
                grad_concentration,
                n,
                B,
                **shape,
                enable_fp_fusion=True,
            )
    return grad_loc, grad_concentration
