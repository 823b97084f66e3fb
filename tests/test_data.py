"""Image sets in every layout, their splits and transforms, and class-balanced batches."""

import gc
import os
import shutil
import signal
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tree
from PIL import Image

from train.config import DataConfig, RunError
from train.data import (
    ClassBalancedBatches,
    all_batches,
    class_folders,
    decode,
    layouts,
    load,
    train_batches,
    transforms,
)


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


def config(root: Path, name: str = "birds", **changes) -> DataConfig:
    return DataConfig(**{"name": name, "data_root": root, "image_size": 8} | changes)


def birds(root: Path, **changes):
    """Sets of the tree `cub200` of 8 classes with 4 images, read from the disk."""
    write_tree(root, "cub200")
    return load(config(root, "cub200", augmentation="base", image_size=24, **changes), channels=3)


# Layouts


def test_classes_come_by_number_and_the_first_half_trains(root):
    sets = load(config(root), channels=1)
    assert list(sets) == ["train", "test"]
    train, test = sets.values()
    assert train.classes == ["1.Bird_1", "2.Bird_2"]
    assert test.classes == ["10.Bird_10", "33.Bird_33"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 2]
    assert test.paths == ["10.Bird_10/0.png", "10.Bird_10/1.png", "33.Bird_33/0.png"]
    assert (test.folder / test.paths[0]).exists()
    assert train.images.shape == (5, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.degradation is None


def test_class_folders_need_no_folder_named_images(root):
    nested = load(config(root), channels=1)
    (root / "birds/images").rename(root / "plain")
    plain = load(config(root, "plain"), channels=1)
    for part in ("train", "test"):
        assert plain[part].paths == nested[part].paths
        assert plain[part].folder == root / "plain"
        assert plain[part].images.equal(nested[part].images)


def test_classes_come_by_name_unless_all_are_numbered(root):
    (root / "birds/images/10.Bird_10").rename(root / "birds/images/Bird")
    sets = load(config(root), channels=1)
    assert sets["train"].classes == ["1.Bird_1", "2.Bird_2"]
    assert sets["test"].classes == ["33.Bird_33", "Bird"]
    (root / "birds/images/2.Bird_2").rename(root / "birds/images/100.Bird")
    sets = load(config(root), channels=1)
    assert sets["train"].classes == ["1.Bird_1", "100.Bird"]


def test_folders_train_and_test_are_the_split(root):
    for part, names in (("train", "b a c"), ("test", "e d")):
        for name in names.split():
            write_image(root / "own" / part / name / "x.webp")
    sets = load(config(root, "own"), channels=3)
    assert sets["train"].classes == ["a", "b", "c"]
    assert sets["test"].classes == ["d", "e"]
    assert sets["test"].paths == ["test/d/x.webp", "test/e/x.webp"]
    assert sets["test"].labels.tolist() == [0, 1]


def test_cars_come_by_name(tmp_path):
    write_tree(tmp_path, "cars196", classes=5)
    sets = load(config(tmp_path, "cars196"), channels=3)
    assert sets["train"].classes == ["Maker Model 001", "Maker Model 002"]
    assert sets["test"].classes == [f"Maker Model 00{i}" for i in (3, 4, 5)]
    assert sets["train"].paths[0] == "Maker Model 001/1_0.jpg"


def test_online_products_come_as_their_lists_say(tmp_path):
    folder = write_tree(tmp_path, "online_products", classes=4, images=2)
    lists = folder / "Info_Files"
    (lists / "Ebay_train.txt").write_text(
        "image_id class_id super_class_id path\n"
        "1 7 1 bicycle_final/2_1.jpg\n2 7 1 bicycle_final/2_0.jpg\n3 5 2 chair_final/1_0.jpg\n"
    )
    sets = load(config(tmp_path, "online_products"), channels=3)
    assert sets["train"].paths == [
        *("bicycle_final/2_1.jpg", "bicycle_final/2_0.jpg", "chair_final/1_0.jpg")
    ]
    assert sets["train"].labels.tolist() == [0, 0, 1]
    assert sets["train"].classes == ["bicycle_final/7", "chair_final/5"]
    assert sets["test"].classes == ["chair_final/3", "bicycle_final/4"]
    assert len(sets["test"]) == 4


@pytest.mark.parametrize("name", ["cub200", "cars196", "online_products", "other"])
def test_a_tree_in_each_layout_can_be_trained_and_tested_on(tmp_path, name):
    write_tree(tmp_path, name)
    sets = load(config(tmp_path, name, augmentation="base", image_size=16), channels=3)
    for images in sets.values():
        assert images.labels.bincount().tolist() == [4] * 4
        pixels, bad = images.batch([0, 5, 15])
        assert pixels.shape == (3, 3, 16, 16) and pixels.dtype == torch.uint8 and not bad


def test_litter_is_skipped(root):
    images = root / "birds/images"
    (images / "._1.Bird_1").mkdir()
    (images / ".ipynb_checkpoints").mkdir()
    (images / "readme.txt").write_text("no image")
    (images / "1.Bird_1/._0.png").write_bytes(b"litter")
    (images / "1.Bird_1/notes.txt").write_text("no image")
    files = dict(class_folders(images))
    assert len(files) == 4
    assert files["1.Bird_1"] == ["1.Bird_1/0.png", "1.Bird_1/1.png"]


def test_suffixes_count_in_upper_and_lower_case(tmp_path):
    for file in ("a.JPG", "b.jpeg", "c.PnG", "d.bmp", "e.WebP", "f.tar"):
        write_image(tmp_path / "x" / f"{Path(file).stem}.png")
        (tmp_path / f"x/{Path(file).stem}.png").rename(tmp_path / "x" / file)
    ((_, files),) = class_folders(tmp_path)
    assert files == ["x/a.JPG", "x/b.jpeg", "x/c.PnG", "x/d.bmp", "x/e.WebP"]


def test_degradation_is_read_in_the_order_of_the_images(root):
    paths = [p.relative_to(root / "birds/images") for p in (root / "birds/images").rglob("*.png")]
    rows = [f"{path.as_posix()},0.{path.parts[0].split('.')[0]}" for path in sorted(paths)]
    (root / "birds/degradation.csv").write_text("\n".join(["path,degradation", *rows]))
    train, test = load(config(root), channels=1).values()
    torch.testing.assert_close(train.degradation, torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(test.degradation, torch.tensor([0.10, 0.10, 0.33]))


# Splits


def test_a_validation_split_by_class_takes_the_last_classes(tmp_path):
    write_tree(tmp_path, "cub200", classes=20)
    sets = load(config(tmp_path, "cub200", validation="class"), channels=3)
    names = [f"{i:03d}.Bird_{i}" for i in range(1, 21)]
    assert sets["train"].classes == names[:7]
    assert sets["validation"].classes == names[7:10]
    assert sets["test"].classes == names[10:]
    assert sets["validation"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_validation_split_by_samples_takes_the_last_images_of_each_class(tmp_path):
    folder = write_tree(tmp_path, "cub200", classes=6, images=4)
    for path in list((folder / "images/001.Bird_1").iterdir())[1:]:
        path.unlink()  # one image is left, and it trains
    sets = load(config(tmp_path, "cub200", validation="samples", train_share=0.5), channels=3)
    train, validation = sets["train"], sets["validation"]
    assert train.classes == ["001.Bird_1", "002.Bird_2", "003.Bird_3"]
    assert train.labels.tolist() == [0, 1, 1, 2, 2]
    assert train.paths[1:3] == ["002.Bird_2/2_0.jpg", "002.Bird_2/2_1.jpg"]
    assert validation.classes == ["002.Bird_2", "003.Bird_3"]
    assert validation.labels.tolist() == [0, 0, 1, 1]
    assert validation.paths[:2] == ["002.Bird_2/2_2.jpg", "002.Bird_2/2_3.jpg"]


@pytest.mark.parametrize(
    ("by", "share", "message"),
    [
        ("class", 1.0, "leaves 4 of 4 classes to train on and 0 to validate on"),
        ("class", 0.75, "leaves 3 of 4 classes to train on and 1 to validate on"),
        ("class", 0.1, "leaves 0 of 4 classes to train on and 4 to validate on"),
        ("samples", 1.0, "leaves 4 of 4 classes to train on and 0 to validate on"),
        ("samples", 0.75, "one to validate on with 2 images: change --train-share"),
    ],
)
def test_a_split_that_leaves_too_little_is_refused(tmp_path, by, share, message):
    with pytest.raises(RunError, match=message):
        birds(tmp_path, validation=by, train_share=share)


# Transforms


def test_the_test_transform_is_that_of_the_protocol(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(300, 400, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    for size, left, top in ((224, 58, 16), (227, 57, 14), (256, 42, 0)):
        _, test = transforms("base", size)
        expected = resized.crop((left, top, left + size, top + size))
        assert (np.asarray(test(image)) == np.asarray(expected)).all()


@pytest.mark.parametrize(("size", "larger"), [(32, 37), (384, 439), (518, 592)])
def test_at_other_sizes_as_large_a_part_is_seen(size, larger):
    _, test = transforms("red", size)
    image = Image.linear_gradient("L").resize((600, 600))
    resized = image.resize((larger, larger), Image.Resampling.BILINEAR)
    edge = round((larger - size) / 2)
    expected = resized.crop((edge, edge, edge + size, edge + size))
    assert (np.asarray(test(image)) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    ("augmentation", "crop", "image_size", "size"),
    [
        ("none", None, None, 28),
        ("none", 227, None, 28),
        ("none", None, 16, 16),
        ("base", None, None, 224),
        ("adv", 227, None, 227),
        ("red", 227, 64, 64),
        ("big", 227, None, 256),
    ],
)
def test_the_size_follows_from_the_augmentation_and_the_backbone(
    root, augmentation, crop, image_size, size
):
    sets = load(config(root, augmentation=augmentation, image_size=image_size), 1, crop)
    for images in sets.values():
        assert images.size == size
        assert images.batch([0])[0].shape == (1, 1, size, size)
        assert images.batch([0], [5])[0].shape == (1, 1, size, size)


@pytest.mark.parametrize("augmentation", ["base", "big", "adv", "red"])
def test_half_of_the_training_images_are_mirrored(augmentation):
    train, _ = transforms(augmentation, 32)
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # brighter from left to right
    torch.manual_seed(0)
    rows = torch.from_numpy(np.stack([np.asarray(train(ramp)) for _ in range(400)])).float()
    rising = rows[:, :, -4:].mean((1, 2, 3)) > rows[:, :, :4].mean((1, 2, 3))
    assert abs(rising.sum() - 200) < 4 * 10  # four deviations


def test_adv_turns_a_fifth_grey_and_changes_colours():
    train, _ = transforms("adv", 16)
    torch.manual_seed(0)
    colour = Image.new("RGB", (32, 32), (200, 100, 50))
    pixels = torch.from_numpy(np.stack([np.asarray(train(colour))[0, 0] for _ in range(400)]))
    grey = (pixels[:, 0] == pixels[:, 1]) & (pixels[:, 1] == pixels[:, 2])
    assert abs(grey.sum() - 80) < 4 * 8
    assert len(pixels[~grey].unique(dim=0)) > 200


def test_base_and_red_keep_colours_and_differ_in_scale():
    image = Image.linear_gradient("L").resize((256, 256))  # darkest on top
    torch.manual_seed(0)
    spans = {}
    for augmentation in ("base", "red"):
        train, _ = transforms(augmentation, 224)
        crops = [np.asarray(train(image)).astype(int) for _ in range(50)]
        spans[augmentation] = [int(crop.max() - crop.min()) for crop in crops]
    assert all(abs(span - 223) <= 3 for span in spans["red"])
    assert min(spans["base"]) < 120 < 180 < max(spans["base"])


def test_a_seed_decides_about_an_image_and_nothing_else_does(tmp_path):
    train = birds(tmp_path)["train"]
    whole, _ = train.batch([3, 0, 9], seeds=[11, 22, 33])
    torch.manual_seed(5)
    for place, index, seed in ((2, 9, 33), (0, 3, 11), (1, 0, 22)):
        assert train.batch([index], seeds=[seed])[0][0].equal(whole[place])
    assert not train.batch([3], seeds=[12])[0][0].equal(whole[0])
    assert train.batch(torch.tensor([3]), torch.tensor([11]))[0][0].equal(whole[0])
    assert train.batch([3])[0].equal(train.batch([3])[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_as_it_was(tmp_path, workers):
    train = birds(tmp_path)["train"]
    before = torch.get_rng_state()
    train.batch([0, 1], seeds=[1, 2])
    train.batch([0, 1])
    list(all_batches(train, range(4), 2, workers, pin_memory=False))
    batches = ClassBalancedBatches(train.labels, 4, 2, seed=0)
    list(train_batches(train, batches.epoch(0), slice(None), workers, pin_memory=False))
    assert torch.get_rng_state().equal(before)


# Files


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("error")
def test_any_kind_of_image_becomes_what_the_model_needs(tmp_path, mode, channels):
    image, options = Image.new(mode, (12, 7)), {}
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
        options = {"transparency": bytes(range(100))}
    image.save(tmp_path / "image.png", **options)
    image = decode(tmp_path / "image.png", channels)
    assert image.size == (12, 7)
    assert image.mode == {1: "L", 3: "RGB"}[channels]


def test_all_bits_of_an_image_count(tmp_path):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.asarray(decode(tmp_path / "deep.png", channels=1))
    assert (pixels == ramp // 256).all()


def test_a_cmyk_image_shows_its_colours(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = decode(tmp_path / "red.jpg", channels=3).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_transparency_and_orientation_are_ignored(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", channels=3).getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (12, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", channels=3).size == (12, 8)


def cut(path: Path, share: float = 0.5) -> None:
    """Leave the first part of an image's file."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_a_cut_off_file_is_noticed(tmp_path, suffix, share):
    cut(tmp_path / f"image{suffix}", share)
    with pytest.raises(RunError, match=r"cannot read image .*/image"):
        decode(tmp_path / f"image{suffix}", channels=3)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda i: (i / "1.Bird_1/0.png").write_bytes(b"junk"),
            r"cannot read image .*/0\.png \(not an image\): .* --skip-bad-images",
        ),
        (lambda i: cut(i / "1.Bird_1/0.png"), r"cannot read image .*/0\.png \(.*truncated"),
        (lambda i: (i / "5.Empty").mkdir(), r"5\.Empty holds no images \(.*\.jpg"),
        (
            lambda i: (i / "33.Bird_33").rename(i / "._33"),
            "has 1 classes to train on and 2 to test on, but at least 2 of each",
        ),
        (lambda i: shutil.rmtree(i), "birds has 0 classes to train on"),
        (lambda i: shutil.rmtree(i.parent), r"no folder .*birds: --dataset is glyphs, cub200"),
        (lambda i: (i.parent / "degradation.csv").write_text("path\na"), "degradation"),
        (lambda i: (i.parent / "degradation.csv").write_text("path,degradation\n"), r"0\.png"),
    ],
)
def test_a_bad_set_is_an_error_that_names_what_is_wrong(root, harm, message):
    harm(root / "birds/images")
    with pytest.raises(RunError, match=message):
        load(config(root), channels=1)


@pytest.mark.parametrize(
    ("name", "counts", "source"),
    [
        ("cub200", "100 classes of 5,864 images and 100 classes of 5,924", "vision.caltech.edu"),
        ("cars196", "98 classes of 8,054 images and 98 classes of 8,131", "ai.stanford.edu"),
        (
            "online_products",
            "11,318 classes of 59,551 images and 11,316 classes of 60,502",
            "cvgl.stanford.edu",
        ),
    ],
)
def test_a_known_set_must_be_whole_unless_it_says_that_it_is_not(tmp_path, name, counts, source):
    with pytest.raises(RunError, match=f"no folder .*{name}: get .*{source}.* {name}/images/"):
        load(config(tmp_path, name), channels=3)
    folder = write_tree(tmp_path, name)
    assert load(config(tmp_path, name), channels=3)["train"].labels.max() == 3
    (folder / "PARTIAL").unlink()
    message = f"has 4 classes of 16 images to train on .* must have {counts}.*{source}.* PARTIAL"
    with pytest.raises(RunError, match=message):
        load(config(tmp_path, name), channels=3)


def test_a_whole_known_set_needs_no_mark(tmp_path):
    for number in range(1, 201):
        files = {100: 5864 - 99 * 58, 200: 5924 - 99 * 59}.get(number, 58 + (number > 100))
        (folder := tmp_path / f"cub200/images/{number:03d}.Bird").mkdir(parents=True)
        for i in range(files):
            (folder / f"{i}.jpg").touch()
    sets = load(config(tmp_path, "cub200", augmentation="base"), channels=3)
    assert (len(sets["train"]), len(sets["test"])) == (5864, 5924)


def test_a_data_set_is_one_row(tmp_path, monkeypatch):
    def classes(root, known, skip_bad_images):
        named = [(name, [f"{name}/0.png", f"{name}/1.png"]) for name in "dcba"]
        return root / "files", {"train": named[:2], "test": named[2:]}

    row = layouts.Known((2, 4), (2, 4), "Letters", "https://letters.test", "them", classes)
    monkeypatch.setitem(layouts.KNOWN, "letters", row)
    with pytest.raises(RunError, match=r"get Letters \(https://letters\.test\) and put them under"):
        load(config(tmp_path, "letters"), channels=1)
    for name in "abcd":
        for i in range(2):
            write_image(tmp_path / f"letters/files/{name}/{i}.png")
    sets = load(config(tmp_path, "letters"), channels=1)
    assert (sets["train"].classes, sets["test"].classes) == (["d", "c"], ["b", "a"])


def test_the_lists_of_online_products_are_checked(tmp_path):
    folder = write_tree(tmp_path, "online_products", classes=4, images=2)
    (folder / "images/chair_final/1_0.jpg").unlink()
    with pytest.raises(RunError, match=r"1 of 8 listed images are missing, one is .*1_0\.jpg"):
        load(config(tmp_path, "online_products"), channels=3)
    skipping = config(tmp_path, "online_products", augmentation="base", skip_bad_images=True)
    assert len(load(skipping, channels=3)["train"]) == 4
    with (folder / "Info_Files/Ebay_test.txt").open("a") as file:
        file.write("9 4 bicycle_final/4_0.jpg\n")
    with pytest.raises(RunError, match=r"line 6 of .*Ebay_test\.txt is '9 4 bicycle"):
        load(config(tmp_path, "online_products"), channels=3)
    (folder / "Info_Files/Ebay_test.txt").unlink()
    with pytest.raises(RunError, match=r"no file .*Ebay_test\.txt: get Stanford Online Products"):
        load(config(tmp_path, "online_products"), channels=3)


# Bad images


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_a_run_with_one_line(tmp_path, workers):
    images = birds(tmp_path)["train"]
    cut(images.folder / images.paths[5])
    with pytest.raises(RunError) as raised:
        list(all_batches(images, range(8), 2, workers, pin_memory=False))
    assert str(raised.value).startswith(f"cannot read image {images.folder / images.paths[5]} (")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_left_out_of_an_evaluation(tmp_path, workers):
    images = birds(tmp_path, skip_bad_images=True)["test"]
    for i in (4, 6, 7):
        cut(images.folder / images.paths[i])
    batches = list(all_batches(images, range(2, 8), 2, workers, pin_memory=False))
    assert [batch.indices.tolist() for batch in batches] == [[2, 3], [5], []]
    assert [batch.labels.tolist() for batch in batches] == [[0, 0], [1], []]
    assert [len(batch.images) for batch in batches] == [2, 1, 0]
    assert batches[1].images.equal(images.batch([5])[0])
    assert batches[1].bad == [str(images.folder / images.paths[4])]
    assert batches[2].bad == [str(images.folder / images.paths[i]) for i in (6, 7)]


def test_in_training_the_next_image_of_the_class_stands_in_for_a_bad_one(tmp_path):
    images = birds(tmp_path, skip_bad_images=True)["train"]
    for i in (6, 7):
        cut(images.folder / images.paths[i])
    pixels, bad = images.batch([3, 6, 5], seeds=[1, 2, 3])
    expected, none = images.batch([3, 4, 5], seeds=[1, 2, 3])  # after 7, the last, comes 4 again
    assert pixels.equal(expected)
    assert bad == [6, 7] and not none
    for i in (4, 5):
        cut(images.folder / images.paths[i])
    with pytest.raises(RunError, match=r"none of the 002\.Bird_2 images in .* can be read"):
        images.batch([5], seeds=[1])


def test_a_file_that_cannot_be_read_is_named_once(root, capsys):
    images = load(config(root), channels=1)["train"]
    images.warn_unreadable(["a.jpg", "b.jpg"])
    images.subset(torch.tensor([0])).warn_unreadable(["a.jpg", "c.jpg"])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"skipped, cannot be read: {name}.jpg" for name in "abc"]


def test_a_set_in_memory_goes_without_its_bad_images(root, capsys):
    (root / "birds/images/2.Bird_2/1.png").write_bytes(b"junk")
    (root / "birds/degradation.csv").write_text(
        "path,degradation\n"
        + "".join(
            f"{path.relative_to(root / 'birds/images')},0.{path.stem}\n"
            for path in (root / "birds/images").rglob("*.png")
        )
    )
    train = load(config(root, skip_bad_images=True), channels=1)["train"]
    assert train.paths == ["1.Bird_1/0.png", "1.Bird_1/1.png", "2.Bird_2/0.png", "2.Bird_2/2.png"]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(train.degradation, torch.tensor([0.0, 0.1, 0.0, 0.2]))
    assert "skipping" in (said := capsys.readouterr().out) and "2.Bird_2/1.png" in said
    (root / "birds/images/33.Bird_33/0.png").write_bytes(b"junk")
    with pytest.raises(RunError, match=r"none of the 33\.Bird_33 images in .* can be read"):
        load(config(root, skip_bad_images=True), channels=1)


def test_a_killed_worker_ends_a_run_with_one_line(tmp_path):
    images = birds(tmp_path)["train"]
    killer = replace(images, test_transform=lambda image: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"a process that reads images was killed .* --workers"):
        list(all_batches(killer, range(8), 2, workers=1, pin_memory=False))


# Batches


LABELS = torch.tensor([0] * 2 + [1] * 7 + [2] * 3 + [3] * 8)[
    torch.randperm(20, generator=torch.Generator().manual_seed(0))
]


def batches(batch_size: int = 6, samples_per_class: int = 2, seed: int = 0) -> ClassBalancedBatches:
    return ClassBalancedBatches(LABELS, batch_size, samples_per_class, seed)


def test_an_epoch_has_as_many_batches_as_whole_ones_fit():
    assert len(batches()) == len(list(batches().epoch(0))) == 3
    assert {len(step.indices) for step in batches().epoch(0)} == {6}
    assert len(list(batches().epoch(0, limit=2))) == 2
    assert len(list(batches().epoch(0, limit=9))) == 3


def test_a_batch_needs_as_many_images_and_classes():
    with pytest.raises(RunError, match="--batch-size is 21, but there are 20 training images"):
        batches(batch_size=21, samples_per_class=1)
    with pytest.raises(RunError, match="draws 5 classes, but there are 4: fewer classes than a"):
        batches(batch_size=10)
    assert len(batches(batch_size=8)) == 2


def test_a_batch_holds_draws_of_a_class_side_by_side():
    for step in batches().epoch(0):
        drawn = LABELS[step.indices].view(3, 2)
        assert (drawn[:, 0] == drawn[:, 1]).all()


def test_classes_and_then_their_images_are_drawn_evenly_and_with_replacement():
    sampler = batches()
    steps = [step for epoch in range(2000) for step in sampler.epoch(epoch)]
    drawn = torch.stack([step.indices for step in steps]).view(-1, 3, 2)
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


def flat(steps) -> list[list[int]]:
    return [[*step.indices.tolist(), *step.seeds.tolist(), step.seed] for step in steps]


def test_a_step_follows_from_the_seed_the_epoch_and_its_number():
    epoch = flat(batches().epoch(4))
    assert flat(batches().epoch(4)) == epoch
    assert flat(batches().epoch(4, skip=2)) == epoch[2:]
    assert flat(batches().epoch(4, skip=1, limit=2)) == epoch[1:2]
    others = [*flat(batches(seed=1).epoch(4)), *flat(batches().epoch(5))]
    for numbers in zip(*epoch, *others, strict=True):
        assert len(set(numbers)) > 1
    seeds = [seed for row in epoch + others for seed in row[6:]]
    assert len(set(seeds)) == len(seeds)


def test_any_number_of_workers_gives_the_same_bytes_in_the_same_order(tmp_path):
    train = birds(tmp_path)["train"]
    sampler = ClassBalancedBatches(train.labels, 4, 2, seed=0)
    steps = list(sampler.epoch(0))
    alone = list(train_batches(train, iter(steps), slice(None), 0, pin_memory=False))
    tested = list(all_batches(train, range(3, 16), 4, 0, pin_memory=False))
    assert len(alone) == len(steps) == 4
    for step, batch in zip(steps, alone, strict=True):
        assert batch.images.equal(train.batch(step.indices, step.seeds)[0])
        assert batch.indices.equal(step.indices) and batch.seed == step.seed and not batch.bad
        assert batch.labels.equal(train.labels[step.indices])
    assert torch.cat([batch.indices for batch in tested]).tolist() == list(range(3, 16))
    assert torch.cat([b.images for b in tested]).equal(train.batch(range(3, 16))[0])
    for workers in (1, 2):
        again = train_batches(train, iter(steps), slice(None), workers, pin_memory=False)
        assert_same(again, alone)
        assert_same(all_batches(train, range(3, 16), 4, workers, pin_memory=False), tested)


def assert_same(batches, expected) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for value, right in zip(batch, other, strict=True):
            assert value.equal(right) if isinstance(value, torch.Tensor) else value == right


def test_the_parts_of_the_processes_make_up_the_global_batch(tmp_path):
    train = birds(tmp_path)["train"]
    sampler = ClassBalancedBatches(train.labels, 8, 2, seed=0)
    parts = [slice(0, 4), slice(4, 8)]
    (whole, _), *halves = (
        list(train_batches(train, sampler.epoch(1), part, 0, pin_memory=False))
        for part in [slice(None), *parts]
    )
    first, second = (half[0] for half in halves)
    assert torch.cat([first.images, second.images]).equal(whole.images)
    assert torch.cat([first.labels, second.labels]).equal(whole.labels)
    assert first.seed == second.seed == whole.seed


def test_a_set_in_memory_is_batched_as_it_is_and_without_workers(root):
    images = load(config(root), channels=1)["train"]
    batches = all_batches(images, range(1, 4), 2, workers=2, pin_memory=False)
    batch = next(batches)
    assert not active_children()
    assert batch.images.equal(images.images[1:3])
    assert images.batch([2, 0], seeds=[1, 2])[0].equal(images.images[[2, 0]])


def test_an_epoch_that_is_left_early_leaves_no_processes_or_files(tmp_path):
    train = birds(tmp_path)["train"]

    def opened() -> int:
        gc.collect()
        assert not any(process.join(600) or process.is_alive() for process in active_children())
        return len(list(Path("/proc/self/fd").iterdir()))

    def first_batch() -> None:
        for _ in all_batches(train, range(16), 2, workers=2, pin_memory=False):
            return

    first_batch()
    before = opened()
    for _ in range(3):
        first_batch()
    assert opened() <= before


def test_thumbnails_show_what_the_model_sees(root, tmp_path):
    on_disk = birds(tmp_path)["test"]
    small = on_disk.thumbnail(3, 24)
    assert (np.asarray(small) == on_disk.batch([3])[0][0].permute(1, 2, 0).numpy()).all()
    assert on_disk.thumbnail(3, 50).size == (50, 50)
    grey = load(config(root), channels=1)["test"].thumbnail(2, 30)
    assert grey.mode == "RGB" and grey.size == (30, 30)
    assert np.unique(np.asarray(grey)).tolist() == [33]
    cut(on_disk.folder / on_disk.paths[3])
    with pytest.raises(RunError, match="cannot read image"):
        on_disk.thumbnail(3, 24)
    assert replace(on_disk, skip_bad_images=True).thumbnail(3, 24).size == (24, 24)
