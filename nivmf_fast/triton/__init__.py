"""Triton kernels. Each module's functions take and return what the op contract says, contiguous."""
