"""Samples of von Mises-Fisher distributions, x = w mu + sqrt(1 - w^2) u, w by rejection.

In: loc [B, D], concentration [B], a seed. Out: samples [n, B, D] and 1 - w [n, B].
`vmf_rsample` is the op of that name: one launch, which draws on the device without a host sync.
The order of every sum follows from D and the type alone: bitwise the same for any batch split.
Design: docs/design/sampler.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast.triton.random import normal_pair, normals, philox, uniform


@triton.jit
def log1p(t):
    """log(1 + t): the interpreter has no libdevice. The second term corrects 1 + t's rounding."""
    u = 1 + t
    return tl.log(u) + (t - (u - 1)) / u


@triton.jit
def _log1p_tail(t, FIRST: tl.constexpr):
    """log(1 + t) minus the terms of its series below t^FIRST, FIRST even."""
    LAST: tl.constexpr = FIRST + (8 if t.dtype == tl.float32 else 18)
    head, tail, power = 0.0, 0.0, -1.0
    for i in tl.static_range(FIRST - 1, 0, -1):
        head = (1 / i - head) * t
        power = power * -t
    for i in tl.static_range(LAST - 1, FIRST - 1, -1):
        tail = (1 / i - tail) * t
    return tl.where(tl.abs(t) < 0.125, -power * tail, log1p(t) - head)


@triton.jit
def envelope(k, m: tl.constexpr):
    """b and 1 - b; the cosine (1 - b) / (1 + b) is where k w + m/2 log(1 - w^2) is largest."""
    root = tl.sqrt(4 * k * k + m * m)
    total = tl.maximum(2 * k + root, 1e-30)  # 0 at k = m = 0
    return m / total, (2 * k + 2 * k * (2 * k / (root + m))) / total


@triton.jit
def _propose(g, chi2, word, b, one_minus_b, m: tl.constexpr):
    """1 - w, sqrt(1 - w^2), and whether w is accepted: the ratio is ((1-y) e^y)^m (Wood, 1994)."""
    chi, r = tl.sqrt(chi2), tl.sqrt(g * g + chi2)
    q = tl.where(g >= 0, r + g, chi) / tl.where(g >= 0, chi, r - g)  # exp(asinh(g / chi))
    odds = b * q * q
    inverse = 1 / (1 + odds)
    y = 0.5 * one_minus_b * (1 - q * q) * inverse
    accepted = tl.log(uniform(word, g.dtype)) <= m * _log1p_tail(-y, 2)
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
        word = philox(round_, sample, image, attempt, key0, key1)
        z = normal_pair(word[0], word[1], boost.dtype)[0]
        t = c * z
        log_u = tl.log(uniform(word[2], boost.dtype))
        log_ratio = 3 * d * _log1p_tail(tl.where(t > -1, t, 0.0), 4)
        accepted = (t > -1) & (log_u <= log_ratio)
        chi2 = tl.where(pending, 2 * d * (1 + t) * (1 + t) * (1 + t), chi2)
        pending = pending & (accepted == 0)
        round_ += 1
    chi2 = tl.maximum(chi2, 1e-30)
    return chi2 * boost * boost if m == 1 else chi2


@triton.jit
def _draw_radial(g, chi2, k, valid, sample, image, key0, key1, D: tl.constexpr):
    """1 - w and sqrt(1 - w^2); the first proposal is (g, chi2), further ones are drawn here."""
    m: tl.constexpr = D - 1
    b, one_minus_b = envelope(k, m)
    first = philox(0, sample, image, 1, key0, key1)
    one_minus_w, s, accepted = _propose(g, chi2, first[0], b, one_minus_b, m)
    pending = valid & (accepted == 0)
    attempt = 2
    while (tl.max(pending.to(tl.int32), 0) > 0) & (attempt <= 64):
        word = philox(0, sample, image, attempt, key0, key1)
        g = normal_pair(word[1], word[2], k.dtype)[0]
        boost = uniform(word[3], k.dtype)
        chi2 = _chi_square(pending, attempt, boost, sample, image, key0, key1, m)
        new_one_minus_w, new_s, accepted = _propose(g, chi2, word[0], b, one_minus_b, m)
        one_minus_w = tl.where(pending, new_one_minus_w, one_minus_w)
        s = tl.where(pending, new_s, s)
        pending = pending & (accepted == 0)
        attempt += 1
    return one_minus_w, s


@triton.jit
def check(length2, k):
    """Whether loc's squared length and k are valid; 1 / length and k, harmless if they are not."""
    largest = tl.full(k.shape, 1e18, k.dtype)  # a bare literal would be a float32
    valid = (length2 > 0) & (length2 < float("inf")) & (k >= 0) & (k <= largest)
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
        valid, scale, k = check(tl.sum(mu * mu, 1), k)
        mu *= scale[:, None]
        v = normals(0, sample, image, key0, key1, dtype, D, BLOCK_D)
        g = tl.sum(v * mu, 1)
        v -= g[:, None] * mu
        v -= tl.sum(v * mu, 1)[:, None] * mu  # again: at small D the rounding of the first matters
        chi2 = tl.maximum(tl.sum(v * v, 1), 1e-30)
    else:
        products = tl.zeros((ROWS, BLOCK_D), dtype)
        squares = tl.zeros((ROWS, BLOCK_D), dtype)
        lengths = tl.zeros((ROWS, BLOCK_D), dtype)
        for start in range(0, D, BLOCK_D):
            mu = tl.load(loc + start + d, mask=inside[:, None] & (start + d < D), other=0)
            v = normals(start, sample, image, key0, key1, dtype, D, BLOCK_D)
            products += v * mu
            squares += v * v
            lengths += mu * mu
        valid, scale, k = check(tl.sum(lengths, 1), k)
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
            v = normals(start, sample, image, key0, key1, dtype, D, BLOCK_D) - g[:, None] * mu
            tl.store(samples + start + d, along * mu + across * v, mask=mask)


def next_power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


LARGEST_BLOCK = {4: 4096, 8: 1024}  # elements, by the bytes of one


def row_shape(D: int, itemsize: int) -> tuple[int, int]:
    """Elements of a row in one block, and rows per warp, at most one to a thread."""
    block = min(max(4, next_power(D)), LARGEST_BLOCK[itemsize])
    return block, max(1, 32 * math.gcd(D, 16 // itemsize) // block)


def _forward_shape(D: int, itemsize: int) -> dict[str, int]:
    block, rows = row_shape(D, itemsize)
    warps = max(1, block * itemsize // 2048)
    return {"D": D, "ROWS": rows, "BLOCK_D": block, "num_warps": warps}


def aligned(tensor: Tensor) -> Tensor:
    """Align to 16 bytes, on which the compiler's layout, and so the order of sums, depends."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def vmf_rsample(
    loc: Tensor, concentration: Tensor, n: int, seed: Tensor, image_offset: int
) -> tuple[Tensor, Tensor]:
    """The op `vmf_rsample`: samples and 1 - w."""
    B, D = loc.shape
    samples, one_minus_w = loc.new_empty(n, B, D), loc.new_empty(n, B)
    if n * B > 0:
        shape = _forward_shape(D, loc.element_size())
        with torch.cuda.device_of(loc):
            _rsample_kernel[(triton.cdiv(n * B, shape["ROWS"]),)](
                aligned(loc),
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
