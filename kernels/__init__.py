"""Triton kernels, one launch function to a module."""
