"""Other ways to draw [n, B, D] von Mises-Fisher samples, as baselines of the library's sampler.

All draw from the exact law, which `moment_error` checks before they are timed.
"""

import scipy.stats
import torch
from torch import Tensor

from nivmf_fast import VonMisesFisher, vmf_mean_resultant_length


def scipy_loop(loc: Tensor, concentration: Tensor, n: int) -> Tensor:
    """scipy's vonmises_fisher, which takes one location at a time."""
    columns = [
        torch.from_numpy(scipy.stats.vonmises_fisher(mu, k).rvs(n).astype("float32"))
        for mu, k in zip(
            torch.nn.functional.normalize(loc.cpu().double(), dim=-1).numpy(),
            concentration.tolist(),
            strict=True,
        )
    ]
    return torch.stack(columns, dim=1)


def vectorised(loc: Tensor, concentration: Tensor, n: int) -> Tensor:
    """Plain PyTorch: Wood's rejection on the whole batch until nothing is left, and a Householder
    reflection of the pole onto loc."""
    w = _wood(concentration.expand(n, -1), loc.shape[-1])
    tangent = torch.randn(n, *loc.shape, device=loc.device, dtype=loc.dtype)[..., 1:]
    tangent = torch.nn.functional.normalize(tangent, dim=-1)
    s = (1 - w * w).clamp(min=0).sqrt()
    at_pole = torch.cat([w[..., None], s[..., None] * tangent], dim=-1)
    pole = torch.zeros_like(loc)
    pole[:, 0] = 1
    mirror = torch.nn.functional.normalize(pole - loc, dim=-1)
    return at_pole - 2 * (at_pole * mirror).sum(-1, keepdim=True) * mirror


def per_image_loop(loc: Tensor, concentration: Tensor, n: int) -> Tensor:
    """One image at a time, as research code commonly does, with a host synchronisation for every
    round of rejections."""
    columns = [
        vectorised(mu[None], k[None], n)[:, 0] for mu, k in zip(loc, concentration, strict=True)
    ]
    return torch.stack(columns, dim=1)


def _wood(concentration: Tensor, dim: int) -> Tensor:
    m = dim - 1
    b = m / (2 * concentration + torch.hypot(2 * concentration, concentration.new_tensor(m)))
    x0 = (1 - b) / (1 + b)
    c = concentration * x0 + m * torch.log1p(-x0 * x0)
    beta = torch.distributions.Beta(
        concentration.new_tensor(m / 2), concentration.new_tensor(m / 2)
    )
    w = torch.zeros_like(concentration)
    open_ = torch.ones_like(concentration, dtype=torch.bool)
    while bool(open_.any()):  # the synchronisation
        z = beta.sample(concentration.shape)
        proposal = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        u = torch.rand_like(concentration)
        accept = concentration * proposal + m * torch.log1p(-x0 * proposal) - c >= u.log()
        w = torch.where(open_ & accept, proposal, w)
        open_ = open_ & ~accept
    return w


SAMPLERS = {
    "vectorised PyTorch, forward only": vectorised,
    "per-image loop, forward only": per_image_loop,
    "scipy, one image at a time": scipy_loop,
}


def moment_error(samples: Tensor, loc: Tensor, concentration: Tensor) -> float:
    """Error of the mean cosine of all samples, in standard errors of the law."""
    w = (samples.double() * loc.double()).sum(-1)
    law = VonMisesFisher(loc.double(), concentration.double(), validate_args=False)
    mean = (law.mean * loc.double()).sum(-1)
    k = concentration.double().requires_grad_()
    (variance,) = torch.autograd.grad(vmf_mean_resultant_length(k, loc.shape[-1]).sum(), k)
    return float((w - mean).sum().abs() / (len(w) * variance.sum()).sqrt())
