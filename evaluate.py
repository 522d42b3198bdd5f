"""Does the student understand 3D better than its teacher? python evaluate.py --task correspondence

    correspondence   the same point found in another view: no training (Probe3D's protocol)
    depth            a linear layer from features to depth (DINOv2's)
    normals          a linear layer from features to surface normals (Probe3D's)
    segmentation     a linear layer from features to classes (DINOv2's)
    all              these four
    reconstruction   photos to 3D Gaussians, against sensor depth and simple baselines
    fields           3D fields of the teacher's features, against optimising each scene's

The default compares the newest run's student with its teacher on procedural rooms that no training
sees; --data FOLDER takes your data and the published settings. Tables, results.json and pictures
go to RUN/evaluation/TASK-1/; without a run, to runs/evaluation/TASK-1/. Features are the patch
tokens of the last block (of four blocks in quick linear probes), as each probe's public code has
them: with the final norm for segmentation alone. README, Probing, lists what differs from the
published protocols.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn

import data
from model import (
    architecture_of, load_vit, normalise, patch_tokens, read_metadata, read_state,
)  # fmt: skip
from reconstruct import (
    DEVICE, FeedForward, SensorDepth, averaged, load_reconstructor, mean, optimise, reconstruct,
    reconstruction,
)  # fmt: skip
from train import (
    POSITIVE, RANDOM, SIDE, TEACHERS, VIEWS, Setting, add_settings, banner, changed,
    check_settings, depth_colours, free_folder, load_teacher, many_processes, pca_pictures,
    plain_messages, rank_and_count, replace_file, to_image, write_sheet,
)  # fmt: skip

SCHEDULES = ("quarter", "half", "linear")  # Probe3D's; DINOv2's for depth and for segmentation
FEED_FORWARD, MEAN = "feed-forward", "feed-forward, mean of views"
NO_IMAGE = "no image"  # the baseline that predicts from training labels alone


# ----------------------------------------------------------------------------- what is compared
class Model(NamedTuple):
    name: str
    vits: list  # their features are concatenated
    warning: str | None  # about the weights, printed with all results


def load_models(settings):
    """The models to compare (the files of --weights, or --teacher alone, or the teacher and the
    student of a run), the reference first, and the folder that results go to."""
    students = sorted(Path("runs").glob("*/student.safetensors"), key=os.path.getmtime)
    run, home = settings.run or (students and students[-1].parent), Path("runs")
    if settings.weights:
        models = [load_file(path)[0] for path in settings.weights]
    elif settings.teacher or not run:
        asked = dict(teacher=settings.teacher or "dinov2_vits14", data=settings.data, seed=0)
        asked["teacher_weights"] = settings.teacher_weights
        vit, warning = load_teacher(asked)  # may replace asked["teacher"] by the shipped one
        models = [Model(asked["teacher"], [vit], warning)]
    else:
        models, home = load_run(Path(run)), Path(run)
    if settings.concat:
        first, *others = models
        if not others:
            raise ValueError(f"--concat needs a second model: there is only {first.name}")
        for i, (name, vits, warning) in enumerate(others, 1):
            models[i] = Model(f"{name} + first", first.vits + vits, warning or first.warning)
    for name, vit in ((model.name, vit) for model in models for vit in model.vits):
        depth, patch, size = len(vit.blocks), vit.patch_size, settings.image_size
        if not all(0 <= i < depth for i in settings.layers or ()):
            raise ValueError(f"--layers {settings.layers}: {name} has blocks 0 to {depth - 1}")
        if size and min(size) < patch:
            least = f"at least {patch}, a patch of {name}"
            raise ValueError(f"--image-size must be {least}, not {size[0]} {size[1]}")
        vit.to(DEVICE)
    return models, home


def load_file(path):
    """The `Model` of a weights file, and the file's metadata ({} if its format has none)."""
    vit, metadata = load_vit(architecture_of(read_state(path), path), path), read_metadata(path)
    return Model(str(path), [vit], metadata.get("warning")), metadata


