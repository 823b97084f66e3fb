"""Triton kernels, one file per op; they take and return what the op contract says, contiguous."""

from nivmf_fast.triton.log_ppk import (
    log_ppk,
    log_ppk_backward,
    proxy_nca,
    proxy_nca_backward,
    saved_like,
)
from nivmf_fast.triton.vmf_sampler import vmf_rsample, vmf_rsample_backward

__all__ = [
    "log_ppk",
    "log_ppk_backward",
    "proxy_nca",
    "proxy_nca_backward",
    "saved_like",
    "vmf_rsample",
    "vmf_rsample_backward",
]
