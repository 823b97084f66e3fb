"""von Mises-Fisher distributions for PyTorch, and probabilistic proxy losses built on them."""

from nivmf_fast._backends import backends, which_backend
from nivmf_fast.distributions import (
    HypersphericalUniform,
    NonIsotropicVonMisesFisher,
    VonMisesFisher,
)
from nivmf_fast.functional import (
    log_ppk,
    proxy_nca,
    vmf_kl,
    vmf_log_normalizer,
    vmf_log_normalizer_difference,
    vmf_log_ppk,
    vmf_mean_resultant_length,
    vmf_rsample,
)
from nivmf_fast.losses import (
    CosineProxyLoss,
    ELNivMFLoss,
    EuclideanProxyLoss,
    KLVMFLoss,
    NivMFLoss,
    VMFProductKernelLoss,
)

__version__ = "0.1.0"

__all__ = [
    "CosineProxyLoss",
    "ELNivMFLoss",
    "EuclideanProxyLoss",
    "HypersphericalUniform",
    "KLVMFLoss",
    "NivMFLoss",
    "NonIsotropicVonMisesFisher",
    "VMFProductKernelLoss",
    "VonMisesFisher",
    "backends",
    "log_ppk",
    "proxy_nca",
    "vmf_kl",
    "vmf_log_normalizer",
    "vmf_log_normalizer_difference",
    "vmf_log_ppk",
    "vmf_mean_resultant_length",
    "vmf_rsample",
    "which_backend",
]
