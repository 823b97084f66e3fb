"""Proxy losses whose classes are spread over the processes of a torch.distributed group.

Every process owns a contiguous slice of the proxies, with their gradients and optimiser state. It
calls the loss with its own images and their global labels, and gets the mean loss of all images.
The traffic of a step depends on the batch, B images of dimension D, not on the number of classes:

    forward   exchange row counts, grad flags and seeds: 4 numbers each;
              gather directions, norms and labels of all images: B (D + 3) numbers;
              draw the same samples in every process, from the shared seed;
              combine, in rank order, each image's maximum and log sum over the slices and over its
              own proxy: 8 B numbers
    backward  reduce-scatter gradients in the images' directions and norms: B (D + 1) numbers

All processes must call a loss, and its backward, equally often. Invalid input in one process raises
in all of them. The numbers of images are read on the host, which synchronises a GPU.

The gradients are those of the mean loss. DistributedDataParallel averages the network's gradients
over W processes: with it, multiply the loss's gradient in the embeddings by W (train/ does so).
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
