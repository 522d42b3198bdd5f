"""model.py: equal to the public implementations where they exist, else to a few plain lines.

golden.safetensors holds slices of values that the public code computed, with weights that are a
function of the parameter's name alone (`golden_weight`).
"""

import hashlib
import math
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data
import model as M
import reconstruct
from kernels import rasterize

GOLDEN = load_file(Path(__file__).parent / "golden.safetensors")
# What sha256 makes of the public models' sorted "name shape" lines, its first 16 digits
PUBLIC_NAMES_AND_SHAPES = {
    "dinov2_vits14": "8e39e962076b51da",
    "dinov2_vits14_reg": "81d9f6ee1a0326c0",
    "dinov2_vitb14": "591020a449940c1e",
    "dinov2_vitl14": "a871e44cb13ecf8b",
    "dinov2_vitg14": "006d3e45bdd4dded",
}


def golden_weight(name, shape):
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) >= 2:
        return r / math.sqrt(math.prod(shape[1:]))
    return 0.1 * r if name.endswith("bias") else 1 + 0.1 * r


def golden_state(module):
    return {name: golden_weight(name, p.shape) for name, p in module.state_dict().items()}


def tiny_vit(seed=0, registers=0, mlp=M.Mlp):
    vit = M.ViT(dim=24, depth=2, heads=2, registers=registers, mlp=mlp)
    vit.load_state_dict(M.random_state(vit, seed))
    return vit.eval()


