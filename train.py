"""Train a student: python train.py --teacher dinov2_vits14 [--data FOLDER] [--SETTING VALUE ...]
or a network that turns photos into Gaussians: python train.py --stage reconstruct [...]
or a small teacher, from single photos: python train.py --stage pretrain [...]

The default trains on procedural rooms, sized for a CPU; --data trains on photos, as the papers do.
runs/NAME/ gets student.safetensors (reconstructor.safetensors, teacher.safetensors), metrics.jsonl
with a line per step, preview_*.png of views that training does not see, and checkpoint.pt, from
which python train.py --resume runs/NAME goes on. Ctrl-C finishes the step, saves, and stops.

On many GPUs: torchrun --nproc-per-node 8 train.py [...]. --batch-size is per process.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import glob
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

import data
from model import (
    Block, Pretraining, SplatAndDistill, WeightsNotFound, load_vit, merge_lora, patch_tokens,
    read_metadata, sizes_of,
)  # fmt: skip
from reconstruct import (
    SMALL, AttentionLayer, FeedForward, Reconstruction, ReconstructorConfig, ResidualBlock,
    SensorDepth, UNetResidual, load_reconstructor, new_reconstructor, render,
)  # fmt: skip


class Setting(NamedTuple):
    """A flag: its defaults in two presets (or None), its help, and the values it takes."""

    demo: bool | int | float | str | None
    paper: bool | int | float | str | None
    help: str
    low: float = -1e9  # of a number, inclusive; so is high
    high: float = 1e9
    choices: tuple | None = None


def changed(rows, **values):
    """The rows with other defaults {name: (demo, paper)}."""
    return rows | {k: rows[k]._replace(demo=d, paper=p) for k, (d, p) in values.items()}


# demo: procedural rooms on two CPU cores.
# paper: photos, as published on ScanNet++ and, for MVSplat, on RealEstate10K; pretrain's are ours.
POSITIVE = 1e-12  # low of a number that must be more than 0
SIDE, WIDTH = 4096, 65_536  # high of an image's side and of a layer: a typo must not fill memory
TEACHERS = "dinov2_vit{s,b,l,g}14[_reg], dinov3_vit{s16,s16plus,b16,l16}, vit_tiny14"
TRAINING = {
    "data": Setting(None, None, "folder of photos (README); default: procedural rooms"),
    "name": Setting(None, None, "of the run; default: its kind and the next free number"),
    "height": Setting(288, 288, "of the images, pixels; a reconstructor takes multiples of 16",
                      high=SIDE),
    "width": Setting(288, 288, "likewise", high=SIDE),
    "batch_size": Setting(4, 64, "scenes or photos a step, of each process", 1, 4096),
    "accumulate": Setting(1, 1, "batches of each process in a step: the mean of their losses", 1),
    "steps": Setting(5000, 100_000, "of the optimiser", 1),
    "lr": Setting(1e-3, 1e-3, "peak learning rate", POSITIVE, 10),
    "warmup": Setting(0.05, 0.01, "share of the steps in which lr climbs, before a cosine", 0, 1),
    "weight_decay": Setting(0.05, 0.05, "of AdamW; 0 makes it the papers' Adam", 0),
    "clip": Setting(1.0, 1.0, "largest norm of the gradients", POSITIVE),
    "preview_every": Setting(500, 1000, "steps between previews", 1),
    "checkpoint_every": Setting(250, 1000, "steps between checkpoints", 1),
    "keep": Setting(1, 1, "checkpoints: the newest, and older ones as checkpoint_STEP.pt", 1),
    "seed": Setting(0, 0, "of everything random", 0, 2**32),
    "workers": Setting(1, 4, "processes that load data", 0, 256),
    "compile": Setting(False, False, "networks by torch.compile: a slow first step, then faster"),
}
PRECISION = {"precision": Setting("auto", "auto", "of the ViTs; auto: bf16 on a GPU that has it; "
                                  "with float32 nothing is TF32",
                                  choices=("auto", "float32", "bf16", "fp16"))}  # fmt: skip
PRETRAIN = TRAINING | PRECISION | {
    "teacher": Setting("vit_tiny14", "vit_tiny14", TEACHERS),
    "crop": Setting(224, 224, "side of the crops, pixels; a multiple of the patch", high=SIDE),
    "least_scale": Setting(0.7, 0.7, "of a photo's side that a crop shows", POSITIVE, 1),
    "most_scale": Setting(0.85, 0.85, "likewise", POSITIVE, 1),
    "warp": Setting(0.0, 0.0, "of a crop: 1 turns, stretches and mirrors it, 0 only shifts", 0, 1),
    "photos": Setting(2400, 2400, "views of rooms to train on; of a folder all are", 1),
    "temperature": Setting(0.07, 0.07, "of the contrast between spots", POSITIVE),
    "place_weight": Setting(0.1, 0.1, "of a second loss: where in the photo a patch lies", 0),
    "start": Setting("random", "random", "weights to begin with, or a file"),
}
VIEWS = changed(TRAINING, batch_size=(1, 1), weight_decay=(0.0, 0.0), preview_every=(250, 1000)) | {
    "split": Setting(None, None, "text file of the scenes in --data to take, one name a line"),
    "context_views": Setting(2, 2, "views that are lifted to 3D", 1, 256),
    "min_gap": Setting(8, 8, "least frames from the first to the last context view: parallax"),
    "max_gap": Setting(12, 12, "most frames between them: overlap"),
    "target": Setting("between", "between", "the context views, or any frame as the paper's code",
                      choices=("between", "any")),
    "near": Setting(3.0, 3.0, "near plane, in units of the context baseline", POSITIVE),
    "far": Setting(50.0, 50.0, "far plane, likewise; the papers: 1 and 100 units"),
}  # fmt: skip
RECONSTRUCT = changed(
    VIEWS, height=(224, 256), width=(224, 256), batch_size=(1, 14), steps=(2000, 300_000),
    lr=(1e-3, 2e-4),  # the small network tolerates a higher one
) | {
    "start": Setting("small", "published", "random network: small or published; or a file"),
    "coarse": Setting(3, 0, "cheap steps that only match views, for every one that renders", 0),
    "depth_weight": Setting(0.2, 0.2, "of the depth error, where depth is known", 0),
    "precision": Setting("auto", "auto", "auto: a GPU's convolutions may be TF32",
                         choices=("auto", "float32")),
}  # fmt: skip
METHOD = {  # SplatAndDistill's arguments
    "lora_rank": Setting(0, 8, "of the student's LoRA; 0: all weights, for few steps", 0, WIDTH),
    "lora_alpha": Setting(8.0, 8.0, "LoRA's scale is alpha / rank"),
    "lora_dropout": Setting(0.1, 0.1, "on LoRA's input", 0, 1),
    "loss": Setting("contrastive", "prototypes", "the paper's is prototypes",
                    choices=("prototypes", "contrastive", "both")),
    "temperature": Setting(0.07, 0.07, "of the contrastive loss", POSITIVE),
    "targets": Setting("splatted", "splatted", "own, as a control: the target view's features",
                       choices=("splatted", "own")),
    "prototypes": Setting(1024, 65_536, "of the heads; 65,536: seconds a step on a CPU", 1, 2**20),
    "head_dim": Setting(512, 2048, "hidden width of the heads", 1, WIDTH),
    "bottleneck_dim": Setting(128, 256, "width before the prototypes", 1, WIDTH),
    "upsampling": Setting("centred", "mask-aware", "of features to pixels: mask-aware (the paper's "
                          "code), the same centred on patches, or bilinear across segments",
                          choices=("mask-aware", "centred", "bilinear")),
    "blend": Setting(1.0, 0.5, "share of a splatted feature against its segment's mean", 0, 1),
    "centring": Setting(1.0, 1.0, "momentum of the teacher's mean logits; 1: not centred", 0, 1),
    "teacher_temperature": Setting(0.1, 1.0, "of the teacher's logits", POSITIVE),
    "student_temperature": Setting(0.1, 1.0, "of the student's logits", POSITIVE),
}  # fmt: skip
DISTILL = METHOD | PRECISION | changed(
    VIEWS, height=(224, 576), width=(224, 880), steps=(220, 300_000), warmup=(0.1, 0.01),
    lr=(1.5e-4, 2e-5),  # the demo takes 1,000 times fewer steps
    min_gap=(32, 8), max_gap=(64, 12),  # rooms' depth is exact: views far apart teach more
) | {
    "teacher": Setting("dinov2_vits14", "dinov2_vits14", TEACHERS),
    "teacher_weights": Setting(None, None, 'a file, or "random"; default: the public weights'),
    "geometry": Setting("depth", "shipped", "depth maps, the shipped reconstructor, or a file"),
    "momentum": Setting(0.97, 0.999, "of the teacher's EMA; a low one suits few steps", 0, 1),
    "ema_every": Setting(1, 10, "steps between updates of the teacher", 1),
}  # fmt: skip
SETTINGS = {"distill": DISTILL, "reconstruct": RECONSTRUCT, "pretrain": PRETRAIN}
# (a setting, its value, the settings that are unused then, why)
UNUSED = (
    ("geometry", "depth", {"near", "far"}, "it bounds the depth of photos"),
    ("loss", "contrastive", {"prototypes", "head_dim", "bottleneck_dim", "centring",
                             "teacher_temperature", "student_temperature"}, "there are no heads"),
    ("loss", "prototypes", {"temperature"}, "it belongs to the contrastive loss"),
    ("lora_rank", 0, {"lora_alpha", "lora_dropout"}, "without LoRA all weights are trained"),
    ("data", None, {"split"}, "it lists the scenes of a folder"),
)  # fmt: skip
FOR_PHOTOS = ("geometry", "min_gap", "max_gap")  # with --data the paper's in both presets
PATHS = {"data", "split", "teacher_weights", "geometry", "start"}
WORDS = (None, "random", "shipped", "depth", "small", "published")  # values of those, not paths
RANDOM = ("RANDOM TEACHER WEIGHTS: this run shows that the pipeline works, "
          "not what the method achieves")  # fmt: skip
SHIPPED = ("Teacher: vit_tiny14, this repository's own, trained on procedural rooms "
           "(weights/teacher.safetensors)")  # fmt: skip


def flag(name):
    return "--" + name.replace("_", "-")


def add_settings(parser, rows, titles=("demo", "paper")):
    """Add a flag for each row, without a default: the preset decides later."""
    for name, row in rows.items():
        options, help = {"type": type(row.paper), "choices": row.choices}, row.help
        if row.paper is None:
            options["type"] = str
        else:
            help += f" ({titles[0]} {row.demo}, {titles[1]} {row.paper})"
        if isinstance(row.paper, bool):
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=help, **options)


def check_settings(rows, values):
    """SystemExit for the first of values {name: value} of a wrong type or out of range."""
    for name, row in rows.items():
        value = values[name]
        types = [str, NoneType] if row.paper is None else [type(row.paper)]
        if type(value) not in types:
            raise SystemExit(f"{flag(name)} cannot be {value!r}")
        if isinstance(value, (int, float)) and not row.low <= value <= row.high:  # or it is NaN
            least = "more than 0" if row.low == POSITIVE else f"at least {row.low}"
            bound = f"at most {row.high}" if value > row.high else least
            raise SystemExit(f"{flag(name)} must be {bound}, not {value}")
        if name == "name" and value is not None and (Path(value).name != value or value == ".."):
            what = "a folder's in runs/, without / or dots alone"
            raise SystemExit(f"--name is {what}, not {value!r}")


def parse_settings(arguments=None):
    """The command line as {setting: value}, or {"resume": folder} for that run's settings."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--stage", choices=list(SETTINGS), default="distill", help="what to train")
    add("--preset", choices=["demo", "paper"], help="default: paper with --data, demo without")
    add("--resume", metavar="RUN", help="folder, or a checkpoint in it, to go on from as it was")
    rows = SETTINGS[parser.parse_known_args(arguments)[0].stage]
    add("-h", "--help", action="help", help="show this and exit")
    add_settings(parser, rows)
    given = vars(parser.parse_args(arguments))
    if (folder := given.pop("resume")) is not None:
        if any(not a.startswith("--resume") for a in arguments if a.startswith("--")):
            raise SystemExit("--resume takes the run's own settings: no other flag goes with it")
        return {"resume": folder}
    preset = given["preset"] or ("paper" if given.get("data") else "demo")
    settings = {k: row.paper if preset == "paper" else row.demo for k, row in rows.items()}
    if given.get("data"):
        settings |= {k: rows[k].paper for k in FOR_PHOTOS if k in rows}
    settings |= given | {"preset": preset}
    check(settings)
    for name, value, unused, why in UNUSED:
        if settings.get(name) == value and (wrong := sorted(unused & given.keys())):
            case = f"with {flag(name)} {value}" if value is not None else f"without {flag(name)}"
            raise SystemExit(f"{flag(wrong[0])} is not read {case}: {why}")
    for name in settings.keys() & PATHS:  # absolute, to resume from any folder
        if settings[name] not in WORDS and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    if settings["data"] and "near" in rows and not {"near", "far"} & given.keys():
        settings["points"] = True  # load_views may set near and far
    return settings


