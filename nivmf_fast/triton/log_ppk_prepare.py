"""Sizes, tiles and memory of a log-PPK call, and the kernels that prepare its operands.

In: samples [N, B, D], loc and concentration [P, D], `Options`. Out: a `Problem` with the planes of
x and x^2 and, for one chunk after another, of linear and spread; the buffer saved for the backward.
Called by the launchers in log_ppk.py; `saved_like` by the fake kernels.
Design: docs/design/log_ppk_triton.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nivmf_fast import special
from nivmf_fast._schemas import PRECISIONS, Options
from nivmf_fast.triton.log_ppk_device import load_scales, proxy_coefficients, store_planes


class Tile(NamedTuple):
    """Sizes of a kernel's tile, and how to compile it."""

    rows: int
    proxies: int
    columns: int  # of the gradient products
    depth: int  # of one step of a product
    warps: int
    stages: int
    registers: int | None = None  # a bound, where ptxas would rather spill than use more


# (architecture, mode): tile. None of these spills (the tests compile them); larger ones do on
# sm_80, where Triton gives every warp all columns of a tile. log_ppk holds two more numbers per
# pair.
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
# 3e-3. An image's weights sum to 0, so that the third product cancels where proxies are alike.
PLANES = {"float32": (3, 3, 3, 2), "fast": (2, 3, 2, 2), "float64": (1, 1, 1, 1)}
L2_BYTES = 32 << 20  # of planes and weights of one chunk of proxies
BAND, BLOCK = 16, 128  # rows (or proxies, images) and columns of the small kernels
PAD = 64  # the pitch of planes is a multiple of it: of every depth and number of columns above


@functools.cache
def machine(device: torch.device) -> tuple[str, int, torch.dtype]:
    """Architecture in `TILES`, number of multiprocessors, and the type of a plane."""
    if device.type != "cuda":  # Triton's interpreter cannot multiply bfloat16
        return "sm_80", 4, torch.float32
    properties = torch.cuda.get_device_properties(device)
    architecture = "sm_90" if properties.major in (9, 10) else "sm_80"
    return architecture, properties.multi_processor_count, torch.bfloat16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def compile_options(tile: Tile | None) -> dict[str, Any]:
    options: dict[str, Any] = {"enable_fp_fusion": True}  # the default depends on the version
    if tile:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    return options


class Saved(NamedTuple):
    """The data saved for the backward, as views of one buffer of bytes."""

    common: Tensor  # [], mean bias
    kbar: Tensor  # [P], geometric mean of the concentrations
    length: Tensor  # [P], |K mu|
    bias: Tensor  # [P], the part of the score that depends on no sample, less common
    own: Tensor  # [R], scores at the own proxies; for log_ppk: maxima [B P]
    maxima: Tensor  # [.. R], of the tiles of each row, if kept; for log_ppk: log sums [B P]


def _scalars(P: int) -> int:
    """Bytes of the scalars: four rows of float64, each a multiple of 16 bytes long."""
    return 4 * 8 * (P + P % 2)


def view(buffer: Tensor, P: int, own: int, dtype: torch.dtype) -> Saved:
    """View a buffer of `Problem.allocate`; `own` is the size of that field."""
    scalars = buffer[: _scalars(P)].view(torch.float64).view(4, -1)
    values = buffer[_scalars(P) :].view(dtype)
    kbar, length, bias = scalars[:3, :P]
    return Saved(scalars[3, 0], kbar, length, bias, values[:own], values[own:])


def _configuration(samples: Tensor, options: Options, nca: bool) -> tuple[str, Tile]:
    """The key in `PLANES`, and the tile."""
    double = samples.dtype == torch.float64
    mode = "float64" if double else PRECISIONS[options.precision]
    key = mode if nca or mode == "float64" else "log_ppk"
    return mode, TILES[machine(samples.device)[0], key]


def span_of(tiles: int, row_bytes: int, workspace: int) -> int:
    """Tiles that share a maximum: the least power of 2 that keeps maxima in workspace / 4."""
    span = 1
    while span < tiles and ceil_div(tiles, span) * row_bytes > workspace // 4:
        span *= 2
    return span


def _chunk_of(fitting: int, span: int) -> int:
    """Tiles of a chunk, at most `fitting`: whole spans, or an equal part of one."""
    return fitting // span * span or 1 << (fitting.bit_length() - 1)


