"""Time this library's kernels beside what one would use without them.

python -m benchmarks --op proxy_nca --shape cub-128 cub-512 sop-512
python -m benchmarks --op vmf_rsample --shape cub-512 --json results.json
python -m benchmarks --quick
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import nivmf_fast
from benchmarks import timing
from benchmarks.cases import CASES, SHAPES, Problem, tangential, truth
from benchmarks.samplers import moment_error

STANDARD_ERRORS = 5  # that a sampler's mean cosine may be off
TOLERANCE = 0.05  # of a case against float64: all compute the same thing, or the time says nothing


def run(problem: Problem, seconds: float) -> list[dict[str, Any]]:
    want, steps, rows = tangential(truth(problem), problem), {}, []
    for name, make in CASES[problem.op](problem):
        try:
            steps[name] = make()
            got = tangential(steps[name](), problem)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            steps.pop(name, None)
            rows.append({"case": name, "failed": str(error).splitlines()[0]})
            continue
        errors = timing.relative_errors(got, want) if "products" not in name else {}
        if any(not error < TOLERANCE for error in errors.values()):
            raise SystemExit(f"{name} computes something else: relative errors {errors}")
        if problem.op == "vmf_rsample" and "samples" in got:
            missed = moment_error(got["samples"], problem.image, problem.k)
            if not missed < STANDARD_ERRORS:
                raise SystemExit(f"{name} draws another law: {missed:.1f} standard errors off")
        del got
        rows.append(
            {
                "case": name,
                "memory_mb": timing.peak_memory(steps[name], problem.device),
                "errors": errors,
                "repeats": timing.repeats(steps[name]),
            }
        )
    times = timing.measure(steps, problem.device, seconds)
    ours = next(iter(times.values()))["median_ms"]
    for row in rows:
        if row["case"] in times:
            row |= times[row["case"]] | {"ratio": times[row["case"]]["median_ms"] / ours}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | median ms | p10 | p90 | over ours | memory MB | value error | worst gradient | bits repeat |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | failed: {row['failed']} | | | | | | | |")
            continue
        errors = dict(row["errors"])
        value = errors.pop("value", None)
        cells = [
            row["case"],
            *(f"{row[key]:.3g}" for key in ("median_ms", "p10_ms", "p90_ms")),
            f"{row['ratio']:.2f}",
            "" if row["memory_mb"] is None else f"{row['memory_mb']:.1f}",
            "" if value is None else f"{value:.1e}",
            f"{max(errors.values()):.1e}" if errors else "",
            "yes" if row["repeats"] else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = Path("/proc/cpuinfo").read_text().split("model name")
        cpu = names[1].splitlines()[0].strip("\t: ") if len(names) > 1 else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "nivmf_fast": nivmf_fast.__version__,
        "commit": commit or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", choices=CASES, default="proxy_nca")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="SHAPE",
                        default=["cub-128", "cub-512"], help=", ".join(SHAPES))  # fmt: skip
    parser.add_argument("--temperature", nargs="+", type=float, default=[1.0, 0.003])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--quick", action="store_true", help="0.2 seconds per case")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    found = []
    temperatures = args.temperature if args.op != "vmf_rsample" else [1.0]
    for name in args.shape:
        for T in temperatures:
            problem = Problem(args.op, SHAPES[name], T, args.device)
            rows = run(problem, 0.2 if args.quick else args.seconds)
            shape = ", ".join(f"{k} = {v}" for k, v in SHAPES[name]._asdict().items())
            print(f"\n### {args.op}, {name} ({shape}), T = {T:g}\n\n{table(rows)}", flush=True)
            found.append({"op": args.op, "shape": name, "temperature": T, "rows": rows})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": about, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
