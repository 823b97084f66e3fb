"""The network, image to embedding, and the loss on top of it."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from nivmf_fast import (
    CosineProxyLoss,
    ELNivMFLoss,
    EuclideanProxyLoss,
    KLVMFLoss,
    NivMFLoss,
    VMFProductKernelLoss,
)
from train.config import LossConfig, LossName, ModelConfig, RunError

CHANNELS = {"conv": 1}  # of the images that a backbone takes
LOSS_OPS: dict[LossName, tuple[str, ...]] = {  # of nivmf_fast, that a loss spends its time in
    "el-nivmf": ("vmf_rsample", "proxy_nca"),
    "el-vmf": ("vmf_log_normalizer",),
    "b-vmf": ("vmf_log_normalizer",),
    "kl-vmf": ("vmf_log_normalizer",),
    "nivmf": ("proxy_nca",),
    "l2": (),
    "cos": (),
}


def conv_net(width: int) -> tuple[nn.Module, int]:
    """Three small blocks for grey images of 28 pixels, and the number of features they end in."""
    channels = [CHANNELS["conv"], width, 2 * width, 4 * width]
    blocks: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise(channels):
        for c in (c_in, c_out):
            blocks += [
                nn.Conv2d(c, c_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        blocks.append(nn.MaxPool2d(2))
    return nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(3), nn.Flatten()), channels[-1] * 9


class EmbeddingNet(nn.Module):
    """A backbone and one linear embedding layer over bytes as images come from the decoder."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.backbone, features = conv_net(config.width)
        self.embedding = nn.Linear(features, config.embed_dim)
        self.register_buffer("mean", mean.view(-1, 1, 1))  # of the channels, images in [0, 1]
        self.register_buffer("std", std.view(-1, 1, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        return self.embedding(self.backbone(x.contiguous(memory_format=torch.channels_last)))

    @torch.no_grad()
    def calibrate(self, images: Tensor, norm: float) -> None:
        """Take the batch statistics from these images and scale the embeddings to a mean norm."""
        layers = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0
        self.train()(images)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        factor = norm / self.eval()(images).norm(dim=1).mean()
        self.embedding.weight.mul_(factor)
        self.embedding.bias.mul_(factor)


def build_loss(config: LossConfig, num_classes: int, embed_dim: int) -> nn.Module:
    """The loss of that name, as the paper calls them."""
    common: dict[str, Any] = {
        "concentration": config.concentration,
        "temperature": config.temperature,
        "learn_temperature": config.learn_temperature,
        "guidance_weight": config.guidance_weight,
    }
    density: dict[str, Any] = {"normalizer": config.normalizer, "projection": config.projection}
    try:
        match config.name:
            case "el-nivmf":
                return ELNivMFLoss(
                    num_classes,
                    embed_dim,
                    n_samples=config.n_samples,
                    temperature_outside=config.temperature_outside,
                    backend=config.backend,
                    **density,
                    **common,
                )
            case "el-vmf":
                return VMFProductKernelLoss(num_classes, embed_dim, rho=1.0, **common)
            case "b-vmf":
                return VMFProductKernelLoss(num_classes, embed_dim, rho=0.5, **common)
            case "kl-vmf":
                return KLVMFLoss(num_classes, embed_dim, **common)
            case "nivmf":
                return NivMFLoss(
                    num_classes, embed_dim, backend=config.backend, **density, **common
                )
            case "l2":
                return EuclideanProxyLoss(num_classes, embed_dim, **common)
            case "cos":
                return CosineProxyLoss(num_classes, embed_dim, **common)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"loss {config.name}: {error}") from None