def check(settings):
    """SystemExit for the first setting that is out of its range or does not fit the others."""
    stage = settings["stage"]
    check_settings(SETTINGS[stage], settings)
    patch = sizes_of(settings["teacher"])["patch"] if "teacher" in settings else 16
    step = 1 if stage == "pretrain" or settings.get("geometry") == "depth" else 16
    sizes = ("height", patch, step), ("width", patch, step), ("crop", 2 * patch, patch)
    for name, least, unit in sizes:
        value = settings.get(name, least)
        if value < least or value % unit:
            multiple = f"a multiple of {unit}, " if unit > 1 else ""
            raise SystemExit(f"{flag(name)} must be {multiple}at least {least}, not {value}")
    if stage != "pretrain" and not settings["far"] > settings["near"]:
        raise SystemExit("--far must be more than --near")
    if stage == "pretrain" and settings["least_scale"] > settings["most_scale"]:
        raise SystemExit("--most-scale must be at least --least-scale")


def command(settings):
    """The command line that gives these settings."""
    preset = ["--stage", settings["stage"], "--preset", settings["preset"]]
    defaults = parse_settings(preset)
    flags = [flag(name) if value is True else f"{flag(name)} {value}"
             for name, value in settings.items() if value != defaults[name]]  # fmt: skip
    return " ".join(["python train.py", *preset, *flags])


