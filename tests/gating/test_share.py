"""`sizes`: a request that gives a shape in place of a target."""

import pytest
from helpers.laws import tiny
from helpers.tiny import search_, tiny_llama
from transformers import BertForSequenceClassification, ResNetForImageClassification

from hf_dms import DMSConfig, attach_, choose_, plan_of, prune
from hf_dms.gating.attach import gates_of


def attached(model, **options):
    attach_(model, DMSConfig(**options))
    return model


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("resource", ["params", "macs", "kv_bytes"])
def test_the_cut_has_the_shape_whatever_the_search_learned(layout, resource):
    model = attached(
        tiny_llama(), sizes={"mlp": 11, "layers": 2, "kv": 1}, layout=layout, resource=resource, sequence_length=16
    )
    search_(model)
    assert plan_of(model).sizes | {"heads": 0} == {"mlp": [11] * 3, "layers": [2], "kv": [1] * 3, "heads": 0}
    pruned = prune(model)
    assert pruned.config.num_hidden_layers == 2
    assert pruned.model.layers[0].mlp.up_proj.out_features == 11


def test_a_search_approaches_it_from_the_dense_model():
    model = attached(tiny_llama(), sizes={"mlp": 5}, pipeline="p-")
    gates = gates_of(model)
    assert float(gates.ratio("mlp").detach().max()) == 0
    assert gates.schedule.target < 1
    assert float(gates.upper.max()) == pytest.approx(1 - 5 / 20)


def test_it_goes_for_strategies_without_a_search_and_for_all_stages():
    model = attached(tiny(ResNetForImageClassification), sizes={"mid": 2}, layout="per_layer", strategy="magnitude")
    choose_(model, "magnitude", [])
    assert {size for name, rows in plan_of(model).sizes.items() for size in rows if name.startswith("mid")} == {2}


def test_what_it_means_can_be_given_again():
    """A resolved request can be written in the recipe of a report and read again."""
    first = gates_of(attached(tiny_llama(), sizes={"mlp": 5})).attachment.config
    again = gates_of(attached(tiny_llama(), **first.to_dict())).attachment.config
    assert again == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"mlp": 21}}, "dms.sizes: mlp = 21 is more than the dense model has, 20"),
        ({"sizes": {"width": 2}}, "dms.sizes: llama has no dim 'width'. Its dims are kv, mlp, hidden, layers"),
        ({"sizes": {"mlp": 5}, "round_to": {"mlp": 4}}, "dms.sizes: mlp cannot be 5 here, 8 is nearest"),
        (
            {"sizes": {"mlp": 5}, "target": 0.5},
            r"dms.sizes keeps 0\.\d+ of the dense params, and dms.target asks for 0.5",
        ),
        ({"sizes": {"mlp": 5}, "prune": ("kv",)}, "dms.sizes says what is pruned: mlp. Leave dms.prune out"),
        ({"sizes": {"mlp": 0}}, "dms.sizes must map a dim to a whole number of at least 1"),
        ({"sizes": {"mlp": 5.0}}, "dms.sizes must map a dim to a whole number of at least 1"),
        ({"sizes": {"mlp": 5}, "pipeline": "np"}, "dms.sizes needs pretrained weights, got pipeline np"),
        ({"sizes": {}}, "dms.target is required"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attached(tiny_llama(), **options)


def test_sizes_that_belong_together_must_agree():
    """In a stock BERT, hidden = heads · head size, which is 6 here."""
    with pytest.raises(ValueError, match=r"dms.sizes: hidden cannot be 16 here, 18 is nearest"):
        attached(tiny(BertForSequenceClassification), sizes={"heads": 3, "hidden": 16}, layout="uniform")
    attached(tiny(BertForSequenceClassification), sizes={"heads": 3, "hidden": 18}, layout="uniform")


def test_a_shape_that_the_stock_config_forbids_is_refused():
    with pytest.raises(ValueError, match=r"no allowed sizes make 2·kv a divisor of hidden.* Use layout: per_layer"):
        attached(tiny_llama(), sizes={"hidden": 17})
    attached(tiny_llama(), sizes={"hidden": 17}, layout="per_layer")
