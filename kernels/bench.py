"""How fast, against whom, and how far from what the hardware allows: python -m kernels.bench

On a GPU, for every workload: forward and forward + backward (median and spread), peak memory beyond inputs and output,
error, and the ratio to every peer at hand: gsplat (if it can be imported), the same scene three channels at a time (as
the paper's code does), the torch backend. Without a GPU: the torch backend on small sizes, what a GPU would need at
least, and what the compiler makes of every kernel for sm_80 and sm_90 (registers, spills, shared memory, tensor cores).
Everything goes to bench.json, or to --out FILE, as it is measured, with device, versions and date.

    paper   2 x 576 x 880 pixel-aligned Gaussians, C = 384 and 768, one target of 576 x 880
    demo    2 x 224 x 224, C = 384, one target of 224 x 224
    scene   a garden of 138,766 points, 3 views of 648 x 420, C = 3, 32, 384: gsplat's garden (--garden FILE, or
            ../shared/data/garden.npz), else one made up to its depths, sizes and share in view
    batch   8 scenes of the demo in one call
    step    one training step of train.py, from photos to optimiser (the paper's preset; without a GPU the demo's)
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import sys
import time
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import kernels

from . import TILE, Mixture, _interpreted, rasterize, torch_backend
from .aot import compile_report
from .tiles import sort_ranges

REPEATS = 20
# What the floor is reckoned with: bytes/s of memory, and float operations/s of TF32 products
RATES = {"H100": (3.35e12, 495e12), "H200": (4.8e12, 495e12), "A100": (1.55e12, 156e12)}


# ----------------------------------------------------------------------------- workloads


def pixel_aligned(B, height, width, views=2, seed=0):
    """Scenes as distillation splats them: one Gaussian per pixel of `views` photos of a bumpy wall 3 m ahead, half a
    pixel wide, seen by a third camera between. Returns rasterize's arguments but for the features."""
    g = torch.Generator().manual_seed(seed)
    f = 0.8 * height
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    means = []
    for v in range(views):
        bumps = F.interpolate(torch.rand(B, 1, 8, 8, generator=g), (height, width), mode="bicubic")[:, 0]
        z = 3 + bumps
        centre = 0.3 * (v - (views - 1) / 2)
        means.append(torch.stack([(x - width / 2) / f * z + centre, (y - height / 2) / f * z, z], -1).flatten(1, 2))
    means = torch.cat(means, 1)
    covars = torch.eye(3) * (0.5 * means[..., 2] / f)[..., None, None] ** 2
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]]).expand(B, 1, 3, 3)
    scene = means, covars, torch.ones(means.shape[:2]), torch.eye(4).expand(B, 1, 4, 4), K
    return tuple(t.contiguous() for t in scene), width, height


def garden(path, seed=0):
    """A capture's points as round Gaussians: its own, or as many on a disc seen from its rim."""
    if path:
        try:
            file = np.load(path, allow_pickle=False)
            means, viewmats, Ks = (torch.from_numpy(file[k]).float() for k in ("means3d", "viewmats", "Ks"))
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"{path}: not the garden with means3d, viewmats and Ks ({error})") from None
    else:
        g = torch.Generator().manual_seed(seed)
        N, tilt = 138_766, 0.3  # radians that the camera looks down
        radius, angle = 0.25 + 3.1 * torch.rand(N, generator=g) ** 1.6, 2 * math.pi * torch.rand(N, generator=g)
        means = torch.stack([radius * angle.cos(), radius * angle.sin(), 0.3 * torch.randn(N, generator=g)], -1)
        viewmats = torch.eye(4).repeat(3, 1, 1)
        c, s = math.cos(tilt), math.sin(tilt)
        viewmats[:, :3, :3] = torch.tensor([[1, 0, 0], [0, -s, -c], [0, c, -s]])
        viewmats[:, :3, 3] = torch.tensor([[-0.1, 0.2, 1.2], [0.0, 0.2, 1.2], [0.1, 0.2, 1.2]])
        Ks = torch.tensor([[480.0, 0, 324], [0, 480, 210], [0, 0, 1]]).expand(3, 3, 3)
    sigma = 0.005 * means.norm(dim=-1).clamp(min=0.2)
    covars = torch.eye(3) * sigma[:, None, None] ** 2
    scene = (means, covars, torch.full(means.shape[:1], 0.8), viewmats, Ks)
    return tuple(t[None].contiguous() for t in scene), 648, 420


