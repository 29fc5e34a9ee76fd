"""Triton kernels, installed as `specdec_fast.triton_kernels`; importing this needs no Triton."""
