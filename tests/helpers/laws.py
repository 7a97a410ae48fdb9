"""Laws that every architecture obeys, and tiny models of all, for test_encoders.py, test_decoders.py and others."""

import torch
import transformers
from helpers.tiny import TINY, lowest_target, relative_difference, search_, token_batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import initialization

from hf_dms import DMSConfig, attach_, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.save import save_pruned
from hf_dms.cut.prune import make_plan
from hf_dms.cut.verify import all_outputs_of, dummy_inputs, hard_masked
from hf_dms.gating.attach import gates_of
from hf_dms.gating.rounding import sizes_of

# In float64 only the order of sums differs. In float32 there are some tens of roundings of 2^-24.
EXACT, SHIPPED = 1e-9, 1e-5
BLOCKS = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)
TEXT = BLOCKS | dict(vocab_size=33, max_position_embeddings=16)
IMAGE = BLOCKS | dict(image_size=12, patch_size=4, num_channels=2)
DISTANCES = IMAGE | dict(use_relative_position_bias=True, drop_path_rate=0.0)
STAGES = dict(num_channels=2, image_size=16, patch_size=2, num_stages=3, hidden_sizes=[6, 8, 10], depths=[2, 3, 1])
DECODER = {name: value for name, value in TINY.items() if name not in ("head_dim", "num_labels")}
GEMMA = DECODER | {"head_dim": 4, "hidden_size": 36}  # embeddings are scaled by its root, 6, which is exact
WINDOWS = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
DETECTOR = dict(d_model=24, num_queries=5, dropout=0.0, image_size=[64, 96]) | {
    "backbone_config": dict(model_type="resnet", hidden_sizes=[8, 12], depths=[1, 2], embedding_size=5)
    | dict(num_channels=2, out_features=["stage2"]),
    **dict(num_channels=2, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=20),
    **dict(decoder_layers=3, decoder_attention_heads=3, decoder_ffn_dim=16),
}
LEVELS = {name: value for name, value in DETECTOR.items() if name != "num_channels"} | {
    "backbone_config": dict(model_type="rt_detr_resnet", hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    | dict(num_channels=2, embedding_size=4, out_features=["stage2", "stage3", "stage4"]),
    **dict(encoder_in_channels=(12, 16, 20), encoder_hidden_dim=16, decoder_in_channels=(16, 16, 16)),
    **dict(d_model=16, decoder_attention_heads=4, decoder_n_points=2, num_denoising=6),
}
SIZES = {
    "bert": TEXT,
    "roberta": TEXT,
    "xlm-roberta": TEXT,
    "camembert": TEXT,
    "distilbert": TEXT,
    "electra": TEXT | {"embedding_size": 10},
    "vit": IMAGE,
    "deit": IMAGE,
    "dinov2": IMAGE | {"intermediate_size": 3},  # times the hidden size
    "beit": DISTANCES,
    "data2vec-vision": DISTANCES,
    "yolos": IMAGE | dict(image_size=[8, 12], num_detection_tokens=3, use_mid_position_embeddings=False),
    "convnext": STAGES,
    "convnextv2": STAGES,
    "resnet": {name: value for name, value in STAGES.items() if name not in ("patch_size", "num_stages")}
    | dict(embedding_size=5, hidden_sizes=[8, 12, 16], depths=[2, 3, 1]),
    "regnet": dict(
        num_channels=2, image_size=16, embedding_size=16, hidden_sizes=[16, 24, 32], depths=[2, 3, 1], groups_width=8
    ),
    "swin": dict(num_channels=2, image_size=16, patch_size=2, window_size=2, embed_dim=6, mlp_ratio=1.5)
    | dict(depths=[2, 3, 1], num_heads=[2, 4, 3], drop_path_rate=0.0),
    "mobilenet_v2": dict(
        num_channels=2, image_size=32, depth_multiplier=0.125, depth_divisible_by=1, min_depth=1, expand_ratio=2
    )
    | dict(finegrained_output=False),
    "efficientnet": dict(
        num_channels=2, image_size=16, width_coefficient=0.25, depth_coefficient=1.0, depth_divisor=1, hidden_dim=320
    )
    | dict(kernel_sizes=[3, 3, 5], in_channels=[32, 24, 20], out_channels=[24, 20, 36], strides=[1, 2, 1])
    | dict(num_block_repeats=[2, 1, 2], expand_ratios=[1, 2, 3], depthwise_padding=[2]),
    "mobilevit": dict(num_channels=2, image_size=64, neck_hidden_sizes=[4, 5, 6, 7, 8, 9, 10], mlp_ratio=1.5)
    | dict(hidden_sizes=[8, 12, 16], expand_ratio=1.5),
    "detr": DETECTOR,
    "conditional_detr": DETECTOR,
    "rt_detr": LEVELS,
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 4},
    "smollm3": DECODER | {"no_rope_layers": [1, 0, 1]},
    "granite": DECODER | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "gemma": GEMMA,
    "gemma2": GEMMA | WINDOWS | {"query_pre_attn_scalar": 5},
    "gemma3_text": {name: value for name, value in (GEMMA | WINDOWS).items() if name != "rope_parameters"},
}
NAMES = {
    "dinov2": dict(intermediate_size="mlp_ratio"),
    "distilbert": dict(
        hidden_size="dim", intermediate_size="hidden_dim", num_hidden_layers="n_layers", num_attention_heads="n_heads"
    ),
}
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def heads_of(prefix, *tasks):
    """The base model class of an architecture, and those for tasks."""
    return tuple(getattr(transformers, prefix + name) for name in ("Model", *(f"For{task}" for task in tasks)))