# ------------------------------------------------------------------------------ what is trained
def load_teacher(settings):
    """The teacher's ViT, and a warning about its weights or None.

    On rooms the shipped teacher replaces public weights that are missing, in the settings too.
    With --data that is an error (SystemExit).
    """
    name, weights, seed = (settings[k] for k in ("teacher", "teacher_weights", "seed"))
    if weights == "random":
        return load_vit(name, "random", seed), RANDOM
    try:
        return load_vit(name, weights), SHIPPED if (name, weights) == ("vit_tiny14", None) else None
    except WeightsNotFound as error:
        if settings["data"]:
            raise SystemExit(f"{error} (--teacher-weights FILE)") from None
        say(f"{error}\nThe shipped teacher, vit_tiny14, stands in for it.")
        settings["teacher"] = "vit_tiny14"
        return load_vit("vit_tiny14"), SHIPPED


def load_views(settings, num_shown):
    """Views to train on, and a batch for previews: of unseen rooms, or of the same captures.

    A capture's points set near and far, unless a flag does.
    """
    options = {k: settings[k] for k in ("height", "width", "min_gap", "max_gap", "target")}
    options["num_context"] = settings["context_views"]
    path, split, seed = (settings[k] for k in ("data", "split", "seed"))
    scenes = data.open_scenes(path, split) if path else data.Rooms("train")
    views = data.Views(scenes, **options, seed=seed, length=0)  # `Run.batches` sets the length
    from_points = settings.pop("points", False) and settings.get("geometry") != "depth"
    if from_points and (found := views.point_range()):
        near, far = (float(f"{depth:.3g}") for depth in found)  # three digits
        say(f"{path}: by its points, --near {near:g} --far {far:g}")
        settings.update(near=near, far=far)
    held_out = scenes if path else data.Rooms("val")
    shown = data.Views(held_out, **options, seed=seed + 1, length=num_shown)
    return views, default_collate([shown[i] for i in range(num_shown)])