def load_run(folder):
    """The teacher and the student of a run of train.py."""
    path = folder / "student.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --run takes a run's folder, such as runs/demo-1")
    student, metadata = load_file(path)
    try:
        settings = json.loads(metadata["settings"])
        asked = {k: settings[k] for k in ("teacher", "teacher_weights", "seed", "data")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: its metadata has no settings; pass it by --weights") from None
    vit, warning = load_teacher(asked)
    if student.warning != warning:
        raise ValueError(f"{path}: not of the teacher weights found now; pass it by --weights")
    teacher = Model(f"teacher {asked['teacher']}", [vit], warning)
    return [teacher, student._replace(name=f"student {folder}")]


def warning_of(models):
    """One warning for all the models: of random weights, if any are."""
    warnings = {model.warning for model in models} - {None}
    return RANDOM if RANDOM in warnings else min(warnings, default=None)


def layers_of(vit, settings):
    """The blocks of a ViT to probe, from 0: --layers, or --blocks of them evenly spaced up to the
    last (4 are DINOv2's "lin. 4"), or the last."""
    depth, count = len(vit.blocks), getattr(settings, "blocks", 1)
    spaced = {math.ceil(depth * k / count) - 1 for k in range(1, count + 1)}
    return settings.layers or sorted(spaced)


@torch.no_grad()
def extract(model, images, settings):
    """Images [B, 3, H, W] in 0..1 -> features [B, C, h, w] and cls tokens [B, C'], half, on a CPU.

    Each ViT sees them resized down to whole patches. A second ViT's features are resized to the
    first one's grid; cls tokens are the first one's (FiT3D's code). ValueError: not finite.
    """
    images, patches, classes = images.to(DEVICE), [], []
    for vit in model.vits:
        size = [s // vit.patch_size * vit.patch_size for s in images.shape[-2:]]
        x = normalise(F.interpolate(images, size, mode="bilinear", align_corners=False))
        layers = layers_of(vit, settings)
        parts = vit.get_intermediate_layers(x, layers, True, True, settings.norm)
        patches += [p for p, _ in parts]  # each [B, C, h, w]
        classes = classes or [c for _, c in parts]  # each [B, C]
    patches = [data.resized(p, patches[0].shape[-2:]) for p in patches]
    patches, classes = torch.cat(patches, 1).half().cpu(), torch.cat(classes, 1).half().cpu()
    if not torch.isfinite(patches).all():
        raise ValueError(f"{model.name}: features that are NaN, or too large for half precision")
    return patches, classes


# ----------------------------------------------------------------------------- many processes
def share_of(items):
    """Every n-th item of a data set, for the n processes; without torchrun all."""
    rank, count = rank_and_count()
    return torch.utils.data.Subset(items, range(rank, len(items), count))


def gathered(rows):
    """The rows that all processes made of their `share_of` items, in the order of the items; None
    rows are dropped."""
    shares = [rows]
    if (count := rank_and_count()[1]) > 1:
        dist.all_gather_object(shares := [None] * count, rows)
    return [row for turn in itertools.zip_longest(*shares) for row in turn if row is not None]


@contextlib.contextmanager
def shared_scratch(folder, need):
    """Rank 0's `data.scratch` for all processes: many machines need a shared disk."""
    rank, count = rank_and_count()
    with data.scratch(folder, need) if rank == 0 else contextlib.nullcontext() as place:
        yield gathered([place])[0]
        if count > 1:
            dist.barrier()


# ----------------------------------------------------------------------------- correspondence
def nearest_two(queries, keys, block=2048):
    """The two nearest keys [Q, C] of each query [P, C], unit vectors: cosines [P, 2] and indices
    [P, 2]. Exact, with block x Q similarities in memory at once."""
    best = [(q @ keys.T).topk(2, dim=1) for q in queries.split(block)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def project(points, K):  # [P, 3] in a camera's axes -> pixels [P, 2]
    projected = points @ K.T
    return projected[:, :2] / projected[:, 2:].clamp(min=1e-9)


def match(feats, depths, Ks, Rt, num_matches, points=None):
    """Probe3D's matches (github.com/mbanani/probe3d): errors [M], pixels [M, 2] in view 0 and 1.

    Of two views: feats [C, h, w], depths [H, W], 0 = none, and Ks [3, 3]; Rt [3, 4] or [4, 4] from
    camera 0's axes to camera 1's. Features are sampled at pixels with depth. Each pixel of view 0
    matches its nearest neighbour in view 1; the ratio test, 1 - d1 / d2 with cosine distances d,
    ranks the matches. The error is the distance from the match to view 0's point projected into
    view 1, in pixels of the depths. M is 0 where a view has fewer than two pixels with depth.
    points: in camera 0's axes [P, 3], to match in place of view 0's pixels with depth.
    """
    clouds = [data.camera_points(depth, K)[depth > 0] for depth, K in zip(depths, Ks)]  # [P, 3]
    if points is not None:
        clouds[0] = points
    pixels, features = [], []
    for feat, depth, K, cloud in zip(feats, depths, Ks, clouds):
        pixels.append(project(cloud, K))  # [P, 2]
        grid = 2 * pixels[-1] / depth.new_tensor(depth.shape[::-1]) - 1  # in -1..1
        sampled = F.grid_sample(feat[None].float(), grid[None, None], align_corners=False)
        features.append(F.normalize(sampled[0, :, 0].T, dim=-1))  # [P, C]
    if min(map(len, clouds)) < 2:
        return pixels[0][:0, 0], pixels[0][:0], pixels[1][:0]
    cosine, index = nearest_two(*features)
    distance = (1 - cosine).clamp(min=1e-9)
    ratio = 1 - distance[:, 0] / distance[:, 1]
    best = ratio.topk(min(num_matches, len(ratio))).indices
    truth = project(clouds[0][best] @ Rt[:3, :3].T + Rt[:3, 3], Ks[1])
    start, end = pixels[0][best], pixels[1][index[best, 0]]
    return (truth - end).norm(dim=-1), start, end


def shared_points(pair, Rt):
    """COLMAP's points at valid pixels of both photos of a pair, in the first camera's axes:
    [P, 3]."""
    inverse = torch.linalg.inv(pair[0]["extrinsics"])
    points = pair[0]["points"] @ inverse[:3, :3].T + inverse[:3, 3]
    for view, move in zip(pair, (torch.eye(4), Rt)):
        seen, (H, W) = points @ move[:3, :3].T + move[:3, 3], view["images"].shape[1:]
        x, y = project(seen, view["Ks"]).T
        inside = (seen[:, 2] > 0) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
        points, x, y = points[inside], x[inside].long(), y[inside].long()
        points = points[view["valid"][y, x]]
    return points


def correspondence(models, settings, folder):
    """{model: [mean `recall` of each seed's pairs]} and {model: [`recall` of each pair]}, in pixels
    of the depths: a quarter of --image-size, as Probe3D's 120 x 160. Pairs without depth need 20
    points of COLMAP that both photos show."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    asked = settings.data, settings.pairs, *settings.image_size
    chosen = {seed: data.pairs(*asked, seed) for seed in seeds}
    names = [[(scene.name, i, j) for scene, i, j in pairs.entries] for pairs in chosen.values()]
    if len(names) > 1 and all(n == names[0] for n in names):
        print("Every seed has the same pairs, all that there are: there is no spread.")
        chosen = {settings.seed: chosen[settings.seed]}
    results, by_pair = {m.name: [] for m in models}, {m.name: [] for m in models}
    for seed, pairs in chosen.items():
        least = pairs.least_overlap
        rows, share = [], share_of(pairs)  # rows: {model: recall}
        items = counted(loaded(share), len(share), f"seed {seed}, pair")
        for pair, n in zip(items, share.indices):  # items first, to exhaust `counted`
            Rt = torch.linalg.inv(pair[1]["extrinsics"]) @ pair[0]["extrinsics"]
            points = shared_points(pair, Rt).to(DEVICE) if "points" in pair[0] else None
            if points is not None:
                enough = len(points) >= 20
            else:
                enough = not least or data.overlap(*pair, Rt) >= least
            if not enough:
                rows.append(None)
                continue
            images, Ks = (torch.stack([view[k] for view in pair]) for k in ("images", "Ks"))
            # Where depth is unknown a point's match may be any valid pixel
            kind = "depths" if points is None else "valid"
            depths = torch.stack([view[kind] for view in pair]).float()
            Ks = Ks / torch.tensor([[4.0], [4.0], [1.0]])
            geometry = [t.to(DEVICE) for t in (depths[:, ::4, ::4], Ks, Rt)]
            row, panels = {}, {}
            for model in models:
                views = extract(model, images, settings)[0].to(DEVICE), *geometry
                errors = match(*views, settings.matches, points)[0]
                row[model.name] = recall(errors, float(data.rotation_angle(Rt)))
                if seed == settings.seed and n < 4:
                    panels[model.name] = draw_matches(images, *match(*views, 30, points))
            rows.append(row)
            if panels:
                write_sheet(folder / f"matches_{n}.png", panels, warning_of(models))
        rows = gathered(rows)
        if not rows:
            raise ValueError(f"{settings.data}: no two of its frames show enough of the same")
        for name in results:
            recalls = [row[name] for row in rows]
            results[name].append({k: mean(r[k] for r in recalls) for k in recalls[0]})
            by_pair[name] += recalls
    return results, by_pair


def recall(errors, angle):
    """{metric: share of errors [M], in pixels, below 2, 5, 10 or 20; None without matches}. Of the
    ranges of viewpoint change only that of the pair's angle, in degrees, is not None."""
    shares = {f"recall_{r}px": (errors < r).float().mean() for r in (2, 5, 10, 20)}
    row = {name: float(share) if len(errors) else None for name, share in shares.items()}
    for r, (low, high) in itertools.product((2, 5, 10), zip(data.BINS, data.BINS[1:])):
        inside = low <= angle < high or angle == high == data.BINS[-1]
        row[f"recall_{r}px_{low}_{high}deg"] = row[f"recall_{r}px"] if inside else None
    return row


def draw_matches(images, errors, start, end):
    """Both photos [3, H, W] and `match`'s matches as lines, green within 10 pixels: [H, 2W, 3]."""
    photos = torch.cat(list(images), -1).permute(1, 2, 0)  # [H, 2W, 3]
    picture = to_image(photos)
    pen, W = ImageDraw.Draw(picture), images.shape[-1]
    for error, (x0, y0), (x1, y1) in zip(errors.tolist(), (4 * start).tolist(), (4 * end).tolist()):
        pen.line((x0, y0, W + x1, y1), fill=(0, 170, 0) if error < 10 else (220, 0, 0))
    return torch.from_numpy(np.array(picture)) / 255


# ----------------------------------------------------------------------------- feature fields
def fields(models, settings, folder):
    """{way to make a field: [mean metrics of the scenes]}, measured in held-out views.

    A scene is two context views of `data.Views`. Held out are the target between them and a view
    half a gap past the last, or the nearest to that. The teacher sees photos of --image-size;
    Gaussians come from the context views at half that size. The optimised fields start from the
    feed-forward Gaussians, without features.
    """
    (vit,), (H, W) = models[0].vits, (side // 2 for side in settings.image_size)
    scenes = data.open_scenes(settings.data) if settings.data else data.Rooms("probe")
    options = {k: getattr(settings, k) for k in ("min_gap", "max_gap", "seed")}
    views = data.Views(scenes, H, W, **options, length=settings.scenes)
    network = FeedForward(load_reconstructor().to(DEVICE), settings.near, settings.far)
    rows = {}
    for n in counted(range(settings.scenes), settings.scenes, "scene"):
        context, held = field_views(views, n)
        with torch.no_grad():
            own = patch_tokens(vit, held["photos"].to(DEVICE)).cpu()  # [V, C, h, w]
            inputs = patch_tokens(vit, context["photos"].to(DEVICE)).cpu()
        shown, seconds = {"nearest view, unwarped": unwarped(context, inputs, held)}, {}
        first, seconds[FEED_FORWARD] = timed(reconstruct, context, network, vit)
        shown[FEED_FORWARD] = rendered(first, held)
        field, took = timed(averaged, first, context, vit)
        shown[MEAN], seconds[MEAN] = rendered(field, held), seconds[FEED_FORWARD] + took
        ways = {}
        if context["masks"].any():
            whole = {k: v for k, v in context.items() if k != "masks"}
            ways[f"{FEED_FORWARD}, across segments"] = whole, network
        if "depths" in views.keys:
            ways["sensor depth"] = context, SensorDepth()
        for way, (given, geometry) in ways.items():
            field, seconds[way] = timed(reconstruct, given, geometry, vit)
            shown[way] = rendered(field, held)
        start = first._replace(features=torch.zeros_like(first.features))
        geometry = settings.optimise_geometry
        for steps in settings.steps:
            way = f"optimised{' with geometry' * geometry}, {steps} steps"
            field, took = timed(optimise, start, context, vit, steps, geometry)
            shown[way], seconds[way] = rendered(field, held), seconds[FEED_FORWARD] + took
        for way, view in shown.items():
            row = {"seconds": seconds.get(way)} | field_errors(view, own, held)
            rows.setdefault(way, []).append(row)
        if n < 4:
            draw_fields(folder / f"scene_{n}.png", shown, own, held, warning_of(models))
    return {way: [{k: mean(r[k] for r in each) for k in each[0]}] for way, each in rows.items()}


def timed(function, *arguments):
    started = time.monotonic()
    return function(*arguments), time.monotonic() - started


def field_views(views, n):
    """Sample n of `data.Views` with a second held-out view: the context and the held-out views, of
    stacked tensors, with "photos" of twice the size."""
    scene, context, target = views.draw(n)
    numbers = np.asarray(scene.numbers)
    past = numbers[context[-1]] + (numbers[context[-1]] - numbers[context[0]]) / 2
    others = [i for i in range(len(scene)) if i not in (*context, target)]
    held = [target, *sorted(others, key=lambda i: abs(numbers[i] - past))[:1]]
    (H, W), parts = views.size, []
    for frames in (context, held):
        seen = [{"depths": torch.zeros(H, W)} | scene.frame(i, H, W) for i in frames]
        parts.append({k: torch.stack([view[k] for view in seen]) for k in views.keys})
        photos = [scene.frame(i, 2 * H, 2 * W)["images"] for i in frames]
        parts[-1] |= {"photos": torch.stack(photos), "numbers": numbers[frames]}
    return parts


def unwarped(context, inputs, held):
    """Photos and features [V, C, h, w] of the context views nearest to the held-out ones."""
    away = (held["extrinsics"][:, None] - context["extrinsics"])[..., :3, 3].norm(dim=-1)
    nearest = away.argmin(1)  # [V]
    photo = context["images"][nearest]
    return {"photo": photo, "features": inputs[nearest], "alpha": torch.ones_like(photo[:, 0])}


def rendered(field, held):
    """`Field.render` of the held-out views, stacked: features [V, C, H, W]."""
    W, H = held["images"].shape[:1:-1]
    drawn = [field.render(E, K, W, H) for E, K in zip(held["extrinsics"], held["Ks"])]
    shown = {k: torch.stack([view[k].cpu() for view in drawn]) for k in drawn[0]}
    return shown | {"features": shown["features"].permute(0, 3, 1, 2)}


def field_errors(shown, own, held):
    """Metrics of rendered held-out views against the teacher's own features of them [V, C, h, w].

    "cosine" is the mean over seen patches, "cosine_borders" over those with several segments,
    "cosine_inside" over those with one. Recall is of `match` between the two views, in pixels of
    maps whose shorter side is about 56. PSNR is in dB; "holes" is the share of pixels with an alpha
    of at most 0.5.
    """
    alpha, (V, _, h, w) = shown["alpha"], own.shape
    valid = held.get("valid", torch.ones_like(alpha, dtype=torch.bool))  # [V, H, W]
    seen = data.resized(((alpha > 0.5) & valid).float(), (h, w), "nearest") > 0
    cosine = F.cosine_similarity(data.resized(shown["features"], (h, w)), own, dim=1)  # [V, h, w]
    masks = held["masks"].double()
    border = F.adaptive_max_pool2d(masks, (h, w)) > -F.adaptive_max_pool2d(-masks, (h, w))
    row = {"cosine": float(cosine[seen].mean()) if seen.any() else None}
    for part, where in (("borders", border), ("inside", ~border)):
        known = masks.any() and (where & seen).any()  # without segments all masks are 0
        row[f"cosine_{part}"] = float(cosine[where & seen].mean()) if known else None
    if V == 2 and "depths" in held:
        step = max(1, min(alpha.shape[1:]) // 56)
        Ks = held["Ks"] / torch.tensor([[step], [step], [1.0]])
        Rt = torch.linalg.inv(held["extrinsics"][1]) @ held["extrinsics"][0]
        depths = held["depths"][:, ::step, ::step]
        errors = match(shown["features"], depths, Ks, Rt, 1000)[0]
        row |= {k: v for k, v in recall(errors, 0.0).items() if "deg" not in k}
    squares = (shown["photo"] - held["images"]).square().mean(1) * valid  # [V, H, W]
    mse = squares.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    holes = ((alpha <= 0.5) & valid).sum() / valid.sum().clamp(min=1)
    return row | {"psnr": float(-10 * mse.clamp(min=1e-10).log10().mean()), "holes": float(holes)}


def draw_fields(path, shown, own, held, warning):
    """The first held-out view: photo, teacher's own features, and each way's photo and features."""
    photo, size = held["photos"][0], held["photos"].shape[2:]
    maps = [own[0], *(view["features"][0] for view in shown.values())]
    pictures = pca_pictures(own.permute(0, 2, 3, 1).flatten(0, 2), maps, size)
    panels = {"photo": photo.permute(1, 2, 0), "teacher": pictures[0]}
    for (way, view), picture in zip(shown.items(), pictures[1:]):
        panels[way] = data.resized(view["photo"][:1], size, "nearest")[0].permute(1, 2, 0)
        panels[f"{way}: features"] = picture
    write_sheet(path, panels, warning)


# ----------------------------------------------------------------------------- linear probes
# A probe maps features [B, C, h, w] and cls tokens [B, C'] to a prediction of size (H, W).
#   label: the key of its labels in a frame; unknown: their value for none
#   best: the metric that chooses the checkpoint, and its sign
#   measure: {metric: [B'], of the frames with any known label}
#   blind: a prediction for each pixel from labels [N, ...] alone


def sig_loss(pred, gt):
    """AdaBins' loss (arXiv 2011.14141) as in DINOv2: depths [..., H, W], gt 0 = none."""
    known = gt > 0
    if not known.any():
        return pred.sum() * 0
    g = torch.log(pred[known] + 1e-3) - torch.log(gt[known] + 1e-3)
    return (g.square().mean() - 0.85 * g.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(pred, gt):
    """MegaDepth's loss (arXiv 1804.00607) as in DINOv2: differences of log depth two pixels apart,
    with strides 1, 2, 4 and 6. Depths [..., H, W], gt 0 = none."""
    total = 0.0
    for step in (1, 2, 4, 6):
        p, t = pred[..., ::step, ::step], gt[..., ::step, ::step]
        known = (t > 0).float()
        e = (torch.log(p + 1e-3) - torch.log(t + 1e-3)) * known
        down = (e[..., 2:, :] - e[..., :-2, :]).abs() * known[..., 2:, :] * known[..., :-2, :]
        across = (e[..., 2:] - e[..., :-2]).abs() * known[..., 2:] * known[..., :-2]
        total = total + (down.sum() + across.sum()) / known.sum().clamp(min=1)
    return total


def frame_means(x, known):  # [B, H, W] -> [B']: over the known pixels of frames that have any
    x, known = (t[known.flatten(1).any(1)] for t in (x, known))
    return torch.where(known, x, 0.0).sum((1, 2)) / known.sum((1, 2))


def depth_metrics(pred, gt):
    """Probe3D's and DINOv2's, of depths [B, H, W], gt 0 = none: {name: [B'], as `frame_means`}.
    d1, d2 and d3 are the shares of pixels within a factor of 1.25, 1.25^2 and 1.25^3."""
    known = gt > 0
    ratio = torch.maximum(gt / pred.clamp(min=1e-9), pred / gt.clamp(min=1e-9))
    metrics = {f"d{k}": frame_means(ratio < 1.25**k, known) for k in (1, 2, 3)}
    metrics["rmse"] = frame_means((pred - gt).square(), known).sqrt()
    return metrics | {"abs_rel": frame_means((pred - gt).abs() / gt.clamp(min=1e-9), known)}


class DepthProbe(nn.Module):
    """DINOv2's linear head: a 1 x 1 convolution from patch and cls tokens to 256 uniform bins, at
    four times the resolution. Depth in metres is the bins' mean, weighted by relu + 0.1."""

    label, unknown, best = "depths", 0, ("abs_rel", -1)

    def __init__(self, channels, classes=None, max_depth=10.0, gradient_weight=0.5, **_):
        super().__init__()
        self.conv = nn.Conv2d(channels + (classes or channels), 256, 1)
        self.max_depth, self.gradient_weight = max_depth, gradient_weight
        self.register_buffer("bins", torch.linspace(0.001, max_depth, 256))

    def forward(self, features, classes, size):  # -> [B, H, W]
        cls = classes[:, :, None, None].expand(-1, -1, *features.shape[-2:])
        # The convolution commutes with bilinear upsampling, and is cheaper before it
        x = self.conv(torch.cat([features, cls], 1))  # [B, 256, h, w]
        p = F.relu(F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False))
        # Weights p + 0.1, without adding 0.1 to each
        depth = torch.einsum("bnhw,n->bhw", p, self.bins) + 0.1 * self.bins.sum()
        depth = depth / (p.sum(1) + 0.1 * len(self.bins))
        return F.interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    def within(self, truth):  # depth beyond the bins is unknown
        return torch.where(truth <= self.max_depth, truth, 0.0)

    def loss(self, prediction, truth):
        loss = sig_loss(prediction, self.within(truth))
        if self.gradient_weight:
            loss = loss + self.gradient_weight * gradient_loss(prediction, self.within(truth))
        return loss

    def measure(self, prediction, truth):
        return depth_metrics(prediction, self.within(truth))

    def draw(self, prediction, truth):
        return depth_colours(truth, truth > 0), depth_colours(prediction, truth > 0)

    def blind(self, labels):  # the median depth, or NaN
        return torch.where(labels > 0, labels, torch.nan).nanmedian(0).values


def known_normals(normals):  # [B, 3, H, W] -> [B, H, W]; unknown ones are 0
    return normals.square().sum(1) > 0.25


def angular_loss(pred, gt):
    """Uncertainty-aware angular loss (Bae et al., arXiv 2109.09881) as in Probe3D.
    pred [B, 4, H, W]: a direction and raw kappa; gt [B, 3, H, W], 0 = none."""
    angle = F.cosine_similarity(pred[:, :3], gt, dim=1).clamp(-1 + 1e-4, 1 - 1e-4).acos()
    kappa = F.elu(pred[:, 3]) + 1.01
    loss = torch.log1p(torch.exp(-kappa * math.pi)) - torch.log(kappa.square() + 1) + kappa * angle
    return loss[known_normals(gt)].mean()


def normal_metrics(pred, gt):
    """Probe3D's, of directions [B, 3 or more, H, W], gt [B, 3, H, W], 0 = none: d1, d2 and d3, the
    shares of pixels within 11.25, 22.5 and 30 degrees, and rmse in degrees, as `frame_means`."""
    known = known_normals(gt)
    error = torch.rad2deg(F.cosine_similarity(pred[:, :3], gt, dim=1).clamp(-1, 1).acos())
    limits = {"d1": 11.25, "d2": 22.5, "d3": 30}
    metrics = {name: frame_means(error < limit, known) for name, limit in limits.items()}
    return metrics | {"rmse": frame_means(error.square(), known).sqrt()}


class NormalsProbe(nn.Module):
    """Probe3D's linear head: a 1 x 1 convolution to a direction and its kappa, at four times the
    resolution. As in the paper it sees no cls token; Probe3D's own for DINOv2 does."""

    label, unknown, best = "normals", 0, ("rmse", -1)
    loss, measure = staticmethod(angular_loss), staticmethod(normal_metrics)

    def __init__(self, channels, **_):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, features, classes, size):  # -> [B, 4, H, W]
        x = self.conv(features)  # [B, 4, h, w]
        x = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=True)
        return F.interpolate(x, size, mode="bicubic", align_corners=True)

    def draw(self, prediction, truth):
        both = F.normalize(torch.stack([truth, prediction[:3]]), dim=1)  # [2, 3, H, W]
        return ((both + 1) / 2 * known_normals(truth[None])).permute(0, 2, 3, 1)

    def blind(self, labels):  # the mean normal
        return labels.mean(0)


def confusion(pred, gt, count):
    """Counts of pixels [true class, predicted class]; gt -1 = none."""
    pairs = (gt * count + pred)[gt >= 0]
    return torch.bincount(pairs, minlength=count * count).view(count, count)


def mean_iou(confusion, names):
    """{miou, iou_NAME...} over the classes in the truth or the prediction."""
    both = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1) - both
    iou = {f"iou_{name}": float(b / e) for name, b, e in zip(names, both, either) if e > 0}
    return {"miou": mean(iou.values())} | iou


class SegmentationProbe(nn.Module):
    """DINOv2's linear head: batch normalisation and a 1 x 1 convolution."""

    label, unknown, best = "classes", -1, ("miou", 1)

    def __init__(self, channels, names, **_):
        super().__init__()
        self.names = names
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, len(names), 1))

    def forward(self, features, classes, size):  # -> logits [B, len(names), H, W]
        return F.interpolate(self.head(features), size, mode="bilinear", align_corners=False)

    def loss(self, prediction, truth):
        return F.cross_entropy(prediction, truth, ignore_index=-1)

    def measure(self, prediction, truth):
        return {"confusion": confusion(prediction.argmax(1), truth, len(self.names))[None]}

    def draw(self, prediction, truth):
        colours = torch.rand(len(self.names) + 1, 3, generator=torch.Generator().manual_seed(1))
        return colours[truth + 1], colours[prediction.argmax(0) + 1]

    def blind(self, labels):  # the count of each class
        return torch.stack([(labels == c).sum(0).float() for c in range(len(self.names))])


