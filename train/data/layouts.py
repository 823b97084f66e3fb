"""Find the classes and images of a data set, and split them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.config import DataConfig, RunError
from train.data.glyphs import render_glyphs

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
PARTIAL = "PARTIAL"  # a file of this name in a known set's folder: the set is meant to be partial

Classes = list[tuple[str, list[str]]]  # names, and paths of images relative to some folder
Found = tuple[Path, dict[str, Classes]]  # that folder, and the classes of "train" and "test"


@dataclass(frozen=True)
class Known:
    """A data set of the protocol: what it must hold, where to get it and how to read it."""

    train: tuple[int, int]  # classes, images
    test: tuple[int, int]
    title: str
    source: str
    layout: str
    classes: Callable[[Path, "Known", bool], Found]  # of the set's folder; True skips bad images

    @property
    def advice(self) -> str:
        return f"get {self.title} ({self.source}) and put {self.layout} under --data-root"


def find_classes(config: DataConfig) -> tuple[Path, Path, dict[str, Classes]]:
    """Find a data set: its folder, the folder that paths are relative to, and its classes."""
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
        advice = (
            f"--dataset is glyphs, {', '.join(KNOWN)} or a folder in --data-root that "
            "holds a folder of images for each class"
        )
        raise RunError(f"no folder {root}: {known.advice if known else advice}")
    if known:
        folder, parts = known.classes(root, known, config.skip_bad_images)
    else:
        folder, parts = any_folders(root)
    train, test = ((len(p), sum(len(files) for _, files in p)) for p in parts.values())
    if known and (train, test) != (known.train, known.test) and not (root / PARTIAL).exists():
        raise RunError(
            f"{root} has {_count(train)} to train on and {_count(test)} to test on, "
            f"but must have {_count(known.train)} and {_count(known.test)}: "
            f"{known.advice}; if the set is meant to be partial, create an empty file {PARTIAL} "
            f"in {root}"
        )
    if min(train[0], test[0]) < 2:
        raise RunError(
            f"{folder} has {train[0]} classes to train on and {test[0]} to test on, "
            "but at least 2 of each are needed"
        )
    return root, folder, parts


def _count(classes_and_images: tuple[int, int]) -> str:
    return "{:,} classes of {:,} images".format(*classes_and_images)


# --- folders of classes


def any_folders(root: Path) -> Found:
    """Class folders in train/ and test/, in images/ or in the set's folder itself."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root, {part: class_folders(root, f"{part}/") for part in ("train", "test")}
    images = root / "images"
    return halves(images if images.is_dir() else root)


def image_folders(root: Path, known: Known, skip_bad_images: bool) -> Found:
    """Class folders in images/; bad images are found when they are read."""
    return halves(root / "images")


def halves(folder: Path) -> Found:
    """The first half of the class folders trains, the second half tests."""
    classes = class_folders(folder)
    half = len(classes) // 2
    return folder, {"train": classes[:half], "test": classes[half:]}


def class_folders(folder: Path, part: str = "") -> Classes:
    """The class folders in folder/part, ordered by the integer before the dot of "001.Name" if all
    have one, otherwise by name."""
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
    """Whether a name is not litter such as macOS's "._x" and notebooks' ".ipynb_checkpoints"."""
    return "._" not in path.name and not path.name.startswith(".")


# --- lists of images


def ebay_lists(root: Path, known: Known, skip_bad_images: bool) -> Found:
    """The lists of Stanford Online Products; a missing image counts as a bad one."""
    folder = root / "images"
    parts = {part: listed_classes(root, part, known.advice) for part in ("train", "test")}
    if not skip_bad_images:
        check_files(folder, parts, known.advice)
    return folder, parts


def listed_classes(root: Path, part: str, advice: str) -> Classes:
    """The classes of Info_Files/Ebay_{part}.txt, and their images, in the order of the list."""
    file = root / "Info_Files" / f"Ebay_{part}.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunError(f"no file {file}: {advice}") from None
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


def check_files(folder: Path, parts: dict[str, Classes], advice: str) -> None:
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
            f"{folder / missing[0]}: {advice}, or go on without them with --skip-bad-images"
        )


# --- validation


def split(classes: Classes, by: str, share: float) -> dict[str, Classes]:
    """Training classes divided into "train" and "validation".

    By "class", the first `share` of the classes trains; by "samples", the first `share` of each
    class's images, at least one.
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


# --- the protocol


KNOWN = {
    "cub200": Known(
        (100, 5864),
        (100, 5924),
        "Caltech-UCSD Birds-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        "its folder images as cub200/images/001.Black_footed_Albatross/*.jpg",
        image_folders,
    ),
    "cars196": Known(
        (98, 8054),
        (98, 8131),
        "Stanford Cars",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "all its images, sorted by class, as cars196/images/CLASS/*.jpg",
        image_folders,
    ),
    "online_products": Known(
        (11318, 59551),
        (11316, 60502),
        "Stanford Online Products",
        "https://cvgl.stanford.edu/projects/lifted_struct",
        "its folders as online_products/images/bicycle_final/*.JPG and so on, its lists as "
        "online_products/Info_Files/Ebay_train.txt and Ebay_test.txt",
        ebay_lists,
    ),
}
