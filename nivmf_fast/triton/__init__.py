"""Triton kernels, and launchers with the arguments and returns of the ops, contiguous."""
