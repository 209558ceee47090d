"""`OffloadConfig`: what is to become of weights that do not lie on the device that computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError, PlacementError
from .memory import parse_size

# Bytes of a GPU that a plan leaves for activations, unless told otherwise, beside its largest layer dequantized.
RESERVE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class OffloadConfig:
    """How offloaded blocks are kept and computed.

    Attributes:
        execute: where a block that rests in host memory is computed: "gpu", which its weights are streamed to, "cpu",
            in float32, or "auto": where it takes less time for a token, by what must be moved and rates that are
            measured; the log says why.
        slots: how many blocks' weights a GPU holds at once while they stream, 1 or more: with two, one arrives while
            another is computed with.
        pin: whether host memory is pinned, which the full speed of the link needs.
        reserve: bytes of each GPU that are left for activations, or "512MiB"; None leaves 128 MiB, and what the largest
            4-bit layer takes when bitsandbytes dequantizes it, as it does for more than a few tokens.
    """

    execute: Literal["gpu", "cpu", "auto"] = "gpu"
    slots: int = 2
    pin: bool = True
    reserve: int | str | None = None

    def __post_init__(self) -> None:
        if self.execute not in ("gpu", "cpu", "auto"):
            raise ConfigError(f"OffloadConfig: execute is {self.execute!r}; expected 'gpu', 'cpu' or 'auto'")
        if not isinstance(self.slots, int) or isinstance(self.slots, bool) or self.slots < 1:
            raise ConfigError(f"OffloadConfig: slots is {self.slots!r}; expected a whole number, 1 or more")
        if not isinstance(self.pin, bool):
            raise ConfigError(f"OffloadConfig: pin is {self.pin!r}; expected True or False")
        try:
            self.reserve_bytes(0)
        except PlacementError as error:
            raise ConfigError(f"OffloadConfig: reserve is {self.reserve!r}; expected bytes, or '512MiB'") from error

    def reserve_bytes(self, dequantized: int) -> int:
        """Give the reserve in bytes.

        Args:
            dequantized: bytes of the largest 4-bit layer when it is dequantized.
        """
        return RESERVE_BYTES + dequantized if self.reserve is None else parse_size(self.reserve)


def as_offload_config(given: object) -> OffloadConfig:
    """Take an `OffloadConfig`, or None for the defaults.

    Raises:
        ConfigError: neither.
    """
    if given is None:
        return OffloadConfig()
    if not isinstance(given, OffloadConfig):
        raise ConfigError(f"offload is {given!r}; expected an OffloadConfig")
    return given