def linear(task, models, settings, folder):
    """{model: [{metric: value} per seed]} of a linear probe on cached features, and of NO_IMAGE.
    Seeds differ in the probe's initial weights and in the order of frames."""
    head, results, shown = TASKS[task].probe, {}, {}
    train, test, names = open_frames(task, settings)
    channels = max(sum(vit.embed_dim for vit in model.vits) for model in models)
    channels *= len(settings.layers or range(settings.blocks))
    need = train.kept_bytes(channels) + test.kept_bytes(channels)
    with shared_scratch(settings.cache, need) as place:
        for model in models:
            shelves = [shelve(place / f.part, head, model, f, settings) for f in (train, test)]
            results[model.name], shown[model.name] = probe_features(
                model.name, head, names, *shelves, settings
            )
        probe = new_probe(head, names, shelves[1], settings)
        labels = [data.small(frame[head.label]) for frame in loaded(train.as_tested(500))]
        size = labels[0].shape[-2:]
        labels = torch.stack([data.resized(label, size, "nearest") for label in labels])
        results[NO_IMAGE] = [over_frames(probe, shelves[1], from_labels(probe, labels))[0]]
    if rank_and_count()[0] != 0:
        return results
    for n in range(min(4, len(test))):
        frame = test[n]
        label = frame[head.label]
        photo = data.joined(frame["images"], frame["places"], label.shape[-2:])
        panels = {"photo": photo.permute(1, 2, 0)}
        for name, predictions in shown.items():
            panels["truth"], panels[name] = probe.draw(predictions[n], label)
        write_sheet(folder / f"{task}_{n}.png", panels, warning_of(models))
    return results


