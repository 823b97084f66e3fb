"""Proxy losses for deep metric learning, as modules: `loss(embeddings, labels)`.

Every class has a proxy; a loss is the cross-entropy of an image's similarities to all proxies, or
a binomial deviance of them. The similarities of Kirchhof et al. (ECCV 2022) differ in the model of
an image and of a proxy:

    ELNivMFLoss           image vMF, proxy non-isotropic vMF: log-PPK over samples of the image
    VMFProductKernelLoss  both vMF: closed-form log-PPK (rho 1: EL-vMF, rho 0.5: B-vMF)
    KLVMFLoss             both vMF: minus the Kullback-Leibler divergence
    NivMFLoss             image a point, proxy non-isotropic vMF: log density
    EuclideanProxyLoss    minus the squared distance of scaled directions
    CosineProxyLoss       cosine

A vMF image has direction e / |e| and concentration |e| for its embedding e.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from nivmf_fast import special
from nivmf_fast._checks import check_options, require, require_int
from nivmf_fast._schemas import Normalizer, Precision
from nivmf_fast.functional import (
    log_ppk,
    proxy_nca,
    vmf_kl,
    vmf_log_ppk,
    vmf_rsample,
)
from nivmf_fast.proxy_loss import ProxyLoss, _Images


class _NonIsotropicLoss(ProxyLoss):
    """Base of the losses by log-PPK: of samples of the image or, here, of its direction."""

    ops: ClassVar[tuple[str, ...]] = ("proxy_nca",)
    isotropic = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        normalizer: Normalizer = "exact",
        projection: bool = True,
        temperature_outside: bool = False,
        precision: Precision = "float32",
        workspace: int | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        self.kernel_options: dict[str, Any] = {
            "normalizer": normalizer,
            "projection": projection,
            "temperature_outside": temperature_outside,
            "precision": precision,
            "workspace": workspace,
            "backend": backend,
        }
        check_options(normalizer, precision, workspace)

    def _samples(self, images: _Images) -> Tensor:
        return images.loc[None]

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        samples, proxies, T = self._samples(images), self._proxies(subset), self.temperature
        # In float64, because a large constant is subtracted. `constants=False` would also drop the
        # terms common to all proxies that depend on their concentrations: a softmax cancels them,
        # but a deviance compares s_ij with a threshold.
        s = log_ppk(samples.double(), *proxies, T, **self.kernel_options)
        uniform = special.log_uniform_density(self.embedding_dim)
        return (s - uniform / T.double()).to(samples.dtype)

    def _losses(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        samples = self._samples(images)
        proxies = self._proxies(subset)
        return proxy_nca(samples, *proxies, local_labels, self.temperature, **self.kernel_options)


class ELNivMFLoss(_NonIsotropicLoss):
    """Expected-likelihood loss of vMF images and non-isotropic vMF proxies (EL-nivMF).

    s_ij = log (1/N) sum_s exp(log p_j(x_is) / T),  x_is ~ vMF(e_i / |e_i|, |e_i|)

    Args:
        num_classes, embedding_dim, concentration, temperature, ...: see `ProxyLoss`.
        n_samples: N.
        normalizer, projection, temperature_outside, precision, workspace, backend: see `log_ppk`.

    Source: Kirchhof et al., ECCV 2022 (arXiv 2207.03784).

    Example:
        >>> loss = ELNivMFLoss(num_classes=100, embedding_dim=64, n_samples=5)
        >>> value = loss(torch.randn(8, 64), torch.arange(8))
        >>> value.backward()
    """

    ops = ("vmf_rsample", "proxy_nca")

    def __init__(
        self, num_classes: int, embedding_dim: int, *, n_samples: int = 20, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        require_int("n_samples", n_samples, 1)
        self.n_samples = n_samples

    def _samples(self, images: _Images) -> Tensor:
        return vmf_rsample(
            images.loc,
            images.norm,
            self.n_samples,
            seed=images.seed,
            image_offset=images.offset,
            backend=self.kernel_options["backend"],
        )


class NivMFLoss(_NonIsotropicLoss):
    """Log density of the image's direction under non-isotropic vMF proxies (nivMF).

    s_ij = log p_j(e_i / |e_i|) / T

    Arguments: see `ProxyLoss` and `log_ppk`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> NivMFLoss(10, 8, temperature=0.03)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """


class VMFProductKernelLoss(ProxyLoss):
    """Closed-form log product kernel of vMF images and vMF proxies (rho 1: EL-vMF, 0.5: B-vMF).

    s_ij = log (int v_i^rho v_j^rho) / T

    Arguments: rho > 0; for the rest see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> VMFProductKernelLoss(10, 8, rho=0.5)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, *, rho: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        require("rho", rho, 0 < rho < math.inf, "a positive number")
        self.rho = rho

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        loc, norm = images.loc.double(), images.norm.double()
        ppk = vmf_log_ppk(loc, norm, *self._proxies(subset), self.rho)
        uniform = (2 * self.rho - 1) * special.log_uniform_density(self.embedding_dim)
        return ((ppk - uniform) / self.temperature.double()).to(images.loc.dtype)


class KLVMFLoss(ProxyLoss):
    """Minus the Kullback-Leibler divergence of the image's vMF from the proxy's (KL-vMF).

    s_ij = -KL(v_i | v_j) / T

    Arguments: see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022, with the exact divergence.

    Example:
        >>> KLVMFLoss(10, 8)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        return -vmf_kl(images.loc, images.norm, *self._proxies(subset)) / self.temperature


class EuclideanProxyLoss(ProxyLoss):
    """Minus the squared distance of the embedding and the proxy scaled by its concentration (L2).

    s_ij = -|k_i mu_i - k_j mu_j|^2 / T

    Arguments: see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> EuclideanProxyLoss(10, 8, temperature=1.0)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        loc, norm = images.loc, images.norm
        mu, kappa = self._proxies(subset)
        proxies = kappa[:, None] * mu
        with torch.autocast(loc.device.type, enabled=False):
            inner = (norm[:, None] * loc) @ proxies.to(loc.dtype).T
        squares = norm.square()[:, None] + kappa.square()
        return (2 * inner - squares) / self.temperature


class CosineProxyLoss(ProxyLoss):
    """Cosine of the embedding and the proxy (Cos, the normalised softmax).

    s_ij = mu_i . mu_j / T

    Arguments: see `ProxyLoss`; there are no concentrations to learn.

    Example:
        >>> CosineProxyLoss(10, 8, temperature=0.05)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    has_concentration = False

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        loc, (mu, _) = images.loc, self._proxies(subset)
        with torch.autocast(loc.device.type, enabled=False):
            return loc @ mu.to(loc.dtype).T / self.temperature


# The paper's losses by name: class and options.
PAPER_LOSSES: dict[str, tuple[type[ProxyLoss], dict[str, Any]]] = {
    "el-nivmf": (ELNivMFLoss, {}),
    "el-vmf": (VMFProductKernelLoss, {"rho": 1.0}),
    "b-vmf": (VMFProductKernelLoss, {"rho": 0.5}),
    "kl-vmf": (KLVMFLoss, {}),
    "nivmf": (NivMFLoss, {}),
    "l2": (EuclideanProxyLoss, {}),
    "cos": (CosineProxyLoss, {}),
}
