"""Where Triton kernels can be tested: on a GPU, or by Triton's interpreter, TRITON_INTERPRET=1 on a
machine with triton."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED), reason="wants a CUDA device"
    ),
]