def open_frames(task, settings):
    """`data.labelled` by the settings. A max_depth of 0 becomes the data's."""
    framing = data.PUBLISHED[task] if settings.protocol == "paper" else data.Framing()
    if settings.image_size:
        framing = framing._replace(size=tuple(settings.image_size))
    if task == "depth":
        settings.max_depth = settings.max_depth or data.farthest(settings.data)
    counts, classes = (settings.train_frames, settings.test_frames), vars(settings).get("classes")
    return data.labelled(task, settings.data, framing, *counts, classes, settings.copies)


def shelve(path, head, model, frames, settings):
    """A `data.Shelf` of each frame's features, cls tokens, label and places: one file per process,
    of its share."""
    gathered([])  # wait: the files replace the last model's, which others may still read
    shelf, known = data.Shelf(f"{path}{rank_and_count()[0] or ''}"), False
    share = share_of(frames)
    for frame in counted(loaded(share), len(share), f"{model.name}: {path.name} frame"):
        label = frame[head.label]
        known = known or bool((label != head.unknown).any())
        shelf.append(*extract(model, frame["images"], settings), label, frame["places"])
    shelf.records = gathered(shelf.records)
    if not any(gathered([known])):
        raise ValueError(f"{settings.data}: none of the {path.name} frames has known {head.label}")
    return shelf


