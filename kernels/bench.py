"""Speed, memory and error of the rasteriser and of its alternatives: python -m kernels.bench

On a GPU, for every workload: forward and forward + backward (median and spread), peak memory beyond
inputs and output, error, and ratios to gsplat (if installed), to three channels at a time (as the
paper's code does) and to the torch backend. Without a GPU: the torch backend on small sizes, the
least a GPU would need, and what the compiler makes of the kernels. Everything is written to
bench.json, or --out FILE, as it is measured.

    paper   2 x 576 x 880 pixel-aligned Gaussians, C = 384 and 768, one target of 576 x 880
    demo    2 x 224 x 224, C = 384, one target of 224 x 224
    scene   gsplat's garden of 138,766 points, 3 views of 648 x 420, C = 3, 32, 384 (--garden FILE,
            or ../shared/data/garden.npz), else one made up to its depths, sizes and share in view
    batch   8 scenes of the demo in one call
"""

import argparse
import json
import math
import sys
from datetime import date
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import kernels

from . import TILE, Mixture, interpreted, rasterize, torch_backend
from .aot import compile_report
from .tiles import sort_ranges

# For `floor`: peak bytes/s of memory, peak float operations/s of TF32 products
RATES = {"H100": (3.35e12, 495e12), "H200": (4.8e12, 495e12), "A100": (1.55e12, 156e12)}
# For `predicted`: warp instructions/s (65 % of four schedulers per multiprocessor), bytes/s of L2
# and of memory as reached in practice; and the compute capability
CARDS = {"H100": (0.65 * 132 * 4 * 1.755e9, 5.5e12, 3.0e12, 90),
         "H200": (0.65 * 132 * 4 * 1.755e9, 5.5e12, 4.3e12, 90),
         "A100": (0.65 * 108 * 4 * 1.41e9, 4.0e12, 1.3e12, 80)}  # fmt: skip
# The paper's workload: Gaussians in view, their pairs with tiles, the share of a tile's list that
# is walked before every pixel is opaque, and pixels
IN_VIEW, PAIRS, WALKED, PIXELS = 0.993e6, 2.27e6, 0.93, 576 * 880
SORT, LAUNCHES = 6300, 13  # warp instructions to sort a tile; device operations of a call
SUMMARY = {  # predicted: (kernel, C, way), as in the row of `run` that measures it
    "dense bf16": ("blend_forward_kernel bf16", 384, None),
    "dense tf32": ("blend_forward_kernel tf32", 384, "ours"),
    "mixture bf16": ("mixture_forward_kernel bf16", 384, "ours, factored, bf16"),
    "C = 3": ("blend_forward_kernel tf32, C = 3", 3, "ours"),
}
VERSIONS = {package.name: package.version for package in distributions()}


def pixel_aligned(B, height, width, views=2):
    """Scenes as in distillation: a Gaussian half a pixel wide for each pixel of `views` photos of
    a bumpy wall 3 m ahead. Returns (means, covars, opacities, viewmats, Ks), width, height."""
    f = 0.8 * height
    x, y = (torch.arange(size) + 0.5 - size / 2 for size in (width, height))
    bumps = torch.rand(views * B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z = 3 + F.interpolate(bumps, (height, width), mode="bicubic").view(views, B, height, width)
    centre = 0.3 * (torch.arange(views) - (views - 1) / 2).view(views, 1, 1, 1)
    means = torch.stack([x / f * z + centre, y[:, None] / f * z, z], -1)
    means = means.transpose(0, 1).flatten(1, 3)  # [B, views * height * width, 3]
    covars = torch.eye(3) * (0.5 * means[..., 2] / f)[..., None, None] ** 2
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]]).expand(B, 1, 3, 3)
    scene = means, covars, torch.ones(means.shape[:2]), torch.eye(4).expand(B, 1, 4, 4), K
    return [t.contiguous() for t in scene], width, height


