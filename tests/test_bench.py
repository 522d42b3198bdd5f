"""kernels.bench: every kernel compiles for sm_80 (A100) and sm_90 (H100), on any machine.

The bench's own arithmetic is right. What kernels compute is tested elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from kernels import bench, rasterize

TARGETS = ("80", "90")
# 3.6 compiles the same kernels, to up to twice the instructions, and spills a few registers
counted = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="counted with Triton 3.9"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What all kernels compile to, both targets at once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench", "--compile"]
    about = dict(env=environment, cwd=Path(__file__).parent.parent, text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    outs = {target: tmp_path_factory.mktemp("bench") / f"{target}.json" for target in TARGETS}
    runs = {target: subprocess.Popen([*command, target, "--out", out], **about, **pipes)
            for target, out in outs.items()}  # fmt: skip
    rows = {}
    for target, run in runs.items():
        printed, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        report = json.loads(outs[target].read_text())
        assert target != "90" or printed.splitlines()[-1] == report["slots"]
        rows |= {(row["kernel"], row["target"]): row for row in report["compiled"]}
    return rows


def test_every_kernel_compiles(report):
    source = "".join(p.read_text() for p in (Path(__file__).parent.parent / "kernels").glob("*.py"))
    definitions = [line for line in source.splitlines() if line.startswith("def ")]
    defined = {line.split("(")[0][4:] for line in definitions if "_kernel(" in line}
    # A new kernel must be added to kernels/aot.py
    assert {name.split()[0] for name, _ in report} == defined
    assert {target for _, target in report} == {80, 90}


@counted
@pytest.mark.parametrize("target", [80, 90])
def test_blending_forward_keeps_its_registers(report, target):
    rows = {name: row for (name, t), row in report.items() if t == target}
    spilled = {name: row["stack"] for name, row in rows.items() if "_forward_kernel" in name}
    assert len(spilled) == 1 + 5 * 8
    for name, size in spilled.items():  # the stores of parts, once a tile, may spill a little
        assert size <= (48 if "parts" in name else 0), name


@counted
@pytest.mark.parametrize("kernel,most", [
    ("blend_forward_kernel bf16", 40), ("blend_forward_kernel tf32", 60),
    ("mixture_forward_kernel bf16", 40), ("blend_forward_kernel tf32, C = 3", 28),
    ("blend_backward_kernel tf32", 175), ("blend_backward_kernel bf16", 108),
    ("mixture_backward_kernel bf16", 95), ("blend_backward_kernel tf32, C = 3", 80),
])  # fmt: skip
def test_instructions_do_not_grow(report, kernel, most):
    """Issue slots per (pixel, Gaussian) on sm_90: README's, with a little room."""
    assert 10 < report[kernel, 90]["slots"] <= most


@counted
def test_the_a100s_backward_spills_little(report):
    """In TF32 64 channels at once would spill 2 KB."""
    row = report["blend_backward_kernel tf32", 80]
    assert row["stack"] <= 256 and row["slots"] <= 330


@counted
def test_v_out_is_held_where_two_programs_fit(report):
    """Of 228 KB of shared memory on sm_90, 1 KB is the system's per program."""
    assert report["blend_backward_kernel bf16", 90]["shared"] <= 228 * 1024 / 2 - 1024


@counted
def test_384_channels_cost_hardly_more_than_3(report):
    wide, narrow = (report[f"blend_forward_kernel {k}", 90] for k in ("bf16", "bf16, C = 3"))
    assert wide["slots"] / narrow["slots"] <= 1.6


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kernel", ["blend", "mixture"])
@pytest.mark.parametrize("dtype", ["tf32", "tf32x3", "fp16", "bf16"])
def test_products_run_on_tensor_cores(report, kernel, dtype, target):
    assert report[f"{kernel}_forward_kernel {dtype}", target]["tensor_core"] > 0
    assert report[f"{kernel}_backward_kernel {dtype}", target]["tensor_core"] > 0
    assert report[f"{kernel}_forward_kernel ieee", target]["tensor_core"] == 0


# --------------------------------------------------------------------------- the bench itself


