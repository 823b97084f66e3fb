"""The training job from end to end on the tiny glyph set: files, resume, failures."""

import csv
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nivmf_fast.losses import PAPER_LOSSES
from train import config as train_config
from train import evaluate, loop, report, run_folder
from train.__main__ import main
from train.cli import parse
from train.config import INHERITED_LOSSES, Config, RunError
from train.presets import PRESETS

ROOT = Path(__file__).parents[1]
FILES = {
    *("config.json", "metrics.csv"),
    *("checkpoint_last.pt", "checkpoint_previous.pt", "checkpoint_best.pt"),
    *("embeddings_test.npz", "report.html"),
    *("curves.png", "gallery.png", "certainty.png", "norm.png"),
}
SHORT = ("--epochs", "3", "--limit-batches", "2")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors; and subprocesses must compute the very same
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def tiny(data_root):
    """Runs the tiny preset with some flags in a folder; gives the exit code."""

    def run(out, *flags):
        common = ["--preset", "glyphs-tiny", "--data-root", str(data_root), "--device", "cpu"]
        return main([*common, "--out", str(out), *flags])

    return run


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out the pictures, which take the most time, where a test is about something else."""
    monkeypatch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))


def rows(out: Path) -> list[dict[str, float]]:
    """metrics.csv without the seconds."""
    with (out / "metrics.csv").open() as file:
        return [
            {name: float(value or "nan") for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]


def contents(out: Path) -> dict[str, bytes]:
    """The files of a run folder, but for what is written for TensorBoard."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "tensorboard"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data_root):
    out = tmp_path_factory.mktemp("run") / "tiny"
    torch.set_num_threads(1)
    flags = ["--preset", "glyphs-tiny", "--data-root", str(data_root), "--device", "cpu"]
    assert main([*flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_root):
    out = tmp_path_factory.mktemp("run") / "short"
    torch.set_num_threads(1)
    flags = ["--preset", "glyphs-tiny", "--data-root", str(data_root), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, *_: folder.write(report.REPORT, b"-"))
        assert main([*flags, *SHORT, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_every_file_and_nothing_else(whole_run):
    assert set(contents(whole_run)) == FILES
    (events,) = (whole_run / "tensorboard").iterdir()
    assert b"metrics/c_recall@1" in events.read_bytes()
    for path in whole_run.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300


def test_the_loss_is_finite_and_falls(whole_run):
    metrics = rows(whole_run)
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[-1]["loss"] < 0.95 * metrics[0]["loss"]


def test_metrics_have_the_names_of_the_protocol_and_the_seconds_last(whole_run):
    names = (whole_run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert names[:2] == ["epoch", "loss"]
    protocol = ["e_recall@1", "c_recall@1", "mAP_1000", "c_mAP_1000", "e_MAP@R", "c_MAP@R", "nmi"]
    assert [name for name in names if name in protocol] == protocol
    assert [name for name in names if "seconds" in name] == names[-3:]


def test_embeddings_are_those_that_the_metrics_were_taken_from(whole_run, data_root):
    with np.load(whole_run / "embeddings_test.npz") as content:
        features, labels, paths = (content[name] for name in ("features", "labels", "paths"))
    assert features.shape == (400, 16)
    folder = next(data_root.glob("glyphs-*"))
    assert all((folder / "images" / path).is_file() for path in paths)
    assert len({path.split("/")[0] for path in paths[labels == 3]}) == 1
    found = evaluate.retrieve(torch.tensor(features), torch.tensor(labels), "c")
    assert found.recall(1) == rows(whole_run)[-1]["c_recall@1"]


def test_the_report_needs_no_other_file_and_shows_the_numbers(whole_run):
    page = (whole_run / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 4
    assert not re.search(r"https?://|<link|<script|url\(", page)
    assert f"{rows(whole_run)[-1]['c_recall@1']:.3f}" in page


def test_config_json_gives_the_configuration_back(whole_run):
    config = Config.from_json((whole_run / "config.json").read_text())
    preset = PRESETS["glyphs-tiny"]
    assert config.loss == preset.loss
    assert config.optim == preset.optim
    assert config.folder == whole_run


def test_checkpoints_are_of_the_last_and_of_the_best_epoch(whole_run):
    last, best = (
        torch.load(whole_run / name, weights_only=True)
        for name in ("checkpoint_last.pt", "checkpoint_best.pt")
    )
    recalls = [row["c_recall@1"] for row in rows(whole_run)]
    assert last["epoch"] == 5
    assert best["epoch"] == recalls.index(max(recalls)) + 1
    previous = torch.load(whole_run / "checkpoint_previous.pt", weights_only=True)
    assert (previous["epoch"], previous["step"]) == (4, 0)
    needed = {"model", "loss", "optimiser", "schedule", "scaler", "torch_random", "epoch", "step"}
    assert needed <= set(last)


def test_the_start_says_what_runs(whole_run, tiny, tmp_path, capsys, no_report):
    assert tiny(tmp_path / "out", "--epochs", "1", "--limit-batches", "1") == 0
    said = capsys.readouterr().out
    for word in (
        "cpu",
        "backend",
        "400 images of 20 classes",
        "raw pixels",
        "parameters",
        "epoch 1/1",
    ):
        assert word in said
    assert str(tmp_path / "out") in said


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(
    uninterrupted, tiny, tmp_path, no_report
):
    assert tiny(tmp_path / "same", *SHORT) == 0
    assert rows(tmp_path / "same") == rows(uninterrupted)
    assert tiny(tmp_path / "other", "--epochs", "1", "--limit-batches", "2", "--seed", "1") == 0
    assert rows(tmp_path / "other")[0]["loss"] != rows(uninterrupted)[0]["loss"]


@pytest.mark.parametrize("name", [*PAPER_LOSSES, *INHERITED_LOSSES])
def test_every_loss_trains(name, tiny, tmp_path, no_report):
    flags = ["--loss", name, "--epochs", "1", "--limit-batches", "2"]
    if name in PAPER_LOSSES:
        flags += ["--guidance-weight", "0.1"]
    assert tiny(tmp_path / "out", *flags) == 0
    assert math.isfinite(rows(tmp_path / "out")[0]["loss"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "adamw", "--schedule", "step", "--milestones", "1", "--clip-grad", "1"),
        ("--optimizer", "sgd", "--embedding-lr", "0.01", "--warmup", "1"),
        ("--amp", "bfloat16", "--max-norm", "20"),
        ("--freeze-batchnorm", "--evaluate-every", "2", "--no-clustering"),
        ("--bindev", "--negative-share", "0.5"),
        ("--loss", "triplet", "--miner", "semihard", "--normalize-output", "--init-norm", "None"),
        ("--validation", "class", "--batch-size", "28"),
        ("--validation", "samples", "--storage-metric", "c_MAP@R"),
    ],
    ids=" ".join,
)
def test_every_option_of_training_runs(flags, tiny, tmp_path, no_report):
    out = tmp_path / "out"
    assert tiny(out, "--epochs", "2", "--limit-batches", "2", *flags) == 0
    first, last = rows(out)
    assert math.isfinite(last["loss"])
    assert math.isfinite(last["c_recall@1"])
    assert math.isnan(first["c_recall@1"]) == ("--evaluate-every" in flags)
    assert ("nmi" in last) == ("--no-clustering" not in flags)


def test_warmup_trains_the_embedding_layer_alone(tiny, tmp_path, no_report):
    flags = ("--warmup", "2", "--epochs", "3", "--limit-batches", "2", "--checkpoint-batches", "1")
    states = []
    write = run_folder.RunFolder.save

    def spying(folder, state, best):
        states.append({k: v.clone() for k, v in state["model"].items()})
        write(folder, state, best)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", spying)
        assert tiny(tmp_path / "out", *flags) == 0
    assert len(states) == 6
    weights = [name for name in states[0] if name.endswith("weight")]

    def moved(a, b):
        return {
            name.split(".")[0] for name in weights if not states[a][name].equal(states[b][name])
        }

    assert moved(0, 3) == {"embedding"}
    assert moved(3, 5) == {"embedding", "backbone"}


def test_the_step_schedule_multiplies_by_gamma_after_each_milestone(tiny, tmp_path, no_report):
    flags = ("--schedule", "step", "--milestones", "1", "3", "--gamma", "0.5", "--lr", "0.008")
    rates = []
    save = run_folder.RunFolder.save

    def spying(folder, state, best):
        rates.append(state["optimiser"]["param_groups"][0]["lr"])
        save(folder, state, best)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", spying)
        assert tiny(tmp_path / "out", "--epochs", "4", "--limit-batches", "2", *flags) == 0
    assert rates == [0.004, 0.004, 0.002, 0.002]  # that the next epoch starts with


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    uninterrupted, tiny, tmp_path, monkeypatch, capsys, no_report
):
    """Stopped in the middle of an epoch, then between the checkpoint and metrics.csv."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        steps, global_loss = [], loop.global_loss

        def interrupting(*args):
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return global_loss(*args)

        patch.setattr(loop, "global_loss", interrupting)
        assert tiny(out, *SHORT) == 130
    assert torch.load(out / "checkpoint_last.pt", weights_only=True)["epoch"] == 1
    assert "interrupted" in capsys.readouterr().err
    with monkeypatch.context() as patch:

        def failing(folder, history):
            if len(history) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder.path))
            write_metrics(folder, history)

        write_metrics = run_folder.RunFolder.write_metrics
        patch.setattr(run_folder.RunFolder, "write_metrics", failing)
        assert tiny(out, *SHORT, "--resume") == 1
    assert len(rows(out)) == 1
    assert main(["--out", str(out), "--resume"]) == 0  # the stored configuration
    assert "resuming after epoch 2 of 3" in capsys.readouterr().out
    assert rows(out) == rows(uninterrupted)
    resumed, expected = (np.load(run / "embeddings_test.npz") for run in (out, uninterrupted))
    np.testing.assert_array_equal(resumed["features"], expected["features"])


# python -m train, which waits in the second epoch until its input ends. What a shell runs in the
# background has inherited that SIGINT is ignored, and so would this.
WAITING = """
import runpy, signal, sys
from train import loop
signal.signal(signal.SIGINT, signal.default_int_handler)
steps, global_loss = [], loop.global_loss
def waiting(*args):
    steps.append(1)
    if len(steps) == 4:
        print("waiting", flush=True)
        sys.stdin.read()
    return global_loss(*args)
loop.global_loss = waiting
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def test_an_interrupted_process_says_how_to_go_on(
    uninterrupted, tiny, data_root, tmp_path, no_report
):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WAITING, "--preset", "glyphs-tiny", *SHORT]
    process = subprocess.Popen(
        [*command, "--data-root", str(data_root), "--out", str(out), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() not in ("waiting\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()  # which ends its input, so that it waits no more if it has to
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert f"--resume --out {out} continues" in err
    assert set(contents(out)) < FILES
    assert tiny(out, *SHORT, "--resume") == 0
    assert rows(out) == rows(uninterrupted)


# Kills a run at a random moment and starts it again, five times, then lets it end, for each seed. A
# moment is a line of the files that train and save, every other time only of those that save;
# whatever is being written is then cut off somewhere. Processes are forked from one that has
# imported everything and computed nothing.
KILLER = """
import collections, json, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train import loop, report, run_folder
from train.__main__ import main
report.write = lambda folder, *_: folder.write(report.REPORT, b"-")
saves = {run_folder.__file__}
files = saves | {loop.__file__, sys.modules[loop.State.__module__].__file__}

def start(folder, where=files, moment=-1):
    child = os.fork()
    if child == 0:
        lines = collections.Counter()

        def line(frame, event, _):
            if event == "line":
                if lines.total() == moment:
                    for file in map(Path.resolve, Path("/proc/self/fd").glob("*")):
                        if file.parent == folder.resolve() and file.is_file():
                            os.truncate(file, random.randint(0, file.stat().st_size))
                    os.kill(os.getpid(), signal.SIGKILL)
                lines[frame.f_code.co_filename] += 1
            return line

        def call(frame, *_):
            code = frame.f_code
            return line if code.co_filename in where and code.co_name.isidentifier() else None

        sys.settrace(call)
        code = main([*sys.argv[2:], "--out", str(folder), "--resume"])
        sys.settrace(None)
        folder.with_suffix(".lines").write_text(json.dumps(lines))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

runs = Path(sys.argv[1])
assert start(runs / "whole") == 0
lines = json.loads((runs / "whole.lines").read_text())
for seed in (0, 1):
    random.seed(seed)
    folder, codes = runs / f"killed-{seed}", []
    for where in (saves, files, saves, files, saves):
        moment = random.randrange(sum(lines[file] for file in where) // 3)
        codes.append(start(folder, where, moment))
    assert codes[:2] == 2 * [-signal.SIGKILL] and set(codes[2:]) <= {-signal.SIGKILL, 0}, codes
    assert start(folder) == 0
"""


def test_a_run_killed_five_times_ends_as_one_that_was_not(data_root, tmp_path):
    flags = ["--preset", "glyphs-tiny", "--epochs", "4", "--checkpoint-batches", "2"]
    flags += ["--data-root", str(data_root), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stdout
    whole = tmp_path / "whole"
    assert len(rows(whole)) == 4
    for killed in (tmp_path / "killed-0", tmp_path / "killed-1"):
        assert rows(killed) == rows(whole)
        assert set(contents(killed)) == set(contents(whole))


def test_a_damaged_last_checkpoint_is_passed_over_for_the_one_before(
    uninterrupted, tiny, tmp_path, capsys, no_report
):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    (out / "config.json").unlink()
    (out / report.REPORT).unlink()
    last = (out / "checkpoint_last.pt").read_bytes()
    (out / "checkpoint_last.pt").write_bytes(last[: len(last) // 2])
    assert tiny(out, *SHORT, "--resume") == 0
    said = capsys.readouterr().out
    assert "checkpoint_last.pt is not a readable checkpoint" in said
    assert "resuming after epoch 2 of 3" in said
    assert rows(out) == rows(uninterrupted)


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(tiny, tmp_path, capsys, no_report):
    assert tiny(tmp_path / "out", "--epochs", "1", "--limit-batches", "1", "--resume") == 0
    assert f"no checkpoint in {tmp_path / 'out'}: starting afresh" in capsys.readouterr().out
    assert len(rows(tmp_path / "out")) == 1


def test_resume_on_a_finished_run_changes_nothing_and_says_so(whole_run, capsys):
    before = contents(whole_run), {p: p.stat().st_mtime_ns for p in whole_run.iterdir()}
    assert main(["--out", str(whole_run), "--resume"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert before == (contents(whole_run), {p: p.stat().st_mtime_ns for p in whole_run.iterdir()})


def test_runs_without_a_folder_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([], PRESETS).folder == Path("runs/glyphs-001")
    for name in ("glyphs-001", "glyphs-012", "glyphs-tiny-020"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert parse([], PRESETS).folder == Path("runs/glyphs-013")
    assert parse(["--resume"], PRESETS).folder == Path("runs/glyphs-012")
    assert parse(["--preset", "glyphs-tiny"], PRESETS).folder == Path("runs/glyphs-tiny-021")


def test_flags_override_the_preset():
    config = parse(
        ["--preset=glyphs-tiny", "--lr", "0.1", "--loss", "cos", "--no-warmstart"], PRESETS
    )
    assert (config.epochs, config.optim.lr, config.loss.name) == (5, 0.1, "cos")
    assert config.loss.warmstart is False
    assert config.data.glyph_characters == 40


def test_help_names_the_losses_and_does_not_load_torch():
    code = "import atexit, sys, train.__main__ as t; atexit.register(lambda: print(set(sys.modules)"
    code += " & {'torch', 'numpy'})); t.main(['--help'])"
    text = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    words = " ".join(text.stdout.replace("│", " ").split())
    assert words.endswith("set()"), text.stderr
    named = re.search(r"Loss: (.+?), as in the paper", words).group(1).split(", ")
    assert len(named) == 7 and set(named) <= PAPER_LOSSES.keys()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    flags = list(train_config.by_flag(Config()))
    assert len(flags) > 30
    assert {"--preset", "--epochs", "--out", "--dataset", "--loss"} <= set(flags)
    explained = re.sub(r"[│\s]+", " ", said)
    for flag in flags:  # its name, what it takes, a sentence, its value
        assert re.search(rf" {flag},? \S+ \S[^()]* \S", explained), flag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch (did you mean --epochs"),
        (["glyphs"], "unknown argument glyphs"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--epochs", "0"], "--epochs is 0, but must be at least 1"),
        (["--lr", "nan"], "--lr is nan, but must be above 0"),
        (["--milestones", "3", "0"], "--milestones is 0, but must be at least 1"),
        (["--train-share", "1.5"], "--train-share is 1.5, but must be above 0 and at most 1"),
        (["--dataset", "absent", "--temperature", "0"], "--temperature of loss el-nivmf: "),
        (["--workspace", "0"], "--workspace of loss el-nivmf: workspace must be"),
        (["--loss", "tripplet"], "--loss is 'tripplet' (did you mean triplet"),
        (["--miner", "semi"], "--miner is 'semi' (did you mean semihard"),
        (["--miner", "semihard"], "--miner semihard goes with triplet"),
        (["--backbone", "resnet51"], "resnet51"),
        (["--seeds", "1", "1"], "--seeds are (1, 1), but must differ"),
        (["--storage-metric", "speed", "--limit-batches", "1"], "--storage-metric is 'speed'"),
        (["--preset", "cub"], "--preset is 'cub', but must be one of glyphs, glyphs-tiny"),
        (["--batch-size", "7"], "--batch-size is 7, but must be a multiple"),
        (["--batch-size", "4000"], "--batch-size is 4000, but there are 400 training images"),
        (["--dataset", "cub200"], "cub200"),
        (["--glyph-characters", "9999"], "9999 glyph characters asked for"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--backend", "abacus"], "--backend abacus: "),
        (["--concentration", "-1"], "concentration must be positive"),
        (["--lr", "1e30"], "diverged"),
    ],
)
def test_a_failure_is_one_clear_line(flags, message, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny(out, *flags) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert not out.exists() or set(contents(out)) == {"config.json"}


def test_a_folder_that_holds_something_is_not_overwritten(tiny, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("the only copy")
    assert tiny(tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"the only copy"}
    assert tiny(tmp_path / "thesis.txt") == 1
    assert "is a file, not a folder" in capsys.readouterr().err


def test_resuming_with_other_values_is_refused(whole_run, tiny, capsys):
    assert tiny(whole_run, "--resume", "--seed", "3") == 1
    assert "has --seed 0, not 3" in capsys.readouterr().err
    assert main(["--out", str(whole_run), "--resume", "--loss", "cos"]) == 1
    assert "has --loss el-nivmf, not cos" in capsys.readouterr().err


def test_a_broken_checkpoint_or_configuration_is_one_clear_line(whole_run, tmp_path, capsys):
    for name, content, message in (
        ("checkpoint_last.pt", b"junk", "is not a readable checkpoint"),
        ("config.json", b'{"epochs": 2, "fuel": 3}', "is not a configuration of this version"),
        ("config.json", b"{", "is not a configuration of this version"),
    ):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        for file in ("config.json", "checkpoint_last.pt"):
            (out / file).write_bytes((whole_run / file).read_bytes())
        (out / name).write_bytes(content)
        assert main(["--out", str(out), "--resume"]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_corrupt_image_is_one_clear_line(tiny, data_root, tmp_path, capsys):
    image = next(next(data_root.glob("glyphs-*")).rglob("*.png"))
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[: len(whole) // 2])
        assert tiny(tmp_path / "out") == 1
    finally:
        image.write_bytes(whole)
    err = capsys.readouterr().err
    assert f"cannot read image {image}" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_line_and_leaves_the_last_checkpoint(
    uninterrupted, tiny, tmp_path, monkeypatch, capsys, no_report
):
    out, sync, synced = tmp_path / "out", os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 5:  # configuration; best, last, metrics of epoch 1; the next one; no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", full)
        assert tiny(out, *SHORT) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: No space left on device: {out}/")
    assert err.count("\n") == 1
    names = {"config.json", "checkpoint_best.pt", "checkpoint_last.pt", "metrics.csv"}
    assert names <= set(contents(out)) <= names | {"checkpoint_previous.pt"}
    assert tiny(out, *SHORT, "--resume") == 0
    assert rows(out) == rows(uninterrupted)


def test_the_batches_seed_the_loss(monkeypatch, tiny, tmp_path, no_report):
    seeds = []
    original = loop.build_loss

    def spying(*args):
        loss = original(*args)
        forward = loss.forward
        loss.forward = lambda *a, seed, **k: seeds.append(seed) or forward(*a, seed=seed, **k)
        return loss

    monkeypatch.setattr(loop, "build_loss", spying)
    assert tiny(tmp_path / "out", "--epochs", "2", "--limit-batches", "2") == 0
    assert len(set(seeds)) == 4


def test_a_value_no_run_can_have_is_refused_before_anything_is_read():
    with pytest.raises(RunError, match="--limit-batches is 0"):
        parse(["--limit-batches", "0"], PRESETS)


class Recorder:
    """Stands for an online tracker's module: keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("tracker", "module", "verb", "end"),
    [("wandb", "wandb", "log", "finish"), ("comet", "comet_ml", "log_metrics", "end")],
)
def test_a_tracker_gets_the_metrics_of_every_epoch(
    tracker, module, verb, end, tiny, tmp_path, monkeypatch, no_report
):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, module, recorder)
    flags = ("--tracker", tracker, "--project", "birds", "--epochs", "2", "--limit-batches", "1")
    assert tiny(tmp_path / "out", *flags) == 0
    assert "birds" in str(recorder.calls[0])
    assert recorder.calls[-1][0] == end
    logged = [(args[0], kwargs["step"]) for name, args, kwargs in recorder.calls if name == verb]
    assert [step for _, step in logged] == [1, 2]
    for (row, _), stored in zip(logged, rows(tmp_path / "out"), strict=True):
        assert {name: row[name] for name in stored} == stored


def test_a_tracker_that_is_not_installed_is_one_clear_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert tiny(tmp_path / "out", "--tracker", "wandb") == 1
    err = capsys.readouterr().err
    assert "--tracker wandb needs the package wandb: pip install wandb, or go without" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
