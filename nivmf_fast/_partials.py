"""What an image keeps of its softmax over proxies: the float64 [4, B] of the op `proxy_nca`.

Rows: maximum of the raw scores and log sum exp of (score - maximum) / T, over the proxies at hand;
then the same over the image's own proxy, -inf and 0 if that is not among them.
"""

import math

import torch
from torch import Tensor


def loss_of_partial(partial: Tensor, temperature: Tensor) -> Tensor:
    """-s_i,y_i + log sum_j exp s_ij, [B]; NaN for an image whose own proxy was not there."""
    top, rest, own_top, own_rest = partial
    loss = (top - own_top) / temperature.double() + (rest - own_rest)
    return torch.where(own_top > -math.inf, loss, math.nan).to(temperature.dtype)


def combine_partials(partials: list[Tensor], temperature: Tensor) -> Tensor:
    """The [4, B] of all proxies from those of contiguous ranges of them, in this order."""
    parts = torch.stack(partials)  # [ranges, 4, B]
    tops = parts[:, ::2].amax(0)  # [2, B]
    shift = torch.where(tops > -math.inf, tops, 0)
    logits = (parts[:, ::2] - shift) / temperature.double() + parts[:, 1::2]
    rests = torch.where(tops > -math.inf, torch.logsumexp(logits, 0), 0)
    return torch.stack((tops, rests), 1).flatten(0, 1)
