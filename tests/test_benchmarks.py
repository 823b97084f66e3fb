"""The benchmarks: checks, reports, cost model and driver; durations are not tested."""

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import device_of

from benchmarks import __main__ as command
from benchmarks import cases, gpu, kernels, report, scale, timing, training
from benchmarks.cases import Problem, Shape
from nivmf_fast import ELNivMFLoss

ROOT = Path(__file__).parents[1]
TINY = Problem("proxy_nca", Shape(B=4, N=2, P=7, D=8), 1.0, "cpu")


def row(case: str, median: float, spread: float = 0.1) -> dict[str, Any]:
    return {
        "case": case,
        **{"median_ms": median, "p10_ms": median * (1 - spread), "p90_ms": median * (1 + spread)},
        **{"memory_mb": 1.0, "launches": None, "host_syncs": None, "repeats": True, "ratio": 1.0},
        "errors": {"value": 1e-7, "loc": 1e-6},
    }


def results(*rows: dict[str, Any], cuda: str | None = None, **about: Any) -> dict[str, Any]:
    device = "Some GPU" if cuda else "Some CPU"
    machine = {"device": device, "cuda": cuda, "threads": 2, "torch": "2.11", "commit": "abc"}
    problem = {"op": "proxy_nca", "shape": "cub-128", "temperature": 1.0}
    size = cases.SHAPES["cub-128"]._asdict()
    return {
        "machine": machine | {"date": "2020-01-01 00:00"} | about,
        "results": [{**problem, "dimensions": size, "rows": list(rows)}],
    }


# --- two files


@pytest.mark.parametrize(
    ("median", "slower", "word"),
    [(1.5, True, "\nslower"), (1.1, False, "1 cases are within"), (0.5, False, "\nfaster")],
)
def test_slower_is_what_the_spread_does_not_explain(median: float, slower: bool, word: str) -> None:
    text, found = report.against(results(row("a", median)), results(row("a", 1.0)))
    assert found is slower
    assert word in "\n" + text
    assert ("\nslower" in "\n" + text) is slower


def test_files_of_nothing_in_common_or_of_another_machine_say_so() -> None:
    with pytest.raises(SystemExit, match="no case in common"):
        report.against(results(row("a", 1.0)), results(row("b", 1.0)))
    text, _ = report.against(results(row("a", 1.0), threads=1), results(row("a", 1.0)))
    assert "warning: threads was 2 and is 1" in text


@pytest.mark.parametrize(("median", "code"), [(1.0, 0), (2.0, 1)])
def test_the_exit_code_is_one_when_something_got_slower(
    median: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    report.write(old, results(row("a", 1.0)))
    monkeypatch.setitem(command.COMMANDS, "kernels", lambda _: results(row("a", median)))
    arguments = ["--device", "cpu", "--against", str(old), "--json", str(new)]
    assert command.main(arguments) == code
    assert report.timed(report.read(new)).keys() == report.timed(report.read(old)).keys()
    assert "| a |" in new.with_suffix(".md").read_text()


def test_the_backends_asked_for_are_timed_and_others_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY.shape)
    small = ["--op", "vmf_rsample", "--shape", "tiny", "--seconds", "0.001", "--device", "cpu"]
    assert command.main([*small, "--backend", "reference"]) == 0
    said = capsys.readouterr().out
    assert "| nivmf_fast (reference) |" in said
    assert "(cpu)" not in said
    with pytest.raises(SystemExit, match="--backend cuda: backend 'cuda' "):
        command.main([*small, "--backend", "cuda"])


def test_another_file_than_results_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    for content in ("{", "[]", "{}"):
        file.write_text(content)
        with pytest.raises(SystemExit, match="write one with --json"):
            report.read(file)


def test_all_keeps_what_it_has_when_a_part_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(args: argparse.Namespace) -> dict[str, Any]:
        raise RuntimeError("it broke")

    part = {"results": results(row("a", 1.0))["results"]}
    monkeypatch.setattr(command, "kernels", lambda _: part)
    monkeypatch.setitem(command.COMMANDS, "growth", breaks)
    file = tmp_path / "all.json"
    with pytest.raises(RuntimeError, match="it broke"):
        command.main(["all", "--device", "cpu", "--quick", "--json", str(file)])
    kept = report.read(file)
    assert len(kept["results"]) == 2 and kept["ceilings"]["matmul_float32_gflop_per_s"] > 0


# --- cases


