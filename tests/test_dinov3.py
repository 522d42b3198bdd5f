"""DINOv3: equal to the public model, under each of its three names, trained and measured.

golden_dinov3.safetensors holds slices of values that Meta's code computed, with weights that are a
function of the parameter's name alone (`golden_weight`).
"""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import evaluate as E
import model as M
import train
from test_model import PixelFeatures, build, golden_weight, wall
from test_train import SMALL as TRAIN

GOLDEN = load_file(Path(__file__).parent / "golden_dinov3.safetensors")
TINY = dict(dim=24, depth=2, heads=2)
CONSTANT = ("periods", "bias_mask")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder of its own, and small transformers by known names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(M.ARCHITECTURES, "dinov2_vits14", TINY)
    small = TINY | M.DINOV3
    monkeypatch.setitem(M.ARCHITECTURES, "dinov3_vits16", small)
    monkeypatch.setitem(M.ARCHITECTURES, "dinov3_vits16plus", small | dict(mlp=M.GatedMlp))


def lively(name, biases=True):
    """A ViT whose every number matters, but for what is masked: biases too, unless they are 0."""
    vit = M.load_vit(name, "random")
    state = vit.state_dict()
    for key, value in state.items():
        if not key.endswith(CONSTANT):
            state[key] = golden_weight(key, value.shape)
        if key.endswith("qkv.bias") and not biases:
            state[key] = torch.zeros_like(value)
    vit.load_state_dict(state)
    return vit


# --------------------------------------------------------------------------- the transformer


