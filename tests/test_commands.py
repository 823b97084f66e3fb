"""`python -m train` apart from single runs: seeds, evaluate, compare, sweep, translate."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from train import report, sweep
from train.__main__ import main
from train.config import Config, SweepConfig

TINY = ("--preset", "glyphs-tiny", "--device", "cpu", "--no-tensorboard")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, data_root):
    """Three runs of two short epochs, and the evaluation rows of each."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    flags = ("--epochs", "2", "--limit-batches", "2", "--data-root", str(data_root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
        assert main([*TINY, *flags, "--seeds", "3", "1", "2", "--out", str(out)]) == 0
    return out


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_gives_each_run_a_folder_and_a_table_of_mean_and_deviation(seeds):
    names = ["seed-1", "seed-2", "seed-3"]
    assert sorted(path.name for path in seeds.glob("seed-*")) == names
    finals = [table(seeds / name / "metrics.csv")[-1] for name in names]
    rows = table(seeds / "seeds.csv")
    assert [row["run"] for row in rows] == [*names, "mean", "deviation"]
    for column in ("loss", "c_recall@1", "nmi"):
        values = [float(final[column]) for final in finals]
        assert [float(row[column]) for row in rows[:3]] == values
        assert float(rows[3][column]) == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert float(rows[4][column]) == pytest.approx(statistics.stdev(values), abs=1e-12)
    recalls = [float(final["c_recall@1"]) for final in finals]
    cell = f"{statistics.fmean(recalls):.3f} ± {statistics.stdev(recalls):.3f}"
    assert cell in (seeds / "seeds.md").read_text()
    assert len({row["loss"] for row in rows[:3]}) == 3


def test_a_seed_of_several_is_the_run_of_that_seed(seeds, data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
    flags = ("--epochs", "2", "--limit-batches", "2", "--data-root", str(data_root))
    assert main([*TINY, *flags, "--seed", "2", "--out", str(tmp_path / "one")]) == 0
    one, several = (table(p / "metrics.csv")[-1] for p in (tmp_path / "one", seeds / "seed-2"))
    same = {name for name in one if not name.startswith("seconds_")}
    assert {name: one[name] for name in same} == {name: several[name] for name in same}


def test_several_seeds_are_resumed_where_they_stopped(seeds, capsys, monkeypatch):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in seeds.glob("seed-[12]/*")}

    before = stamps()
    expected = table(seeds / "seeds.csv")
    for file in (seeds / "seed-3").iterdir():
        file.unlink()
    (seeds / "seed-3").rmdir()
    monkeypatch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
    assert main(["--out", str(seeds), "--resume"]) == 0
    assert stamps() == before
    assert capsys.readouterr().out.count("finished already") == 2
    assert [
        {k: v for k, v in row.items() if "seconds" not in k} for row in table(seeds / "seeds.csv")
    ] == [{k: v for k, v in row.items() if "seconds" not in k} for row in expected]


def test_a_bad_loss_leaves_no_folder_for_seeds(tmp_path, capsys):
    flags = ("--seeds", "1", "2", "--temperature", "0", "--data-root", str(tmp_path))
    assert main([*TINY, *flags, "--out", str(tmp_path / "out")]) == 1
    assert "--temperature of loss el-nivmf: " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_evaluate_repeats_the_metrics_of_a_checkpoint_and_exports(seeds, tmp_path, capsys):
    run = seeds / "seed-2"
    export, written = tmp_path / "new" / "features.npz", tmp_path / "metrics.json"
    flags = ("--checkpoint", str(run / "checkpoint_last.pt"), "--device", "cpu")
    assert main(["evaluate", *flags, "--export", str(export), "--json", str(written)]) == 0
    said = capsys.readouterr().out
    assert "c_recall@1" in said
    values = json.loads(written.read_text())
    last = table(run / "metrics.csv")[-1]
    compared = [name for name in last if "seconds" not in name and name in values]
    assert len(compared) > 20
    assert {name: values[name] for name in compared} == {
        name: pytest.approx(float(last[name]), nan_ok=True, rel=0, abs=0) for name in compared
    }
    with np.load(export) as content, np.load(run / "embeddings_test.npz") as stored:
        np.testing.assert_array_equal(content["features"], stored["features"])
        np.testing.assert_array_equal(content["labels"], stored["labels"])
        np.testing.assert_allclose(
            content["loc"] * content["concentration"][:, None], content["features"], rtol=1e-5
        )
        assert list(content["paths"]) == list(stored["paths"])
        assert len(content["classes"]) == 20


