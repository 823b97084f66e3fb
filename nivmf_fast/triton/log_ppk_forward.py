"""Forward kernels: online maximum and sum of exp(z / T) over tiles of scores that are not stored.

In: planes of samples and of a chunk of proxies. Out, for proxy-NCA: losses [B], partial [4, B],
scores of the own proxies, maxima of the tiles; for log-PPK: s [B, P], its maximum and log sum.
Launched by log_ppk.py. Design: docs/design/log_ppk_triton.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from nivmf_fast.triton.log_ppk_device import (
    LOG2E,
    known_label,
    load_temperature,
    log1p,
    proxy_coefficients,
    score_tile,
)


@triton.jit
def own_scores(
    samples, loc, concentration, kbar, bias, labels, own, R, B, P, D,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Score of each row at its own proxy, in float64 and rounded once; -inf if that is not here."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    label = known_label(labels, rows % B, rows < R, P)
    known = label >= 0
    scale = tl.load(kbar + label, mask=known, other=1.0)[:, None]
    num = tl.zeros((ROWS, DEPTH), tl.float64)
    delta = tl.zeros((ROWS, DEPTH), tl.float64)
    for d in range(0, D, DEPTH):
        mask = known[:, None] & (d + k < D)[None, :]
        x = tl.load(samples + (rows.to(tl.int64)[:, None] * D + (d + k)), mask=mask, other=0.0)
        at = label.to(tl.int64)[:, None] * D + (d + k)[None, :]
        mu = tl.load(loc + at, mask=mask, other=0.0).to(tl.float64)
        kappa = tl.load(concentration + at, mask=mask, other=0.0).to(tl.float64)
        linear, spread, _ = proxy_coefficients(mu, kappa, scale, 0.0, 1 / scale, PROJECTION)
        num += x.to(tl.float64) * linear
        delta += x.to(tl.float64) * x.to(tl.float64) * spread
    z, delta = tl.sum(num, 1), tl.sum(delta, 1)
    if PROJECTION:
        z /= tl.sqrt(1 + delta)
    if EXACT:
        z -= (0.5 * D) * log1p(delta)
    z += tl.load(bias + label, mask=known, other=0.0)
    tl.store(own + rows, tl.where(known, z, -float("inf")), mask=rows < R)


@triton.jit
def nca_forward(
    x, x2, x_plane, linear, spread, proxy_plane, bias, own, labels, temperature,
    row_max, row_sum, maxima, first_tile, last_tile, run, span, R, B, P, D, PITCH,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Carry maximum and sum over `run` tiles of a chunk; if KEEP, store maxima per `span` tiles."""
    DTYPE: tl.constexpr = own.dtype.element_ty
    row0 = tl.program_id(0) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    mask = rows < R
    label = known_label(labels, rows % B, mask, P)
    own_z = tl.load(own + rows, mask=mask, other=0.0)
    rate = (1 / load_temperature(temperature) * LOG2E).to(DTYPE)
    at = tl.program_id(1).to(tl.int64) * R + rows
    maximum = tl.load(row_max + at, mask=mask & (first_tile > 0), other=-float("inf"))
    total = tl.load(row_sum + at, mask=mask & (first_tile > 0), other=0.0)
    start = tl.program_id(1) * run
    if KEEP:  # an earlier chunk may have begun the first span
        first = first_tile + start
        span_at = maxima + tl.cast(first // span, tl.int64) * R + rows
        span_max = tl.load(span_at, mask=mask & (first % span > 0), other=-float("inf"))
    for step in range(start, tl.minimum(start + run, last_tile - first_tile)):
        tile = first_tile + step
        z, _, _ = score_tile(
            x, x2, x_plane, linear, spread, proxy_plane, bias,
            row0, step * PROXIES, tile * PROXIES, P, D, PITCH,
            EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
        )  # fmt: skip
        j = tile * PROXIES + tl.arange(0, PROXIES)
        z = tl.where(j[None, :] == label[:, None], own_z[:, None], z)
        z = tl.where((j < P)[None, :], z, -float("inf"))
        tile_max = tl.max(z, 1)
        new = tl.maximum(maximum, tile_max)
        total = total * tl.exp2((maximum - new) * rate)
        total += tl.sum(tl.exp2((z - new[:, None]) * rate), 1)
        maximum = new
        if KEEP:
            span_max = tl.where(tile % span == 0, tile_max, tl.maximum(span_max, tile_max))
            tl.store(maxima + tl.cast(tile // span, tl.int64) * R + rows, span_max, mask=mask)
    tl.store(row_max + at, maximum, mask=mask)
    tl.store(row_sum + at, total, mask=mask)


@triton.jit
def _log_sum(
    maxima, sums, count, images, B, inverse,
    SUMS: tl.constexpr, PARTS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Maximum and log sum exp((. - maximum) inverse) of `count` partial results of each image."""
    p = tl.arange(0, PARTS)[:, None]
    maximum = tl.full((IMAGES,), -float("inf"), tl.float64)
    for start in range(0, count, PARTS):
        at = (start + p).to(tl.int64) * B + images[None, :]
        mask = (start + p < count) & (images < B)[None, :]
        values = tl.load(maxima + at, mask=mask, other=-float("inf")).to(tl.float64)
        maximum = tl.maximum(maximum, tl.max(values, 0))
    total = tl.zeros((IMAGES,), tl.float64)
    for start in range(0, count, PARTS):
        at = (start + p).to(tl.int64) * B + images[None, :]
        mask = (start + p < count) & (images < B)[None, :]
        values = tl.load(maxima + at, mask=mask, other=-float("inf")).to(tl.float64)
        weights = tl.exp((values - maximum[None, :]) * inverse)
        if SUMS:
            weights *= tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(weights, 0)
    return maximum, tl.log(total)


@triton.jit
def nca_combine(
    row_max, row_sum, own, common, temperature, losses, partial, N, B, splits,
    PARTS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Combine the samples and splits of each image, in order, into partial [4, B] and the loss."""
    i = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    mask = i < B
    inverse = 1 / load_temperature(temperature)
    shift = tl.load(common)
    # split k of sample s of image i is at k R + s B + i = (k N + s) B + i
    maximum, lse = _log_sum(row_max, row_sum, splits * N, i, B, inverse, True, PARTS, IMAGES)
    own_max, own_lse = _log_sum(own, own, N, i, B, inverse, False, PARTS, IMAGES)
    known = own_max != -float("inf")
    loss = tl.where(known, (maximum - own_max) * inverse + (lse - own_lse), float("nan"))
    tl.store(losses + i, loss, mask=mask)
    tl.store(partial + i, maximum + shift, mask=mask)
    tl.store(partial + B + i, lse, mask=mask)
    tl.store(partial + 2 * B + i, own_max + shift, mask=mask)
    tl.store(partial + 3 * B + i, tl.where(known, own_lse, 0.0), mask=mask)


@triton.jit
def ppk_forward(
    x, x2, x_plane, linear, spread, proxy_plane, bias, temperature,
    similarity, pair_max, pair_lse, first_tile, N, B, P, D, PITCH,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """s of images x proxies, over the samples in order, with its maximum and log sum."""
    DTYPE: tl.constexpr = similarity.dtype.element_ty
    image0, local0 = tl.program_id(0) * ROWS, tl.program_id(1) * PROXIES
    proxy0 = first_tile * PROXIES + local0
    t = load_temperature(temperature)
    rate = (1 / t * LOG2E).to(DTYPE)
    maximum = tl.full((ROWS, PROXIES), -float("inf"), DTYPE)
    total = tl.zeros((ROWS, PROXIES), DTYPE)
    for sample in range(0, N):
        z, _, _ = score_tile(
            x, x2, x_plane, linear, spread, proxy_plane, bias,
            sample * B + image0, local0, proxy0, P, D, PITCH,
            EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
        )  # fmt: skip
        new = tl.maximum(maximum, z)
        total = total * tl.exp2((maximum - new) * rate) + tl.exp2((z - new) * rate)
        maximum = new
    similarity += image0.to(tl.int64) * P
    pair_max += image0.to(tl.int64) * P
    pair_lse += image0.to(tl.int64) * P
    i, j = tl.arange(0, ROWS)[:, None], proxy0 + tl.arange(0, PROXIES)[None, :]
    at = i.to(tl.int64) * P + j
    mask = (image0 + i < B) & (j < P)
    lse = tl.log(total)
    tl.store(pair_max + at, maximum, mask=mask)
    tl.store(pair_lse + at, lse, mask=mask)
    # maximum / T in two parts: it is so large that its rounding would swamp the lse
    inverse = (1 / t).to(DTYPE)
    inverse_low = (1 / t - inverse.to(tl.float64)).to(DTYPE)
    count = tl.log(tl.full((), 1.0, tl.float64) * N).to(DTYPE)
    s = maximum * inverse
    low = tl.fma(maximum, inverse, -s) + maximum * inverse_low
    tl.store(similarity + at, s + (low + (lse - count)), mask=mask)