def tiny(cls, seed=0, dtype=torch.float32, **overrides):
    """A model whose weights are drawn from normal(0, 0.3), its norms' from normal(1, 0.3): no unit is like another."""
    family = cls.config_class.model_type
    sizes = SIZES[family] | {"num_labels": 2 if cls.__name__.endswith("QuestionAnswering") else 3} | overrides
    layers = sizes.get("num_hidden_layers", sizes.get("num_stages"))
    listed = {n: v for n, v in sizes.items() if isinstance(v, list) and n != "image_size"}  # per layer, or per stage
    sizes |= {n: v[:layers] for n, v in listed.items()}
    sizes = {NAMES.get(family, {}).get(name, name): value for name, value in sizes.items()}
    switches = cls._supports_sdpa and family != "data2vec-vision"  # its modules keep their attention
    config = cls.config_class(**sizes)
    attn = None if config.sub_configs else "sdpa" if switches else "eager"  # not every config inside has the same
    with initialization.no_init_weights():  # a third of the time; all weights are drawn below
        model = cls._from_config(config, attn_implementation=attn).eval()
    model.tie_weights()  # the context leaves it out
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "bias")):
                buffer.normal_(0, 0.3, generator=generator)
            if name.endswith(("running_var", "weight")):  # weights are buffers in frozen batch norms
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype)


def batch_for(model, length=7, batch=2):
    inputs = dummy_inputs(model) if model.main_input_name == "pixel_values" else token_batch(batch, length)
    return {name: tensor[:batch] for name, tensor in inputs.items()}


def searched(model, seed=0, share=0.4, **options):
    """Put gates on a model as a search would leave them. The target lies between the lowest possible target and 1."""
    attach_(model, DMSConfig(**({"target": 1.0, "sequence_length": 7} | options)))
    search_(model, seed)
    gates = gates_of(model)
    bound, config = gates.attachment.bound, gates.attachment.config
    lowest = lowest_target(gates, bound, config, model.config)
    config.target = lowest + share * (1 - lowest)
    return gates, sizes_of(gates)


def masked_cut_reloaded(model, sizes, folder):
    """All outputs of the hard-masked, the cut and the reloaded model, and the cut model itself."""
    inputs = batch_for(model)
    pruned = prune(model, inputs=inputs)
    with hard_masked(model, sizes):
        masked = all_outputs_of(model, inputs)
    kept = make_plan(gates_of(model), sizes).kept
    bound = gates_of(model).attachment.bound
    stream = "hidden" if "hidden" in bound.sizes else f"hidden{len(bound.stacks) - 1}"  # that of the last stage
    stream = "top" if "top" in bound.sizes else stream  # some networks have another map behind the last stage
    pooled = "pool" if "pool" in bound.sizes else stream
    for name, dim in (("last_hidden_state", stream), ("pooler_output", pooled)):
        if name in masked and dim in kept:
            axis = 1 if masked[name].dim() == 4 else -1  # units of a convolution's output
            masked[name] = masked[name].index_select(axis, kept[dim][0])
    save_pruned(pruned, folder, inputs=inputs)
    reloaded = type(pruned).from_pretrained(folder, dtype=pruned.dtype)
    assert same_tensors(reloaded, pruned)
    return masked, all_outputs_of(pruned, inputs), all_outputs_of(reloaded, inputs), pruned


def same_tensors(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def assert_same(masked, cut_, reloaded, tolerance):
    assert masked.keys() == cut_.keys() == reloaded.keys()
    for name in masked:
        assert relative_difference(cut_[name], masked[name]) < tolerance
        assert relative_difference(reloaded[name], cut_[name]) < tolerance


def macs_by_the_flop_counter(model, scope, inputs, length, stacks=None):
    """Multiply-accumulates of one forward pass of one sequence, per token; under sdpa attention is not counted.

    Modules whose name is a number are layers, unless the paths of the stacks are given.
    """
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    numbered = [name for name in by_module if name.rpartition(".")[2].isdigit()]
    layers = [
        by_module[name] for name in numbered if not stacks or name.rpartition(".")[0].endswith(tuple(stacks.values()))
    ]
    return (sum(layers) if scope == "layers" else by_module["Global"]) / 2 / length


def written_sizes(gates, sizes, pruned):
    """Sizes of the written model: the kept ones, or for layout padded those that its stock config gives every layer."""
    if gates.attachment.config.layout != "padded":
        return gates.dense_sizes() | sizes
    found = bind(spec_for(pruned.config), pruned).sizes
    return {name: torch.full_like(size, found[name]) for name, size in gates.dense_sizes().items()}


def is_stock(model):
    return type(model).__module__.startswith("transformers.")
