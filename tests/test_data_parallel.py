"""Training over several processes: torchrun on the CPU gives what one process gives."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from train.distributed import Ranks
from train.loop import global_loss

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def python(processes: int) -> list[str]:
    """The start of a command line that trains in so many processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    train = ["-m", "train", "--preset", "glyphs-tiny", "--device", "cpu"]
    return [sys.executable, *(launcher if processes > 1 else []), *train]


def run(processes: int, out: Path, data_root: Path, *flags: str) -> tuple[list[dict], str]:
    """The rows of metrics.csv of a short run, and what it said."""
    short = ("--epochs", "3", "--limit-batches", "2", "--no-tensorboard", *flags)
    done = subprocess.run(
        [*python(processes), "--data-root", str(data_root), "--out", str(out), *short],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with (out / "metrics.csv").open() as file:
        rows = [{k: float(v or "nan") for k, v in r.items()} for r in csv.DictReader(file)]
    return rows, done.stdout + done.stderr


def without_its_end(whole: Path, out: Path) -> Path:
    """A copy of a run folder as after the last epoch but one."""
    shutil.copytree(whole, out)
    for name in ("checkpoint_last.pt", "report.html", "config.json"):
        (out / name).unlink()
    return out


@pytest.mark.parametrize(
    "flags",
    [
        (),  # a mean over images: every process has the terms of its own
        ("--guidance-weight", "0.5", "--negative-share", "0.5"),  # every process has them all
        ("--loss", "proxy-anchor", "--clip-grad", "1", "--warmup", "1"),
    ],
    ids=["el-nivmf", "guided", "proxy-anchor"],
)
def test_two_processes_give_the_losses_of_one(flags, tmp_path, data_root):
    flags = ("--freeze-batchnorm", *flags)
    one, _ = run(1, tmp_path / "one", data_root, *flags)
    two, said = run(2, tmp_path / "two", data_root, *flags)
    assert "2 processes" in said
    assert said.count("epoch 3/3") == 1
    assert "warning" not in said
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert one[0]["loss"] > 0.1
    features = [np.load(tmp_path / name / "embeddings_test.npz") for name in ("one", "two")]
    np.testing.assert_array_equal(features[0]["labels"], features[1]["labels"])
    np.testing.assert_array_equal(features[0]["paths"], features[1]["paths"])
    a, b = (torch.from_numpy(file["features"]).double() for file in features)
    assert (a - b).norm() / a.norm() < 1e-4
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()
    }


FIFTY = ("--freeze-batchnorm", "--epochs", "50", "--limit-batches", "1", "--evaluate-every", "50")


def test_classes_spread_over_processes_give_the_losses_of_one(tmp_path, data_root):
    flags = (*FIFTY, "--guidance-weight", "0.1")
    one, _ = run(1, tmp_path / "one", data_root, *flags)
    two, said = run(2, tmp_path / "two", data_root, *flags, "--class-parallel")
    assert "2 processes, classes spread over them" in said
    assert len(two) == 50
    losses = [[row["loss"] for row in rows] for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert min(losses[0]) > 0.1
    assert two[-1]["c_recall@1"] == pytest.approx(one[-1]["c_recall@1"], abs=0.02)
    kept = sorted(path.name for path in (tmp_path / "two").glob("classes-*"))
    assert {"classes-49-0", "classes-50-0"} <= set(kept)
    assert len(kept) <= 3  # of the last, the previous and the best checkpoint


def test_spread_classes_are_resumed_by_another_number_of_processes(tmp_path, data_root):
    flags = ("--freeze-batchnorm", "--class-parallel")
    whole, _ = run(2, tmp_path / "whole", data_root, *flags)
    out = without_its_end(tmp_path / "whole", tmp_path / "out")
    resumed, said = run(1, out, data_root, "--resume", *flags)
    assert "resuming after epoch 2 of 3" in said
    assert resumed[2]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-5)
    assert resumed[2]["norm_mean"] == pytest.approx(whole[2]["norm_mean"], rel=1e-5)


def test_a_killed_process_is_restarted_and_the_run_goes_on(tmp_path, data_root):
    """torchrun ends the others, starts all again, and --resume takes up the last checkpoint."""
    flags = ("--freeze-batchnorm", "--class-parallel", "--epochs", "12")
    whole, _ = run(2, tmp_path / "whole", data_root, *flags)
    command = python(2)
    command.insert(command.index("--standalone"), "--max-restarts=2")
    short = ("--limit-batches", "2", "--no-tensorboard", *flags, "--resume")
    process = subprocess.Popen(
        [*command, "--data-root", str(data_root), "--out", str(tmp_path / "out"), *short],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(400, process.kill)
    limit.start()
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("epoch 2/12") and "restarting" not in said:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            last = [pid for pid in children.split() if rank_of(pid) == "1"]
            os.kill(int(last[0]), signal.SIGKILL)
            said += "restarting"
    limit.cancel()
    assert process.wait(60) == 0, said
    assert "resuming after epoch" in said
    with (tmp_path / "out" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx([row["loss"] for row in whole], rel=1e-5)


def rank_of(pid: str) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(item.split("=", 1) for item in environment if "=" in item).get("RANK")


def test_statistics_of_each_process_are_warned_of_and_the_run_resumes(tmp_path, data_root):
    whole, said = run(2, tmp_path / "whole", data_root)
    assert said.count("warning: on the CPU every process has BatchNorm statistics") == 1
    out = without_its_end(tmp_path / "whole", tmp_path / "out")
    resumed, said = run(2, out, data_root, "--resume")
    assert "resuming after epoch 2 of 3" in said
    names = [name for name in whole[0] if not name.startswith("seconds_")]
    assert [[row[n] for n in names] for row in resumed] == [
        [row[n] for n in names] for row in whole
    ]


def test_a_batch_that_cannot_be_split_is_one_clear_line(tmp_path, data_root):
    flags = ("--batch-size", "39", "--samples-per-class", "1")
    done = subprocess.run(
        [*python(2), *flags, "--data-root", str(data_root), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "--batch-size is 39, but must be a multiple of the number of processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_parts_of_the_processes_make_the_whole():
    for size in (1, 2, 3, 7):
        ranks = [Ranks(rank, size, torch.device("cpu")) for rank in range(size)]
        assert [i for rank in ranks for i in rank.share(20)] == list(range(20))
        assert max(len(r.share(20)) for r in ranks) - min(len(r.share(20)) for r in ranks) <= 1


def test_only_a_mean_over_images_is_computed_on_slices():
    class Recorder(torch.nn.Module):
        decomposes = True

        def forward(self, embeddings, labels, *, seed, image_offset=0):
            return torch.tensor(float(image_offset))

    ranks = Ranks(1, 2, torch.device("cpu"))
    embeddings, labels = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    assert global_loss(Recorder(), embeddings, labels, 0, ranks) == 4
