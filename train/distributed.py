"""The processes of a run: one, or as many as torchrun started (read from the environment)."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.config import RunError

MEETING = timedelta(minutes=2)  # to connect
TIMEOUT = timedelta(hours=2)  # the others wait while the first process evaluates


@dataclass(frozen=True)
class Ranks:
    """This process among all; every method is called by all of them, in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's contiguous part of 0 ... total - 1."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def agree(self, value: Any) -> Any:
        """The first process's value, in all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does it, then the others, which find what it left."""
        if self.size > 1 and not self.first:
            dist.barrier()
        yield
        if self.size > 1 and self.first:
            dist.barrier()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, which may have different numbers of them, in rank order."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=self.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count)
        lengths = [int(c) for c in counts]
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    def gather_batch(self, rows: Tensor) -> Tensor:
        """Equally many rows of each process, for a loss that all compute of the whole batch.

        Its gradient in these rows is the whole one in each process, and is multiplied by their
        number, because DistributedDataParallel divides by it.
        """
        return _GatherBatch.apply(rows, self) if self.size > 1 else rows  # type: ignore

    def scaled(self, rows: Tensor) -> Tensor:
        """The rows; backward, their gradient is multiplied as in `gather_batch`."""
        return _Scaled.apply(rows, self.size) if self.size > 1 else rows  # type: ignore

    def mean(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace tensors by their mean over the processes."""
        if self.size > 1:
            for tensor in tensors:
                if tensor is not None:
                    dist.all_reduce(tensor)
                    tensor /= self.size


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        parts = [torch.empty_like(rows) for _ in range(ranks.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.count
        return gradient[start : start + ctx.count] * ctx.ranks.size, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@contextlib.contextmanager
def processes(device_name: str) -> Iterator[Ranks]:
    """Join the other processes of torchrun, if there are any."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, choose_device(device_name))
        return
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://", timeout=MEETING))
    # Restarted by torchrun, a process would find the addresses of those that have ended.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=MEETING,
    )
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; of several processes on a machine, each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {name} cannot be used here: {reason}") from None
    return device