def autocast(precision):
    """The autocast context in which a ViT runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "float32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}[precision]
    return torch.autocast(device, dtype, enabled=dtype is not None)


class Distill:
    """A student learns what its teacher sees from other views (Splat and Distill).

    Every stage has `views` to train on, a batch `shown` in previews, a `model`, a `warning` about
    its weights or None, and `notes` for each line of metrics.jsonl.
    """

    filename = "student.safetensors"
    summary = ("Cosine with the teacher's own features of the target view: splatted "
               "{cosine_splatted}, context left unwarped {cosine_unwarped}")  # fmt: skip
    then = "is it better at 3D than its teacher? python evaluate.py --task correspondence"

    def __init__(self, settings):
        self.settings = settings
        self.views, self.shown = load_views(settings, 1)
        if path := settings["data"]:
            scenes = data.some(self.views.scenes)
            no_depth = sum(not scene.has_depth for scene in scenes)
            no_masks = sum(not scene.has_masks for scene in scenes)
            if no_depth and settings["geometry"] == "depth":
                lack = f"no depth maps in {no_depth} of {len(scenes)} scenes"
                raise ValueError(f"{path}: {lack}; with another --geometry photos suffice")
            if no_masks:
                say(f"No segment masks in {no_masks} of {len(scenes)} scenes: no blending there")
            self.then = "load it: model.load_vit('{teacher}', '{weights}')"
        vit, self.warning = load_teacher(settings)
        self.notes = {"random_weights": self.warning == RANDOM}
        torch.manual_seed(settings["seed"])
        reconstruct = SensorDepth()
        if settings["geometry"] != "depth":
            network = load_reconstructor(settings["geometry"])
            reconstruct = FeedForward(network, settings["near"], settings["far"])
        self.model = SplatAndDistill(vit, reconstruct, **{k: settings[k] for k in METHOD})

    def step(self, model, batch, number, descend):
        """Forward through `model` (self.model or its DistributedDataParallel), backward by
        descend(loss). Returns {metric: scalar tensor}."""
        with autocast(self.settings["precision"]):
            loss, metrics, _ = model(batch)
        if descend(loss) and number % self.settings["ema_every"] == 0:
            self.model.update_teacher(self.settings["momentum"])
        return metrics

    def draw(self, batch):
        """Panels {title: [H, W, 3]} of the first scene, and {measure: scalar tensor}."""
        target = batch["target"]
        drawn = self.model.splat(batch["context"], target, batch["has_masks"])
        student = patch_tokens(self.model.student, target["images"])[0]  # [C, h, w]
        alpha = drawn["alphas"][0]  # [H, W]
        camera = target["extrinsics"], target["Ks"], *alpha.shape[::-1]
        depth = render(drawn["gaussians"], *camera)[1][0]  # [H, W]
        splatted = drawn["splatted"][0][:, ~drawn["holes"][0]]  # [C, locations]
        samples = torch.cat([splatted.T, student.flatten(1).T])
        teacher, student = pca_pictures(samples, [drawn["rendered"][0], student], alpha.shape)
        panels = {
            "target photo": target["images"][0].permute(1, 2, 0),
            "splatted teacher": teacher * (alpha > 0.5)[..., None],
            "student": student,
            "alpha": alpha[..., None].expand(-1, -1, 3),
            "depth": depth_colours(depth.cpu(), alpha.cpu() > 0.5),
        }
        return panels, self.model.alignment(batch, drawn)

    def export(self):
        """Weights {name: tensor}, and their metadata {key: string}."""
        return merge_lora(self.model.student), {k: json.dumps(v) for k, v in self.notes.items()}


class Reconstruct:
    """A network learns to turn two photos into Gaussians (MVSplat)."""

    filename = "reconstructor.safetensors"
    summary = "Views that were shown: {shown_psnr} dB, depth abs rel {shown_abs_rel}"
    then = "distill with it: python train.py --geometry {weights}"
    warning, notes = None, {}

    def __init__(self, settings):
        self.settings = settings
        self.views, self.shown = load_views(settings, 8)
        if settings["coarse"] and (path := settings["data"]):
            if not any(scene.has_depth for scene in data.some(self.views.scenes)):
                raise ValueError(f"{path}: no depth maps; with --coarse 0 photos suffice")
        torch.manual_seed(settings["seed"])
        start, sizes = settings["start"], {"small": SMALL, "published": ReconstructorConfig()}
        network = new_reconstructor(sizes[start]) if start in sizes else load_reconstructor(start)
        options = (settings[k] for k in ("near", "far", "depth_weight"))
        self.model = Reconstruction(network.requires_grad_(True), *options)

    def step(self, model, batch, number, descend):
        coarse = number % (self.settings["coarse"] + 1) != 0
        loss, metrics, _ = model(batch, coarse=coarse)  # in float32, which positions need
        descend(loss)
        return metrics

    def draw(self, batch):
        """Panels of the first scene, and mean errors of all scenes, rendered one by one."""
        target, drawn = batch["target"], []
        for i in range(len(target["images"])):
            scene = {part: {k: v[i : i + 1] for k, v in batch[part].items()}
                     for part in ("context", "target")}  # fmt: skip
            drawn.append(self.model(scene)[2])
        photo, depth, alphas = (torch.cat([d[k] for d in drawn])
                                for k in ("photo", "depth", "alphas"))  # fmt: skip
        valid = target.get("valid", torch.ones_like(alphas, dtype=torch.bool))  # [B, H, W]
        error = (photo - target["images"]).abs() * valid[:, None]  # [B, 3, H, W]
        panels = {
            "target photo": target["images"][0].permute(1, 2, 0),
            "rendering": photo[0].permute(1, 2, 0),
            "error x 4": 4 * error[0].permute(1, 2, 0),
            "depth": depth_colours(depth[0].cpu(), alphas[0].cpu() > 0.5),
        }
        squares, pixels = (error**2).sum((1, 2, 3)), valid.sum((1, 2))  # [B], [B]
        mse = (squares / (3 * pixels))[pixels > 0]
        measured = {"shown_psnr": -10 * mse.log10().mean()}
        if "depths" in target:
            truth = target["depths"]
            panels["true depth"] = depth_colours(truth[0].cpu(), truth[0].cpu() > 0)
            known = (truth > 0) & (alphas > 0.5)
            measured["shown_abs_rel"] = (depth / truth - 1).abs()[known].mean()
        return panels, measured

    def export(self):
        network = self.model.reconstruct.reconstructor
        return network.state_dict(), {"config": json.dumps(dataclasses.asdict(network.config))}


class Pretrain:
    """A small teacher learns to recognise a spot in two crops of a photo."""

    filename = "teacher.safetensors"
    summary = "Spots in unseen photos that find themselves in the other crop: {shown_matched}"
    then = "a student: python train.py --teacher {teacher} --teacher-weights {weights}"
    warning, notes = None, {}

    def __init__(self, settings):
        self.settings = settings
        folder, height, width, seed = (settings[k] for k in ("data", "height", "width", "seed"))
        photos = data.Photos(folder, height, width, settings["photos"])
        held_out = photos if folder else data.Photos(None, height, width, 8, "val")
        scales = settings["least_scale"], settings["most_scale"]
        crop = settings["crop"], scales, settings["warp"]
        self.views = data.Crops(photos, *crop, seed, length=0)
        shown = data.Crops(held_out, *crop, seed + 1, length=8)
        self.shown = default_collate([shown[i] for i in range(8)])
        self.shown["photos"] = torch.stack([held_out[i % len(held_out)] for i in range(4)])
        torch.manual_seed(seed)
        vit = load_vit(settings["teacher"], settings["start"], seed)
        options = settings["temperature"], settings["place_weight"], settings["start"] == "random"
        self.model = Pretraining(vit, *options)

    def step(self, model, batch, number, descend):
        with autocast(self.settings["precision"]):
            loss, metrics, _ = model(batch)
        descend(loss)
        return metrics

    def draw(self, batch):
        """Panels of photos and their features, and the share of spots that are matched."""
        photos = batch["photos"]
        features = patch_tokens(self.model.vit, photos)  # [B, C, h, w]
        samples = features.transpose(0, 1).flatten(1).T  # [B*h*w, C]
        panels = {}
        for i, picture in enumerate(pca_pictures(samples, features, photos.shape[2:])):
            panels[f"photo {i + 1}"] = photos[i].permute(1, 2, 0)
            panels[f"features {i + 1}"] = picture
        return panels, {"shown_matched": self.model(batch)[1]["matched"]}

    def export(self):
        return {k: v.half() for k, v in self.model.vit.state_dict().items()}, {}  # 6 MB to ship


STAGES = {"distill": Distill, "reconstruct": Reconstruct, "pretrain": Pretrain}


# ------------------------------------------------------------------------------ what is written
@contextlib.contextmanager
def defer_sigchld():
    """Call torch's handler of SIGCHLD at the end. It raises where a loader's process was killed,
    and the file that is being written would get the blame."""
    handler, late = signal.getsignal(signal.SIGCHLD), []
    signal.signal(signal.SIGCHLD, lambda *call: late.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if late and callable(handler):
        handler(*late[0])


def replace_file(path, write):
    """Replace a file atomically: write(temporary path), fsync, rename. ValueError: it cannot be
    written."""
    temporary = path.with_name(path.name + ".tmp")
    with defer_sigchld(), data.naming(path, "cannot be written"):
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def free_folder(parent, kind):
    """The first of parent/kind-1, parent/kind-2, ... that does not exist."""
    folders = (parent / f"{kind}-{i}" for i in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def pca_pictures(samples, maps, size):
    """Feature maps [C, h, w] as images [H, W, 3] in 0..1 of size (H, W): red, green and blue are
    the first principal components of samples [M, C], from their 2nd to their 98th percentile."""
    samples = samples.float()
    mean = samples.mean(0)
    axes = torch.linalg.svd(samples - mean, full_matrices=False).Vh[:3].T
    axes = axes * torch.sign(axes.sum(0) + 1e-12)  # an SVD's signs are arbitrary
    levels = torch.tensor([0.02, 0.98], device=samples.device)
    low, high = torch.quantile((samples - mean) @ axes, levels, dim=0)
    pictures = []
    for features in maps:
        colours = (features.flatten(1).T.float() - mean) @ axes  # [h*w, 3]
        colours = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        picture = colours.T.unflatten(1, features.shape[1:])[None]  # [1, 3, h, w]
        pictures.append(F.interpolate(picture, size, mode="nearest")[0].permute(1, 2, 0))
    return pictures


def depth_colours(depth, valid):
    """Depth [H, W] as an image [H, W, 3]: near yellow, far blue, black where not valid."""
    if not valid.any():
        return torch.zeros(*depth.shape, 3)
    stops = torch.tensor([[0.98, 0.91, 0.30], [0.90, 0.42, 0.30],
                          [0.55, 0.20, 0.52], [0.11, 0.12, 0.39]])  # fmt: skip
    samples = depth[valid][:: max(1, int(valid.sum()) // 100_000)]  # quantile's input is limited
    low, high = torch.quantile(samples, torch.tensor([0.02, 0.98]))
    at = ((depth - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * 2.999  # below the last stop
    i = at.long()
    return torch.lerp(stops[i], stops[i + 1], (at - i)[..., None]) * valid[..., None]


def to_image(picture):
    """A PIL image of a tensor [H, W, 3] in 0..1."""
    return Image.fromarray((picture.float().cpu() * 255 + 0.5).clamp(0, 255).byte().numpy())


def write_sheet(path, panels, warning=None):
    """Panels {title: [H, W, 3] in 0..1} side by side as a PNG; a warning above them, in red."""
    H, W = next(iter(panels.values())).shape[:2]
    header, gap = 18 * (2 if warning else 1), 4
    sheet = Image.new("RGB", (len(panels) * (W + gap) - gap, H + header), "white")
    pen, metadata = ImageDraw.Draw(sheet), PngInfo()
    for i, (title, panel) in enumerate(panels.items()):
        sheet.paste(to_image(panel), (i * (W + gap), header))
        pen.text((i * (W + gap) + 2, header - 15), title, fill="black")
    if warning:
        pen.text((2, 2), warning, fill=(200, 0, 0))
        metadata.add_text("warning", warning)
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG", pnginfo=metadata))


# ------------------------------------------------------------------------------ many processes
@contextlib.contextmanager
def many_processes():
    """Under torchrun: a process group. Only rank 0 prints; an error is printed once."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, count = next(dist.rendezvous("env://"))
    # After a restart torchrun's store still has the addresses of dead processes
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
        dist.barrier()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if isinstance(error, RuntimeError) and "Connection" in str(error):
            raise SystemExit(1) from None  # another process failed, and says why
        if rank:  # if all fail alike, torchrun ends this one before it prints the same
            time.sleep(5)
        raise
    dist.destroy_process_group()


