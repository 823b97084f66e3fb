"""Proxy losses whose classes are spread over the processes of a torch.distributed group.

Every process owns a contiguous slice of the proxies, their gradients and their optimiser state. It
calls the loss with its own images and their global labels, and gets the mean loss of all images.
What a step sends depends on the batch, B images of dimension D, and not on the number of classes:

    forward   row counts, grad flags and seeds are exchanged: 4 numbers each;
              directions, norms and labels of all images are gathered: B (D + 3) numbers;
              every process draws the same samples from the shared seed;
              each image's maximum and log sum over a slice, and its own-proxy values: 8 B numbers,
              combined in rank order
    backward  gradients in the images' directions and norms, reduce-scattered: B (D + 1) numbers

All processes must call a loss, and its backward, equally often. Invalid input in one process raises
in all of them. The numbers of images are read on the host, which synchronises a GPU.

The gradients are those of the mean loss. DistributedDataParallel averages the network's over W
processes: with it, multiply the loss's gradient in the embeddings by W (train/ does).
"""

from nivmf_fast.distributed.losses import (
    CLASS_PARALLEL,
    ClassParallelCosineProxyLoss,
    ClassParallelELNivMFLoss,
    ClassParallelEuclideanProxyLoss,
    ClassParallelKLVMFLoss,
    ClassParallelLoss,
    ClassParallelNivMFLoss,
    ClassParallelVMFProductKernelLoss,
)

__all__ = [
    "CLASS_PARALLEL",
    "ClassParallelCosineProxyLoss",
    "ClassParallelELNivMFLoss",
    "ClassParallelEuclideanProxyLoss",
    "ClassParallelKLVMFLoss",
    "ClassParallelLoss",
    "ClassParallelNivMFLoss",
    "ClassParallelVMFProductKernelLoss",
]