@pytest.mark.parametrize("mixed", [False, True])
def test_passes_of_three_channels_are_one_pass(mixed):
    scene, width, height = bench.pixel_aligned(2, 28, 42)
    means, covars, opacities, viewmats, Ks = scene
    features = bench.mixture(2, 2, 7, height, width) if mixed else torch.randn(*means.shape[:2], 7)
    scene = means, covars, opacities, features, viewmats, Ks, width, height
    for a, b in zip(bench.in_threes(*scene), rasterize(*scene)):
        torch.testing.assert_close(a, b)


def test_what_a_gaussian_on_four_tiles_demands():
    size, C = 16, 10  # four tiles of 8 x 8
    eye = torch.eye(4)[None, None]
    K = torch.tensor([[[[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]]])
    means = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])  # the second is behind the camera
    scene = means, 0.01 * torch.eye(3).expand(1, 2, 3, 3), torch.ones(1, 2), eye, K
    values = 3 + 9 + 1 + C + 16 + 9 + size * size * (C + 1)
    assert bench.demand(scene, C, size, size) == (4 * values, 2 * 4 * 64 * C)
    memory, products = bench.RATES["H100"]
    needed = bench.floor((memory, 2 * products), "NVIDIA H100 80GB HBM3")
    assert needed == {"bytes": 1, "products": 2}
    assert bench.floor((1, 1), "a card not known") is None


def test_predictions_are_the_model():
    """Halved slots halve what instructions bound; a mixture's time does not see the features."""
    rows = [dict(kernel=kernel, target=target, slots=400.0)
            for kernel, *_ in bench.SUMMARY.values() for target in (80, 90)]  # fmt: skip
    lines, last = bench.slots_report(rows)
    assert last.startswith("slots per (pixel, Gaussian), C = 384, sm_90: dense bf16 400.0")
    by = {(row["predicted"], row["card"]): row["blending"] for row in lines}
    instructions = 0.93 * 2.27e6 * 64 * 400 / 32
    assert by["mixture bf16", "H100"] == pytest.approx(
        1e3 * instructions / (0.65 * 132 * 4 * 1.755e9), abs=0.01
    )
    assert bench.predicted("dense tf32", 1.0, "H100")["blending"] > 0.4  # memory bounds it
    assert all(row["call"] > row["blending"] for row in lines)
    measured, report = dict(workload="paper", C=3, way="ours"), dict(predicted=lines)
    expected = next(row for row in lines if (row["predicted"], row["card"]) == ("C = 3", "A100"))
    assert bench.prediction(measured, report, "A100") == f"{expected['call']} ms"
    assert bench.prediction(measured | dict(way="torch"), report, "A100") is None
    assert bench.prediction(measured, report, None) is None


def test_errors_leave_out_pixels_where_rounding_decided():
    exact = torch.tensor([[[4.0, 1.0], [2.0, 2.0]]], dtype=torch.float64)
    single = exact + torch.tensor([[[0.0, 1e-5], [1.0, 0.0]]])  # the second was decided otherwise
    out = exact + torch.tensor([[[0.0, -0.02], [0.5, 0.0]]])
    assert bench.errors(out, single, exact) == pytest.approx(0.005)


def test_aims_are_ratios_of_what_was_measured():
    def row(way, forward, both, C=384, **rest):
        times = dict(forward=(forward, 0.0), both=(both, 0.0))
        return dict(workload="paper", C=C, way=way, **times, **rest)

    rows = [
        row("ours", 2.0, 8.0, memory=30, inputs=100, output=50, error=1e-3),
        row("ours", 1.0, 4.0, C=3),
        row("gsplat, 32 channels a pass", 24.0, 56.0),
        row("gsplat, 128 channels a pass", 26.0, 50.0),
        row("three channels at a time", 120.0, 500.0),
        row("ours, factored", 1.0, 3.0, memory=10, inputs=3, output=50),
        dict(workload="demo", C=384, way="torch", failed="out of memory"),
    ]
    found = [value for _, _, value in bench.aims(rows)]
    assert found == pytest.approx([12, 7, 60, 2, 0.2, 0.1, 1e-3, None])
    assert {value for _, _, value in bench.aims([])} == {None}
