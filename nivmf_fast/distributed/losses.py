"""The proxy losses with their classes spread over processes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nivmf_fast._checks import check_labels, require_int, seed_tensor
from nivmf_fast._partials import combine_partials, loss_of_partial
from nivmf_fast.distributed.checkpoint import _SlicedLoss
from nivmf_fast.distributed.group import (
    BLOCK,
    _Communicator,
    _Gather,
    _Handshake,
    _Replicated,
    _Sum,
)
from nivmf_fast.functional import proxy_nca_shard
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
)

SEED_BLOCK = 1 << 14  # classes drawn from one seed; changing it changes the initial proxies


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropies [B] over all classes, from the similarities s [B, P] of this slice.

    `combine` is that of `proxy_nca_shard`, with a temperature as its second argument.
    """

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, labels: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        known = (labels >= 0) & (labels < s.shape[1])
        index = torch.where(known, labels, 0)[:, None]
        maximum = s.amax(1)
        lse = torch.logsumexp(s - maximum[:, None], 1)
        own = torch.where(known, s.gather(1, index)[:, 0], -torch.inf)
        partial = torch.stack((maximum, lse, own, torch.zeros_like(lse))).double()
        one = s.new_ones(())  # s is divided by T already
        combined = combine(partial, one)
        ctx.save_for_backward(s, index, known, combined)
        return loss_of_partial(combined, one)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        s, index, known, (maximum, lse, *_) = ctx.saved_tensors
        near = maximum.to(s.dtype)
        lse = (lse + (maximum - near)).to(s.dtype)
        p = torch.exp(s - near[:, None] - lse[:, None])
        p.scatter_add_(1, index, -known.to(s.dtype)[:, None])
        return p * grad[:, None], None, None


def _drop_zero_rows(parameter: Tensor) -> None:
    """Make the gradient row-sparse: a hook to run after its accumulation."""
    grad = parameter.grad
    if grad is not None and not grad.is_sparse:
        rows = grad.flatten(1).any(1) if grad.ndim > 1 else grad != 0
        index = rows.nonzero()[:, 0]
        parameter.grad = torch.sparse_coo_tensor(
            index[None], grad[index], grad.shape, is_coalesced=True
        )


