"""Proxy losses of deep metric learning as modules: `loss(embeddings, labels)`.

Every class has a proxy; a loss is the cross-entropy of an image's similarities to all proxies.
The similarities of Kirchhof et al. (ECCV 2022) differ in what an image and a proxy are taken to be:

    ELNivMFLoss           image vMF, proxy non-isotropic vMF: log-PPK over samples of the image
    VMFProductKernelLoss  both vMF: closed-form log-PPK (rho 1: EL-vMF, rho 0.5: B-vMF)
    KLVMFLoss             both vMF: minus the Kullback-Leibler divergence
    NivMFLoss             image a point, proxy non-isotropic vMF: log density
    EuclideanProxyLoss    minus the squared distance of scaled directions
    CosineProxyLoss       cosine

A vMF image has direction e / |e| and concentration |e| for its embedding e.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nivmf_fast.functional import (
    Normalizer,
    Precision,
    check_all,
    check_labels,
    check_options,
    checks_values,
    log_ppk,
    proxy_nca,
    vmf_kl,
    vmf_log_ppk,
    vmf_rsample,
)

MIN_CONCENTRATION = 0.1  # proxy concentrations are clamped from below on use


def directions_and_norms(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """e / |e| and |e|; a zero embedding gives a fixed axis and 0, with zero gradients."""
    e = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    zero = torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True) == 0
    axis = torch.zeros_like(e[:1])
    axis[:, :1] = 1
    norm = torch.linalg.vector_norm(torch.where(zero, axis, e), dim=-1, keepdim=True)
    return torch.where(zero, axis, e) / norm, torch.where(zero, 0, norm)[:, 0]


class ProxyLoss(nn.Module):
    """What the losses share: the proxies, their concentrations, the temperature, the guidance.

    loss = mean_i (-s_i,y_i + log sum_j exp s_ij) + guidance_weight * ProxyAnchor(directions)

    Args:
        num_classes: P.
        embedding_dim: D.
        concentration: initial concentration of every proxy (of each dimension), and the length
            of the raw proxy vectors: they are normalised on use, so a longer one turns slower.
        temperature: initial T > 0, learnable unless `learn_temperature` is False.
        guidance_weight: of a ProxyAnchor loss (Kim et al., CVPR 2020) on the same proxies'
            directions, with `guidance_alpha` and `guidance_delta`; 0 leaves it out.

    Raises:
        ValueError, TypeError: from the constructor for bad options, from a call for bad shapes,
            labels or (on the CPU) values.
    """

    has_concentration: bool = True
    isotropic: bool = True

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        concentration: float = 10.0,
        temperature: float = 0.01,
        learn_temperature: bool = True,
        guidance_weight: float = 0.0,
        guidance_alpha: float = 32.0,
        guidance_delta: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("embedding_dim", embedding_dim, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int, at least {least}; got {value!r}")
        for name, number in (("concentration", concentration), ("temperature", temperature)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {number!r}")
        if not 0 <= guidance_weight < math.inf:
            raise ValueError(f"guidance_weight must be >= 0 and finite; got {guidance_weight!r}")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.initial_concentration = concentration
        self.guidance_weight = guidance_weight
        self.guidance_alpha, self.guidance_delta = guidance_alpha, guidance_delta
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.xavier_normal_(self.proxies, gain=concentration)
        self.concentration: nn.Parameter | None = None
        if self.has_concentration:
            shape = (num_classes,) if self.isotropic else (num_classes, embedding_dim)
            self.concentration = nn.Parameter(torch.full(shape, float(concentration)))
        # its logarithm, so that no step of an optimiser makes it negative
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    @property
    def directions(self) -> Tensor:
        """Unit mean directions of the proxies, [P, D]."""
        return nn.functional.normalize(self.proxies, dim=-1)

    @property
    def concentrations(self) -> Tensor:
        """Concentrations of the proxies, clamped from below: [P] or [P, D]."""
        if self.concentration is None:
            raise AttributeError(f"{type(self).__name__} has no concentrations")
        return self.concentration.clamp(min=MIN_CONCENTRATION)

    def similarity(
        self, embeddings: Tensor, *, seed: int | Tensor | None = None, image_offset: int = 0
    ) -> Tensor:
        """s_ij of every image and proxy, [B, P], up to a constant: the logits of the loss."""
        self._check(embeddings)
        return self._similarity(*directions_and_norms(embeddings), seed, image_offset)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        seed: int | Tensor | None = None,
        image_offset: int = 0,
    ) -> Tensor:
        """Mean loss of the batch: embeddings [B, D], labels [B] int64.

        `seed` and `image_offset` go to the sampler of a loss that samples, see `vmf_rsample`.
        """
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        loc, norm = directions_and_norms(embeddings)
        total = self._losses(loc, norm, labels, seed, image_offset).sum() / max(len(loc), 1)
        if self.guidance_weight > 0:
            total = total + self.guidance_weight * self._guidance(loc, labels)
        return total

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Start every proxy at the mean direction of its class; one without images stays."""
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        loc = directions_and_norms(embeddings)[0].to(self.proxies)
        total = torch.zeros_like(self.proxies).index_add_(0, labels.to(self.proxies.device), loc)
        length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        started = self.initial_concentration * total / length
        self.proxies.copy_(torch.where(length > 0, started, self.proxies))

    def param_groups(
        self,
        lr: float,
        *,
        proxy_lr_mult: float = 1.0,
        concentration_lr_mult: float = 1.0,
        temperature_lr_mult: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Optimiser groups without weight decay, each with its own learning rate."""
        groups = [
            ("proxies", self.proxies, proxy_lr_mult),
            ("concentration", self.concentration, concentration_lr_mult),
            ("temperature", self.log_temperature, temperature_lr_mult),
        ]
        return [
            {"name": name, "params": [p], "lr": lr * multiplier, "weight_decay": 0.0}
            for name, p, multiplier in groups
            if isinstance(p, nn.Parameter)
        ]

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, "
            f"temperature={self.temperature.item():.4g}, guidance_weight={self.guidance_weight:g}"
        )

    def _check(self, embeddings: Tensor) -> None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise TypeError(f"embeddings must be a floating tensor [B, D]; got {got}")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings must have shape [B, D] with D = {self.embedding_dim}; "
                f"got {list(embeddings.shape)}"
            )
        if embeddings.device != self.proxies.device:
            raise ValueError(
                f"embeddings are on {embeddings.device}, the proxies on {self.proxies.device}; "
                "move the loss with loss.to(device)"
            )
        if checks_values(None, embeddings):
            check_all("embeddings", embeddings, embeddings.isfinite(), "finite")

    def _losses(
        self, loc: Tensor, norm: Tensor, labels: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        """Per-image cross-entropy, [B]; a label out of range gives NaN, never a device assert."""
        s = self._similarity(loc, norm, seed, offset)
        known = (labels >= 0) & (labels < self.num_classes)
        own = s.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
        return torch.where(known, torch.logsumexp(s, 1) - own, math.nan)

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        raise TypeError("ProxyLoss is abstract: use one of the losses derived from it")

    def _guidance(self, loc: Tensor, labels: Tensor) -> Tensor:
        """ProxyAnchor on the directions (Kim et al., CVPR 2020)."""
        with torch.autocast(loc.device.type, enabled=False):
            cosine = loc @ self.directions.to(loc.dtype).T
        own = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        alpha, delta = self.guidance_alpha, self.guidance_delta

        def log_one_plus_sum(logits: Tensor, mask: Tensor) -> Tensor:  # over the batch, [P]
            masked = torch.where(mask, logits, -math.inf)
            return torch.logsumexp(nn.functional.pad(masked, (0, 0, 1, 0)), 0)

        attract = log_one_plus_sum(-alpha * (cosine - delta), own)
        repel = log_one_plus_sum(alpha * (cosine + delta), ~own)
        return attract.sum() / own.any(0).sum().clamp(min=1) + repel.mean()


class _NonIsotropicLoss(ProxyLoss):
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

    def _samples(self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int) -> Tensor:
        return loc[None]

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        samples = self._samples(loc, norm, seed, offset)
        proxies = self.directions, self.concentrations
        return log_ppk(samples, *proxies, self.temperature, constants=False, **self.kernel_options)

    def _losses(
        self, loc: Tensor, norm: Tensor, labels: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        samples = self._samples(loc, norm, seed, offset)
        proxies = self.directions, self.concentrations
        return proxy_nca(samples, *proxies, labels, self.temperature, **self.kernel_options)


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

    def __init__(
        self, num_classes: int, embedding_dim: int, *, n_samples: int = 20, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples must be an int, at least 1; got {n_samples!r}")
        self.n_samples = n_samples

    def _samples(self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int) -> Tensor:
        return vmf_rsample(
            loc,
            norm,
            self.n_samples,
            seed=seed,
            image_offset=offset,
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

    Arguments: rho > 0; the rest see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> VMFProductKernelLoss(10, 8, rho=0.5)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, *, rho: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        if not 0 < rho < math.inf:
            raise ValueError(f"rho must be a positive number; got {rho!r}")
        self.rho = rho

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        ppk = vmf_log_ppk(loc, norm, self.directions, self.concentrations, self.rho)
        return ppk / self.temperature


class KLVMFLoss(ProxyLoss):
    """Minus the Kullback-Leibler divergence of the image's vMF from the proxy's (KL-vMF).

    s_ij = -KL(v_i | v_j) / T

    Arguments: see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022, with the exact divergence.

    Example:
        >>> KLVMFLoss(10, 8)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        return -vmf_kl(loc, norm, self.directions, self.concentrations) / self.temperature


class EuclideanProxyLoss(ProxyLoss):
    """Minus the squared distance of the embedding and the proxy scaled by its concentration (L2).

    s_ij = -|k_i mu_i - k_j mu_j|^2 / T

    Arguments: see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> EuclideanProxyLoss(10, 8, temperature=1.0)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        proxies = self.concentrations[:, None] * self.directions
        with torch.autocast(loc.device.type, enabled=False):
            inner = (norm[:, None] * loc) @ proxies.to(loc.dtype).T
        squares = norm.square()[:, None] + self.concentrations.square()
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

    def _similarity(
        self, loc: Tensor, norm: Tensor, seed: int | Tensor | None, offset: int
    ) -> Tensor:
        with torch.autocast(loc.device.type, enabled=False):
            return loc @ self.directions.to(loc.dtype).T / self.temperature
