"""Saving and loading a loss that holds one slice of the proxies, whole or in parts."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nivmf_fast.distributed.group import BLOCK, _Communicator
from nivmf_fast.proxy_loss import ProxyLoss


class _SlicedLoss(ProxyLoss):
    """A loss that holds one slice of the proxies; how to save and load it."""

    group: _Communicator
    classes: range
    total_classes: int

    def sharded_state_dict(
        self, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Tensor]:
        """Return the loss's state, and the optimiser's, for torch.distributed.checkpoint.

        The entries share memory with the parameters: `save` writes them, and `load` fills them in
        place, with any number of processes.

        Args:
            optimizer: of the loss's parameters; its state of others is left out.

        Returns:
            Tensors by name, DTensors for those that are sliced. Every process must call this.

        Example:
            >>> from nivmf_fast.distributed import ClassParallelELNivMFLoss
            >>> loss = ClassParallelELNivMFLoss(100, 16)
            >>> sorted(loss.sharded_state_dict())
            ['concentration', 'log_temperature', 'proxies']
        """
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            state[name] = self._as_dtensor(tensor) if name in self._sliced() else tensor
        if optimizer is not None:
            _initialise_state(optimizer, list(self.parameters()))
            for name, parameter in self.named_parameters():
                moments = optimizer.state.get(parameter, {})
                for key, value in moments.items():
                    if isinstance(value, int):  # SparseAdam's steps, which `load` could not fill
                        value = moments[key] = torch.tensor(value)
                    if not isinstance(value, Tensor):
                        continue
                    sliced = value.shape == parameter.shape and name in self._sliced()
                    state[f"optimizer.{name}.{key}"] = self._as_dtensor(value) if sliced else value
        return state

    def full_state_dict(self) -> dict[str, Tensor]:
        """Gather the state dict of the equivalent single-process loss, on every process's CPU.

        Every process must call this.
        """
        state = {}
        for name, tensor in self.state_dict().items():
            if name in self._sliced():
                tensor = self._gathered(tensor[: len(self.classes)])
            state[name] = tensor.cpu()
        return state

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load this process's slice of a state dict of the equivalent single-process loss.

        Raises:
            ValueError: another number of classes.
        """
        local = dict(state)
        for name in sorted(self._sliced() & set(state)):
            if len(state[name]) != self.total_classes:
                raise ValueError(
                    f"{name} has {len(state[name])} rows, but the loss {self.total_classes} classes"
                )
            rows = state[name][self.classes.start : self.classes.stop]
            local[name] = rows if self.classes else getattr(self, name).detach()
        self.load_state_dict(local)

    def _sliced(self) -> set[str]:
        return {"proxies"} if self.concentration is None else {"proxies", "concentration"}

    def _gathered(self, rows: Tensor) -> Tensor:
        """Gather the rows of all slices on the CPU, in blocks, as a GPU may not hold them all."""
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

    def _as_dtensor(self, rows: Tensor) -> Tensor:
        """Wrap this process's rows as a shard of the whole, for torch.distributed.checkpoint."""
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


def _initialise_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Create the state of parameters not stepped yet, for a checkpoint to fill.

    Takes a step with gradients of zero, and restores values and gradients afterwards.
    """
    every = [p for group in optimizer.param_groups for p in group["params"]]
    new = {p for p in parameters if p.requires_grad and p not in optimizer.state} & set(every)
    if not new:
        return
    sparse = isinstance(optimizer, torch.optim.SparseAdam)  # which takes only sparse gradients
    layout = torch.sparse_coo if sparse else torch.strided
    originals = [(p, p.grad, p.detach().clone() if p in new else None) for p in every]
    for parameter, _, value in originals:
        parameter.grad = None if value is None else torch.zeros_like(parameter, layout=layout)
    optimizer.step()
    for parameter, grad, value in originals:
        parameter.grad = grad
        if value is not None:
            with torch.no_grad():
                parameter.copy_(value)