class ClassParallelLoss(_SlicedLoss):
    """Base of the class-parallel losses: a loss that holds one slice of the proxies.

    A call takes this process's embeddings [b, D] and global labels [b], b >= 0, and returns the
    mean loss of all B images of all processes. `seed` must be the same in all.

    Args:
        num_classes: P, of all processes together; a process may have none of them.
        group: process group; None for all processes, or a single one without torch.distributed.
        sparse_gradients: drop the zero rows of the proxies' gradients, at low T most of them. SGD
            without momentum is unaffected. SparseAdam leaves proxies without a gradient, and their
            moments, unchanged, where Adam would decay the moments and still move the proxies.
        embedding_dim, ...: as in the loss of one process. The form "bindev" is not supported.

    Attributes:
        total_classes: P, the `num_classes` of the constructor.
        classes: range of the classes of this process's slice.
        num_classes: proxies held here, max(1, len(classes)). NOT the constructor's P.

    Raises: ValueError: as the loss of one process, or in a process outside the group.
        RuntimeError: in calls, if a process has ended; the message has its number.

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
        communicator = _Communicator(group)
        classes = communicator.slices_of(num_classes)[communicator.rank]
        if options.get("form", "nca") != "nca":
            raise ValueError(f"class-parallel losses have the form 'nca'; got {options['form']!r}")
        seed = int(torch.randint(2**62, ()))  # before draws whose number depends on the slice
        # a process without classes holds one unused proxy, so that it takes the same steps
        super().__init__(max(1, len(classes)), embedding_dim, **options)
        self.group, self.classes, self.total_classes = communicator, classes, num_classes
        self.sparse_gradients = sparse_gradients
        self._initialise(seed)
        self._register_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register_hooks()  # copies of parameters lose their hooks

    def _register_hooks(self) -> None:
        for parameter in (self.proxies, self.concentration):
            if self.sparse_gradients and parameter is not None:
                parameter.register_post_accumulate_grad_hook(_drop_zero_rows)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draw this slice of proxies, the same for any number of processes.

        Every block of classes has its own seed, so that no process has to draw all proxies.
        """
        gain, shape = self.initial_concentration, (self.total_classes, self.embedding_dim)
        deviation = gain * (2 / sum(shape)) ** 0.5  # Xavier's, for all classes
        seed = self.group.from_rank_zero(seed)
        for block in range(self.classes.start // SEED_BLOCK, -(-self.classes.stop // SEED_BLOCK)):
            generator = torch.Generator().manual_seed((seed + block) % 2**63)
            rows = range(block * SEED_BLOCK, min((block + 1) * SEED_BLOCK, self.total_classes))
            start = torch.randn(len(rows), self.embedding_dim, generator=generator) * deviation
            begin, end = max(rows.start, self.classes.start), min(rows.stop, self.classes.stop)
            to = slice(begin - self.classes.start, end - self.classes.start)
            self.proxies[to] = start[begin - rows.start : end - rows.start].to(self.proxies)

    @property
    def temperature(self) -> Tensor:
        """T, []; its gradient is summed over the processes, which keeps T equal in all."""
        return _Replicated.apply(super().temperature, self.group)  # type: ignore[no-any-return]

    def _collect(
        self, embeddings: Tensor, labels: Tensor, seed: int | Tensor | None, image_offset: int
    ) -> tuple[_Images, Tensor]:
        """Gather the images of all processes, and their global labels."""
        counts, seed, learns = self._handshake(embeddings, labels, seed)
        loc, norm = directions_and_norms(embeddings)
        rows = torch.cat((loc, norm[:, None]), 1)
        # a process without images may have no graph, but must join the others' backward
        rows = rows if rows.requires_grad else rows.requires_grad_(learns)
        rows = _Gather.apply(rows, counts, self.group)
        images = _Images(rows[:, :-1], rows[:, -1], seed, image_offset)
        return images, self.group.gather(labels, counts)

    def _draw_subset(
        self, labels: Tensor, seed: int | Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        seed = None if seed is None else seed + self.group.rank  # every slice draws its own
        return super()._draw_subset(self._local_labels(labels), seed)

    def _handshake(
        self, embeddings: Tensor, labels: Tensor, seed: int | Tensor | None
    ) -> _Handshake:
        """Validate this process's input and exchange metadata with the others."""
        device = self.proxies.device
        try:
            self._check(embeddings)
            check_labels(labels, len(embeddings), self.total_classes, None)
            if seed is not None:
                seed_tensor(seed, None, device)
        except (TypeError, ValueError):
            self.group.abort(device)  # the others wait in their handshake
            raise
        learns = embeddings.requires_grad and torch.is_grad_enabled()
        return self.group.handshake(len(labels), device, seed, learns)

    def _local_labels(self, labels: Tensor) -> Tensor:
        """Count labels from this slice's first class; -1 outside it."""
        here = (labels >= self.classes.start) & (labels < self.classes.stop)
        return torch.where(here, labels - self.classes.start, -1)

    def _combine(self, partial: Tensor, temperature: Tensor) -> Tensor:
        """Combine the partials [4, B] of all slices, in rank order."""
        if not self.classes:
            partial = torch.zeros_like(partial)
            partial[::2] = -torch.inf
        return self.group.combine(partial, lambda parts: combine_partials(parts, temperature))

    def _losses(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        if self.classes:
            return self._slice_losses(images, local_labels, subset)
        with torch.no_grad():  # no gradient, but the collectives that the others expect
            losses = self._slice_losses(images, local_labels, subset)
        nothing = images.loc.sum() + images.norm.sum() + self.temperature + self.proxies.sum()
        return losses + 0 * nothing

    def _slice_losses(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        """Per-image cross-entropy over all classes, [B], whose gradient is this slice's part."""
        s = self._similarity(images, subset)
        losses: Tensor = _CrossEntropy.apply(s, local_labels, self._combine)
        return losses

    def _guidance(self, loc: Tensor, labels: Tensor) -> Tensor:
        """ProxyAnchor on the directions: its sums over proxies are sums over the processes."""
        cosine = self._cosine(loc)
        classes = torch.arange(cosine.shape[1], device=loc.device)
        positive = self._local_labels(labels)[:, None] == classes
        attract, repel = anchor_terms(cosine, positive, self.guidance_alpha, self.guidance_delta, 0)
        present = max(labels.unique().numel(), 1)
        share = attract.sum() / present + repel.sum() / self.total_classes
        if not self.classes:
            share = 0 * share
        total: Tensor = _Sum.apply(share, self.group)
        return total

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Set every proxy to the mean direction of its class, over all processes' images.

        Every process must call this, with its own embeddings [b, D] and global labels [b].
        """
        counts = self._handshake(embeddings, labels, None).counts
        loc = directions_and_norms(embeddings)[0].to(self.proxies)
        labels = labels.to(self.proxies.device)
        total = torch.zeros_like(self.proxies)
        for start in range(0, max(counts), BLOCK):
            block = slice(start, start + BLOCK)
            lengths = [len(range(n)[block]) for n in counts]
            local = self._local_labels(self.group.gather(labels[block], lengths))
            directions = self.group.gather(loc[block], lengths)
            total.index_add_(0, local[local >= 0], directions[local >= 0])
        self._turn(total)

    def extra_repr(self) -> str:
        held = f"classes {self.classes.start} to {self.classes.stop} of {self.total_classes}"
        return f"{held}, {super().extra_repr()}"


class _NonIsotropicClassParallelLoss(ClassParallelLoss, _NonIsotropicLoss):
    def _slice_losses(self, images: _Images, local_labels: Tensor, subset: Tensor | None) -> Tensor:
        options = dict(self.kernel_options)
        if options.pop("temperature_outside"):
            return super()._slice_losses(images, local_labels, subset)
        samples, proxies, T = self._samples(images), self._proxies(subset), self.temperature
        combine = functools.partial(self._combine, temperature=T.detach())
        return proxy_nca_shard(samples, *proxies, local_labels, T, combine=combine, **options)


class ClassParallelELNivMFLoss(_NonIsotropicClassParallelLoss, ELNivMFLoss):
    """`ELNivMFLoss` with its classes spread over processes; see `ClassParallelLoss`.

    Example:
        >>> loss = ClassParallelELNivMFLoss(100, 16)  # without torch.distributed: one process
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


# The class-parallel form of each loss.
CLASS_PARALLEL: dict[type[ProxyLoss], type[ClassParallelLoss]] = {
    ELNivMFLoss: ClassParallelELNivMFLoss,
    NivMFLoss: ClassParallelNivMFLoss,
    VMFProductKernelLoss: ClassParallelVMFProductKernelLoss,
    KLVMFLoss: ClassParallelKLVMFLoss,
    EuclideanProxyLoss: ClassParallelEuclideanProxyLoss,
    CosineProxyLoss: ClassParallelCosineProxyLoss,
}
