"""Log-PPK of every image-proxy pair and its proxy-NCA loss as Triton kernels (specification:
`reference.py`; op contract: `functional.py`). R = N B rows; row s B + i is sample s of image i.

What limits them. A score is two products of length D (x . linear and x^2 . spread) and a short
epilogue: from P = 10,000 the tensor cores are the limit, by 10 to 30 times over memory; at P = 100
the launches. So scores live in registers, nothing of size R P is ever stored, and an image keeps
two numbers, its log-sum-exps over everything and over its own proxy (one joint softmax).

Why this shape.
- float32 is split into bfloat16 planes (two: bf16x3, or three: bf16x6, float32-equivalent) once
  per chunk of proxies, in a workspace that stays in the L2 cache. All products are then plain
  bfloat16 ones on padded arrays, without masks, which Triton pipelines through shared memory.
  Splitting inside the products (tf32x3) would be redone by every warp, and spills on sm_80.
- Each step of a product sums from zero and is then added in float32: tensor cores truncate.
- Forward: row blocks x runs of proxy tiles, online log-sum-exp with the maximum in raw units (the
  maximum of z / T is too large for its own rounding), then one ordered combination.
- The scores of the own proxies come from a float64 kernel of R dot products and stand in for the
  tile's values in both terms, so that the loss of a solved image is not a difference of roundings.
- Backward, per chunk: one kernel recomputes the scores and leaves the two weights of each pair in
  the workspace; two products turn them into the gradients, with the chain rule to the parameters
  in the epilogue. 12 R P D flops at every D. Fusing the recomputation into the products would
  need 16, and spills.
- Tiles whose softmax weights all lie below 2^-24 / (N P) are dead: their sum cannot reach 2^-24.
  The forward's maxima (one per row and tile) tell, before anything is recomputed. Live tiles are
  listed in order, so that the products loop over a list, without branches.
- Every sum has a fixed order: no atomics. Offsets into large arrays are 64 bits wide.
"""
# The kernels are Triton's language, not Python's types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast import special

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# log1p(m) = m + m^2 p(m) on [-1/3, 1/3], minimax in the relative error
_LOG1P = tl.constexpr(
    (
        -0.12948963046073914,
        0.14004763960838318,
        -0.12167154252529144,
        0.14001159369945526,
        -0.16682305932044983,
        0.20010747015476227,
        -0.24999716877937317,
        0.3333320915699005,
        -0.5,
    )
)


# --- device functions


@triton.jit
def _log1p(d):
    """To 1.6e-7 in float32 (tl.log is lg2.approx there, of no use before a factor of D / 2T)."""
    u = 1 + d
    if d.dtype == tl.float64:
        value = tl.log(u) + (d - (u - 1)) / u
    else:
        exponent = (u.to(tl.int32, bitcast=True) - 0x3F2AAAAB) >> 23  # u / 2^e in [2/3, 4/3)
        shrink = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        m = tl.fma(d, shrink, shrink - 1)  # exact where it matters: d itself if e = 0
        p = tl.full(d.shape, _LOG1P[0], tl.float32)
        for i in tl.static_range(1, 9):
            p = tl.fma(p, m, _LOG1P[i])
        value = tl.fma(exponent.to(tl.float32), _LN2, tl.fma(m * m, p, m))
    return tl.where(u > 0, value, float("nan"))


@triton.jit
def _inverse_root(u):
    y = tl.rsqrt(u)
    return y * (1.5 - 0.5 * u * y * y)  # rsqrt.approx is not good enough at small T


@triton.jit
def _temperature(pointer):
    t = tl.load(pointer).to(tl.float64)
    return tl.where(t > 0, t, float("nan"))


@triton.jit
def _scales(kbar, proxies, mask, DTYPE: tl.constexpr):
    """The geometric mean of each proxy's concentrations as hi + lo, and its inverse."""
    scale = tl.load(kbar + proxies, mask=mask, other=1.0)
    hi = scale.to(DTYPE)
    return hi, (scale - hi.to(tl.float64)).to(DTYPE), (1 / scale).to(DTYPE)


@triton.jit
def _coefficients(mu, kappa, hi, lo, inverse, PROJECTION: tl.constexpr):
    """linear, spread = (kappa / kbar)^2 - 1 without cancellation, and kappa / kbar - 1."""
    excess = ((kappa - hi) - lo) * inverse
    linear = kappa * mu
    if PROJECTION:
        linear += linear * excess
    return linear, excess * (2 + excess), excess


@triton.jit
def _store_planes(value, out, at, plane, PLANES: tl.constexpr):
    """value as a sum of PLANES bfloat16 numbers, the largest first; as itself if PLANES is 1."""
    for p in tl.static_range(PLANES):
        part = value
        if PLANES > 1:  # in bits, because a cast truncates in the interpreter
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            part = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
        tl.store(out + p * plane + at, part.to(out.dtype.element_ty))
        value -= part


