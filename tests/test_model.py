"""Backbones, the weights they start from, and the embedding layer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from train import backbone as backbones
from train.backbone import CAFFE, IMAGENET, backbone_input
from train.bninception import BNInception
from train.config import ModelConfig, RunError
from train.model import EmbeddingNet, build_model

timm = pytest.importorskip("timm")
CONV = ModelConfig(width=4, embed_dim=8)
RESNET = ModelConfig(backbone="test_resnet", embed_dim=8)  # timm's small ones for tests
VIT = ModelConfig(backbone="test_vit", embed_dim=8)


def images(n: int = 4, channels: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def conv_images(n: int = 4) -> Tensor:
    return images(n, channels=1, size=28)


def backbone_state(net: EmbeddingNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}


class Halving(nn.Module):
    """A custom backbone that ends in a map."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too large")


class Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def broken_factory() -> nn.Module:
    raise ZeroDivisionError("no such luck")


@pytest.mark.parametrize(
    ("name", "size", "given_size", "features"),
    [
        ("conv", 28, None, 144),
        ("test_resnet", 64, 64, 96),
        ("test_convnext", 64, 64, 64),
        ("test_vit", 160, None, 64),
        ("test_vit", 96, 96, 64),
        ("vit_small_patch14_dinov2", 224, 224, 384),
        ("bninception", 64, 64, 1024),
        ("googlenet", 64, 64, 1024),
        ("test_model:Halving", 32, 32, 5),
        ("torch.nn:Flatten", 8, 8, 192),
    ],
)
def test_a_backbone_embeds_bytes_and_trains_every_weight(name, size, given_size, features):
    config = ModelConfig(backbone=name, width=4, embed_dim=8)
    net = build_model(config, image_size=given_size)
    assert net.embedding.in_features == features
    embeddings = net(images(2, backbone_input(config)[0], size))
    assert embeddings.shape == (2, 8)
    assert embeddings.dtype == torch.float32
    embeddings.square().sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None]
    assert not idle  # DistributedDataParallel would wait for these
    assert net.backbone_parameters() + net.head_parameters() == [*net.parameters()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv", (1, None)),
        ("bninception", (3, None)),
        ("googlenet", (3, 227)),
        ("resnet50", (3, None)),
        ("resnet50.tv_in1k", (3, None)),
        ("vit_small_patch14_dinov2", (3, 518)),
        ("my.module:factory", (3, None)),
    ],
)
def test_what_images_a_backbone_takes_is_known_without_building_it(name, expected):
    assert backbone_input(ModelConfig(backbone=name)) == expected


@pytest.mark.parametrize("name", ["conv", "test_resnet", "test_vit", "bninception", "googlenet"])
def test_the_seed_decides_about_the_weights(name):
    def state(seed):
        torch.manual_seed(seed)
        return build_model(ModelConfig(backbone=name), image_size=64).state_dict()

    one, same, other = state(0), state(0), state(1)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


# BN-Inception


def test_bn_inception_has_the_published_size_and_the_names_of_its_weights_file():
    net = BNInception().eval()
    assert sum(p.numel() for p in net.parameters()) == 10_270_240
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1024, 7, 7)
    state = net.state_dict()
    assert len(state) == 69 * 7  # of each convolution 2 tensors, of its BatchNorm 5
    for name, shape in {
        "conv1_7x7_s2.weight": (64, 3, 7, 7),
        "conv1_7x7_s2_bn.running_mean": (64,),
        "conv2_3x3.bias": (192,),
        "inception_3a_1x1.weight": (64, 192, 1, 1),
        "inception_3c_double_3x3_2.weight": (96, 96, 3, 3),
        "inception_4a_1x1.weight": (224, 576, 1, 1),
        "inception_4d_pool_proj.weight": (128, 608, 1, 1),
        "inception_4e_3x3_reduce_bn.weight": (128,),
        "inception_5a_3x3.weight": (320, 192, 3, 3),
        "inception_5b_pool_proj_bn.bias": (128,),
    }.items():
        assert state[name].shape == shape, name
    assert not {"inception_3c_1x1.weight", "inception_4e_pool_proj.weight"} & set(state)


