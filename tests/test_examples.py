"""The examples do what their first lines say, and the pages in docs/ name what is there."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from nivmf_fast import ELNivMFLoss
from train.__main__ import main
from train.presets import PRESETS

ROOT = Path(__file__).parents[1]
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CLASS_PARALLEL = (ROOT / "docs" / "class_parallel.md").read_text(encoding="utf-8")


def python(*arguments: str, cwd: Path = ROOT, processes: int = 0) -> str:
    """What a Python command prints, alone or under torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes else []), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{cwd}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(pattern, text)]


def test_quickstart_samples_exactly_and_its_loss_falls():
    said = python("examples/quickstart.py")
    mean, exact = numbers(r"(?:direction:|exact:) (\d\.\d+)", said)
    assert mean == pytest.approx(exact, abs=0.01)
    assert "nearest proxy of each image: [0, 1, 2]" in said
    start, end = numbers(r"(\d+\.\d+) (?:at the start|after)", said)
    assert end < start / 5


def test_the_loop_of_pytorch_metric_learning_learns_unseen_classes():
    said = python("examples/plug_into_pytorch_metric_learning.py")
    before, after = numbers(r"(\d\.\d+) (?:before|after)", said)
    assert after > before + 0.5


def test_the_autoencoder_s_bound_falls_and_its_codes_tell_digits_apart():
    said = python("examples/vmf_vae.py", "--epochs", "4")
    first, last = numbers(r"= (\d+\.\d+) nats", said)
    assert last < 0.7 * first
    (right,) = numbers(r"label: (\d\.\d+)", said)
    assert right > 0.3  # a guess: 0.1


def test_spread_classes_learn_and_go_on_in_one_process_from_the_checkpoint(tmp_path):
    options = ("examples/class_parallel.py", "--classes", "2000", "--folder", str(tmp_path / "ck"))
    said = python(*options, "--steps", "6", processes=2)
    first, last = numbers(r"loss (\d+\.\d+)", said)
    assert last < first / 2
    assert len(set(numbers(r"([\d,]+) bytes", said))) == 1
    assert said.count("1,000 classes") == 2
    said = python(*options, "--steps", "5")
    (resumed,) = numbers(r"step 11: loss (\d+\.\d+)", said)
    assert resumed < last
    assert "2,000 classes" in said
    convert = ("-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch")
    python(*convert, str(tmp_path / "ck"), str(tmp_path / "all.pt"))
    state = torch.load(tmp_path / "all.pt")["loss"]
    one = ELNivMFLoss(2000, 64)
    one.load_state_dict({name: state[name] for name in one.state_dict()})
    assert (one.concentration != 10).any()


def test_the_page_on_training_names_every_preset_and_no_other():
    table = TRAINING.split("## Presets")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(PRESETS)


def test_the_parts_of_the_page_on_training_run_and_it_names_what_they_leave(tmp_path):
    """Its backbone and its loss, in a run whose files and columns it explains; and a plain run."""
    sources = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TRAINING, re.DOTALL)
    assert len(sources) == 2
    for name, code in sources:
        (tmp_path / name).write_text(code)
    flags = ("--preset", "glyphs-tiny", "--device", "cpu", "--data-root", str(tmp_path / "data"))
    flags += ("--epochs", "1", "--limit-batches", "2", "--batch-size", "20")
    own = ("--backbone", "backbones:small", "--loss", "own_losses:centres")
    own += ("--loss-options", '{"margin": 0.2}', "--validation", "class")
    for name, more in (("own", own), ("plain", ())):
        python("-m", "train", *flags, *more, "--out", str(tmp_path / name), cwd=tmp_path)
        with (tmp_path / name / "metrics.csv").open() as file:
            columns = next(csv.reader(file))
        assert len(columns) > 30
        assert [column for column in columns if f"`{column}`" not in TRAINING] == []
        files = [path.name for path in (tmp_path / name).iterdir()]
        assert [file for file in files if f"`{file}`" not in TRAINING] == []


def test_the_flags_of_the_pages_exist(capsys):
    for command in ([], ["evaluate"], ["compare"], ["sweep"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    said = capsys.readouterr().out + get_args_parser().format_help().replace("_", "-")
    flag = r"--[a-z][a-z0-9-]+"
    known = {*re.findall(flag, said), "--logdir"}  # which is TensorBoard's
    for page in (TRAINING, CLASS_PARALLEL):
        asked = set(re.findall(flag, page))
        assert len(asked) > 5
        assert asked <= known, asked - known
