"""Train with 100,000 synthetic classes spread over processes, and keep a checkpoint.

    torchrun --nproc-per-node=2 examples/class_parallel.py --folder /tmp/classes

(`python` instead of torchrun runs one process.) Every process has its own images, and its own slice
of the classes with their gradients and moments. A second call, with any number of processes,
resumes from the checkpoint; to keep this short, the network's moments are not in it. Prints, up to
rounding and the machine's memory use:

    step 1: loss 12.315, 18,980 bytes sent by this process
    step 6: loss 0.196, 18,980 bytes sent by this process
    step 11: loss 0.003, 18,980 bytes sent by this process
    process 0 of 2: 50,000 classes, at most 424 MB
    process 1 of 2: 50,000 classes, at most 437 MB
"""

import argparse
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from nivmf_fast.distributed import ClassParallelELNivMFLoss

parser = argparse.ArgumentParser()
parser.add_argument("--classes", type=int, default=100_000)
parser.add_argument("--steps", type=int, default=11)
parser.add_argument("--folder", type=Path, help="where to keep a checkpoint (default: none)")
options = parser.parse_args()
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
if cuda:
    torch.cuda.set_device(device)
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("nccl" if cuda else "gloo")
several = dist.is_initialized()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # torch itself
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

D, B = 64, 64 // size  # images of each process
torch.manual_seed(0)
model = torch.nn.Linear(D, D).to(device)
network = DistributedDataParallel(model) if several else model
loss = ClassParallelELNivMFLoss(options.classes, D, n_samples=2, temperature=1.0).to(device)
groups = [{"params": model.parameters()}, *loss.param_groups(lr=0.1, concentration_lr_mult=5)]
optimiser = torch.optim.Adam(groups, lr=1e-3)
done = torch.tensor(0)  # steps of all calls so far
state = {"done": done, "model": model.state_dict(), "loss": loss.sharded_state_dict(optimiser)}
if options.folder and options.folder.exists():
    dcp.load(state, checkpoint_id=options.folder, no_dist=not several)

for step in range(int(done), int(done) + options.steps):
    labels = torch.arange(rank * B, (rank + 1) * B) * 1543 % options.classes
    centres = [torch.randn(D, generator=torch.Generator().manual_seed(int(y))) for y in labels]
    images = 200 * normalize(torch.stack(centres) + 0.1 * torch.randn(B, D), dim=1).to(device)
    loss.group.sent = 0
    embeddings = network(images)
    # the loss is the mean over all images, and DistributedDataParallel averages once more
    embeddings.register_hook(lambda gradient: gradient * size)
    value = loss(embeddings, labels.to(device), seed=step)
    optimiser.zero_grad()
    value.backward()
    optimiser.step()
    done += 1
    if rank == 0 and step % 5 == 0:
        print(f"step {step + 1}: loss {value:.3f}, {loss.group.sent:,} bytes sent by this process")
if options.folder:
    dcp.save(state, checkpoint_id=options.folder, no_dist=not several)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else grown
print(f"process {rank} of {size}: {len(loss.classes):,} classes, at most {peak:,.0f} MB")
if several:  # whatever holds the group goes first: its threads must not outlive the interpreter
    del network, loss, optimiser, state
    dist.destroy_process_group()
