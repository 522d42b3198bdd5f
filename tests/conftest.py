"""Without a GPU the Triton kernels run in Triton's interpreter: chosen before their import."""

import functools
import itertools
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import pytest  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402
from hypothesis import settings  # noqa: E402

# No deadline: the interpreter's time per example varies a hundredfold. Derandomised: a CI that
# fails does so for a reason.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


def rows_of(self, inputs):
    """The rows along the axis of a scan or a reduction, each a tuple of tensors."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    for row in zip(*arrays):
        yield tuple(self.to_tensor(a, x.dtype) for a, x in zip(row, inputs))


def combined(self, before, row):
    out = self.combine_fn.fn(*before, *row)
    return out if isinstance(out, tuple) else (out,)


def scan_by_rows(self, inputs):
    """What the interpreter does element by element, minutes for a test, a row at a time."""
    if inputs[0].handle.data.ndim == 1:
        return generic_scan(self, inputs)
    out = list(itertools.accumulate(rows_of(self, inputs), functools.partial(combined, self)))
    columns = [np.stack([x.handle.data for x in column], self.axis) for column in zip(*out)]
    return [self.to_tensor(column, x.dtype) for column, x in zip(columns, inputs)]


def reduce_by_rows(self, inputs):
    if self.axis is None or inputs[0].handle.data.ndim == 1:
        return generic_reduce(self, inputs)
    out = functools.reduce(functools.partial(combined, self), rows_of(self, inputs))
    columns = [x.handle.data for x in out]
    if self.keep_dims:
        columns = [np.expand_dims(column, self.axis) for column in columns]
    return [self.to_tensor(column, x.dtype) for column, x in zip(columns, inputs)]


generic_scan = interpreter.ScanOps.generic_scan
generic_reduce = interpreter.ReduceOps.generic_reduce
interpreter.ReduceOps.generic_reduce = reduce_by_rows
interpreter.ScanOps.generic_scan = scan_by_rows

# The interpreter replaces triton.language's functions at a launch, and again, at two fifths of all
# its time, in every call of a jitted function inside it. Once a launch is enough.
EVERYWHERE = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
patch_lang = interpreter._patch_lang
interpreter._patch_lang = lambda fn: patch_lang(EVERYWHERE)
interpreter.InterpretedFunction.__call__ = lambda self, *a, **k: self.rewrite()(*a, **k)


@pytest.fixture(autouse=True)
def seeded():
    """Torch's generator starts differently in every process; a failing test must fail again."""
    torch.manual_seed(0)
