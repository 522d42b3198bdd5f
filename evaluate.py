"""Does the student understand 3D better than its teacher? python evaluate.py --task correspondence

    correspondence   the same point found in another view: no training (Probe3D's protocol)
    depth            a linear layer from features to depth (DINOv2's)
    normals          a linear layer from features to surface normals (Probe3D's)
    segmentation     a linear layer from features to classes (DINOv2's)
    all              the four
    reconstruction   not of features: photos to 3D Gaussians, against sensor depth and simple ways

With no other word: the newest run's student against its teacher, on procedural rooms that no
training sees; with --data on your data, by the published settings (--protocol). A table is
printed, and written to RUN/evaluation/TASK-1/results.json with pictures beside it (without a run to runs/evaluation/).

Features are patch tokens of the last block unless told otherwise: without the final norm for correspondence and normals
(Probe3D, which the paper follows there) and for depth (DINOv2's depth heads), with it for segmentation (DINOv2's linear
head); --norm and --no-norm change it. A student counts alone; --concat puts its teacher's features beside it, as FiT3D
and others do. What differs from the protocols on real data stands in README, Probing.
"""

import argparse
import functools
import itertools
import json
import math
import platform
import resource
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import nn

import data
from data import BINS, rotation_angle
from model import architecture_of, load_vit, normalise, read_state
from reconstruct import FeedForward, SensorDepth, load_reconstructor, render, save_ply
from train import RANDOM, TEACHERS, banner, depth_colours, free_folder, load_teacher, move, replace_file, write_sheet

# Settings by task: (--protocol quick, --protocol paper, why). Paper's are of the public code of
# the probes: DINOv2's depth and segmentation, as FiT3D and the paper run them, Probe3D's others.
PROBE = {
    "seeds": (3, 3, "repetitions: a difference within their spread is no difference"),
    "seed": (0, 0, "of the first"),
}
LINEAR = PROBE | {
    "train_frames": (128, 0, "to train the probe on; 0 is all"),
    "test_frames": (40, 0, "to test it on; 0 is all"),
    "copies": (1, 1, "windows of each training frame; what is random is drawn once for each"),
    "epochs": (6, 0, "over the training frames"),
    "steps": (0, 38_400, "of the optimiser; 0: as many as --epochs says"),
    "batch_size": (8, 16, "frames a step"),
    "lr": (1e-3, 1e-4, "of AdamW; on rooms there are few steps"),
    "weight_decay": (0.01, 0.01, "of AdamW"),
    "schedule": ("quarter", "half", "of the learning rate: quarter or half of a cosine, or linear"),
    "warmup": (0.25, 0.3333, "share of the steps in which it climbs"),
    "clip": (0.0, 0.0, "norm that gradients are cut to; 0: none"),
    "checks": (1, 1, "tests during training, of which the best counts: test frames choose it"),
}


def published(**values):  # other values for the paper's protocol
    return LINEAR | {k: (LINEAR[k][0], v, LINEAR[k][2]) for k, v in values.items()}


