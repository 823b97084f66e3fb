"""Backward kernels and their launches: gradients in samples, loc, concentration and temperature.

In: a `Problem`, dL/dloss [B] or dL/ds [B, P], and `saved`. For each chunk of proxies the scores are
computed again, in live tiles only, and give two weights per pair, from which two products make the
gradients. Called by log_ppk.py. Derivations: docs/math.md, "Gradients of log-PPK" and
"Dead tiles". Design: docs/design/log_ppk_triton.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast import special
from nivmf_fast._schemas import dead_log2
from nivmf_fast.triton.log_ppk_device import (
    LOG2E,
    add_product,
    image_constants,
    known_label,
    load_scales,
    load_temperature,
    proxy_coefficients,
    score_tile,
    store_planes,
)
from nivmf_fast.triton.log_ppk_prepare import BLOCK, Problem, Saved, ceil_div, span_of


@triton.jit
def _plan_rows(
    maxima, labels, partial, common, temperature, live, row_list, row_count,
    R, B, P, chunk, span, threshold,
    NCA: tl.constexpr, ROWS: tl.constexpr, PROXIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the live tiles of a row block and chunk, as a map and as an ordered list."""
    DTYPE: tl.constexpr = maxima.dtype.element_ty
    part, block = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(P, PROXIES)
    rows = block * ROWS + tl.arange(0, ROWS)
    mask = rows < R
    if NCA:
        t = load_temperature(temperature)
        rate = (1 / t * LOG2E).to(DTYPE)
        both = partial, partial + B
        maximum, lse = image_constants(both, tl.load(common), t, rows % B, mask, DTYPE)
        home = known_label(labels, rows % B, mask, P) // PROXIES
        unknown = tl.load(partial + 2 * B + rows % B, mask=mask, other=0.0) == -float("inf")
    row_list += (block.to(tl.int64) * tl.num_programs(0) + part) * chunk
    count = 0
    for start in range(0, chunk, BLOCK):
        step = start + tl.arange(0, BLOCK)
        tile = part * chunk + step
        here = (step < chunk) & (tile < tiles)
        is_live = here.to(tl.int32)
        if NCA:
            at = (tile // span).to(tl.int64)[None, :] * R + rows[:, None]
            inside = mask[:, None] & here[None, :]
            tile_max = tl.load(maxima + at, mask=inside, other=-float("inf"))
            weight = (tile_max - maximum[:, None]) * rate - lse[:, None]
            needed = (weight >= threshold) | (weight != weight) | unknown[:, None]
            needed |= home[:, None] == tile[None, :]
            is_live = tl.max((needed & inside).to(tl.int32), 0)
        tl.store(live + block.to(tl.int64) * tiles + tile, is_live, mask=here)
        place = count + tl.cumsum(is_live, 0) - is_live
        tl.store(row_list + place, tile, mask=is_live > 0)
        count += tl.sum(is_live, 0)
    tl.store(row_count + block * tl.num_programs(0) + part, count)


@triton.jit
def _plan_proxies(live, proxy_list, proxy_count, blocks, tiles, BLOCK: tl.constexpr):
    """List the live row blocks of each tile of proxies, in order."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tile < tiles
    count = tl.zeros((BLOCK,), tl.int32)
    for block in range(0, blocks):
        is_live = tl.load(live + tl.cast(block, tl.int64) * tiles + tile, mask=mask, other=0)
        at = tile.to(tl.int64) * blocks + count
        tl.store(proxy_list + at, tl.zeros_like(count) + block, mask=is_live > 0)
        count += is_live
    tl.store(proxy_count + tile, count, mask=mask)


@triton.jit
def _score_gradients(
    x, x2, x_plane, linear, spread, proxy_plane, bias, own, labels, temperature,
    grad, partial, pair_max, pair_lse, common, live,
    linear_grad, spread_grad, grad_plane, bias_grad, temperature_grad,
    first_tile, width, R, B, P, D, PITCH,
    NCA: tl.constexpr, EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr, GRAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/d(x . linear) and dL/d(x^2 . spread) of a live tile, and its sums for bias and T."""
    DTYPE: tl.constexpr = grad.dtype.element_ty
    block, local0 = tl.program_id(0), tl.program_id(1) * PROXIES
    tile = first_tile + tl.program_id(1)
    tile_at = block.to(tl.int64) * tl.cdiv(P, PROXIES) + tile
    if tl.load(live + tile_at) == 0:
        return
    row0, proxy0 = block * ROWS, tile * PROXIES
    rows, j = row0 + tl.arange(0, ROWS), proxy0 + tl.arange(0, PROXIES)
    t = load_temperature(temperature)
    rate = (1 / t * LOG2E).to(DTYPE)
    z, num, inverse_length = score_tile(
        x, x2, x_plane, linear, spread, proxy_plane, bias, row0, local0, proxy0, P, D, PITCH,
        EXACT, PROJECTION, PLANES, SPREAD_PLANES, ROWS, PROXIES, DEPTH, DTYPE,
    )  # fmt: skip
    mask = rows < R
    inside = mask[:, None] & (j < P)[None, :]
    images = rows % B
    if NCA:
        shift = tl.load(common)
        maximum, lse = image_constants((partial, partial + B), shift, t, images, mask, DTYPE)
        own_partial = partial + 2 * B, partial + 3 * B
        own_max, own_lse = image_constants(own_partial, shift, t, images, mask, DTYPE)
        label = known_label(labels, images, mask, P)
        own_z = tl.load(own + rows, mask=mask, other=0.0)
        own_max64 = tl.load(partial + 2 * B + images, mask=mask, other=0.0)
        max64 = tl.load(partial + images, mask=mask, other=0.0)
        log_ratio = tl.load(partial + 3 * B + images, mask=mask, other=0.0) - tl.load(
            partial + B + images, mask=mask, other=0.0
        )
        # the own proxy's two terms are w and w exp(-loss); their difference without cancellation
        gap = (tl.exp((own_max64 - max64) / t + log_ratio) - 1).to(DTYPE)
        own_weight = tl.exp2((own_z - own_max) * rate - own_lse) * gap
        weight = tl.exp2((z - maximum[:, None]) * rate - lse[:, None])
        at_home = j[None, :] == label[:, None]
        weight = tl.where(at_home, own_weight[:, None], weight)
        # an image's dL/d(z / T) sum to 0, so that z may be shifted by any constant of the image
        centered = tl.where(at_home, own_z[:, None], z) - maximum[:, None]
        scale = tl.load(grad + images, mask=mask, other=0.0).to(tl.float64) / t
        unknown = own_max64 == -float("inf")
        scale = tl.where(unknown, float("nan"), scale).to(DTYPE)[:, None]
        g = tl.where(inside, weight * scale, 0.0)
        centered = tl.where(inside, centered, 0.0)
    else:
        at = images.to(tl.int64)[:, None] * P + j[None, :]
        maximum = tl.load(pair_max + at, mask=inside, other=float("inf"))  # a weight of 0
        lse = tl.load(pair_lse + at, mask=inside, other=0.0)
        centered = z - maximum
        g = tl.exp2(centered * rate - lse * LOG2E)
        centered = tl.where(inside, centered, 0.0)
        g *= tl.load(grad + at, mask=inside, other=0.0) * (1 / t).to(DTYPE)
    tl.store(temperature_grad + tile_at, tl.sum(tl.sum(g * centered, 1).to(tl.float64), 0))
    columns = local0 + tl.arange(0, PROXIES)
    tl.store(bias_grad + block.to(tl.int64) * width + columns, tl.sum(g, 0))
    linear_grad += row0.to(tl.int64) * width
    spread_grad += row0.to(tl.int64) * width
    at = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    if PROJECTION or EXACT:
        slope = tl.zeros((ROWS, PROXIES), DTYPE)
        if PROJECTION:
            slope += num
        if EXACT:
            slope += D
        by_delta = -0.5 * g * slope * (inverse_length * inverse_length)
        store_planes(by_delta, spread_grad, at, grad_plane, GRAD_PLANES)
    if PROJECTION:
        g *= inverse_length
    store_planes(g, linear_grad, at, grad_plane, GRAD_PLANES)


@triton.jit
def _sample_gradients(
    linear_grad, spread_grad, grad_plane, linear, spread, proxy_plane, samples, out,
    row_list, row_count, part, parts, chunk, first_tile, width, R, D, PITCH,
    SPREAD: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add this chunk's linear_grad @ linear + 2 x (spread_grad @ spread) to slab `split`."""
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
    coefficients = k[:, None] * PITCH + c[None, :]
    by_linear = tl.zeros((ROWS, COLUMNS), DTYPE)
    by_spread = tl.zeros((ROWS, COLUMNS), DTYPE)
    for step in range(first * STEPS, last * STEPS):
        tile = tl.load(row_list + step // STEPS) - first_tile
        local = tile * PROXIES + (step % STEPS) * DEPTH
        first_b = local.to(tl.int64) * PITCH
        a, b = linear_grad + local + weights, linear + first_b + coefficients
        by_linear = add_product(by_linear, a, grad_plane, b, proxy_plane, PLANES)
        if SPREAD:
            a, b = spread_grad + local + weights, spread + first_b + coefficients
            by_spread = add_product(by_spread, a, grad_plane, b, proxy_plane, PLANES)
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
    bias_slope, proxy_list, proxy_count, d_loc, d_concentration,
    first_tile, blocks, width, P, D, PITCH,
    PROJECTION: tl.constexpr, SPREAD: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """linear_grad^T @ x and spread_grad^T @ x^2, and from them the parameters' gradients.

    The gradient through kbar amounts to by_bias / kappa: the rest cancels on the unit sphere, with
    any options.
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
    values = k[:, None] * PITCH + c[None, :]
    by_linear = tl.zeros((PROXIES, COLUMNS), DTYPE)
    by_spread = tl.zeros((PROXIES, COLUMNS), DTYPE)
    for step in range(0, count * STEPS):
        row0 = (tl.load(proxy_list + step // STEPS) * ROWS + (step % STEPS) * DEPTH).to(tl.int64)
        a, b = linear_grad + row0 * width + weights, x + row0 * PITCH + values
        by_linear = add_product(by_linear, a, grad_plane, b, x_plane, PLANES)
        if SPREAD:
            a, b = spread_grad + row0 * width + weights, x2 + row0 * PITCH + values
            by_spread = add_product(by_spread, a, grad_plane, b, x_plane, PLANES)
    by_bias = tl.zeros((PROXIES,), DTYPE)
    for n in range(0, count):
        block = tl.load(proxy_list + n).to(tl.int64)
        by_bias += tl.load(bias_grad + block * width + local0 + j)
    proxies = tile * PROXIES + j
    at = tile.to(tl.int64) * PROXIES * D + (j[:, None] * D + c[None, :])
    mask = (proxies < P)[:, None] & (c < D)[None, :]
    mu = tl.load(loc + at, mask=mask, other=0.0)
    kappa = tl.load(concentration + at, mask=mask, other=1.0)
    hi, lo, inverse = load_scales(kbar, proxies, proxies < P, DTYPE)
    _, _, excess = proxy_coefficients(mu, kappa, hi[:, None], lo[:, None], inverse[:, None], False)
    by_length = tl.load(bias_slope + proxies, mask=proxies < P, other=0.0).to(DTYPE) * by_bias
    ratio = 1 + excess
    into_loc, into_kappa = by_linear * kappa, by_linear * mu
    if PROJECTION:
        into_loc, into_kappa = into_loc * ratio, into_kappa * ratio * 2
    if SPREAD:
        into_kappa += by_spread * ratio * (2 * inverse[:, None])
    into_loc += by_length[:, None] * kappa * kappa * mu
    into_kappa += by_bias[:, None] / kappa + by_length[:, None] * kappa * mu * mu
    tl.store(d_loc + at, into_loc, mask=mask)
    tl.store(d_concentration + at, into_kappa, mask=mask)


def backward(
    p: Problem,
    grad: Tensor,
    saved: Saved,
    labels: Tensor | None = None,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both ops; log_ppk has no labels and, as any pair may matter, no dead tiles."""
    R, B, P, D, tile = p.R, p.B, p.P, p.D, p.tile
    samples, new = p.samples, p.samples.new_empty
    d_loc, d_concentration = torch.empty_like(p.loc), torch.empty_like(p.concentration)
    if B == 0:
        zero = torch.zeros_like(p.temperature)
        return torch.empty_like(samples), d_loc.zero_(), d_concentration.zero_(), zero
    nca = labels is not None
    if labels is None or partial is None:
        labels = partial = saved.common  # never read
    # (d bias / d|K mu|) / |K mu|
    bias_slope = special.log_normalizer_derivative(saved.length, D, 1) / saved.length.clamp(
        min=1e-150
    )
    if not p.options.exact:
        bias_slope = bias_slope - saved.length**-2
    parts, columns = ceil_div(p.tiles, p.chunk), ceil_div(D, tile.columns)
    splits = min(p.chunk, 2 * p.processors // (p.blocks * columns))
    splits = max(1, min(splits, p.options.workspace // 4 // (R * D * p.dtype.itemsize)))
    slabs = new(splits, *samples.shape)
    weights, grad_plane = p.empty_planes(p.grad_planes, p.rows, p.width), p.rows * p.width
    bias_grad = new(p.blocks, p.width)
    temperature_grad = samples.new_zeros(p.blocks, p.tiles, dtype=torch.float64)
    live, proxy_list = new(2, p.blocks * p.tiles, dtype=torch.int32)
    row_list = new(p.blocks, parts, p.chunk, dtype=torch.int32)
    row_count = new(p.blocks, parts, dtype=torch.int32)
    proxy_count = new(p.tiles, dtype=torch.int32)
    known_maxima = nca and saved.maxima.numel() > 0  # else every tile is live
    span = span_of(p.tiles, R, 4 * saved.maxima.numel())  # the forward's, from the size of maxima
    x_plane, proxy_plane = p.rows * p.pitch, p.width * p.pitch
    product = {"SPREAD": p.spreads, "PLANES": p.grad_planes}
    product |= {"ROWS": tile.rows, "PROXIES": tile.proxies}
    product |= {"COLUMNS": tile.columns, "DEPTH": tile.depth}
    plan, sizes = (live, row_list, row_count), (R, B, P, p.chunk, span, dead_log2(p.dtype, p.N * P))
    p.launch(
        _plan_rows,
        (parts, p.blocks),
        (saved.maxima, labels, partial, saved.common, p.temperature, *plan, *sizes),
        {"NCA": known_maxima, "ROWS": tile.rows, "PROXIES": tile.proxies, "BLOCK": 32},
    )
    arguments = live, proxy_list, proxy_count, p.blocks, p.tiles
    p.launch(_plan_proxies, (ceil_div(p.tiles, BLOCK),), arguments, {"BLOCK": BLOCK})
    for part in range(parts):
        first = part * p.chunk
        here = min(p.chunk, p.tiles - first)
        p.split_proxies(saved.kbar, first)
        values = saved.bias, saved.own, labels, p.temperature, grad, partial, saved.own
        scores = *p.score_arguments, *values, saved.maxima, saved.common, live
        results = *weights, grad_plane, bias_grad, temperature_grad
        p.launch(
            _score_gradients,
            (p.blocks, here),
            (*scores, *results, first, p.width, R, B, P, D, p.pitch),
            {**p.score_constants, "NCA": nca, "GRAD_PLANES": p.grad_planes},
            tile,
        )
        operands = *weights, grad_plane, *p.proxy_planes, proxy_plane
        where = row_list, row_count, part, parts, p.chunk, first
        p.launch(
            _sample_gradients,
            (p.blocks, columns, splits),
            (*operands, samples, slabs, *where, p.width, R, D, p.pitch),
            product,
            tile,
        )
        operands = *weights, grad_plane, *p.samples_planes, x_plane
        proxies = bias_grad, p.loc, p.concentration, saved.kbar, bias_slope
        results = proxy_list, proxy_count, d_loc, d_concentration
        p.launch(
            _proxy_gradients,
            (here, columns),
            (*operands, *proxies, *results, first, p.blocks, p.width, P, D, p.pitch),
            {**product, "PROJECTION": p.options.projection, "PLANES": p.proxy_grad_planes},
            tile,
        )
    d_samples = slabs[0] if splits == 1 else slabs.sum(0)
    total = temperature_grad.sum()
    if not nca:  # add back the maximum that centred each pair's score
        total += (grad.flatten() * saved.own).sum(dtype=torch.float64) / p.temperature
    d_temperature = -total / p.temperature.double()
    return d_samples, d_loc, d_concentration, d_temperature.to(p.dtype)