def test_every_case_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for case in cases.CASES["proxy_nca"](TINY) if case[0] != "torch.compile"]
    monkeypatch.setitem(cases.CASES, "proxy_nca", lambda _: iter(few))
    timed = kernels.Timed(TINY, "tiny")
    rows = timed.result["rows"]
    timed.round(0.01)
    runs = [found["runs"] for found in rows]
    timed.round(0.01)
    assert [row["case"] for row in rows] == [name for name, _ in few]
    for found, before in zip(rows, runs, strict=True):
        assert found["runs"] > before  # the times of both rounds
        assert found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]
        assert found["launches"] is found["host_syncs"] is None
        if found["case"] != "matrix products only":
            assert max(found["errors"].values()) < 1e-4 and found["repeats"]
    assert report.case_table(timed.result).count("\n|") == len(rows) + 2


@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
def test_every_case_of_an_op_computes_the_same(op: str) -> None:
    problem = Problem(op, TINY.shape, 0.1, "cpu")
    want = cases.tangential(cases.truth(problem), problem)
    names = []
    for name, make in cases.CASES[op](problem):
        if name not in ("torch.compile", "matrix products only"):
            errors = timing.relative_errors(cases.tangential(make()(), problem), want)
            assert len(errors) == 5 and max(errors.values()) < 1e-4, name
            names.append(name)
    assert "per-image loop" in names and len(names) >= 2


@pytest.mark.parametrize("heavy", [False, True])
def test_every_problem_has_all_its_rounds(
    heavy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[float] = []

    def counted(timed: kernels.Timed, seconds: float) -> None:
        rounds.append(timed.problem.temperature)
        for row in timed.result["rows"]:
            row |= {"median_ms": 1.0, "p10_ms": 1.0, "p90_ms": 1.0, "ratio": 1.0}

    every = cases.CASES["proxy_nca"]
    monkeypatch.setitem(cases.CASES, "proxy_nca", lambda problem: islice(every(problem), 1))
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY.shape)
    monkeypatch.setattr(kernels.Timed, "round", counted)
    monkeypatch.setattr(kernels, "HEAVY", 0 if heavy else 1 << 28)
    arguments = ["--op", "proxy_nca", "--shape", "tiny", "--device", "cpu"]
    assert command.main([*arguments, "--json", str(tmp_path / "new.json")]) == 0
    n = kernels.ROUNDS
    assert rounds == ([1.0] * n + [0.003] * n if heavy else [1.0, 0.003] * n)
    assert len(report.read(tmp_path / "new.json")["results"]) == 2


def test_a_baseline_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, make = next(cases.CASES["proxy_nca"](TINY))
    step = make()
    wrong = {key: 1.1 * value for key, value in step().items()}
    monkeypatch.setitem(
        cases.CASES, "proxy_nca", lambda _: iter([(name, make), ("wrong", lambda: lambda: wrong)])
    )
    with pytest.raises(SystemExit, match="wrong computes something else"):
        kernels.Timed(TINY, "tiny")


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_memory_is_what_a_step_had_at_most() -> None:
    def step() -> dict[str, torch.Tensor]:
        for _ in range(3):  # one after the other
            torch.ones(16 << 20)
        return {"kept": torch.ones(4 << 20)}

    for _ in range(2):  # what is freed before counts neither as held nor as taken
        torch.ones(32 << 20)
        step()
        assert timing.peak_memory(step, "cpu") == pytest.approx(4 * (16 << 20) / 1e6, rel=0.15)


def test_plots_are_drawn_and_nothing_else_needs_matplotlib(tmp_path: Path) -> None:
    found = results(row("nivmf_fast (cpu)", 1.0), row("batched eager", 2.0))
    found["ceilings"] = {"matmul_float32_gflop_per_s": 100.0}
    files = report.plots(found, tmp_path)
    assert sorted(file.name for file in files) == sorted(
        f"proxy_nca-{what}.{kind}"
        for what in ("time", "memory", "error")
        for kind in ("png", "svg")
    )
    assert all(file.stat().st_size > 1000 for file in files)
    code = "import sys, benchmarks.__main__; raise SystemExit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- README


def test_the_figures_in_readme_are_those_of_the_committed_results() -> None:
    assert report.readme(check=True) == 0