def probe_features(name, head, names, train, test, settings):
    """A row of metrics for each seed, and the first seed's predictions of four frames."""
    rows, shown = [], None
    metric, sign = head.best
    for seed in range(settings.seed, settings.seed + settings.seeds):
        checks = [over_frames(probe, test) for probe in fit(head, names, train, settings, seed)]
        known = [check for check in checks if check[0][metric] is not None]
        row, predictions = max(known or checks, key=lambda check: sign * (check[0][metric] or 0))
        rows.append(row)
        shown = shown or predictions
        cells = [f"{k} {cell(v)}" for k, v in list(row.items())[:5]]
        print(f"{name}, seed {seed}: " + "   ".join(cells))
    return rows, shown


def new_probe(head, names, shelf, settings):
    (_, channels, *_), (_, classes) = shelf.shapes(0)[:2]
    options = {k: getattr(settings, k) for k in ("max_depth", "gradient_weight") if k in settings}
    return head(channels, classes=classes, names=names, **options)


def learning_rate(i, steps, settings):
    """The factor of the learning rate at step i: a warm-up and the schedule."""
    warmup = max(1, round(settings.warmup * steps))
    if settings.schedule == "quarter":
        if i <= warmup:
            return 0.01 + 0.99 * i / warmup
        since = min(1.0, (i - warmup) / max(1, steps - warmup))
        return 0.01 + 0.99 * math.cos(0.5 * math.pi * since)
    done = min(1.0, i / steps)
    factor = 1 - done if settings.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return factor * min(1.0, 0.001 + i / warmup)


