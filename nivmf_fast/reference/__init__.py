"""The whole model in eager PyTorch: the specification that every kernel is tested against.

Runs on any device in float32 and float64; nothing is optimised for speed or approximated.
B images, N samples each, P proxies, dimension D, temperature T. `model` holds the model,
`sampler` and `random` the draws, `operators` the backend named "reference".
"""

from nivmf_fast.reference.model import (
    Proxies,
    log_ppk,
    prepare_proxies,
    proxy_nca,
    score,
    vmf_kl,
    vmf_log_ppk,
)
from nivmf_fast.reference.operators import (
    log_ppk_backward,
    log_ppk_forward,
    proxy_nca_backward,
    proxy_nca_forward,
)
from nivmf_fast.reference.random import philox, uniform
from nivmf_fast.reference.sampler import (
    MAX_ATTEMPTS,
    Draw,
    vmf_dw_dconcentration,
    vmf_rsample,
    vmf_rsample_backward,
)

__all__ = [
    "MAX_ATTEMPTS",
    "Draw",
    "Proxies",
    "log_ppk",
    "log_ppk_backward",
    "log_ppk_forward",
    "philox",
    "prepare_proxies",
    "proxy_nca",
    "proxy_nca_backward",
    "proxy_nca_forward",
    "score",
    "uniform",
    "vmf_dw_dconcentration",
    "vmf_kl",
    "vmf_log_ppk",
    "vmf_rsample",
    "vmf_rsample_backward",
]
