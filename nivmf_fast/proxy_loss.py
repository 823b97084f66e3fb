"""The base class of the proxy losses, and the binomial deviance.

Every class has a proxy. A loss compares each image with all proxies, by a cross-entropy or a
binomial deviance of the similarities. `nivmf_fast.losses` derives one loss per similarity.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from nivmf_fast._checks import check_all, check_labels, checks_values, require, require_int

Axis = Literal["images", "classes"]
MIN_CONCENTRATION = 0.1  # proxy concentrations are clamped from below on use


class _Images(NamedTuple):
    loc: Tensor  # [B, D], directions
    norm: Tensor  # [B], concentrations
    seed: int | Tensor | None  # of the samples and of the subset of proxies
    offset: int  # index of the first image


def directions_and_norms(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """e / |e| and |e|; a zero embedding gives the first axis and 0, with zero gradients."""
    e = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    zero = torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True) == 0
    axis = torch.zeros_like(e[:1])
    axis[:, :1] = 1
    norm = torch.linalg.vector_norm(torch.where(zero, axis, e), dim=-1, keepdim=True)
    return torch.where(zero, axis, e) / norm, torch.where(zero, 0, norm)[:, 0]


def binomial_deviance(
    similarities: Tensor, labels: Tensor, alpha: float, delta: float, axis: Axis
) -> Tensor:
    """Push each image's own proxy above delta and all others below -delta, softly.

    axis "images", the form of ProxyAnchor, sums over the images of each class:
        mean_j log(1 + sum_{i: y_i = j} exp(-alpha (s_ij - delta)))    over classes with images
        + mean_j log(1 + sum_{i: y_i != j} exp(alpha (s_ij + delta)))    over all classes
    axis "classes" sums over the classes of each image:
        mean_i log(1 + exp(-alpha (s_i,y_i - delta)))
        + mean_i log(1 + sum_{j != y_i} exp(alpha (s_ij + delta)))

    Args:
        similarities: s, [B, P].
        labels: y, [B] int64.
        alpha: scale > 0. delta: margin.

    Returns:
        [], the deviance.

    Source: Kim et al. (CVPR 2020), equation 4.

    Example:
        >>> binomial_deviance(torch.zeros(2, 3), torch.arange(2), 1.0, 0.0, "classes")
        tensor(1.7918)
    """
    dim = 0 if axis == "images" else 1
    positive = labels[:, None] == torch.arange(similarities.shape[1], device=labels.device)
    attract, repel = anchor_terms(similarities, positive, alpha, delta, dim)
    return attract.sum() / positive.any(dim).sum().clamp(min=1) + repel.sum() / max(len(repel), 1)


def anchor_terms(
    similarities: Tensor, positive: Tensor, alpha: float, delta: float, dim: int
) -> tuple[Tensor, Tensor]:
    """The two terms of `binomial_deviance`, summed along `dim`, before their means.

    `positive` [B, P] marks each image's own proxy.
    """

    def log_one_plus_sum(logits: Tensor, mask: Tensor) -> Tensor:
        masked = torch.where(mask, logits, -math.inf)
        return torch.logsumexp(nn.functional.pad(masked, (0, 0, 1, 0) if dim == 0 else (1, 0)), dim)

    attract = log_one_plus_sum(-alpha * (similarities - delta), positive)
    return attract, log_one_plus_sum(alpha * (similarities + delta), ~positive)


class ProxyLoss(nn.Module):
    """Base of the proxy losses: proxies, their concentrations, temperature and guidance.

    loss = mean_i (-s_i,y_i + log sum_j exp s_ij) + guidance_weight * ProxyAnchor(directions)

    Args:
        num_classes, embedding_dim: P and D.
        concentration: initial value for every proxy (and dimension), and initial length of the raw
            proxies, which are normalised on use: longer ones turn more slowly.
        temperature: initial T > 0, learned unless `learn_temperature` is False.
        guidance_weight: of ProxyAnchor (Kim et al., CVPR 2020) on the proxies' directions, with
            `guidance_alpha` and `guidance_delta`; 0 omits it.
        form: "nca", the cross-entropy above, or "bindev", `binomial_deviance` with
            `bindev_alpha`, `bindev_delta` and `bindev_axis`.
        negative_share: below 1, compare with the batch's classes and this share of the others, one
            draw for all images: a biased estimate. Guidance always uses all proxies.

    Raises: ValueError, TypeError: for bad options; in calls, for bad shapes, labels or CPU values.

    Example:
        >>> class DotLoss(ProxyLoss):
        ...     def _similarity(self, images, subset):
        ...         return images.loc @ self._proxies(subset)[0].T / self.temperature
        >>> DotLoss(num_classes=5, embedding_dim=8)(torch.randn(4, 8), torch.arange(4)).ndim
        0
    """

    ops: ClassVar[tuple[str, ...]] = ()  # the ops that a loss calls, named as in `which_backend`
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
        require_int("num_classes", num_classes, 1)
        require_int("embedding_dim", embedding_dim, 2)
        for name, value, ok, rule in (
            ("concentration", concentration, 0 < concentration < math.inf, "positive and finite"),
            ("temperature", temperature, 0 < temperature < math.inf, "positive and finite"),
            ("bindev_alpha", bindev_alpha, 0 < bindev_alpha < math.inf, "positive and finite"),
            ("bindev_delta", bindev_delta, math.isfinite(bindev_delta), "finite"),
            (
                "guidance_weight",
                guidance_weight,
                0 <= guidance_weight < math.inf,
                ">= 0 and finite",
            ),
            ("negative_share", negative_share, 0 < negative_share <= 1, "above 0 and at most 1"),
            ("form", form, form in ("nca", "bindev"), "'nca' or 'bindev'"),
            ("bindev_axis", bindev_axis, bindev_axis in get_args(Axis), "'images' or 'classes'"),
        ):
            require(name, value, ok, rule)
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
        # the logarithm, so that no optimiser step can make it negative
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        """T, []."""
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
        """Whether the loss is a mean of terms that each depend on one image."""
        per_image = self.form == "nca" or self.bindev_axis == "classes"
        return per_image and self.guidance_weight == 0 and self.negative_share == 1

    def similarity(
        self, embeddings: Tensor, *, seed: int | Tensor | None = None, image_offset: int = 0
    ) -> Tensor:
        """s_ij of every image and proxy, [B, P]: the logits of the loss.

        Densities are relative to the uniform distribution on the sphere, p / C_D(0). A softmax
        ignores this constant, but a binomial deviance does not, nor do float32 logits: at D = 512
        and T = 0.003 it is 289,000. Without it, s_ij = 0 means in every dimension that the proxy
        explains the image no better than the uniform distribution.

        Args:
            embeddings: [B, D].
            seed, image_offset: as in `vmf_rsample`, for losses that sample.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device.
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
        """Mean loss of the batch, [].

        Args:
            embeddings: [B, D]. labels: [B] int64.
            seed: of the negative proxies; a loss that samples passes it to `vmf_rsample`.
            image_offset: as in `vmf_rsample`.

        Raises:
            ValueError, TypeError: wrong shape, dtype, device or value.
        """
        images, labels = self._collect(embeddings, labels, seed, image_offset)
        subset, local_labels = self._draw_subset(labels, images.seed)
        if self.form == "bindev":
            total = self._deviance(images, local_labels, subset)
        else:
            total = self._losses(images, local_labels, subset).sum() / max(len(labels), 1)
        if self.guidance_weight > 0:
            total = total + self.guidance_weight * self._guidance(images.loc, labels)
        return total

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Set every proxy to the mean direction of its class; classes without images keep theirs.

        Args:
            embeddings: [n, D]. labels: [n] int64.

        Raises:
            ValueError, TypeError: wrong shape, dtype, device or value.
        """
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        loc = directions_and_norms(embeddings)[0].to(self.proxies)
        self._turn(
            torch.zeros_like(self.proxies).index_add_(0, labels.to(self.proxies.device), loc)
        )

    def _turn(self, total: Tensor) -> None:
        """Set every proxy to the direction of its row of `total`, [P, D], unless that is 0."""
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
        """Optimiser groups without weight decay, each with its own learning rate.

        Args:
            lr: base learning rate, to be multiplied by the following.
            proxy_lr_mult: of the proxies' directions, in the group named "proxies".
            concentration_lr_mult: of their concentrations, in the group named "concentration".
            temperature_lr_mult: of log T, in the group named "temperature".

        Returns:
            A group for each of the three that the loss learns.
        """
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

    def _proxies(self, subset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Directions and concentrations of a subset of the proxies, or of all (None)."""

        def of(parameter: Tensor) -> Tensor:
            return parameter if subset is None else parameter[subset]

        directions = nn.functional.normalize(of(self.proxies), dim=-1)
        if self.concentration is None:
            return directions, directions.new_ones(len(directions))
        return directions, of(self.concentration).clamp(min=MIN_CONCENTRATION)

    def _collect(
        self, embeddings: Tensor, labels: Tensor, seed: int | Tensor | None, image_offset: int
    ) -> tuple[_Images, Tensor]:
        """Check the input; return the images and labels that the loss averages over."""
        self._check(embeddings)
        check_labels(labels, len(embeddings), self.num_classes, None)
        return _Images(*directions_and_norms(embeddings), seed, image_offset), labels

    def _draw_subset(
        self, labels: Tensor, seed: int | Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Draw this step's proxies (None: all), and find each label's index among them.

        Drawn on the CPU, so that every device has the same; reading their number synchronises a
        GPU.
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
        subset = order.argsort(stable=True)[: positives + negatives].sort().values
        place = torch.full_like(classes, -1).scatter(
            0, subset, torch.arange(len(subset)).to(subset)
        )
        known = (labels >= 0) & (labels < P)
        return subset, torch.where(known, place[torch.where(known, labels, 0)], -1)

    def _losses(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        """Per-image cross-entropy, [B]; a label out of range gives NaN, not a device assert."""
        s = self._similarity(images, subset)
        known = (local_labels >= 0) & (local_labels < s.shape[1])
        own = s.gather(1, torch.where(known, local_labels, 0)[:, None])[:, 0]
        return torch.where(known, torch.logsumexp(s, 1) - own, math.nan)

    def _deviance(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        """Binomial deviance, []; NaN for a label out of range, as in `_losses`."""
        s = self._similarity(images, subset)
        total = binomial_deviance(
            s, local_labels, self.bindev_alpha, self.bindev_delta, self.bindev_axis
        )
        known = (local_labels >= 0) & (local_labels < s.shape[1])
        return torch.where(known.all(), total, math.nan)

    def _guidance(self, loc: Tensor, labels: Tensor) -> Tensor:
        """ProxyAnchor of the directions, []."""
        cosine = self._cosine(loc)
        return binomial_deviance(
            cosine, labels, self.guidance_alpha, self.guidance_delta, axis="images"
        )

    def _cosine(self, loc: Tensor) -> Tensor:
        with torch.autocast(loc.device.type, enabled=False):
            return loc @ self.directions.to(loc.dtype).T

    def _similarity(self, images: _Images, subset: Tensor | None) -> Tensor:
        raise TypeError("ProxyLoss is abstract: use one of the losses derived from it")