def rank_and_count():
    """Under torchrun the rank and world size; else 0 and 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def folder_before_restart(settings):
    """If torchrun has restarted its processes, the folder to resume: the run of that name, or the
    newest of its kind, if it has a checkpoint; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    name = settings["name"]
    folders = glob.escape(name) if name else f"{kind_of(settings)}-*"
    logs = Path("runs").glob(f"{folders}/metrics.jsonl")  # a run without a checkpoint has it too
    newest = max(logs, key=os.path.getmtime, default=None)
    return newest.parent if newest and newest.with_name("checkpoint.pt").exists() else None


def any_process(value):
    """Whether the value is true in any process."""
    if dist.is_initialized():
        value = torch.tensor(int(value), device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


# ------------------------------------------------------------------------------ the run
def move(batch, device):
    """A batch's tensors, however nested, to a device."""
    if isinstance(batch, dict):
        return {k: move(v, device) for k, v in batch.items()}
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


def trained(model):
    """What training changes {name: tensor}: parameters, their EMA in the teacher, its centre."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    emas = [name.replace("student", "teacher", 1) for name in names if "student" in name]
    state = model.state_dict()
    return {name: state[name] for name in [*names, *emas, *{"centre"} & state.keys()]}


def signature(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def checksum(tensors):  # the same on any device
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


def read_checkpoint(path):
    """What Run.save wrote {name: value}, and the lines of metrics.jsonl up to there, as bytes.
    ValueError: it is damaged, or its parts contradict each other."""
    with data.naming(path, "not a checkpoint of train.py"):
        saved = torch.load(data.unpacked(path), map_location="cpu", weights_only=True)
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a bit of it has changed")
        settings, step, samples = (saved[k] for k in ("settings", "step", "samples"))
        lines = path.with_name("metrics.jsonl").read_bytes()[: saved["written"]]
        known = SETTINGS[settings["stage"]].keys() | {"stage", "preset"}
        if settings.keys() != known or settings["preset"] not in ("demo", "paper"):
            raise ValueError("its settings are those of another version")
        try:
            check(settings)
        except SystemExit as error:
            raise ValueError(error) from None
        logged = [json.loads(line)["step"] for line in lines.splitlines()]
        if {type(step), type(samples)} != {int} or samples < 0 or step > settings["steps"]:
            raise ValueError(f"step {step} of {settings['steps']}, {samples} samples")
        if logged != list(range(1, step + 1)):
            raise ValueError(f"metrics.jsonl lacks some of its {step} steps")
    return saved, lines


def compile_blocks(model, device):
    """Compile, in place, the blocks of which its networks have many. SystemExit: torch.compile
    does not work."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"--compile: torch.compile does not work here ({reason})") from None
    torch._dynamo.config.recompile_limit = 64  # a block has many shapes, in training and previews
    for module in model.modules():
        if isinstance(module, (Block, ResidualBlock, AttentionLayer, UNetResidual)):
            module.compile(dynamic=False)


def outlive_signals(done, _worker):
    """Signals reach loaders too: they ignore SIGINT, and SIGTERM until the run is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: done.is_set() and os._exit(0))


def kind_of(settings):  # names the run's folder
    return settings["preset"] if settings["stage"] == "distill" else settings["stage"]


class Run:
    """A stage with its optimiser, schedule, counters and folder. Only rank 0 writes."""

    def __init__(self, settings):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings, self.stage = settings, STAGES[settings["stage"]](settings)
        self.model = self.parallel = self.stage.model.to(self.device).train()
        # TF32 is for convolutions and splatted features: it would ruin products of cameras
        torch.backends.cudnn.allow_tf32 = settings["precision"] != "float32"
        torch.backends.cuda.matmul.allow_tf32 = False
        if settings["compile"]:
            compile_blocks(self.model, self.device)
        self.rank, self.processes = rank_and_count()
        if dist.is_initialized():  # a reconstructor's cheap steps use a part of it
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=True)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        changes = trained(self.model)
        self.frozen = checksum(t for k, t in self.model.state_dict().items() if k not in changes)
        lr, decay, total = settings["lr"], settings["weight_decay"], settings["steps"] + 1
        # OneCycleLR divides by zero if the warm-up takes one step
        warmup = settings["warmup"] if settings["warmup"] * total > 1 else 0.0
        self.optimizer = torch.optim.AdamW(self.trainable, lr, weight_decay=decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total, pct_start=warmup, cycle_momentum=False
        )
        fp16 = settings["precision"] == "fp16"
        self.scaler = torch.amp.GradScaler(self.device, enabled=fp16)
        self.step = self.samples = 0  # done; the samples of all processes
        self.start_step, self.seconds = 0, 0.0  # where this process began, the time before it
        self.started, self.asked_to_stop = time.monotonic(), False
        self.measured = {}  # by the last preview
        self.added, self.saved = 0, None  # batches of this step; step of checkpoint.pt
        start, self.origin = str(settings.get("start")), {}
        if start.endswith(".safetensors"):  # how those weights were made: read while they exist
            self.origin = {"start": json.dumps(read_metadata(start))}

    @classmethod
    def new(cls, settings):
        """A run in a folder of its own. SystemExit: its name is taken."""
        run = cls(settings)
        runs, name = Path("runs"), settings["name"]
        folder = run.folder = runs / name if name else free_folder(runs, kind_of(settings))
        if (folder / "checkpoint.pt").exists():
            raise SystemExit(f"{folder}: there is a run of that name; --resume goes on with it")
        if (folder / run.stage.filename).exists():
            raise SystemExit(f"{folder}: there are weights of a run without its checkpoint")
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            run.lock()
            (folder / "metrics.jsonl").write_text("")
        else:  # dropout differs by process
            torch.manual_seed(settings["seed"] + run.rank)
        return run

    @classmethod
    def load(cls, folder):
        """A run as its checkpoint has it. SystemExit: it does not fit, or nothing is left to do."""
        path = folder if folder.is_file() else folder / "checkpoint.pt"
        saved, lines = read_checkpoint(path)
        settings, step = saved["settings"], saved["step"]
        run = cls(settings)
        run.folder, run.samples = path.parent, saved["samples"]
        run.step = run.start_step = step
        run.saved = step if path.name == "checkpoint.pt" else None
        with data.naming(path, "not of this version, or damaged"):
            if signature(saved["model"]) != signature(trained(run.model)):
                raise ValueError("its parameters are not those that its settings train")
            run.model.load_state_dict(saved["model"], strict=False)
            run.optimizer.load_state_dict(saved["optimizer"])
            run.schedule.load_state_dict(saved["schedule"])
            run.scaler.load_state_dict(saved["scaler"])
            moments = [(p, s[k]) for p, s in run.optimizer.state.items() for k in s if k != "step"]
            if not all(p.isfinite().all() and m.shape == p.shape for p, m in moments):
                raise ValueError("NaN or infinite weights, or another optimiser's")
            rates = [group["lr"] for group in run.optimizer.param_groups]
            if run.schedule.last_epoch != step or run.schedule.get_last_lr() != rates:
                raise ValueError("its schedule is at another step")
            if saved["frozen"] != run.frozen:
                raise ValueError("the weights that it does not train are not those it began with")
            run.seconds, run.measured = float(saved["seconds"]), dict(saved["measured"])
            torch.set_rng_state(saved["rng"])
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
        if run.rank == 0:
            run.lock()
        if step >= settings["steps"]:
            if not (run.folder / run.stage.filename).exists():  # killed before it wrote them
                run.save()
            raise SystemExit(f"{run.folder}: has all its {step} steps already")
        if run.rank:  # dropout differs by process
            torch.manual_seed(settings["seed"] + run.rank + step)
        else:  # steps after the checkpoint are taken again
            replace_file(run.folder / "metrics.jsonl", lambda path: path.write_bytes(lines))
        return run

    def lock(self):
        """Lock the folder while this process lives. SystemExit: another has."""
        self.lock_file = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{self.folder}: another process is training there") from None

    def save(self):
        """Write the weights, and a checkpoint to go on from."""
        if self.rank:
            return
        settings, (weights, metadata) = self.settings, self.stage.export()
        seconds = self.seconds + time.monotonic() - self.started
        checkpoint = dict(
            step=self.step, samples=self.samples, seconds=seconds, measured=self.measured,
            settings=settings, model=trained(self.model), frozen=self.frozen, **self.stage.notes,
            optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
            rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all(),
            written=(self.folder / "metrics.jsonl").stat().st_size,
        )  # fmt: skip
        cpu = f"CPU, {torch.get_num_threads()} threads"
        metadata |= {
            "command": command(settings), "settings": json.dumps(settings), "step": str(self.step),
            "processes": str(self.processes), "hours": f"{seconds / 3600:.2f}",
            "measured": json.dumps(self.measured),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        } | self.origin  # fmt: skip
        if self.stage.warning:
            metadata["warning"] = self.stage.warning
        weights = {k: v.cpu().contiguous() for k, v in weights.items()}
        newest, older = self.folder / "checkpoint.pt", settings["keep"] - 1
        if older and self.saved not in (None, self.step):
            kept = self.folder / f"checkpoint_{self.saved:06d}.pt"
            replace_file(kept, lambda path: shutil.copyfile(newest, path))
            for path in sorted(self.folder.glob("checkpoint_*.pt"), key=data.natural)[:-older]:
                path.unlink()

        def write(path):
            with open(path, "wb") as file:  # given a path, torch.save does not say why it failed
                torch.save(checkpoint, file)

        replace_file(newest, write)
        self.saved = self.step
        path = self.folder / self.stage.filename
        replace_file(path, lambda path: path.write_bytes(save(weights, metadata)))

    def batches(self):
        """This process's remaining batches, a list of --accumulate per step: processes take
        batches in turn. A photo that cannot be read ends the run, after a save."""
        views, size = self.stage.views, self.settings["batch_size"]
        global_size, accumulate = size * self.processes, self.settings["accumulate"]
        steps = self.settings["steps"] - self.step
        views.length = self.samples + steps * accumulate * global_size
        starts = range(self.samples + self.rank * size, views.length, global_size)
        loader = DataLoader(
            views, batch_sampler=[range(i, i + size) for i in starts],
            num_workers=self.settings["workers"],
            worker_init_fn=functools.partial(outlive_signals, done := multiprocessing.Event()),
            generator=torch.Generator(),  # a draw from the global one would change dropout
        )  # fmt: skip
        try:
            batches = iter(loader)
            while step := list(itertools.islice(batches, accumulate)):
                yield step
        except ValueError:
            self.save()
            raise
        finally:
            done.set()

    def descend(self, loss):
        """Add a batch's gradients. After the step's last batch, take the step and return True."""
        accumulate, self.added = self.settings["accumulate"], self.added + 1
        self.scaler.scale(loss / accumulate).backward()
        if self.added < accumulate:
            return False
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trainable, self.settings["clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.added = 0
        return True

    def train_step(self, batches):
        """The next step: {metric: mean of the batches}. SystemExit: the loss is not finite."""
        number = self.step + 1
        rows = [self.stage.step(self.parallel, move(batch, self.device), number, self.descend)
                for batch in batches]  # fmt: skip
        self.step = number
        self.samples += self.settings["batch_size"] * self.processes * len(rows)
        metrics = {k: sum(float(row[k]) for row in rows) / len(rows) for k in rows[0]}
        if not math.isfinite(metrics["loss"]):
            raise SystemExit(f"{self.folder}: the loss of step {number} is {metrics['loss']}")
        return {"step": number} | metrics | {"lr": self.schedule.get_last_lr()[0]}

    def log(self, metrics):
        """Append a step's line to metrics.jsonl. ValueError: it cannot be written."""
        path = os.devnull if self.rank else self.folder / "metrics.jsonl"
        with data.naming(path, "cannot be written"), open(path, "a") as file:
            file.write(json.dumps(metrics | self.stage.notes) + "\n")

    @torch.no_grad()
    def preview(self):
        """Draw and measure what training does not see. Returns {name: number}."""
        if self.rank:
            return {}
        self.model.eval()
        panels, measured = self.stage.draw(move(self.stage.shown, self.device))
        self.model.train()
        # JSON has no NaN
        self.measured = {k: float(v) if v.isfinite() else None for k, v in measured.items()}
        titles = [f"step {self.step}: {t}" if i == 0 else t for i, t in enumerate(panels)]
        path = self.folder / f"preview_{self.step:06d}.png"
        write_sheet(path, dict(zip(titles, panels.values())), self.stage.warning)
        return self.measured

    def ask_to_stop(self, signum, _frame):
        """The first Ctrl-C ends the run after the step, a second one at once."""
        self.asked_to_stop = True
        signal.signal(signum, signal.SIG_DFL)


def train(settings):
    """Train until the last step or until Ctrl-C."""
    folder = settings["resume"] if "resume" in settings else folder_before_restart(settings)
    run = Run.new(settings) if folder is None else Run.load(Path(folder))
    settings, recent = run.settings, []
    if run.stage.warning:
        banner(run.stage.warning)
    what = settings.get("teacher") or f"reconstructor, {settings['start']} to begin with,"
    size = f"{sum(p.numel() for p in run.trainable) / 1e6:.1f} M trainable"
    say(f"{run.folder}: {what} on {run.device}, {size}, {settings['steps']} steps")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, run.ask_to_stop)
    if run.step == 0:
        run.preview()
    for batches in run.batches():
        line = run.train_step(batches)
        recent.append(line)
        last = run.step == settings["steps"]
        if last or run.step % settings["preview_every"] == 0:
            line = line | run.preview()
        run.log(line)
        if last or run.step % 10 == 0:
            progress(run, recent)
            recent.clear()
        stop = any_process(run.asked_to_stop)
        if last or stop or run.step % settings["checkpoint_every"] == 0:
            run.save()
        if stop and not last:
            resume = f"To go on: python train.py --resume {run.folder}"
            return say(f"Stopped after step {run.step}. {resume}")
    if run.rank == 0:
        report(run)


