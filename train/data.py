"""Image sets in the CUB200 folder layout, and class-balanced batches of them."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from train.config import DataConfig, RunError
from train.glyphs import render_glyphs

SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with what is known about them."""

    images: Tensor  # uint8 [n, channels, height, width]
    labels: Tensor  # int64 [n], counting from 0
    paths: list[str]  # relative to the folder of images
    classes: list[str]
    degradation: Tensor | None  # float32 [n], from degradation.csv where there is one

    def __len__(self) -> int:
        return len(self.paths)


def load(config: DataConfig, channels: int) -> tuple[ImageSet, ImageSet]:
    """Training and test set: the first half of the classes and the second, so none is in both."""
    root = config.data_root.expanduser()
    if config.name == "glyphs":
        try:
            folder = render_glyphs(root, config.glyph_characters, config.glyph_images)
        except ValueError as error:
            raise RunError(f"--glyph-characters: {error}") from None
    else:
        folder = root / config.name
    classes = class_folders(folder / "images")
    half = len(classes) // 2
    total = sum(len(files) for _, files in classes)
    with tqdm(total=total, desc="reading images", unit="img", disable=None, leave=False) as bar:
        train, test = (
            read_images(folder, part, config.image_size, channels, bar)
            for part in (classes[:half], classes[half:])
        )
    return train, test


def class_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """Class names and image files, the classes by the integer before the dot of "001.Name"."""
    if not folder.is_dir():
        raise RunError(f"no folder {folder}: it must hold the images as 001.Class/*.png (or .jpg)")
    numbered: list[tuple[int, Path]] = []
    for path in folder.iterdir():
        if "._" in path.name or not path.is_dir():  # "._": what macOS leaves behind
            continue
        if not (match := re.match(r"(\d+)\.", path.name)):
            raise RunError(f"class folder {path} is not named like 001.Name")
        numbered.append((int(match[1]), path))
    classes = []
    for _, path in sorted(numbered):
        files = sorted(
            f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and "._" not in f.name
        )
        if not files:
            raise RunError(f"class folder {path} holds no .png or .jpg images")
        classes.append((path.name, files))
    if len(classes) < 4:
        raise RunError(f"{folder} holds {len(classes)} classes, but at least 4 are needed")
    return classes


def read_images(
    folder: Path, classes: list[tuple[str, list[Path]]], size: int, channels: int, bar: "tqdm[None]"
) -> ImageSet:
    """Decode every image of the given classes, as grey (1 channel) or colour (3 channels)."""
    files = [(file, label) for label, (_, files) in enumerate(classes) for file in files]
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)
    for i, (file, _) in enumerate(files):
        images[i] = decode(file, size, channels)
        bar.update()
    paths = [file.relative_to(folder / "images").as_posix() for file, _ in files]
    return ImageSet(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor([label for _, label in files]),
        paths=paths,
        classes=[name for name, _ in classes],
        degradation=read_degradation(folder / "degradation.csv", paths),
    )


def decode(file: Path, size: int, channels: int) -> np.ndarray:
    """One image [size, size, channels] of bytes."""
    try:
        with Image.open(file) as image:
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(size, size, channels)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise RunError(
            f"cannot read image {file} ({reason}): replace or delete it"
            " (a rendered set is made anew when its folder is deleted)"
        ) from None


def read_degradation(file: Path, paths: list[str]) -> Tensor | None:
    if not file.exists():
        return None
    try:
        with file.open(newline="", encoding="utf-8") as rows:
            known = {row["path"]: float(row["degradation"]) for row in csv.DictReader(rows)}
        return torch.tensor([known[path] for path in paths])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} must give each image's path and degradation: {error}") from None


class ClassBalancedBatches(Sampler[Tensor]):
    """Batches of indices: batch_size / samples_per_class draws of a class, then of its images.

    Both draws are with replacement; an epoch is floor(n / batch_size) batches.
    """

    def __init__(
        self, labels: Tensor, batch_size: int, samples_per_class: int, generator: torch.Generator
    ) -> None:
        self.length = len(labels) // batch_size
        if not self.length:
            raise RunError(
                f"--batch-size is {batch_size}, but there are {len(labels)} training images"
            )
        self.shape = (batch_size // samples_per_class, samples_per_class)
        self.sizes = torch.bincount(labels)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.order = labels.argsort(stable=True)
        self.generator = generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.length):
            drawn = torch.randint(len(self.sizes), self.shape[:1], generator=self.generator)[
                :, None
            ]
            share = torch.rand(self.shape, generator=self.generator, dtype=torch.float64)
            yield self.order[self.starts[drawn] + (share * self.sizes[drawn]).long()].flatten()
