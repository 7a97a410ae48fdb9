"""The encoders and networks in stages of test_encoders.py and test_encoder_folders.py."""

from helpers.laws import TASKS, heads_of
from transformers import CamembertForTokenClassification, XLMRobertaForMaskedLM

BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
HEADS = (*heads_of("Bert", *TASKS, "MaskedLM"), *heads_of("ViT", "ImageClassification"))
RELATIVES = (
    *heads_of("Roberta", *TASKS, "MaskedLM"),
    *(XLMRobertaForMaskedLM, CamembertForTokenClassification),
    *heads_of("DistilBert", *TASKS, "MaskedLM"),
    *heads_of("Electra", *TASKS, "MaskedLM"),
    *heads_of("DeiT", "ImageClassification", "ImageClassificationWithTeacher"),
    *heads_of("Dinov2", "ImageClassification"),
    *heads_of("Beit", "ImageClassification"),
    *heads_of("Data2VecVision", "ImageClassification"),
    *heads_of("Yolos", "ObjectDetection"),
)
RESNETS = heads_of("ResNet", "ImageClassification")
REGNETS = heads_of("RegNet", "ImageClassification")
MOBILES = {
    **dict.fromkeys(heads_of("MobileNetV2", "ImageClassification"), ("mid", "stem", "first", "hidden", "top")),
    **dict.fromkeys(heads_of("EfficientNet", "ImageClassification"), ("mid", "squeeze", "stem", "hidden", "top")),
}
SWINS = heads_of("Swin", "ImageClassification")
MOBILEVITS = heads_of("MobileViT", "ImageClassification")
WIDTHS = ("reduced", "local", "projected", "fused", "expanded", "mid", "stem", "first", "second")
PER_LAYER_ONLY = {
    **MOBILES,
    **dict.fromkeys(SWINS, ("heads", "mlp", "hidden", "layers")),
    **dict.fromkeys(MOBILEVITS, ("heads", "mlp", "hidden", *WIDTHS, "top", "layers")),
}
STAGED = (
    *heads_of("ConvNext", "ImageClassification"),
    *heads_of("ConvNextV2", "ImageClassification"),
    *RESNETS,
    *REGNETS,
    *PER_LAYER_ONLY,
)
CONDITIONAL = heads_of("ConditionalDetr", "ObjectDetection")
RT_DETRS = heads_of("RTDetr", "ObjectDetection")
DETRS = (*heads_of("Detr", "ObjectDetection"), *CONDITIONAL, *RT_DETRS)
STACKED = (*STAGED, *DETRS)  # several stacks of layers, and MACs of an image
TWINS = (*heads_of("XLMRoberta", *TASKS, "MaskedLM"), *heads_of("Camembert", *TASKS, "MaskedLM"))
DIMS = ("heads", "mlp", "hidden", "layers")
# Dims whose sizes the stock config derives from one another.
TIED = {model_type: {"heads", "hidden"} for model_type in (*BERTS, "yolos", "data2vec-vision")}
TIED |= {"convnext": {"mlp", "hidden"}, "convnextv2": {"mlp", "hidden"}, "resnet": {"reduced", "mid", "hidden"}}
TIED |= {"regnet": {"groups", "squeeze", "first", "hidden", "embedding"}}


def dims_of(cls):
    """The dims of a model class; those of a network in stages are of all stages together."""
    if cls in RESNETS:
        return ("reduced", "mid", "hidden", "layers")
    if cls in REGNETS:
        return ("groups", "squeeze", "first", "hidden", "embedding", "layers")
    if cls in PER_LAYER_ONLY:
        return PER_LAYER_ONLY[cls]
    if cls in DETRS:
        return ("heads", "mlp", "layers")
    return DIMS[1:] if cls in STAGED else DIMS


def possible(cls, dims, layout):
    """Whether a layout can prune dims. Sizes that a stock config ties go together, and hidden cannot be padded.

    Tied sizes: in BERT hidden = heads·d, in ConvNeXt mlp = 4·hidden, in ResNet hidden = 4·mid, and in RegNet all but
    layers.
    """
    if cls in PER_LAYER_ONLY:
        return layout == "per_layer"
    if cls in DETRS:
        return layout != "uniform" or "heads" not in dims  # its stock config ties heads to a width that stays
    tied = TIED.get(cls.config_class.model_type, set())
    if layout == "padded" and "mlp" in dims and cls.config_class.model_type == "convnextv2":
        return False  # its response norms would count the zeros
    if layout == "padded" and tied:
        return not {"hidden", "first", "embedding"} & {*dims}
    return layout == "per_layer" or tied & set(dims) in (set(), tied)