def garden(path):
    """As `pixel_aligned`: a capture's points as round Gaussians; without a path, a random disc."""
    if path:
        try:
            file = np.load(path, allow_pickle=False)
            names = "means3d", "viewmats", "Ks"
            means, viewmats, Ks = (torch.from_numpy(file[k]).float() for k in names)
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"{path}: no garden with means3d, viewmats and Ks ({error})") from None
    else:
        g, N = torch.Generator().manual_seed(0), 138_766
        radius = 0.25 + 3.1 * torch.rand(N, generator=g) ** 1.6
        angle = 2 * math.pi * torch.rand(N, generator=g)
        height = 0.3 * torch.randn(N, generator=g)
        means = torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)
        c, s = math.cos(0.3), math.sin(0.3)  # the cameras look down
        view = [[1, 0, 0, 0], [0, -s, -c, 0.2], [0, c, -s, 1.2], [0, 0, 0, 1]]
        viewmats = torch.tensor([view] * 3, dtype=torch.float32)
        viewmats[:, 0, 3] = torch.tensor([-0.1, 0.0, 0.1])
        Ks = torch.tensor([[480.0, 0, 324], [0, 480, 210], [0, 0, 1]]).expand(3, 3, 3)
    covars = torch.eye(3) * (0.005 * means.norm(dim=-1).clamp(min=0.2))[:, None, None] ** 2
    scene = means, covars, torch.full(means.shape[:1], 0.8), viewmats, Ks
    return [t[None].contiguous() for t in scene], 648, 420


