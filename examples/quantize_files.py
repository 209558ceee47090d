"""A checkpoint quantized from files to files: once by `quantize_checkpoint`, and once by `bigload quantize`.

The checkpoint is small and random; for a real one name its folder or hub id in the place of `source`. The weights pass
through memory in pieces, so this works for models that are larger than the host's memory, too.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import bigload
from bigload.cli import main as bigload_command

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=256, dtype="bfloat16", **SIZES)


def main(folder: Path) -> None:
    """Quantize in both ways, and load what was made."""
    torch.manual_seed(0)
    source = folder / "original"
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(source)

    # The folder's config.json says which model the weights are for; pass any other model as model=.
    bigload.quantize_checkpoint(source, folder / "by-python", "nf4", max_shard_size="5GB")

    # In a shell: bigload quantize original by-shell --quant nf4
    status = bigload_command(["quantize", str(source), str(folder / "by-shell"), "--quant", "nf4"])
    assert status == 0

    weights = [(folder / made / "model.safetensors").read_bytes() for made in ("by-python", "by-shell")]
    print("both have written the same bytes:", weights[0] == weights[1])

    with bigload.init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG)
    model = bigload.load_and_quantize_model(model, None, folder / "by-shell")  # None: as it was quantized
    print(model.load_report)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
