"""Image folders in the CUB200 layout, and class-balanced batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import DataConfig, RunError
from train.data import ClassBalancedBatches, class_folders, decode, load


def write_image(path: Path, value: int = 100, mode: str = "L", size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255)).save(path)


@pytest.fixture
def root(tmp_path):
    """A set `birds` of four classes, whose order by name and by number differ."""
    for number, count in ((2, 3), (10, 2), (1, 2), (33, 1)):
        for i in range(count):
            write_image(tmp_path / f"birds/images/{number}.Bird_{number}/{i}.png", value=number)
    return tmp_path


def config(root: Path) -> DataConfig:
    return DataConfig(name="birds", data_root=root, image_size=8)


def test_classes_come_by_number_and_the_first_half_trains(root):
    train, test = load(config(root), channels=1)
    assert train.classes == ["1.Bird_1", "2.Bird_2"]
    assert test.classes == ["10.Bird_10", "33.Bird_33"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 2]
    assert test.paths == ["10.Bird_10/0.png", "10.Bird_10/1.png", "33.Bird_33/0.png"]
    assert train.images.shape == (5, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.degradation is None


def test_litter_is_skipped(root):
    images = root / "birds/images"
    (images / "._1.Bird_1").mkdir()
    (images / "readme.txt").write_text("no image")
    (images / "1.Bird_1/._0.png").write_bytes(b"litter")
    (images / "1.Bird_1/notes.txt").write_text("no image")
    files = dict(class_folders(images))
    assert len(files) == 4
    assert [path.name for path in files["1.Bird_1"]] == ["0.png", "1.png"]


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_becomes_what_the_model_needs(tmp_path, mode, channels):
    Image.new(mode, (12, 7)).save(tmp_path / "image.png")
    pixels = decode(tmp_path / "image.png", 8, channels)
    assert pixels.shape == (8, 8, channels)
    assert pixels.dtype == np.uint8


def test_degradation_is_read_in_the_order_of_the_images(root):
    train, _ = load(config(root), channels=1)
    paths = [p.relative_to(root / "birds/images") for p in (root / "birds/images").rglob("*.png")]
    rows = [f"{path.as_posix()},0.{path.parts[0].split('.')[0]}" for path in sorted(paths)]
    (root / "birds/degradation.csv").write_text("\n".join(["path,degradation", *rows]))
    train, test = load(config(root), channels=1)
    torch.testing.assert_close(train.degradation, torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(test.degradation, torch.tensor([0.10, 0.10, 0.33]))


def cut(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda i: (i / "1.Bird_1/0.png").write_bytes(b"junk"),
            r"cannot read image .*/0\.png \(not",
        ),
        (lambda i: (i / "1.Bird_1/0.png").write_bytes(b""), r"cannot read image .*/0\.png"),
        (lambda i: cut(i / "1.Bird_1/0.png"), r"cannot read image .*/0\.png \(.*truncated"),
        (lambda i: (i / "5.Empty").mkdir(), r"5\.Empty holds no \.png or \.jpg"),
        (lambda i: (i / "Bird").mkdir(), r"images/Bird is not named like 001\.Name"),
        (lambda i: (i / "33.Bird_33").rename(i / "._33"), "holds 3 classes, but at least 4"),
        (lambda i: i.rename(i.with_name("pictures")), r"no folder .*birds/images"),
        (lambda i: (i.parent / "degradation.csv").write_text("path\na"), "degradation"),
        (lambda i: (i.parent / "degradation.csv").write_text("path,degradation\n"), r"0\.png"),
    ],
)
def test_a_bad_set_is_an_error_that_names_what_is_wrong(root, harm, message):
    harm(root / "birds/images")
    with pytest.raises(RunError, match=message):
        load(config(root), channels=1)


LABELS = torch.tensor([0] * 2 + [1] * 7 + [2] * 3 + [3] * 8)[torch.randperm(20)]


def batches(batch_size: int = 6, samples_per_class: int = 2, seed: int = 0) -> ClassBalancedBatches:
    generator = torch.Generator().manual_seed(seed)
    return ClassBalancedBatches(LABELS, batch_size, samples_per_class, generator)


def test_an_epoch_has_as_many_batches_as_whole_ones_fit():
    assert len(batches()) == len(list(batches())) == 3
    assert {len(batch) for batch in batches()} == {6}
    with pytest.raises(RunError, match="--batch-size is 21, but there are 20 training images"):
        batches(batch_size=21, samples_per_class=1)


def test_a_batch_holds_draws_of_a_class_side_by_side():
    for batch in batches():
        assert (LABELS[batch].view(3, 2)[:, 0] == LABELS[batch].view(3, 2)[:, 1]).all()


def test_classes_and_then_their_images_are_drawn_evenly_and_with_replacement():
    sampler = batches()
    drawn = torch.stack([batch for _ in range(2000) for batch in sampler]).view(-1, 3, 2)
    classes = LABELS[drawn[..., 0]]
    # chi-squared with 3 degrees of freedom is above 16.3 once in 1000
    counts = torch.bincount(classes.flatten())
    assert (counts - counts.sum() / 4).square().sum() / (counts.sum() / 4) < 16.3
    for label in range(4):
        images = torch.bincount(drawn[classes == label].flatten(), minlength=20)[label == LABELS]
        expected = images.sum() / len(images)
        assert (images - expected).square().sum() / expected < 3.5 * len(images) + 16
    same_class = (classes[:, 0] == classes[:, 1]).double().mean()
    assert abs(same_class - 1 / 4) < 0.03
    small = drawn[classes == 0]  # two images: the same one twice in half of the draws
    assert abs((small[:, 0] == small[:, 1]).double().mean() - 1 / 2) < 0.04


def test_the_seed_decides_about_the_batches():
    def flat(seed):
        return torch.cat(list(batches(seed=seed))).tolist()

    assert flat(0) == flat(0)
    assert flat(0) != flat(1)
