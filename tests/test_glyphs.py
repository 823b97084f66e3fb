"""The rendered glyph set: the same everywhere, in the right layout, degraded as it says."""

import csv
import errno
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import glyphs
from train.evaluate import spearman


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    first, second = (glyphs.render_glyphs(tmp_path / name, 6, 4) for name in "ab")
    assert contents(first) == contents(second)
    assert len({data for name, data in contents(first).items() if name.endswith(".png")}) == 24


def test_a_smaller_set_is_part_of_a_larger_one(tmp_path):
    small, large = (glyphs.render_glyphs(tmp_path, *size) for size in ((4, 2), (6, 3)))
    large_files = contents(large)
    for name, data in contents(small).items():
        assert name == "degradation.csv" or large_files[name] == data


def test_the_layout_is_that_of_cub200_with_degradation_next_to_it(tmp_path):
    folder = glyphs.render_glyphs(tmp_path, 12, 3)
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert [int(name.split(".")[0]) for name in names] == list(range(1, 13))
    assert len({name.split(".")[1] for name in names}) == 12
    with (folder / "degradation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = {p.relative_to(folder / "images").as_posix() for p in folder.rglob("*.png")}
    assert {row["path"] for row in rows} == images
    assert all(0 <= float(row["degradation"]) <= 1 for row in rows)
    with Image.open(folder / "images" / rows[0]["path"]) as image:
        assert (image.mode, image.size) == ("L", (glyphs.SIZE, glyphs.SIZE))


def test_an_existing_set_is_not_rendered_again(tmp_path, monkeypatch):
    folder = glyphs.render_glyphs(tmp_path, 4, 2)
    monkeypatch.setattr(glyphs, "draw", None)
    assert glyphs.render_glyphs(tmp_path, 4, 2) == folder


def test_characters_are_letters_and_digits_that_do_not_look_alike():
    characters = glyphs.choose_characters(300)
    assert len(set(characters)) == 300
    assert {unicodedata.category(c) for c in characters} <= {"Lu", "Ll", "Nd"}
    for alike in ("A\u0391\u0410", "o\u03bf\u043e", "O\u039f\u041e", "H\u0397\u041d"):
        assert sum(c in characters for c in alike) <= 1
    for font in glyphs.UPRIGHT:
        shapes = glyphs._shapes(font, characters)
        assert (shapes @ shapes.T - np.eye(300)).max() <= glyphs.LOOKALIKE


def test_every_font_shows_every_character():
    characters = glyphs.choose_characters(20)
    for font in glyphs.FONTS:
        pictures = {glyphs._ink(font, c, 0).tobytes() for c in characters}
        assert len(pictures) == 20  # a font's box for missing characters would be there once only
        assert all(any(picture) for picture in pictures)


def test_impossible_numbers_of_characters_are_refused():
    with pytest.raises(ValueError, match="100000 glyph characters asked for, but 4 to"):
        glyphs.choose_characters(100_000)


def test_degradation_takes_contrast_and_adds_noise():
    drawn = [glyphs.draw("R", random.Random(i)) for i in range(300)]
    degradation = np.array([d for _, d in drawn])
    pictures = np.stack([picture for picture, _ in drawn]) / 255
    coarse = pictures.reshape(-1, 7, 4, 7, 4).mean((2, 4))  # averages the noise away
    contrast = np.ptp(coarse.reshape(-1, 49), axis=1)
    corner = np.diff(pictures[:, :4, :4], axis=2).std((1, 2))  # where no ink comes
    tenths = np.array_split(degradation.argsort(), 5)
    assert (np.diff([contrast[part].mean() for part in tenths]) < 0).all()
    assert (np.diff([corner[part].mean() for part in tenths]) > 0).all()
    assert 0.36 < degradation.mean() < 0.51  # U^1.3 has mean 0.435


def test_spearman_of_degradation_and_sharpness_is_strong():
    drawn = [glyphs.draw("E", random.Random(i)) for i in range(200)]
    smooth = np.stack([picture for picture, _ in drawn]).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    edges = np.abs(np.diff(smooth, axis=1)).max((1, 2))
    assert spearman(torch.tensor(edges), torch.tensor([d for _, d in drawn])) < -0.7


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_rendering_cut_short_leaves_nothing(tmp_path, monkeypatch, problem):
    save, saved = Image.Image.save, []

    def failing(image, path):
        if len(saved) == 5:
            raise problem
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(type(problem)) as caught:
        glyphs.render_glyphs(tmp_path, 4, 2)
    assert list(tmp_path.iterdir()) == []
    if isinstance(problem, OSError):
        assert "glyphs-v" in caught.value.filename
    monkeypatch.undo()
    assert len(list(glyphs.render_glyphs(tmp_path, 4, 2).rglob("*.png"))) == 8
