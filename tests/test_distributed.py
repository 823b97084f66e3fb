"""Classes spread over processes: the same losses, gradients and files as one process has."""

import copy
import math
import os
import re
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import allocated, relative_l2

from nivmf_fast import distributed, losses
from nivmf_fast.distributed import ClassParallelELNivMFLoss

WORLD = 4
KINDS = ["ELNivMFLoss", "NivMFLoss", "VMFProductKernelLoss", "KLVMFLoss", "EuclideanProxyLoss"]
KINDS += ["CosineProxyLoss"]
CUTS = {1: [0, 13], 2: [0, 7, 13], 3: [0, 1, 9, 13], 4: [0, 6, 6, 12, 13]}  # one has no image
D = 16
PATIENCE = timedelta(hours=1)  # a deadlock is a failure, not a wait
MARGIN = 1 << 20  # bytes that a step takes for any number of classes


def pair(kind: str, P: int, dtype: torch.dtype, group: Any, **options: Any) -> tuple[Any, Any]:
    """The loss of one process, and this process's slice of the same."""
    torch.manual_seed(P)
    options = {"temperature": 1.0 if kind.startswith(("VMF", "KL", "Eu")) else 0.05, **options}
    one = getattr(losses, kind)(P, D, **options).to(dtype)
    part = getattr(distributed, f"ClassParallel{kind}")(P, D, group=group, **options).to(dtype)
    part.load_full_state_dict(one.state_dict())
    return one, part


