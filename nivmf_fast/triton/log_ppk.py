"""The ops log_ppk and proxy_nca with their backwards, as launches of Triton kernels.

s_ij = log (1/N) sum_s exp(z_sij / T), loss_i = -s_i,y_i + log sum_j exp s_ij, one chunk of proxies
after another; every sum has a fixed order. Arguments and results are those of the ops in
`_schemas.py`, contiguous. Specification: `reference/operators.py`. Design:
docs/design/log_ppk_triton.md.
"""

import torch
from torch import Tensor

from nivmf_fast._schemas import Options
from nivmf_fast.triton.log_ppk_backward import backward
from nivmf_fast.triton.log_ppk_forward import nca_combine, nca_forward, own_scores, ppk_forward
from nivmf_fast.triton.log_ppk_prepare import BAND, BLOCK, Problem, ceil_div, view


def proxy_nca(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `proxy_nca`: losses [B], partial [4, B], saved."""
    with torch.cuda.device_of(samples):
        p = Problem(samples, loc, concentration, temperature, options, nca=True, backward=False)
        R, B, P, D = p.R, p.B, p.P, p.D
        buffer, saved = p.allocate(R, options.keep * ceil_div(p.tiles, p.span) * R)
        losses = samples.new_empty(B)
        partial = samples.new_empty(4, B, dtype=torch.float64)
        if B == 0:
            return losses, partial, buffer
        p.launch(
            own_scores,
            (ceil_div(R, BAND),),
            (samples, loc, concentration, saved.kbar, saved.bias, labels, saved.own, R, B, P, D),
            {**p.form, "ROWS": BAND, "DEPTH": BLOCK},
        )
        run = ceil_div(ceil_div(p.chunk, max(1, 2 * p.processors // p.blocks)), p.span) * p.span
        splits = ceil_div(p.chunk, run)
        row_max, row_sum = samples.new_empty(2, splits, R)
        for first in range(0, p.tiles, p.chunk):
            last = min(first + p.chunk, p.tiles)
            p.split_proxies(saved.kbar, first)
            results = row_max, row_sum, saved.maxima
            sizes = first, last, run, p.span, R, B, P, D, p.pitch
            p.launch(
                nca_forward,
                (p.blocks, splits),
                (*p.score_arguments, saved.bias, saved.own, labels, temperature, *results, *sizes),
                {**p.score_constants, "KEEP": options.keep},
                p.tile,
            )
        outputs = losses, partial, p.N, B, splits
        p.launch(
            nca_combine,
            (ceil_div(B, BAND),),
            (row_max, row_sum, saved.own, saved.common, temperature, *outputs),
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
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `proxy_nca_backward`: gradients in samples, loc, concentration, temperature."""
    with torch.cuda.device_of(samples):
        p = Problem(samples, loc, concentration, temperature, options, nca=True, backward=True)
        return backward(p, grad, view(saved, p.P, p.R, p.dtype), labels, partial)


def log_ppk(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `log_ppk`: s [B, P], saved, the common bias."""
    with torch.cuda.device_of(samples):
        p = Problem(samples, loc, concentration, temperature, options, nca=False, backward=False)
        buffer, saved = p.allocate(p.B * p.P, p.B * p.P)
        similarity = samples.new_empty(p.B, p.P)
        for first in range(0, p.tiles if p.B else 0, p.chunk):
            p.split_proxies(saved.kbar, first)
            results = similarity, saved.own, saved.maxima
            sizes = first, p.N, p.B, p.P, p.D, p.pitch
            p.launch(
                ppk_forward,
                (ceil_div(p.B, p.tile.rows), min(p.chunk, p.tiles - first)),
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
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `log_ppk_backward`: gradients in samples, loc, concentration, temperature."""
    with torch.cuda.device_of(samples):
        p = Problem(samples, loc, concentration, temperature, options, nca=False, backward=True)
        return backward(p, grad, view(saved, p.P, p.B * p.P, p.dtype))
