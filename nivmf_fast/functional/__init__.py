"""The public functions: what they compute, what they accept, and the errors they raise.

B images with N samples each, P proxies, dimension D, temperature T. Every function takes float32
or float64 tensors of any strides; half-precision inputs are converted to, and give, float32.
"""

from nivmf_fast import autograd  # noqa: F401  (defines the ops and their gradients)
from nivmf_fast.functional.proxies import log_ppk, proxy_nca, proxy_nca_shard
from nivmf_fast.functional.vmf import (
    log_normalizer_derivative,
    vmf_kl,
    vmf_log_normalizer,
    vmf_log_normalizer_difference,
    vmf_log_ppk,
    vmf_mean_resultant_length,
    vmf_rsample,
)

__all__ = [
    "log_normalizer_derivative",
    "log_ppk",
    "proxy_nca",
    "proxy_nca_shard",
    "vmf_kl",
    "vmf_log_normalizer",
    "vmf_log_normalizer_difference",
    "vmf_log_ppk",
    "vmf_mean_resultant_length",
    "vmf_rsample",
]
