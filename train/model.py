"""The network, image to embedding: a backbone and one linear layer."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.backbone import Backbone, GlobalPool, build_backbone
from train.config import ModelConfig, RunError


class EmbeddingNet(nn.Module):
    """A backbone and one linear embedding layer, on uint8 images as the decoder returns them."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.bgr = backbone.bgr
        self.backbone = backbone.module
        self.pool = GlobalPool(config.pooling)
        self.embedding = nn.Linear(backbone.features, config.embed_dim)
        if config.init_norm_multiplier is not None:
            self.embedding.weight.data *= config.init_norm_multiplier  # as released: not the bias
        self.register_buffer("mean", backbone.mean.view(-1, 1, 1))
        self.register_buffer("std", backbone.std.view(-1, 1, 1))
        self.to(memory_format=torch.channels_last)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Embed uint8 images [n, C, H, W]: [n, D], always float32."""
        z = self._unbounded(images)
        if self.config.max_norm is not None:
            z = z / (1 + torch.linalg.vector_norm(z, dim=1, keepdim=True) / self.config.max_norm)
        return F.normalize(z) if self.config.normalize_output else z

    def _unbounded(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        if self.bgr:
            x = x.flip(1)
        x = self.backbone(x.contiguous(memory_format=torch.channels_last))
        if x.ndim == 4:
            x = self.pool(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            z: Tensor = self.embedding(x.float())
        return z

    def train(self, mode: bool = True) -> "EmbeddingNet":
        """Switch the mode, but keep frozen BatchNorm layers in eval mode.

        Their weight and bias are trained, as in the paper's code; only the statistics are kept.
        """
        super().train(mode)
        if self.config.freeze_batchnorm:
            for layer in self.batchnorms():
                layer.eval()
        return self

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the embedding layer, which may have its own learning rate."""
        return list(self.embedding.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All other parameters, which are not trained in the warm-up epochs."""
        return list(self.backbone.parameters())

    @torch.no_grad()
    def calibrate(self, images: Tensor, norm: float | None) -> None:
        """Prepare to embed in eval mode before any training: BatchNorm statistics, a mean norm.

        Untrained BatchNorm layers take their statistics from these images; pretrained or frozen
        ones keep theirs. Given a norm, the embedding layer is scaled so that the images'
        embeddings have it on average, after max_norm.
        """
        parts = math.ceil(len(images) / 250)
        batches = [images[i::parts] for i in range(parts)]  # strided: each has many classes
        if self.config.pretrained == "none" and not self.config.freeze_batchnorm:
            layers = self.batchnorms()
            momenta = [layer.momentum for layer in layers]
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the mean over the batches
            self.train()
            for batch in batches:
                self(batch)
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        self.eval()
        if norm is not None:
            _check_below(norm, self.config.max_norm)
            norms = torch.cat([self._unbounded(batch).double().norm(dim=1) for batch in batches])
            factor = _scale_to_mean(norms, norm, self.config.max_norm)
            self.embedding.weight.mul_(factor)
            self.embedding.bias.mul_(factor)

    def batchnorms(self) -> list[_BatchNorm]:
        return [layer for layer in self.modules() if isinstance(layer, _BatchNorm)]


def _check_below(norm: float | None, bound: float | None) -> None:
    if norm is not None and bound is not None and norm >= bound:
        raise RunError(f"--init-norm is {norm}, but must be below --max-norm, which is {bound}")


def _scale_to_mean(norms: Tensor, mean: float, bound: float | None) -> float:
    """The factor after which norms r / (1 + r / bound) have that mean."""
    rate = 1 / bound if bound else 0.0
    # The mean of r / (1 / factor + rate * r) falls as 1 / factor rises: bisect. The root for norms
    # that all equal their mean is never below the true one (Jensen), and is it without a bound.
    low, high = 0.0, norms.mean().item() * (1 / mean - rate)
    for _ in range(60):
        middle = (low + high) / 2
        if (norms / (middle + rate * norms)).mean() > mean:
            low = middle
        else:
            high = middle
    return 1 / high


def build_model(
    config: ModelConfig,
    mean_std: tuple[Tensor, Tensor] | None = None,
    image_size: int | None = None,
) -> EmbeddingNet:
    """Build the configured network, for square images of that size.

    mean_std, of the training images' channels, are for conv, which has seen no other images; leave
    them out if a state dict that holds them is loaded next. A transformer's position embeddings are
    made for image_size, or its own size by default.
    """
    if config.normalize_output and (config.init_norm or config.max_norm):
        flag = "--init-norm" if config.init_norm else "--max-norm"
        raise RunError(f"{flag} has no use with --normalize-output, where every norm is 1")
    _check_below(config.init_norm, config.max_norm)
    backbone = build_backbone(config, image_size)
    if config.backbone == "conv" and mean_std is not None:
        backbone = dataclasses.replace(backbone, mean=mean_std[0], std=mean_std[1])
    return EmbeddingNet(config, backbone)
