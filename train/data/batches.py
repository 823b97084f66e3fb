"""Class-balanced batches to train on, and all images in order to embed."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.config import RunError
from train.data.sets import ImageSet


class Step(NamedTuple):
    """One global batch, over all processes."""

    indices: Tensor  # int64 [batch_size]
    seeds: Tensor  # int64 [batch_size], of the augmentation
    seed: int  # of the loss's sampler


class ClassBalancedBatches:
    """Batches that draw batch_size / samples_per_class classes, and then images of each.

    Both draws are with replacement; an epoch is floor(n / batch_size) batches. A step is a pure
    function of (seed, epoch, step), so that a run can be resumed at any step.
    """

    def __init__(self, labels: Tensor, batch_size: int, samples_per_class: int, seed: int) -> None:
        self.length = len(labels) // batch_size
        if not self.length:
            raise RunError(
                f"--batch-size is {batch_size}, but there are {len(labels)} training images"
            )
        self.shape = (batch_size // samples_per_class, samples_per_class)
        self.sizes = labels.bincount().numpy()
        if self.shape[0] > len(self.sizes):
            raise RunError(
                f"--batch-size {batch_size} with --samples-per-class {samples_per_class} draws "
                f"{self.shape[0]} classes, but there are {len(self.sizes)}: fewer classes than a "
                "batch needs; lower the one or raise the other"
            )
        self.starts = self.sizes.cumsum() - self.sizes
        self.order = labels.argsort(stable=True).numpy()
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, skip: int = 0, limit: int | None = None) -> Iterator[Step]:
        """Yield an epoch's steps from number `skip` on, as if it had at most `limit` steps."""
        for step in range(skip, min(self.length, self.length if limit is None else limit)):
            random = np.random.default_rng((self.seed, epoch, step))
            drawn = random.integers(len(self.sizes), size=(self.shape[0], 1))
            within = random.integers(self.sizes[drawn], size=self.shape)
            indices = torch.from_numpy(self.order[self.starts[drawn] + within].ravel())
            seeds = torch.from_numpy(random.integers(2**62, size=len(indices)))
            yield Step(indices, seeds, int(random.integers(2**62)))


class Batch(NamedTuple):
    """One process's part of a step; a NamedTuple, so that torch finds the tensors to pin."""

    images: Tensor  # uint8 [m, channels, size, size]
    labels: Tensor  # int64 [m]
    indices: Tensor  # int64 [m], as drawn, even if another image of the class replaces one
    seed: int  # of the loss's sampler
    bad: list[str]  # images that cannot be read


def train_batches(
    images: ImageSet, steps: Iterable[Step], part: slice, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Augmented images of one process's contiguous `part` of every global batch."""
    work = ((s.indices[part].tolist(), s.seeds[part].tolist(), s.seed) for s in steps)
    return _batches(images, work, workers, pin_memory)


def all_batches(
    images: ImageSet, indices: Sequence[int], batch_size: int, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Images under the test transform, in order.

    If bad images are skipped, a batch can be smaller than the others, and even empty.
    """
    starts = range(0, len(indices), batch_size)
    work = ((list(indices[start : start + batch_size]), None, 0) for start in starts)
    return _batches(images, work, workers, pin_memory)


Work = tuple[list[int], list[int] | None, int]  # indices, seeds of the augmentation, loss's seed


def _batches(
    images: ImageSet, work: Iterable[Work], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        _Reader(images),
        batch_size=None,
        sampler=work,
        num_workers=workers if images.images is None else 0,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # otherwise it would draw from the global one
    )
    try:
        for batch in loader:
            if isinstance(batch, RunError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(
            f"a process that reads images was killed ({' '.join(str(error).split())}): it may have "
            "run out of memory, or of shared memory (/dev/shm); try fewer --workers"
        ) from None


class _Reader(Dataset[Batch | RunError]):
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, work: Work) -> Batch | RunError:
        indices, seeds, seed = work
        try:
            images, bad = self.images.batch(indices, seeds)
        except RunError as error:
            return error  # raised in a worker it would arrive as a traceback
        if seeds is None:
            indices = [i for i in indices if i not in bad]
        taken = torch.tensor(indices, dtype=torch.int64)
        names = [str(self.images.folder / self.images.paths[i]) for i in bad]
        return Batch(images, self.images.labels[taken], taken, seed, names)


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process, to the main one: no tracebacks from workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