def test_bn_inception_sees_blue_first_and_others_red():
    pixels = images(2, size=32)
    for name, (mean, std), order in (
        ("bninception", CAFFE, [2, 1, 0]),
        ("torch.nn:Flatten", IMAGENET, [0, 1, 2]),
    ):
        net = build_model(ModelConfig(backbone=name), image_size=32)
        seen = []
        net.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        net(pixels)
        expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )
        torch.testing.assert_close(seen[0], expected[:, order])


def test_googlenet_sees_what_torchvision_makes_of_normalised_images():
    from torchvision.models import googlenet

    pixels = images(1, size=64)
    net = build_model(ModelConfig(backbone="googlenet"), image_size=64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    original = googlenet(
        weights=None, aux_logits=False, init_weights=False, transform_input=True
    )._transform_input((pixels / 255 - mean) / std)
    torch.testing.assert_close((pixels / 255 - net.mean) / net.std, original)


# Pooling


@pytest.mark.parametrize("name", ["bninception", "googlenet", "test_resnet", "test_model:Halving"])
def test_avg_max_pooling_adds_the_maximum_to_the_mean(name):
    def features(pooling):
        torch.manual_seed(0)
        net = build_model(ModelConfig(backbone=name, pooling=pooling), image_size=64).eval()
        seen = []
        net.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        last = {"googlenet": "inception5b", "test_resnet": "layer4", "test_model:Halving": ""}
        where = net.backbone.get_submodule(last.get(name, ""))
        where.register_forward_hook(lambda _, args, out: seen.append(out))
        with torch.no_grad():
            net(images(2))
        return seen

    maps, mean = features("avg")
    torch.testing.assert_close(mean, maps.mean((2, 3)))
    maps, both = features("avg+max")
    torch.testing.assert_close(both, maps.mean((2, 3)) + maps.amax((2, 3)))


@pytest.mark.parametrize("name", ["conv", "test_vit", "torch.nn:Flatten"])
def test_avg_max_pooling_needs_a_map(name):
    with pytest.raises(RunError, match=r"--pooling avg\+max needs .* use --pooling avg"):
        build_model(ModelConfig(backbone=name, pooling="avg+max"))


# BatchNorm


@pytest.mark.parametrize("name", ["conv", "test_resnet", "bninception"])
def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weight(name):
    channels = backbone_input(ModelConfig(backbone=name))[0]
    batch = images(4, channels)
    for freeze in (True, False):
        net = build_model(ModelConfig(backbone=name, freeze_batchnorm=freeze), image_size=64)
        layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.running_mean.clone() for m in layers]
        for mode in (net.train(), net.eval().train(), net.train(True)):
            mode(batch).sum().backward()
        kept = [torch.equal(m.running_mean, old) for m, old in zip(layers, before, strict=True)]
        assert net.training
        assert all(kept) if freeze else not any(kept)
        assert all(layer.weight.grad is not None for layer in layers)
        assert not any(layer.training for layer in net.eval().modules())


# The embedding layer


def test_the_norm_multiplier_is_of_the_weight_only():
    nets = []
    for multiplier in (None, 30.0):
        torch.manual_seed(0)
        nets.append(build_model(replace(CONV, init_norm_multiplier=multiplier)))
    torch.testing.assert_close(nets[1].embedding.weight, 30 * nets[0].embedding.weight)
    assert torch.equal(nets[1].embedding.bias, nets[0].embedding.bias)


def test_bounded_norms_keep_direction_and_order():
    torch.manual_seed(0)
    free = build_model(replace(CONV, init_norm_multiplier=100.0))
    free.calibrate(conv_images(9), None)
    bounded = build_model(replace(CONV, max_norm=5.0)).eval()
    bounded.load_state_dict(free.state_dict())
    with torch.no_grad():
        z, b = free(conv_images(9)), bounded(conv_images(9))
    r = z.norm(dim=1)
    assert r.max() > 10
    torch.testing.assert_close(b.norm(dim=1), r / (1 + r / 5))
    torch.testing.assert_close(nn.functional.normalize(b), nn.functional.normalize(z))