def mixture(B, views, C, height, width):
    """Random tokens of patches; a pixel mixes its patch and those to the right and below."""
    h, w, g = height // 14, width // 14, torch.Generator().manual_seed(0)
    y, x = ((torch.arange(size) // 14).clamp(max=size // 14 - 2) for size in (height, width))
    patch = (y[:, None] * w + x).view(1, -1, 1) + h * w * torch.arange(views).view(-1, 1, 1)
    indices = patch.view(-1, 1) + torch.tensor([0, 1, w, w + 1])  # [views * height * width, 4]
    weights = torch.rand(B, len(indices), 4, generator=g)
    tokens = torch.randn(B, views * h * w, C, generator=g)
    return Mixture(tokens, indices.repeat(B, 1, 1), weights / weights.sum(-1, keepdim=True))


def workloads(full, garden_scene):
    """[(name, C, scene, width, height)]; not full: only those that take a CPU seconds."""
    demo = pixel_aligned(1, 224, 224)
    if not full:
        return [("demo", C, *demo) for C in (3, 32, 384)]
    paper = pixel_aligned(1, 576, 880)
    return [
        *(("paper", C, *paper) for C in (384, 768, 3)),
        *(("demo", C, *demo) for C in (384, 3)),
        *(("scene", C, *garden_scene) for C in (3, 32, 384)),
        ("batch", 384, *pixel_aligned(8, 224, 224)),
    ]


def in_threes(means, covars, opacities, features, *rest):
    """`rasterize`, three channels per pass; only the first pass checks its arguments."""
    tokens, *factors = features if isinstance(features, Mixture) else (features,)
    first, *others = (Mixture(t, *factors) if factors else t for t in tokens.split(3, -1))
    passes = [rasterize(means, covars, opacities, first, *rest)]
    with mock.patch.object(kernels, "_check"):
        passes += [rasterize(means, covars, opacities, part, *rest) for part in others]
    return torch.cat([out for out, _ in passes], -1), passes[0][1]


def gsplat(means, covars, opacities, *rest, channels):
    from gsplat import rasterization

    options = dict(covars=covars, packed=False, channel_chunk=channels)
    return rasterization(means, None, None, opacities, *rest, **options)


def ways(device, C):
    """{name: function with the arguments of rasterize}, ours first."""
    if device == "cpu":
        return {"torch": partial(rasterize, backend="torch")}
    found = {f"ours, {p}": partial(rasterize, precision=p) for p in ("tf32x3", "ieee")}
    found = {"ours": rasterize, "torch": partial(rasterize, backend="torch")} | found
    if C > 3:
        found["three channels at a time"] = in_threes
    for channels in (32, 128) if "gsplat" in VERSIONS else ():
        found[f"gsplat, {channels} channels a pass"] = partial(gsplat, channels=channels)
    return found


def clock(run):
    """Median and interquartile range of seconds per call, over 5 s or one call."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    taken = timer.blocked_autorange(min_run_time=5)
    return taken.median, taken.iqr


def measure(way, scene, features, *size):
    """{"forward", "both": (median, spread) seconds without and with backward, "inputs", "output":
    bytes, "memory": peak bytes of the forward pass beyond these, None without a GPU}."""
    tokens, *factors = features if isinstance(features, Mixture) else (features,)

    def forward(means, covars, opacities, tokens):
        features = Mixture(tokens, *factors) if factors else tokens
        return way(means, covars, opacities, features, *scene[3:], *size)[0]

    inputs, memory = [*scene[:3], tokens], None
    with torch.no_grad():
        taken = clock(lambda: forward(*inputs))
        if tokens.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        out = forward(*inputs)
        if tokens.is_cuda:
            memory = torch.cuda.max_memory_allocated() - before - out.nbytes
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    v_out = torch.ones_like(out)
    both = clock(lambda: torch.autograd.grad(forward(*inputs), inputs, v_out))
    given = sum(t.nbytes for t in (*scene, tokens, *factors))
    return dict(forward=taken, both=both, inputs=given, output=out.nbytes, memory=memory)


def demand(scene, C, width, height):
    """Least bytes and float operations of a forward pass: Gaussians in view are read once, images
    written once, and each tile multiplied with the Gaussians whose boxes reach it."""
    means, covars, opacities, viewmats, Ks = scene
    means2d, _, covars2d, _, visible = torch_backend.project(
        means, covars, viewmats, Ks, width, height, near_plane=0.01, far_plane=1e10, eps2d=0.3
    )
    radii = torch_backend.image_radii(covars2d, opacities, visible)
    tiles = (means2d.new_tensor([width, height]) / TILE).ceil().view(2, 1, 1, 1)
    low = torch.minimum(((means2d - radii) / TILE).floor().clamp(min=0), tiles)
    high = torch.minimum(((means2d + radii) / TILE).ceil().clamp(min=0), tiles)
    pairs = (high - low).clamp(min=0).prod(0) * (radii[0] >= 0)  # [B, V, N]
    read = int(pairs.any(1).sum()) * (3 + 9 + 1 + C) + viewmats.numel() + Ks.numel()
    written = math.prod(viewmats.shape[:2]) * width * height * (C + 1)
    return 4 * (read + written), 2 * float(pairs.double().sum()) * TILE * TILE * C


def floor(demanded, device_name):
    """Least seconds {"bytes", "products"} of a device for a `demand`; None: no RATES for it."""
    rates = next((rates for name, rates in RATES.items() if name in device_name), None)
    return rates and {k: n / rate for k, n, rate in zip(("bytes", "products"), demanded, rates)}


def errors(out, single, exact):
    """Largest difference from float64, relative to its largest value. Leaves out pixels where the
    torch backend's float32 is off by 1e-4: rounding changed a decision (skip, stop, order)."""
    scale = exact.abs().max()
    agree = (single - exact).abs().amax(-1) < 1e-4 * scale
    return float((out - exact)[agree].abs().max() / scale)


def run(device, garden_scene, device_name):
    """Yield a row for every workload and way. One that fails has "failed", the message."""
    for name, C, scene, *size in workloads(device == "cuda", garden_scene):
        scene = [t.to(device) for t in scene]
        B, N = scene[2].shape
        features = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).to(device)
        todo = [(label, way, features) for label, way in ways(device, C).items()]
        if device == "cuda" and C > 3 and name != "scene":
            mixed = mixture(B, N // math.prod(size), C, *size[::-1])
            mixed = Mixture(*(t.to(device) for t in mixed))
            half = mixed._replace(tokens=mixed.tokens.bfloat16())  # as in training
            todo += ("ours, factored", rasterize, mixed), ("ours, factored, bf16", rasterize, half)
        first = references = None
        for label, way, given in todo:
            row = dict(workload=name, C=C, N=N, way=label)
            try:
                row |= measure(way, scene, given, *size)
                first = first or row
                row["ratio"] = [row[k][0] / first[k][0] for k in ("forward", "both")]
                if label == "ours":
                    row["floor"] = floor(demand(scene, C, *size), device_name)
                if label in ("ours", "ours, tf32x3", "ours, ieee") and N < 200_000:
                    arguments = *scene[:3], given, *scene[3:]
                    references = references or [
                        rasterize(*(t.to(d) for t in arguments), *size, backend="torch")[0].double()
                        for d in (torch.float32, torch.float64)
                    ]
                    row["error"] = errors(way(*arguments, *size)[0].double(), *references)
            except (RuntimeError, ValueError, ImportError, TypeError) as error:
                row["failed"] = (str(error).splitlines() or [type(error).__name__])[0]
            yield row
    if device == "cuda":
        yield from sorting(device)


def sorting(device):
    """Our sort of tile lists, and torch.sort of the same keys with the tile in the upper bits."""
    lists = (8000, 64), (8000, 500), (800, 5000), (8, 500_000)
    shapes = {f"{n} lists of {length}": [length] * n for n, length in lists}
    shapes["7999 lists of 200 and one of 1000000"] = [200] * 7999 + [1_000_000]
    for what, shape in shapes.items():
        lengths = torch.tensor(shape, device=device)
        offsets, tile = F.pad(lengths.cumsum(0), (1, 0)), torch.repeat_interleave(lengths)
        keys = torch.randperm(len(tile), device=device)
        ours = clock(lambda: sort_ranges(keys.clone(), offsets, max(shape)))
        library = clock(lambda: torch.sort((tile << 32) | keys))
        yield dict(workload=f"sort {what}", ours=ours, torch_sort=library)


def predicted(name, slots, card):
    """Milliseconds of one of SUMMARY on the paper's workload, by a model never checked on a GPU
    (+-40 %): {"blending": the largest of issue, L2 and memory time, "call": everything}."""
    issue, L2, memory, _ = CARDS[card]
    C, size = SUMMARY[name][1], 2 if "bf16" in name else 4
    row = 32 + (32 if "mixture" in name else C * size)  # bytes that blending reads per Gaussian
    times = (
        WALKED * PAIRS * TILE * TILE * slots / 32 / issue, WALKED * PAIRS * row / L2,
        (IN_VIEW * row + PIXELS * (C * size + 4)) / memory,
    )  # fmt: skip
    projection = 2 * PIXELS * (13 + 11) * 4 / memory
    lists = PAIRS * 4 * 8 / memory + PIXELS / TILE**2 * SORT / issue
    call = max(times) + projection + lists + LAUNCHES * 4e-6  # seconds a launch
    return {"blending": round(1e3 * max(times), 2), "call": round(1e3 * call, 2)}


def prediction(row, report, card):
    """The milliseconds predicted for what a row measured on a card, as text, or None."""
    what = tuple(row.get(k) for k in ("workload", "C", "way"))
    for guess in report.get("predicted", ()):
        if guess["card"] == card and what == ("paper", *SUMMARY[guess["predicted"]][1:]):
            return f"{guess['call']} ms"


def slots_report(rows):
    """Predictions [{"predicted": name, "card", ...}] from a compile report, and its last line."""
    slots = {(row["kernel"], row["target"]): row.get("slots") for row in rows}
    lines = [
        dict(predicted=name, card=card, **predicted(name, slots[kernel, target], card))
        for card, (*_, target) in CARDS.items()
        for name, (kernel, *_) in SUMMARY.items() if (kernel, target) in slots
    ]  # fmt: skip
    text = ", ".join(f"{name} {slots.get((kernel, 90))}" for name, (kernel, *_) in SUMMARY.items())
    return lines, f"slots per (pixel, Gaussian), C = 384, sm_90: {text}"


def row_text(row):
    """A row on one line: tuples are median and spread of seconds, dicts seconds, lists ratios."""

    def word(value):
        if isinstance(value, tuple):
            return f"{1e3 * value[0]:.2f} +- {1e3 * value[1]:.2f} ms"
        if isinstance(value, dict):
            return ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in value.items())
        if isinstance(value, list):
            return ", ".join(f"x {v:.1f}" for v in value)
        return f"{value:.2g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{k} {word(v):<6}" for k, v in row.items() if v is not None)


