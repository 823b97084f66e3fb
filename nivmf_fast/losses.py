"""Proxy losses of deep metric learning as modules: `loss(embeddings, labels)`.

Every class has a proxy; a loss is the cross-entropy of an image's similarities to all proxies, or
a binomial deviance of them. The similarities of Kirchhof et al. (ECCV 2022) differ in what an image
and a proxy are taken to be:

    ELNivMFLoss           image vMF, proxy non-isotropic vMF: log-PPK over samples of the image
    VMFProductKernelLoss  both vMF: closed-form log-PPK (rho 1: EL-vMF, rho 0.5: B-vMF)
    KLVMFLoss             both vMF: minus the Kullback-Leibler divergence
    NivMFLoss             image a point, proxy non-isotropic vMF: log density
    EuclideanProxyLoss    minus the squared distance of scaled directions
    CosineProxyLoss       cosine

A vMF image has direction e / |e| and concentration |e| for its embedding e.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nivmf_fast import special
from nivmf_fast._checks import check_all, check_labels, check_options, checks_values
from nivmf_fast._schemas import Normalizer, Precision
from nivmf_fast.functional import (
    log_ppk,
    proxy_nca,
    vmf_kl,
    vmf_log_ppk,
    vmf_rsample,
)

Axis = Literal["images", "classes"]
MIN_CONCENTRATION = 0.1  # proxy concentrations are clamped from below on use


class _Images(NamedTuple):
    loc: Tensor  # [B, D], directions
    norm: Tensor  # [B], concentrations
    seed: int | Tensor | None  # of the samples
    offset: int  # index of the first image


def directions_and_norms(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """e / |e| and |e|; a zero embedding gives a fixed axis and 0, with zero gradients."""
    e = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    zero = torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True) == 0
    axis = torch.zeros_like(e[:1])
    axis[:, :1] = 1
    norm = torch.linalg.vector_norm(torch.where(zero, axis, e), dim=-1, keepdim=True)
    return torch.where(zero, axis, e) / norm, torch.where(zero, 0, norm)[:, 0]


def binomial_deviance(
    similarities: Tensor, labels: Tensor, alpha: float, delta: float, axis: Axis
) -> Tensor:
    """Softly, own proxies above delta and all others below -delta, []; s is [B, P].

    axis "images", as ProxyAnchor has it, sums over the images of each class:
        mean_j log(1 + sum_{i: y_i = j} exp(-alpha (s_ij - delta)))    over classes with images
        + mean_j log(1 + sum_{i: y_i != j} exp(alpha (s_ij + delta)))    over all classes
    axis "classes" sums over the classes of each image:
        mean_i log(1 + exp(-alpha (s_i,y_i - delta)))
        + mean_i log(1 + sum_{j != y_i} exp(alpha (s_ij + delta)))

    Source: Kim et al. (CVPR 2020), equation 4.
    """
    dim = 0 if axis == "images" else 1
    own = labels[:, None] == torch.arange(similarities.shape[1], device=labels.device)
    attract, repel = anchor_terms(similarities, own, alpha, delta, dim)
    return attract.sum() / own.any(dim).sum().clamp(min=1) + repel.sum() / max(len(repel), 1)


def anchor_terms(
    similarities: Tensor, own: Tensor, alpha: float, delta: float, dim: int
) -> tuple[Tensor, Tensor]:
    """The terms of `binomial_deviance` that attract and those that repel, summed along `dim`."""

    def log_one_plus_sum(logits: Tensor, mask: Tensor) -> Tensor:
        masked = torch.where(mask, logits, -math.inf)
        return torch.logsumexp(nn.functional.pad(masked, (0, 0, 1, 0) if dim == 0 else (1, 0)), dim)

    attract = log_one_plus_sum(-alpha * (similarities - delta), own)
    return attract, log_one_plus_sum(alpha * (similarities + delta), ~own)


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
        form: "nca" is the cross-entropy above, "bindev" puts `binomial_deviance` in its place, with
            `bindev_alpha`, `bindev_delta` and `bindev_axis`.
        negative_share: 1 compares with all proxies; less with those of the batch's classes and
            this share of the others, drawn by the step's seed and the same for all images. It
            estimates the full loss without a correction, hence with a bias. Guidance sees all.

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
        form: Literal["nca", "bindev"] = "nca",
        bindev_alpha: float = 1.0,
        bindev_delta: float = 0.0,
        bindev_axis: Axis = "images",
        negative_share: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("embedding_dim", embedding_dim, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int, at least {least}; got {value!r}")
        for name, number in (
            ("concentration", concentration),
            ("temperature", temperature),
            ("bindev_alpha", bindev_alpha),
        ):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {number!r}")
        if not 0 <= guidance_weight < math.inf:
            raise ValueError(f"guidance_weight must be >= 0 and finite; got {guidance_weight!r}")
        if not math.isfinite(bindev_delta):
            raise ValueError(f"bindev_delta must be finite; got {bindev_delta!r}")
        if not 0 < negative_share <= 1:
            raise ValueError(
                f"negative_share must be above 0 and at most 1; got {negative_share!r}"
            )
        if form not in ("nca", "bindev"):
            raise ValueError(f"form must be 'nca' or 'bindev'; got {form!r}")
        if bindev_axis not in ("images", "classes"):
            raise ValueError(f"bindev_axis must be 'images' or 'classes'; got {bindev_axis!r}")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.initial_concentration = concentration
        self.guidance_weight = guidance_weight
        self.guidance_alpha, self.guidance_delta = guidance_alpha, guidance_delta
        self.form, self.negative_share = form, negative_share
        self.bindev_alpha, self.bindev_delta = bindev_alpha, bindev_delta
        self.bindev_axis: Axis = bindev_axis
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
        return self._proxies(None)[0]

    @property
    def concentrations(self) -> Tensor:
        """Concentrations of the proxies, clamped from below: [P] or [P, D]."""
        if self.concentration is None:
            raise AttributeError(f"{type(self).__name__} has no concentrations")
        return self._proxies(None)[1]

    @property
    def decomposes(self) -> bool:
        """Whether the loss is a mean over images of what sees nothing of the other images."""
        per_image = self.form == "nca" or self.bindev_axis == "classes"
        return per_image and self.guidance_weight == 0 and self.negative_share == 1

    def similarity(
        self, embeddings: Tensor, *, seed: int | Tensor | None = None, image_offset: int = 0
    ) -> Tensor:
        """s_ij of every image and proxy, [B, P]: the logits of the loss.

        Densities are those relative to the uniform distribution on the sphere, p / C_D(0). A
        softmax does not see this constant, but a binomial deviance does, and so do float32 logits:
        at D = 512 and T = 0.003 the density's constant is 289,000. Without it, s_ij = 0 says that
        the proxy explains the image as well as knowing nothing, in every dimension.
        """
        self._check(embeddings)
        images = _Images(*directions_and_norms(embeddings), seed, image_offset)
        return self._similarity(images, None)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        seed: int | Tensor | None = None,
        image_offset: int = 0,
    ) -> Tensor:
        """Mean loss of the batch: embeddings [B, D], labels [B] int64.

        `seed` draws the negative proxies; it and `image_offset` go to the sampler of a loss that
        samples, see `vmf_rsample`.
        """
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        images = _Images(*directions_and_norms(embeddings), seed, image_offset)
        kept, own = self._subset(labels, seed)
        if self.form == "bindev":
            s = self._similarity(images, kept)
            total = binomial_deviance(
                s, own, self.bindev_alpha, self.bindev_delta, self.bindev_axis
            )
            total = torch.where(((own >= 0) & (own < s.shape[1])).all(), total, math.nan)
        else:
            total = self._losses(images, own, kept).sum() / max(len(labels), 1)
        if self.guidance_weight > 0:
            loc, options = images.loc, (self.guidance_alpha, self.guidance_delta)
            with torch.autocast(loc.device.type, enabled=False):
                cosine = loc @ self.directions.to(loc.dtype).T
            guidance = binomial_deviance(cosine, labels, *options, axis="images")
            total = total + self.guidance_weight * guidance
        return total

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Start every proxy at the mean direction of its class; one without images stays."""
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        loc = directions_and_norms(embeddings)[0].to(self.proxies)
        self._turn(
            torch.zeros_like(self.proxies).index_add_(0, labels.to(self.proxies.device), loc)
        )

    def _turn(self, total: Tensor) -> None:
        """Turn every proxy into the direction of its row [P, D]; one whose row is 0 stays."""
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

    def _proxies(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Directions and concentrations of these proxies, or of all."""

        def of(parameter: Tensor) -> Tensor:
            return parameter if kept is None else parameter[kept]

        directions = nn.functional.normalize(of(self.proxies), dim=-1)
        if self.concentration is None:
            return directions, directions.new_ones(len(directions))
        return directions, of(self.concentration).clamp(min=MIN_CONCENTRATION)

    def _subset(self, labels: Tensor, seed: int | Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The proxies of this step, None for all, and the labels' places among them.

        Drawn on the CPU, so that every device has the same; their number synchronises a GPU.
        """
        if self.negative_share == 1:
            return None, labels
        P = self.num_classes
        seed = torch.randint(2**62, ()) if seed is None else seed
        order = torch.rand(P, generator=torch.Generator().manual_seed(int(seed)))
        classes = torch.arange(P, device=labels.device)
        present = (labels[:, None] == classes).any(0)
        order = torch.where(present, -1, order.to(labels.device))
        positives = int(present.sum())
        negatives = max(round(self.negative_share * (P - positives)), min(1, P - positives))
        kept = order.argsort(stable=True)[: positives + negatives].sort().values
        place = torch.full_like(classes, -1).scatter(0, kept, torch.arange(len(kept)).to(kept))
        known = (labels >= 0) & (labels < P)
        return kept, torch.where(known, place[torch.where(known, labels, 0)], -1)

    def _losses(self, images: _Images, labels: Tensor, kept: Tensor | None) -> Tensor:
        """Per-image cross-entropy, [B]; a label out of range gives NaN, never a device assert."""
        s = self._similarity(images, kept)
        known = (labels >= 0) & (labels < s.shape[1])
        own = s.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
        return torch.where(known, torch.logsumexp(s, 1) - own, math.nan)

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        raise TypeError("ProxyLoss is abstract: use one of the losses derived from it")


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

    def _samples(self, images: _Images) -> Tensor:
        return images.loc[None]

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        samples, proxies, T = self._samples(images), self._proxies(kept), self.temperature
        # In float64, because the constant is taken off a sum. `constants=False` would also take
        # off what all proxies share and what moves with their concentrations: a softmax may go
        # without that, what compares s_ij with a threshold may not.
        s = log_ppk(samples.double(), *proxies, T, **self.kernel_options)
        uniform = special.log_uniform_density(self.embedding_dim)
        return (s - uniform / T.double()).to(samples.dtype)

    def _losses(self, images: _Images, labels: Tensor, kept: Tensor | None) -> Tensor:
        samples = self._samples(images)
        proxies = self._proxies(kept)
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

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        loc, norm = images.loc.double(), images.norm.double()
        ppk = vmf_log_ppk(loc, norm, *self._proxies(kept), self.rho)
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

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        return -vmf_kl(images.loc, images.norm, *self._proxies(kept)) / self.temperature


class EuclideanProxyLoss(ProxyLoss):
    """Minus the squared distance of the embedding and the proxy scaled by its concentration (L2).

    s_ij = -|k_i mu_i - k_j mu_j|^2 / T

    Arguments: see `ProxyLoss`. Source: Kirchhof et al., ECCV 2022.

    Example:
        >>> EuclideanProxyLoss(10, 8, temperature=1.0)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        loc, norm = images.loc, images.norm
        mu, kappa = self._proxies(kept)
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

    def _similarity(self, images: _Images, kept: Tensor | None) -> Tensor:
        loc, (mu, _) = images.loc, self._proxies(kept)
        with torch.autocast(loc.device.type, enabled=False):
            return loc @ mu.to(loc.dtype).T / self.temperature
