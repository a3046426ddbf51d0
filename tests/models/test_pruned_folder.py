"""The folder of a pruned network: its zeros, its noise and its widths survive; tampering shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medspark.errors import UsageError
from medspark.models.backbones import build
from medspark.models.card import Pruning, read_card
from medspark.models.checkpoint import describe, first_network, load_classifier, save_classifier
from medspark.models.classifier import Classifier
from medspark.models.config import ModelConfig
from medspark.models.masks import apply_masks, magnitude_masks, prunable, zero_share
from medspark.models.noisy import noisy_layers
from medspark.models.widths import narrow

IMAGES = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> Classifier:
    torch.manual_seed(0)
    return build(ModelConfig(name="test_resnet"), num_classes=2, channels=1).eval()


def saved(folder: Path, model: Classifier, *, noise: float | None = None) -> Path:
    pruning = Pruning(method="rsr", sparsity=0.5, noise=noise is not None)
    card = describe(model, classes=("a", "b"), height=32, width=32, pruning=pruning)
    scales = {
        name.removesuffix("weight") + "noise": torch.full((len(weight),), noise)
        for name, weight in prunable(model).items()
        if noise is not None
    }
    save_classifier(folder, model, card, noise=scales)
    return folder


@pytest.fixture
def sparse() -> Classifier:
    model = network()
    apply_masks(prunable(model), magnitude_masks(prunable(model), 0.5))
    return model


def test_zeros_survive_saving_and_loading(sparse: Classifier, tmp_path: Path) -> None:
    folder = saved(tmp_path, sparse)

    assert read_card(folder).kind == "pruned"
    assert zero_share(prunable(load_classifier(folder))) == zero_share(prunable(sparse)) >= 0.4999


def test_noise_is_kept_and_computed_with_only_on_request(sparse, tmp_path: Path) -> None:
    folder = saved(tmp_path, sparse, noise=0.5)
    quiet, noisy = load_classifier(folder), load_classifier(folder, noisy=True)

    assert torch.equal(quiet(IMAGES), sparse(IMAGES))
    assert quiet.state_dict().keys() == sparse.state_dict().keys()
    assert not torch.equal(noisy(IMAGES), noisy(IMAGES))
    assert all((layer.noise == 0.5).all() for layer in noisy_layers(noisy))


def narrowed() -> Classifier:
    """The network, with half the inner channels of its first block."""
    model = network()
    name = next(n for n, m in model.named_modules() if n.endswith("conv1") and "layer1" in n)
    block = name.removesuffix("conv1")
    half = model.get_submodule(name).out_channels // 2
    taken = model.get_submodule(name).in_channels
    out = model.get_submodule(f"{block}conv2").out_channels
    model.widths = {
        name: (half, taken),
        f"{block}bn1": (half, half),
        f"{block}conv2": (out, half),
    }
    narrow(model, model.widths)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_a_narrowed_network_loads_by_its_card_alone(tmp_path: Path) -> None:
    model = narrowed()
    folder = saved(tmp_path, model)

    loaded = load_classifier(folder)

    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.widths == model.widths == read_card(folder).pruning.widths


@pytest.mark.parametrize("change", [{"a": [1, 1]}, {"backbone.conv1": [10**6, 1]}])
def test_a_card_with_widths_that_do_not_fit_is_refused(tmp_path: Path, change) -> None:
    folder = saved(tmp_path, narrowed())
    card = json.loads((folder / "model.json").read_text())
    card["pruning"]["widths"] |= change
    (folder / "model.json").write_text(json.dumps(card))

    with pytest.raises(UsageError, match="cannot be loaded"):
        load_classifier(folder)


@pytest.mark.parametrize("change", [{"kind": "classifier"}, {"pruning": None}])
def test_the_kind_says_whether_a_network_is_pruned(sparse, tmp_path: Path, change) -> None:
    folder = saved(tmp_path, sparse)
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | change))

    with pytest.raises(UsageError, match="does not fit the description of the pruning"):
        read_card(folder)


def test_a_training_starts_from_a_folder_of_the_same_network_and_classes(sparse, tmp_path) -> None:
    folder = str(saved(tmp_path, sparse))

    model = first_network(
        ModelConfig(name="test_resnet", weights=folder), num_classes=2, channels=1, size=(32, 32)
    )

    assert torch.equal(model.eval()(IMAGES), sparse(IMAGES))
    for config, classes, message in (
        (ModelConfig(name="resnet50", weights=folder), 2, "holds a test_resnet, but model.name"),
        (ModelConfig(name="test_resnet", weights=folder), 3, "has 2 classes and 1 channel"),
    ):
        with pytest.raises(UsageError, match=message):
            first_network(config, num_classes=classes, channels=1, size=(32, 32))


def test_onnx_has_the_same_zeros(sparse: Classifier, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="exports need onnx: pip install medspark[edge]")
    from medspark.export.onnx import export_onnx

    model = load_classifier(saved(tmp_path, sparse))
    graph = onnx.load_from_string(export_onnx(model, height=32, width=32)).graph

    stored = {tuple(t.dims): 0 for t in graph.initializer}
    for tensor in graph.initializer:
        stored[tuple(tensor.dims)] += int((onnx.numpy_helper.to_array(tensor) == 0).sum())
    for weight in prunable(sparse).values():
        stored[tuple(weight.shape)] -= int((weight == 0).sum())
    assert all(count >= 0 for count in stored.values())


def test_the_file_holds_the_zeros_that_are_counted(sparse: Classifier, tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path, sparse) / "model.safetensors")

    held = {name: tensors[name] for name in prunable(sparse)}
    assert zero_share(held) == zero_share(prunable(sparse))