def test_autocast_does_not_round_positions():
    """bfloat16 would move them by up to half a pixel of a crop."""
    points, affine = torch.rand(50, 2) * 2 - 1, torch.randn(3, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        moved = M.moved(points, affine)
    truth = torch.einsum("bij,pj->bpi", affine[..., :2].double(), points.double())
    truth = truth + affine[:, None, :, 2].double()
    assert (moved - truth).abs().max() < 1e-6


# --------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("name", PUBLIC_NAMES_AND_SHAPES)
def test_parameters_are_dinov2s(name):
    base = name.removesuffix("_reg")
    with torch.device("meta"):
        state = M.ViT(
            **M.ARCHITECTURES[base], registers=4 if name.endswith("_reg") else 0
        ).state_dict()
    lines = "\n".join(f"{n} {list(p.shape)}" for n, p in sorted(state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == PUBLIC_NAMES_AND_SHAPES[name]


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_vit_equals_the_public_model(name, tmp_path):
    vit = M.load_vit(name, "random")
    save_file(golden_state(vit), tmp_path / "golden.safetensors")
    vit = M.load_vit(name, tmp_path / "golden.safetensors")
    images = (
        GOLDEN["dinov2.images_8192"].float() / 8192
    )  # rounded to save space; worth 5e-4 in the values
    with torch.no_grad():
        features = vit.forward_features(images)
        (block5,) = vit.get_intermediate_layers(images, n=[5], norm=False)
        ((last, cls),) = vit.get_intermediate_layers(
            images, n=1, reshape=True, return_class_token=True
        )
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(features["x_norm_clstoken"], GOLDEN[f"{name}.cls"], **close)
    torch.testing.assert_close(
        features["x_norm_patchtokens"][:, ::16], GOLDEN[f"{name}.patches"], **close
    )
    torch.testing.assert_close(block5[:, ::16], GOLDEN[f"{name}.block5"], **close)
    torch.testing.assert_close(
        last.flatten(2).transpose(1, 2)[:, ::16], GOLDEN[f"{name}.patches"], **close
    )
    torch.testing.assert_close(cls, GOLDEN[f"{name}.cls"], **close)
    assert last.shape[-2:] == (252 // 14, 196 // 14)


def test_intermediate_layers_normed_or_not():
    vit, images = tiny_vit(registers=4), torch.randn(1, 3, 28, 42)
    raw, normed = (vit.get_intermediate_layers(images, n=2, norm=norm) for norm in (False, True))
    assert len(raw) == 2
    torch.testing.assert_close(vit.norm(raw[0]), normed[0])
    torch.testing.assert_close(normed[-1], vit.forward_features(images)["x_norm_patchtokens"])
    with pytest.raises(ValueError, match="there are 2"):
        vit.get_intermediate_layers(images, n=[2])


def test_swiglu_is_its_formula():
    mlp = M.SwiGLU(12)
    x = torch.randn(5, 12)
    hidden = mlp.w12(x)
    gate, value = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
    torch.testing.assert_close(mlp(x), mlp.w3(gate * torch.sigmoid(gate) * value))


def test_image_size_must_fit():
    with pytest.raises(ValueError, match="multiples of 14 pixels high and wide, not 28 x 30"):
        tiny_vit()(torch.zeros(1, 3, 28, 30))


def test_patch_tokens_resize_and_normalise():
    vit, images = tiny_vit(), torch.rand(2, 3, 3, 45, 30)  # any leading dimensions
    tokens = M.patch_tokens(vit, images)
    assert tokens.shape == (2, 3, 24, 3, 2)
    resized = F.interpolate(images[1, 2][None], (42, 28), mode="bilinear")
    normalised = (resized - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    expected = vit.get_intermediate_layers(normalised, reshape=True)[0][0]
    torch.testing.assert_close(tokens[1, 2], expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- weights


@pytest.fixture
def tiny_architecture(monkeypatch):
    monkeypatch.setitem(M.ARCHITECTURES, "dinov2_vits14", dict(dim=24, depth=2, heads=2))
    monkeypatch.setitem(
        M.ARCHITECTURES, "dinov2_vitg14", dict(dim=24, depth=2, heads=2, mlp=M.SwiGLU)
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_what_it_saved(tmp_path, tiny_architecture, suffix):
    state = tiny_vit(seed=3).state_dict()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    loaded = M.load_vit("dinov2_vits14", path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov2_vitg14"])
def test_timms_files_compute_the_same(tmp_path, tiny_architecture, name):
    """The two conversions that timm makes: cls's position folded into cls, and SwiGLU's names."""
    vit = M.load_vit(name, "random", seed=1)
    timm = {k: v for k, v in vit.state_dict().items() if k != "mask_token"}
    if name.endswith("_reg"):
        timm["reg_token"] = timm.pop("register_tokens")
        timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
        timm["pos_embed"] = timm["pos_embed"][:, 1:].contiguous()
    timm = {
        k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for k, v in timm.items()
    }
    save_file(timm, tmp_path / "timm.safetensors")
    images = torch.randn(1, 3, 56, 70)
    with torch.no_grad():
        expected, got = (
            v.forward_features(images)["x_prenorm"]
            for v in (vit, M.load_vit(name, tmp_path / "timm.safetensors"))
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_public_weights_come_from_torch_hubs_cache(tmp_path, tiny_architecture, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = tiny_vit(seed=5).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth")
    assert torch.equal(M.load_vit("dinov2_vits14").cls_token, state["cls_token"])


def test_no_weights_says_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(url, **_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(
        M.WeightsNotFound,
        match=r"checkpoints/dinov2_vits14_reg4_pretrain.pth.*no network.*put it there, or pass",
    ):
        M.load_vit("dinov2_vits14_reg")


def test_random_weights_are_a_function_of_the_seed(tiny_architecture):
    a, b, c = (
        M.load_vit("dinov2_vits14", "random", seed=s).patch_embed.proj.weight for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def tiny_state():
    return tiny_vit().state_dict()


def _pickle(path):
    torch.save({"hook": Path.cwd()}, path)


@pytest.mark.parametrize(
    "write,message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"GIF89a"), "damaged or holds more than tensors"),
        (lambda path: path.write_bytes(b""), "damaged or holds more"),
        (_pickle, "holds more than tensors .Weights only load failed.$"),
        (lambda path: torch.save([1, 2], path), "not a state dict"),
        (lambda path: torch.save({"model": {}}, path), "holds more than tensors .TypeError.$"),
        (lambda path: torch.save({"cls_token": torch.zeros(1).expand(10**13)}, path),
         "not a state dict .*a tensor repeats what the file holds once"),
        (lambda path: torch.save({k: v for k, v in tiny_state().items() if "ls1" not in k}, path),
         'does not fit this architecture: Missing .* "blocks.0.ls1.gamma", "blocks.1.ls1.gamma"'),
        (lambda path: torch.save(tiny_state() | {"head.weight": torch.zeros(1)}, path),
         'Unexpected .* "head.weight"'),
        (lambda path: torch.save(tiny_state() | {"norm.bias": torch.zeros(7)}, path),
         "size mismatch for norm.bias"),
    ],
)  # fmt: skip
def test_bad_weights_get_one_sentence(tmp_path, tiny_architecture, write, message):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        M.load_vit("dinov2_vits14", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_model_lists_the_known():
    with pytest.raises(
        ValueError,
        match="unknown model 'vit_tiny'; known are dinov2_vits14, .* each also with _reg",
    ):
        M.load_vit("vit_tiny")


# --------------------------------------------------------------------------- LoRA and head


def test_lora_starts_as_the_model_and_merges_to_what_it_became(tmp_path, tiny_architecture):
    vit = M.load_vit("dinov2_vits14", "random")
    names, images = set(vit.state_dict()), torch.randn(2, 3, 28, 28)
    plain = vit.forward_features(images)["x_prenorm"]
    M.add_lora(vit, rank=4, alpha=2, dropout=0.1).eval()
    torch.testing.assert_close(vit.forward_features(images)["x_prenorm"], plain)
    trainable = [p for p in vit.parameters() if p.requires_grad]
    assert (
        len(trainable) == 2 * 2 * 2 + 2
    )  # A and B of qkv and proj of two blocks, and of the patches' convolution
    with torch.no_grad():
        for p in trainable:
            p.normal_(0, 1)
    changed = vit.forward_features(images)["x_prenorm"]
    assert (changed - plain).abs().max() > 0.1
    merged = M.merge_lora(vit)
    assert set(merged) == names
    save_file(merged, tmp_path / "student.safetensors")
    again = M.load_vit("dinov2_vits14", tmp_path / "student.safetensors")
    torch.testing.assert_close(
        again.forward_features(images)["x_prenorm"], changed, rtol=1e-4, atol=1e-4
    )


def test_lora_is_its_formula():
    linear = torch.nn.Linear(6, 5)
    lora = M.LoRALinear(linear, rank=2, alpha=8, dropout=0.0)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(3, 6)
    torch.testing.assert_close(
        lora(x), x @ (linear.weight + 8 / 2 * lora.B @ lora.A).T + linear.bias
    )


def test_lora_of_a_convolution_is_its_formula():
    conv = torch.nn.Conv2d(3, 5, 4, 4)
    lora = M.LoRAConv(conv, rank=2, alpha=8, dropout=0.0)
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(lora(x), conv(x))  # as it was, to begin with
    torch.nn.init.normal_(lora.B)
    weight = conv.weight + 8 / 2 * torch.einsum("or,rikl->oikl", lora.B, lora.A)
    torch.testing.assert_close(lora(x), F.conv2d(x, weight, conv.bias, 4))
    lora.dropout.p = 1.0  # what is adapted is dropped, the rest is not
    torch.testing.assert_close(lora.train()(x), conv(x))


def test_prototypes_start_as_a_linear_layer_does():
    torch.manual_seed(1)
    prototypes = M.DINOHead(8, 4096).last_layer.weight_v.detach()
    assert abs(float(prototypes.norm(dim=-1).mean()) - 1 / math.sqrt(3)) < 0.005
    assert float(prototypes.abs().max()) <= 1 / math.sqrt(256)  # uniform, not normal


def test_head_and_loss_equal_the_public_code():
    head = M.DINOHead(16, 64, hidden_dim=32, bottleneck_dim=8)
    head.load_state_dict(golden_state(head))
    teacher, student = head(GOLDEN["head_teacher_in"]), head(GOLDEN["head_student_in"])
    torch.testing.assert_close(teacher, GOLDEN["head_logits"], rtol=0, atol=1e-3)
    loss, entropy = M.distillation_loss(teacher, student)
    torch.testing.assert_close(loss, GOLDEN["head_loss"][0], rtol=0, atol=1e-3)
    kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss - entropy, kl)


# --------------------------------------------------------------------------- segments


def test_upsampling_equals_the_public_code():
    out = M.upsample_features(GOLDEN["up_feats"], GOLDEN["up_mask"].long(), strict=True)
    torch.testing.assert_close(out[:, ::4, ::3, ::3], GOLDEN["up_out"], rtol=0, atol=1e-3)
    assert (GOLDEN["up_out"] == 0).all(1).any()  # strict's zeros are among what was compared


def test_upsampling_falls_back_to_bilinear_where_no_cell_counts():
    features, masks = GOLDEN["up_feats"], GOLDEN["up_mask"].long()
    strict, ours = (M.upsample_features(features, masks, strict=s) for s in (True, False))
    lost = (strict == 0).all(1, keepdim=True).expand_as(ours)
    plain = F.interpolate(features, masks.shape[1:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours[lost], plain[lost], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[~lost], strict[~lost])


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5),
       st.integers(1, 13), st.integers(1, 13), st.integers(1, 3))  # fmt: skip
def test_upsampling_keeps_segments_apart(seed, B, h, w, H, W, segments):
    """Features that are their cell's segment id come back as the pixel's own, where any counted."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, segments, (B, H, W), generator=g)
    rows, columns = (
        torch.linspace(0, H - 1, h).round().long(),
        torch.linspace(0, W - 1, w).round().long(),
    )
    ids = masks[:, rows][:, :, columns][:, None].float()
    out = M.upsample_features(torch.cat([ids, torch.ones_like(ids)], 1), masks, strict=True)
    counted = out[:, 1] > 0
    torch.testing.assert_close(out[:, 1][counted], torch.ones_like(out[:, 1])[counted])
    torch.testing.assert_close(out[:, 0][counted], masks.float()[counted])
    one = M.upsample_features(ids, torch.zeros_like(masks))  # one segment: plain bilinear
    torch.testing.assert_close(
        one, F.interpolate(ids, (H, W), mode="bilinear", align_corners=True), rtol=1e-4, atol=1e-4
    )


def test_blending_equals_the_public_code():
    out = M.blend_segments(GOLDEN["blend_in"], GOLDEN["blend_mask"].long(), 0.5)
    torch.testing.assert_close(out, GOLDEN["blend_out"], rtol=0, atol=1e-3)


@settings(max_examples=30)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1)
)
def test_blending_is_the_loop(seed, B, H, W, alpha):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, 4, H, W, generator=g)
    masks = torch.randint(
        -2, 3, (B, H, W), generator=g
    )  # the same ids in every image, some negative
    expected = features.clone()
    for b in range(B):
        for i in masks[b].unique():
            inside = masks[b] == i
            expected[b][:, inside] = alpha * features[b][:, inside] + (1 - alpha) * features[b][
                :, inside
            ].mean(1, keepdim=True)
    torch.testing.assert_close(
        M.blend_segments(features, masks, alpha), expected, rtol=1e-4, atol=1e-5
    )


# --------------------------------------------------------------------------- geometry and method


def wall(B=1, V=2, H=70, W=126, seed=0):
    """Views of a wall 3 m ahead, painted smoothly: the target is between the context cameras."""
    g = torch.Generator().manual_seed(seed)
    texture = F.interpolate(
        torch.rand(B, 3, 4, 8, generator=g), (112, 224), mode="bicubic", align_corners=True
    ).clamp(0, 1)
    K = torch.tensor([[70.0, 0, W / 2], [0, 70.0, H / 2], [0, 0, 1]])

    def view(
        shift,
    ):  # a camera `shift` pixels of the wall to the right sees it through a crop that moves along
        extrinsics = torch.eye(4).repeat(B, 1, 1)
        extrinsics[:, 0, 3] = shift * 3 / 70
        left = 49 + shift
        images = texture[:, :, 14 : 14 + H, left : left + W]
        masks = (torch.arange(W) + left > 112).long().expand(B, H, W)
        return dict(
            images=images,
            extrinsics=extrinsics,
            Ks=K.expand(B, 3, 3),
            depths=torch.full((B, H, W), 3.0),
            masks=masks,
        )

    sides = [view(shift) for shift in (-28, 28)][:V]
    context = {k: torch.stack([s[k] for s in sides], 1) for k in sides[0]}
    return {"context": context, "target": view(0), "has_masks": torch.ones(B, dtype=torch.bool)}


def build(vit=None, **changes):
    options = dict(prototypes=32, head_dim=32, bottleneck_dim=16, lora_rank=2, lora_alpha=2,
                   lora_dropout=0.1, blend=0.5, upsampling="mask-aware", centring=1.0,
                   teacher_temperature=1.0, student_temperature=1.0) | changes  # fmt: skip
    torch.manual_seed(0)
    return M.SplatAndDistill(vit or tiny_vit(), reconstruct.SensorDepth(), **options)


def test_gaussians_from_depth_render_their_own_photo():
    batch = wall(V=1)
    view = batch["context"]
    gaussians = reconstruct.SensorDepth()(view)
    photo, depth, alphas = reconstruct.render(
        gaussians, view["extrinsics"][:, 0], view["Ks"][:, 0], 126, 70
    )
    inner = (..., slice(3, -3), slice(3, -3))
    assert alphas[inner].min() > 0.95
    assert (photo / alphas[:, None] - view["images"][:, 0])[inner].abs().mean() < 0.01
    torch.testing.assert_close(depth[inner], view["depths"][:, 0][inner])


def test_unknown_depth_is_transparent():
    view = wall(V=1)["context"]
    view["depths"][0, 0, 0, 0] = 0.0
    gaussians = reconstruct.SensorDepth()(view)
    assert gaussians.opacities[0, :2].tolist() == [0, 1]
    assert all(torch.isfinite(t).all() for t in gaussians)


def test_unprojection_inverts_projection():
    g = torch.Generator().manual_seed(0)
    depths, K = (
        1 + torch.rand(2, 5, 7, generator=g),
        torch.tensor([[6.0, 0, 3.3], [0, 8.0, 2.1], [0, 0, 1]]),
    )
    extrinsics = torch.eye(4).repeat(2, 1, 1)
    extrinsics[:, :3, :3] = torch.linalg.matrix_exp(
        torch.tensor([[0, -0.3, 0.1], [0.3, 0, -0.2], [-0.1, 0.2, 0]])
    )
    extrinsics[:, :3, 3] = torch.randn(2, 3, generator=g)
    points = reconstruct.unproject(depths, K.expand(2, 3, 3), extrinsics)
    R, t = extrinsics[:, :3, :3], extrinsics[:, :3, 3]
    camera = torch.einsum("bji,bhwj->bhwi", R, points - t[:, None, None])
    pixels = camera @ K.T
    torch.testing.assert_close(camera[..., 2], depths)
    torch.testing.assert_close(
        pixels[..., 0] / pixels[..., 2],
        (torch.arange(7) + 0.5).expand(2, 5, 7),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        pixels[..., 1] / pixels[..., 2],
        (torch.arange(5) + 0.5)[:, None].expand(2, 5, 7),
        rtol=1e-4,
        atol=1e-4,
    )


class PixelFeatures(torch.nn.Module):
    """Stands in for the transformer: a patch's token is its mean colour, wherever it is."""

    embed_dim, blocks, patch_size = 3, [], 14

    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.Module()  # where LoRA looks; nothing passes through it
        self.patch_embed.proj = torch.nn.Conv2d(3, 1, 14)
        self.shift = torch.nn.Parameter(torch.zeros(3))

    def forward_features(self, images):
        tokens = F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)
        return {"x_norm_patchtokens": tokens + self.shift}


def test_splatted_features_land_where_the_target_sees_them():
    batch = wall(B=2)
    method = build(PixelFeatures(), blend=1.0).eval()
    drawn = method.splat(batch["context"], batch["target"], batch["has_masks"])
    aligned = method.alignment(batch, drawn)
    assert not drawn["holes"].any()
    assert aligned["cosine_splatted"] > 0.95
    assert aligned["cosine_splatted"] > aligned["cosine_unwarped"] + 0.1


def test_centred_upsampling_leaves_features_where_their_patches_are():
    """Features that are their patch's place come back as their pixel's place.

    The paper's code moves them outwards."""
    grid = torch.stack(
        torch.meshgrid(torch.arange(5) * 14 + 6.5, torch.arange(9) * 14 + 6.5, indexing="ij")
    )[None]
    masks = torch.zeros(1, 70, 126, dtype=torch.long)
    centred, public = (M.upsample_features(grid, masks, centred=c)[0] for c in (True, False))
    place = torch.stack(torch.meshgrid(torch.arange(70.0), torch.arange(126.0), indexing="ij"))
    inner = (
        slice(None),
        slice(7, -7),
        slice(7, -7),
    )  # beyond the outermost centres the last feature goes on
    torch.testing.assert_close(centred[inner], place[inner], rtol=1e-4, atol=1e-3)
    assert (public - place)[:, 0, 0].tolist() == pytest.approx([6.5, 6.5])
    masks[:, :, 60:] = 1
    apart = M.upsample_features(grid, masks, centred=True)[0, 1]
    assert apart[:, :60].max() < 60 and apart[:, 60:].min() > 60


@pytest.mark.parametrize(
    "pixels,cells", [(70, 5), (576, 41), (880, 62), (97, 6), (17, 17), (16, 1)]
)
def test_taps_are_bilinear_downsampling(pixels, cells):
    row = torch.randn(1, 1, 1, pixels)
    taps, weights = M.bilinear_taps(pixels, cells)
    found = (row[0, 0, 0, taps].view(cells, 2) * weights).sum(1)
    expected = F.interpolate(row, (1, cells), mode="bilinear", align_corners=False)[0, 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=3e-4)


def test_blending_is_only_where_there_are_masks():
    batch, method = wall(B=2), build().eval()
    batch["has_masks"] = torch.tensor([True, False])
    views = batch["context"], batch["target"]
    blended = method.splat(*views, batch["has_masks"])["rendered"]
    method.blend = 1.0
    plain = method.splat(*views, batch["has_masks"])["rendered"]
    expected = M.blend_segments(plain, batch["target"]["masks"], 0.5)
    torch.testing.assert_close(blended[0], expected[0])
    torch.testing.assert_close(blended[1], plain[1])
    assert (expected[1] - plain[1]).abs().max() > 0.01


@pytest.mark.parametrize("blend,has_masks", [(1.0, [True, True]), (0.3, [True, False])])
def test_training_splats_what_the_whole_image_gives(blend, has_masks):
    """In training only the pixels that count are splatted, and the means of segments."""
    batch, method = wall(B=2), build(blend=blend)
    batch["target"]["masks"] = 7 * batch["target"]["masks"] - 3
    parts = batch["context"], batch["target"], torch.tensor(has_masks)
    whole, part = method.eval().splat(*parts), method.train().splat(*parts)
    assert whole["rendered"].shape[-2:] == (70, 126) and part["rendered"].shape[-2:] == (10, 18)
    torch.testing.assert_close(part["splatted"], whole["splatted"], rtol=1e-4, atol=1e-5)
    assert torch.equal(part["holes"], whole["holes"])


def test_a_step_is_the_method_step_by_step():
    """The whole step written out with the parts tested above, on a scene where each counts.

    It has two segments, a target that is hidden in part, heads that differ, temperatures not 1.
    """
    batch = wall()
    batch["context"]["depths"][..., :59] = (
        0  # a hole that ends between a patch's first pixel and its middle
    )
    method = build(
        PixelFeatures(), blend=0.3, teacher_temperature=0.5, student_temperature=2.0
    ).eval()
    with torch.no_grad():
        method.student.shift.add_(0.3)
        for p in method.student_head.parameters():
            p.add_(0.05 * torch.randn_like(p))
    loss, metrics, drawn = method(batch)

    context, target = batch["context"], batch["target"]
    tokens = M.patch_tokens(method.teacher, context["images"][0])
    features = (
        M.upsample_features(tokens, context["masks"][0]).permute(0, 2, 3, 1).reshape(1, -1, 3)
    )
    gaussians = reconstruct.SensorDepth()(context)[:3]
    viewmats = torch.linalg.inv(target["extrinsics"])[:, None]
    out, alphas = rasterize(*gaussians, features, viewmats, target["Ks"][:, None], 126, 70)
    blended = M.blend_segments(out[:, 0].permute(0, 3, 1, 2), target["masks"], 0.3)
    splatted = F.interpolate(blended, (5, 9), mode="bilinear")[0].flatten(1).T  # (45, C)
    rows, columns = (torch.arange(n) * 14 for n in (5, 9))  # nearest: a patch's first pixel
    seen = (alphas[0, 0][rows][:, columns] >= 0.5).flatten()
    teacher = (method.teacher_head(splatted) / 0.5).softmax(-1)[seen]
    student = M.patch_tokens(method.student, target["images"])[0].flatten(1).T
    student = (method.student_head(student) / 2.0).log_softmax(-1)[seen]
    assert 0 < seen.float().mean() < 1
    torch.testing.assert_close(loss, -(teacher * student).sum(-1).mean())
    torch.testing.assert_close(
        metrics["above_entropy"], (teacher * (teacher.log() - student)).sum(-1).mean()
    )


def test_geometry_stays_float32_under_autocast():
    """On a GPU the step runs under bfloat16 autocast; positions must not."""
    context = wall()["context"]
    context["extrinsics"][..., :3, :3] = torch.linalg.matrix_exp(
        torch.tensor([[0, -0.3, 0.1], [0.3, 0, -0.2], [-0.1, 0.2, 0]])
    )
    plain = reconstruct.SensorDepth()(context)
    method = build(PixelFeatures()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reconstruct.SensorDepth()(context)
        drawn = method.splat(context, wall()["target"], torch.tensor([True]))
    for a, b, c in zip(plain[:3], inside, drawn["gaussians"]):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert drawn["rendered"].dtype == torch.bfloat16  # features are to be lifted at half the memory


@settings(max_examples=20)
@given(
    st.integers(0, 10**6), st.integers(2, 17), st.integers(2, 9), st.sampled_from([0.05, 0.07, 1.0])
)
def test_contrastive_loss_is_its_formula(seed, locations, C, temperature):
    g = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(locations, C, generator=g) for _ in range(2))
    loss, matched = M.contrastive_loss(queries, keys, temperature)
    q, k = (f.double() / f.double().norm(dim=-1, keepdim=True) for f in (queries, keys))
    expected, found = 0.0, 0
    for i in range(locations):
        from_query = [float(q[i] @ k[j]) / temperature for j in range(locations)]
        from_key = [float(q[j] @ k[i]) / temperature for j in range(locations)]
        for scores in (from_query, from_key):
            expected -= math.log(math.exp(scores[i]) / sum(map(math.exp, scores))) / (2 * locations)
        found += max(range(locations), key=from_query.__getitem__) == i
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert matched.item() == pytest.approx(found / locations)


def test_contrastive_loss_knows_whose_key_is_whose():
    features = torch.randn(31, 16)
    loss, matched = M.contrastive_loss(features, features + 0.1 * torch.randn(31, 16), 0.07)
    shuffled, found = M.contrastive_loss(features, features.roll(1, 0), 0.07)
    assert loss < 0.1 and matched == 1 and shuffled > 5 and found == 0
    assert M.contrastive_loss(features[:0], features[:0], 0.07)[0] == 0


def test_the_student_contrasts_with_what_was_splatted_where_there_are_no_holes():
    """Both scenes' locations are each other's negatives; locations in holes are none."""
    batch, method = (
        wall(B=2),
        build(PixelFeatures(), loss="contrastive", temperature=0.2, lora_rank=0).eval(),
    )
    batch["target"]["images"][1] = batch["target"]["images"][1].flip(-1)
    batch["context"]["depths"][1, ..., :63] = 0
    loss, metrics, drawn = method(batch)
    seen = ~drawn["holes"]
    assert seen[0].all() and 0 < seen[1].float().mean() < 1
    student, splatted = (drawn[k].movedim(1, -1)[seen] for k in ("student", "splatted"))
    expected, matched = M.contrastive_loss(student, splatted, 0.2)
    torch.testing.assert_close(loss, expected)
    assert metrics["matched"] == matched
    both, parts = build(PixelFeatures(), loss="both", temperature=0.2).eval(), {}
    total, parts, _ = both(batch)
    paper, _, _ = build(PixelFeatures()).eval()(batch)
    torch.testing.assert_close(total, paper + expected)
    batch["context"]["depths"][:] = 0
    loss, _, _ = method(batch)
    assert loss == 0
    loss.backward()


def test_the_control_sees_no_geometry():
    batch, method = wall(), build(PixelFeatures(), loss="contrastive", targets="own").eval()
    method.reconstruct = None
    with torch.no_grad():
        method.student.shift.add_(0.3)
    loss, metrics, _ = method(batch)
    student, own = (
        M.patch_tokens(v, batch["target"]["images"])[0].flatten(1).T
        for v in (method.student, method.teacher)
    )
    torch.testing.assert_close(loss, M.contrastive_loss(student, own, 0.07)[0])
    assert metrics["holes"] == 0


def test_rank_0_trains_every_weight():
    method = build(lora_rank=0, loss="contrastive")
    method.train()(wall())[0].backward()
    still = {
        n for n, p in method.student.named_parameters() if p.grad is None or not p.grad.abs().sum()
    }
    assert still == {"mask_token"}
    for name, merged in M.merge_lora(method.student).items():
        assert torch.equal(merged, method.student.state_dict()[name])


@pytest.mark.parametrize(
    "change", [{"loss": "infonce"}, {"targets": "teacher"}, {"upsampling": "nearest"}]
)
def test_unknown_words_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .* or .*, not"):
        build(**change)


def crops_of(photo, count=6, seed=0):
    crops = data.Crops([photo], 112, (0.35, 0.9), 1.0, seed, length=count)
    return torch.utils.data.default_collate([crops[i] for i in range(count)])


def test_pretraining_pairs_the_same_spots(monkeypatch):
    """Features that are the photo's own colours match where the crops say, and nowhere else."""
    monkeypatch.setattr(data, "jitter", lambda photo, rng: photo)
    photo = F.interpolate(torch.rand(1, 3, 7, 7), (224, 224), mode="bicubic", align_corners=True)[
        0
    ].clamp(0, 1)
    batch, model = crops_of(photo), M.Pretraining(PixelFeatures(), 0.001, 0.0, False)
    loss, metrics, _ = model(batch)
    batch["first_to_second"] = batch["first_to_second"].roll(1, 0)
    shuffled, wrong, _ = model(batch)
    assert metrics["matched"] > 3 * wrong["matched"] and loss < 0.3 * shuffled


def test_pretraining_learns(monkeypatch):
    photos = [
        F.interpolate(torch.rand(1, 3, 16, 16), (112, 112), mode="bilinear")[0] for _ in range(4)
    ]
    model = M.Pretraining(tiny_vit(), 0.1, 0.0, True)
    crops = data.Crops(photos, 56, (0.35, 0.9), 1.0, length=8)
    batch = torch.utils.data.default_collate([crops[i] for i in range(8)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss, _, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_holes_are_left_out_of_the_loss():
    """Loss over locations by hand; and what the target shows in a hole changes nothing."""
    batch, method = wall(), build(PixelFeatures()).eval()
    batch["context"]["depths"][..., :63] = 0  # the left half of both context views is unknown
    loss, metrics, drawn = method(batch)
    holes = drawn["holes"]
    assert 0 < holes.float().mean() < 1 and metrics["holes"] == holes.float().mean()
    teacher = method.teacher_head(drawn["splatted"].permute(0, 2, 3, 1)).softmax(-1)
    student = method.student_head(drawn["student"].permute(0, 2, 3, 1)).log_softmax(-1)
    torch.testing.assert_close(loss, -(teacher * student).sum(-1)[~holes].mean())
    batch["context"]["depths"][:] = 0
    loss, _, drawn = method(batch)
    assert drawn["holes"].all() and loss == 0
    loss.backward()  # a step without a single location must not fail


def test_one_step_trains_the_student_and_only_it():
    batch, method = wall(), build().train()
    assert not any(p.requires_grad for p in method.teacher.parameters())
    loss, _, _ = method(batch)
    loss.backward()
    trained = {
        n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert trained and all(n.startswith("student") for n in trained)
    assert all(
        ".B" in n for n in trained if not n.startswith("student_head")
    )  # A's gradient is 0 while B is 0


def test_teacher_follows_by_ema():
    method = build()
    before = {n: p.clone() for n, p in method.teacher.named_parameters()}
    head_before = method.teacher_head.last_layer.weight_v.clone()
    with torch.no_grad():
        for p in list(method.student.parameters()) + list(method.student_head.parameters()):
            p += 1 if p.requires_grad else 0
    method.update_teacher(0.9)
    for (name, t), s in zip(method.teacher.named_parameters(), method.student.parameters()):
        torch.testing.assert_close(t, before[name] + (0.1 if s.requires_grad else 0))
    torch.testing.assert_close(method.teacher_head.last_layer.weight_v, head_before + 0.1)


def test_teacher_has_no_dropout_while_the_student_has():
    method = build(lora_dropout=0.5)
    torch.nn.init.normal_(method.student.blocks[0].attn.qkv.B)
    method.train()
    batch = wall()
    a, b = (method(batch)[2] for _ in range(2))
    assert torch.equal(a["splatted"], b["splatted"]) and not torch.equal(a["student"], b["student"])


def test_no_depth_is_said():
    batch = wall()
    del batch["context"]["depths"]
    with pytest.raises(ValueError, match="needs data with depth"):
        build()(batch)


def test_centring_takes_the_running_mean_off_the_teachers_logits():
    batch, method = wall(), build(PixelFeatures(), centring=0.5)
    _, _, drawn = method(batch)
    logits = method.teacher_head(drawn["splatted"].permute(0, 2, 3, 1)[~drawn["holes"]])
    torch.testing.assert_close(method.centre, 0.5 * logits.mean(0))
    before = method.centre.clone()
    loss, _, _ = method.eval()(batch)
    student = method.student_head(drawn["student"].permute(0, 2, 3, 1)[~drawn["holes"]])
    torch.testing.assert_close(
        loss, M.distillation_loss(logits - before, student)[0], rtol=1e-4, atol=1e-4
    )
    assert torch.equal(method.centre, before)  # evaluation changes nothing
    plain = build(PixelFeatures())
    plain(batch)
    assert not plain.centre.any()


def test_bilinear_upsampling_ignores_segments():
    batch = wall()
    aware, plain = (
        build(PixelFeatures(), upsampling=u, blend=1.0).eval() for u in ("mask-aware", "bilinear")
    )
    whole = {
        **batch,
        "context": batch["context"] | {"masks": torch.zeros_like(batch["context"]["masks"])},
    }
    a, b, c = (m(x)[2]["splatted"] for m, x in ((aware, batch), (plain, batch), (aware, whole)))
    assert torch.equal(b, c) and not torch.allclose(a, b)
    with pytest.raises(
        ValueError, match="upsampling is mask-aware or bilinear or centred, not 'nearest'"
    ):
        build(upsampling="nearest")


@pytest.mark.parametrize("B,V", [(1, 2), (2, 1), (3, 2)])
def test_factored_lifting_is_lifting(B, V):
    """What a GPU splats instead of features: the same numbers, scene by scene."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(B * V, 5, 3, 4, generator=g)
    masks = torch.randint(0, 3, (B * V, 17, 23), generator=g)
    dense = M.lift_features(tokens, masks, V, factored=False)
    mixture = M.lift_features(tokens, masks, V, factored=True)
    each = torch.arange(B)[:, None, None]
    torch.testing.assert_close(
        (mixture.tokens[each, mixture.indices] * mixture.weights[..., None]).sum(2), dense
    )
    assert mixture.indices.min() >= 0 and mixture.indices.max() < V * 12
