"""Training over several processes: torchrun on the CPU gives what one process gives."""

import contextlib
import csv
import io
import os
import shutil
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from train import report
from train.__main__ import main
from train.distributed import Ranks
from train.loop import global_loss

ROOT = Path(__file__).parents[1]
LIMIT = 3600  # seconds: whatever hangs is a failure, not a wait
TINY = ("--preset", "glyphs-tiny", "--device", "cpu", "--no-tensorboard", "--limit-batches", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*arguments: str) -> list[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    return [*launcher, "--standalone", *arguments]


# A process of torchrun that trains as often as it is told to. Each run takes itself for one that
# torchrun has restarted, which keeps it from the addresses of the runs before.
SERVER = """
import contextlib, io, os, sys
from multiprocessing.connection import Client
from train import report
from train.__main__ import main
report.write = lambda folder, *_: folder.write(report.REPORT, b"-")
with Client(("127.0.0.1", int(sys.argv[1]))) as parent:
    runs = 0
    while True:
        arguments, said = parent.recv(), io.StringIO()
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(runs)
        runs += 1
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(arguments)
        parent.send((code, said.getvalue()))
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Trains in two processes that torchrun starts once: gives their exit codes and words."""
    script = tmp_path_factory.mktemp("pool") / "server.py"
    script.write_text(SERVER)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT)
        command = torchrun(str(script), str(server.getsockname()[1]))
        process = subprocess.Popen(command, env=ENVIRONMENT)
        try:
            children = [Connection(server.accept()[0].detach()) for _ in range(2)]

            def run(*arguments: str) -> tuple[list[int], str]:
                for child in children:
                    child.send(arguments)
                assert all(child.poll(LIMIT) for child in children)
                codes, said = zip(*(child.recv() for child in children), strict=True)
                return list(codes), "".join(said)

            yield run
        finally:
            process.terminate()
            process.wait(LIMIT)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(pool, data_root):
    """Gives the rows of metrics.csv of a short run in one or two processes, and what it said.

    Without the pictures, which take the most time.
    """
    flags = (*TINY, "--epochs", "3", "--data-root", data_root)

    def run(processes: int, out: Path, *more: str) -> tuple[list[dict], str]:
        arguments = [*flags, "--out", str(out), *more]
        if processes == 1:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                codes = [main(arguments)]
            words = said.getvalue()
        else:
            codes, words = pool(*arguments)
        assert codes == [0] * processes, words
        return rows(out), words

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
        yield run
    torch.set_num_threads(threads)


def rows(out: Path) -> list[dict]:
    with (out / "metrics.csv").open() as file:
        return [{k: float(v or "nan") for k, v in r.items()} for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def spread(run, tmp_path_factory):
    """A run in two processes with the classes spread over them, and its rows."""
    out = tmp_path_factory.mktemp("spread") / "out"
    return out, run(2, out, "--freeze-batchnorm", "--class-parallel")[0]


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
def test_two_processes_give_the_losses_of_one(flags, tmp_path, run):
    flags = ("--freeze-batchnorm", *flags)
    one, _ = run(1, tmp_path / "one", *flags)
    two, said = run(2, tmp_path / "two", *flags)
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


def test_classes_spread_over_processes_give_the_losses_of_one(tmp_path, run):
    flags = (*FIFTY, "--guidance-weight", "0.1")
    one, _ = run(1, tmp_path / "one", *flags)
    two, said = run(2, tmp_path / "two", *flags, "--class-parallel")
    assert "2 processes, classes spread over them" in said
    assert len(two) == 50
    losses = [[row["loss"] for row in rows] for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert min(losses[0]) > 0.1
    assert two[-1]["c_recall@1"] == pytest.approx(one[-1]["c_recall@1"], abs=0.02)
    kept = sorted(path.name for path in (tmp_path / "two").glob("classes-*"))
    assert {"classes-49-0", "classes-50-0"} <= set(kept)
    assert len(kept) <= 3  # of the last, the previous and the best checkpoint


def test_spread_classes_are_resumed_by_another_number_of_processes(spread, tmp_path, run):
    whole, expected = spread
    out = without_its_end(whole, tmp_path / "out")
    resumed, said = run(1, out, "--resume", "--freeze-batchnorm", "--class-parallel")
    assert "resuming after epoch 2 of 3" in said
    assert resumed[2]["loss"] == pytest.approx(expected[2]["loss"], rel=1e-5)
    assert resumed[2]["norm_mean"] == pytest.approx(expected[2]["norm_mean"], rel=1e-5)


# python -m train, but the second process is killed once, in the middle of the third epoch.
KILLED = """
import os, runpy, signal
from train import loop
steps, global_loss = [], loop.global_loss
def killed(*args):
    steps.append(1)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], len(steps)) == ("1", "0", 6):
        os.kill(os.getpid(), signal.SIGKILL)
    return global_loss(*args)
loop.global_loss = killed
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def test_a_killed_process_is_restarted_and_the_run_goes_on(spread, data_root, tmp_path):
    """torchrun ends the others, starts all again, and --resume takes up the last checkpoint."""
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    flags = (*TINY, "--epochs", "3", "--data-root", data_root, "--out", str(out), "--resume")
    done = subprocess.run(
        torchrun("--max-restarts=1", str(script), *flags, "--freeze-batchnorm", "--class-parallel"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting afresh") == 1
    assert "resuming after epoch 2 of 3" in done.stdout
    losses = [row["loss"] for row in rows(out)]
    assert losses == pytest.approx([row["loss"] for row in spread[1]], rel=1e-5)


def test_statistics_of_each_process_are_warned_of_and_the_run_resumes(tmp_path, run):
    whole, said = run(2, tmp_path / "whole")
    assert said.count("warning: on the CPU every process has BatchNorm statistics") == 1
    out = without_its_end(tmp_path / "whole", tmp_path / "out")
    resumed, said = run(2, out, "--resume")
    assert "resuming after epoch 2 of 3" in said
    names = [name for name in whole[0] if not name.startswith("seconds_")]
    assert [[row[n] for n in names] for row in resumed] == [
        [row[n] for n in names] for row in whole
    ]


def test_a_batch_that_cannot_be_split_is_one_clear_line(tmp_path, pool):
    flags = ("--batch-size", "39", "--samples-per-class", "1", "--out", str(tmp_path / "out"))
    codes, said = pool(*TINY, *flags, "--data-root", str(tmp_path))
    assert codes == [1, 1]
    message = "error: --batch-size is 39, but must be a multiple of the number of processes"
    assert said.count(message) == 2 and "Traceback" not in said
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
