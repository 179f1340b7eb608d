"""Triton kernels, one package per op with one launch function each."""