SETTINGS = {
    "correspondence": PROBE | {
        "pairs": (80, 1500, "of views, for each seed"),
        "matches": (1000, 1000, "best of a pair by the ratio test"),
    },
    "depth": published(clip=35.0, checks=6) | {
        "max_depth": (0.0, 0.0, "metres, of bins and of truth; 0: 10, or 20 on ScanNet++"),
        "gradient_weight": (0.5, 0.0, "of the gradient loss; the public code says 0.5, but slices "
                            "the wrong axes: in effect it is 0"),
    },
    "normals": published(
        lr=5e-4, epochs=10, steps=0, batch_size=8, schedule="quarter", warmup=0.15
    ),
    "segmentation": published(
        lr=1e-3, steps=40_000, weight_decay=1e-4, schedule="linear", warmup=0.0375
    ),
    "all": PROBE,
    "reconstruction": {
        "scenes": (50, 50, "pairs of context views and a target between them"),
        "near": (3.0, 3.0, "nearest that photos are taken to show, in baselines (as in train.py)"),
        "far": (50.0, 50.0, "likewise farthest"),
        "min_gap": (8, 8, "frames between the context views, at least"),
        "max_gap": (12, 12, "at most"),
        "seed": (0, 0, "of the choice of views"),
    },
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBES = ("correspondence", "depth", "normals", "segmentation")


def parser_of(task, **about):
    """The command line's flags: the task's settings and what goes with every task."""
    parser = argparse.ArgumentParser(description=__doc__, **about)
    add = parser.add_argument
    add("--data", help="folder of your data (README); nothing for procedural rooms")
    add("--image-size", nargs=2, type=int, metavar=("H", "W"),
        help="pixels; nothing: 224 224 on rooms, else 480 640, or the protocol's own")  # fmt: skip
    if task == "reconstruction":
        add("--weights", nargs="+", default=["shipped"], metavar="FILE", help="reconstructors; shipped: in weights/")
    else:
        add("--protocol", choices=["quick", "paper"],
            help="published settings, or quick ones; nothing: quick on rooms alone")  # fmt: skip
        add("--weights", nargs="+", metavar="FILE", help="weights of a DINOv2 or DINOv3 to compare, instead of a run's")
        add("--run", help="folder of the run whose student and teacher to compare; nothing is the newest")
        add("--teacher", help=f"alone, without a run: {TEACHERS}")
        add("--teacher-weights", help='of --teacher: a file; "random"; or nothing for the public weights')
        add("--layers", nargs="+", type=int, help="blocks whose tokens are put side by side, from 0; nothing: the last")
        add("--norm", action=argparse.BooleanOptionalAction, help="the final norm; nothing: for segmentation alone")
        add("--concat", action="store_true",
            help="put the first model's features, and its cls token alone, before others'")  # fmt: skip
    if task in HEADS or task == "all":
        add("--cache", metavar="FOLDER", help="for features while they are needed; nothing: /tmp")
    if task == "segmentation":
        add("--classes", metavar="FILE", help="names of the classes, one a line (ScanNet++)")
    for name, (quick, paper, why) in SETTINGS[task or "all"].items():
        choices = SCHEDULES if name == "schedule" else None
        add("--" + name.replace("_", "-"), type=type(quick), default=argparse.SUPPRESS,
            choices=choices, help=f"{why} (quick {quick}, paper {paper})")  # fmt: skip
    return parser


def parse_settings(arguments=None):
    """The command line as a namespace: the task's settings and what goes with every task."""
    about = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    first = argparse.ArgumentParser(**about, add_help=False)
    about_task = "what to measure; each has its settings: --task X --help"
    first.add_argument("--task", choices=list(SETTINGS), help=about_task)
    task = first.parse_known_args(arguments)[0].task
    parser = parser_of(task, parents=[first], **about)
    given = parser.parse_args(arguments)
    if not task:
        parser.error(f"--task is missing: one of {', '.join(SETTINGS)}")
    if task != "reconstruction":
        given.protocol = given.protocol or ("paper" if given.data else "quick")
    if given.image_size is None and not (task in HEADS and given.protocol == "paper"):
        given.image_size = [480, 640] if given.data else [224, 224]
    if hasattr(given, "epochs") and not hasattr(given, "steps"):
        given.steps = 0
    for name, value in of_protocol(task, given).items():
        value = getattr(given, name, value)
        setattr(given, name, value)
        may_be_zero = 0 in SETTINGS[task][name] or name in ("weight_decay", "warmup")
        if name != "schedule" and not value >= (0 if may_be_zero else 1e-12):
            raise SystemExit(f"--{name.replace('_', '-')} cannot be {value}")
    check(task, given)
    return given


def of_protocol(task, given):
    """{setting: value} of a task by the protocol that is asked for."""
    return {k: v[getattr(given, "protocol", "quick") == "paper"] for k, v in SETTINGS[task].items()}


def check(task, given):
    """SystemExit for settings that do not go together."""
    unit = 16 if task == "reconstruction" else 4 if task in ("correspondence", "all") else 1
    if any(size < unit or size % unit for size in given.image_size or ()):
        what = f"multiples of {unit}" if unit > 1 else "more than 0"
        raise SystemExit(f"--image-size must be {what}, not {given.image_size[0]} {given.image_size[1]}")
    for name, what in (("weights", "file"), ("layers", "block")):
        values = getattr(given, name, None) or ()
        if len(set(values)) < len(values):
            raise SystemExit(f"--{name} names a {what} twice")
    if task in HEADS and not given.epochs and not given.steps:
        raise SystemExit("--epochs cannot be 0 where --steps is")
    if task == "all" and given.data:
        raise SystemExit("--task all is for procedural rooms: every task wants data of its own")
    if task != "reconstruction" and sum(map(bool, (given.weights, given.run, given.teacher))) > 1:
        raise SystemExit("--weights, --run and --teacher say each what to compare: choose one")
    if task != "reconstruction" and given.teacher_weights and not given.teacher:
        raise SystemExit("--teacher-weights goes with --teacher")


# ----------------------------------------------------------------------------- what is compared


class Model(NamedTuple):
    name: str
    vits: list  # whose features are put side by side
    warning: str | None  # what is to be said of the weights wherever results appear


def load_models(settings):
    """The models to compare, the first being what the others are measured against, and where results go."""
    if settings.weights:
        models = []
        for path in settings.weights:
            vit = load_vit(architecture_of(read_state(path), path), path)
            models.append(Model(str(path), [vit], metadata_of(path).get("warning")))
        home = Path("runs")
    elif settings.teacher or not (settings.run or newest_run()):
        name = settings.teacher or "dinov2_vits14"
        wanted = dict(teacher=name, teacher_weights=settings.teacher_weights, seed=0, data=settings.data)
        vit, warning = load_teacher(wanted)
        models, home = [Model(wanted["teacher"], [vit], warning)], Path("runs")
    else:
        home = Path(settings.run or newest_run())
        path = home / "student.safetensors"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --run takes the folder of a run, such as runs/demo-1")
        about = metadata_of(path)
        try:
            trained = json.loads(about["settings"])
            wanted = {k: trained[k] for k in ("teacher", "teacher_weights", "seed", "data")}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: its metadata has no settings of a run of train.py; pass it by --weights"
            ) from None
        teacher, warning = load_teacher(wanted)
        if about.get("warning") != warning:
            raise ValueError(f"{path}: its teacher's weights are not those found now, random or not; pass --weights")
        student = load_vit(wanted["teacher"], path)
        models = [Model(f"teacher {wanted['teacher']}", [teacher], warning)]
        models.append(Model(f"student {home}", [student], warning))
    if settings.concat:
        if len(models) == 1:
            raise ValueError(
                f"--concat puts the first model's features beside another's, and there is only {models[0].name}"
            )
        first = models[0]
        models[1:] = [Model(m.name + " + first", first.vits + m.vits, m.warning or first.warning)
                      for m in models[1:]]  # fmt: skip
    depth = min(len(vit.blocks) for m in models for vit in m.vits)
    if settings.layers and not all(0 <= i < depth for i in settings.layers):
        raise ValueError(f"--layers {settings.layers}: there are {depth} blocks, counted from 0")
    for model in models:
        for vit in model.vits:
            if settings.image_size and min(settings.image_size) < vit.patch_size:
                raise ValueError(
                    f"--image-size must be at least {vit.patch_size}, a patch of {model.name}, "
                    f"not {settings.image_size[0]} {settings.image_size[1]}"
                )
            vit.to(DEVICE)
    return models, home


def warning_of(models):
    """What is to be said of the models' weights: that some are random before all else."""
    said = {m.warning for m in models} - {None}
    return RANDOM if RANDOM in said else min(said, default=None)


def newest_run():
    """The folder of the student that was written last, or None."""
    students = sorted(Path("runs").glob("*/student.safetensors"), key=lambda path: path.stat().st_mtime)
    return students[-1].parent if students else None


