"""Embed image sets and evaluate the embeddings; statistics of a set's pixels."""

import torch
from torch import Tensor

from train import evaluate
from train.config import Config, OptimConfig
from train.data import ImageSet, all_batches
from train.distributed import Ranks
from train.model import EmbeddingNet

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(config: OptimConfig, device: torch.device) -> torch.autocast:
    dtype = AUTOCAST.get(config.amp, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=config.amp != "none")


@torch.no_grad()
def embed(
    model: EmbeddingNet, images: ImageSet, config: Config, ranks: Ranks, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Embed a set in eval mode: embeddings [n, D], and the indices of the readable images.

    Every process embeds a part; all of them get the whole.
    """
    model.eval()
    features, kept = [], []
    batch_size = batch_size if images.images is not None else config.data.batch_size
    cuda = ranks.device.type == "cuda"
    part = ranks.share(len(images))
    for batch in all_batches(images, part, batch_size, config.data.workers, pin_memory=cuda):
        images.warn_unreadable(batch.bad)
        with autocast(config.optim, ranks.device):
            features.append(model(batch.images.to(ranks.device, non_blocking=True)).float())
        kept.append(batch.indices)
    none = torch.empty(0, config.model.embed_dim, device=ranks.device)
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *kept]).to(ranks.device)
    return ranks.gather(torch.cat([none, *features])), ranks.gather(indices).cpu()


def embed_readable(
    model: EmbeddingNet, images: ImageSet, config: Config, ranks: Ranks
) -> tuple[Tensor, ImageSet]:
    """Embed a set; return the embeddings, and the set without its unreadable images."""
    features, kept = embed(model, images, config, ranks)
    return features, images if len(kept) == len(images) else images.subset(kept)


def metrics(config: Config, features: Tensor, images: ImageSet) -> dict[str, float]:
    """Compute the columns of metrics.csv that come from an evaluation."""
    labels = images.labels.to(features.device)
    return evaluate.evaluate(
        features, labels, images.degradation, config.seed, clustering=config.clustering
    )


def calibration_images(images: ImageSet) -> Tensor:
    """A sample over all classes, transformed as for embedding; small if it must be read first."""
    count = 1000 if images.images is not None else 200
    return images.batch(range(0, len(images), max(1, len(images) // count)))[0]


def channel_statistics(images: ImageSet, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels, pixels in [0, 1]: of the whole set if it is in memory."""
    pixels = (sample if images.images is None else images.images).float() / 255
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)
