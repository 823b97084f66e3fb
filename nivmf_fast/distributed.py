"""Proxy losses whose classes are spread over the processes of a torch.distributed group.

Every process owns a contiguous slice of the proxies, their gradients and their optimiser state. It
calls the loss with its own images and their global labels, and gets the mean loss of all images.
What a step sends depends on the batch, B images of dimension D, and not on the number of classes:

    forward   each process says how many images it has, and all agree on a seed: 4 numbers each;
              directions, norms and labels of all images are gathered: B (D + 3) numbers;
              every process draws the same samples from the shared seed;
              each image's maximum and log sum over a slice, and its own-proxy values: 8 B numbers,
              combined in rank order
    backward  gradients in the images' directions and norms, reduce-scattered: B (D + 1) numbers

All processes call a loss, and its backward, equally often; one that is given what a loss refuses
ends the call in all of them. The numbers of images are read on the host, which synchronises a GPU.

The gradients are those of the mean loss. Where DistributedDataParallel averages the network's over
W processes, multiply the loss's gradient in the embeddings by W (train/ does).
"""

import functools
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nivmf_fast.functional import (
    _seed_tensor,
    check_labels,
    combine_partials,
    loss_of_partial,
    proxy_nca_shard,
)
from nivmf_fast.losses import (
    CosineProxyLoss,
    ELNivMFLoss,
    EuclideanProxyLoss,
    KLVMFLoss,
    NivMFLoss,
    VMFProductKernelLoss,
    _NonIsotropicLoss,
)
from nivmf_fast.proxy_loss import (
    ProxyLoss,
    _Images,
    anchor_terms,
    directions_and_norms,
    require_int,
)

BLOCK = 1 << 14  # classes, or images, that are handled at a time where it matters
PATIENCE = 5.0  # seconds that processes have to say that they are still there


class _Meeting(NamedTuple):
    counts: list[int]  # of rows, by process
    seed: int | Tensor | None
    learns: bool  # whether any process's rows require a gradient


class _Group:
    """The collectives of a process group; a failure says which process did not answer."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Group":
        return _Group(self.group)  # a copy of a loss has the same processes

    def slices_of(self, total: int) -> list[range]:
        """Every process's rows of `total`, cut as torch.chunk and DTensor do: fewer in the last."""
        length = -(-total // self.size)
        cuts = [min(rank * length, total) for rank in range(self.size + 1)]
        return [range(*pair) for pair in itertools.pairwise(cuts)]

    def meet(
        self, length: int, device: torch.device, seed: int | Tensor | None, learns: bool
    ) -> _Meeting:
        """What all have to know of each other before they gather rows."""
        if self.size == 1:
            return _Meeting([length], seed, learns)
        drawn = int(_seed_tensor(seed, None, torch.device("cpu")))
        own = torch.tensor([length, learns, seed is not None, drawn], device=device)
        said = torch.stack(self._all_gather(own)).tolist()
        lengths, learn, given, seeds = zip(*said, strict=True)
        if min(lengths) < 0:
            raise ValueError(
                f"process {lengths.index(-1)} refuses what it was given: see its own message"
            )
        if any(given) and not (all(given) and len(set(seeds)) == 1):
            shown = [number if there else None for number, there in zip(seeds, given, strict=True)]
            raise ValueError(f"seed must be the same in all processes; got {shown} in rank order")
        return _Meeting(list(lengths), seeds[0], any(learn))

    def refuse(self, device: torch.device) -> None:
        """Meet the others only to say that this process does not go on."""
        if self.size > 1:
            self._all_gather(torch.tensor([-1, 0, 0, 0], device=device))

    def first(self, value: int) -> int:
        """The first process's value."""
        values = [value]
        if self.size > 1:  # as an object: where a loss is made, NCCL may not reach its device yet
            self._call(dist.broadcast_object_list, values, group_src=0, group=self.group)
        return values[0]

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes in rank order, of which each has so many."""
        if self.size == 1 or max(counts) == 0:
            return rows
        parts = self._all_gather(_padded(rows, max(counts)))
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def combine(self, columns: Tensor, combination: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """What all processes' [m, B] make together, in rank order, column by column.

        Each process combines a part of the columns, so that what it sends does not grow with the
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
        """The sum over all processes of these rows, of which each gets its own."""
        longest = max(counts)
        if self.size == 1 or longest == 0:
            return rows
        parts = torch.cat([_padded(part, longest) for part in rows.split(counts)])
        out = torch.empty_like(parts[:longest])
        self.sent += parts.nbytes - out.nbytes
        self._call(_reduce_scatter, out, parts, group=self.group)
        return out[: counts[self.rank]]

    def sum(self, tensor: Tensor) -> Tensor:
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
                f"{self._missing()} ({str(error).splitlines()[0]})"
            ) from error

    def _missing(self) -> str:
        """Who does not answer: those that do leave a word in the store that all share."""
        self.failures += 1
        word = f"nivmf_fast/alive/{self.failures}"
        missing = []
        patience = PATIENCE
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{word}/{dist.get_rank()}", "yes")
            for rank in range(self.size):
                member = rank if self.group is None else dist.get_global_rank(self.group, rank)
                try:
                    store.wait([f"{word}/{member}"], timedelta(seconds=patience))
                except dist.DistNetworkError:
                    raise
                except RuntimeError:  # it waited in vain
                    missing.append(str(member))
                    patience = 0.1  # the others had the time too
        except dist.DistNetworkError:
            return "process 0, or the torchrun that holds the store in its place, has ended"
        if not missing:
            return "of what follows"
        several = ": ended, or waiting for one that has" if len(missing) > 1 else ""
        return f"no answer from process {', '.join(missing)}{several}"


