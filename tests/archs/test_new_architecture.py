"""The Python of docs/new_architecture.md runs, its errors are the real ones, and its toy obeys the laws."""

import re
from pathlib import Path

import pytest
import torch
from helpers import fresh
from helpers.laws import EXACT, assert_same, macs_by_the_flop_counter, masked_cut_reloaded, searched
from helpers.tiny import token_batch
from safetensors.torch import save_file

from hf_dms import prune, register_arch
from hf_dms.archs.registry import ARCHS
from hf_dms.checkpoint.save import save_pruned
from hf_dms.gating.attach import gates_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new_architecture.md").read_text()
# Every block of Python, and the error under it, if it is to raise one.
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)
DEFINITION = "".join(code for code, _ in BLOCKS[:2])  # the model and its description
HEADS = ("ToyModel", "ToyForTokenClassification")
DIMS = ("heads", "mlp", "hidden", "layers")


@pytest.fixture(scope="module")
def page():
    """The names that the page defines."""
    names = {"__name__": __name__}
    exec(DEFINITION, names)
    yield names
    del ARCHS["toy"]


@pytest.fixture
def toy(page):
    register_arch(page["TOY"])  # whatever a test before registered

    def make(head, seed=0):
        """A model whose weights are drawn from normal(0, 0.3), its norms' from normal(1, 0.3)."""
        model = page[head](page["ToyConfig"](num_labels=3)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                mean = 1.0 if re.search(r"norm\w*\.weight", name) else 0.0
                parameter.normal_(mean, 0.3, generator=generator)
        return model.double()

    return make


# ---- the page ----
@pytest.mark.filterwarnings("ignore:prune. no search has run:UserWarning")
def test_the_python_of_the_page_runs_and_its_errors_are_the_real_ones(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raised = []
    for code, text in BLOCKS[2:]:
        if not text:
            exec(code, page)
            continue
        with pytest.raises((ValueError, RuntimeError)) as error:
            exec(code, page)
        raised.append(f"{error.type.__name__}: {error.value}")
        shown, *left_out = " ".join(text.split()).split("…")
        assert raised[-1].startswith(shown) if left_out else raised[-1] == shown
    assert len(raised) == PAGE.count("```text")
    shapes = [{name: p.shape for name, p in page[model].named_parameters()} for model in ("again", "pruned")]
    assert shapes[0] == shapes[1]
    assert page["again"].num_parameters() <= 0.6 * page["model"].num_parameters()


# ---- the laws ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("dims", [*[(dim,) for dim in DIMS], DIMS], ids="-".join)
@pytest.mark.parametrize("head", HEADS)
def test_masked_equals_cut_equals_reloaded(toy, head, dims, layout, tmp_path):
    model = toy(head)
    _, sizes = searched(model, prune=dims, layout=layout)
    *outputs, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    assert_same(*outputs, EXACT)
    assert pruned.num_parameters() < model.num_parameters()
    layers_differ = any(len(set(rows.tolist())) > 1 for rows in sizes.values())
    assert type(pruned).__name__ == f"Dms{head}" if layers_differ else type(pruned) is type(model)


@pytest.mark.parametrize("scope", ["model", "layers"])
@pytest.mark.parametrize("resource", ["params", "macs"])
def test_counted_equals_real(toy, resource, scope, tmp_path):
    model = toy("ToyForTokenClassification")
    gates, sizes = searched(model, layout="per_layer", resource=resource, resource_scope=scope)
    *_, pruned = masked_cut_reloaded(model, sizes, tmp_path / "out")
    counted = float(gates_of(model).count(gates.dense_sizes() | sizes))
    if resource == "params":
        whole = pruned.toy.blocks if scope == "layers" else pruned
        assert counted == sum(parameter.numel() for parameter in whole.parameters())
    else:
        found = macs_by_the_flop_counter(pruned, scope, {"input_ids": token_batch(1)["input_ids"]}, 7)
        assert counted == pytest.approx(found, rel=1e-12)


# ---- a process of its own ----
LOAD = f"""
import transformers, torch
from safetensors.torch import load_file
try:
    transformers.AutoModelForTokenClassification.from_pretrained("out")
except ValueError as error:
    assert "dms_toy" in str(error) and "does not recognize" in str(error), error
else:
    raise AssertionError("loaded before the architecture was registered")
{DEFINITION}
model = AutoModelForTokenClassification.from_pretrained("out").eval()
batch = load_file("batch")
with torch.no_grad():
    assert (model(batch["input_ids"]).logits - batch["logits"]).abs().max() < 1e-5
print(type(model).__name__)
"""


def test_a_per_layer_folder_loads_once_the_architecture_is_registered(toy, tmp_path):
    model = toy("ToyForTokenClassification").float()
    searched(model, layout="per_layer")
    pruned, ids = prune(model), token_batch()["input_ids"]
    save_pruned(pruned, tmp_path / "out")
    save_file({"input_ids": ids, "logits": pruned(ids).logits.detach()}, tmp_path / "batch")
    result = fresh.run(["-c", LOAD], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "DmsToyForTokenClassification\n"
    assert not (tmp_path / "out" / "modeling_dms.py").exists()  # it could not make the toy's classes by itself