def test_a_stale_readme_is_found_and_written_anew(tmp_path: Path) -> None:
    file, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    file.write_text(report.README.read_text())
    cpu = results(row("nivmf_fast (cpu)", 1.0), row("batched eager", 2.5))
    report.write(folder / "cpu.json", cpu)
    before = file.read_text()
    assert report.readme(file, folder, check=True) == 1
    assert file.read_text() == before
    assert report.readme(file, folder) == 0
    assert report.readme(file, folder, check=True) == 0
    written = file.read_text()
    assert "No GPU result exists yet" in written and "Some CPU, 2 threads" in written
    assert "| 2.5 |" in written
    assert written.split(report.BEGIN)[0] == before.split(report.BEGIN)[0]
    assert written.split(report.END)[1] == before.split(report.END)[1]

    newer = results(row("nivmf_fast (cpu)", 3.0), date="2021-01-01 00:00")
    report.write(folder / "a.json", newer)
    report.write(folder / "gpu.json", results(row("nivmf_fast (cuda)", 0.1), cuda="13.0"))
    assert report.readme(file, folder, check=True) == 1
    report.readme(file, folder)
    assert "No GPU" not in file.read_text() and "Some GPU, torch" in file.read_text()
    assert "3 ms (2.7 to 3.3)" in file.read_text() and "| 2.5 |" not in file.read_text()


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# Nothing\n")
    with pytest.raises(SystemExit, match="must have one line"):
        report.readme(file, tmp_path)


# --- growth


def test_exponents_are_slopes_and_large_ones_are_explained() -> None:
    sizes = [10, 20, 40, 80]
    assert scale.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert scale.explained("time", "P", 1.05) == ""
    assert scale.explained("time", "P", 1.2) == scale.EXPLAINED["time", "P"]
    assert scale.explained("memory", "D", 1.2) == "**unexplained**"


def test_the_cost_model_finds_what_the_times_were_made_of() -> None:
    a, b, bandwidth, latency = 2e-3, 3e-6, 1e8, 1e-4
    points = []
    for W in (1, 2):
        for P in (0, 1000, 10_000, 100_000):
            for sent in (1 << 10, 1 << 20) if W > 1 else (0,):
                seconds = a * (P > 0) + b * P / W + sent / bandwidth + 8 * (W - 1) * latency
                points.append({"W": W, "P": P, "bytes": sent, "messages": 8 * (W - 1),
                               "median_ms": 1e3 * seconds})  # fmt: skip
    model = scale.fit([point for point in points if point["median_ms"]])
    found = [model[name] for name in ("a_s", "b_s_per_class", "s_per_byte", "latency_s")]
    assert found == pytest.approx([a, b, 1 / bandwidth, latency], rel=1e-6)
    assert model["worst_error"] < 1e-6


def test_what_processes_send_is_as_the_model_says_and_the_same_for_any_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "WORLDS", (2,))
    monkeypatch.setattr(scale, "QUICK_PROXIES", (50, 200))
    parser = argparse.ArgumentParser()
    scale.add_hardware(parser)
    args = parser.parse_args(["--dimension", "64", "--gpu-memory", "1e9"])
    args.device, args.quick, args.seconds = "cpu", True, 0.01
    found = scale.class_parallel(args)
    steps = [point for point in found["points"] if point["P"]]
    assert [point["bytes"] for point in steps] == 2 * [scale.bytes_per_step(2, scale.B, scale.D)]
    assert len(found["table"]) == len(scale.TABLE_P) * len(scale.TABLE_W)
    for one, more in zip(found["table"], found["table"][1:], strict=False):
        if one["P"] == more["P"]:
            assert more["memory"] < one["memory"]
    assert {r["P"] for r in found["table"] if not r["fits"]} == {10**6, 10**7, 10**8}
    assert "--gpu-memory 1e+09 byte" in found["markdown"]


# --- training