def mixture(B, views, C, height, width, seed=0):
    """Patch tokens, and how pixel-aligned Gaussians mix them."""
    import model

    h, w = height // 14, width // 14  # DINOv2's patches
    indices, weights = model.upsample_weights(torch.zeros(views, height, width), h, w)
    tokens = torch.randn(B, views * h * w, C, generator=torch.Generator().manual_seed(seed))
    return Mixture(tokens, *(t.reshape(1, -1, 4).repeat(B, 1, 1) for t in (indices, weights)))


def workloads(full, garden_scene):
    """(name, C, scene, width, height); unless full only what takes a CPU seconds."""
    if not full:
        for C in (3, 32, 384):
            yield "demo", C, *pixel_aligned(1, 224, 224)
        return
    for C in (384, 768, 3):
        yield "paper", C, *pixel_aligned(1, 576, 880)
    for C in (384, 3):
        yield "demo", C, *pixel_aligned(1, 224, 224)
    for C in (3, 32, 384):
        yield "scene", C, *garden_scene
    yield "batch", 384, *pixel_aligned(8, 224, 224)


# ----------------------------------------------------------------------------- ways to splat


def splat(scene, features, width, height, rasterizer=rasterize, **options):
    means, covars, opacities, viewmats, Ks = scene
    return rasterizer(means, covars, opacities, features, viewmats, Ks, width, height, **options)[0]


def in_threes(means, covars, opacities, features, *rest, **options):
    """As rasterize, three channels a pass; the arguments are looked at in the first alone."""
    tokens, *factors = features if isinstance(features, Mixture) else (features,)
    passes = []
    for part in tokens.split(3, -1):
        part = Mixture(part, *factors) if factors else part
        with mock.patch.object(kernels, "_check") if passes else contextlib.nullcontext():
            passes.append(rasterize(means, covars, opacities, part, *rest, **options))
    return torch.cat([out for out, _ in passes], -1), passes[0][1]


def gsplat(means, covars, opacities, features, viewmats, Ks, width, height, channels):
    from gsplat import rasterization

    return rasterization(
        means, None, None, opacities, features, viewmats, Ks, width, height, covars=covars, packed=False,
        channel_chunk=channels,
    )  # fmt: skip


def ways(device, C):
    """{name: options of splat}, ours first."""
    if device == "cpu":
        return {"torch": dict(backend="torch")}
    found = {"ours": {}, "ours, tf32x3": dict(precision="tf32x3"), "ours, ieee": dict(precision="ieee")}
    found["torch"] = dict(backend="torch")
    if C > 3:
        found["three channels at a time"] = dict(rasterizer=in_threes)
    if version("gsplat"):
        for channels in (32, 128):  # it takes them in passes of at most so many
            found[f"gsplat, {channels} channels a pass"] = dict(rasterizer=gsplat, channels=channels)
    return found


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ----------------------------------------------------------------------------- measuring


def clock(run, device):
    """Median and interquartile range of the seconds that `run` takes: of REPEATS calls, or of fewer, but three, if they
    take 20 s. Before them two calls, or one of 20 s, to warm up."""

    def seconds():
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if seconds() < 20:
        seconds()
    taken = []
    while len(taken) < 3 or len(taken) < REPEATS and sum(taken) < 20:
        taken.append(seconds())
    low, median, high = np.quantile(taken, [0.25, 0.5, 0.75])
    return float(median), float(high - low)


