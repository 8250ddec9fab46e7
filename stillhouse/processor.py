"""How this project uses a processor: one thread, and its fastest float32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_one_core() -> None:
    """Set PyTorch up for one process per core; call it once, before any work.

    One thread: two in one process are a trap when the other core is busy. And matrix products through oneDNN's kernels
    ("medium"), which use the whole width of any AVX-512 processor (measured: twice as fast as the default on AMD's, and
    as exact). Where the processor multiplies bfloat16 in hardware (AMX), or a GPU TF32, products are rounded to that.
    """
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it, float32 products are float32 on every processor, by the kernels that are fastest for small matrices.

    For networks of a few thousand weights: those of :func:`use_one_core` cost half as much again there (measured on AMD's), and where they round to
    bfloat16 they would spoil second derivatives.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
