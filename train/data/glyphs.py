"""The rendered data set: letters in matplotlib's fonts, blurred, noisy, occluded to a known degree.

Its layout is CUB200's, `images/001.LATIN_SMALL_LETTER_Q/*.png` and so on, so that one loader reads
both; `degradation.csv` (path, degradation in [0, 1]) is next to `images`.
"""

import csv
import math
import random
import shutil
import tempfile
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

VERSION = 1  # of the pictures: part of the folder's name, raised whenever a pixel changes
SIZE = 28
OVERSAMPLING = 4
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
UPRIGHT = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
LOOKALIKE = 0.88  # normalised cross-correlation above which two characters count as one

Array = NDArray[np.float64]


def render_glyphs(data_root: Path, characters: int, images: int) -> Path:
    """Return the folder of the glyph set under `data_root`, which is rendered if it is missing.

    It is rendered into a temporary folder and renamed when complete: interruptions leave nothing.
    """
    folder = data_root / f"glyphs-v{VERSION}-{characters}x{images}"
    if folder.is_dir():
        return folder
    chosen = choose_characters(characters)
    print(f"rendering {characters * images} glyph images, once, into {folder}", flush=True)
    data_root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".glyphs-", dir=data_root))
    try:
        _render_into(scratch, chosen, images)
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same pictures
                raise
    except OSError as error:
        error.filename = str(folder)  # a full disk does not say which file
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _render_into(folder: Path, characters: list[str], images: int) -> None:
    rows: list[tuple[str, str]] = []
    bar = tqdm(total=len(characters) * images, desc="rendering glyphs", unit="img", disable=None)
    with bar, (folder / "degradation.csv").open("w", newline="", encoding="utf-8") as file:
        for number, character in enumerate(characters, start=1):
            name = unicodedata.name(character).replace(" ", "_")
            (folder / "images" / f"{number:03d}.{name}").mkdir(parents=True)
            for index in range(1, images + 1):
                # One stream per picture: a smaller set is a part of a larger one.
                picture, degradation = draw(character, random.Random(f"{character}/{index}"))
                path = f"{number:03d}.{name}/{name.lower()}_{index:04d}.png"
                Image.fromarray(picture).save(folder / "images" / path)
                rows.append((path, f"{degradation:.6f}"))
                bar.update()
        csv.writer(file).writerows([("path", "degradation"), *rows])


def choose_characters(count: int) -> list[str]:
    """The first `count` of a fixed shuffle of the letters and digits that all fonts have.

    Look-alikes are left out: Latin A, Greek Alpha and Cyrillic A as three classes are label noise.
    """
    characters = list(_distinct_characters())
    if not 4 <= count <= len(characters):
        raise ValueError(
            f"{count} glyph characters asked for, but 4 to {len(characters)} are possible"
        )
    random.Random(VERSION).shuffle(characters)
    return characters[:count]


@cache
def _distinct_characters() -> tuple[str, ...]:
    everywhere = set.intersection(*(set(FT2Font(str(_path(font))).get_charmap()) for font in FONTS))
    kinds = ("Lu", "Ll", "Nd")
    candidates = [chr(c) for c in sorted(everywhere) if unicodedata.category(chr(c)) in kinds]
    likeness = np.max(
        [shapes @ shapes.T for shapes in map(_shapes, UPRIGHT, [candidates] * 3)], axis=0
    )
    kept: list[int] = []
    for i in range(len(candidates)):
        if not kept or likeness[i, kept].max() <= LOOKALIKE:
            kept.append(i)
    return tuple(candidates[i] for i in kept)