# ------------------------------------------------------------------------------ what is printed
TITLES = {
    "loss": "loss", "above_entropy": "above the teacher's entropy", "place": "place",
    "matched": "spots that find themselves", "mse": "photo", "log_depth": "log depth",
}  # fmt: skip


def say(text):
    """Print at once. A closed pipe, as in `train.py | head -1`, does not end the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def banner(text):
    line = "!" * (len(text) + 6)
    say(f"\n{line}\n!! {text} !!\n{line}\n")


def progress(run, recent):
    """Mean metrics of the recent steps, speed, and the time left."""
    steps, parts = run.settings["steps"], []
    for key, title in TITLES.items():
        if values := [metrics[key] for metrics in recent if key in metrics]:
            parts.append(f"{title} {sum(values) / len(values):.6f}   ")
    rate = (run.step - run.start_step) / (time.monotonic() - run.started)
    left = timedelta(seconds=int((steps - run.step) / rate))
    say(f"step {run.step}/{steps}   {''.join(parts)}{rate:.2f} steps/s   {left} left")


def report(run):
    """The result, and what to do next."""
    key = "above_entropy" if run.settings.get("loss") == "prototypes" else "loss"
    title = {"loss": "Loss", "above_entropy": "Loss above the teacher's entropy"}[key]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    losses, tenth = [json.loads(line)[key] for line in lines], max(1, len(lines) // 10)
    early, late = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    change = "nothing was ever splatted into a target view"
    if early > 0:
        change = f"{100 * (late / early - 1):+.0f} %"
    say(f"\n{title}: {early:.6f} in the first {tenth} steps, {late:.6f} in the last ({change})")
    measured = {k: "none" if v is None else f"{v:.4f}" for k, v in run.measured.items()}
    say(run.stage.summary.format(**{"shown_abs_rel": "unknown"} | measured))
    weights = run.folder / run.stage.filename
    say(f"Written to {run.folder}/: {weights.name}, checkpoint.pt, metrics.jsonl, preview_*.png")
    if run.stage.warning:
        banner(run.stage.warning)
    say("Next, " + run.stage.then.format(weights=weights, teacher=run.settings.get("teacher")))


@contextlib.contextmanager
def plain_messages():
    """Bad input and Ctrl-C end the program with one sentence; warnings print as notes."""
    warnings.showwarning = lambda message, *_: say(f"Note: {message}")
    warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP makes a copy
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(sentence(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted") from None


def sentence(error):
    """A message for bad input, a file or a killed loader. Raises errors of other kinds."""
    signs = "is killed by signal", "exited unexpectedly", "shared memory"
    if any(sign in str(error) for sign in signs):  # of a loader; maybe wrapped in another error
        killed = "a process that loads data was killed, as for want of memory or of /dev/shm"
        return f"{killed} (--workers); --resume goes on from the checkpoint"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().partition("\n")[0]
        return f"--compile failed ({reason}); torch's cache of compiled code may need emptying"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, RuntimeError):
        raise error
    return data.sentence_of(error)


def main(arguments=None):
    with many_processes(), plain_messages():
        train(parse_settings(arguments))


if __name__ == "__main__":
    main()
