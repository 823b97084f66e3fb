"""Collectives of a process group, and autograd functions built on them."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nivmf_fast._checks import seed_tensor

BLOCK = 1 << 14  # rows to gather at a time, if all together may not fit
HEARTBEAT_TIMEOUT = 5.0  # seconds a process has to report that it is alive


class _Handshake(NamedTuple):
    counts: list[int]  # of rows, by rank
    seed: int | Tensor | None
    learns: bool  # whether any process's rows require a gradient


class _Communicator:
    """Collectives of a process group; their errors name the ranks that do not answer."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if group is not None and not there:
            raise ValueError("a group was given, but torch.distributed is not initialised")
        self.group = group
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1
        if self.rank < 0:
            raise ValueError("this process is not a member of the group")
        self.sent = 0  # bytes, by this process
        self.failures = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Communicator":
        return _Communicator(self.group)  # a copy of a loss belongs to the same processes

    def slices_of(self, total: int) -> list[range]:
        """Split rows among the ranks as torch.chunk and DTensor do: fewer in the last."""
        length = -(-total // self.size)
        cuts = [min(rank * length, total) for rank in range(self.size + 1)]
        return [range(*pair) for pair in itertools.pairwise(cuts)]

    def handshake(
        self, length: int, device: torch.device, seed: int | Tensor | None, learns: bool
    ) -> _Handshake:
        """Exchange row counts, seeds and grad flags before gathering."""
        if self.size == 1:
            return _Handshake([length], seed, learns)
        drawn = int(seed_tensor(seed, None, torch.device("cpu")))
        own = torch.tensor([length, learns, seed is not None, drawn], device=device)
        rows = torch.stack(self._all_gather(own)).tolist()
        lengths, learn, given, seeds = zip(*rows, strict=True)
        if min(lengths) < 0:
            raise ValueError(f"process {lengths.index(-1)} rejected its input: see its own message")
        if any(given) and not (all(given) and len(set(seeds)) == 1):
            shown = [seed if there else None for seed, there in zip(seeds, given, strict=True)]
            raise ValueError(f"seed must be the same in all processes; got {shown} in rank order")
        return _Handshake(list(lengths), seeds[0], any(learn))

    def abort(self, device: torch.device) -> None:
        """Tell the other processes, which wait in `handshake`, that this one aborts the call."""
        if self.size > 1:
            self._all_gather(torch.tensor([-1, 0, 0, 0], device=device))

    def from_rank_zero(self, value: int) -> int:
        """Return rank 0's value."""
        values = [value]
        if self.size > 1:  # as an object: a new loss may not be on a device of NCCL yet
            self._call(dist.broadcast_object_list, values, group_src=0, group=self.group)
        return values[0]

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the rows of all processes in rank order, `counts[r]` from rank r."""
        if self.size == 1 or max(counts) == 0:
            return rows
        parts = self._all_gather(_padded(rows, max(counts)))
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def combine(self, columns: Tensor, combination: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Combine the [m, B] of all processes in rank order, column by column.

        Each process combines a part of the columns, so that its traffic does not grow with the
        number of processes.
        """
        m, B = columns.shape
        if self.size == 1 or B == 0:
            return combination([columns])
        width = -(-B // self.size)
        padded = _padded(columns.T, width * self.size).view(self.size, width, m)
        received = torch.empty_like(padded)
        self.sent += padded.nbytes * (self.size - 1) // self.size
        self._call(dist.all_to_all_single, received, padded, group=self.group)
        part = combination([rows.T for rows in received])
        return torch.cat(self._all_gather(part.T)).T[:, :B].contiguous()

    def scatter_sum(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Sum rows over the processes and return this one's, `counts[r]` of them on rank r."""
        longest = max(counts)
        if self.size == 1 or longest == 0:
            return rows
        parts = torch.cat([_padded(part, longest) for part in rows.split(counts)])
        out = torch.empty_like(parts[:longest])
        self.sent += parts.nbytes - out.nbytes
        self._call(_reduce_scatter, out, parts, group=self.group)
        return out[: counts[self.rank]]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        self.sent += 2 * total.nbytes * (self.size - 1) // self.size
        self._call(dist.all_reduce, total, group=self.group)
        return total

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.sent += tensor.nbytes * (self.size - 1)
        self._call(dist.all_gather, parts, tensor.contiguous(), group=self.group)
        return parts

    def _call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size}: {collective.__name__} failed, because "
                f"{self._diagnose()} ({str(error).splitlines()[0]})"
            ) from error

    def _diagnose(self) -> str:
        """Name the ranks that do not answer; live ranks write a key to the shared store."""
        self.failures += 1
        key = f"nivmf_fast/alive/{self.failures}"
        missing = []
        timeout = HEARTBEAT_TIMEOUT
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{key}/{dist.get_rank()}", "yes")
            for rank in range(self.size):
                member = rank if self.group is None else dist.get_global_rank(self.group, rank)
                try:
                    store.wait([f"{key}/{member}"], timedelta(seconds=timeout))
                except dist.DistNetworkError:
                    raise
                except RuntimeError:  # timed out
                    missing.append(str(member))
                    timeout = 0.1  # the remaining ranks have had the full time by now
        except dist.DistNetworkError:
            return "process 0, or the torchrun that holds the store in its place, has ended"
        if not missing:
            return "of this error"
        several = ": ended, or waiting for one that has" if len(missing) > 1 else ""
        return f"no answer from process {', '.join(missing)}{several}"


# renamed in newer torch, which warns about the old name
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))


class _Gather(torch.autograd.Function):
    """Gather the rows of all processes; backward, sum the gradients of this process's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: _Communicator) -> Tensor:
        ctx.counts, ctx.group = counts, group
        gathered = group.gather(rows, counts)
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.scatter_sum(grad, ctx.counts), None, None


class _Replicated(torch.autograd.Function):
    """Pass on a value that all processes hold; backward, sum its gradients over them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: _Communicator) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


class _Sum(torch.autograd.Function):
    """Sum a term over the processes; backward, pass the gradient on to this one's term."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, group: _Communicator) -> Tensor:
        return group.sum(term)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
