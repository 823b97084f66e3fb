"""Image sets, decoded and transformed.

Images are uint8 here; the model normalises them on its device. A file's transparency and its EXIF
orientation are ignored, as in the protocol's own pipeline.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from train.config import DataConfig, RunError
from train.data.layouts import find_classes, split


@dataclass(frozen=True)
class ImageSet:
    """Images, on the disk or in memory, with what is known about them."""

    labels: Tensor  # int64 [n], counting from 0
    paths: list[str]  # relative to `folder`, "/" between the parts
    classes: list[str]
    folder: Path
    degradation: Tensor | None  # float32 [n], from degradation.csv where there is one
    size: int
    channels: int
    train_transform: v2.Transform = field(repr=False)
    test_transform: v2.Transform = field(repr=False)
    skip_bad_images: bool = False
    images: Tensor | None = None  # uint8 [n, channels, size, size] if they are kept in memory
    warned: set[str] = field(default_factory=set, repr=False)  # unreadable files already reported

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Read images, uint8 [m, channels, size, size]; also return the indices of unreadable ones.

        With seeds, one for each image, they are augmented: an image depends on its index and seed
        alone. Without, the test transform is applied. If bad images are skipped, the next readable
        image of the class takes a bad one's place under augmentation; else it is left out.
        """
        indices = torch.as_tensor(indices).tolist()
        if self.images is not None:
            return self.images[indices], []
        bad: list[int] = []
        pixels = [torch.empty((0, self.channels, self.size, self.size), dtype=torch.uint8)]
        augment = seeds is not None
        seeds = torch.as_tensor(seeds).tolist() if augment else [0] * len(indices)
        # Not torch.manual_seed, which would seed the GPUs as well.
        with torch.random.fork_rng(devices=[]):
            for index, seed in zip(indices, seeds, strict=True):
                image = self._decode(index, bad, stand_in=augment)
                if image is not None:
                    torch.default_generator.manual_seed(seed)
                    image = (self.train_transform if augment else self.test_transform)(image)
                    pixels.append(v2.functional.pil_to_tensor(image)[None])
        return torch.cat(pixels), bad

    def subset(self, indices: Tensor) -> "ImageSet":
        """Keep these images alone; the classes stay the same."""
        return replace(
            self,
            labels=self.labels[indices],
            paths=[self.paths[i] for i in indices.tolist()],
            degradation=None if self.degradation is None else self.degradation[indices],
            images=None if self.images is None else self.images[indices],
        )

    def thumbnail(self, index: int, size: int) -> Image.Image:
        """An image as the model sees it in evaluation, in colour, [size, size]."""
        pixels, _ = self.batch([index])
        if not len(pixels):
            return Image.new("RGB", (size, size), "grey")
        image = v2.functional.to_pil_image(pixels[0]).convert("RGB")
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def warn_unreadable(self, files: list[str]) -> None:
        """Report each unreadable file once."""
        for file in files:
            if file not in self.warned:
                self.warned.add(file)
                tqdm.write(f"skipped, cannot be read: {file}")

    def _decode(self, index: int, bad: list[int], stand_in: bool) -> Image.Image | None:
        for i in chain([index], self._others(index) if stand_in else ()):
            try:
                return decode(self.folder / self.paths[i], self.channels)
            except RunError:
                if not self.skip_bad_images:
                    raise
                bad.append(i)
        if stand_in:
            name = self.classes[int(self.labels[index])]
            raise RunError(f"none of the {name} images in {self.folder} can be read")
        return None

    def _others(self, index: int) -> Iterator[int]:
        """The other images of a class, starting after `index` and wrapping round."""
        own = (self.labels == self.labels[index]).nonzero().flatten().tolist()
        place = own.index(index)
        yield from own[place + 1 :] + own[:place]