def measure(scene, features, width, height, **way):
    """Times and memory of one way to splat one workload: {"forward", "both"} in (median, spread) seconds, bytes of
    "inputs" and "output", and "memory": bytes at the peak of the forward pass beyond both (None but on a GPU)."""
    device = scene[0].device.type
    tokens, *factors = features if isinstance(features, Mixture) else (features,)
    with torch.no_grad():
        forward = clock(lambda: splat(scene, features, width, height, **way), device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        output = splat(scene, features, width, height, **way).nbytes
        memory = torch.cuda.max_memory_allocated() - before - output if device == "cuda" else None
    inputs = [t.detach().clone().requires_grad_() for t in (*scene[:3], tokens)]

    def both():
        changed = Mixture(inputs[3], *factors) if factors else inputs[3]
        out = splat((*inputs[:3], *scene[3:]), changed, width, height, **way)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    taken = sum(t.nbytes for t in (*scene, tokens, *factors))
    return {"forward": forward, "both": clock(both, device), "inputs": taken, "output": output, "memory": memory}


def demand(scene, C, width, height):
    """What a forward pass asks of the hardware: bytes, to read the Gaussians in view and to write the images once, and
    operations of the products of every tile with every Gaussian whose box reaches it, of which those behind an opaque
    surface may be saved."""
    means, covars, opacities, viewmats, Ks = scene
    means2d, _, covars2d, _, visible = torch_backend.project(
        means, covars, viewmats, Ks, width, height, near_plane=0.01, far_plane=1e10, eps2d=0.3
    )
    radii = torch_backend.image_radii(covars2d, opacities, visible)
    tiles = (means2d.new_tensor([width, height]) / TILE).ceil().view(2, 1, 1, 1)
    low = torch.minimum(((means2d - radii) / TILE).floor().clamp(min=0), tiles)
    high = torch.minimum(((means2d + radii) / TILE).ceil().clamp(min=0), tiles)
    pairs = (high - low).clamp(min=0).prod(0) * (radii[0] >= 0)  # (B, V, N)
    seen = int(pairs.any(1).sum())
    read = seen * (3 + 9 + 1 + C) + viewmats.numel() + Ks.numel()
    written = viewmats.shape[0] * viewmats.shape[1] * width * height * (C + 1)
    return 4 * (read + written), 2 * float(pairs.double().sum()) * TILE * TILE * C


def floor(demanded, device_name):
    """Seconds that a device needs for such a demand: {"bytes", "products"}; None if its rates are not known."""
    rates = next((rates for name, rates in RATES.items() if name in device_name), None)
    return rates and {what: amount / rate for what, amount, rate in zip(("bytes", "products"), demanded, rates)}


def errors(out, single, exact):
    """Largest difference from the float64 result relative to its largest value, at the pixels where a float32 result
    of the same code is within 1e-4: elsewhere rounding has changed a decision (skip, stop, order)."""
    scale = exact.abs().max()
    agree = (single - exact).abs().amax(-1) < 1e-4 * scale
    return float((out - exact)[agree].abs().max() / scale)


def run(device, garden_scene, device_name):
    """All rows, as they are measured. A way that fails is a row too: a peer's trouble should not cost the others."""
    for name, C, scene, width, height in workloads(device == "cuda", garden_scene):
        scene = tuple(t.to(device) for t in scene)
        B, N = scene[2].shape
        features = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).to(device)
        todo = {way: (features, options) for way, options in ways(device, C).items()}
        if device == "cuda" and C > 3 and name != "scene":
            factored = Mixture(*(t.to(device) for t in mixture(B, N // (width * height), C, height, width)))
            todo["ours, factored"] = factored, {}
            todo["ours, factored, bf16"] = factored._replace(tokens=factored.tokens.bfloat16()), {}  # as in training
        first = references = None
        for way, (given, options) in todo.items():
            row = dict(workload=name, C=C, N=N, way=way)
            try:
                row |= measure(scene, given, width, height, **options)
                first = first or row
                row["ratio"] = [row[k][0] / first[k][0] for k in ("forward", "both")]
                if way == "ours":
                    row["floor"] = floor(demand(scene, C, width, height), device_name)
                if way in ("ours", "ours, tf32x3", "ours, ieee") and N < 200_000:
                    references = references or [
                        splat([t.to(dtype) for t in scene], given.to(dtype), width, height, backend="torch").double()
                        for dtype in (torch.float32, torch.float64)
                    ]
                    row["error"] = errors(splat(scene, given, width, height, **options).double(), *references)
            except (RuntimeError, ValueError, ImportError, TypeError) as error:
                row["failed"] = (str(error).splitlines() or [type(error).__name__])[0]
            yield row
    if device == "cuda":
        yield from sorting(device)
    yield from training_step(device)


def training_step(device):
    """A step of train.py in one pass and in passes of three channels: the same but for how features are splatted."""
    import data  # here, as kernels/ needs none of it
    import model
    import train

    preset = "paper" if device == "cuda" else "demo"
    settings = train.parse_settings(["--preset", preset, "--teacher-weights", "random"])
    views = data.Views(data.Rooms("train"), settings["height"], settings["width"], seed=0, length=1,
                       **{k: settings[k] for k in ("min_gap", "max_gap")})  # fmt: skip
    batch = train.move(torch.utils.data.default_collate([views[0]]), device)
    first = None
    for way, rasterizer in (("ours", rasterize), ("three channels at a time", in_threes)):
        module, optimizer, schedule = train.build(settings, train.load_teacher(settings)[0], device)
        with mock.patch.object(model, "rasterize", rasterizer):
            taken = clock(lambda: train.train_step(module, batch, optimizer, schedule, 1, settings), device)
        first = first or taken
        yield dict(workload=f"step, {preset}", C=module.student.embed_dim, way=way, step=taken,
                   ratio=[taken[0] / first[0]])  # fmt: skip


def sorting(device):
    """Our sort of tile lists against torch.sort of the same keys with the tile above them."""
    shapes = {
        f"{n} lists of {length}": [length] * n for n, length in ((8000, 64), (8000, 500), (800, 5000), (8, 500_000))
    }
    shapes["7999 lists of 200 and one of 1000000"] = [200] * 7999 + [1_000_000]
    for what, shape in shapes.items():
        lengths = torch.tensor(shape, device=device)
        ends = lengths.cumsum(0)
        ranges, tile = torch.stack([ends - lengths, ends], 1), torch.repeat_interleave(lengths)
        keys = torch.randperm(len(tile), device=device)
        ours = clock(lambda: sort_ranges(keys.clone(), ranges, max(shape)), device)
        library = clock(lambda: torch.sort((tile << 32) | keys), device)
        yield dict(workload=f"sort {what}", ours=ours, torch_sort=library)


def print_row(row):
    def milliseconds(seconds):
        return f"{1e3 * seconds[0]:9.2f} ms +- {1e3 * seconds[1]:.2f}"

    if "torch_sort" in row:
        text = f"ours {milliseconds(row['ours'])}   torch.sort {milliseconds(row['torch_sort'])}"
        print(f"{row['workload']}: {text}", flush=True)
        return
    text = f"{row['workload']:6} C = {row['C']:<4} {row['way']:30}"
    if "failed" in row:
        text += f" failed: {row['failed']}"
    elif "step" in row:
        text += f" {milliseconds(row['step'])} (x {row['ratio'][0]:.1f})"
    else:
        text += f" forward {milliseconds(row['forward'])} (x {row['ratio'][0]:.1f})"
        text += f"   with backward {milliseconds(row['both'])} (x {row['ratio'][1]:.1f})"
    if row.get("memory") is not None:
        text += f"   memory {row['memory'] / 2**20:.0f} MiB"
    if row.get("floor"):
        text += f"   floor {floor_text(row['floor'])}, x {row['forward'][0] / max(row['floor'].values()):.1f} of it"
    if "error" in row:
        text += f"   error {row['error']:.1e}"
    print(text, flush=True)


def aims(rows):
    """What the project set out for, as (what, aim, found); found is None where the rows do not tell."""
    row = {(r["workload"], r["C"], r["way"]): r for r in rows if "way" in r and "failed" not in r}

    def ratio(numerator, denominator, of):
        a, b = (row.get(key) for key in (numerator, denominator))
        return of(a) / of(b) if a and b and of(a) is not None else None

    ours, factored, threes = (("paper", 384, way) for way in ("ours", "ours, factored", "three channels at a time"))
    gsplats = [key for key in row if key[:2] == ours[:2] and key[2].startswith("gsplat")]
    gsplat = min(gsplats, key=lambda key: row[key]["forward"][0], default=None)  # its best
    step = [("step, paper", 384, way) for way in (threes[2], "ours")]
    forward, both, memory = lambda r: r["forward"][0], lambda r: r["both"][0], lambda r: r["memory"]
    errors = [r["error"] for r in rows if r.get("way") == "ours" and "error" in r]
    cpu = row.get(("demo", 384, "torch"))
    return [
        ("paper, C = 384, forward: gsplat / ours", ">= 10", ratio(gsplat, ours, forward)),
        ("the same with backward", ">= 5", ratio(gsplat, ours, both)),
        ("three channels at a time / ours, forward", ">= 50", ratio(threes, ours, forward)),
        ("ours, C = 384 / C = 3, forward", "<= 4", ratio(ours, ("paper", 3, "ours"), forward)),
        ("peak memory beyond inputs and output / these, forward", "<= 0.25",
         memory(row[ours]) / (row[ours]["inputs"] + row[ours]["output"]) if ours in row else None),
        ("factored / dense, memory of the forward pass but for the output", "<= 0.2",
         ratio(factored, ours, lambda r: None if memory(r) is None else memory(r) + r["inputs"])),
        ("a training step, paper's preset: in threes / ours", ">= 10", ratio(*step, lambda r: r["step"][0])),
        ("error of TF32 against float64, relative", "<= 2e-3", max(errors, default=None)),
        ("CPU: 100,352 Gaussians, 224 x 224, C = 384, forward, seconds", "<= 1", forward(cpu) if cpu else None),
    ]  # fmt: skip


def floor_text(found):
    return f"{1e3 * found['bytes']:.2f} ms of memory, {1e3 * found['products']:.2f} ms of products"


def floors(garden_scene):
    """Rows of what the workloads of a GPU would need at least, on each whose rates are known."""
    for name, C, scene, width, height in workloads(True, garden_scene):
        demanded = demand(scene, C, width, height)
        for card in RATES:
            yield dict(workload=name, C=C, card=card, floor=floor(demanded, card))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--garden", metavar="FILE", help="the garden's points and cameras (.npz)")
    add("--out", default="bench.json", type=Path, metavar="FILE", help="to write everything to")
    add("--compile", nargs="+", type=int, metavar="SM", help="only the compile report, one JSON per line")
    given = parser.parse_args()
    if _interpreted():
        raise SystemExit("TRITON_INTERPRET is set: what the interpreter takes says nothing, and nothing is compiled")
    if given.compile:
        for row in compile_report(given.compile):
            print(json.dumps(row), flush=True)
        return
    beside = Path(__file__).parents[2] / "shared/data/garden.npz"
    scene = garden(given.garden or (beside if beside.is_file() else None))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report = dict(device=name, date=str(date.today()), python=sys.version.split()[0])
    report |= {package: version(package) for package in ("torch", "triton", "gsplat")}
    print(", ".join(f"{k} {v}" for k, v in report.items()))

    def keep(kind, row):
        report.setdefault(kind, []).append(row)
        given.out.write_text(json.dumps(report, indent=1))

    for row in run(device, scene, name):
        print_row(row)
        keep("rows", row)
    print("\n| aim | | found |\n| --- | --- | --- |")
    for what, aim, found in aims(report["rows"]):
        print(f"| {what} | {aim} | {'not measured yet' if found is None else f'{found:.3g}'} |")
    if device == "cpu":
        print("\nNo GPU: what one would need for the forward pass at least, reckoned from its rates, not measured.")
        for row in floors(scene):
            print(f"{row['workload']:6} C = {row['C']:<4} {row['card']}   {floor_text(row['floor'])}")
            keep("floors", row)
        print("\nWhat the compiler makes of the kernels. Stack is spilled registers, in bytes.")
        for row in compile_report((80, 90)):
            print(f"sm_{row['target']}  {row['kernel']:50} {row['reg']:4} registers  {row['stack']:5} stack  "
                  f"{row['shared']:6} shared  {row['tensor_core']:4} tensor-core instructions", flush=True)  # fmt: skip
            keep("compiled", row)
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
