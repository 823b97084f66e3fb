"""The `partial` of the op `proxy_nca`, float64 [4, B]: an image's softmax over a range of proxies.

Rows: the maximum of the raw scores and log sum exp((score - maximum) / T) over the range; then the
same over the image's own proxy, or -inf and 0 if that is outside the range.
"""

import math

import torch
from torch import Tensor


def loss_of_partial(partial: Tensor, temperature: Tensor) -> Tensor:
    """-s_i,y_i + log sum_j exp s_ij, [B]; NaN for an image whose own proxy was in no range."""
    maximum, lse, own_maximum, own_lse = partial
    loss = (maximum - own_maximum) / temperature.double() + (lse - own_lse)
    return torch.where(own_maximum > -math.inf, loss, math.nan).to(temperature.dtype)


def combine_partials(partials: list[Tensor], temperature: Tensor) -> Tensor:
    """Combine the partials of ranges of proxies, in this order, into that of all of them."""
    parts = torch.stack(partials)  # [ranges, 4, B]
    maxima = parts[:, ::2].amax(0)  # [2, B]
    shift = torch.where(maxima > -math.inf, maxima, 0)
    logits = (parts[:, ::2] - shift) / temperature.double() + parts[:, 1::2]
    lses = torch.where(maxima > -math.inf, torch.logsumexp(logits, 0), 0)
    return torch.stack((maxima, lses), 1).flatten(0, 1)
