"""Networks by name, their weights, and the errors for wrong names and files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medspark.errors import UsageError
from medspark.models.backbones import build, check_size
from medspark.models.checkpoint import describe, load_classifier, save_classifier
from medspark.models.config import USUAL, ModelConfig, check_model
from medspark.models.torchvision_ops import import_timm


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_three_networks_classify_grayscale_and_colour(name: str, channels: int) -> None:
    model = build(ModelConfig(name=name), num_classes=2, channels=channels).eval()

    with torch.inference_mode():
        assert model(torch.rand(2, channels, 32, 32)).shape == (2, 2)


def test_a_network_for_one_size_of_images_is_made_for_the_size_that_is_asked() -> None:
    model = build(ModelConfig(name="test_vit"), num_classes=2, channels=1, size=(64, 32)).eval()

    with torch.inference_mode():
        assert model(torch.rand(2, 1, 64, 32)).shape == (2, 2)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "vit_tiny_patch16_224"])
def test_a_network_that_takes_the_images_is_accepted(name: str) -> None:
    check_size(ModelConfig(name=name), channels=1, size=(64, 64))


@pytest.mark.parametrize(
    ("name", "why"),
    [("test_vit", "divisible by patch size"), ("inception_v3", "Kernel size can't be greater")],
)
def test_a_network_that_cannot_take_the_images_is_refused_with_the_reason(name: str, why: str):
    with pytest.raises(UsageError, match=rf"{name} cannot take images of 60 x 60 pixels: .*{why}"):
        check_size(ModelConfig(name=name), channels=1, size=(60, 60))


def test_a_vision_transformer_has_patches_of_the_size_in_its_name(tmp_path: Path) -> None:
    config = ModelConfig(name="vit_tiny_patch8_224")
    model = build(config, num_classes=2, channels=1, size=(64, 64)).eval()
    card = describe(model, classes=("no", "yes"), height=64, width=64)
    save_classifier(tmp_path, model, card)

    kept = load_classifier(tmp_path)

    assert model.backbone.patch_embed.grid_size == (8, 8)
    image = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(kept(image), model(image))


def test_too_few_patches_for_random_weights_are_named_with_a_finer_network(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("vit_tiny_patch8_224", "test_resnet", "vit_tiny_patch16_224"):
        check_size(ModelConfig(name=name), channels=1, size=(64, 64))

    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("vit_tiny_patch16_224 sees images of 64 x 64 pixels as 4 x 4 patches")
    assert line.endswith("vit_tiny_patch8_224 sees 8 x 8.")


def test_the_smallest_images_have_patches_too() -> None:
    check_size(ModelConfig(name="vit_tiny_patch2_224"), channels=1, size=(4, 4))


def test_given_weights_are_resampled_to_the_patches(tmp_path: Path) -> None:
    given = import_timm().create_model("vit_tiny_patch16_224", num_classes=2).state_dict()
    save_file(given, tmp_path / "weights.safetensors")
    config = ModelConfig(name="vit_tiny_patch8_224", weights=str(tmp_path / "weights.safetensors"))

    kept = build(config, num_classes=2, channels=3, size=(64, 64)).backbone.state_dict()

    assert kept["patch_embed.proj.weight"].shape == (192, 3, 8, 8)
    assert kept["patch_embed.proj.weight"].any()
    assert torch.equal(kept["blocks.0.mlp.fc1.weight"], given["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("name", ["vit_tiny_patch0_224", "vit_odd_patch8_224", "resnet_patch8_9"])
def test_patches_of_no_network_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"timm has no model '{name}'"):
        check_model(ModelConfig(name=name))


def test_an_unknown_model_is_named_with_what_was_probably_meant() -> None:
    with pytest.raises(UsageError, match=r"no model 'resnet5O'; did you mean .*resnet50"):
        check_model(ModelConfig(name="resnet5O"))


def test_timm_has_the_usual_networks_and_weights_of_them() -> None:
    timm = import_timm()

    assert all(timm.is_model_pretrained(name) for name in USUAL)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    trained = import_timm().create_model("test_resnet", num_classes=1000)
    save_file(trained.state_dict(), path)
    return path


def test_weights_from_a_file_fill_everything_but_the_head(weights: Path) -> None:
    config = ModelConfig(name="test_resnet", weights=str(weights))
    trained = build(config, num_classes=1000, channels=3)

    model = build(config, num_classes=2, channels=3)

    for name, value in model.backbone.state_dict().items():
        same = not name.startswith("fc")
        assert not same or torch.equal(value, trained.backbone.state_dict()[name]), name


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_a_new_head_on_given_weights_begins_small(name: str, tmp_path: Path) -> None:
    given = import_timm().create_model(name, num_classes=7)
    save_file(given.state_dict(), tmp_path / "weights.safetensors")
    config = ModelConfig(name=name, weights=str(tmp_path / "weights.safetensors"))

    kept = build(config, num_classes=2, channels=3).backbone.state_dict()

    weight, bias = (tensor for tensor in kept.values() if len(tensor.shape) and len(tensor) == 2)
    assert weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert not bias.any()
    body = [name for name, weight in given.named_parameters() if len(weight) != 7]
    assert all(torch.equal(kept[name], given.state_dict()[name]) for name in body)


def test_a_head_that_fits_the_given_weights_is_kept(weights: Path) -> None:
    classes = import_timm().create_model("test_resnet").pretrained_cfg["num_classes"]
    given = import_timm().create_model("test_resnet", num_classes=classes).state_dict()
    save_file(given, weights)

    model = build(
        ModelConfig(name="test_resnet", weights=str(weights)), num_classes=classes, channels=3
    )

    assert torch.equal(model.backbone.state_dict()["fc.weight"], given["fc.weight"])


def test_a_grayscale_stem_is_the_sum_of_the_colour_stem(weights: Path) -> None:
    config = ModelConfig(name="test_resnet", weights=str(weights))

    gray = build(config, num_classes=2, channels=1).backbone.state_dict()
    colour = build(config, num_classes=2, channels=3).backbone.state_dict()

    stem = next(name for name, value in colour.items() if value.ndim == 4)
    torch.testing.assert_close(gray[stem], colour[stem].sum(1, keepdim=True))


def test_grayscale_is_normalised_by_the_mean_over_the_colours() -> None:
    colour = build(ModelConfig(name="resnet50"), num_classes=2, channels=3).normalise
    gray = build(ModelConfig(name="resnet50"), num_classes=2, channels=1).normalise

    torch.testing.assert_close(gray.mean.squeeze(), colour.mean.mean())


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        build(ModelConfig(name="resnet18", weights=str(weights)), num_classes=2, channels=3)


def test_weights_that_lack_a_layer_are_refused(weights: Path) -> None:
    state = load_file(weights)
    del state[min(name for name in state if name.endswith("weight"))]
    save_file(state, weights)

    with pytest.raises(UsageError, match=r"it lacks 1 of \d+ tensors"):
        build(ModelConfig(name="test_resnet", weights=str(weights)), num_classes=2, channels=3)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pkl", "weights.pt2"])
def test_pickled_weights_are_refused_unopened(name: str) -> None:
    with pytest.raises(UsageError, match="can run code"):
        check_model(ModelConfig(name="test_resnet", weights=name))


def test_a_missing_weights_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"no_such\.safetensors.*No such file"):
        check_model(ModelConfig(name="test_resnet", weights="no_such.safetensors"))


def test_a_file_that_only_looks_like_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x80\x04pickle, or anything else")

    with pytest.raises(UsageError, match="not a safetensors file"):
        check_model(ModelConfig(name="test_resnet", weights=str(path)))