def batch(P: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """13 images of at most 9 classes: the last slices have no positive."""
    g = torch.Generator().manual_seed(1)
    embeddings = 3 * torch.randn(13, D, generator=g, dtype=dtype)
    return embeddings, torch.randint(0, min(P, 9), (13,), generator=g)


def check_equal(group: Any, W: int) -> list[dict[str, Any]]:
    found = []
    rank = dist.get_rank()
    cases = [(k, P, t, {}) for k in KINDS for P in (5, 37) for t in (torch.float32, torch.float64)]
    cases += [("ELNivMFLoss", 37, torch.float64, {"guidance_weight": 0.5})]
    outside = {"temperature_outside": True, "temperature": 5.0}
    cases += [("ELNivMFLoss", P, torch.float64, outside) for P in (5, 37)]
    cases += [("CosineProxyLoss", 37, torch.float32, {"guidance_weight": 0.5})]
    for kind, P, dtype, options in cases:
        one, part = pair(kind, P, dtype, group, **options)
        embeddings, labels = batch(P, dtype)
        whole = embeddings.clone().requires_grad_()
        value = one(whole, labels, seed=7)
        value.backward()
        mine = slice(*CUTS[W][rank : rank + 2])
        own = embeddings[mine].clone().requires_grad_()
        got = part(own, labels[mine], seed=7)
        got.backward()
        errors = {"loss": abs(got.item() - value.item()) / value.item(), "mean": value.item()}
        if len(own):
            errors["embeddings"] = (own.grad - whole.grad[mine]).norm() / whole.grad.norm()
        for name, parameter in part.named_parameters():
            want = whole_grad = getattr(one, name).grad
            if parameter.ndim:
                want = want[part.classes.start : part.classes.stop]
            if want.numel():
                given = parameter.grad[: len(want)] if parameter.ndim else parameter.grad
                errors[name] = (given - want).norm() / whole_grad.norm()
        found.append({"case": f"{kind} P={P} {dtype} {options}", "dtype": dtype, **errors})
    return found


def check_parts_that_learn(group: Any, W: int) -> dict[str, float]:
    """Only the proxies, or only the network's part, learns; five classes leave a process without.

    The process without images is given embeddings without a graph.
    """
    rank, errors = dist.get_rank(group), {}
    for learn_temperature, learns in ((False, "proxies"), (False, "both"), (True, "embeddings")):
        options = {"learn_temperature": learn_temperature, "guidance_weight": 0.1}
        one, part = pair("ELNivMFLoss", 5, torch.float64, group, **options)
        embeddings, labels = batch(5, torch.float64)
        mine = slice(*CUTS[W][rank : rank + 2])
        whole, own = embeddings.clone(), embeddings[mine].clone()
        for loss, given in ((one, whole), (part, own)):
            loss.requires_grad_(learns != "embeddings")
            given.requires_grad_(learns != "proxies" and len(given) > 0)
            with torch.autocast("cpu", torch.bfloat16):  # which is to change nothing
                value = loss(given, labels[mine] if loss is part else labels, seed=7)
            value.backward()
            with torch.no_grad():
                again = loss(given, labels[mine] if loss is part else labels, seed=7)
            errors[f"{learns} {type(loss).__name__} without a graph"] = abs((again - value).item())
        if own.requires_grad:
            errors[f"{learns} embeddings"] = relative_l2(own.grad, whole.grad[mine])
        if learns != "embeddings" and part.classes:
            want = one.proxies.grad[part.classes.start : part.classes.stop]
            errors[f"{learns} proxies"] = relative_l2(part.proxies.grad, want)
    return errors


def check_half(group: Any, W: int) -> dict[str, Any]:
    """Half-precision embeddings in some processes, and a step without any image at all."""
    one, part = pair("ELNivMFLoss", 37, torch.float32, group, guidance_weight=0.1)
    embeddings, labels = batch(37, torch.float32)
    embeddings = embeddings.half().float()
    mine = slice(*CUTS[W][dist.get_rank(group) :][:2])
    own = embeddings[mine].to(torch.float16 if dist.get_rank(group) % 2 else torch.float32)
    value = part(own.requires_grad_(), labels[mine], seed=7)
    value.backward()
    empty = part(own[:0], labels[:0], seed=7)
    empty.backward()
    return {
        "error": abs(value - one(embeddings, labels, seed=7)).item(),
        "dtype": own.grad.dtype == own.dtype,
        "empty": (empty.item(), one(embeddings[:0], labels[:0], seed=7).item()),
    }


def check_refusals(group: Any, W: int) -> list[str]:
    """What every process says when the last one is given what a loss refuses."""
    _, part = pair("ELNivMFLoss", 9, torch.float32, group)
    last = dist.get_rank(group) == W - 1
    embeddings, labels = torch.ones(2, D), torch.tensor([0, 9 if last else 8])
    nan = torch.full((2, D), torch.nan if last else 1.0)
    said = []
    for call in (
        lambda: part(embeddings, labels, seed=1),
        lambda: part(nan, labels.clamp(max=8), seed=1),
        lambda: part(embeddings[0] if last else embeddings, labels.clamp(max=8)),
        lambda: part.warmstart(embeddings, labels),
        lambda: part(embeddings.numpy() if last else embeddings, labels.clamp(max=8), seed=1),
        lambda: part(embeddings, labels.clamp(max=8), seed=1.5 if last else 1),
        lambda: part(embeddings, labels.clamp(max=8), seed=None if last else 1),
    ):
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def check_copy(group: Any, W: int) -> dict[str, bool]:
    torch.manual_seed(3)
    options = {"temperature": 0.003, "n_samples": 2, "sparse_gradients": True}
    part = ClassParallelELNivMFLoss(400, D, group=group, **options)
    copied, other = copy.deepcopy(part), ClassParallelELNivMFLoss(400, D, group=group, **options)
    other.load_state_dict(part.state_dict())
    embeddings, labels = batch(400, torch.float32)
    mine = slice(*CUTS[W][dist.get_rank(group) :][:2])
    for loss in (part, copied, other):
        loss(embeddings[mine], labels[mine], seed=1).backward()
    grads = [loss.proxies.grad for loss in (part, copied, other)]
    return {
        "sparse": all(grad.is_sparse for grad in grads),
        "equal": all(torch.equal(grads[0].to_dense(), grad.to_dense()) for grad in grads),
    }


def check_sparse_adam(group: Any, W: int, folder: str) -> dict[str, Any]:
    """Two optimisers, one of which knows nothing of the temperature; saved, and loaded."""
    embeddings, labels = batch(40, torch.float32)
    mine = slice(*CUTS[W][dist.get_rank(group) :][:2])

    def fresh() -> tuple[Any, Any]:
        torch.manual_seed(5)
        options = {"temperature": 0.003, "n_samples": 2, "sparse_gradients": True}
        part = ClassParallelELNivMFLoss(40, D, group=group, **options)
        return part, torch.optim.SparseAdam([part.proxies, part.concentration], lr=0.1)

    def step(part: Any, optimizer: Any, seed: int) -> None:
        optimizer.zero_grad()
        part(embeddings[mine], labels[mine], seed=seed).backward()
        optimizer.step()

    part, optimizer = fresh()
    for seed in range(3):
        step(part, optimizer, seed)
    start = part.proxies.detach().clone()
    dcp.save(part.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    step(part, optimizer, 3)
    loaded, other = fresh()
    dcp.load(loaded.sharded_state_dict(other), checkpoint_id=folder, process_group=group)
    unmoved = torch.equal(loaded.proxies, start)
    step(loaded, other, 3)
    other.state_dict()  # has no entry of a parameter that it does not train
    return {
        "loaded": unmoved,
        "steps": int(other.state[loaded.proxies]["step"]),
        "equal": torch.equal(loaded.proxies, part.proxies),
    }


def check_start(group: Any, W: int) -> torch.Tensor:
    torch.manual_seed(4)
    part = ClassParallelELNivMFLoss(distributed.losses.SEED_BLOCK + 37, 4, group=group)
    checkpoint = distributed.checkpoint
    block, checkpoint.BLOCK = checkpoint.BLOCK, 1000
    try:
        return part.full_state_dict()["proxies"]
    finally:
        checkpoint.BLOCK = block


def check_warmstart(group: Any, W: int) -> float:
    one, part = pair("ELNivMFLoss", 11, torch.float32, group)
    embeddings, labels = batch(11, torch.float32)
    one.warmstart(embeddings, labels)
    mine = slice(*CUTS[W][dist.get_rank() :][:2])
    part.warmstart(embeddings[mine], labels[mine])
    return relative_l2(part.full_state_dict()["proxies"], one.proxies.detach())


def check_traffic(group: Any, W: int) -> list[int]:
    """Bytes that a step sends at B = 512, D = 512, for two numbers of classes."""
    sent = []
    for P in (40, 4000):
        part = ClassParallelELNivMFLoss(P, 512, group=group, n_samples=1, temperature=1.0)
        part.group.sent = 0
        embeddings = torch.randn(512 // W, 512, requires_grad=True)
        part(embeddings, torch.randint(P, (512 // W,)), seed=3).backward()
        sent.append(part.group.sent)
    return sent


def check_seed(group: Any, W: int) -> float:
    """The loss without a seed: it is the same in all processes, if they draw the same samples."""
    torch.manual_seed(100 + dist.get_rank())
    part = ClassParallelELNivMFLoss(20, D, group=group, temperature=0.1)
    embeddings, labels = batch(20, torch.float32)
    mine = slice(*CUTS[W][dist.get_rank() :][:2])
    return part(embeddings[mine], labels[mine]).item()


def check_subsample(group: Any, W: int) -> dict[str, Any]:
    _, part = pair("EuclideanProxyLoss", 40, torch.float64, group, negative_share=0.2)
    embeddings, labels = batch(40, torch.float64)
    mine = slice(*CUTS[W][dist.get_rank() :][:2])
    part(embeddings[mine], labels[mine], seed=5).backward()
    touched = part.proxies.grad.any(1)
    here = [int(y) for y in labels.unique() if y in part.classes]
    positives = torch.tensor([y - part.classes.start for y in here], dtype=torch.int64)
    negatives = round(0.2 * (len(part.classes) - len(here)))
    return {
        "positives kept": bool(touched[positives].all()),
        "touched": int(touched.sum()),
        "expected": len(here) + negatives,
    }


def check_checkpoint(group: Any, W: int, folder: str) -> float:
    """Saved by all four after two steps; filled by W of them, and the next step's result."""
    embeddings, labels = batch(11, torch.float32)

    def step(part: Any, optimizer: Any) -> None:
        members = part.group.size
        mine = slice(*CUTS[members][dist.get_rank() :][:2])
        optimizer.zero_grad()
        part(embeddings[mine], labels[mine], seed=2).backward()
        optimizer.step()

    torch.manual_seed(0)
    if W == WORLD:
        part = ClassParallelELNivMFLoss(11, D, group=group, temperature=0.1)
        optimizer = torch.optim.Adam(part.param_groups(0.01), lr=0.01)
        step(part, optimizer)
        step(part, optimizer)
        dcp.save(part.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
        step(part, optimizer)
        after = part.full_state_dict()
        if dist.get_rank() == 0:
            torch.save(after, f"{folder}/after.pt")
        return 0.0
    part = ClassParallelELNivMFLoss(11, D, group=group, temperature=3.0)
    optimizer = torch.optim.Adam(part.param_groups(0.01), lr=0.01)
    dcp.load(part.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    if W == 1:  # an ordinary state dict, for the loss of one process
        one = losses.ELNivMFLoss(11, D)
        one.load_state_dict(part.full_state_dict())
        got = part(embeddings, labels, seed=2)
        assert abs(one(embeddings, labels, seed=2) - got) < 1e-6 * abs(got)
    step(part, optimizer)
    after = torch.load(f"{folder}/after.pt")
    state = part.full_state_dict()
    return max(relative_l2(state[name], after[name]) for name in after)


def check_sparse(group: Any, W: int) -> dict[str, Any]:
    """Steps of SGD with dense and with row-sparse gradients, at a low temperature."""
    parts = []
    embeddings, labels = batch(4000, torch.float32)
    mine = slice(*CUTS[W][dist.get_rank() :][:2])
    for sparse in (False, True):
        options = {"sparse_gradients": sparse, "temperature": 0.003, "learn_temperature": False}
        torch.manual_seed(0)
        part = ClassParallelELNivMFLoss(4000, D, n_samples=2, group=group, **options)
        optimizer = torch.optim.SGD(part.param_groups(0.1), lr=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            part(embeddings[mine], labels[mine], seed=seed).backward()
            optimizer.step()
        parts.append(part)
    dense, sparse = parts
    grad = sparse.proxies.grad
    return {
        "equal": all(
            torch.equal(a, b) for a, b in zip(dense.parameters(), sparse.parameters(), strict=True)
        ),
        "rows": grad.coalesce().indices().shape[1] if grad.is_sparse else len(grad),
        "classes": len(sparse.classes),
    }


def check_memory(group: Any, W: int) -> float:
    """Bytes that a first step of Adam at P = 20,000, D = 64 takes, with what it trains."""
    mine = slice(*CUTS[W][dist.get_rank() :][:2])
    embeddings, labels = torch.randn(13, 64)[mine], torch.arange(13)[mine]

    def step() -> None:
        part = ClassParallelELNivMFLoss(20_000, 64, n_samples=2, temperature=1.0, group=group)
        optimizer = torch.optim.Adam(part.param_groups(0.01), lr=0.01, foreach=False)
        part(embeddings, labels, seed=0).backward()
        optimizer.step()

    return allocated(step)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=PATIENCE
    )
    groups = {W: dist.new_group(list(range(W))) for W in range(1, WORLD + 1)}
    found: dict[Any, Any] = {}
    names = ["equal", "parts_that_learn", "half", "refusals", "start", "warmstart", "traffic"]
    for name in [*names, "seed", "subsample", "sparse", "copy", "memory"]:
        for W, group in groups.items():
            if rank < W:
                found[name, W] = globals()[f"check_{name}"](group, W)
    odd = dist.new_group([1, 3])  # whose ranks are not those of the processes
    if rank in (1, 3):
        found["odd", 2] = check_parts_that_learn(odd, 2)
        found["odd", 2] |= check_sparse_adam(odd, 2, f"{folder}/odd")
    dist.barrier()
    for W in (4, 1, 2, 3):
        if rank < W:
            found["checkpoint", W] = check_checkpoint(groups[W], W, f"{folder}/checkpoint")
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def start(function: Any, *arguments: Any, nprocs: int, join: bool = True) -> Any:
    """Processes, forked from one that has imported what takes long and computed nothing."""
    imports = ["pytest", "torch.distributed.checkpoint", "nivmf_fast.distributed"]
    torch.multiprocessing.set_forkserver_preload(imports)
    return torch.multiprocessing.start_processes(
        function, arguments, nprocs, join, start_method="forkserver"
    )


@pytest.fixture(scope="module")
def results():
    """What the checks found, by check, number of processes and rank."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoint").mkdir()
        start(worker, folder, nprocs=WORLD)
        ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]
    keys = {key for found in ranks for key in found}
    return {key: [found[key] for found in ranks if key in found] for key in keys}


@pytest.mark.parametrize("W", range(1, WORLD + 1))
def test_loss_and_every_gradient_are_those_of_one_process(results, W):
    for rank, found in enumerate(results["equal", W]):
        assert len(found) == 4 * len(KINDS) + 4
        for row in found:
            case = row.pop("case"), rank
            bound = 1e-5 if row.pop("dtype") == torch.float32 else 1e-11
            assert row.pop("mean") > 0.1, case
            assert {"loss", "log_temperature"} <= set(row), case
            assert all(error <= bound for error in row.values()), (case, row)


def test_a_part_may_learn_alone_and_without_a_graph_the_loss_is_the_same(results):
    for W in range(1, WORLD + 1):
        for errors in results["parts_that_learn", W]:
            assert errors, W
            assert max(errors.values()) < 1e-11, errors


def test_half_precision_in_some_processes_and_no_image_in_any(results):
    for W in range(1, WORLD + 1):
        for found in results["half", W]:
            assert found["error"] < 1e-5
            assert found["dtype"]
            assert found["empty"][0] == pytest.approx(found["empty"][1], rel=1e-6)


def test_what_one_process_refuses_ends_the_call_in_all(results):
    own = [r"labels must be in 0 .. 8", "embeddings must be finite", "embeddings must have shape"]
    own += [own[0], "embeddings must be a floating tensor", "seed must be an int"]
    for W in range(2, WORLD + 1):
        *others, last = results["refusals", W]
        for message, want in zip(last, own, strict=False):
            assert re.match(want, message), message
        for said in others:
            refusal = f"process {W - 1} rejected its input: see its own message"
            assert said[:6] == [refusal] * 6
        for said in (*others, last):
            seeds = [1] * (W - 1) + [None]
            assert said[6] == f"seed must be the same in all processes; got {seeds} in rank order"


def test_a_copy_is_the_same_loss(results):
    for W in range(1, WORLD + 1):
        assert results["copy", W] == [{"sparse": True, "equal": True}] * W


def test_any_processes_make_a_group_and_sparse_adam_goes_on(results):
    assert len(results["odd", 2]) == 2
    for found in results["odd", 2]:
        assert [found.pop(name) for name in ("loaded", "steps", "equal")] == [True, 4, True]
        assert max(found.values()) < 1e-11, found


def test_the_start_does_not_depend_on_the_number_of_processes(results):
    one = results["start", 1][0]
    deviation = 10 * math.sqrt(2 / (len(one) + 4))
    assert one.std().item() == pytest.approx(deviation, rel=0.02)
    for W in range(1, WORLD + 1):
        assert all(torch.equal(found, one) for found in results["start", W])


def test_warmstart_takes_each_process_s_own_images(results):
    for W in range(1, WORLD + 1):
        assert max(results["warmstart", W]) < 1e-6


def test_what_a_step_sends_does_not_depend_on_the_number_of_classes(results):
    for W in range(2, WORLD + 1):
        for few, many in results["traffic", W]:
            assert few == many
            assert 5e5 < many <= 3e6
    assert results["traffic", 1] == [[0, 0]]


def test_without_a_seed_all_processes_take_the_first_one_s(results):
    for W in range(1, WORLD + 1):
        assert len(set(results["seed", W])) == 1
        assert math.isfinite(results["seed", W][0])


def test_a_share_of_the_negatives_of_each_slice_and_every_positive(results):
    for W in range(1, WORLD + 1):
        for found in results["subsample", W]:
            assert found["positives kept"]
            assert found["touched"] == found["expected"]


def test_a_checkpoint_of_four_processes_goes_on_in_one_two_or_three(results):
    for W in (1, 2, 3):
        assert max(results["checkpoint", W]) < 1e-5


def test_row_sparse_gradients_give_the_dense_steps_of_sgd(results):
    for W in range(1, WORLD + 1):
        assert all(found["equal"] for found in results["sparse", W])
        rows, classes = (
            sum(found[name] for found in results["sparse", W]) for name in ("rows", "classes")
        )
        assert 0 < rows < classes / 2


def test_memory_falls_with_the_number_of_processes(results):
    (one,) = results["memory", 1]
    assert one > 4 * 2 * 20_000 * 64 * 4  # parameters, gradients and moments alone
    for W in range(2, WORLD + 1):
        assert max(results["memory", W]) < 1.05 * one / W + MARGIN


def dying(rank: int, dead: int, world: int, ports: Any, folder: str) -> None:
    torch.set_num_threads(1)
    if ports is None:
        store = dist.FileStore(f"{folder}/store", world)
    else:  # the first process holds the store, at a port that is free
        port = 0 if rank == 0 else ports.get()
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, PATIENCE, wait_for_workers=False)
        for _ in range(world - 1 if rank == 0 else 0):
            ports.put(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    part = ClassParallelELNivMFLoss(9, D, temperature=0.1)
    embeddings, labels = batch(9, torch.float32)
    part(embeddings, labels, seed=0).backward()
    store.set(f"done/{rank}", "yes")
    if rank == dead:
        store.wait([f"done/{other}" for other in range(world)])
        os._exit(1)
    sys.modules[type(part.group).__module__].HEARTBEAT_TIMEOUT = 1.0
    try:
        part(embeddings, labels, seed=1).backward()
    except RuntimeError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize(
    ("dead", "world", "kind"), [(1, 4, "file"), (0, 3, "file"), (0, 4, "tcp")]
)  # of four, one is not connected to the dead one in a ring; 0 holds the tcp store
def test_a_process_that_dies_ends_the_others_with_its_number(dead, world, kind, tmp_path):
    ports = torch.multiprocessing.get_context("forkserver").SimpleQueue() if kind == "tcp" else None
    context = start(dying, dead, world, ports, str(tmp_path), nprocs=world, join=False)
    for process in context.processes:
        process.join()
    named = []
    for rank in {*range(world)} - {dead}:
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "Timed out" not in message  # it ends because the other has, not after a while
        assert f"process {rank} of {world}" in message
        if kind == "tcp":
            assert "because process 0, or the torchrun that holds the store" in message
        else:
            numbers = re.search(r"no answer from process ([\d, ]+)", message)[1]
            named.append(re.findall(r"\d+", numbers))
            assert str(dead) in named[-1]
            assert str(rank) not in named[-1]
    assert kind == "tcp" or [str(dead)] in named  # by one at least, exactly


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, "num_classes must be an int, at least 1"),
        ((8, 1), {}, "embedding_dim"),
        ((8, 8), {"form": "bindev"}, "have the form 'nca'"),
        ((8, 8), {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_options_are_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ClassParallelELNivMFLoss(*arguments, **options)


def test_one_process_without_a_group_is_the_ordinary_loss():
    one, part = pair("ELNivMFLoss", 9, torch.float64, None)
    embeddings, labels = batch(9, torch.float64)
    assert part(embeddings, labels, seed=1).item() == one(embeddings, labels, seed=1).item()
    with pytest.raises(ValueError, match="concentration has 9 rows, but the loss 10 classes"):
        ClassParallelELNivMFLoss(10, D).load_full_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"labels must be in 0 .. 8"):
        part(embeddings, labels + 9)
