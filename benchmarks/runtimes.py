"""Which runtimes load a pruned model: small ones of each layout, in the runtimes that are installed here.

What it prints is the evidence for *run* in `hf_dms/report/runtimes.yaml`. The models are random and tiny. Each is
pruned, saved and loaded by the runtime, and its outputs are compared with transformers' on the same tokens or pixels.

    python benchmarks/runtimes.py > benchmarks/runtimes.jsonl
    python benchmarks/runtimes.py --llama-cpp path/to/llama.cpp   # with llama-cpp-python, and llama.cpp's converter
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint.save import save_pruned

BLOCKS = dict(hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6)
DECODER = BLOCKS | dict(num_key_value_heads=3, head_dim=16, max_position_embeddings=64)
TEXT = BLOCKS | dict(max_position_embeddings=64)
IMAGE = BLOCKS | dict(image_size=32, patch_size=8)
MODELS = {  # class: (sizes, dims to prune)
    "LlamaForCausalLM": (DECODER, ("kv", "mlp", "hidden", "layers")),
    "MistralForCausalLM": (DECODER, ("kv", "mlp", "hidden", "layers")),
    "Qwen2ForCausalLM": ({k: v for k, v in DECODER.items() if k != "head_dim"}, ("kv", "mlp", "layers")),
    "Qwen3ForCausalLM": (DECODER, ("kv", "mlp", "hidden", "layers")),
    "SmolLM3ForCausalLM": (DECODER, ("kv", "mlp", "layers")),
    "GraniteForCausalLM": ({k: v for k, v in DECODER.items() if k != "head_dim"}, ("kv", "mlp", "layers")),
    "GemmaForCausalLM": (DECODER, ("kv", "mlp", "layers")),
    "Gemma2ForCausalLM": (DECODER, ("kv", "mlp", "layers")),
    "Gemma3ForCausalLM": (DECODER | {"query_pre_attn_scalar": 16}, ("kv", "mlp", "layers")),
    "BertForSequenceClassification": (TEXT, ("heads", "mlp", "hidden", "layers")),
    "RobertaForSequenceClassification": (TEXT, ("heads", "mlp", "hidden", "layers")),
    "XLMRobertaForSequenceClassification": (TEXT, ("heads", "mlp", "hidden", "layers")),
    "CamembertForSequenceClassification": (TEXT, ("heads", "mlp", "hidden", "layers")),
    "ElectraForSequenceClassification": (TEXT | {"embedding_size": 48}, ("heads", "mlp", "hidden", "layers")),
    "DistilBertForSequenceClassification": (
        dict(dim=96, hidden_dim=128, n_layers=3, n_heads=6, max_position_embeddings=64),
        ("heads", "mlp", "hidden", "layers"),
    ),
    "ViTForImageClassification": (IMAGE, ("heads", "mlp", "hidden", "layers")),
    "DeiTForImageClassification": (IMAGE, ("heads", "mlp", "hidden", "layers")),
    "Dinov2ForImageClassification": (IMAGE | {"mlp_ratio": 2}, ("heads", "mlp", "hidden", "layers")),
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
LAYOUTS = ("uniform", "padded", "per_layer")


def tokenizer():
    """A byte-level BPE like that of GPT-2, a kind that converters know."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def save(name, layout, folder, processor):
    """A pruned random model of a class, saved; its inputs and outputs."""
    sizes, dims = MODELS[name]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    vocabulary = {} if name.endswith("ImageClassification") else {"vocab_size": len(processor), **SPECIAL}
    model = cls._from_config(cls.config_class(**sizes, **vocabulary)).eval()
    tied = {"hidden"} if layout == "padded" and name.endswith("SequenceClassification") else set()
    dims = tuple(dim for dim in dims if dim not in tied | ({"layers"} if layout != "uniform" else set()))
    attach_(model, DMSConfig(target=0.8, prune=dims, layout=layout, resource_scope="layers", sequence_length=8))
    with torch.no_grad():
        model.dms_gates.prune_ratio.uniform_(0.1, 0.5)
    model.dms_gates.num_updates = 100
    pruned = prune(model)
    if vocabulary:
        ids = torch.randint(4, len(processor), (1, 8), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    save_pruned(pruned, folder, processor=processor if vocabulary else None, inputs=inputs)
    with torch.no_grad():
        return pruned, inputs, pruned(**inputs).logits


def run_peft(folder, name, inputs, expected):
    """LoRA on the reloaded model, trained for a step and merged: the class stays the model's, the outputs change."""
    from peft import LoraConfig, get_peft_model

    model = _auto(name).from_pretrained(folder).eval()
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    same = float((lora(**inputs).logits - expected).abs().max())
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 1.0)
    lora(**inputs).logits.square().mean().backward()
    optimizer.step()
    merged = lora.merge_and_unload()
    assert type(merged) is type(model)
    return same


def run_onnx(folder, name, inputs, expected):
    """Exported by torch.onnx.export(dynamo=True), run by ONNX Runtime."""
    import onnxruntime

    model = _auto(name).from_pretrained(folder).eval()
    options = {"use_cache": False} if model.can_generate() else {}
    kept = [key for key in inputs if key != "attention_mask"]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, value):
            return self.model(**{kept[0]: value}, **options).logits

    file = Path(folder) / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(), (inputs[kept[0]],), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs[kept[0]].numpy()})
    return float((torch.from_numpy(found) - expected).abs().max())


def run_llama_cpp(folder, name, inputs, expected, source):
    """Converted by convert_hf_to_gguf.py in float32, run by llama-cpp-python."""
    import llama_cpp
    import numpy

    file = Path(folder) / "model.gguf"
    command = [sys.executable, str(Path(source) / "convert_hf_to_gguf.py"), str(folder), "--outtype", "f32"]
    script = (
        "import runpy, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; import conversion.base as b; "
        "b.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "  # a tokenizer that nobody has published
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(source), *command[1:], "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("convert_hf_to_gguf.py: " + done.stderr.strip().splitlines()[-1])
    llama = llama_cpp.Llama(str(file), n_ctx=32, logits_all=True, verbose=False)
    llama.eval(inputs["input_ids"][0].tolist())
    found = torch.from_numpy(numpy.array(llama.scores[: inputs["input_ids"].shape[1]]))
    return float((found - expected[0]).abs().max())


def _auto(name):
    return getattr(transformers, "AutoModelFor" + name.partition("For")[2])


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", help="sources of llama.cpp, for convert_hf_to_gguf.py")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), flush=True)
    processor = tokenizer()
    for name in MODELS:
        for layout in LAYOUTS:
            with tempfile.TemporaryDirectory() as folder:
                pruned, inputs, expected = save(name, layout, Path(folder) / "pruned", processor)
                runs = {"peft": run_peft, "onnxruntime": run_onnx}
                if options.llama_cpp and name.endswith("CausalLM"):
                    runs["llama_cpp_python"] = lambda *args: run_llama_cpp(*args, options.llama_cpp)
                for runtime, function in runs.items():
                    row = {"runtime": runtime, "version": _version(runtime), "class": name, "layout": layout}
                    row["written"] = type(pruned).__name__
                    try:
                        with contextlib.redirect_stdout(sys.stderr):
                            difference = function(Path(folder) / "pruned", name, inputs, expected)
                        row["difference"] = difference / float(expected.abs().max())
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
