"""Build, test and measure on a GPU with one command, each part within its time limit.

If a part fails or takes too long, the others' results remain. After every part the results are
written to benchmarks/results/DEVICE-COMMIT.json, and to $OUT if that is set.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, timing

ROOT = Path(__file__).parents[1]
WHOLE, WHOLE_QUICK = 530.0, 170.0  # seconds that everything may take
TAIL = 2000  # characters kept of a failed part's output
BENCH = ("-m", "benchmarks")
PYTEST = ("-m", "pytest", "--override-ini=addopts=-ra", "-q", "-p", "no:cacheprovider")
# every test that needs a GPU, and few others
GPU_TESTS = {
    "kernel tests": ("tests/test_log_ppk_cuda.py", "tests/test_benchmarks.py", "-k", "gpu"),
    "tests": ("tests/test_special.py", "tests/test_vmf_rsample.py", "tests/test_log_ppk.py",
              "-k", "cuda or triton"),
    "triton tests": ("tests/test_triton_sampler.py", "tests/test_triton_log_ppk.py",
                     "-k", "cuda or paper_shapes or repeat or ten_runs or workspace or offsets "
                     "or captured"),
}  # fmt: skip
# under the sanitizer everything is slower by orders of magnitude: one small case of each kernel
SANITIZED = ("tests/test_log_ppk_cuda.py", "tests/test_vmf_rsample.py", "-k",
             "gpu_takes_four or graph_draws", "-x")  # fmt: skip


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]  # arguments of `program`
    seconds: float  # plus what the parts before it leave unused
    quick: float | None = None  # seconds in a quick run; None leaves the part out
    program: str = sys.executable
    environment: tuple[tuple[str, str], ...] = ()
    writes_json: bool = False  # takes --json FILE and writes results to it


def parts(device: str) -> list[Part]:
    """All parts, the most important ones first."""
    here = ("--device", device)

    def bench(name: str, seconds: float, quick: float | None, *command: str) -> Part:
        return Part(name, (*BENCH, *command, *here), seconds, quick, writes_json=True)

    nca = ("--op", "proxy_nca", "--shape")
    head = (
        Part("state", ("-m", "nivmf_fast"), 15, 10),
        Part("kernel tests", (*PYTEST, *GPU_TESTS["kernel tests"]), 40, 25),
        Part("tests", (*PYTEST, *GPU_TESTS["tests"]), 80, 35),
        Part("triton tests", (*PYTEST, *GPU_TESTS["triton tests"]), 60, None),
        bench("small shapes", 50, 35, *nca, "cub-128", "cub-512", "--seconds", "0.3"),
        bench("sampler", 15, None, "--op", "vmf_rsample", "--shape", "cub-512", "--quick"),
        bench("step", 15, 10, "step"),
        bench("resnet", 40, None, "resnet"),
        bench("large shapes", 45, None, *nca, "sop-512", "1e5-512", "--seconds", "0.3"),
        bench("ceilings", 10, None, "ceilings"),
        bench("growth", 25, None, "growth", "--quick"),
    )
    if device != "cuda":
        return list(head)
    switches = (("NIVMF_CUDA", "1"), ("NIVMF_REQUIRE_EXT", "1"))
    build = Part("build", ("setup.py", "build_ext", "--inplace"), 75, 55, environment=switches)
    checks = [
        Part(
            tool,
            ("--tool", tool, "--error-exitcode", "9", sys.executable, *PYTEST, *SANITIZED),
            30,
            program="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck")
    ]
    return [build, *head, *checks]


def run_part(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a part; return its state, its seconds, its last line and its results."""
    outcome: dict[str, Any] = {"name": part.name, "seconds": 0.0, "said": "", "tail": ""}
    program = shutil.which(part.program)
    if program is None:
        return outcome | {"state": "skipped", "said": f"there is no {part.program}"}
    if seconds <= 0:
        return outcome | {"state": "skipped", "said": "no time was left"}
    file = folder / f"{part.name.replace(' ', '-')}.json"
    command = [program, *part.command, *(("--json", str(file)) if part.writes_json else ())]
    log, start = folder / "log", time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict(part.environment)},
            start_new_session=True,  # so that killing a part kills all that it has started
        )
        try:
            code = process.wait(seconds)
            state = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            state = f"ran past {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome["seconds"] = time.perf_counter() - start
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    outcome |= {"state": state, "said": re.sub(r"[|]", "/", lines[-1])[:120] if lines else ""}
    if state != "done":
        outcome["tail"] = text[-TAIL:]
    if file.exists():
        outcome["found"] = json.loads(file.read_text())
    return outcome


def run_parts(
    planned: Sequence[tuple[Part, float]],
    whole: float,
    found: dict[str, Any],
    files: Sequence[Path],
) -> None:
    """Run the parts one after the other, and write all files after each.

    A part may take its own time and what the parts before it left unused.
    """
    due = time.perf_counter()
    end = due + whole
    found["parts"] = []
    with tempfile.TemporaryDirectory() as folder:
        for part, seconds in planned:
            due += seconds
            left = min(due, end) - time.perf_counter()
            print(f"{part.name}: at most {max(left, 0):.0f} s", flush=True)
            outcome = run_part(part, left, Path(folder))
            for key, value in outcome.pop("found", {}).items():
                if key == "results":
                    found.setdefault("results", []).extend(value)
                elif key != "machine":
                    found[key] = value
            found["parts"].append(outcome)
            print(f"{part.name}: {outcome['state']}, {outcome['seconds']:.1f} s", flush=True)
            if outcome["tail"]:
                print(outcome["tail"], flush=True)
            for file in files:
                report.write(file, found)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 minutes: build, tests, main cases")
    parser.add_argument("--dry", action="store_true", help="print the parts, and exit")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="name of the commit, if there is no git")
    args = parser.parse_args(arguments)
    planned = [
        (part, part.quick if args.quick else part.seconds)
        for part in parts(args.device)
        if part.quick is not None or not args.quick
    ]
    if args.dry:
        for part, seconds in planned:
            print(f"{part.name}: at most {seconds:.0f} s: {part.program} {' '.join(part.command)}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: run this on a machine with one, or use --dry")
    about = timing.machine(args.device)
    about["commit"] = args.commit or about["commit"]
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    name = f"{device}-{about['commit'] or 'unknown'}.json"
    folders = [report.RESULTS, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
    found: dict[str, Any] = {"machine": about}
    run_parts(planned, WHOLE_QUICK if args.quick else WHOLE, found,
              [folder / name for folder in folders])  # fmt: skip
    print(report.markdown(found))
    print(f"wrote {report.RESULTS / name}")
    return int(any(part["state"] not in ("done", "skipped") for part in found["parts"]))
