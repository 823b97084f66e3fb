"""Image sets, their splits and transforms, and batches of them.

Images stay bytes here: the model normalises them on its device. A file's transparency and its EXIF
orientation are ignored, as in the protocol's own pipeline.
"""

import csv
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from train.config import DataConfig, RunError
from train.glyphs import render_glyphs

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
PARTIAL = "PARTIAL"  # a file of this name in a known set's folder: a part of the set is meant

Classes = list[tuple[str, list[str]]]  # names, and paths of images relative to the set's folder


@dataclass(frozen=True)
class Known:
    """What a data set of the protocol must hold, and where to get it."""

    train: tuple[int, int]  # classes, images
    test: tuple[int, int]
    title: str
    source: str
    layout: str


KNOWN = {
    "cub200": Known(
        (100, 5864),
        (100, 5924),
        "Caltech-UCSD Birds-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        "its folder images as cub200/images/001.Black_footed_Albatross/*.jpg",
    ),
    "cars196": Known(
        (98, 8054),
        (98, 8131),
        "Stanford Cars",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "all its images, sorted by class, as cars196/images/CLASS/*.jpg",
    ),
    "online_products": Known(
        (11318, 59551),
        (11316, 60502),
        "Stanford Online Products",
        "https://cvgl.stanford.edu/projects/lifted_struct",
        "its folders as online_products/images/bicycle_final/*.JPG and so on, its lists as "
        "online_products/Info_Files/Ebay_train.txt and Ebay_test.txt",
    ),
}


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

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Images uint8 [m, channels, size, size], and the indices of those that cannot be read.

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
        """The set of these images alone, of the same classes."""
        return replace(
            self,
            labels=self.labels[indices],
            paths=[self.paths[i] for i in indices.tolist()],
            degradation=None if self.degradation is None else self.degradation[indices],
            images=None if self.images is None else self.images[indices],
        )

    def thumbnail(self, index: int, size: int) -> Image.Image:
        """What a model sees of an image when it is evaluated, in colour, [size, size]."""
        pixels, _ = self.batch([index])
        if not len(pixels):
            return Image.new("RGB", (size, size), "grey")
        image = v2.functional.to_pil_image(pixels[0]).convert("RGB")
        return image.resize((size, size), Image.Resampling.BICUBIC)

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
        """The other images of a class, from the one after `index` on, round to the one before."""
        own = (self.labels == self.labels[index]).nonzero().flatten().tolist()
        place = own.index(index)
        yield from own[place + 1 :] + own[:place]


def load(config: DataConfig, channels: int, crop: int | None = None) -> dict[str, ImageSet]:
    """The sets "train", "test" and, if a validation split is asked for, "validation".

    No class of the test set is in another. Images are read as grey (1 channel) or colour (3);
    `crop` is the size that the backbone was made for, where that is not 224.
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


def find_classes(config: DataConfig) -> tuple[Path, Path, dict[str, Classes]]:
    """A data set's folder, the one that its paths start from, and its training and test classes."""
    data_root = config.data_root.expanduser()
    if config.name == "glyphs":
        try:
            root = render_glyphs(data_root, config.glyph_characters, config.glyph_images)
        except ValueError as error:
            raise RunError(f"--glyph-characters: {error}") from None
    else:
        root = data_root / config.name
    known = KNOWN.get(config.name)
    if not root.is_dir():
        raise RunError(
            f"no folder {root}: "
            + (
                _where(config.name)
                if known
                else f"--dataset is glyphs, {', '.join(KNOWN)} or a folder in --data-root that "
                "holds a folder of images for each class"
            )
        )
    folder, images = root, root / "images"
    if config.name == "online_products":
        folder = images
        parts = {part: listed_classes(root, part) for part in ("train", "test")}
        if not config.skip_bad_images:
            check_files(folder, parts)
    elif not known and (root / "train").is_dir() and (root / "test").is_dir():
        parts = {part: class_folders(root, f"{part}/") for part in ("train", "test")}
    else:
        folder = images if known or images.is_dir() else root
        classes = class_folders(folder)
        half = len(classes) // 2
        parts = {"train": classes[:half], "test": classes[half:]}
    train, test = ((len(p), sum(len(files) for _, files in p)) for p in parts.values())
    if known and (train, test) != (known.train, known.test) and not (root / PARTIAL).exists():
        raise RunError(
            f"{root} has {_count(train)} to train on and {_count(test)} to test on, "
            f"but must have {_count(known.train)} and {_count(known.test)}: "
            f"{_where(config.name)}; if a part is meant, put an empty file {PARTIAL} into {root}"
        )
    if min(train[0], test[0]) < 2:
        raise RunError(
            f"{folder} has {train[0]} classes to train on and {test[0]} to test on, "
            "but at least 2 of each are needed"
        )
    return root, folder, parts


def _where(name: str) -> str:
    known = KNOWN[name]
    return f"get {known.title} ({known.source}) and put {known.layout} under --data-root"


def _count(classes_and_images: tuple[int, int]) -> str:
    return "{:,} classes of {:,} images".format(*classes_and_images)


def class_folders(folder: Path, part: str = "") -> Classes:
    """The class folders in folder/part: by the integer before the dot of "001.Name" if all have
    one, and else by name."""
    if not (folder / part).is_dir():
        raise RunError(f"no folder {folder / part}: it must hold a folder of images for each class")
    names = [path.name for path in (folder / part).iterdir() if path.is_dir() and _is_own(path)]
    numbers = {name: int(match[1]) for name in names if (match := re.match(r"(\d+)\.", name))}
    classes = []
    for name in sorted(names, key=lambda n: (numbers[n] if len(numbers) == len(names) else 0, n)):
        files = (folder / part / name).iterdir()
        found = sorted(f.name for f in files if f.suffix.lower() in SUFFIXES and _is_own(f))
        if not found:
            kinds = ", ".join(sorted(SUFFIXES))
            raise RunError(f"class folder {folder / part / name} holds no images ({kinds})")
        classes.append((name, [f"{part}{name}/{file}" for file in found]))
    return classes


def _is_own(path: Path) -> bool:
    """Whether a name is no litter: macOS leaves "._x" behind, notebooks ".ipynb_checkpoints"."""
    return "._" not in path.name and not path.name.startswith(".")


def listed_classes(root: Path, part: str) -> Classes:
    """The classes of Stanford Online Products, and their images, in the order of the list."""
    file = root / "Info_Files" / f"Ebay_{part}.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunError(f"no file {file}: {_where('online_products')}") from None
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        columns = line.split()
        if len(columns) != 4:
            raise RunError(
                f"line {number} of {file} is {line[:80]!r}, "
                "but must be: image_id class_id super_class_id path"
            )
        classes.setdefault(columns[1], []).append(columns[3])
    return [(f"{Path(paths[0]).parent}/{name}", paths) for name, paths in classes.items()]


def check_files(folder: Path, parts: dict[str, Classes]) -> None:
    """Raise a RunError if a listed image is missing; each folder is listed once, to be fast."""
    wanted = {path for classes in parts.values() for _, paths in classes for path in paths}
    there = {
        f"{parent}/{file.name}"
        for parent in {path.rpartition("/")[0] for path in wanted}
        if (folder / parent).is_dir()
        for file in (folder / parent).iterdir()
    }
    if missing := sorted(wanted - there):
        raise RunError(
            f"{len(missing):,} of {len(wanted):,} listed images are missing, one is "
            f"{folder / missing[0]}: {_where('online_products')}, or go on without them with "
            "--skip-bad-images"
        )


def split(classes: Classes, by: str, share: float) -> dict[str, Classes]:
    """Training classes divided into "train" and "validation".

    By "class" the first `share` of them trains; by "samples" the first `share` of the images of
    each, at least one.
    """
    if by == "class":
        count = round(share * len(classes))
        train, validation = classes[:count], classes[count:]
    else:
        cuts = [max(1, round(share * len(files))) for _, files in classes]
        both = list(zip(classes, cuts, strict=True))
        train = [(name, files[:cut]) for (name, files), cut in both]
        validation = [(name, files[cut:]) for (name, files), cut in both if cut < len(files)]
    if len(train) < 2 or len(validation) < 2 or max(len(files) for _, files in validation) < 2:
        raise RunError(
            f"--validation {by} with --train-share {share} leaves {len(train)} of {len(classes)} "
            f"classes to train on and {len(validation)} to validate on, but at least 2 of each are "
            "needed, and one to validate on with 2 images: change --train-share"
        )
    return {"train": train, "validation": validation}


def transforms(augmentation: str, size: int) -> tuple[v2.Transform, v2.Transform]:
    """What is done to Pillow's images to train on and to test on; both give [size, size].

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
    """An image of any kind as grey (1 channel) or colour (3), or a RunError that names it."""
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
    """The set with every image decoded; bad images are named and left out, if they may be."""
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


class Step(NamedTuple):
    """A global batch, over all processes."""

    indices: Tensor  # int64 [batch_size]
    seeds: Tensor  # int64 [batch_size], of the augmentation
    seed: int  # of the loss's sampler


class ClassBalancedBatches:
    """Batches of batch_size / samples_per_class draws of a class, and then of its images.

    Both draws are with replacement; an epoch is floor(n / batch_size) batches. A step is a pure
    function of (seed, epoch, step), so that a run can be resumed at any of them.
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
        """The steps of an epoch: from `skip` on, and as if it had `limit` steps at most."""
        for step in range(skip, min(self.length, self.length if limit is None else limit)):
            random = np.random.default_rng((self.seed, epoch, step))
            drawn = random.integers(len(self.sizes), size=(self.shape[0], 1))
            within = random.integers(self.sizes[drawn], size=self.shape)
            indices = torch.from_numpy(self.order[self.starts[drawn] + within].ravel())
            seeds = torch.from_numpy(random.integers(2**62, size=len(indices)))
            yield Step(indices, seeds, int(random.integers(2**62)))


class Batch(NamedTuple):
    """What a process computes on; a NamedTuple, for torch to find the tensors to pin."""

    images: Tensor  # uint8 [m, channels, size, size]
    labels: Tensor  # int64 [m]
    indices: Tensor  # int64 [m], as drawn, even where another image of the class stands in
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

    Bad images are left out, if they may be: a batch can be smaller than the others, and even empty.
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
        worker_init_fn=_leave_interrupts,
        generator=torch.Generator(),  # or it would draw from the global one
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


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process: the main one ends the others, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
