"""Models and loops for the tests of Lightning's Fabric and Trainer."""

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from bigload.lightning import BitsandbytesPrecision

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
WIDTH = 64


class Net(nn.Module):
    """Linear layers that are quantized, a norm that is trained, and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.LayerNorm(2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.head = nn.Linear(WIDTH, 8, bias=False)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.norm(self.up(x)))))


class LitNet(pl.LightningModule):
    """A module for Trainer, whose network is built with it or when the Trainer begins."""

    def __init__(self, late=False):
        super().__init__()
        self.net = None if late else Net()
        self.called = []

    def configure_model(self):
        if self.net is None:
            self.net = Net()

    def training_step(self, batch):
        return self.net(batch).float().square().mean()

    def validation_step(self, batch):
        self.log("loss", self.net(batch).float().square().mean())

    def test_step(self, batch):
        self.validation_step(batch)

    def predict_step(self, batch):
        return self.net(batch)

    def on_before_backward(self, loss):
        self.called.append("before backward")

    def on_before_optimizer_step(self, optimizer):
        self.called.append("before step")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def inputs(rows=8):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))


def batches():
    return DataLoader(inputs(), batch_size=4)


def fabric_on(device, plugin=None, **options):
    """Return a Fabric on the CPU or one GPU."""
    plugins = [] if plugin is None else [plugin]
    return Fabric(accelerator="cuda" if device.type == "cuda" else "cpu", devices=1, plugins=plugins, **options)


def fabric_of(device, mode, **options):
    return fabric_on(device, BitsandbytesPrecision(mode, **options))


def trainer_of(device, mode, folder, *, ignore_modules=None, epochs=1, **options):
    """Return a Trainer on the CPU or one GPU that prints and logs nothing."""
    return pl.Trainer(
        accelerator="cuda" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=BitsandbytesPrecision(mode, ignore_modules=ignore_modules),
        **options,
    )


def bits(model):
    """Return what a model saves, as bytes: packed weights may be NaN as floats."""
    return {
        name: (value.dtype, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone())
        for name, value in model.state_dict().items()
    }


def differing(first, second):
    """Return the names under which two results of `bits` differ."""
    assert first.keys() == second.keys()
    return [
        name for name in first if first[name][0] != second[name][0] or not torch.equal(first[name][1], second[name][1])
    ]
