"""Distributions on the unit sphere, in the form of torch.distributions."""

from nivmf_fast.distributions import kl  # noqa: F401 (registers the divergences)
from nivmf_fast.distributions.non_isotropic import NonIsotropicVonMisesFisher
from nivmf_fast.distributions.sphere import unit_vector
from nivmf_fast.distributions.uniform import HypersphericalUniform
from nivmf_fast.distributions.von_mises_fisher import VonMisesFisher

__all__ = [
    "HypersphericalUniform",
    "NonIsotropicVonMisesFisher",
    "VonMisesFisher",
    "unit_vector",
]