def test_evaluate_takes_other_images(seeds, capsys):
    flags = ("--checkpoint", str(seeds / "seed-2/checkpoint_best.pt"), "--device", "cpu")
    assert main(["evaluate", *flags, "--split", "train", "--no-clustering"]) == 0
    said = capsys.readouterr().out
    assert "400 images (train)" in said
    assert "nmi" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--checkpoint"),
        (("--checkpoint", "nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (("--checkpoint", "junk.pt"), "junk.pt is not a readable checkpoint"),
        (("--checkpoint", "other.pt"), "other.pt is not a checkpoint of this version"),
        (("--checkpoint", "narrow.pt"), "narrow.pt does not fit its configuration"),
        (("--checkpoint", "whole.pt", "--split", "validation"), "no validation split"),
        (("--checkpoint", "whole.pt", "--splat", "train"), "unknown argument --splat"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(
    flags, message, seeds, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    content = torch.load(seeds / "seed-1/checkpoint_last.pt", weights_only=True)
    torch.save(content, "whole.pt")
    torch.save({"model": {}}, "other.pt")
    content["model"]["embedding.weight"] = content["model"]["embedding.weight"][:8]
    torch.save(content, "narrow.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert main(["evaluate", *flags]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_compare_makes_a_table_and_a_plot(seeds, tmp_path, capsys):
    out = tmp_path / "comparison"
    assert main(["compare", str(seeds), str(seeds / "seed-1"), "--out", str(out)]) == 0
    rows = table(out / "compare.csv")
    assert [(row["run"], row["seeds"]) for row in rows] == [("tiny", "3"), ("seed-1", "1")]
    means = table(seeds / "seeds.csv")[3]
    assert float(rows[0]["c_recall@1"]) == float(means["c_recall@1"])
    assert rows[1]["c_recall@1 deviation"] == ""
    text = (out / "compare.md").read_text()
    assert text in capsys.readouterr().out
    assert f"{float(means['c_recall@1']):.3f} ± " in text
    with Image.open(out / "compare.png") as image:
        image.load()
        assert min(image.size) > 300


def test_compare_can_take_the_best_epoch(seeds, tmp_path):
    for row in ("last", "best"):
        out = tmp_path / row
        flags = ("--row", row, "--metric", "loss", "--out", str(out))
        assert main(["compare", str(seeds / "seed-1"), *flags]) == 0
    losses = [float(row["loss"]) for row in table(seeds / "seed-1/metrics.csv")]
    assert float(table(tmp_path / "last/compare.csv")[0]["loss"]) == losses[-1]
    assert float(table(tmp_path / "best/compare.csv")[0]["loss"]) == max(losses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "at least one run folder"),
        (["compare", "nowhere"], "there is no nowhere/metrics.csv"),
        (["compare", "RUN", "--metric", "speed"], "has no column speed"),
        (["sweep", "everything"], "everything"),
        (["sweep", "glyphs-distances", "--losses", "cosine"], "'cosine' (did you mean cos"),
        (["sweep", "glyphs-distances", "--trials", "0"], "at least one trial"),
    ],
)
def test_a_bad_command_is_one_clear_line(arguments, message, seeds, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(seeds / "seed-1")
    assert main([run if word == "RUN" else word for word in arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_sweep_tunes_on_the_training_half_and_then_runs_the_best(
    tmp_path, data_root, monkeypatch
):
    tiny = sweep.PRESETS["glyphs-tiny"]
    data = type(tiny.data)(**{**vars(tiny.data), "batch_size": 20})
    tiny = Config(**{**vars(tiny), "epochs": 2, "limit_batches": 2, "data": data})
    monkeypatch.setattr(sweep, "PRESETS", {"glyphs": tiny})
    monkeypatch.setattr(
        sweep, "run_all", lambda configs, *_: [sweep.run_one(c, 1) for c in configs]
    )
    monkeypatch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
    config = SweepConfig(
        "glyphs-distances",
        out=tmp_path,
        trials=2,
        seeds=(0, 1),
        losses=("cos", "el-nivmf-bounded"),
        data_root=data_root,
        limit_batches=2,
    )
    sweep.sweep(config)
    trials = table(tmp_path / "trials.csv")
    assert [row["loss"] for row in trials] == ["cos"] * 2 + ["el-nivmf-bounded"] * 2
    for name in ("cos", "el-nivmf-bounded"):
        own = [row for row in trials if row["loss"] == name]
        chosen = max(own, key=lambda row: float(row["validation c_recall@1"]))
        assert [row["chosen"] for row in own] == ["yes" if row is chosen else "" for row in own]
        final = Config.from_json((tmp_path / name / "seed-1/config.json").read_text())
        assert final.data.validation == "none"
        assert final.loss.temperature == float(chosen["temperature"])
        assert final.optim.lr == float(chosen["lr"])
        assert (final.model.max_norm is None) == (name == "cos")
        trial = Config.from_json((tmp_path / f"trials/{name}/00/config.json").read_text())
        assert trial.data.validation == "class"
        assert trial.seed not in config.seeds
    rows = table(tmp_path / "compare.csv")
    assert [(row["run"], row["seeds"]) for row in rows] == [("cos", "2"), ("el-nivmf-bounded", "2")]
    assert math.isfinite(float(rows[0]["spearman_norm_degradation"]))


def test_sweep_runs_go_to_processes_and_finished_ones_are_not_repeated(tmp_path, data_root):
    base = sweep.PRESETS["glyphs-tiny"]
    values = {"epochs": 1, "limit_batches": 1, "tensorboard": False, "device": "cpu"}
    data = type(base.data)(**{**vars(base.data), "data_root": data_root})
    values |= {"data": data, "evaluate_every": 1, "clustering": False}
    good = Config(**{**vars(base), **values, "out": tmp_path / "a" / "00"})
    optim = type(base.optim)(**{**vars(base.optim), "lr": 1e30})
    wild = Config(
        **{**vars(good), "out": tmp_path / "a" / "01", "optim": optim, "limit_batches": 3}
    )
    sweep.run_all([good, wild], 1, "runs")
    assert "epoch 1/1" in (tmp_path / "a/00.log").read_text()
    assert "diverged" in (tmp_path / "a/01/failed.txt").read_text()
    assert sweep.score(wild) == -math.inf
    assert sweep.score(good) > 0
    assert sweep.is_finished(good)
    assert sweep.is_finished(wild)
    with pytest.raises(Exception, match="other settings"):
        sweep.is_finished(Config(**{**vars(good), "seed": 5}))


def test_a_released_command_is_translated(capsys):
    released = "python main.py --dataset cub200 --loss proxyvmf --bs 32 --loss_proxyvmf_rho 0.5"
    assert main(["--from-released", released]) == 0
    said = capsys.readouterr().out
    for part in ("python -m train", "--preset cub200-distance-b-vmf", "--batch-size 32"):
        assert part in said