def test_parameters_are_metas():
    """What sha256 makes of the public model's sorted "name shape" lines, its first 16 digits."""
    with torch.device("meta"):
        state = M.ViT(**M.sizes_of("dinov3_vits16")).state_dict()
    lines = "\n".join(f"{n} {list(p.shape)}" for n, p in sorted(state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "09831ac8426a15d4"


def test_vit_equals_the_public_model(tmp_path):
    state = lively("dinov3_vits16").state_dict()
    # As Meta's files have them
    assert torch.equal(state["rope_embed.periods"], 100 ** (torch.arange(16) / 16))
    mask = torch.cat([torch.ones(384), torch.zeros(384), torch.ones(384)])
    assert torch.equal(state["blocks.11.attn.qkv.bias_mask"], mask)
    torch.save(state, tmp_path / "golden.pth")
    vit = M.load_vit("dinov3_vits16", tmp_path / "golden.pth")
    images = GOLDEN["images_7000"].float() / 7000  # rounded to save space; worth 2e-4 in the values
    with torch.no_grad():
        features = vit.forward_features(images)
        (block5,) = vit.get_intermediate_layers(images, n=[5], norm=False)
        ((last, cls),) = vit.get_intermediate_layers(images, reshape=True, return_class_token=True)
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(features["x_norm_clstoken"], GOLDEN["cls"], **close)
    torch.testing.assert_close(features["x_norm_regtokens"], GOLDEN["storage"], **close)
    torch.testing.assert_close(features["x_norm_patchtokens"][:, ::8], GOLDEN["patches"], **close)
    torch.testing.assert_close(block5[:, ::8], GOLDEN["block5"], **close)
    assert last.shape[-2:] == (96 // 16, 160 // 16)
    torch.testing.assert_close(last.flatten(2).mT[:, ::8], GOLDEN["patches"], **close)
    torch.testing.assert_close(cls, GOLDEN["cls"], **close)


def test_gated_mlp_is_its_formula():
    mlp, x = M.GatedMlp(12), torch.randn(5, 12)
    gate = mlp.w1(x)
    torch.testing.assert_close(mlp(x), mlp.w3(gate * torch.sigmoid(gate) * mlp.w2(x)))


def test_attention_knows_how_far_apart_patches_are_not_where():
    """The property that rotation is for: on a grid twice as fine, two patches further on."""
    cos, sin = M.Rope(16)(1, 4)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 4, 16)
    scores = M.rotate(q, cos, sin)[0, 0] @ M.rotate(k, cos, sin)[0, 0].T
    for offset in (-2, -1, 1, 2):
        apart = scores.diagonal(offset)
        torch.testing.assert_close(apart, apart[:1].expand_as(apart))
    assert scores[0].std() > 1e-3
    finer = M.Rope(16)(1, 8)
    q, k = (t[:, :, :1].expand(1, 1, 8, 16) for t in (q, k))
    fine = M.rotate(q, *finer)[0, 0] @ M.rotate(k, *finer)[0, 0].T
    torch.testing.assert_close(fine[0, 2], scores[0, 1])


def test_tokens_that_are_no_patches_are_not_turned():
    x = torch.randn(1, 2, 5 + 6, 12)
    turned = M.rotate(x, *M.Rope(12)(2, 3))
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    assert (turned[:, :, 5:] - x[:, :, 5:]).abs().amax((0, 1, 3)).min() > 0.1
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_angles_stay_float32_under_autocast():
    rope, x = M.Rope(64), torch.randn(1, 1, 6, 64, dtype=torch.bfloat16)
    plain = rope(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rope(2, 3)
        turned = M.rotate(x, *inside)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, M.rotate(x.float(), *plain).bfloat16())


def test_the_keys_bias_counts_for_nothing(tiny):
    vit, images = lively("dinov3_vits16"), torch.randn(1, 3, 32, 48)
    before = vit.forward_features(images)["x_prenorm"]
    bias = vit.blocks[0].attn.qkv.bias
    with torch.no_grad():
        bias[24:48] += 1.0
        assert torch.equal(vit.forward_features(images)["x_prenorm"], before)
        bias[:24] += 1.0
        assert (vit.forward_features(images)["x_prenorm"] - before).abs().max() > 0.01


def test_image_size_must_fit(tiny):
    with pytest.raises(ValueError, match="multiples of 16 pixels high and wide, not 32 x 28"):
        M.load_vit("dinov3_vits16", "random")(torch.zeros(1, 3, 32, 28))


# --------------------------------------------------------------------------- weights


def timms(state, biases):
    """As `vit_*_patch16_dinov3_qkvb`, or without biases `vit_*_patch16_dinov3`, names them."""
    out = {}
    for name, t in state.items():
        if name.endswith(CONSTANT) or name == "mask_token":
            continue
        if name.endswith("qkv.bias"):
            if biases:
                out[name.replace("qkv.bias", "q_bias")] = t[:24].clone()
                out[name.replace("qkv.bias", "v_bias")] = t[48:].clone()
            continue
        for ours, theirs in (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"),
                             ("ls2.gamma", "gamma_2"), ("mlp.w1.", "mlp.fc1_g."),
                             ("mlp.w2.", "mlp.fc1_x."), ("mlp.w3.", "mlp.fc2.")):  # fmt: skip
            name = name.replace(ours, theirs)
        out[name] = t
    return out


def transformers(state, layers="layer."):
    """As `facebook/dinov3-*` names them; from version 5 on it saves "model.layer."."""
    out = {"embeddings.mask_token": state["mask_token"][None]}
    gated = any(".mlp.w1." in name for name in state)
    for name, t in state.items():
        if name.endswith(CONSTANT) or name == "mask_token":
            continue
        for ours, theirs in (("cls_token", "embeddings.cls_token"),
                             ("storage_tokens", "embeddings.register_tokens"),
                             ("patch_embed.proj.", "embeddings.patch_embeddings."),
                             ("blocks.", layers), ("attn.proj.", "attention.o_proj."),
                             ("ls1.gamma", "layer_scale1.lambda1"),
                             ("ls2.gamma", "layer_scale2.lambda1"),
                             ("mlp.w1.", "mlp.gate_proj."), ("mlp.w3.", "mlp.down_proj."),
                             ("mlp.fc2.", "mlp.down_proj."),
                             ("mlp.w2." if gated else "mlp.fc1.", "mlp.up_proj.")):  # fmt: skip
            name = name.replace(ours, theirs)
        if "attn.qkv" not in name:
            out[name] = t
            continue
        for part, third in zip("qkv", t.chunk(3)):
            if part != "k" or name.endswith("weight"):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = third.clone()
    return out


LAYOUTS = {
    "meta": lambda state: state,
    "timm": lambda state: timms(state, biases=False),
    "timm qkvb": lambda state: timms(state, biases=True),
    "transformers": transformers,
    "transformers 5": lambda state: transformers(state, "model.layer."),
}


@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vits16plus"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_of_a_weight_loads_to_the_same_model(tiny, name, layout):
    vit = lively(name, biases=layout != "timm")
    state = LAYOUTS[layout](vit.state_dict())
    assert M.architecture_of(state, "file") == name
    save_file(state, "weights.safetensors")
    loaded = M.load_vit(name, "weights.safetensors")
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected, got = (v.forward_features(images)["x_prenorm"] for v in (vit, loaded))
    assert torch.equal(got, expected) and expected.std() > 0.1
    assert ("timm" in layout) != torch.equal(loaded.mask_token, vit.mask_token)


@pytest.mark.parametrize("name", [*M.ARCHITECTURES, "dinov2_vits14_reg", "dinov2_vitg14_reg"])
def test_architectures_are_recognised(name):
    with torch.device("meta"):
        state = M.ViT(**M.sizes_of(name)).state_dict()
    assert M.architecture_of(state, "file") == name


def without(state, *ends):
    return {k: v for k, v in state.items() if not k.endswith(ends)}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: M.load_vit("dinov2_vits14", "random").state_dict(),
         'Missing.*"blocks.0.attn.qkv.bias_mask"'),
        (lambda s: M.load_vit("dinov3_vits16plus", "random").state_dict(),
         'Missing.*"blocks.0.mlp.fc1.bias"'),
        (lambda s: without(s, "bias_mask"), 'Missing.*"blocks.0.attn.qkv.bias_mask"'),
        (lambda s: without(s, "storage_tokens"), 'Missing.*"storage_tokens"'),
        (lambda s: s | {"local_cls_norm.bias": torch.zeros(24)},
         'Unexpected.*"local_cls_norm.bias"'),
        (lambda s: without(timms(s, True), "ls1.gamma", "gamma_1"),
         'Missing.*"blocks.0.ls1.gamma"'),
        (lambda s: timms(s, True) | {"blocks.0.attn.q_bias": torch.zeros(7)},
         'Missing.*"blocks.0.attn.qkv.bias"'),
        (lambda s: without(transformers(s), "0.attention.k_proj.weight"),
         'Missing.*"blocks.0.attn.qkv.weight"'),
        (lambda s: transformers(s) | {"layer.1.attention.k_proj.weight": torch.zeros(24, 7)},
         'Missing.*"blocks.1.attn.qkv.weight"'),
        (lambda s: transformers(s) | {"layer.0.attention.k_proj.bias": torch.zeros(24)},
         'Unexpected.*"blocks.0.attn.k_proj.bias"'),
        (lambda s: transformers(s) | {"norm.bias": torch.zeros(7)}, "size mismatch for norm.bias"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_get_one_sentence(tiny, change, message):
    torch.save(change(lively("dinov3_vits16").state_dict()), "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth: does not fit .*{message}") as error:
        M.load_vit("dinov3_vits16", "weights.pth")
    assert "\n" not in str(error.value)


def test_dinov3_is_no_dinov2(tiny):
    torch.save(lively("dinov3_vits16").state_dict(), "weights.pth")
    with pytest.raises(ValueError, match='weights.pth: does not fit .* Missing.*"pos_embed"'):
        M.load_vit("dinov2_vits14", "weights.pth")
    with pytest.raises(ValueError, match="unknown model 'dinov3_vits16_reg'; known are"):
        M.load_vit("dinov3_vits16_reg", "random")


def test_missing_weights_say_what_to_fetch_and_where_to_put_it(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: asked.append(a))
    file = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    with pytest.raises(SystemExit) as error:  # on procedural rooms, where DINOv2's need not end it
        train.main(["--teacher", "dinov3_vits16", "--geometry", "depth"])
    said = str(error.value)
    assert file in said and str(tmp_path / "checkpoints") in said and "licence form" in said
    assert "\n" not in said and M.DINOV3_FORM in said and not asked
    (tmp_path / "checkpoints").mkdir()
    state = lively("dinov3_vits16").state_dict()
    torch.save(state, tmp_path / "checkpoints" / file)
    loaded = M.load_vit("dinov3_vits16").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_random_weights_have_the_constants_of_metas_files(tiny):
    a, b = (M.load_vit("dinov3_vits16", "random", seed).state_dict() for seed in (1, 2))
    same = {k for k in a if a[k].ndim == 1 and torch.equal(a[k], b[k])}
    assert {k for k in a if k.endswith(CONSTANT)} <= same
    assert torch.equal(a["rope_embed.periods"], 100 ** (torch.arange(3) / 3))
    assert a["blocks.1.attn.qkv.bias_mask"].view(3, 24).mean(1).tolist() == [1, 0, 1]
    assert not torch.equal(a["storage_tokens"], b["storage_tokens"])


# --------------------------------------------------------------------------- the student


def test_lora_merges_to_what_the_student_became(tiny):
    vit, images = lively("dinov3_vits16"), torch.randn(2, 3, 32, 48)
    names = set(vit.state_dict())
    plain = vit.forward_features(images)["x_prenorm"]
    M.add_lora(vit, rank=4, alpha=2, dropout=0.1).eval()
    torch.testing.assert_close(vit.forward_features(images)["x_prenorm"], plain)
    with torch.no_grad():
        for p in vit.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2)
        changed = vit.forward_features(images)["x_prenorm"]
    assert (changed - plain).abs().max() > 0.1
    merged = M.merge_lora(vit)
    assert set(merged) == names
    save_file(merged, "student.safetensors")
    assert M.architecture_of(merged, "file") == "dinov3_vits16"
    again = M.load_vit("dinov3_vits16", "student.safetensors")
    got = again.forward_features(images)["x_prenorm"]
    torch.testing.assert_close(got, changed, rtol=1e-4, atol=1e-4)


class WidePixelFeatures(PixelFeatures):
    patch_size = 16


def test_features_are_splatted_onto_the_grid_of_the_vits_patches():
    """Sizes that no multiple of 14 fits; 90 pixels are more than 5 patches of 16."""
    batch = wall(B=2, H=90, W=128)
    method = build(WidePixelFeatures(), blend=1.0).eval()
    loss, _, drawn = method(batch)
    assert drawn["splatted"].shape == drawn["student"].shape == (2, 3, 5, 8)
    aligned = method.alignment(batch, drawn)
    assert aligned["cosine_splatted"] > 0.95
    assert aligned["cosine_splatted"] > aligned["cosine_unwarped"] + 0.1
    resized = F.interpolate(M.normalise(batch["target"]["images"]), (80, 128), mode="bilinear")
    torch.testing.assert_close(drawn["student"], F.avg_pool2d(resized, 16), rtol=1e-4, atol=1e-4)


def test_a_run_with_dinov3_from_training_to_measuring(tiny):
    size = ["--height", "48", "--width", "90"]
    train.main([*TRAIN, *size, "--teacher", "dinov3_vits16", "--name", "x"])
    lines = [json.loads(line) for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(math.isfinite(m["loss"]) for m in lines)
    student = M.load_vit("dinov3_vits16", "runs/x/student.safetensors").state_dict()
    teacher = M.load_vit("dinov3_vits16", "random", seed=0).state_dict()
    changed = [k for k, v in student.items() if not torch.equal(v, teacher[k])]
    trained = ["patch_embed.proj.weight"]
    trained += [f"blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("qkv", "proj")]
    assert changed == trained
    measure = "--task correspondence --image-size 56 72 --pairs 1 --seeds 1".split()
    E.main([*measure, "--run", "runs/x"])
    torch.save(M.load_vit("dinov2_vits14", "random").state_dict(), "dinov2.pth")
    E.main([*measure, "--weights", "dinov2.pth", "runs/x/student.safetensors"])
    by_run, by_file = (
        json.loads(Path(folder, "evaluation/correspondence-1/results.json").read_text())["per_seed"]
        for folder in ("runs/x", "runs")
    )
    assert by_run["student runs/x"] == by_file["runs/x/student.safetensors"]
    assert by_file["dinov2.pth"] != by_file["runs/x/student.safetensors"]


def test_the_least_size_is_the_teachers_patch():
    for teacher, least in (("dinov2_vits14", 14), ("dinov3_vits16", 16)):
        size = ["--width", str(least), "--height", str(least - 1)]
        with pytest.raises(SystemExit, match=f"--height must be at least {least}, not {least - 1}"):
            train.parse_settings(["--teacher", teacher, "--geometry", "depth", *size])
        fits = ["--width", str(least), "--height", str(least)]
        assert train.parse_settings(["--teacher", teacher, "--geometry", "depth", *fits])


# --------------------------------------------------------------------------- side by side


def test_vits_with_other_patches_are_put_on_the_first_ones_grid(tiny):
    vits = [M.load_vit(name, "random", 1) for name in ("dinov3_vits16", "dinov2_vits14")]
    images = torch.rand(1, 3, 50, 85)
    settings = E.parse_settings(["--task", "depth", "--blocks", "1"])
    each = [E.extract(E.Model("one", [vit], None), images, settings) for vit in vits]
    assert [f.shape[-2:] for f, _ in each] == [(3, 5), (3, 6)]
    resized = F.interpolate(images, (48, 80), mode="bilinear")
    alone = vits[0].get_intermediate_layers(M.normalise(resized), 1, True, norm=False)[0]
    torch.testing.assert_close(each[0][0], alone.half())
    features, classes = E.extract(E.Model("both", vits, None), images, settings)
    torch.testing.assert_close(features[:, :24], each[0][0])
    other = F.interpolate(each[1][0].float(), (3, 5), mode="bilinear")
    torch.testing.assert_close(features[:, 24:].float(), other, rtol=2e-3, atol=2e-3)
    assert torch.equal(classes, each[0][1])  # the first model's alone


def test_images_smaller_than_a_patch_get_one_sentence(tiny):
    for name in ("dinov2_vits14", "dinov3_vits16"):
        torch.save(M.load_vit(name, "random").state_dict(), f"{name}.pth")
    arguments = ["--task", "depth", "--image-size", "15", "56", "--weights", "dinov2_vits14.pth"]
    E.load_models(E.parse_settings(arguments))  # 15 pixels are a patch of DINOv2's
    with pytest.raises(SystemExit, match="--image-size must be at least 16, .*dinov3.*not 15 56"):
        E.main([*arguments, "dinov3_vits16.pth"])
