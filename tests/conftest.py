"""Without a GPU the Triton kernels run in Triton's interpreter: chosen before their import."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# No deadline: the interpreter's time per example varies a hundredfold. Derandomised: a CI that
# fails does so for a reason.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def seeded():
    """Torch's generator starts differently in every process; a failing test must fail again."""
    torch.manual_seed(0)
