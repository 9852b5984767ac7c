"""Triton kernels, one module per operation. Each imports triton at its top, so import them on first use only."""