def metadata_of(path):
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file that can be read ({error})") from None


@torch.no_grad()
def extract(model, images, settings):
    """Images [B, 3, H, W] in 0..1 -> features [B, C, h, w] and cls tokens [B, C'], half precision,
    in main memory. Each ViT sees them resized to the multiples of its patch_size at or below their
    size. Where its grid of patches is another than the first ViT's, its features are resampled to
    that one. The cls tokens are the first ViT's, as in FiT3D's code and the paper's: C' = C but
    for --concat."""
    images, patches, classes = images.to(DEVICE), [], []
    for vit in model.vits:
        size = [s // vit.patch_size * vit.patch_size for s in images.shape[-2:]]
        x = normalise(F.interpolate(images, size, mode="bilinear", align_corners=False))
        layers = settings.layers or [len(vit.blocks) - 1]
        parts = vit.get_intermediate_layers(x, layers, True, True, settings.norm)
        patches += [p for p, _ in parts]
        classes = classes or [c for _, c in parts]
    grid = patches[0].shape[-2:]
    patches = [
        p if p.shape[-2:] == grid else F.interpolate(p, grid, mode="bilinear", align_corners=False)
        for p in patches
    ]
    patches, classes = torch.cat(patches, 1).half().cpu(), torch.cat(classes, 1).half().cpu()
    if not torch.isfinite(patches).all():
        raise ValueError(f"{model.name}: features that are NaN, or too large for half precision")
    return patches, classes


# ----------------------------------------------------------------------------- correspondence


def nearest_two(queries, keys, block=2048):
    """For unit vectors queries [P, C], the cosine of, and the index of, the two most similar of keys [Q, C]: [P, 2].
    Exact, and never more than block x Q similarities at once."""
    best = [(q @ keys.T).topk(2, dim=1) for q in queries.split(block)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def find_matches(feat0, feat1, depth0, depth1, K, num_matches):
    """Probe3D's matches: features sampled at every pixel with depth, for each of view 0 the most similar of view 1, and
    of those the most distinct by the ratio test, 1 - d1 / d2 with cosine distances d.

    Features [C, h, w], depths [H, W] (0 = none) and K [3, 3] at the size of the depths, or [2, 3, 3] where the views
    differ. Returns points [M, 3] in camera 0, points [M, 3] in camera 1; M = 0 where a view has too few.
    """
    Ks = K.expand(2, 3, 3) if K.ndim == 2 else K
    points, features = [], []
    for feat, depth, K in zip((feat0, feat1), (depth0, depth1), Ks):
        H, W = depth.shape
        points.append(data.camera_points(depth, K)[depth > 0])  # (P, 3)
        grid = 2 * project(points[-1], K) / depth.new_tensor([W, H]) - 1
        sampled = F.grid_sample(feat[None].float(), grid[None, None], align_corners=False)[0, :, 0].T  # (P, C)
        features.append(F.normalize(sampled, dim=-1))
    if min(map(len, points)) < 2:
        return points[0][:0], points[1][:0]
    cosine, index = nearest_two(*features)
    distance = (1 - cosine).clamp(min=1e-9)
    best = (1 - distance[:, 0] / distance[:, 1]).topk(min(num_matches, len(distance))).indices
    return points[0][best], points[1][index[best, 0]]


def project(points, K):
    seen = points @ K.T
    return seen[:, :2] / seen[:, 2:].clamp(min=1e-9)


def match_errors(feat0, feat1, depth0, depth1, K, Rt, num_matches):
    """Errors [M] in pixels of the depth maps, M <= num_matches: view 0's point seen by camera 1, against its match.

    Features [C, h, w], depths [H, W] (0 = none), K [3, 3] at the depths' size (or [2, 3, 3]), Rt [3, 4] or [4, 4] from
    camera 0's coordinates to camera 1's. As Probe3D's evaluation of ScanNet pairs (github.com/mbanani/probe3d).
    """
    points0, points1 = find_matches(feat0, feat1, depth0, depth1, K, num_matches)
    K1 = K if K.ndim == 2 else K[1]
    return (project(points0 @ Rt[:3, :3].T + Rt[:3, 3], K1) - project(points1, K1)).norm(dim=-1)


def correspondence(models, settings, folder):
    """{model: [one {metric: value} per seed]}: recall within 2, 5, 10, 20 pixels, and within 5 and 10 by viewpoint
    change; and {model: {metric: [one value a pair]}}, by which models are compared pair by pair.

    Pixels are those of depth at a quarter of --image-size, as in Probe3D, where that is 120 x 160. A pair in which a
    view has less than two pixels of depth counts for none of them.
    """
    H, W = settings.image_size
    seeds = range(settings.seed, settings.seed + settings.seeds)
    chosen = {seed: data.pairs(settings.data, settings.pairs, H, W, seed) for seed in seeds}
    names = [[(scene.name, i, j) for scene, i, j in pairs.entries] for pairs in chosen.values()]
    if len(names) > 1 and all(n == names[0] for n in names):
        print("All pairs that there are get measured: nothing is left for a seed to choose, and there is no spread.")
        chosen = {settings.seed: chosen[settings.seed]}
    results, progress = {m.name: [] for m in models}, Progress(sum(map(len, chosen.values())), "pair")
    paired = {m.name: [] for m in models}
    for seed, pairs in chosen.items():
        recalls = {m.name: [] for m in models}  # per pair, {metric: value}
        for n, (view0, view1) in enumerate(loaded(pairs)):
            Rt = torch.linalg.inv(view1["extrinsics"]) @ view0["extrinsics"]
            progress.step()
            if pairs.least_overlap and data.overlap(view0, view1, Rt) < pairs.least_overlap:
                continue
            K = torch.stack([view0["Ks"], view1["Ks"]]) / torch.tensor([4.0, 4.0, 1.0])[:, None]
            depths = [view["depths"][::4, ::4] for view in (view0, view1)]
            images = torch.stack([view0["images"], view1["images"]])
            drawn = []
            for model in models:
                features = extract(model, images, settings)[0]
                views = [t.to(DEVICE) for t in (*features, *depths, K)]
                errors = match_errors(*views, Rt.to(DEVICE), settings.matches)
                recalls[model.name].append(recall(errors, float(rotation_angle(Rt))))
                if seed == settings.seed and n < 4:
                    drawn.append((model, [points.cpu() for points in find_matches(*views, 30)]))
            if drawn:
                draw_matches(folder / f"matches_{n}.png", images, drawn, K, Rt)
        if not recalls[models[0].name]:
            raise ValueError(f"{settings.data}: no two of its frames show {pairs.least_overlap:.0%} of the same")
        for name, rows in recalls.items():
            results[name].append({k: mean([row.get(k) for row in rows]) for k in METRICS})
            paired[name] += rows
    return results, paired


METRICS = [f"recall_{r}px" for r in (2, 5, 10, 20)] + [
    f"recall_{r}px_{low}_{high}deg" for r in (2, 5, 10) for low, high in zip(BINS, BINS[1:])
]


def recall(errors, angle):
    """{metric: share of a pair's matches that are that near} for errors [M] in pixels, of a pair whose viewpoint
    changes by an angle in degrees; {} without matches."""
    low = max((b for b in BINS[:-1] if b <= angle), default=0)
    bin = f"_{low}_{BINS[BINS.index(low) + 1]}deg"
    within = {f"recall_{r}px": float((errors < r).float().mean()) for r in (2, 5, 10, 20)} if len(errors) else {}
    return within | {k + bin: v for k, v in within.items() if k + bin in METRICS}


def paired_differences(paired):
    """{"B - A": {metric: (mean over the pairs of B minus A, its standard error)}} of every further model and every one
    before it. Paired, what makes a pair easy or hard for all cancels; the error is None for a single pair."""
    rows, names = {}, list(paired)
    for j, other in enumerate(names):
        for first in names[:j]:
            row = rows[f"{other} - {first}"] = {}
            for k in METRICS:
                apart = [b[k] - a[k] for a, b in zip(paired[first], paired[other]) if k in a and k in b]
                error = float(np.std(apart, ddof=1) / math.sqrt(len(apart))) if len(apart) > 1 else None
                row[k] = (mean(apart), error)
    return rows


def draw_matches(path, images, drawn, K, Rt):
    """The two photos side by side for each model, its best matches as lines: green within 10 pixels, else red."""
    H, W = images.shape[-2:]
    sheet = Image.new("RGB", (2 * W, (H + 18) * len(drawn)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (model, (points0, points1)) in enumerate(drawn):
        top = row * (H + 18)
        pen.text((2, top + 3), f"{model.name}   {(model.warning or '').split(':')[0]}", fill="black")
        for i, image in enumerate(images):
            pixels = (image.permute(1, 2, 0).numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (i * W, top + 18))
        truth = project(points0 @ Rt[:3, :3].T + Rt[:3, 3], K[1])
        start, end = project(points0, K[0]), project(points1, K[1])
        for a, b, error in zip(start.tolist(), end.tolist(), (truth - end).norm(dim=-1).tolist()):
            (x0, y0), (x1, y1) = ((4 * c for c in p) for p in (a, b))
            pen.line((x0, top + 18 + y0, W + x1, top + 18 + y1), fill=(0, 170, 0) if error < 10 else (220, 0, 0))
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG"))


# ----------------------------------------------------------------------------- linear probes


# A probe takes (channels, classes=the cls token's, names=of classes, max_depth=, gradient_weight=).
# It says its label's key and unknown value, and the metric and sign that choose checkpoints.


class DepthProbe(nn.Module):
    """DINOv2's linear depth head: cls beside every patch token, a 1 x 1 convolution to 256 uniform bins at four times
    the resolution, depth in metres as their mean weighted by relu + 0.1."""

    label, unknown, best = "depths", 0, ("abs_rel", -1)

    def __init__(self, channels, classes=None, max_depth=10.0, gradient_weight=0.5, **_):
        super().__init__()
        self.conv = nn.Conv2d(channels + (classes or channels), 256, 1)
        self.far, self.gradient_weight = max_depth, gradient_weight
        self.register_buffer("bins", torch.linspace(0.001, max_depth, 256))

    def forward(self, features, classes, size):  # (B, C, h, w), (B, C') -> (B, H, W)
        x = torch.cat([features, classes[:, :, None, None].expand(-1, -1, *features.shape[-2:])], 1)
        # A 1 x 1 convolution and bilinear upsampling commute: convolving the fewer pixels is the same, and faster
        x = F.interpolate(self.conv(x), scale_factor=4, mode="bilinear", align_corners=False)
        p = F.relu(x)  # + 0.1, which adds a constant to either sum
        depth = torch.einsum("bnhw,n->bhw", p, self.bins) + 0.1 * self.bins.sum()
        depth = depth / (p.sum(1) + 0.1 * len(self.bins))
        return F.interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    def loss(self, prediction, frame):
        truth = torch.where(frame["depths"] <= self.far, frame["depths"], 0.0)
        loss = sig_loss(prediction, truth)
        if self.gradient_weight:
            loss = loss + self.gradient_weight * gradient_loss(prediction, truth)
        return loss

    def measure(self, prediction, frame):
        truth = torch.where(frame["depths"] <= self.far, frame["depths"], 0.0)
        return of_frames_with(truth > 0, depth_metrics(prediction, truth))

    def draw(self, prediction, frame):
        known = frame["depths"] > 0
        return {"truth": depth_colours(frame["depths"], known), "predicted": depth_colours(prediction, known)}

    def blind(self, labels):  # the median depth that (N, H, W) have at each pixel, or NaN
        return torch.where(labels > 0, labels, torch.nan).nanmedian(0).values


def of_frames_with(known, metrics):
    """Metrics {name: [B]} of the frames of which anything is known [B, H, W]: the others measure nothing."""
    return {k: v[known.flatten(1).any(1)] for k, v in metrics.items()}


def sig_loss(pred, gt):
    """AdaBins' scale-invariant loss (arXiv 2011.14141), as in DINOv2: depths [..., H, W], gt 0 = none."""
    known = gt > 0
    if not known.any():
        return pred.sum() * 0
    g = torch.log(pred[known] + 1e-3) - torch.log(gt[known] + 1e-3)
    return (g.square().mean() - 0.85 * g.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(pred, gt):
    """MegaDepth's loss on differences of log depth two pixels apart (arXiv 1804.00607), as in DINOv2: at full size and
    at every second, fourth and sixth pixel. Depths [..., H, W], gt 0 = none."""
    total = 0.0
    for step in (1, 2, 4, 6):
        p, t = pred[..., ::step, ::step], gt[..., ::step, ::step]
        known = (t > 0).float()
        difference = (torch.log(p + 1e-3) - torch.log(t + 1e-3)) * known
        down = (difference[..., 2:, :] - difference[..., :-2, :]).abs() * known[..., 2:, :] * known[..., :-2, :]
        across = (difference[..., 2:] - difference[..., :-2]).abs() * known[..., 2:] * known[..., :-2]
        total = total + (down.sum() + across.sum()) / known.sum().clamp(min=1)
    return total


def depth_metrics(pred, gt):
    """Depths [B, H, W], gt 0 = none -> {d1, d2, d3: share of pixels within a factor of 1.25, 1.25^2, 1.25^3; rmse in
    the unit of depth; abs_rel}, each [B]. As Probe3D and DINOv2. Without known pixels they are 0."""
    known = gt > 0
    count = known.sum((1, 2)).clamp(min=1)

    def average(x):
        return torch.where(known, x, 0.0).sum((1, 2)) / count

    ratio = torch.maximum(gt / pred.clamp(min=1e-9), pred / gt.clamp(min=1e-9))
    metrics = {f"d{k}": average((ratio < 1.25**k).float()) for k in (1, 2, 3)}
    relative = (pred - gt).abs() / gt.clamp(min=1e-9)
    return metrics | {"rmse": average((pred - gt).square()).sqrt(), "abs_rel": average(relative)}


class NormalsProbe(nn.Module):
    """Probe3D's linear head: a 1 x 1 convolution to a direction and its certainty, at four times the resolution. It
    sees patch tokens alone, as the paper says; Probe3D's configuration for DINOv2 puts cls beside them."""

    label, unknown, best = "normals", 0, ("rmse", -1)

    def __init__(self, channels, **_):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, features, classes, size):  # (B, C, h, w) -> (B, 4, H, W)
        x = F.interpolate(self.conv(features), scale_factor=4, mode="bilinear", align_corners=True)
        return F.interpolate(x, size, mode="bicubic", align_corners=True)

    def loss(self, prediction, frame):
        return angular_loss(prediction, frame["normals"], known_normals(frame["normals"]))

    def measure(self, prediction, frame):
        known = known_normals(frame["normals"])
        return of_frames_with(known, normal_metrics(prediction[:, :3], frame["normals"], known))

    def draw(self, prediction, frame):
        known = known_normals(frame["normals"][None])[0]
        truth, ours = (
            ((F.normalize(n, dim=0) + 1) / 2 * known).permute(1, 2, 0) for n in (frame["normals"], prediction[:3])
        )
        return {"truth": truth, "predicted": ours}

    def blind(self, labels):  # the mean normal that (N, 3, H, W) have at each pixel
        return labels.mean(0)


def known_normals(normals):  # (B, 3, H, W) -> (B, H, W); unknown ones are 0
    return normals.square().sum(1) > 0.25


def angular_loss(pred, gt, valid):
    """Uncertainty-aware angular loss (Bae et al., arXiv 2109.09881), as in Probe3D: pred [B, 4, H, W] a direction and a
    raw certainty, gt [B, 3, H, W], valid [B, H, W]."""
    angle = F.cosine_similarity(pred[:, :3], gt, dim=1).clamp(-1 + 1e-4, 1 - 1e-4).acos()
    kappa = F.elu(pred[:, 3]) + 1.01
    loss = torch.log1p(torch.exp(-kappa * math.pi)) - torch.log(kappa.square() + 1) + kappa * angle
    return loss[valid].mean()


def normal_metrics(pred, gt, valid):
    """Normals [B, 3, H, W] of any length, valid [B, H, W] -> {d1, d2, d3: share of pixels within 11.25, 22.5, 30
    degrees; rmse in degrees}, each [B]. As Probe3D. Without valid pixels they are 0."""
    valid = valid.bool()
    count = valid.sum((1, 2)).clamp(min=1)
    error = torch.rad2deg(F.cosine_similarity(pred, gt, dim=1).clamp(-1, 1).acos())

    def average(x):
        return torch.where(valid, x, 0.0).sum((1, 2)) / count

    metrics = {f"d{k}": average((error < limit).float()) for k, limit in ((1, 11.25), (2, 22.5), (3, 30))}
    return metrics | {"rmse": average(error.square()).sqrt()}


class SegmentationProbe(nn.Module):
    """DINOv2's linear head: batch normalisation and a 1 x 1 convolution."""

    label, unknown, best = "classes", -1, ("miou", 1)

    def __init__(self, channels, names, **_):
        super().__init__()
        self.names = names
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, len(names), 1))

    def forward(self, features, classes, size):  # (B, C, h, w) -> logits (B, classes, H, W)
        return F.interpolate(self.head(features), size, mode="bilinear", align_corners=False)

    def loss(self, prediction, frame):
        return F.cross_entropy(prediction, frame["classes"], ignore_index=-1)

    def measure(self, prediction, frame):
        return {"confusion": confusion(prediction.argmax(1), frame["classes"], len(self.names))[None]}

    def draw(self, prediction, frame):
        colours = torch.rand(len(self.names) + 1, 3, generator=torch.Generator().manual_seed(1))
        return {"truth": colours[frame["classes"] + 1], "predicted": colours[prediction.argmax(0) + 1]}

    def blind(self, labels):  # how many of (N, H, W) have each class at each pixel
        return torch.stack([(labels == c).sum(0).float() for c in range(len(self.names))])


def confusion(pred, gt, count):
    """Pixels [count, count] of true class (row) and predicted class (column); gt -1 = none."""
    known = gt >= 0
    return torch.bincount(gt[known] * count + pred[known], minlength=count * count).view(count, count)


def mean_iou(confusion, names):
    """{miou, iou_NAME...} of the classes that are there, in truth or in prediction."""
    both = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1) - both
    iou = {f"iou_{name}": float(b / e) for name, b, e in zip(names, both, either) if e > 0}
    return {"miou": mean(list(iou.values())), **iou}


HEADS = {"depth": DepthProbe, "normals": NormalsProbe, "segmentation": SegmentationProbe}
NO_IMAGE = "no image"  # the row of what can be known without looking


def linear(task, models, settings, folder):
    """{model: [one {metric: value} per seed]} of a linear probe on features that are made once, and
    what a prediction that looks at no image gets. Seeds differ in the probe's first weights and the
    order of frames."""
    head = HEADS[task]
    train, test, names = open_frames(task, settings)
    results, panels = {}, {}
    width = max(sum(vit.embed_dim for vit in m.vits) for m in models) * len(settings.layers or "1")
    with data.scratch(settings.cache, train.kept_bytes(width) + test.kept_bytes(width)) as place:
        for model in models:
            shelves = [shelve(place / f.part, head, model, f, settings) for f in (train, test)]
            found = probe_features(model.name, head, names, *shelves, settings)
            results[model.name], panels[model.name] = found
        blind, results[NO_IMAGE] = without_image(head, names, train, shelves[1], settings)
    for n in range(min(4, len(test))):
        frame = test[n]
        photo = data.joined(frame["images"], frame["places"], frame[head.label].shape[-2:])
        drawn = {"photo": photo.permute(1, 2, 0)}
        for name, predictions in panels.items():
            two = blind.draw(predictions[n], frame)
            drawn |= {"truth": two["truth"], name: two["predicted"]}
        write_sheet(folder / f"{task}_{n}.png", drawn, warning_of(models))
    return results


def open_frames(task, settings):
    """`data.labelled` by the settings, which learn how far depth goes."""
    size = settings.image_size and tuple(settings.image_size)
    framing = data.Framing(size)
    if settings.protocol == "paper":
        framing = data.PUBLISHED[task]
        framing = framing._replace(size=size or framing.size)
    if task == "depth":
        settings.max_depth = settings.max_depth or data.farthest(settings.data)
    options = dict(classes=getattr(settings, "classes", None), copies=settings.copies)
    counts = settings.train_frames, settings.test_frames
    return data.labelled(task, settings.data, framing, *counts, **options)


def shelve(path, head, model, frames, settings):
    """A `Shelf` of each frame's features, cls tokens, label and places."""
    shelf, known = data.Shelf(path), False
    progress = Progress(len(frames), f"{model.name}: {path.name} frame")
    for frame in loaded(frames):
        label = frame[head.label]
        known = known or bool((label != head.unknown).any())
        shelf.append(*extract(model, frame["images"], settings), label, frame["places"])
        progress.step()
    if not known:
        what = f"none of the {path.name} frames has any {settings.task} that is known"
        raise ValueError(f"{settings.data}: {what}")
    return shelf


def probe_features(name, head, names, train, test, settings):
    """A probe for every seed: their metrics, and the first one's first four predictions."""
    rows, shown = [], None
    key, sign = head.best
    for seed in range(settings.seed, settings.seed + settings.seeds):
        checked = []
        for probe in fit(head, names, train, settings, seed):
            measured, predictions = over_frames(probe, test)
            checked.append((average(measured, names), predictions))
        # Where nothing is known the metric is None
        rank = lambda row: (row[key] is not None, sign * (row[key] or 0))  # noqa: E731
        row, predictions = max(checked, key=lambda c: rank(c[0]))
        rows.append(row)
        shown = shown or predictions
        said = [f"{k} {cell(v, None)}" for k, v in list(row.items())[:5]]
        print(f"{name}, seed {seed}: " + "   ".join(said))
    return rows, shown


def new_probe(head, names, shelf, settings):
    (_, channels, *_), (_, classes) = shelf.shapes(0)[:2]
    options = {k: getattr(settings, k) for k in ("max_depth", "gradient_weight") if k in settings}
    return head(channels, classes=classes, names=names, **options)


SCHEDULES = {  # of the learning rate, by the share of steps since the warm-up, and of all
    "quarter": lambda since, all: 0.01 + 0.99 * math.cos(0.5 * math.pi * since),  # Probe3D's
    "half": lambda since, all: 0.5 + 0.5 * math.cos(math.pi * all),  # DINOv2's, for depth
    "linear": lambda since, all: 1 - all,  # and for segmentation
}


def learning_rate(i, steps, settings):
    """The factor of step i: it climbs evenly in the warm-up, then follows the schedule."""
    warmup = max(1, round(settings.warmup * steps))
    since = max(0.0, min(1.0, (i - warmup) / max(1, steps - warmup)))
    factor = SCHEDULES[settings.schedule](since, min(1.0, i / steps))
    if settings.schedule == "quarter":
        return 0.01 + 0.99 * i / warmup if i <= warmup else factor
    return factor * min(1.0, 0.001 + i / warmup)


def fit(head, names, shelf, settings, seed):
    """Train a probe on a shelf by AdamW. Yields it, in eval mode, at each of the checks."""
    torch.manual_seed(seed)
    probe, count = new_probe(head, names, shelf, settings).to(DEVICE), len(shelf)
    steps = settings.steps or settings.epochs * math.ceil(count / settings.batch_size)
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr, weight_decay=decay)
    factor = functools.partial(learning_rate, steps=steps, settings=settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    checks = {steps * k // settings.checks for k in range(1, settings.checks + 1)}
    progress = Progress(steps, f"seed {seed}, step")
    epochs = (torch.randperm(count).split(settings.batch_size) for _ in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        features, classes, labels, _ = zip(*(shelf[i] for i in batch.tolist()))
        features, classes = (torch.cat(t).to(DEVICE) for t in (features, classes))
        label = torch.stack(labels).to(DEVICE)
        prediction, known = probe(features, classes, label.shape[-2:]), label != head.unknown
        loss = probe.loss(prediction, {head.label: label}) if known.any() else 0 * prediction.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), settings.clip or math.inf)
        optimizer.step()
        schedule.step()
        if steps > 1000:
            progress.step()
        if step in checks:
            yield probe.eval()
            probe.train()


@torch.no_grad()
def over_frames(probe, shelf, constant=None):
    """What a probe's `measure` says of its predictions for a shelf's frames, or of one and the same
    stretched to each, {name: [N, ...]}; and the first four predictions."""
    measured, predictions = [], []
    for i in range(len(shelf)):
        features, classes, label, places = shelf[i]
        if constant is None:
            windows = probe(features.to(DEVICE), classes.to(DEVICE), places[0, 5:].tolist())
            prediction = data.joined(windows.cpu(), places, label.shape[-2:])
        else:
            prediction = data.resized(constant, label.shape[-2:], "nearest")
        measured.append(probe.measure(prediction[None], {probe.label: label[None]}))
        predictions += [prediction] * (i < 4)
    return {k: torch.cat([m[k] for m in measured]) for k in measured[0]}, predictions


@torch.no_grad()
def without_image(head, names, train, test, settings):
    """A probe, and the row of the prediction that looks at no image: what at most 500 training
    labels, stretched to one size, say of each pixel."""
    labels = [data.small(frame[head.label]) for frame in loaded(train.as_tested(500))]
    labels = torch.stack([data.resized(x, labels[0].shape[-2:], "nearest") for x in labels])
    probe = new_probe(head, names, test, settings)
    measured, _ = over_frames(probe, test, from_labels(probe, labels))
    return probe, [average(measured, names)]


def from_labels(probe, labels):
    """What labels [N, ..., H, W] say of each pixel; the median of that where they say nothing."""
    said = torch.cat([probe.blind(data.full(rows)) for rows in labels.split(32, -2)], -2)
    return said.nan_to_num(float(said.nanmedian()))


def average(measured, names):
    """{metric: mean over the frames}, or of confusions [N, classes, classes] the IoU of their sum."""
    if "confusion" in measured:
        return mean_iou(measured["confusion"].sum(0), names)
    return {k: float(v.mean()) if len(v) else None for k, v in measured.items()}


# ----------------------------------------------------------------------------- reconstruction


def psnr(photo, truth):
    """Of photos [3, H, W] in 0..1, in dB."""
    return float(-10 * (photo - truth).square().mean().clamp(min=1e-10).log10())


def depth_errors(depth, truth, seen):
    """Mean of |depth / truth - 1| where depth is known and seen, as it is and after scaling by the median of
    truth / depth. All [H, W]; None where nothing is known."""
    known = (truth > 0) & seen & (depth > 0)
    if not known.any():
        return {"abs_rel": None, "abs_rel_scaled": None}
    ratio = depth[known] / truth[known]
    scaled = ratio * (1 / ratio).median()
    return {"abs_rel": float((ratio - 1).abs().mean()), "abs_rel_scaled": float((scaled - 1).abs().mean())}


def constant_depth(context):
    """Sensor depth's Gaussians if all was at the median of what the sensor saw: the best that one number can do."""
    median = context["depths"][context["depths"] > 0].median()
    return SensorDepth()(context | {"depths": torch.full_like(context["depths"], float(median))})


@torch.no_grad()
def reconstruction(settings, folder):
    """PSNR of the target view and abs rel of its depth, for every way to come by them: means over the scenes.

    Beside the table: how much of the way from one constant depth to sensor depth (in PSNR) photos come, and seconds.
    """
    H, W = settings.image_size
    scenes = data.open_scenes(settings.data) if settings.data else data.Rooms("probe")
    gaps = dict(min_gap=settings.min_gap, max_gap=settings.max_gap)
    views = data.Views(scenes, H, W, **gaps, seed=settings.seed, length=settings.scenes)
    ways = {}
    for name in settings.weights:
        reconstructor = load_reconstructor(None if name == "shipped" else name)
        ways[f"photos alone, {name}"] = FeedForward(reconstructor.to(DEVICE), settings.near, settings.far)
    ours = list(ways)
    if all(scene.has_depth for scene in scenes) if settings.data else True:
        ways = {"one constant depth": constant_depth} | ways | {"sensor depth": SensorDepth()}
    rows = {name: [] for name in ("nearest context photo", *ways)}
    seconds, progress = {name: [] for name in ours}, Progress(settings.scenes, "scene")
    for i in range(settings.scenes):
        sample = move(views[i], DEVICE)
        target, context = sample["target"], {k: v[None] for k, v in sample["context"].items()}
        away = (context["extrinsics"][0, :, :3, 3] - target["extrinsics"][:3, 3]).norm(dim=-1)
        nearest = {k: v[0, away.argmin()] for k, v in context.items()}
        unknown = torch.zeros(H, W, device=DEVICE)
        drawn = {"nearest context photo": (nearest["images"], nearest.get("depths", unknown), unknown == 0)}
        for name, way in ways.items():
            started = time.time()
            gaussians = way(context)
            if name in ours:
                float(gaussians.means.sum())  # waits for a GPU
                seconds[name].append(time.time() - started)
            if i == 0 and name == ours[0]:
                save_ply(folder / "scene.ply", gaussians)
            photo, depth, alphas = render(gaussians, target["extrinsics"][None], target["Ks"][None], W, H)
            drawn[name] = (photo[0], depth[0], alphas[0] > 0.5)
        for name, (photo, depth, seen) in drawn.items():
            row = {"psnr": psnr(photo, target["images"]), "holes": float((~seen).float().mean())}
            rows[name].append(row | depth_errors(depth, target.get("depths", unknown), seen))
        if i < 4:
            panels = {"target photo": target["images"].permute(1, 2, 0)}
            for name, (photo, depth, seen) in drawn.items():
                panels |= {
                    name: photo.permute(1, 2, 0),
                    " " * len(panels) + "depth": depth_colours(depth.cpu(), (seen & (depth > 0)).cpu()),
                }
            write_sheet(folder / f"scene_{i}.png", panels)
        progress.step()
    table = {name: [{k: mean([row[k] for row in of]) for k in of[0]}] for name, of in rows.items()}
    if "sensor depth" in ways:
        low, high = (table[name][0]["psnr"] for name in ("one constant depth", "sensor depth"))
        for name in ours if high > low else ():  # a sensor with holes may see less than one depth for all
            table[name][0]["closed"] = (table[name][0]["psnr"] - low) / (high - low)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if DEVICE == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    for name in ours:
        median = float(np.median(seconds[name]))
        print(f"{name}: two photos of {H} x {W} to Gaussians in {median:.2f} s")
        table[name][0]["seconds"] = median
    print(f"Peak memory of all this, {'on the GPU' if DEVICE == 'cuda' else 'of the process'}: {memory:.2f} GiB")
    return table


# ----------------------------------------------------------------------------- running, printing, writing


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def loaded(dataset):
    """A dataset's items, prepared one ahead by another process."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)


class Progress:
    """A line now and then: how many, how fast, how long yet."""

    def __init__(self, total, what):
        self.total, self.what, self.done, self.started = total, what, 0, time.time()

    def step(self):
        self.done += 1
        if self.done == self.total or self.done % max(1, self.total // 5) == 0:
            rate = self.done / (time.time() - self.started)
            left = (self.total - self.done) / rate
            print(f"{self.what} {self.done}/{self.total}   {rate:.2f} a second   {left:.0f} s left", flush=True)


def summarise(results):
    """{model: [{metric: value} per seed]} -> {model: {metric: (mean, spread)}}: spread is the standard deviation over
    seeds, None for a single one."""
    summary = {}
    for name, rows in results.items():
        summary[name] = {}
        for key in {k: None for row in rows for k in row}:
            values = [row[key] for row in rows if row.get(key) is not None]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            summary[name][key] = (mean(values), spread)
    return summary


def differences(results):
    """Each further model minus the first, seed by seed: what both saw alike cancels."""
    first, *others = (name for name in results if name != NO_IMAGE)
    rows = {}
    for other in others:
        rows[f"{other} - {first}"] = [
            {k: b[k] - a[k] for k in a if a[k] is not None and b.get(k) is not None}
            for a, b in zip(results[first], results[other])
        ]
    return rows


def cell(value, spread):
    return "-" if value is None else f"{value:.4f}" + (f" +- {spread:.4f}" if spread is not None else "")


def print_table(summary):
    """A line for each metric, a column for each model, of {model: {metric: (value, spread)}}."""
    keys = list({k: None for row in summary.values() for k in row if not k.startswith("iou_")})
    cells = [["", *summary]]
    cells += [[k, *(cell(*row.get(k, (None, None))) for row in summary.values())] for k in keys]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print()
    for first, *rest in cells:
        print(f"{first:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(rest, widths[1:])))


def measure(task, settings, models, home):
    """One task: run, print, write."""
    folder = free_folder(home / "evaluation", task)  # what was measured before stays
    folder.mkdir(parents=True)
    warning = warning_of(models)
    started = time.time()
    try:
        if task == "reconstruction":
            results = reconstruction(settings, folder)
        elif task == "correspondence":
            results, paired = correspondence(models, settings, folder)
        else:
            results = linear(task, models, settings, folder)
    except BaseException:
        if not any(folder.iterdir()):  # it failed before there was anything to look at
            folder.rmdir()
        raise
    compared = results if task == "reconstruction" else results | differences(results)
    summary = summarise(compared)
    print_table(summary)
    if task == "correspondence" and len(models) > 1:
        by_pair = paired_differences(paired)
        print("\nPair by pair: mean difference +- its standard error (by viewpoint: in results.json)")
        shown = METRICS[:4]
        print_table({k: {name: row[k] for name, row in by_pair.items()} for k in shown})
    report = {
        "task": task, "random_weights": warning == RANDOM, "settings": vars(settings), "seconds": round(time.time() - started, 1),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "summary": {name: {k: {"mean": m, "spread": s} for k, (m, s) in row.items()} for name, row in summary.items()},
        "per_seed": results,
    }  # fmt: skip
    if task == "correspondence" and len(models) > 1:
        report["paired"] = {
            name: {k: {"mean": m, "standard_error": e} for k, (m, e) in row.items()} for name, row in by_pair.items()
        }
    if warning:
        report["warning"] = warning
        banner(warning)
    replace_file(folder / "results.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    print(f"Written to {folder}/ in {report['seconds']:.0f} s")


def main(arguments=None):
    settings = parse_settings(arguments)
    warnings.showwarning = lambda message, *_: print(f"Note: {message}")
    try:
        models, home = ([], Path("runs")) if settings.task == "reconstruction" else load_models(settings)
        if warning := warning_of(models):
            banner(warning)
        for task in PROBES if settings.task == "all" else [settings.task]:
            # --task all has the tasks' settings by the protocol; for one task all are given already
            each = argparse.Namespace(**of_protocol(task, settings) | vars(settings))
            if task != "reconstruction" and each.norm is None:
                each.norm = task == "segmentation"
            measure(task, each, models, home)
    except ValueError as error:  # bad input, named in one sentence; a data worker puts its traceback before that
        raise SystemExit(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


if __name__ == "__main__":
    main()