@triton.jit
def _add_product(total, a, a_plane, b, b_plane, PLANES: tl.constexpr):
    """total + a @ b, over the planes of both whose product matters, the smallest first."""
    a0, b0 = tl.load(a), tl.load(b)
    step = tl.zeros(total.shape, total.dtype)
    if PLANES > 1:
        a1, b1 = tl.load(a + a_plane), tl.load(b + b_plane)
        if PLANES > 2:
            a2, b2 = tl.load(a + 2 * a_plane), tl.load(b + 2 * b_plane)
            step = tl.dot(a2, b0, step, input_precision="ieee", out_dtype=total.dtype)
            step = tl.dot(a0, b2, step, input_precision="ieee", out_dtype=total.dtype)
            step = tl.dot(a1, b1, step, input_precision="ieee", out_dtype=total.dtype)
        step = tl.dot(a1, b0, step, input_precision="ieee", out_dtype=total.dtype)
        step = tl.dot(a0, b1, step, input_precision="ieee", out_dtype=total.dtype)
    return total + tl.dot(a0, b0, step, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _score_tile(
    x, x2, x_plane, linear, spread, proxy_plane, bias, row0, local0, proxy0, P, D, WIDE,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scores z of rows x proxies, the projected product along = x . linear / |..|, and 1 / |..|.

    z = along - D/2 log1p(delta) + bias, delta = x^2 . spread, |..| = sqrt(1 + delta). The chunk's
    planes hold proxy `proxy0` at `local0`; rows are WIDE numbers long, D padded by zeros.
    """
    i, j, k = tl.arange(0, ROWS), tl.arange(0, PROXIES), tl.arange(0, DEPTH)
    first_x, first_proxy = tl.cast(row0, tl.int64) * WIDE, tl.cast(local0, tl.int64) * WIDE
    x, x2, linear, spread = x + first_x, x2 + first_x, linear + first_proxy, spread + first_proxy
    at_x = i[:, None] * WIDE + k[None, :]
    at_proxy = k[:, None] + j[None, :] * WIDE
    along = tl.zeros((ROWS, PROXIES), DTYPE)
    delta = tl.zeros((ROWS, PROXIES), DTYPE)
    for _ in range(0, WIDE, DEPTH):
        along = _add_product(along, x + at_x, x_plane, linear + at_proxy, proxy_plane, PLANES)
        if EXACT or PROJECTION:
            a, b = x2 + at_x, spread + at_proxy
            delta = _add_product(delta, a, x_plane, b, proxy_plane, SPREAD_PLANES)
        at_x += DEPTH
        at_proxy += DEPTH
    inverse_length = _inverse_root(1 + delta)
    if PROJECTION:
        along *= inverse_length
    shift = tl.load(bias + proxy0 + j, mask=proxy0 + j < P, other=0.0)
    z = along + shift.to(DTYPE)[None, :]
    if EXACT:
        z -= (0.5 * D) * _log1p(delta)
    return z, along, inverse_length


@triton.jit
def _known_label(labels, images, mask, P):
    label = tl.load(labels + images, mask=mask, other=-1)
    return tl.where((label >= 0) & (label < P), label, -1).to(tl.int32)


@triton.jit
def _image_constants(partial, common, temperature, images, mask, DTYPE: tl.constexpr):
    """top, rest with log2 weight = (z - top) log2(e) / T - rest; rest also holds top's rounding."""
    top = tl.load(partial[0] + images, mask=mask, other=0.0) - common
    log_z = tl.load(partial[1] + images, mask=mask, other=0.0)
    hi = top.to(DTYPE)
    return hi, ((log_z + (top - hi.to(tl.float64)) / temperature) * _LOG2E).to(DTYPE)


# --- forward


@triton.jit
def _prepare(
    loc, concentration, kbar, length, P, D, PROXIES: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Geometric mean of kappa and |K mu| of each proxy, in float64."""
    j = tl.program_id(0) * PROXIES + tl.arange(0, PROXIES)
    k = tl.arange(0, DEPTH)
    logs = tl.zeros((PROXIES, DEPTH), tl.float64)
    squares = tl.zeros((PROXIES, DEPTH), tl.float64)
    for d in range(0, D, DEPTH):
        at = j.to(tl.int64)[:, None] * D + (d + k)[None, :]
        mask = (j < P)[:, None] & (d + k < D)[None, :]
        mu = tl.load(loc + at, mask=mask, other=0.0).to(tl.float64)
        kappa = tl.load(concentration + at, mask=mask, other=1.0).to(tl.float64)
        logs += tl.log(kappa)
        squares += kappa * mu * (kappa * mu)
    tl.store(kbar + j, tl.exp(tl.sum(logs, 1) / D), mask=j < P)
    tl.store(length + j, tl.sqrt(tl.sum(squares, 1)), mask=j < P)


@triton.jit
def _split_samples(
    samples, x, x2, R, D, WIDE, plane,
    SPREAD: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Planes of x and x^2; zeros beyond the last row and the last column."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    value = tl.load(samples + row * D + d, mask=(row < R) & (d < D), other=0.0)
    at = row * WIDE + d
    _store_planes(value, x, at, plane, PLANES)
    if SPREAD:
        _store_planes(value * value, x2, at, plane, PLANES)


@triton.jit
def _split_proxies(
    loc, concentration, kbar, linear, spread, proxy0, P, D, WIDE, plane,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Planes of a chunk's linear and spread; zeros beyond the last proxy and the last column."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    proxy = proxy0 + local
    hi, lo, inverse = _scales(kbar, proxy, proxy < P, loc.dtype.element_ty)
    mask = (proxy < P)[:, None] & (d < D)
    at = proxy[:, None] * D + d
    mu = tl.load(loc + at, mask=mask, other=0.0)
    kappa = tl.load(concentration + at, mask=mask, other=0.0)
    weight, deviation, _ = _coefficients(
        mu, kappa, hi[:, None], lo[:, None], inverse[:, None], PROJECTION
    )
    at = local[:, None] * WIDE + d
    _store_planes(weight, linear, at, plane, PLANES)
    if EXACT or PROJECTION:
        _store_planes(tl.where(mask, deviation, 0.0), spread, at, plane, PLANES)


@triton.jit
def _own_scores(
    samples, loc, concentration, kbar, bias, labels, own, R, B, P, D,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Score of each row at its own proxy, in float64 and rounded once; -inf without a proxy."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    label = _known_label(labels, rows % B, rows < R, P)
    known = label >= 0
    scale = tl.load(kbar + label, mask=known, other=1.0)[:, None]
    along = tl.zeros((ROWS, DEPTH), tl.float64)
    delta = tl.zeros((ROWS, DEPTH), tl.float64)
    for d in range(0, D, DEPTH):
        mask = known[:, None] & (d + k < D)[None, :]
        x = tl.load(samples + (rows.to(tl.int64)[:, None] * D + (d + k)), mask=mask, other=0.0)
        at = label.to(tl.int64)[:, None] * D + (d + k)[None, :]
        mu = tl.load(loc + at, mask=mask, other=0.0).to(tl.float64)
        kappa = tl.load(concentration + at, mask=mask, other=0.0).to(tl.float64)
        linear, spread, _ = _coefficients(mu, kappa, scale, 0.0, 1 / scale, PROJECTION)
        along += x.to(tl.float64) * linear
        delta += x.to(tl.float64) * x.to(tl.float64) * spread
    z, delta = tl.sum(along, 1), tl.sum(delta, 1)
    if PROJECTION:
        z /= tl.sqrt(1 + delta)
    if EXACT:
        z -= (0.5 * D) * _log1p(delta)
    z += tl.load(bias + label, mask=known, other=0.0)
    tl.store(own + rows, tl.where(known, z, -float("inf")), mask=rows < R)


@triton.jit
def _nca_forward(
    x, x2, x_plane, linear, spread, proxy_plane, bias, own, labels, temperature,
    tops, sums, maxima, first_tile, last_tile, run, span, R, B, P, D, WIDE,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Carries maximum and sum on over `run` tiles of a chunk; the maxima of every `span` tiles."""
    DTYPE: tl.constexpr = own.dtype.element_ty
    row0 = tl.program_id(0) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    mask = rows < R
    label = _known_label(labels, rows % B, mask, P)
    own_z = tl.load(own + rows, mask=mask, other=0.0)
    rate = (1 / _temperature(temperature) * _LOG2E).to(DTYPE)
    at = tl.program_id(1).to(tl.int64) * R + rows
    top = tl.load(tops + at, mask=mask & (first_tile > 0), other=-float("inf"))
    total = tl.load(sums + at, mask=mask & (first_tile > 0), other=0.0)
    high = tl.full((ROWS,), -float("inf"), DTYPE)
    start = tl.program_id(1) * run
    for step in range(start, tl.minimum(start + run, last_tile - first_tile)):
        tile = first_tile + step
        z, _, _ = _score_tile(
            x, x2, x_plane, linear, spread, proxy_plane, bias,
            row0, step * PROXIES, tile * PROXIES, P, D, WIDE,
            EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
        )  # fmt: skip
        j = tile * PROXIES + tl.arange(0, PROXIES)
        z = tl.where(j[None, :] == label[:, None], own_z[:, None], z)
        z = tl.where((j < P)[None, :], z, -float("inf"))
        tile_top = tl.max(z, 1)
        new = tl.maximum(top, tile_top)
        total = total * tl.exp2((top - new) * rate)
        total += tl.sum(tl.exp2((z - new[:, None]) * rate), 1)
        top = new
        high = tl.where(tile % span == 0, tile_top, tl.maximum(high, tile_top))
        tl.store(maxima + tl.cast(tile // span, tl.int64) * R + rows, high, mask=mask)
    tl.store(tops + at, top, mask=mask)
    tl.store(sums + at, total, mask=mask)


@triton.jit
def _log_sum(
    tops, sums, count, images, B, inverse,
    SUMS: tl.constexpr, PARTS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Maximum and log sum exp((. - maximum) inverse) of `count` partial results of each image."""
    p = tl.arange(0, PARTS)[:, None]
    top = tl.full((IMAGES,), -float("inf"), tl.float64)
    for start in range(0, count, PARTS):
        at = (start + p).to(tl.int64) * B + images[None, :]
        mask = (start + p < count) & (images < B)[None, :]
        values = tl.load(tops + at, mask=mask, other=-float("inf")).to(tl.float64)
        top = tl.maximum(top, tl.max(values, 0))
    total = tl.zeros((IMAGES,), tl.float64)
    for start in range(0, count, PARTS):
        at = (start + p).to(tl.int64) * B + images[None, :]
        mask = (start + p < count) & (images < B)[None, :]
        values = tl.load(tops + at, mask=mask, other=-float("inf")).to(tl.float64)
        weights = tl.exp((values - top[None, :]) * inverse)
        if SUMS:
            weights *= tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(weights, 0)
    return top, tl.log(total)


@triton.jit
def _nca_combine(
    tops, sums, own, common, temperature, losses, partial, N, B, splits,
    PARTS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Samples and splits of each image, in order, into partial [4, B] and the loss."""
    i = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    mask = i < B
    inverse = 1 / _temperature(temperature)
    shift = tl.load(common)
    # split k of sample s of image i stands at k R + s B + i = (k N + s) B + i
    top, log_z = _log_sum(tops, sums, splits * N, i, B, inverse, True, PARTS, IMAGES)
    own_top, own_log_z = _log_sum(own, own, N, i, B, inverse, False, PARTS, IMAGES)
    known = own_top != -float("inf")
    loss = tl.where(known, (top - own_top) * inverse + (log_z - own_log_z), float("nan"))
    tl.store(losses + i, loss, mask=mask)
    tl.store(partial + i, top + shift, mask=mask)
    tl.store(partial + B + i, log_z, mask=mask)
    tl.store(partial + 2 * B + i, own_top + shift, mask=mask)
    tl.store(partial + 3 * B + i, tl.where(known, own_log_z, 0.0), mask=mask)


@triton.jit
def _ppk_forward(
    x, x2, x_plane, linear, spread, proxy_plane, bias, temperature,
    similarity, tops, rests, first_tile, N, B, P, D, WIDE,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """s of images x proxies, over the samples in order, with its maximum and log-sum."""
    DTYPE: tl.constexpr = similarity.dtype.element_ty
    image0, local0 = tl.program_id(0) * ROWS, tl.program_id(1) * PROXIES
    proxy0 = first_tile * PROXIES + local0
    t = _temperature(temperature)
    rate = (1 / t * _LOG2E).to(DTYPE)
    top = tl.full((ROWS, PROXIES), -float("inf"), DTYPE)
    total = tl.zeros((ROWS, PROXIES), DTYPE)
    for sample in range(0, N):
        z, _, _ = _score_tile(
            x, x2, x_plane, linear, spread, proxy_plane, bias,
            sample * B + image0, local0, proxy0, P, D, WIDE,
            EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
        )  # fmt: skip
        new = tl.maximum(top, z)
        total = total * tl.exp2((top - new) * rate) + tl.exp2((z - new) * rate)
        top = new
    similarity += image0.to(tl.int64) * P
    tops += image0.to(tl.int64) * P
    rests += image0.to(tl.int64) * P
    i, j = tl.arange(0, ROWS)[:, None], proxy0 + tl.arange(0, PROXIES)[None, :]
    at = i.to(tl.int64) * P + j
    mask = (image0 + i < B) & (j < P)
    rest = tl.log(total)
    tl.store(tops + at, top, mask=mask)
    tl.store(rests + at, rest, mask=mask)
    # top / T is too large for a rounding before the rest is added
    inverse = (1 / t).to(DTYPE)
    inverse_low = (1 / t - inverse.to(tl.float64)).to(DTYPE)
    count = tl.log(tl.full((), 1.0, tl.float64) * N).to(DTYPE)
    s = top * inverse
    low = tl.fma(top, inverse, -s) + top * inverse_low
    tl.store(similarity + at, s + (low + (rest - count)), mask=mask)


# --- backward


@triton.jit
def _plan_rows(
    maxima, labels, partial, common, temperature, live, row_list, row_count,
    R, B, P, chunk, span, threshold,
    NCA: tl.constexpr, ROWS: tl.constexpr, PROXIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which tiles of a row block and chunk are live, as a map and as an ordered list."""
    DTYPE: tl.constexpr = maxima.dtype.element_ty
    part, block = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(P, PROXIES)
    rows = block * ROWS + tl.arange(0, ROWS)
    mask = rows < R
    if NCA:
        t = _temperature(temperature)
        rate = (1 / t * _LOG2E).to(DTYPE)
        both = partial, partial + B
        top, rest = _image_constants(both, tl.load(common), t, rows % B, mask, DTYPE)
        home = _known_label(labels, rows % B, mask, P) // PROXIES
        unknown = tl.load(partial + 2 * B + rows % B, mask=mask, other=0.0) == -float("inf")
    row_list += (block.to(tl.int64) * tl.num_programs(0) + part) * chunk
    count = 0
    for start in range(0, chunk, BLOCK):
        step = start + tl.arange(0, BLOCK)
        tile = part * chunk + step
        here = (step < chunk) & (tile < tiles)
        alive = here.to(tl.int32)
        if NCA:
            at = (tile // span).to(tl.int64)[None, :] * R + rows[:, None]
            inside = mask[:, None] & here[None, :]
            high = tl.load(maxima + at, mask=inside, other=-float("inf"))
            weight = (high - top[:, None]) * rate - rest[:, None]
            needed = (weight >= threshold) | (weight != weight) | unknown[:, None]
            needed |= home[:, None] == tile[None, :]
            alive = tl.max((needed & inside).to(tl.int32), 0)
        tl.store(live + block.to(tl.int64) * tiles + tile, alive, mask=here)
        place = count + tl.cumsum(alive, 0) - alive
        tl.store(row_list + place, tile, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.store(row_count + block * tl.num_programs(0) + part, count)


@triton.jit
def _plan_proxies(live, proxy_list, proxy_count, blocks, tiles, BLOCK: tl.constexpr):
    """The live row blocks of each tile of proxies, as an ordered list."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tile < tiles
    count = tl.zeros((BLOCK,), tl.int32)
    for block in range(0, blocks):
        alive = tl.load(live + tl.cast(block, tl.int64) * tiles + tile, mask=mask, other=0)
        at = tile.to(tl.int64) * blocks + count
        tl.store(proxy_list + at, tl.zeros_like(count) + block, mask=alive > 0)
        count += alive
    tl.store(proxy_count + tile, count, mask=mask)


@triton.jit
def _score_gradients(
    x, x2, x_plane, linear, spread, proxy_plane, bias, own, labels, temperature,
    grad, partial, tops, rests, common, live,
    linear_grad, spread_grad, grad_plane, bias_grad, temperature_grad,
    first_tile, width, R, B, P, D, WIDE,
    NCA: tl.constexpr, EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr, GRAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/d(x . linear) and dL/d(x^2 . spread) of one live tile, and its sums for bias and T."""
    DTYPE: tl.constexpr = grad.dtype.element_ty
    block, local0 = tl.program_id(0), tl.program_id(1) * PROXIES
    tile = first_tile + tl.program_id(1)
    tile_at = block.to(tl.int64) * tl.cdiv(P, PROXIES) + tile
    if tl.load(live + tile_at) == 0:
        return
    row0, proxy0 = block * ROWS, tile * PROXIES
    rows, j = row0 + tl.arange(0, ROWS), proxy0 + tl.arange(0, PROXIES)
    t = _temperature(temperature)
    rate = (1 / t * _LOG2E).to(DTYPE)
    z, along, inverse_length = _score_tile(
        x, x2, x_plane, linear, spread, proxy_plane, bias, row0, local0, proxy0, P, D, WIDE,
        EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
    )  # fmt: skip
    mask = rows < R
    inside = mask[:, None] & (j < P)[None, :]
    images = rows % B
    if NCA:
        shift = tl.load(common)
        top, rest = _image_constants((partial, partial + B), shift, t, images, mask, DTYPE)
        own_partial = partial + 2 * B, partial + 3 * B
        own_top, own_rest = _image_constants(own_partial, shift, t, images, mask, DTYPE)
        label = _known_label(labels, images, mask, P)
        own_z = tl.load(own + rows, mask=mask, other=0.0)
        own_top64 = tl.load(partial + 2 * B + images, mask=mask, other=0.0)
        top64 = tl.load(partial + images, mask=mask, other=0.0)
        log_ratio = tl.load(partial + 3 * B + images, mask=mask, other=0.0) - tl.load(
            partial + B + images, mask=mask, other=0.0
        )
        # the two terms of the own proxy are w and w exp(-loss): their difference, uncancelled
        gap = (tl.exp((own_top64 - top64) / t + log_ratio) - 1).to(DTYPE)
        own_weight = tl.exp2((own_z - own_top) * rate - own_rest) * gap
        weight = tl.exp2((z - top[:, None]) * rate - rest[:, None])
        at_home = j[None, :] == label[:, None]
        weight = tl.where(at_home, own_weight[:, None], weight)
        height = tl.where(at_home, own_z[:, None], z) - top[:, None]  # sum of dl is 0 per image
        scale = tl.load(grad + images, mask=mask, other=0.0).to(tl.float64) / t
        unknown = own_top64 == -float("inf")
        scale = tl.where(unknown, float("nan"), scale).to(DTYPE)[:, None]
        g = tl.where(inside, weight * scale, 0.0)
        height = tl.where(inside, height, 0.0)
    else:
        at = images.to(tl.int64)[:, None] * P + j[None, :]
        top = tl.load(tops + at, mask=inside, other=float("inf"))  # a weight of 0
        rest = tl.load(rests + at, mask=inside, other=0.0)
        height = z - top
        g = tl.exp2(height * rate - rest * _LOG2E)
        height = tl.where(inside, height, 0.0)
        g *= tl.load(grad + at, mask=inside, other=0.0) * (1 / t).to(DTYPE)
    tl.store(temperature_grad + tile_at, tl.sum(tl.sum(g * height, 1).to(tl.float64), 0))
    columns = local0 + tl.arange(0, PROXIES)
    tl.store(bias_grad + block.to(tl.int64) * width + columns, tl.sum(g, 0))
    linear_grad += row0.to(tl.int64) * width
    spread_grad += row0.to(tl.int64) * width
    at = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    if PROJECTION or EXACT:
        pull = tl.zeros((ROWS, PROXIES), DTYPE)
        if PROJECTION:
            pull += along
        if EXACT:
            pull += D
        by_delta = -0.5 * g * pull * (inverse_length * inverse_length)
        _store_planes(by_delta, spread_grad, at, grad_plane, GRAD_PLANES)
    if PROJECTION:
        g *= inverse_length
    _store_planes(g, linear_grad, at, grad_plane, GRAD_PLANES)


@triton.jit
def _sample_gradients(
    linear_grad, spread_grad, grad_plane, linear, spread, proxy_plane, samples, out,
    row_list, row_count, part, parts, chunk, first_tile, width, R, D, WIDE,
    SPREAD: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds this chunk's linear_grad @ linear + 2 x (spread_grad @ spread) to slab `split`."""
    DTYPE: tl.constexpr = samples.dtype.element_ty
    STEPS: tl.constexpr = PROXIES // DEPTH
    block, split = tl.program_id(0), tl.program_id(2)
    i, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row0 = block * ROWS
    row_list += (block.to(tl.int64) * parts + part) * chunk
    count = tl.load(row_count + block * parts + part)
    each = tl.cdiv(count, tl.num_programs(2))
    first, last = split * each, tl.minimum((split + 1) * each, count)
    linear_grad += row0.to(tl.int64) * width
    spread_grad += row0.to(tl.int64) * width
    weights = i[:, None] * width + k[None, :]
    coefficients = k[:, None] * WIDE + c[None, :]
    by_linear = tl.zeros((ROWS, COLUMNS), DTYPE)
    by_spread = tl.zeros((ROWS, COLUMNS), DTYPE)
    for step in range(first * STEPS, last * STEPS):
        tile = tl.load(row_list + step // STEPS) - first_tile
        local = tile * PROXIES + (step % STEPS) * DEPTH
        first_b = local.to(tl.int64) * WIDE
        a, b = linear_grad + local + weights, linear + first_b + coefficients
        by_linear = _add_product(by_linear, a, grad_plane, b, proxy_plane, PLANES)
        if SPREAD:
            a, b = spread_grad + local + weights, spread + first_b + coefficients
            by_spread = _add_product(by_spread, a, grad_plane, b, proxy_plane, PLANES)
    at = row0.to(tl.int64) * D + (i[:, None] * D + c[None, :])
    mask = (row0 + i < R)[:, None] & (c < D)[None, :]
    if SPREAD:
        by_linear += 2 * tl.load(samples + at, mask=mask, other=0.0) * by_spread
    at += split.to(tl.int64) * R * D
    by_linear += tl.load(out + at, mask=mask & (part > 0), other=0.0)
    tl.store(out + at, by_linear, mask=mask)


@triton.jit
def _proxy_gradients(
    linear_grad, spread_grad, grad_plane, x, x2, x_plane, bias_grad, loc, concentration, kbar,
    slope, proxy_list, proxy_count, d_loc, d_concentration, first_tile, blocks, width, P, D, WIDE,
    PROJECTION: tl.constexpr, SPREAD: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """linear_grad^T @ x and spread_grad^T @ x^2, and from them the parameters' gradients.

    kbar enters z only as the bias does, (d bias / d kappa) = 1 / kappa: the rest cancels on the
    unit sphere, whichever the options.
    """
    DTYPE: tl.constexpr = loc.dtype.element_ty
    STEPS: tl.constexpr = ROWS // DEPTH
    local0 = tl.program_id(0) * PROXIES
    tile = first_tile + tl.program_id(0)
    j, k = tl.arange(0, PROXIES), tl.arange(0, DEPTH)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    proxy_list += tile.to(tl.int64) * blocks
    count = tl.load(proxy_count + tile)
    weights = local0 + j[:, None] + k[None, :] * width
    values = k[:, None] * WIDE + c[None, :]
    by_linear = tl.zeros((PROXIES, COLUMNS), DTYPE)
    by_spread = tl.zeros((PROXIES, COLUMNS), DTYPE)
    for step in range(0, count * STEPS):
        row0 = (tl.load(proxy_list + step // STEPS) * ROWS + (step % STEPS) * DEPTH).to(tl.int64)
        a, b = linear_grad + row0 * width + weights, x + row0 * WIDE + values
        by_linear = _add_product(by_linear, a, grad_plane, b, x_plane, PLANES)
        if SPREAD:
            a, b = spread_grad + row0 * width + weights, x2 + row0 * WIDE + values
            by_spread = _add_product(by_spread, a, grad_plane, b, x_plane, PLANES)
    by_bias = tl.zeros((PROXIES,), DTYPE)
    for n in range(0, count):
        block = tl.load(proxy_list + n).to(tl.int64)
        by_bias += tl.load(bias_grad + block * width + local0 + j)
    proxies = tile * PROXIES + j
    at = tile.to(tl.int64) * PROXIES * D + (j[:, None] * D + c[None, :])
    mask = (proxies < P)[:, None] & (c < D)[None, :]
    mu = tl.load(loc + at, mask=mask, other=0.0)
    kappa = tl.load(concentration + at, mask=mask, other=1.0)
    hi, lo, inverse = _scales(kbar, proxies, proxies < P, DTYPE)
    _, _, excess = _coefficients(mu, kappa, hi[:, None], lo[:, None], inverse[:, None], False)
    curve = tl.load(slope + proxies, mask=proxies < P, other=0.0).to(DTYPE) * by_bias
    ratio = 1 + excess
    into_loc, into_kappa = by_linear * kappa, by_linear * mu
    if PROJECTION:
        into_loc, into_kappa = into_loc * ratio, into_kappa * ratio * 2
    if SPREAD:
        into_kappa += by_spread * ratio * (2 * inverse[:, None])
    into_loc += curve[:, None] * kappa * kappa * mu
    into_kappa += by_bias[:, None] / kappa + curve[:, None] * kappa * mu * mu
    tl.store(d_loc + at, into_loc, mask=mask)
    tl.store(d_concentration + at, into_kappa, mask=mask)


# --- tile configurations


class Tile(NamedTuple):
    rows: int
    proxies: int
    columns: int  # of the gradient products
    depth: int  # of one step of a product
    warps: int
    stages: int
    registers: int | None = None  # a bound, where ptxas would rather spill than use more


# (architecture, mode): tile. None of these spills (the tests compile them), larger ones do on
# sm_80, where Triton gives every warp all columns of a tile. log_ppk keeps two more numbers a pair.
TILES = {
    ("sm_90", "float32"): Tile(128, 64, 64, 32, 8, 2),
    ("sm_90", "fast"): Tile(128, 64, 64, 32, 8, 3),
    ("sm_90", "log_ppk"): Tile(64, 64, 64, 32, 8, 2),
    ("sm_90", "float64"): Tile(16, 32, 32, 16, 4, 2, 255),
    ("sm_80", "float32"): Tile(64, 32, 32, 32, 4, 3),
    ("sm_80", "fast"): Tile(64, 32, 32, 32, 4, 3),
    ("sm_80", "log_ppk"): Tile(64, 32, 32, 32, 4, 3),
    ("sm_80", "float64"): Tile(16, 32, 32, 16, 4, 2, 255),
}
# bfloat16 planes (3: bf16x6, 2: bf16x3, 1: the type itself) of the products with linear and with
# spread, and of those for the gradients of the samples and of the proxies. D / 2T multiplies the
# second: at T = 0.003, D = 512 and a spread of 30% two planes there cost 4e-2 in the loss, three
# 3e-3. An image's weights sum to 0, so that the third cancels where proxies are alike.
PLANES = {"float32": (3, 3, 3, 2), "fast": (2, 3, 2, 2), "float64": (1, 1, 1, 1)}
L2_BYTES = 32 << 20  # of planes and weights of one chunk of proxies
BAND, BLOCK = 16, 128  # rows (proxies, images) and columns of the small kernels
PAD = 64  # planes are multiples of it wide: of every depth and number of columns above


@functools.cache
def _machine(device: torch.device) -> tuple[str, int, torch.dtype]:
    """Architecture in `TILES`, number of multiprocessors, and the type that holds a plane."""
    if device.type != "cuda":  # Triton's interpreter cannot multiply bfloat16
        return "sm_80", 4, torch.float32
    properties = torch.cuda.get_device_properties(device)
    architecture = "sm_90" if properties.major in (9, 10) else "sm_80"
    return architecture, properties.multi_processor_count, torch.bfloat16


# --- launchers


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tile: Tile | None = None,
) -> None:
    kernel[grid](*arguments, **constants, **compile_options(tile))


def compile_options(tile: Tile | None) -> dict[str, Any]:
    options: dict[str, Any] = {"enable_fp_fusion": True}  # whose default depends on the version
    if tile:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    return options


class _Saved(NamedTuple):
    """The proxies' scalars, and what else the backward needs, as views of one buffer of bytes."""

    common: Tensor  # [], mean bias
    kbar: Tensor  # [P], geometric mean of the concentrations
    length: Tensor  # [P], |K mu|
    bias: Tensor  # [P], what does not depend on the sample, less common
    own: Tensor  # [R], scores at the own proxies;  log_ppk: tops [B P]
    maxima: Tensor  # [.. R], of the tiles of each row;  log_ppk: rests [B P]


def _scalars(P: int) -> int:
    """Bytes of the scalars: four rows of float64, each a multiple of 16 bytes long."""
    return 4 * 8 * (P + P % 2)


def _view(buffer: Tensor, P: int, own: int, dtype: torch.dtype) -> _Saved:
    scalars = buffer[: _scalars(P)].view(torch.float64).view(4, -1)
    values = buffer[_scalars(P) :].view(dtype)
    kbar, length, bias = scalars[:3, :P]
    return _Saved(scalars[3, 0], kbar, length, bias, values[:own], values[own:])


def _configuration(samples: Tensor, fast: bool, nca: bool) -> tuple[str, Tile]:
    """Row of `PLANES` and tile."""
    mode = "float64" if samples.dtype == torch.float64 else "fast" if fast else "float32"
    key = mode if nca or mode == "float64" else "log_ppk"
    return mode, TILES[_machine(samples.device)[0], key]


def _span(tiles: int, tile_bytes: int, workspace: int) -> int:
    """Tiles that share a maximum: as few as keep these within a quarter of workspace."""
    span = 1
    while span < tiles and _ceil(tiles, span) * tile_bytes > workspace // 4:
        span *= 2
    return span


def saved_like(
    op: str,
    samples: Tensor,
    loc: Tensor,
    exact: bool,
    projection: bool,
    fast: bool,
    workspace: int,
) -> Tensor:
    """A tensor like the one that `op` saves for its backward, for fake kernels."""
    (N, B, _), P, size = samples.shape, len(loc), samples.element_size()
    count = 2 * B * P
    if op == "proxy_nca":
        tiles = _ceil(P, _configuration(samples, fast, True)[1].proxies)
        count = N * B * (1 + _ceil(tiles, _span(tiles, N * B * size, workspace)))
    return samples.new_empty(_scalars(P) + count * size, dtype=torch.uint8)


class _Problem:
    """Inputs, sizes and options of a call, and the arrays that its products read.

    Everything follows from shapes, options and the device; no value is looked at on the host.
    """

    def __init__(
        self,
        samples: Tensor,
        loc: Tensor,
        concentration: Tensor,
        temperature: Tensor,
        exact: bool,
        projection: bool,
        fast: bool,
        workspace: int,
        *,
        nca: bool,
        backward: bool,
    ) -> None:
        self.samples, self.loc, self.concentration = samples, loc, concentration
        self.temperature, self.workspace, self.dtype = temperature, workspace, samples.dtype
        self.exact, self.projection = exact, projection
        self.N, self.B, self.D = samples.shape
        self.P, self.R = len(loc), self.N * self.B
        mode, self.tile = _configuration(samples, fast, nca)
        _, self.processors, plane_type = _machine(samples.device)
        self.plane_type = self.dtype if mode == "float64" else plane_type
        self.linear_planes, self.planes, self.grad_planes, self.proxy_grad_planes = PLANES[mode]
        self.blocks, self.tiles = _ceil(self.R, self.tile.rows), _ceil(self.P, self.tile.proxies)
        # padded sizes: a row block may begin at any row of log_ppk, hence one more
        self.rows = (self.blocks + 1) * self.tile.rows
        self.wide = _ceil(self.D, PAD) * PAD
        # proxies in a chunk: as many as the cache and half of the workspace hold the planes of
        products = 1 + (exact or projection)
        size = self.plane_type.itemsize
        column = products * self.planes * self.wide * size
        column += products * self.grad_planes * self.rows * size * backward
        fitting = min(L2_BYTES, workspace // 2) // (column * self.tile.proxies)
        self.span = _span(self.tiles, self.R * self.dtype.itemsize, workspace)
        self.chunk = min(self.tiles, max(1, fitting // self.span) * self.span)
        self.width = self.chunk * self.tile.proxies
        self.samples_planes = self.empty_planes(self.planes, self.rows, self.wide)
        self.proxy_planes = self.empty_planes(self.planes, self.width, self.wide)
        _launch(
            _split_samples,
            (self.rows // BAND, self.wide // PAD),
            (samples, *self.samples_planes, self.R, self.D, self.wide, self.rows * self.wide),
            {"SPREAD": products > 1, "PLANES": self.planes, "ROWS": BAND, "DEPTH": PAD},
        )

    def empty_planes(self, planes: int, rows: int, columns: int) -> Tensor:
        """[2, planes, rows, columns]: of x and x^2, of linear and spread, of their weights."""
        if not (self.exact or self.projection):  # the second is never touched
            one = self.samples.new_empty(1, planes, rows, columns, dtype=self.plane_type)
            return one.expand(2, -1, -1, -1)
        return self.samples.new_empty(2, planes, rows, columns, dtype=self.plane_type)

    def allocate(self, own: int, maxima: int) -> tuple[Tensor, _Saved]:
        """The buffer that is saved, with the proxies' scalars filled in."""
        size = _scalars(self.P) + (own + maxima) * self.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8, device=self.loc.device)
        saved = _view(buffer, self.P, own, self.dtype)
        _launch(
            _prepare,
            (_ceil(self.P, BAND),),
            (self.loc, self.concentration, saved.kbar, saved.length, self.P, self.D),
            {"PROXIES": BAND, "DEPTH": BLOCK},
        )
        bias = special.log_normalizer_derivative(saved.length, self.D, 0)
        if not self.exact:
            bias = bias + self.D * saved.kbar.log() - saved.length.log()
        saved.common.copy_(bias.mean())
        torch.sub(bias, saved.common, out=saved.bias)
        return buffer, saved

    def split_proxies(self, kbar: Tensor, first_tile: int) -> None:
        arguments = self.loc, self.concentration, kbar, *self.proxy_planes
        sizes = first_tile * self.tile.proxies, self.P, self.D, self.wide, self.width * self.wide
        constants = {**self.options, "PLANES": self.planes, "ROWS": BAND, "DEPTH": PAD}
        grid = self.width // BAND, self.wide // PAD
        _launch(_split_proxies, grid, (*arguments, *sizes), constants)

    @property
    def options(self) -> dict[str, bool]:
        return {"EXACT": self.exact, "PROJECTION": self.projection}

    @property
    def score_arguments(self) -> tuple[Any, ...]:
        x_plane, proxy_plane = self.rows * self.wide, self.width * self.wide
        return *self.samples_planes, x_plane, *self.proxy_planes, proxy_plane

    @property
    def score_constants(self) -> dict[str, Any]:
        tile = {"ROWS": self.tile.rows, "PROXIES": self.tile.proxies, "DEPTH": self.tile.depth}
        planes = {"PLANES": self.linear_planes, "SPREAD_PLANES": self.planes}
        return {**self.options, **tile, **planes}


def proxy_nca(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    exact: bool,
    projection: bool,
    fast: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], partial [4, B] and what the backward reads, as the op `proxy_nca` says."""
    with torch.cuda.device_of(samples):
        options = exact, projection, fast, workspace
        p = _Problem(samples, loc, concentration, temperature, *options, nca=True, backward=False)
        R, B, P, D = p.R, p.B, p.P, p.D
        buffer, saved = p.allocate(R, _ceil(p.tiles, p.span) * R)
        losses = samples.new_empty(B)
        partial = samples.new_empty(4, B, dtype=torch.float64)
        if B == 0:
            return losses, partial, buffer
        _launch(
            _own_scores,
            (_ceil(R, BAND),),
            (samples, loc, concentration, saved.kbar, saved.bias, labels, saved.own, R, B, P, D),
            {**p.options, "ROWS": BAND, "DEPTH": BLOCK},
        )
        run = _ceil(_ceil(p.chunk, max(1, 2 * p.processors // p.blocks)), p.span) * p.span
        splits = _ceil(p.chunk, run)
        tops, sums = samples.new_empty(2, splits, R)
        for first in range(0, p.tiles, p.chunk):
            last = min(first + p.chunk, p.tiles)
            p.split_proxies(saved.kbar, first)
            results = tops, sums, saved.maxima
            sizes = first, last, run, p.span, R, B, P, D, p.wide
            _launch(
                _nca_forward,
                (p.blocks, splits),
                (*p.score_arguments, saved.bias, saved.own, labels, temperature, *results, *sizes),
                p.score_constants,
                p.tile,
            )
        _launch(
            _nca_combine,
            (_ceil(B, BAND),),
            (tops, sums, saved.own, saved.common, temperature, losses, partial, p.N, B, splits),
            {"PARTS": 16, "IMAGES": BAND},
        )
    return losses, partial, buffer


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
    fast: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in samples, loc, concentration, temperature, as `proxy_nca_backward` says."""
    with torch.cuda.device_of(samples):
        options = exact, projection, fast, workspace
        p = _Problem(samples, loc, concentration, temperature, *options, nca=True, backward=True)
        return _backward(p, grad, _view(saved, p.P, p.R, p.dtype), labels, partial)


def log_ppk(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    exact: bool,
    projection: bool,
    fast: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """s [B, P], what the backward reads, and the common bias, as the op `log_ppk` says."""
    with torch.cuda.device_of(samples):
        options = exact, projection, fast, workspace
        p = _Problem(samples, loc, concentration, temperature, *options, nca=False, backward=False)
        buffer, saved = p.allocate(p.B * p.P, p.B * p.P)
        similarity = samples.new_empty(p.B, p.P)
        for first in range(0, p.tiles if p.B else 0, p.chunk):
            p.split_proxies(saved.kbar, first)
            results = similarity, saved.own, saved.maxima
            sizes = first, p.N, p.B, p.P, p.D, p.wide
            _launch(
                _ppk_forward,
                (_ceil(p.B, p.tile.rows), min(p.chunk, p.tiles - first)),
                (*p.score_arguments, saved.bias, temperature, *results, *sizes),
                p.score_constants,
                p.tile,
            )
        return similarity, buffer, saved.common.clone()


def log_ppk_backward(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    saved: Tensor,
    exact: bool,
    projection: bool,
    fast: bool,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in samples, loc, concentration, temperature, as `log_ppk_backward` says."""
    with torch.cuda.device_of(samples):
        options = exact, projection, fast, workspace
        p = _Problem(samples, loc, concentration, temperature, *options, nca=False, backward=True)
        return _backward(p, grad, _view(saved, p.P, p.B * p.P, p.dtype))


def _backward(
    p: _Problem,
    grad: Tensor,
    saved: _Saved,
    labels: Tensor | None = None,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of both ops; log_ppk has no labels, and no dead tiles: its gradient may weigh any pair."""
    R, B, P, D, tile = p.R, p.B, p.P, p.D, p.tile
    samples, new = p.samples, p.samples.new_empty
    d_loc, d_concentration = torch.empty_like(p.loc), torch.empty_like(p.concentration)
    if B == 0:
        zero = torch.zeros_like(p.temperature)
        return torch.empty_like(samples), d_loc.zero_(), d_concentration.zero_(), zero
    nca = labels is not None
    if labels is None or partial is None:
        labels = partial = saved.common  # never read
    slope = special.log_normalizer_derivative(saved.length, D, 1) / saved.length.clamp(min=1e-150)
    if not p.exact:
        slope = slope - saved.length**-2
    parts, columns = _ceil(p.tiles, p.chunk), _ceil(D, tile.columns)
    splits = min(p.chunk, 2 * p.processors // (p.blocks * columns))
    splits = max(1, min(splits, p.workspace // 4 // (R * D * p.dtype.itemsize)))
    slabs = new(splits, *samples.shape)
    weights, grad_plane = p.empty_planes(p.grad_planes, p.rows, p.width), p.rows * p.width
    bias_grad = new(p.blocks, p.width)
    temperature_grad = samples.new_zeros(p.blocks, p.tiles, dtype=torch.float64)
    live, proxy_list = new(2, p.blocks * p.tiles, dtype=torch.int32)
    row_list = new(p.blocks, parts, p.chunk, dtype=torch.int32)
    row_count = new(p.blocks, parts, dtype=torch.int32)
    proxy_count = new(p.tiles, dtype=torch.int32)
    span = _span(p.tiles, R, 4 * saved.maxima.numel())  # the forward's, from what it saved
    x_plane, proxy_plane = p.rows * p.wide, p.width * p.wide
    product = {"SPREAD": p.exact or p.projection, "PLANES": p.grad_planes}
    product |= {"ROWS": tile.rows, "PROXIES": tile.proxies}
    product |= {"COLUMNS": tile.columns, "DEPTH": tile.depth}
    plan, sizes = (live, row_list, row_count), (R, B, P, p.chunk, span, dead_below(p.N, P))
    _launch(
        _plan_rows,
        (parts, p.blocks),
        (saved.maxima, labels, partial, saved.common, p.temperature, *plan, *sizes),
        {"NCA": nca, "ROWS": tile.rows, "PROXIES": tile.proxies, "BLOCK": 32},
    )
    arguments = live, proxy_list, proxy_count, p.blocks, p.tiles
    _launch(_plan_proxies, (_ceil(p.tiles, BLOCK),), arguments, {"BLOCK": BLOCK})
    for part in range(parts):
        first = part * p.chunk
        here = min(p.chunk, p.tiles - first)
        p.split_proxies(saved.kbar, first)
        values = saved.bias, saved.own, labels, p.temperature, grad, partial, saved.own
        scores = *p.score_arguments, *values, saved.maxima, saved.common, live
        results = *weights, grad_plane, bias_grad, temperature_grad
        _launch(
            _score_gradients,
            (p.blocks, here),
            (*scores, *results, first, p.width, R, B, P, D, p.wide),
            {**p.score_constants, "NCA": nca, "GRAD_PLANES": p.grad_planes},
            tile,
        )
        operands = *weights, grad_plane, *p.proxy_planes, proxy_plane
        where = row_list, row_count, part, parts, p.chunk, first
        _launch(
            _sample_gradients,
            (p.blocks, columns, splits),
            (*operands, samples, slabs, *where, p.width, R, D, p.wide),
            product,
            tile,
        )
        operands = *weights, grad_plane, *p.samples_planes, x_plane
        proxies = bias_grad, p.loc, p.concentration, saved.kbar, slope
        results = proxy_list, proxy_count, d_loc, d_concentration
        _launch(
            _proxy_gradients,
            (here, columns),
            (*operands, *proxies, *results, first, p.blocks, p.width, P, D, p.wide),
            {**product, "PROJECTION": p.projection, "PLANES": p.proxy_grad_planes},
            tile,
        )
    d_samples = slabs[0] if splits == 1 else slabs.sum(0)
    heat = temperature_grad.sum()
    if not nca:  # whose scores are taken from each pair's top; an image's dl sum to 0 in proxy_nca
        heat += (grad.flatten() * saved.own).sum(dtype=torch.float64) / p.temperature
    d_temperature = -heat / p.temperature.double()
    return d_samples, d_loc, d_concentration, d_temperature.to(p.dtype)


def dead_below(N: int, P: int) -> float:
    """log2 of the softmax weight below which a tile is dead: N P of them stay under 2^-24."""
    return -24 - math.log2(N * P)