def saved_like(op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
    """A tensor shaped as the one that `op` saves for its backward, for fake kernels."""
    (N, B, _), P, size = samples.shape, len(loc), samples.element_size()
    count = 2 * B * P
    if op == "proxy_nca":
        tiles = ceil_div(P, _configuration(samples, options, True)[1].proxies)
        span = span_of(tiles, N * B * size, options.workspace)
        count = N * B * (1 + options.keep * ceil_div(tiles, span))
    return samples.new_empty(_scalars(P) + count * size, dtype=torch.uint8)


class Problem:
    """Inputs, sizes and options of a call, and the arrays that its products read.

    Everything follows from shapes, options and the device; the host reads no values.
    """

    def __init__(
        self,
        samples: Tensor,
        loc: Tensor,
        concentration: Tensor,
        temperature: Tensor,
        options: Options,
        *,
        nca: bool,
        backward: bool,
    ) -> None:
        self.samples, self.loc, self.concentration = samples, loc, concentration
        self.temperature, self.options, self.dtype = temperature, options, samples.dtype
        self.N, self.B, self.D = samples.shape
        self.P, self.R = len(loc), self.N * self.B
        mode, self.tile = _configuration(samples, options, nca)
        _, self.processors, plane_type = machine(samples.device)
        self.plane_type = self.dtype if mode == "float64" else plane_type
        self.linear_planes, self.planes, self.grad_planes, self.proxy_grad_planes = PLANES[mode]
        self.blocks = ceil_div(self.R, self.tile.rows)
        self.tiles = ceil_div(self.P, self.tile.proxies)
        # padded sizes: one block more, as log_ppk's row blocks may begin at any row
        self.rows = (self.blocks + 1) * self.tile.rows
        self.pitch = ceil_div(self.D, PAD) * PAD
        # tiles of a chunk: as many as the L2 and half of the workspace can hold the planes of
        products = 1 + self.spreads
        size = self.plane_type.itemsize
        column = products * self.planes * self.pitch * size
        column += products * self.grad_planes * self.rows * size * backward
        fitting = min(L2_BYTES, options.workspace // 2) // (column * self.tile.proxies)
        self.span = 1  # of the maxima that the forward keeps: tiles that share one
        if nca and options.keep and not backward:
            self.span = span_of(self.tiles, self.R * self.dtype.itemsize, options.workspace)
        self.chunk = min(self.tiles, _chunk_of(max(1, fitting), self.span))
        self.width = self.chunk * self.tile.proxies
        self.samples_planes = self.empty_planes(self.planes, self.rows, self.pitch)
        self.proxy_planes = self.empty_planes(self.planes, self.width, self.pitch)
        self.launch(
            _split_samples,
            (self.rows // BAND, self.pitch // PAD),
            (samples, *self.samples_planes, self.R, self.D, self.pitch, self.rows * self.pitch),
            {"SPREAD": products > 1, "PLANES": self.planes, "ROWS": BAND, "DEPTH": PAD},
        )

    def empty_planes(self, planes: int, rows: int, columns: int) -> Tensor:
        """[2, planes, rows, columns]: of x and x^2, of linear and spread, or of their gradients."""
        if not self.spreads:  # the second is never used
            one = self.samples.new_empty(1, planes, rows, columns, dtype=self.plane_type)
            return one.expand(2, -1, -1, -1)
        return self.samples.new_empty(2, planes, rows, columns, dtype=self.plane_type)

    def allocate(self, own: int, maxima: int) -> tuple[Tensor, Saved]:
        """Allocate the buffer to save, and compute the proxies' scalars in it."""
        size = _scalars(self.P) + (own + maxima) * self.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8, device=self.loc.device)
        saved = view(buffer, self.P, own, self.dtype)
        self.launch(
            _prepare,
            (ceil_div(self.P, BAND),),
            (self.loc, self.concentration, saved.kbar, saved.length, self.P, self.D),
            {"PROXIES": BAND, "DEPTH": BLOCK},
        )
        bias = special.log_normalizer_derivative(saved.length, self.D, 0)
        if not self.options.exact:
            bias = bias + self.D * saved.kbar.log() - saved.length.log()
        saved.common.copy_(bias.mean())
        torch.sub(bias, saved.common, out=saved.bias)
        return buffer, saved

    def split_proxies(self, kbar: Tensor, first_tile: int) -> None:
        """Fill `proxy_planes` with the chunk that begins at a tile."""
        arguments = self.loc, self.concentration, kbar, *self.proxy_planes
        sizes = first_tile * self.tile.proxies, self.P, self.D, self.pitch, self.width * self.pitch
        constants = {**self.form, "PLANES": self.planes, "ROWS": BAND, "DEPTH": PAD}
        grid = self.width // BAND, self.pitch // PAD
        self.launch(_split_proxies, grid, (*arguments, *sizes), constants)

    @staticmethod
    def launch(
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        tile: Tile | None = None,
    ) -> None:
        kernel[grid](*arguments, **constants, **compile_options(tile))

    @property
    def form(self) -> dict[str, bool]:
        return {"EXACT": self.options.exact, "PROJECTION": self.options.projection}

    @property
    def spreads(self) -> bool:
        """Whether a score contains the product with `spread`."""
        return self.options.exact or self.options.projection

    @property
    def score_arguments(self) -> tuple[Any, ...]:
        x_plane, proxy_plane = self.rows * self.pitch, self.width * self.pitch
        return *self.samples_planes, x_plane, *self.proxy_planes, proxy_plane

    @property
    def score_constants(self) -> dict[str, Any]:
        tile = {"ROWS": self.tile.rows, "PROXIES": self.tile.proxies, "DEPTH": self.tile.depth}
        planes = {"PLANES": self.linear_planes, "SPREAD_PLANES": self.planes}
        return {**self.form, **tile, **planes}


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
    samples, x, x2, R, D, PITCH, plane,
    SPREAD: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Planes of x and x^2; zeros beyond the last row and the last column."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    value = tl.load(samples + row * D + d, mask=(row < R) & (d < D), other=0.0)
    at = row * PITCH + d
    store_planes(value, x, at, plane, PLANES)
    if SPREAD:
        store_planes(value * value, x2, at, plane, PLANES)


@triton.jit
def _split_proxies(
    loc, concentration, kbar, linear, spread, proxy0, P, D, PITCH, plane,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Planes of a chunk's linear and spread; zeros beyond the last proxy and the last column."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    proxy = proxy0 + local
    hi, lo, inverse = load_scales(kbar, proxy, proxy < P, loc.dtype.element_ty)
    mask = (proxy < P)[:, None] & (d < D)
    at = proxy[:, None] * D + d
    mu = tl.load(loc + at, mask=mask, other=0.0)
    kappa = tl.load(concentration + at, mask=mask, other=0.0)
    weight, deviation, _ = proxy_coefficients(
        mu, kappa, hi[:, None], lo[:, None], inverse[:, None], PROJECTION
    )
    at = local[:, None] * PITCH + d
    store_planes(weight, linear, at, plane, PLANES)
    if EXACT or PROJECTION:
        store_planes(tl.where(mask, deviation, 0.0), spread, at, plane, PLANES)
