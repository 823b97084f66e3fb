"""Kullback-Leibler divergences, registered with torch.distributions.kl_divergence."""

import torch
from torch import Tensor
from torch.distributions import register_kl

from nivmf_fast import special
from nivmf_fast.distributions.uniform import HypersphericalUniform
from nivmf_fast.distributions.von_mises_fisher import VonMisesFisher
from nivmf_fast.functional import vmf_kl


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(batch), q.expand(batch)
    flat = [t for d in (p, q) for t in (d.loc.reshape(-1, d.dim), d.concentration.reshape(-1))]
    return vmf_kl(*flat, pairwise=False).view(batch)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_vmf_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    k = p.concentration.double()
    g = special.vmf_log_normalizer(k, p.dim, constants=False)
    kl = k * special.vmf_mean_resultant_length(k, p.dim) + g
    return kl.to(p.concentration.dtype).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, VonMisesFisher)
def _kl_uniform_vmf(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    kl = -special.vmf_log_normalizer(q.concentration, q.dim, constants=False)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