def draw(character: str, rng: random.Random) -> tuple[NDArray[np.uint8], float]:
    """One picture [28, 28] of a character, and how degraded it is: 0 is clean, 1 the worst."""
    degradation = rng.random() ** 1.3
    ink = _warped(_ink(rng.choice(FONTS), character, rng.choice((0, 0, 1, 2))), rng)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.25)
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    background = rng.uniform(0.05, 0.25) + slope * (np.cos(angle) * x + np.sin(angle) * y)
    if degradation > 0.25:
        ink, background = _occluded(ink, background, 0.1 * degradation, rng)
    blur = _gaussian(0.3 + 2 * degradation)
    contrast = rng.uniform(0.6, 0.75) * (1 - 0.4 * degradation)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal((SIZE, SIZE))
    picture = blur @ (background + contrast * ink) @ blur.T + (0.01 + 0.07 * degradation) * noise
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8), degradation


@cache
def _path(font: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


@cache
def _font(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_path(font)), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=len(FONTS) * 3)  # one character's
def _ink(font: str, character: str, stroke: int) -> Image.Image:
    """The character, 4 x oversampled, its longer side 20 of 28 pixels, centred."""
    canvas, longest = SIZE * OVERSAMPLING, 20 * OVERSAMPLING
    left, top, right, bottom = _font(font, 100).getbbox(character)
    size = round(100 * longest / max(right - left, bottom - top))
    box = _font(font, size).getbbox(character, stroke_width=stroke)
    image = Image.new("L", (canvas, canvas))
    corner = ((canvas - box[0] - box[2]) // 2, (canvas - box[1] - box[3]) // 2)
    ImageDraw.Draw(image).text(corner, character, 255, _font(font, size), stroke_width=stroke)
    return image


def _warped(image: Image.Image, rng: random.Random) -> Array:
    """A random rotation, shear, scale and shift; the result [28, 28] in [0, 1]."""
    angle, shear = rng.gauss(0, 0.1), rng.gauss(0, 0.1)
    scale_x, scale_y = rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1)
    shift_x, shift_y = (rng.uniform(-1.5, 1.5) * OVERSAMPLING for _ in range(2))
    c, s, middle = math.cos(angle), math.sin(angle), image.width / 2
    a, b, d, e = c / scale_x, (s + shear) / scale_x, -s / scale_y, c / scale_y
    coefficients = (
        *(a, b, middle - a * (middle + shift_x) - b * (middle + shift_y)),
        *(d, e, middle - d * (middle + shift_x) - e * (middle + shift_y)),
    )
    warped = image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(warped.reduce(OVERSAMPLING), dtype=np.float64) / 255


def _occluded(
    ink: Array, background: Array, area: float, rng: random.Random
) -> tuple[Array, Array]:
    """Cover a share `area` of the picture by a grey bar, in its middle part, where it hurts."""
    aspect = math.exp(rng.uniform(-0.7, 0.7))
    height, width = (max(1, round(SIZE * math.sqrt(area) * side)) for side in (aspect, 1 / aspect))
    top, left = (rng.randrange(4, max(5, SIZE - 4 - side)) for side in (height, width))
    bar = (slice(top, top + height), slice(left, left + width))
    ink, background = ink.copy(), background.copy()
    ink[bar], background[bar] = 0, rng.uniform(0.2, 0.8)
    return ink, background


def _gaussian(sigma: float) -> Array:
    """The matrix [28, 28] that blurs an axis; rows sum to one, so that borders do not darken."""
    offset = np.arange(SIZE)
    weights: Array = np.exp(-0.5 * ((offset[:, None] - offset) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _shapes(font: str, characters: list[str]) -> Array:
    """Rows, centred and of unit length, whose products are the shapes' correlations at one size."""
    side, rows = 24, []
    for character in characters:
        left, top, right, bottom = map(int, _font(font, 96).getbbox(character))
        image = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(image).text((-left, -top), character, 255, _font(font, 96))
        image.thumbnail((side, side), Image.Resampling.BOX)
        canvas = Image.new("L", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        row = np.asarray(canvas, dtype=np.float64).ravel()
        rows.append((row - row.mean()) / np.linalg.norm(row - row.mean()))
    return np.stack(rows)
