"""Every preset runs from end to end on a tiny tree in the layout of its data set."""

import csv
import math

import pytest
from conftest import write_tree

from train import report
from train.__main__ import main
from train.presets import PRESETS


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    for dataset in ("cub200", "cars196", "online_products"):
        write_tree(root, dataset, classes=4, images=2)
    return root


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("glyphs")])
def test_a_preset_trains_and_evaluates(preset, trees, tmp_path, monkeypatch):
    pictures = preset == "cub200-r50-128"
    if not pictures:
        monkeypatch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
    flags = ["--epochs", "1", "--limit-batches", "1", "--batch-size", "4", "--device", "cpu"]
    flags += ["--pretrained", "none", "--workers", "0", "--no-tensorboard"]
    out = tmp_path / "out"
    assert main(["--preset", preset, "--data-root", str(trees), *flags, "--out", str(out)]) == 0
    with (out / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert math.isfinite(float(row["loss"]))
    assert 0 <= float(row["c_recall@1"]) <= 1
    if pictures:
        assert (out / "gallery.png").stat().st_size > 10_000


def test_presets_carry_their_names_and_pass_their_checks():
    for name, preset in PRESETS.items():
        assert preset.preset == name
        preset.check()


def test_the_table_of_the_paper_is_what_the_presets_hold():
    preset = PRESETS["cars196-r50-512"]
    assert preset.optim.milestones == (105, 170)
    assert (preset.loss.concentration, preset.model.init_norm_multiplier) == (22, 10)
    distance = PRESETS["cub200-distance-cos"]
    assert distance.loss.temperature == 0.00390625
    assert distance.optim.schedule == "constant"
    assert (distance.epochs, distance.data.batch_size, distance.model.embed_dim) == (50, 106, 512)
    for preset in PRESETS.values():
        assert preset.model.freeze_batchnorm == preset.model.backbone.startswith("resnet50")