def load(config: DataConfig, channels: int, crop: int | None = None) -> dict[str, ImageSet]:
    """Load the sets "train", "test" and, if a validation split is configured, "validation".

    No test class is in another set. Images are read as grey (1 channel) or colour (3);
    `crop` is the backbone's own image size, if that is not 224.
    """
    root, folder, parts = find_classes(config)
    if config.validation != "none":
        parts |= split(parts["train"], config.validation, config.train_share)
    size = config.image_size or {"none": 28, "big": 256}.get(config.augmentation, crop or 224)
    train_transform, test_transform = transforms(config.augmentation, size)
    sets = {}
    for part, classes in parts.items():
        paths = [path for _, files in classes for path in files]
        sets[part] = ImageSet(
            labels=torch.tensor([i for i, (_, files) in enumerate(classes) for _ in files]),
            paths=paths,
            classes=[name for name, _ in classes],
            folder=folder,
            degradation=read_degradation(root / "degradation.csv", paths),
            size=size,
            channels=channels,
            train_transform=train_transform,
            test_transform=test_transform,
            skip_bad_images=config.skip_bad_images,
        )
    if config.augmentation == "none":
        total = sum(map(len, sets.values()))
        with tqdm(total=total, desc="reading images", unit="img", disable=None, leave=False) as bar:
            return {part: in_memory(images, bar) for part, images in sets.items()}
    return sets


def transforms(augmentation: str, size: int) -> tuple[v2.Transform, v2.Transform]:
    """The transforms of Pillow's images for training and for testing; both give [size, size].

    A test image's shorter side becomes 256 before the centre is cut out at 224 to 256, the sizes of
    the protocol, and 8/7 of any other size.
    """
    if augmentation == "none":
        whole = v2.Resize((size, size))
        return whole, whole
    resize = v2.Resize(256 if 224 <= size <= 256 else round(size * 8 / 7))
    flip = v2.RandomHorizontalFlip()
    train: list[v2.Transform] = [v2.RandomResizedCrop(size), flip]
    if augmentation == "adv":
        train[1:1] = [v2.RandomGrayscale(0.2), v2.ColorJitter(0.2, 0.2, 0.2, 0.2)]
    elif augmentation == "red":
        train = [resize, v2.RandomCrop(size), flip]
    return v2.Compose(train), v2.Compose([resize, v2.CenterCrop(size)])


def decode(file: Path, channels: int) -> Image.Image:
    """Read an image of any kind as grey (1 channel) or colour (3); a RunError names a bad file."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P":  # convert would warn about what transparent colours become
                image = image.convert("RGBA")
            return image.convert("L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises nearly anything
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise RunError(
            f"cannot read image {file} ({reason}): get it again, or go on without such images "
            "with --skip-bad-images"
        ) from None


def in_memory(images: ImageSet, bar: "tqdm[None]") -> ImageSet:
    """Decode every image; report bad ones and leave them out, if that is allowed."""
    pixels = torch.empty(
        (len(images), images.channels, images.size, images.size), dtype=torch.uint8
    )
    kept: list[int] = []
    for i in range(len(images)):
        image, bad = images.batch([i])
        if bad:
            tqdm.write(f"skipping {images.folder / images.paths[i]}: it cannot be read")
        else:
            pixels[len(kept)] = image[0]
            kept.append(i)
        bar.update()
    for name, count in zip(
        images.classes, images.labels[kept].bincount(minlength=len(images.classes)), strict=True
    ):
        if not count:
            raise RunError(f"none of the {name} images in {images.folder} can be read")
    return replace(images.subset(torch.tensor(kept)), images=pixels[: len(kept)])


def read_degradation(file: Path, paths: list[str]) -> Tensor | None:
    if not file.exists():
        return None
    try:
        with file.open(newline="", encoding="utf-8") as rows:
            known = {row["path"]: float(row["degradation"]) for row in csv.DictReader(rows)}
        return torch.tensor([known[path] for path in paths])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} must give each image's path and degradation: {error}") from None
