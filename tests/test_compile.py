"""Every kernel compiles for sm_80 (A100) and sm_90 (H100), on any machine. What it computes is tested elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("80", "90")


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench", "--compile", *TARGETS]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {(row["kernel"], row["target"]): row for row in map(json.loads, run.stdout.splitlines())}


def test_every_kernel_compiles(report):
    source = "".join(p.read_text() for p in (Path(__file__).parent.parent / "kernels").glob("*.py"))
    defined = {line.split("(")[0][4:] for line in source.splitlines() if line.startswith("def ") and "_kernel(" in line}
    assert {name.split()[0] for name, _ in report} == defined  # a new kernel must be added to kernels/bench.py
    assert {target for _, target in report} == {80, 90}


@pytest.mark.parametrize("target", [80, 90])
def test_blending_forward_keeps_its_registers(report, target):
    spilled = {name: row["stack"] for (name, t), row in report.items() if t == target and "blend_forward" in name}
    assert spilled == {name: 0 for name in spilled} and len(spilled) == 16


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kernel", ["blend_forward_kernel", "blend_backward_kernel"])
@pytest.mark.parametrize("dtype", ["tf32", "fp16", "bf16", "tf32 factored"])
def test_products_run_on_tensor_cores(report, kernel, dtype, target):
    assert report[f"{kernel} {dtype}", target]["tensor_core"] > 0
    assert report[f"{kernel} ieee", target]["tensor_core"] == 0
