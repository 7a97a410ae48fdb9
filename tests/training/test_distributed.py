"""Several processes search as one process does, only the main process writes, and an error ends all of them.

They are two real processes on the CPU that communicate by gloo. A launch takes about 15 seconds, so each test does as
much as it can in one.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from helpers.launching import ROOT, launch
from helpers.marks import ordinary_if
from helpers.processes import results, searching
from helpers.searches import arguments
from helpers.tiny import relative_difference, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_dms import DMSConfig, DMSTrainer
from hf_dms.training.distributed import check_plugin
from hf_dms.training.trainer import check_training_arguments


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    kinds = ["main_only", "ddp:p", "ddp_kl:p-", "poison:p"]
    kinds += ["fsdp:p", "fsdp_kl:p-", "resume:p", "error:p"]  # last: FSDP changes the process, and an error ends it
    code, _, err = launch(ROOT / "tests/helpers/processes.py", folder, *kinds)
    assert "process 1 has had enough" in err, err
    (folder / "code").write_text(str(code))
    return folder


@pytest.fixture(scope="module")
def launched_frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    code, _, err = launch(ROOT / "tests/helpers/processes.py", folder, "ddp:p-", "fsdp:p-")
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    ordinary_if(
        lambda kind, pipeline: pipeline == "p" or kind.endswith("kl"),
        [("ddp", "p"), ("ddp", "p-"), ("ddp_kl", "p-"), ("fsdp", "p"), ("fsdp", "p-"), ("fsdp_kl", "p-")],
    ),
)
def test_two_processes_search_as_one_does(kind, pipeline, request, tmp_path):
    """Sums over a batch run in another order: 1e-7 of a value, which six steps of SGD through steep masks raise to
    about 1e-6 of the importance and of the weights, 2e-6 of a ratio. The tolerance is ten times that."""
    frozen = pipeline == "p-" and not kind.endswith("kl")
    launched = request.getfixturevalue("launched_frozen" if frozen else "launched")
    alone = searching(tmp_path, pipeline, **(dict(kl_weight=1.0, scales="norms") if kind.endswith("kl") else {}))
    alone.train()
    expected = results(alone)
    found = [load_file(launched / f"{kind}:{pipeline}-{rank}.safetensors") for rank in (0, 1)]
    assert found[0].keys() == expected.keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), f"{name} differs between processes"
        assert tensor.shape == expected[name].shape, name
        assert torch.allclose(tensor, expected[name], rtol=0, atol=2e-5 * max(float(expected[name].abs().max()), 1e-9))
    assert float(expected["prune_ratio"].max()) > 0.02  # a ratio moves by at most the rate in a step


def test_a_step_that_is_bad_in_one_process_is_skipped_in_all(launched):
    found = [load_file(launched / f"poison:p-{rank}.safetensors") for rank in (0, 1)]
    assert all(tensor.isfinite().all() for tensor in found[0].values())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_a_recipe_in_two_processes_ends_as_in_one(recipe, dense, tmp_path, capsys):
    options = ["train.optim=sgd", "train.learning_rate=0.05", "train.logging_steps=1"]
    options += ["recover={lora: {r: 2}, max_steps: 2}"]
    assert recipe(*options, "train.per_device_train_batch_size=4")[0] == 0
    printed = capsys.readouterr().out
    both = tmp_path / "both"
    command = ("-m", "hf_dms", "prune", tmp_path / "recipe.yaml", *options, "train.per_device_train_batch_size=2")
    code, out, err = launch(*command, f"output.path={both}")
    assert code == 0, err
    assert not both.with_name("both.unfinished").exists()
    reports = [json.loads((folder / "dms_report.json").read_text()) for folder in (tmp_path / "out", both)]
    for alone, found in zip(reports[0]["search"], reports[1]["search"], strict=True):
        for key in ("task_loss", "resource", "kept/mlp"):
            assert found[key] == pytest.approx(alone[key], rel=2e-5)
    assert reports[1]["recovered"]["perplexity"] == pytest.approx(reports[0]["recovered"]["perplexity"], rel=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", both)]
    assert all(relative_difference(models[1][name], tensor) < 2e-5 for name, tensor in models[0].items())
    for line in ("Measuring the dense model", "Saved to"):
        assert (out.count(line), printed.count(line)) == (1, 1)


def test_an_error_in_one_process_ends_all(launched):
    assert (launched / "code").read_text() != "0"
    assert not list(launched.glob("error:p-*"))


# ---- launches that are refused ----
def test_processes_that_would_run_independently_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but the processes would run independently.*use_cpu: true"):
        start(arguments(tmp_path, use_cpu=False))


def test_fsdp_that_accelerate_would_silently_replace_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for .* but accelerate would run NO instead"):
        start(arguments(tmp_path))


def test_zero_3_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)  # deepspeed itself need not be installed
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 is not supported: it leaves no whole parameter"):
        check_training_arguments(args)


@pytest.mark.parametrize(
    ("version", "efficient", "message"),
    [
        (1, False, "fsdp_version must be 2, got 1: FSDP 1 flattens"),
        (2, True, "fsdp_cpu_ram_efficient_loading must be false"),
    ],
)
def test_options_of_fsdp_that_would_harm_the_gates_are_refused(version, efficient, message):
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=message):
        check_plugin(accelerator, torch.nn.Linear(1, 1))


def start(args):
    return DMSTrainer(model=tiny_llama(), dms_config=DMSConfig(target=0.6), args=args)
