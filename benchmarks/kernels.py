"""Time the kernels against their baselines, after checking that all compute the same thing."""

import argparse
import itertools
import sys
from typing import Any

import torch

import nivmf_fast
from benchmarks import report, timing
from benchmarks.cases import CASES, SHAPES, Problem, Step, tangential, truth
from benchmarks.samplers import moment_error

STANDARD_ERRORS = 5  # by which a sampler's mean cosine may be off
TOLERANCE = 0.05  # relative error against float64: beyond it a case computes something else
ROUNDS = 5  # over all problems, so that a busy minute of the machine is shared by several
HEAVY = 1 << 28  # bytes of inputs above which a problem runs all its rounds and is then freed

Found = dict[str, Any]


def checked(problem: Problem) -> tuple[list[Found], dict[str, Step]]:
    """Check the cases of a problem: a row for each, ours first, and the steps left to time."""
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
                **timing.counts(steps[name], problem.device),
                "errors": errors,
                "repeats": timing.repeats(steps[name]),
            }
        )
    return rows, steps


class Timed:
    """The result of a problem, with the times of all rounds so far."""

    def __init__(self, problem: Problem, shape: str) -> None:
        self.problem = problem
        rows, self.steps = checked(problem)
        self.times: dict[str, list[float]] = {name: [] for name in self.steps}
        self.result = {"op": problem.op, "shape": shape, "dimensions": problem.shape._asdict(),
                       "temperature": problem.temperature, "rows": rows}  # fmt: skip

    def round(self, seconds: float) -> None:
        times = timing.interleave(self.steps, self.problem.device, seconds, least=2)
        for name, ms in times.items():
            self.times[name] += ms
        summary = {name: timing.summarise(ms) for name, ms in self.times.items()}
        for row in self.result["rows"]:
            if row["case"] in summary:
                first = next(iter(summary.values()))["median_ms"]
                row |= summary[row["case"]] | {"ratio": summary[row["case"]]["median_ms"] / first}


def kernels(args: argparse.Namespace) -> Found:
    """Check and time every op, shape and temperature asked for, in rounds over all of them."""
    for op, backend in itertools.product(args.op, args.backend):
        try:
            nivmf_fast.which_backend(op, args.device, backend=backend)
        except RuntimeError as error:
            raise SystemExit(f"--backend {backend}: {error}") from None
    found: list[Found] = []
    kept: list[Timed] = []

    def time_round(timed: Timed) -> None:
        timed.round(args.seconds / ROUNDS)
        if args.json:  # an interrupted run keeps its results so far
            report.write(args.json, {"machine": args.about, "results": found})

    for op in args.op:
        for name in args.shape:
            for T in args.temperature if op != "vmf_rsample" else [1.0]:
                problem = Problem(op, SHAPES[name], T, args.device, backends=tuple(args.backend))
                timed = Timed(problem, name)
                print(f"checked: {report.title(timed.result)}", file=sys.stderr, flush=True)
                found.append(timed.result)
                time_round(timed)
                if sum(tensor.nbytes for tensor in problem.inputs) <= HEAVY:
                    kept.append(timed)
                    continue
                for _ in range(ROUNDS - 1):
                    time_round(timed)
    for number in range(2, ROUNDS + 1):
        print(f"round {number} of {ROUNDS}", file=sys.stderr, flush=True)
        for timed in kept:
            time_round(timed)
    for result in found:
        print(report.case_table(result) + "\n", flush=True)
    return {"results": found}
