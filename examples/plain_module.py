"""A model of your own, any `nn.Module`: its weights are in a safetensors file, and are quantized as they are read.

To use it with a real model, build yours in place of `Classifier`, and give `load_and_quantize_model` your file, or a
folder with several of them.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import bigload


class Classifier(nn.Module):
    """A network with residual blocks."""

    def __init__(self, features: int = 64, width: int = 256, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs, (batch, features), to logits, (batch, classes)."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@torch.no_grad()
def main(file: Path) -> None:
    """Save a model's weights, load them in 4 bit, and compare."""
    torch.manual_seed(0)
    original = Classifier().eval()
    save_file(original.state_dict(), file)  # stands for a checkpoint that you have

    with bigload.init_empty_weights():  # takes no memory for the weights
        model = Classifier()
    model = bigload.load_and_quantize_model(model, "nf4", file).eval()
    print(model)
    print(model.load_report)

    x = torch.randn(8, 64)
    logits = model(x)  # on the device of x, wherever the model is
    same = nn.functional.cosine_similarity(logits, original(x)).mean().item()
    print(f"logits of {tuple(logits.shape)}, cosine to those of the original: {same:.3f}")
    assert same > 0.95


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder, "model.safetensors"))