def aims(rows):
    """The project's aims: [(what, aim, found)]; found is None where nothing measured it."""
    row = {(r["workload"], r["C"], r["way"]): r for r in rows if "forward" in r}

    def get(what, way="ours", C=384, workload="paper"):
        found = row.get((workload, C, way), {}).get(what)
        return math.nan if found is None else np.ravel(found)[0]  # of times the median

    gsplats = [way for name, C, way in row if (name, C, way[:6]) == ("paper", 384, "gsplat")]
    best = min(gsplats, key=lambda way: get("forward", way), default=None)
    forward, inputs, memory = get("forward"), get("inputs"), get("memory")
    factored = get("memory", "ours, factored") + get("inputs", "ours, factored")
    errors = [r["error"] for r in rows if r.get("way") == "ours" and "error" in r]
    table = [
        ("paper, C = 384, forward: gsplat / ours", ">= 10", get("forward", best) / forward),
        ("the same with backward", ">= 5", get("both", best) / get("both")),
        ("three channels at a time / ours, forward", ">= 50",
         get("forward", "three channels at a time") / forward),
        ("ours, C = 384 / C = 3, forward", "<= 1.5", forward / get("forward", C=3)),
        ("peak memory beyond inputs and output / these, forward", "<= 0.25",
         memory / (inputs + get("output"))),
        ("factored / dense, memory of the forward pass but for the output", "<= 0.2",
         factored / (memory + inputs)),
        ("error of TF32 against float64, relative", "<= 7e-4", max(errors, default=math.nan)),
        ("CPU: 100,352 Gaussians, 224 x 224, C = 384, forward, seconds", "<= 1",
         get("forward", "torch", workload="demo")),
    ]  # fmt: skip
    return [(what, aim, None if math.isnan(found) else found) for what, aim, found in table]


