"""The path that only a GPU takes, traced without one: every stage's training step and preview, and
the probes' feature extraction, on fake tensors of a device that is not there.

Fake tensors have shapes, types and a device, and no values. A tensor that is made on another device
than those that it meets raises. What kernels compute is tested elsewhere.
"""

import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import evaluate
import model
import reconstruct
import train

H, W, V = 112, 112, 2


def test_what_only_a_gpu_runs():
    """Every trace_ below, in a process of its own: a device once registered stays."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
               "--show-capture=no", "-o", "python_functions=trace_*", __file__]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "9 passed" in run.stdout, run.stdout[-5000:]


LIBRARY = torch.library.Library("_", "IMPL")  # under autocast, operators as they are
MODE = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)


def choose(tensor, index):
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        assert index.device == tensor.device
        return tensor.flatten(0, index.ndim - 1)
    parts = index if isinstance(index, tuple) else (index,)
    lists = (torch.empty(len(i), dtype=torch.long, device=tensor.device) if isinstance(i, list)
             else i for i in parts)  # fmt: skip
    return torch.Tensor.__getitem__(tensor, tuple(lists))


@pytest.fixture
def gpu(monkeypatch):
    """Inside, device "gpu" has fake tensors, which kernels and autocast take for a GPU's."""
    if not hasattr(torch, "gpu"):
        _setup_privateuseone_for_python_backend("gpu")
        LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    on_gpu = property(lambda t: t.device.type == "gpu")
    monkeypatch.setattr(FakeTensor, "is_cuda", on_gpu, raising=False)
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    # These copy numbers to the device below the fake mode
    real = torch.tensor

    def new(data, device="cpu", **options):
        like = data if torch.is_tensor(data) else real(data, **options)
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    monkeypatch.setattr(torch, "tensor", new)
    monkeypatch.setattr(torch, "as_tensor", new)
    monkeypatch.setattr(FakeTensor, "new_tensor", lambda t, data: new(data, t.device).to(t.dtype),
                        raising=False)  # fmt: skip
    # What values decide: a mask chooses all, there is one somewhere, and there are seven segments
    monkeypatch.setattr(FakeTensor, "__getitem__", choose, raising=False)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda t: True)
    monkeypatch.setattr(FakeTensor, "__int__", lambda t: 6, raising=False)
    monkeypatch.setattr(reconstruct, "check_views", lambda *_: None)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda p, **_: p)
    monkeypatch.setattr(train, "autocast", lambda _: torch.autocast("gpu", torch.bfloat16))
    with MODE:
        yield torch.device("gpu")


def views(gpu, *lead):
    def new(*shape, dtype=torch.float32):
        return torch.empty(*lead, *shape, dtype=dtype, device=gpu)

    masks = {"masks": new(H, W, dtype=torch.int64), "valid": new(H, W, dtype=torch.bool)}
    cameras = {"extrinsics": new(4, 4), "Ks": new(3, 3)}
    return {"images": new(3, H, W), "depths": new(H, W), **cameras, **masks}


def batch_of(gpu, B=2):
    has_masks = torch.empty(B, dtype=torch.bool, device=gpu)
    return {"context": views(gpu, B, V), "target": views(gpu, B), "has_masks": has_masks}


def stage_of(kind, network, **settings):
    stage = kind.__new__(kind)
    stage.model, stage.settings = network, settings
    return stage


def take_step(stage, batch):
    """A step with its backward pass; every parameter that is trained has a gradient there."""
    metrics = stage.step(stage.model, batch, 1, lambda loss: loss.backward() or True)
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    assert trained and all(p.grad.device.type == "gpu" for p in trained if p.grad is not None)
    assert any(p.grad is not None for p in trained)
    assert all(m.device.type == "gpu" for m in metrics.values())


@pytest.mark.parametrize("loss", ["contrastive", "both"])
@pytest.mark.parametrize("geometry", ["depth", "photos"])
def trace_distillation(gpu, loss, geometry):
    method = {name: row.demo for name, row in train.METHOD.items()}
    method |= dict(loss=loss, blend=0.5, prototypes=32, head_dim=16, bottleneck_dim=8)
    with gpu:
        lift = reconstruct.SensorDepth()
        if geometry == "photos":
            lift = reconstruct.FeedForward(reconstruct.MVSplat(reconstruct.SMALL), 3.0, 50.0)
        network = model.SplatAndDistill(model.ViT(48, 2, 3), lift, **method).train()
    stage = stage_of(train.Distill, network, precision="auto", ema_every=1, momentum=0.9)
    take_step(stage, batch_of(gpu))
    network.eval()
    preview(stage, batch_of(gpu))


def preview(stage, batch):
    with torch.no_grad():
        panels, measured = stage.draw(batch)
    assert panels and all(m.device.type == "gpu" for m in measured.values())


@pytest.mark.parametrize("coarse", [0, 1])
def trace_reconstruction(gpu, coarse):
    with gpu:
        network = reconstruct.MVSplat(reconstruct.SMALL)
        network = reconstruct.Reconstruction(network, 3.0, 50.0, 0.2).train()
    stage = stage_of(train.Reconstruct, network, coarse=coarse)
    take_step(stage, batch_of(gpu))
    network.eval()
    preview(stage, batch_of(gpu))


def trace_pretraining(gpu):
    with gpu:
        network = model.Pretraining(model.ViT(48, 2, 3), 0.07, 0.1, True).train()
    stage = stage_of(train.Pretrain, network, precision="auto")
    crops = torch.empty(2, 2, 3, H, W, device=gpu)
    windows, moves = torch.empty(2, 2, 2, 3, device=gpu), torch.empty(2, 2, 3, device=gpu)
    batch = {"crops": crops, "windows": windows, "first_to_second": moves}
    take_step(stage, batch)
    preview(stage, batch | {"photos": torch.empty(4, 3, H, W, device=gpu)})


def trace_features_of_probes(gpu, monkeypatch):
    monkeypatch.setattr(evaluate, "DEVICE", "gpu")
    with gpu:
        vits = [model.ViT(48, 2, 3), model.ViT(48, 2, 3, patch=16)]
    settings = types.SimpleNamespace(layers=None, blocks=2, norm=True)
    images = torch.empty(2, 3, 120, 130)
    patches, classes = evaluate.extract(types.SimpleNamespace(vits=vits), images, settings)
    assert (patches.device.type, classes.device.type) == ("cpu", "cpu")
    assert patches.shape == (2, 2 * 2 * 48, 8, 9) and patches.dtype == torch.half


def trace_a_tensor_on_the_wrong_device_is_found(gpu):
    """What this file relies on."""
    batch = batch_of(gpu)
    batch["context"]["Ks"] = torch.empty(2, V, 3, 3)
    with gpu:
        lift = reconstruct.FeedForward(reconstruct.MVSplat(reconstruct.SMALL), 3.0, 50.0)
    with pytest.raises(Exception, match="same device"):
        lift(batch["context"])
