"""Fine-tunes a model with 4-bit weights in Lightning's Fabric: `python examples/lightning_fabric.py`.

The model is built empty and takes no memory for the weights that will be quantized; each is quantized as the checkpoint
is read. The norms and the head, which is left out by name, are trained. Runs on the CPU or a GPU.
"""

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from bigload.lightning import BitsandbytesPrecision

VOCAB, WIDTH, CONTEXT = 64, 64, 8


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, time, width) to the same shape."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Predicts the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens, (batch, time), to logits, (batch, time, vocab)."""
        return self.head(self.blocks(self.embed(tokens)))


def main() -> None:
    """Load, train for some steps, save, and load what was saved."""
    torch.manual_seed(0)
    fabric = Fabric(devices=1, plugins=BitsandbytesPrecision("nf4-dq", ignore_modules={"head"}))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "pretrained.ckpt")
        torch.save(Model().state_dict(), checkpoint)  # stands for a checkpoint that you have

        with fabric.init_module(empty_init=True):
            model = Model()
        model = fabric.setup(model)
        fabric.load_raw(checkpoint, model)

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=1e-2))
        tokens = torch.randint(VOCAB, (16, CONTEXT), device=fabric.device)
        for step in range(20):
            loss = nn.functional.cross_entropy(model(tokens)[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                print(f"step {step:2}: loss {loss.item():.3f}")

        fabric.save(Path(folder, "tuned.ckpt"), {"model": model})  # 4-bit weights, with their scales
        with fabric.init_module(empty_init=True):
            again = Model()
        again = fabric.setup(again)
        fabric.load(Path(folder, "tuned.ckpt"), {"model": again})
        with torch.no_grad():
            print("the saved model gives the same logits:", torch.equal(again(tokens), model(tokens)))


if __name__ == "__main__":
    main()