# the first is the name that newer torch has for the second, of which it warns
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward, the sum over the processes of the gradients in one's own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: _Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        gathered = group.gather(rows, counts)
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.scatter_sum(grad, ctx.counts), None, None


class _Shared(torch.autograd.Function):
    """A value that all processes have; backward, the sum of their gradients in it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


class _Sum(torch.autograd.Function):
    """The sum over the processes, of which each has the gradient of its own term."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, group: _Group) -> Tensor:
        return group.sum(term)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropies [B] over all classes from the similarities [B, P] of this process's slice.

    `combine` is as for `proxy_nca_shard`, and takes a temperature too.
    """

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, labels: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        own = (labels >= 0) & (labels < s.shape[1])
        index = torch.where(own, labels, 0)[:, None]
        top = s.amax(1)
        log_z = torch.logsumexp(s - top[:, None], 1)
        at = torch.where(own, s.gather(1, index)[:, 0], -torch.inf)
        partial = torch.stack((top, log_z, at, torch.zeros_like(top))).double()
        one = s.new_ones(())  # T has divided s already
        combined = combine(partial, one)
        ctx.save_for_backward(s, index, own, combined)
        return loss_of_partial(combined, one)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        s, index, own, combined = ctx.saved_tensors
        near = combined[0].to(s.dtype)
        rest = (combined[1] + (combined[0] - near)).to(s.dtype)
        p = torch.exp(s - near[:, None] - rest[:, None])
        p.scatter_add_(1, index, -own.to(s.dtype)[:, None])
        return p * grad[:, None], None, None


class ClassParallelLoss(ProxyLoss):
    """Base of the class-parallel losses: a loss that holds one slice of the proxies.

    A call takes this process's images, [b, D] and [b] global labels, of which there may be none,
    and returns the mean loss of all B images of all processes. `seed` must be the same in all.

    Args:
        num_classes: P, of all processes together; a process may have none of them.
        group: process group; None for all processes, or one without torch.distributed.
        sparse_gradients: drop the rows of the proxies' gradients that are zero, at low T most of
            them. SGD without momentum is unchanged. SparseAdam leaves proxies without a gradient
            and their moments as they are, where Adam would decay the moments and move on.
        embedding_dim, ...: as in the loss of one process. The form "bindev" is not offered.

    Attributes:
        total_classes: P, the `num_classes` of the constructor.
        classes: range of the classes of this process's slice.
        num_classes: proxies held here, max(1, len(classes)). NOT the constructor's P.

    Raises: ValueError: as the loss of one process, or from a process outside the group.
        RuntimeError: from a call when a process has ended; the message has its number.

    Example:
        >>> loss = ClassParallelCosineProxyLoss(9, 8)  # without torch.distributed: one process
        >>> loss.total_classes, loss.classes
        (9, range(0, 9))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        group: dist.ProcessGroup | None = None,
        sparse_gradients: bool = False,
        **options: Any,
    ) -> None:
        require_int("num_classes", num_classes, 1)
        communication = _Group(group)
        classes = communication.slices_of(num_classes)[communication.rank]
        if options.get("form", "nca") != "nca":
            raise ValueError(f"class-parallel losses have the form 'nca'; got {options['form']!r}")
        seed = int(torch.randint(2**62, ()))  # before what depends on the slice draws
        # a process without classes has a proxy that no image sees, so that all do the same steps
        super().__init__(max(1, len(classes)), embedding_dim, **options)
        self.group, self.classes, self.total_classes = communication, classes, num_classes
        self.sparse_gradients = sparse_gradients
        self._start(seed)
        self._make_sparse()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_sparse()  # copies of parameters are without their hooks

    def _make_sparse(self) -> None:
        for parameter in (self.proxies, self.concentration):
            if self.sparse_gradients and parameter is not None:
                parameter.register_post_accumulate_grad_hook(_drop_zero_rows)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """Proxies as of one process: drawn in blocks, so that none draws those of the others."""
        gain, shape = self.initial_concentration, (self.total_classes, self.embedding_dim)
        deviation = gain * (2 / sum(shape)) ** 0.5  # Xavier, of the whole
        seed = self.group.first(seed)
        for block in range(self.classes.start // BLOCK, -(-self.classes.stop // BLOCK)):
            generator = torch.Generator().manual_seed((seed + block) % 2**63)
            rows = range(block * BLOCK, min((block + 1) * BLOCK, self.total_classes))
            start = torch.randn(len(rows), self.embedding_dim, generator=generator) * deviation
            begin, end = max(rows.start, self.classes.start), min(rows.stop, self.classes.stop)
            to = slice(begin - self.classes.start, end - self.classes.start)
            self.proxies[to] = start[begin - rows.start : end - rows.start].to(self.proxies)

    @property
    def temperature(self) -> Tensor:
        """T, whose gradient is summed over the processes: it stays the same in all."""
        return _Shared.apply(super().temperature, self.group)  # type: ignore[no-any-return]

    def _collect(
        self, embeddings: Tensor, labels: Tensor, seed: int | Tensor | None, image_offset: int
    ) -> tuple[_Images, Tensor]:
        """Gather the images of all processes, and their global labels."""
        counts, seed, learns = self._meet(embeddings, labels, seed)
        loc, norm = directions_and_norms(embeddings)
        rows = torch.cat((loc, norm[:, None]), 1)
        # one without images may have no graph, but takes its part in the backward of the others
        rows = rows if rows.requires_grad else rows.requires_grad_(learns)
        rows = _Gather.apply(rows, counts, self.group)
        images = _Images(rows[:, :-1], rows[:, -1], seed, image_offset)
        return images, self.group.gather(labels, counts)

    def _draw_subset(
        self, labels: Tensor, seed: int | Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        seed = None if seed is None else seed + self.group.rank  # every slice draws its own
        return super()._draw_subset(self._here(labels), seed)

    def _meet(self, embeddings: Tensor, labels: Tensor, seed: int | Tensor | None) -> _Meeting:
        """Check what this process was given, and hear of the others."""
        device = self.proxies.device
        try:
            self._check(embeddings)
            check_labels(labels, len(embeddings), self.total_classes, None)
            if seed is not None:
                _seed_tensor(seed, None, device)
        except (TypeError, ValueError):
            self.group.refuse(device)  # the others are waiting
            raise
        learns = embeddings.requires_grad and torch.is_grad_enabled()
        return self.group.meet(len(labels), device, seed, learns)

    def _here(self, labels: Tensor) -> Tensor:
        """Labels counted from this slice's first class, -1 outside."""
        own = (labels >= self.classes.start) & (labels < self.classes.stop)
        return torch.where(own, labels - self.classes.start, -1)

    def _combine(self, partial: Tensor, temperature: Tensor) -> Tensor:
        """What is to be known of all slices, in rank order, from what is known of this one."""
        if not self.classes:
            partial = torch.zeros_like(partial)
            partial[::2] = -torch.inf
        return self.group.combine(partial, lambda parts: combine_partials(parts, temperature))

    def _losses(self, images: _Images, positive: Tensor, subset: Tensor | None) -> Tensor:
        if self.classes:
            return self._slice_losses(images, positive, subset)
        with torch.no_grad():  # no gradient of its own, but the same steps as the others
            losses = self._slice_losses(images, positive, subset)
        nothing = images.loc.sum() + images.norm.sum() + self.temperature + self.proxies.sum()
        return losses + 0 * nothing

    def _slice_losses(self, images: _Images, positive: Tensor, subset: Tensor | None) -> Tensor:
        """Per-image cross-entropy over all classes, [B], whose gradient is this slice's part."""
        s = self._similarity(images, subset)
        losses: Tensor = _CrossEntropy.apply(s, positive, self._combine)
        return losses

    def _guidance(self, loc: Tensor, labels: Tensor) -> Tensor:
        """ProxyAnchor on the directions: its sums over proxies are sums over the processes."""
        cosine = self._cosine(loc)
        positive = self._here(labels)[:, None] == torch.arange(cosine.shape[1], device=loc.device)
        attract, repel = anchor_terms(cosine, positive, self.guidance_alpha, self.guidance_delta, 0)
        present = max(labels.unique().numel(), 1)
        share = attract.sum() / present + repel.sum() / self.total_classes
        if not self.classes:
            share = 0 * share
        total: Tensor = _Sum.apply(share, self.group)
        return total

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Start every proxy at the mean direction of its class, from each process's own images."""
        counts = self._meet(embeddings, labels, None).counts
        loc = directions_and_norms(embeddings)[0].to(self.proxies)
        labels = labels.to(self.proxies.device)
        total = torch.zeros_like(self.proxies)
        for start in range(0, max(counts), BLOCK):
            block = slice(start, start + BLOCK)
            lengths = [len(range(n)[block]) for n in counts]
            here = self._here(self.group.gather(labels[block], lengths))
            directions = self.group.gather(loc[block], lengths)
            total.index_add_(0, here[here >= 0], directions[here >= 0])
        self._turn(total)

    def sharded_state_dict(
        self, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Tensor]:
        """The loss's state, and its part of the optimiser's, for torch.distributed.checkpoint.

        The entries share memory with the parameters: `save` writes them, and `load`, with any
        number of processes, fills them in place.

        Example:
            >>> loss = ClassParallelELNivMFLoss(100, 16)
            >>> sorted(loss.sharded_state_dict())
            ['concentration', 'log_temperature', 'proxies']
        """
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            state[name] = self._whole(tensor) if name in self._sliced() else tensor
        if optimizer is not None:
            _begin(optimizer, list(self.parameters()))
            for name, parameter in self.named_parameters():
                moments = optimizer.state.get(parameter, {})
                for key, value in moments.items():
                    if isinstance(value, int):  # SparseAdam's steps, which `load` could not fill
                        value = moments[key] = torch.tensor(value)
                    if not isinstance(value, Tensor):
                        continue
                    sliced = value.shape == parameter.shape and name in self._sliced()
                    state[f"optimizer.{name}.{key}"] = self._whole(value) if sliced else value
        return state

    def full_state_dict(self) -> dict[str, Tensor]:
        """The state dict that the loss of one process loads, on the CPU; every process gets it."""
        state = {}
        for name, tensor in self.state_dict().items():
            if name in self._sliced():
                tensor = self._gathered(tensor[: len(self.classes)])
            state[name] = tensor.cpu()
        return state

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all slices, on the CPU: in blocks, because a GPU may not hold them."""
        whole = torch.empty(self.total_classes, *rows.shape[1:], dtype=rows.dtype)
        slices = self.group.slices_of(self.total_classes)
        for start in range(0, len(slices[0]), BLOCK):
            block = slice(start, start + BLOCK)
            places = [classes[block] for classes in slices]
            lengths = [len(place) for place in places]
            parts = self.group.gather(rows[block], lengths).split(lengths)
            for place, part in zip(places, parts, strict=True):
                whole[place.start : place.stop] = part
        return whole

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this process's slice of the state dict of the loss of one process."""
        own = dict(state)
        for name in sorted(self._sliced() & set(state)):
            if len(state[name]) != self.total_classes:
                raise ValueError(
                    f"{name} has {len(state[name])} rows, but the loss {self.total_classes} classes"
                )
            rows = state[name][self.classes.start : self.classes.stop]
            own[name] = rows if self.classes else getattr(self, name).detach()
        self.load_state_dict(own)

    def extra_repr(self) -> str:
        here = f"classes {self.classes.start} to {self.classes.stop} of {self.total_classes}"
        return f"{here}, {super().extra_repr()}"

    def _sliced(self) -> set[str]:
        return {"proxies"} if self.concentration is None else {"proxies", "concentration"}

    def _whole(self, rows: Tensor) -> Tensor:
        """This process's rows as a part of the whole that torch knows how to save."""
        if self.group.size == 1:
            return rows
        group = self.group.group or dist.distributed_c10d._get_default_group()
        mesh = DeviceMesh.from_group(group, rows.device.type)
        shape = torch.Size((self.total_classes, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        part = rows.detach()[: len(self.classes)]
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )


class _NonIsotropicClassParallelLoss(ClassParallelLoss, _NonIsotropicLoss):
    def _slice_losses(self, images: _Images, positive: Tensor, subset: Tensor | None) -> Tensor:
        options = dict(self.kernel_options)
        if options.pop("temperature_outside"):
            return super()._slice_losses(images, positive, subset)
        samples, proxies, T = self._samples(images), self._proxies(subset), self.temperature
        combine = functools.partial(self._combine, temperature=T.detach())
        return proxy_nca_shard(samples, *proxies, positive, T, combine=combine, **options)


class ClassParallelELNivMFLoss(_NonIsotropicClassParallelLoss, ELNivMFLoss):
    """`ELNivMFLoss` with its classes spread over processes; see `ClassParallelLoss`.

    Example:
        >>> loss = ClassParallelELNivMFLoss(100, 16)  # without torch.distributed, of one process
        >>> loss(torch.randn(4, 16), torch.arange(4)).ndim
        0
    """


class ClassParallelNivMFLoss(_NonIsotropicClassParallelLoss, NivMFLoss):
    """`NivMFLoss` with its classes spread over processes; see `ClassParallelLoss`."""


class ClassParallelVMFProductKernelLoss(ClassParallelLoss, VMFProductKernelLoss):
    """`VMFProductKernelLoss` with its classes spread over processes; see `ClassParallelLoss`."""


class ClassParallelKLVMFLoss(ClassParallelLoss, KLVMFLoss):
    """`KLVMFLoss` with its classes spread over processes; see `ClassParallelLoss`."""


class ClassParallelEuclideanProxyLoss(ClassParallelLoss, EuclideanProxyLoss):
    """`EuclideanProxyLoss` with its classes spread over processes; see `ClassParallelLoss`."""


class ClassParallelCosineProxyLoss(ClassParallelLoss, CosineProxyLoss):
    """`CosineProxyLoss` with its classes spread over processes; see `ClassParallelLoss`."""


# The form of each loss whose classes are spread over processes.
CLASS_PARALLEL: dict[type[ProxyLoss], type[ClassParallelLoss]] = {
    ELNivMFLoss: ClassParallelELNivMFLoss,
    NivMFLoss: ClassParallelNivMFLoss,
    VMFProductKernelLoss: ClassParallelVMFProductKernelLoss,
    KLVMFLoss: ClassParallelKLVMFLoss,
    EuclideanProxyLoss: ClassParallelEuclideanProxyLoss,
    CosineProxyLoss: ClassParallelCosineProxyLoss,
}


def _drop_zero_rows(parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is not None and not grad.is_sparse:
        rows = grad.flatten(1).any(1) if grad.ndim > 1 else grad != 0
        index = rows.nonzero()[:, 0]
        parameter.grad = torch.sparse_coo_tensor(
            index[None], grad[index], grad.shape, is_coalesced=True
        )


def _begin(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make an optimiser that has not stepped these yet have a state, which a checkpoint fills."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    new = {p for p in parameters if p.requires_grad and p not in optimizer.state} & set(every)
    if not new:
        return
    sparse = isinstance(optimizer, torch.optim.SparseAdam)  # it takes no other gradients
    layout = torch.sparse_coo if sparse else torch.strided
    kept = [(p, p.grad, p.detach().clone() if p in new else None) for p in every]
    for parameter, _, value in kept:
        parameter.grad = None if value is None else torch.zeros_like(parameter, layout=layout)
    optimizer.step()
    for parameter, grad, value in kept:
        parameter.grad = grad
        if value is not None:
            with torch.no_grad():
                parameter.copy_(value)