def test_a_bounded_embedding_of_zero_has_a_finite_gradient():
    net = build_model(replace(CONV, max_norm=5.0))
    net.embedding.weight.data.zero_()
    net.embedding.bias.data.zero_()
    net(conv_images()).sum().backward()
    # r / (1 + r / max_norm) has slope 1 at zero
    torch.testing.assert_close(net.embedding.bias.grad, torch.full((8,), 4.0))


def test_normalised_embeddings_have_norm_one():
    net = build_model(replace(CONV, normalize_output=True))
    torch.testing.assert_close(net(conv_images()).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("max_norm", [None, 12.0, 200.0])
@pytest.mark.parametrize("config", [CONV, RESNET], ids=["conv", "timm"])
def test_calibrating_scales_the_mean_norm_that_comes_out(config, max_norm):
    torch.manual_seed(0)
    net = build_model(replace(config, max_norm=max_norm), image_size=32)
    some = images(300, backbone_input(config)[0], 32)
    net.calibrate(some, 10.0)
    assert not net.training
    with torch.no_grad():
        assert net(some).norm(dim=1).mean().item() == pytest.approx(10, rel=1e-5)


def test_calibrating_takes_batch_statistics_where_there_are_none_yet(tmp_path):
    some = conv_images(40)
    net = build_model(CONV)
    momenta = [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.calibrate(some, None)
    first = net.backbone[1]
    with torch.no_grad():
        x = net.backbone[0]((some / 255 - net.mean) / net.std)
    torch.testing.assert_close(first.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(first.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=0)
    assert momenta == [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    torch.save(net.backbone.state_dict(), tmp_path / "weights.pt")
    pretrained = replace(CONV, pretrained=str(tmp_path / "weights.pt"))
    for config in (pretrained, replace(CONV, freeze_batchnorm=True)):
        net = build_model(config)
        before = backbone_state(net)
        net.calibrate(conv_images(30), 10.0)
        assert all(torch.equal(v, before[k]) for k, v in net.backbone.state_dict().items())


def test_the_channels_of_the_training_images_come_back_with_the_state():
    mean_std = torch.tensor([0.3]), torch.tensor([0.2])
    net = build_model(CONV, mean_std).eval()
    again = build_model(CONV).eval()
    assert not torch.equal(again(conv_images()), net(conv_images()))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(conv_images()), net(conv_images()))
    assert not {"mean", "std"} & {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", IMAGENET[0]), ("test_resnet", (0.5, 0.5, 0.5))]
)
def test_images_are_normalised_as_the_weights_of_timm_were_trained(name, expected):
    others = torch.tensor([0.3]), torch.tensor([0.2])
    net = build_model(ModelConfig(backbone=name), others, image_size=64)
    torch.testing.assert_close(net.mean.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("config", [CONV, VIT], ids=["conv", "vit"])
def test_under_autocast_the_embedding_layer_stays_float32(config):
    torch.manual_seed(0)
    net = build_model(config).eval()
    channels, size = backbone_input(config)
    batch, seen = images(2, channels, size or 28), []
    net.embedding.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    exact = net(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = net(batch)
    assert embeddings.dtype == torch.float32
    assert not torch.equal(seen[1][0], seen[0][0])  # the backbone was less precise,
    with torch.no_grad():  # the embedding layer was not
        assert torch.equal(seen[1][1], net.embedding(seen[1][0]))
    torch.testing.assert_close(embeddings, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["conv", "test_resnet"])
def test_the_network_is_one_graph_for_the_compiler(name):
    config = ModelConfig(backbone=name, max_norm=20.0)
    net = build_model(config, image_size=32).eval()
    batch = images(2, backbone_input(config)[0], 32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), net(batch))


# Pretrained weights


def save_raw(net: EmbeddingNet, path: Path) -> None:
    torch.save(net.backbone.state_dict(), path)


def save_with_classifier(net: EmbeddingNet, path: Path) -> None:
    classifier = {"fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    torch.save(net.backbone.state_dict() | classifier, path)


def save_from_parallel(net: EmbeddingNet, path: Path) -> None:
    state = net.backbone.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def save_checkpoint(net: EmbeddingNet, path: Path) -> None:
    torch.save({"model": net.state_dict(), "epoch": 3, "history": [{"loss": 0.5}]}, path)


def save_compiled(net: EmbeddingNet, path: Path) -> None:
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()}}, path)


def save_safetensors(net: EmbeddingNet, path: Path) -> None:
    save_file({k: v.contiguous() for k, v in net.backbone.state_dict().items()}, path)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_raw, "weights.pth"),
        (save_with_classifier, "weights.pth"),
        (save_from_parallel, "weights.pt"),
        (save_checkpoint, "checkpoint_best.pt"),
        (save_compiled, "weights.pt"),
        (save_safetensors, "weights.safetensors"),
    ],
)
def test_a_file_of_weights_starts_the_backbone_and_not_the_embedding(save, name, tmp_path):
    net = build_model(RESNET, image_size=32)
    save(net, tmp_path / name)
    again = build_model(replace(RESNET, pretrained=str(tmp_path / name)), image_size=32)
    before = backbone_state(net)
    assert all(torch.equal(v, before[k]) for k, v in again.backbone.state_dict().items())
    assert not torch.equal(again.embedding.weight, net.embedding.weight)


