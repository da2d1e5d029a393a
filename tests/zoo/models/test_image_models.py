"""ResNet and MobileNetV2 with a width per group: stock at base widths, any widths from the config alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from zoo.errors import UserError
from zoo.models import mobilenet_v2, resnet
from zoo.models.mobilenet_v2 import SlimMobileNetV2Config, SlimMobileNetV2ForImageClassification
from zoo.models.resnet import SlimResNetConfig, SlimResNetForImageClassification, cifar_resnet_config
from zoo.models.widths import base_widths

RESNET_34 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3], "num_labels": 7}
SMALL = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "num_labels": 5}
MOBILENET = {"depth_multiplier": 0.35, "num_labels": 5}
STOCK = {
    "resnet-34": (ResNetForImageClassification, SlimResNetForImageClassification, ResNetConfig, RESNET_34),
    "bottleneck": (ResNetForImageClassification, SlimResNetForImageClassification, ResNetConfig, SMALL),
    "mobilenet": (
        MobileNetV2ForImageClassification,
        SlimMobileNetV2ForImageClassification,
        MobileNetV2Config,
        MOBILENET,
    ),
    "unfused-stem": (
        MobileNetV2ForImageClassification,
        SlimMobileNetV2ForImageClassification,
        MobileNetV2Config,
        MOBILENET | {"first_layer_is_expansion": False},
    ),
}
SLIM = {
    "cifar": (resnet, SlimResNetForImageClassification, lambda: cifar_resnet_config(14, 8, 5)),
    "bottleneck": (resnet, SlimResNetForImageClassification, lambda: SlimResNetConfig(**SMALL)),
    "mobilenet": (mobilenet_v2, SlimMobileNetV2ForImageClassification, lambda: SlimMobileNetV2Config(**MOBILENET)),
}


def odd_widths(module, model) -> dict[str, int]:
    """A width for every group, all different from the base, most of them odd, some wider."""
    widths = base_widths(model, module.channel_groups(model))
    return {group: 3 + (5 * place) % (width + 3) for place, (group, width) in enumerate(widths.items())}


def random_model(module, slim_class, make):
    """A model of odd widths whose logits are of order 1, in eval mode."""
    config = make()
    config.widths = odd_widths(module, slim_class(config))
    model, generator = slim_class(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, generator=generator)
    return model


@pytest.mark.parametrize("name", STOCK)
def test_stock_weights_load_unchanged_and_give_the_same_bits(name):
    stock_class, slim_class, config_class, settings = STOCK[name]
    torch.manual_seed(0)
    stock = stock_class(config_class(**settings)).eval()
    slim = slim_class(slim_class.config_class(**settings)).eval()
    assert slim.config.widths is None
    assert slim.state_dict().keys() == stock.state_dict().keys()
    slim.load_state_dict(stock.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(slim(pixels).logits, stock(pixels).logits)


@pytest.mark.parametrize("name", SLIM)
def test_every_group_may_have_any_width_of_its_own(name):
    module, slim_class, make = SLIM[name]
    base = slim_class(make())
    groups = module.channel_groups(base)
    widths = list(base_widths(base, groups).items())
    for place, (group, width) in enumerate(widths[:: 1 + len(widths) // 12]):
        config, other = make(), width - 3 if place % 2 else width + 1
        config.widths = {group: other}
        model = slim_class(config).train()
        assert base_widths(model, groups) == base_widths(base, groups) | {group: other}
        loss = model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", SLIM)
def test_the_config_alone_rebuilds_the_network(name, tmp_path):
    module, slim_class, make = SLIM[name]
    model = random_model(module, slim_class, make)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is slim_class and again.config.widths == model.config.widths
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["widths"] == model.config.widths and stored["model_type"].startswith("slim_")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-5)
    stored.pop("widths")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="has shape"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SLIM)
def test_new_layers_are_initialised_as_the_stock_ones(name):
    module, slim_class, make = SLIM[name]
    config = make()
    config.widths = dict.fromkeys(base_widths(slim_class(config), module.channel_groups(slim_class(config))), 64)
    model = slim_class(config)
    for key, tensor in model.state_dict().items():
        if "normalization" in key and key.endswith(("weight", "running_var")):
            assert (tensor == 1).all()
        elif "normalization" in key or key.endswith("num_batches_tracked"):
            assert (tensor == 0).all()
        elif key.endswith("convolution.weight") and module is resnet:  # Kaiming, of the new fan
            std = (2 / (tensor.shape[0] * tensor[0, 0].numel())) ** 0.5
            assert tensor.std().item() == pytest.approx(std, rel=0.15)


def test_the_dense_model_has_the_base_widths():
    config = cifar_resnet_config(8, 8, 10)
    config.widths = {"stages.2": 5}
    dense = SlimResNetForImageClassification(config).dense_model()
    assert dense.config.widths is None and config.widths == {"stages.2": 5}
    assert dense.classifier[1].in_features == 32


def test_stems():
    model = SlimResNetForImageClassification(cifar_resnet_config(8, 8, 10))
    assert model.resnet(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 32, 8, 8)
    model = SlimMobileNetV2ForImageClassification(SlimMobileNetV2Config(stem="cifar", **MOBILENET))
    assert model.mobilenet_v2(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 1280, 4, 4)


@pytest.mark.parametrize(("depth", "weights"), [(20, 270_896), (56, 851_504)])
def test_cifar_resnets_have_the_published_sizes(depth, weights):
    model = SlimResNetForImageClassification(cifar_resnet_config(depth, 16, 10))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) == weights


def test_reduction_makes_a_wide_resnet():
    with torch.device("meta"):
        model = SlimResNetForImageClassification(SlimResNetConfig(reduction=2, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) == 68_814_016
    assert model.dense_model().resnet.encoder.stages[0].layers[0].layer[0].convolution.out_channels == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": {"stages.7": 8}}, "stages.7.*embedder.*is needed|stages.7.*stages.0"),
        ({"widths": {"stages.0": 0}}, "1 or more"),
        ({"stem": "large"}, "imagenet, cifar"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    config = cifar_resnet_config(8, 8, 10)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=message):
        SlimResNetForImageClassification(config)


def test_impossible_depths_are_refused():
    with pytest.raises(UserError, match="6 n"):
        cifar_resnet_config(18, 16, 10)


LOAD = """
import sys
sys.modules["zoo"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

def check(place, **consent):
    for folder in sys.argv[1:]:
        wanted = load_file(folder + "/wanted.st")
        model = AutoModelForImageClassification.from_pretrained(folder, **consent)
        assert type(model).__module__.startswith(place), type(model)
        with torch.no_grad():
            torch.testing.assert_close(model(wanted["pixels"]).logits, wanted["logits"], rtol=1e-4, atol=1e-5)
            assert AutoModel.from_pretrained(folder, **consent)(wanted["pixels"]).pooler_output.isfinite().all()

check("transformers_modules", trust_remote_code=True)
del sys.modules["zoo"]
import zoo
check("zoo.")
print("SAME")
"""


@pytest.mark.slow
def test_a_fresh_process_loads_without_and_with_slimzoo(tmp_path):
    folders = []
    for name in ("cifar", "mobilenet"):
        model, folder = random_model(*SLIM[name]), tmp_path / name
        model.save_pretrained(folder)
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            save_file({"pixels": pixels, "logits": model(pixels).logits}, folder / "wanted.st")
        folders.append(str(folder))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, *folders]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("SAME\n")
