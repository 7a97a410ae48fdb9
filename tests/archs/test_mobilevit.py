"""MobileViT: a convolution that reads two streams, and layers that the stock config cannot count."""

import json

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from helpers.laws import EXACT, assert_same, batch_for, masked_cut_reloaded, searched, tiny
from helpers.refit import cut_by, images
from helpers.tiny import relative_difference
from PIL import Image as Picture
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTForSemanticSegmentation,
    MobileViTImageProcessor,
)

from hf_dms import DMSConfig, attach_, prune, repair_
from hf_dms.archs.bind import sized
from hf_dms.archs.enlarge import enlarged_config
from hf_dms.archs.mobilevit import MOBILEVIT
from hf_dms.cli import main
from hf_dms.cut.plan import Plan
from hf_dms.cut.verify import outputs_of
from hf_dms.gating.attach import gates_of

CONVOLUTIONS = ("reduced", "local", "projected", "fused", "expanded")
FUSION = "mobilevit.encoder.layer.3.fusion.convolution"


def test_sizes_of_the_small_one_are_those_of_its_modules():
    spec, sizes = sized(MOBILEVIT, MobileViTConfig())
    assert [sizes[f"{name}1"] for name in CONVOLUTIONS] == [128, 128, 128, 128, 384]
    assert [sizes[name] for name in ("heads2", "mlp2", "hidden2", "d2", "layers2")] == [4, 480, 240, 60, 3]
    assert [sizes[f"mid{block}"] for block in range(4)] == [64, 128, 256, 256]
    assert spec.families["mid"] == ("mid0", "mid1", "mid2", "mid3")
    assert spec.params["encoder.layer.3.fusion.convolution.weight"] == "fused1 (reduced1 + projected1) kernel kernel"


def test_streams_that_are_equally_wide_are_one_on_each_axis_that_has_them():
    spec, _ = sized(MOBILEVIT, MobileViTConfig(neck_hidden_sizes=[16, 16, 24, 48, 64, 64, 320]))  # 16 twice: XXS
    assert spec.params["encoder.layer.0.layer.0.reduce_1x1.convolution.weight"] == "stem mid0 one one"
    assert spec.params["encoder.layer.4.fusion.convolution.weight"] == "fused2 (fused1 + projected2) kernel kernel"
    assert spec.families["reduced"] == ("reduced0", "reduced1")


def test_a_cut_takes_each_stream_s_columns_from_its_own_half():
    model = tiny(MobileViTForImageClassification)
    kept = {"reduced1": torch.tensor([0, 3, 7]), "projected1": torch.tensor([1, 2]), "fused1": torch.tensor([5])}
    pruned = cut_by(model, Plan({name: (units,) for name, units in kept.items()}))
    module = pruned.get_submodule(FUSION)
    assert (module.in_channels, module.out_channels) == (5, 1)
    assert torch.equal(module.weight, model.get_submodule(FUSION).weight[[5]][:, [0, 3, 7, 8 + 1, 8 + 2]])
    recorded = pruned.config.dms_layers["outside"]
    assert [recorded["sizes"][name] for name in kept] == [3, 2, 1]


@pytest.mark.parametrize("dims", [("reduced",), ("projected",), ("reduced", "projected"), CONVOLUTIONS])
def test_streams_that_are_read_one_after_the_other_are_cut_alone_and_together(dims, tmp_path):
    model = tiny(MobileViTForImageClassification, dtype=torch.float64)
    _, sizes = searched(model, prune=dims, layout="per_layer")
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    units = [int(sizes.get(f"{name}1", torch.tensor(8))) for name in ("reduced", "projected")]
    assert pruned.get_submodule(FUSION).in_channels == sum(units) < 16