@pytest.mark.parametrize("name", ["conv", "bninception", "googlenet", "test_model:Halving"])
def test_weights_of_any_backbone_can_come_from_a_file(name, tmp_path):
    config = ModelConfig(backbone=name)
    net = build_model(config, image_size=32)
    save_checkpoint(net, tmp_path / "weights.pt")
    again = build_model(replace(config, pretrained=str(tmp_path / "weights.pt")), image_size=32)
    before = backbone_state(net)
    assert all(torch.equal(v, before[k]) for k, v in again.backbone.state_dict().items())


def test_caffes_weights_of_bn_inception_load(tmp_path):
    state = BNInception().state_dict()
    rows = {k: v[None] if "_bn." in k else v for k, v in state.items() if "num_batches" not in k}
    rows |= {"last_linear.weight": torch.zeros(1000, 1024), "last_linear.bias": torch.zeros(1000)}
    torch.save(rows, tmp_path / "bn_inception.pth")
    config = ModelConfig(backbone="bninception", pretrained=str(tmp_path / "bn_inception.pth"))
    net = build_model(config, image_size=32)
    assert all(torch.equal(v, state[k]) for k, v in net.backbone.state_dict().items())


def test_position_embeddings_of_another_image_size_are_resampled(tmp_path):
    net = build_model(VIT)
    save_raw(net, tmp_path / "weights.pt")
    config = replace(VIT, pretrained=str(tmp_path / "weights.pt"))
    again = build_model(config, image_size=96)
    assert again(images(2, size=96)).shape == (2, 8)
    assert again.backbone.pos_embed.shape != net.backbone.pos_embed.shape
    assert torch.equal(again.backbone.cls_token, net.backbone.cls_token)


