"""A quantized model saved as safetensors, and loaded again by bigload and by transformers' `from_pretrained`.

The model is small and random; for a real one build it from its config and name its folder or hub id in the place of
`folder / "original"`. `hf upload org/name saved` then shares the saved folder: it has a model card.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import bigload

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=256, dtype="bfloat16", **SIZES)


def empty() -> torch.nn.Module:
    """Build the model without weights."""
    with bigload.init_empty_weights():
        return AutoModelForCausalLM.from_config(CONFIG)


@torch.no_grad()
def main(folder: Path) -> None:
    """Quantize, save, and load in two ways."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "original")
    model = bigload.load_and_quantize_model(empty(), "nf4", folder / "original").eval()

    bigload.save_quantized_model(model, folder / "saved")
    for path in sorted((folder / "saved").iterdir()):
        print(f"{path.stat().st_size:>8,} bytes  {path.name}")

    # None: as the checkpoint was quantized. Nothing is quantized again, so the bits are the same.
    again = bigload.load_and_quantize_model(empty(), None, folder / "saved").eval()
    by_transformers = AutoModelForCausalLM.from_pretrained(folder / "saved", device_map=model.device).eval()

    tokens = torch.arange(16, device=model.device)[None]
    logits = model(tokens).logits
    print("bigload gives the same logits:", torch.equal(again(tokens).logits, logits))
    print("transformers gives the same logits:", torch.equal(by_transformers(tokens).logits, logits))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