def test_masks_of_both_streams_are_one_operation(monkeypatch):
    """Otherwise the input would be kept twice for the backward."""
    from hf_dms.gating import hooks

    spans, apply = [], hooks.MaskUnits.apply
    monkeypatch.setattr(hooks.MaskUnits, "apply", lambda *args: spans.append(args[2]) or apply(*args))
    model = tiny(MobileViTForImageClassification)
    attach_(model, DMSConfig(target=0.95, prune=("reduced1", "projected1"), layout="per_layer"))
    model.eval()(**batch_for(model))
    assert sorted(spans) == [(1, 8, 1, 0, 0), (1, 16, 1, 0, 0)]  # the local convolution reads one of them alone


def test_layers_of_a_transformer_are_dropped_though_the_config_has_no_number_of_them(tmp_path):
    model = tiny(MobileViTForImageClassification, dtype=torch.float64)
    _, sizes = searched(model, prune=("layers",), layout="per_layer")
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    found = [len(pruned.mobilevit.encoder.layer[stage + 2].transformer.layer) for stage in range(3)]
    assert found == [int(sizes[f"layers{stage}"]) for stage in range(3)]
    assert sum(found) < 9


def test_repair_goes_through_the_transformers():
    model = tiny(MobileViTForImageClassification)
    kept = {"mlp0": (torch.arange(6),) * 2, "mlp2": (torch.arange(12),) * 3, "layers1": (torch.tensor([0, 1, 3]),)}
    plan, held_out = Plan(kept), next(images(model, 2))
    pruned = cut_by(model, plan)

    def error():
        return relative_difference(outputs_of(pruned, held_out), outputs_of(model, held_out))

    before = error()
    repair_(pruned, model, plan, images(model, 1))
    assert error() < 0.8 * before


def test_what_is_not_described_is_an_error():
    with pytest.raises(ValueError, match=r"mobilevit: parameter 'segmentation_head.* matches 0 lines"):
        attach_(tiny(MobileViTForSemanticSegmentation), DMSConfig(target=0.9, layout="per_layer"))
    with pytest.raises(ValueError, match="supernet: the stock config of mobilevit does not hold all widths"):
        enlarged_config(MobileViTConfig(), width=2, depth=1)


@pytest.mark.slow
def test_a_recipe_prunes_repairs_saves_and_its_folder_loads(tmp_path, capsys):
    model = tiny(MobileViTForImageClassification, num_channels=3, image_size=32)
    model.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32}
    MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "model")
    features = Features({"image": Image(), "label": Value("int64")})
    pictures = [Picture.effect_noise((40, 32), 20 * number + 5).convert("RGB") for number in range(12)]
    rows = {"image": pictures, "label": [number % 3 for number in range(12)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    values = {
        "model": {"path": str(tmp_path / "model"), "task": "image-classification", "dtype": "float32"},
        "data": {"path": str(tmp_path / "a.parquet"), "held_out": str(tmp_path / "a.parquet")},
        "dms": {"target": 0.6, "warmup_steps": 2, "resource": "macs", "layout": "per_layer"},
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
        "recover": {"repair": {"examples": 4}, "distillation": {"weight": 0.5}, "max_steps": 2},
        "output": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["prune", str(tmp_path / "recipe.yaml")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "dms_report.json").read_text())
    assert report["pruned"]["macs_per_token"] <= 0.6 * report["dense"]["macs_per_token"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| MACs per image |" in card
    assert "MACs per token" not in card
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert pruned.config.model_type == "dms_mobilevit"
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "out")(pictures[:2], return_tensors="pt")
    assert pruned(**inputs).logits.shape == (2, 3)


def test_a_step_of_a_search_moves_the_importance_of_both_streams():
    model = tiny(MobileViTForImageClassification)
    attach_(model, DMSConfig(target=0.9, prune=("reduced", "projected"), layout="per_layer", warmup_steps=1))
    model.train()(**batch_for(model), labels=torch.tensor([0, 2])).loss.backward()
    gates = gates_of(model)
    gates.update_importance_()
    assert all((gates.raw_importance(name) > 0).all() for name in gates.dims)
    assert prune(model).num_parameters() < model.num_parameters()
