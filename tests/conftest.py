"""Without a GPU the Triton kernels run in Triton's interpreter: chosen before their import."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import pytest  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402
from hypothesis import settings  # noqa: E402

# No deadline: the interpreter's time per example varies a hundredfold. Derandomised: a CI that
# fails does so for a reason.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


def scan_by_rows(self, inputs):
    """What the interpreter does element by element, minutes for a test, a row along the axis at a
    time: scans of one's own combine function."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    out = [np.empty_like(a) for a in arrays]
    for i in range(len(arrays[0])):
        row = [self.to_tensor(a[i], x.dtype) for a, x in zip(arrays, inputs)]
        if i:
            before = [self.to_tensor(o[i - 1], x.dtype) for o, x in zip(out, inputs)]
            row = self.combine_fn.fn(*before, *row)
        for o, r in zip(out, row):
            o[i] = r.handle.data
    out = [np.moveaxis(o, 0, self.axis).copy() for o in out]
    return [self.to_tensor(o, x.dtype) for o, x in zip(out, inputs)]


interpreter.ScanOps.generic_scan = scan_by_rows


@pytest.fixture(autouse=True)
def seeded():
    """Torch's generator starts differently in every process; a failing test must fail again."""
    torch.manual_seed(0)
