"""Triton kernels: tensors in, tensors out. Its modules need triton when imported, so backends import them late."""