def test_cutting_the_loss_off_the_network_changes_no_gradient() -> None:
    torch.manual_seed(0)
    network, loss = torch.nn.Linear(6, 8), ELNivMFLoss(5, 8, temperature=1.0)
    images, labels = torch.randn(4, 6), torch.arange(4)
    parameters = [*network.parameters(), *loss.parameters()]
    want = torch.autograd.grad(loss(network(images), labels, seed=3), parameters)
    stages, embeddings = timing.Stages("cpu"), network(images)
    leaf, _ = training.loss_step(stages, loss, embeddings, labels, 3)
    embeddings.backward(leaf.grad)
    for parameter, gradient in zip(parameters, want, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_glyph_run_is_split_into_its_stages(tmp_path: Path) -> None:
    for package in ("timm", "PIL", "sklearn"):
        pytest.importorskip(package)
    args = argparse.Namespace(preset="glyphs-tiny", data_root=tmp_path, quick=True, device="cpu")
    found = training.train(args)
    assert tuple(found["stages"]) == training.STAGES
    assert sum(stage["share"] for stage in found["stages"].values()) == pytest.approx(1)
    assert all(stage["run_s"] > 0 for stage in found["stages"].values())


def test_the_small_step_is_profiled() -> None:
    found = training.step(argparse.Namespace(device="cpu"))
    assert found["launches"] is None  # there are none on a CPU
    assert any(row["name"] == "nivmf_fast::proxy_nca_backward" for row in found["rows"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_gpu_small_step_takes_four_launches_of_its_own() -> None:
    device_of("cuda")  # skips where the kernels are not built
    profile = timing.profiled(training.small_step("cuda"), "cuda")
    assert 3 <= training.own_launches(profile) <= 4, training.kernels_of(profile)


# --- the driver


def part(name: str, code: str, **options: Any) -> gpu.Part:
    return gpu.Part(name, ("-c", code), 60, **options)


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake clock: a part takes a second; if it hangs, its time is over at once."""
    given = results(row("nivmf_fast (cuda)", 1.0))
    gives = f"import sys; open(sys.argv[2], 'w').write({json.dumps(given)!r})"
    alive, hung = tmp_path / "alive", tmp_path / "hung"
    os.mkfifo(alive)  # reaches its end when its last writer has ended
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    hangs = f"; import time; open({str(hung)!r}, 'w'); time.sleep(600)"
    child = f"held = open({str(alive)!r}, 'w'){hangs}"
    slow = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    )
    now = 0.0

    class Process(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            nonlocal now
            while timeout is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    super().wait(0.05)
                    now += 1
                    break
                if hung.exists():
                    hung.unlink()
                    now += timeout
                    raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: now))
    file, second = tmp_path / "found.json", tmp_path / "out" / "found.json"
    found: dict[str, Any] = {"machine": given["machine"]}
    planned = [
        (part("bad", "raise SystemExit('it broke')"), 4.0),
        (part("slow", slow), 1.0),  # and what is left of the 4
        (part("absent", "", program="no-such-program"), 1.0),
        (part("first", gives, writes_json=True), 4.0),
        (part("cut", gives + hangs, writes_json=True), 2.0),
    ]
    gpu.run_parts(planned, 100, found, [file, second])
    assert {p["name"]: p["state"] for p in found["parts"]} == {
        **{"bad": "failed (1)", "slow": "ran past 4 s", "absent": "skipped", "first": "done"},
        "cut": "ran past 6 s",
    }
    assert found["parts"][0]["said"] == "it broke"
    assert len(found["results"]) == 2  # that of the part that was cut, too
    assert file.read_text() == second.read_text() == json.dumps(found, indent=1) + "\n"
    assert "| absent | skipped |" in file.with_suffix(".md").read_text()
    assert select.select([reader], [], [], 60)[0]  # what a part started ended with it
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    outcome = gpu.run_part(part("hangs", "import time; time.sleep(600)"), 0.1, tmp_path)
    assert outcome["state"] == "ran past 0 s"


def test_no_part_starts_when_the_time_is_over(tmp_path: Path) -> None:
    found = results()
    gpu.run_parts([(part("late", "1"), 60.0)], 0, found, [tmp_path / "found.json"])
    assert [(p["state"], p["said"]) for p in found["parts"]] == [("skipped", "no time was left")]


def test_the_parts_fit_into_their_minutes_and_name_what_exists() -> None:
    planned = gpu.parts("cuda")
    assert sum(p.seconds for p in planned) <= gpu.WHOLE < 9 * 60
    assert sum(p.quick or 0 for p in planned) <= gpu.WHOLE_QUICK < 3 * 60
    named = [word for p in planned for word in p.command if word.startswith("tests/")]
    assert named and all((ROOT / name).is_file() for name in named)
    for p in planned:
        if p.writes_json:
            arguments = list(p.command[2:])
            name = arguments.pop(0) if arguments[0] in command.COMMANDS else "kernels"
            command.parser(name).parse_args([*arguments, "--json", "file"])


def test_a_dry_run_says_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry", "--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "kernel tests: at most" in said and "resnet" not in said
