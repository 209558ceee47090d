"""Trains and resumes a model with 4-bit weights in Lightning's Trainer: `python examples/lightning_trainer.py`.

The network is built in `configure_model`, so that a checkpoint of the quantized model can be resumed: Trainer loads it
before it converts the model. Runs on the CPU or a GPU.
"""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigload.lightning import BitsandbytesPrecision

WIDTH, CLASSES = 32, 4


class Classifier(pl.LightningModule):
    """Quantized layers, of which the norms and the head are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module | None = None

    def configure_model(self) -> None:
        """Build the network, once."""
        if self.body is None:
            self.body = nn.Sequential(
                nn.Linear(WIDTH, 4 * WIDTH), nn.LayerNorm(4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)
            )
            self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch."""
        x, labels = batch
        return nn.functional.cross_entropy(self.head(self.body(x)).float(), labels)

    def predict_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the classes of a batch."""
        return self.head(self.body(batch[0])).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train what is not quantized."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def trainer(folder: str, epochs: int) -> pl.Trainer:
    """Return a Trainer with a new plugin, as another process would make it."""
    return pl.Trainer(
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        plugins=BitsandbytesPrecision("nf4", ignore_modules={"head"}),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Train, save, and go on from what was saved."""
    pl.seed_everything(0)
    x = torch.randn(64, WIDTH)
    labels = x[:, :CLASSES].argmax(-1)
    batches = DataLoader(TensorDataset(x, labels), batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, epochs=10)
        first.fit(Classifier(), batches)
        first.save_checkpoint(Path(folder, "half.ckpt"))

        second, model = trainer(folder, epochs=20), Classifier()
        second.fit(model, batches, ckpt_path=Path(folder, "half.ckpt"))
        found = torch.cat(second.predict(model, batches))
        print(f"{type(model.body[0]).__name__}, {second.global_step} steps in all")
        print(f"right: {(found == labels).float().mean().item():.0%}")


if __name__ == "__main__":
    main()