def report_compiled(targets, report, show):
    """Fill in "compiled", "predicted" and "slots"; show(row) prints a row as it is made."""
    report["compiled"] = []
    for row in compile_report(targets):
        report["compiled"].append(row)
        show(row)
    report["predicted"], report["slots"] = slots_report(report["compiled"])
    for row in report["predicted"]:
        show(row)
    print(report["slots"])


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--garden", metavar="FILE", help="the garden's points and cameras (.npz)")
    add("--out", default="bench.json", type=Path, metavar="FILE", help="to write everything to")
    add("--compile", nargs="+", type=int, metavar="SM", help="only the compile report")
    given = parser.parse_args()
    if interpreted():
        raise SystemExit("TRITON_INTERPRET is set: the interpreter's times say nothing; unset it")
    if given.compile:
        report = dict(triton=VERSIONS.get("triton"), date=str(date.today()))
        report_compiled(given.compile, report, lambda row: print(json.dumps(row), flush=True))
        given.out.write_text(json.dumps(report, indent=1))
    else:
        measure_all(given)


def measure_all(given):
    """Everything that this machine can run. given: the command line."""
    beside = Path(__file__).parents[2] / "shared/data/garden.npz"
    scene = garden(given.garden or (beside if beside.is_file() else None))
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    report = dict(device=device, date=str(date.today()), python=sys.version.split()[0])
    report |= {package: VERSIONS.get(package) for package in ("torch", "triton", "gsplat")}
    print(", ".join(f"{k} {v}" for k, v in report.items()))

    def keep(kind, row):
        print(row_text(row), flush=True)
        report.setdefault(kind, []).append(row)
        given.out.write_text(json.dumps(report, indent=1))

    card = next((card for card in CARDS if card in device), None)
    if card:
        report_compiled(CARDS[card][-1:], report, lambda row: None)
    for row in run("cuda" if on_gpu else "cpu", scene, device):
        keep("rows", row | dict(predicted=prediction(row, report, card)))
    print("\n| aim | | found |\n| --- | --- | --- |")
    for what, aim, found in aims(report["rows"]):
        print(f"| {what} | {aim} | {'not measured yet' if found is None else f'{found:.3g}'} |")
    if not on_gpu:
        print("\nNo GPU. What one needs for the forward pass at least, by its rates, not measured:")
        for name, C, geometry, *size in workloads(True, scene):
            demanded = demand(geometry, C, *size)
            for card in RATES:
                keep("floors", dict(workload=name, C=C, card=card, floor=floor(demanded, card)))
        print("\nWhat the compiler makes of the kernels. Stack is spilled registers, in bytes.")
        report_compiled((80, 90), report, lambda row: print(row_text(row), flush=True))
        given.out.write_text(json.dumps(report, indent=1))
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
