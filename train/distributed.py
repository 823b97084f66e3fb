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

RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the others wait while the main process evaluates


@dataclass(frozen=True)
class Ranks:
    """This process's rank; all processes must call the methods in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's contiguous part of 0 ... total - 1."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value in all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others, which find the files it left."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes in rank order; their numbers may differ."""
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
        """Gather equally many rows of each process, for a loss that all compute on the whole batch.

        Every process computes the full gradient in its own rows, so it is multiplied by the number
        of processes, by which DistributedDataParallel divides.
        """
        return _GatherBatch.apply(rows, self) if self.size > 1 else rows  # type: ignore

    def scaled(self, rows: Tensor) -> Tensor:
        """Return the rows unchanged; multiply their gradient as `gather_batch` does."""
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
    store, rank, _ = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    # After a restart by torchrun the store still holds the addresses of the ended processes.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=RENDEZVOUS_TIMEOUT,
    )
    dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; several processes on a machine get a GPU each."""
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
