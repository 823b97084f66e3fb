"""Gradients of the sampler: loc by the rotation that carries it, concentration by dw/dk.

In: G = dL/dsamples and samples [n, B, D], 1 - w [n, B], loc, concentration. Out: [B, D] and [B].
`vmf_rsample_backward` is the op of that name: one launch, which reads G and the samples once.
The order of every sum follows from D, n and the type alone: bitwise the same for any batch split.
Derivations: docs/math.md, "Gradients of the sampler". Design: docs/design/sampler.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast import special
from nivmf_fast.triton.random import cos_sin
from nivmf_fast.triton.vmf_sampler import (
    LARGEST_BLOCK,
    aligned,
    check,
    envelope,
    log1p,
    next_power,
    row_shape,
)

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
    (sign -1: w' = 1, +1: -1), as far as a quadratic model of log f, seldom too steep, falls by
    CUTOFF. The 16 Gauss-Legendre nodes of a panel lie along a dimension of their own."""
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
        cos, sin = cos_sin(half_turns * (node + panel))  # of half the angle
        versine, sin = 2 * sin * sin, 2 * sin * cos
        change = -w * versine - across * sin
        log_ratio = log1p(tl.maximum(cot * sin - versine, -1 + 1e-7))
        density = weight * tl.exp(k * change + (D - 2) * log_ratio)
        mass += density
        moment += density * change
    length = length / PANELS
    return length * tl.sum(mass, 2), length * tl.sum(moment, 2)


@triton.jit
def _quadrature(one_minus_w, k, D: tl.constexpr):
    """phi = -(dF/dk) / f / (1 - w^2) from the nearer tail of F, where dF/dk is the integral of
    (w' - A) f. A, the mean of w', is integrated too, from the mode in both directions."""
    b = envelope(k, D - 2)[0]
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
    b, one_minus_b = envelope(k, m)
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

    The last is 1 - w up to the rounding of x, which thus drops out of the radial part of G.
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
        valid, scale, k = check(tl.sum(mu * mu, 2), k)
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
        valid, scale, k = check(tl.sum(squares, 2), k)
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


def _backward_shape(n: int, D: int, itemsize: int) -> dict[str, int]:
    block, rows = row_shape(D, itemsize)
    if itemsize == 8 and D < 512:  # quadrature in float64
        rows = min(rows, 2)
        samples = min(next_power(n), rows)
    else:
        samples = min(next_power(n), 16, LARGEST_BLOCK[itemsize] // block)
    images = rows // samples or 1
    work = images * samples * (block if D >= 16 else 32)  # 16 nodes of quadrature count as 32
    warps = max(1, work * itemsize // 2048)
    return {"D": D, "IMAGES": images, "SAMPLES": samples, "BLOCK_D": block, "num_warps": warps}


def vmf_rsample_backward(
    grad: Tensor, samples: Tensor, one_minus_w: Tensor, loc: Tensor, concentration: Tensor
) -> tuple[Tensor, Tensor]:
    """The op `vmf_rsample_backward`: gradients in loc and concentration."""
    n, B, D = samples.shape
    grad_loc, grad_concentration = torch.empty_like(loc), torch.empty_like(concentration)
    if B > 0:
        shape = _backward_shape(n, D, loc.element_size())
        scratch = torch.empty_like(one_minus_w) if shape["BLOCK_D"] < D else one_minus_w
        with torch.cuda.device_of(loc):
            _backward_kernel[(triton.cdiv(B, shape["IMAGES"]),)](
                aligned(grad),
                aligned(samples),
                one_minus_w,
                aligned(loc),
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