def fit(head, names, shelf, settings, seed):
    """Train a probe on a shelf by AdamW. Yields it, in eval mode, at each of --checks."""
    torch.manual_seed(seed)
    probe, count = new_probe(head, names, shelf, settings).to(DEVICE), len(shelf)
    steps = settings.steps or settings.epochs * math.ceil(count / settings.batch_size)
    checks = {steps * k // settings.checks for k in range(1, settings.checks + 1)}
    parameters, rate = list(probe.parameters()), lambda i: learning_rate(i, steps, settings)
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    epochs = (torch.randperm(count).split(settings.batch_size) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    if steps > 1000:
        batches = counted(batches, steps, f"seed {seed}, step")
    for step, batch in enumerate(batches, 1):
        features, classes, labels, _ = zip(*(shelf[i] for i in batch.tolist()))
        features, classes = torch.cat(features).to(DEVICE), torch.cat(classes).to(DEVICE)
        stride = settings.stride
        label = torch.stack(labels).to(DEVICE)[..., stride // 2 :: stride, stride // 2 :: stride]
        prediction = probe(features, classes, label.shape[-2:])
        known = (label != head.unknown).any()
        loss = probe.loss(prediction, label) if known else 0 * prediction.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
        optimizer.step()
        schedule.step()
        if step in checks:
            yield probe.eval()
            probe.train()


@torch.no_grad()
def over_frames(probe, shelf, constant=None):
    """A probe's {metric: mean over the frames, or None}, and its predictions of the first four. A
    constant, resized to each frame, replaces its predictions."""
    measured, predictions = [], []
    for i in range(len(shelf)):
        features, classes, label, places = shelf[i]
        size = label.shape[-2:]
        if constant is None:
            windows = probe(features.to(DEVICE), classes.to(DEVICE), places[0, 5:].tolist())
            prediction = data.joined(windows.cpu(), places, size)
        else:
            prediction = data.resized(constant, size, "nearest")
        measured.append(probe.measure(prediction[None], label[None]))
        if i < 4:
            predictions.append(prediction)
    values = {k: torch.cat([m[k] for m in measured]) for k in measured[0]}  # [N, ...]
    if "confusion" in values:
        return mean_iou(values["confusion"].sum(0), probe.names), predictions
    return {k: float(v.mean()) if len(v) else None for k, v in values.items()}, predictions


def from_labels(probe, labels):
    """A probe's `blind` prediction from labels [N, ..., H, W], its median where none is known."""
    blind = torch.cat([probe.blind(data.full(rows)) for rows in labels.split(32, -2)], -2)
    return blind.nan_to_num(float(blind.nanmedian()))


# ----------------------------------------------------------------------------- tables and files
def draw_views(path, target, shown):
    """`reconstruction`'s target photo, and each way's photo and depth, side by side."""
    panels = {"target photo": target["images"][0].permute(1, 2, 0)}
    for name, (photo, depth, seen) in shown.items():
        panels[name] = photo[0].permute(1, 2, 0)
        panels[f"depth: {name}"] = depth_colours(depth[0].cpu(), (seen & (depth > 0))[0].cpu())
    write_sheet(path, panels)


def loaded(dataset):
    """A data set's items, prefetched by another process; under torchrun by this one, since a fork
    of a process that has gloo's threads hung in one of about thirty runs."""
    workers = 1 if rank_and_count()[1] == 1 else 0
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)


def counted(items, total, what):
    """The items; prints five times how many are done, their rate and the time left."""
    started = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or done % max(1, total // 5) == 0:
            rate = done / (time.monotonic() - started)
            left = f"{rate:.2f} a second   {(total - done) / rate:.0f} s left"
            print(f"{what} {done}/{total}   {left}", flush=True)


def summarise(results, spread="spread"):
    """{model: [{metric: value}]} -> {model: {metric: {"mean", "spread"}}}, over rows. The spread is
    the standard deviation, or the standard error if named so; None of a single value."""
    summary = {name: {} for name in results}
    for name, rows in results.items():
        for key in dict.fromkeys(key for row in rows for key in row):  # unique, in order
            values = [row[key] for row in rows if row.get(key) is not None]
            count = len(values) if spread == "standard_error" else 1
            apart = float(np.std(values, ddof=1)) / math.sqrt(count) if len(values) > 1 else None
            summary[name][key] = {"mean": mean(values), spread: apart}
    return summary


def differences(results, pairs):
    """{"B - A": [{metric: B minus A}]} of models (A, B), row by row: what both share cancels."""
    rows = {}
    for a, b in pairs:
        both = zip(results[a], results[b])
        rows[f"{b} - {a}"] = [
            {k: None if None in (x[k], y.get(k)) else y[k] - x[k] for k in x} for x, y in both
        ]
    return rows


def cell(value, spread=None):
    text = "-" if value is None else f"{value:.4f}"
    return text if spread is None else f"{text} +- {spread:.4f}"


def shortened(names):
    """Names with "folder/" for "any/folder/student.safetensors" and "file" for
    "any/file.safetensors"; as they are where that would make two of them the same."""
    short = [re.sub(r"\S*?([^/\s]+/)student\.safetensors", r"\1", name) for name in names]
    short = [re.sub(r"\S*/(\S+)\.\w+", r"\1", name) for name in short]
    return short if len(set(short)) == len(set(names)) else list(names)


def print_table(summary):
    """Print what `summarise` returns: a column per model, a line per metric but classes' IoU."""
    models, unknown = summary.values(), {"mean": None}
    keys = dict.fromkeys(k for row in models for k in row if not k.startswith("iou_"))
    cells = ([cell(*row.get(k, unknown).values()) for row in models] for k in keys)
    lines = [["", *shortened(summary)], *([k, *row] for k, row in zip(shortened(keys), cells))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for first, *rest in lines:
        print(f"{first:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(rest, widths[1:])))


def run_task(task, settings, models, home):
    """Run one task, print its tables and write results.json."""
    (rank, count), started = rank_and_count(), time.monotonic()
    if count > 1 and task != "correspondence" and not TASKS[task].probe:
        raise ValueError(f"--task {task} runs in one process")
    folder = gathered([free_folder(home / "evaluation", task)])[0]  # rank 0's
    folder.mkdir(parents=True, exist_ok=count > 1)
    names, by_pair = [model.name for model in models], {}
    try:
        if task == "reconstruction":
            results = reconstruction(settings, folder, counted, draw_views)
        elif task == "fields":
            results = fields(models, settings, folder)
        elif task == "correspondence":
            results, by_pair = correspondence(models, settings, folder)
        else:
            results = linear(task, models, settings, folder)
    except BaseException:
        if rank == 0 and not any(folder.iterdir()):
            folder.rmdir()
        raise
    against_first = differences(results, [(names[0], name) for name in names[1:]])
    against_all = differences(by_pair, list(itertools.combinations(by_pair, 2)))
    warning, seconds = warning_of(models), round(time.monotonic() - started, 1)
    report = {
        "task": task, "random_weights": warning == RANDOM, "settings": vars(settings),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": seconds, "summary": summarise(results | against_first), "per_seed": results,
    }  # fmt: skip
    print_table(report["summary"])
    if against_all:
        paired = report["paired"] = summarise(against_all, "standard_error")
        print("\nPair by pair: mean difference +- its standard error (by viewpoint: results.json)")
        keys = [f"recall_{r}px" for r in (2, 5, 10, 20)]
        print_table({k: {name: row[k] for name, row in paired.items()} for k in keys})
    if warning:
        report["warning"] = warning
        banner(warning)
    text = json.dumps(report, indent=1)
    if rank == 0:
        replace_file(folder / "results.json", lambda path: path.write_text(text))
    print(f"Written to {folder}/ in {seconds:.0f} s")


# ----------------------------------------------------------------------------- tasks and settings
# Setting(quick, paper, help, low, high). Paper's values are from the probes' public code: DINOv2's
# for depth and segmentation, as FiT3D and the paper run them, and Probe3D's for the rest.
DATA = {"data": Setting(None, None, "folder of your data (README); default: procedural rooms")}
FEATURES = DATA | {
    "protocol": Setting(None, None, "default: paper with --data, else quick",
                        choices=("quick", "paper")),
    "run": Setting(None, None, "folder of the run to compare with its teacher; default: newest"),
    "teacher": Setting(None, None, f"a model alone, without a run: {TEACHERS}"),
    "teacher_weights": Setting(None, None, 'a file, or "random"; default: the public weights'),
    "seeds": Setting(3, 3, "repetitions; a difference within their spread means nothing", 1),
    "seed": Setting(0, 0, "of the first repetition", 0),
}  # fmt: skip
PAIRS = {k: VIEWS[k] for k in ("near", "far", "min_gap", "max_gap", "seed")}
CACHE = {"cache": Setting(None, None, "folder for features during a task; default: /tmp")}
LINEAR = FEATURES | CACHE | {
    "train_frames": Setting(128, 0, "frames to train the probe on; 0 is all", 0),
    "test_frames": Setting(40, 0, "frames to test it on; 0 is all", 0),
    "copies": Setting(1, 1, "random windows of each training frame, drawn once", 1),
    "blocks": Setting(4, 1, "evenly spaced, whose features lie side by side; 1: the last", 1),
    "stride": Setting(4, 1, "train on every n-th pixel of a label, each way", 1),
    "epochs": Setting(6, 0, "over the training frames", 0),
    "steps": Setting(0, 38_400, "of the optimiser; 0: as many as --epochs says", 0),
    "batch_size": Setting(8, 16, "frames a step", 1),
    "lr": Setting(1e-2, 1e-4, "of AdamW; higher on rooms, where steps are few", POSITIVE),
    "weight_decay": Setting(0.01, 0.01, "of AdamW", 0),
    "schedule": Setting("quarter", "half", "of a cosine, or linear", choices=SCHEDULES),
    "warmup": Setting(0.25, 0.3333, "share of the steps in which the learning rate climbs", 0),
    "clip": Setting(0.0, 0.0, "largest norm of the gradients; 0: no clipping", 0),
    "checks": Setting(1, 1, "tests during training; the best counts, chosen by test frames", 1),
}


class Task(NamedTuple):
    settings: dict
    probe: type | None = None  # of the linear tasks
    norm: bool | None = None  # features after the final norm?
    multiple: int = 1  # of which --image-size must be


TASKS = {
    "correspondence": Task(FEATURES | {
        "pairs": Setting(80, 1500, "pairs of views for each seed", 1),
        "matches": Setting(1000, 1000, "matches of a pair, the best by the ratio test", 1),
    }, norm=False, multiple=4),
    "depth": Task(changed(LINEAR, epochs=(6, 0), clip=(0.0, 35.0), checks=(1, 6)) | {
        "max_depth": Setting(0.0, 0.0, "metres, of bins and truth; 0: 10, or 20 on ScanNet++", 0),
        # The public code says 0.5, but slices the wrong axes: in effect it is 0
        "gradient_weight": Setting(0.5, 0.0, "of the gradient loss", 0),
    }, DepthProbe, norm=False),
    "normals": Task(changed(
        LINEAR, lr=(1e-2, 5e-4), epochs=(60, 10), steps=(0, 0), batch_size=(8, 8),
        schedule=("quarter", "quarter"), warmup=(0.25, 0.15),
    ), NormalsProbe, norm=False),
    "segmentation": Task(changed(
        LINEAR, lr=(1e-2, 1e-3), epochs=(20, 0), steps=(0, 40_000), weight_decay=(0.01, 1e-4),
        schedule=("quarter", "linear"), warmup=(0.25, 0.0375),
    ) | {
        "classes": Setting(None, None, "file of the classes' names, one a line (ScanNet++)"),
    }, SegmentationProbe, norm=True),
    "all": Task(FEATURES | CACHE, multiple=4),
    "reconstruction": Task(DATA | {
        "scenes": Setting(50, 50, "pairs of context views, with a target between them", 1),
    } | PAIRS, multiple=16),
    "fields": Task(DATA | {
        "teacher": Setting("dinov2_vits14", "dinov2_vits14", TEACHERS),
        "teacher_weights": FEATURES["teacher_weights"],
        "scenes": Setting(20, 20, "pairs of context views, with two views held out", 1),
    } | PAIRS, multiple=32),
}  # fmt: skip


def parse_settings(arguments=None):
    """The command line as a namespace with a value for every setting of the task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="each has its settings: --task X --help")
    task = parser.parse_known_args(arguments)[0].task
    row = TASKS[task or "all"]
    add("-h", "--help", action="help", help="show this and exit")
    size = "default: 224 224 on rooms, else 480 640 (fields: 224 288) or the protocol's own"
    add("--image-size", nargs=2, type=int, metavar=("H", "W"), help=size)
    if task == "reconstruction":
        add("--weights", nargs="+", default=["shipped"], help="reconstructors; default: shipped")
    elif task == "fields":
        steps = "of the optimised fields; default: 100 1000"
        add("--steps", nargs="+", type=int, default=[100, 1000], help=steps)
        add("--optimise-geometry", action="store_true", help="fit the Gaussians too, as FiT3D does")
    else:
        add("--weights", nargs="+", help="DINOv2 or DINOv3 files to compare, instead of a run's")
        add("--layers", nargs="+", type=int, help="the blocks to probe, from 0, side by side")
        add("--norm", action=argparse.BooleanOptionalAction, help="default: for segmentation alone")
        concat = "put the first model's features, and its cls token alone, before others'"
        add("--concat", action="store_true", help=concat)
    add_settings(parser, row.settings, ("quick", "paper"))
    given = parser.parse_args(arguments)
    if not task:
        parser.error(f"--task is missing: one of {', '.join(TASKS)}")
    if "protocol" in row.settings and "protocol" not in given:
        given.protocol = "paper" if "data" in given else "quick"
    if given.image_size is None and not (row.probe and given.protocol == "paper"):
        large = [224, 288] if task == "fields" else [480, 640]
        given.image_size = large if "data" in given else [224, 224]
    if "epochs" in given and "steps" not in given:
        given.steps = 0
    settings = settings_of(task, given)
    check_settings(row.settings, vars(settings))
    check(task, settings)
    return settings


def settings_of(task, given):
    """The namespace, with the protocol's defaults for the settings that it lacks."""
    paper, rows = getattr(given, "protocol", None) == "paper", TASKS[task].settings
    defaults = {name: row.paper if paper else row.demo for name, row in rows.items()}
    settings = argparse.Namespace(**defaults | vars(given))
    if "norm" in settings and settings.norm is None:
        settings.norm = TASKS[task].norm
    return settings


def check(task, settings):
    """SystemExit for settings that do not go together."""
    row, size, given = TASKS[task], settings.image_size or (), vars(settings).get
    if any(not 1 <= side <= SIDE or side % row.multiple for side in size):
        wanted = f"1 to {SIDE}" + (f", multiples of {row.multiple}" if row.multiple > 1 else "")
        raise SystemExit(f"--image-size must be {wanted}, not {size[0]} {size[1]}")
    if task == "fields" and min(settings.steps) < 1:
        raise SystemExit(f"--steps must be at least 1, not {min(settings.steps)}")
    for name, what in (("weights", "file"), ("layers", "block")):
        if given(name) and len(set(given(name))) < len(given(name)):
            raise SystemExit(f"--{name} names a {what} twice")
    if row.probe and not settings.epochs and not settings.steps:
        raise SystemExit("--epochs cannot be 0 where --steps is")
    if task == "all" and settings.data:
        raise SystemExit("--task all is for procedural rooms: every task wants data of its own")
    if sum(bool(given(name)) for name in ("weights", "run", "teacher")) > 1:
        raise SystemExit("--weights, --run and --teacher each say what to compare: choose one")
    if given("teacher_weights") and not given("teacher"):
        raise SystemExit("--teacher-weights goes with --teacher")


def main(arguments=None):
    with many_processes(), plain_messages():
        settings = parse_settings(arguments)
        models, home = [], Path("runs")
        if settings.task == "fields":
            vit, warning = load_teacher(vars(settings))
            models = [Model(settings.teacher, [vit.to(DEVICE)], warning)]
        elif settings.task != "reconstruction":
            models, home = load_models(settings)
        if warning := warning_of(models):
            banner(warning)
        four = [task for task, row in TASKS.items() if row.norm is not None]
        for task in four if settings.task == "all" else [settings.task]:
            run_task(task, settings_of(task, settings), models, home)


if __name__ == "__main__":
    main()