def test_weights_fetched_before_need_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    net = build_model(RESNET, image_size=32)
    classifier = {"fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    torch.save(net.backbone.state_dict() | classifier, tmp_path / "weights.pth")
    asked = []

    def cached(repository, file):
        asked.append(repository)
        return str(tmp_path / "weights.pth")

    def no_network(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(backbones, "_check_reachable", no_network)
    again = build_model(replace(RESNET, pretrained="imagenet"), image_size=32)
    before = backbone_state(net)
    assert all(torch.equal(v, before[k]) for k, v in again.backbone.state_dict().items())
    assert set(asked) == {"timm/test_resnet.r160_in1k"}


@pytest.mark.parametrize("name", ["test_resnet", "bninception", "googlenet"])
def test_without_a_network_one_line_says_at_once_what_to_do(name, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def no_network(request, **_):
        asked.append(request.full_url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(backbones, "urlopen", no_network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RunError) as raised:
        build_model(ModelConfig(backbone=name, pretrained="imagenet"))
    assert len(asked) == 1  # huggingface_hub would try again for 47 s
    said = str(raised.value)
    assert said.startswith(f"--pretrained imagenet: the weights of {name} cannot be fetched (http")
    assert "Name or service not known" in said
    assert said.endswith("give a file with --pretrained PATH, or use --pretrained none")
    assert "\n" not in said


def junk(path: Path) -> None:
    path.write_bytes(b"junk")


def numbers(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def less(path: Path) -> None:
    state = build_model(RESNET, image_size=32).backbone.state_dict()
    torch.save({k: v for k, v in state.items() if k != "conv1.0.weight"}, path)


def more(path: Path) -> None:
    state = build_model(RESNET, image_size=32).backbone.state_dict()
    torch.save(state | {"layer9.weight": torch.zeros(3)}, path)


def wider(path: Path) -> None:
    state = build_model(RESNET, image_size=32).backbone.state_dict()
    torch.save(state | {"conv1.0.weight": torch.zeros(7, 3, 3, 3)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file; it is imagenet, none or the file"),
        (junk, "cannot be read"),
        (numbers, "holds no state dict"),
        (less, r"does not fit test_resnet: .* 1 missing \(conv1\.0\.weight\)"),
        (more, r"does not fit test_resnet: .* 1 unknown \(layer9\.weight\)"),
        (wider, r"1 of another shape \(conv1\.0\.weight is \[7, 3, 3, 3\] for \["),
    ],
    ids=["no file", "junk", "no state dict", "less", "more", "wider"],
)
def test_a_file_that_does_not_fit_is_one_clear_line(write, message, tmp_path):
    write(tmp_path / "weights.pt")
    with pytest.raises(RunError, match=message) as raised:
        build_model(replace(RESNET, pretrained=str(tmp_path / "weights.pt")), image_size=32)
    assert "\n" not in str(raised.value)
    assert f"--pretrained {tmp_path}" in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("resnet_50"), r"--backbone is 'resnet_50' \(did you mean resnet50"),
        (ModelConfig("bn_inception"), "did you mean bninception"),
        (ModelConfig("resnet50.nonsense"), "Invalid pretrained tag"),
        (ModelConfig("nowhere:net"), "--backbone nowhere:net: No module named 'nowhere'"),
        (ModelConfig("torch:net"), "--backbone torch:net: .* no attribute 'net'"),
        (ModelConfig("test_model:broken_factory"), "no such luck"),
        (ModelConfig("builtins:dict"), "builtins:dict returns a dict, but must return a torch"),
        (ModelConfig("test_model:Picky"), r"fails on images of 224 pixels \(too large\)"),
        (ModelConfig("test_model:Several"), "makes tuple of one image, but must make features"),
        (ModelConfig("torch.nn:LSTM"), r"LSTM: .* 'input_size'"),
        (ModelConfig("conv", pretrained="imagenet"), "there are no such weights of conv"),
        (replace(CONV, init_norm=5.0, max_norm=5.0), "--init-norm is 5.0, but must be below"),
        (replace(CONV, init_norm=5.0, normalize_output=True), "--init-norm has no use with"),
        (replace(CONV, max_norm=5.0, normalize_output=True), "--max-norm has no use with"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(config, message):
    with pytest.raises(RunError, match=message) as raised:
        build_model(config)
    assert "\n" not in str(raised.value)


def test_an_image_size_that_a_backbone_cannot_take_is_one_clear_line():
    with pytest.raises(RunError, match=r"fails on images of 250 pixels .* --image-size"):
        build_model(ModelConfig(backbone="bninception"), image_size=250)
