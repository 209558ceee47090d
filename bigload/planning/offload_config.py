"""`OffloadConfig`: how offloaded weights are stored and computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError, PlacementError
from ..notation import FieldsAsHtml, parse_size

# Bytes of each GPU that a plan leaves for activations by default, beside the largest 4-bit layer when dequantized.
RESERVE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class OffloadConfig(FieldsAsHtml):
    """How offloaded blocks are stored and computed.

    Attributes:
        execute: the device that computes blocks in host memory: "gpu" (their weights are streamed to it), "cpu" (in
            float32), or "auto": the one that takes less time for one token, by a short measurement that is logged. Of a
            mixture with fused experts in 4 bit "cpu" offloads the experts alone, if that is enough: the CPU computes
            those that the tokens visit, in 4 bit, and the GPU all else.
        slots: the number of blocks whose weights a GPU holds at once, 1 or more. With two, one is copied while the
            other computes.
        pin: whether to pin host memory, which the full speed of the link needs.
        reserve: memory of each GPU to keep free for activations, in bytes or as "512MiB". None keeps 128 MiB plus the
            size of the largest 4-bit layer when dequantized, as bitsandbytes does for more than a few tokens. At least
            the 144 MiB that the load itself needs are kept free.
        expert_cache: the size of the cache on each GPU that keeps the experts that were used last, for blocks of which
            only the fused experts are offloaded: a share of these experts, from 0 to 1, or bytes, or "2GiB". None takes
            what the plan leaves of the GPU or, for a device map without `max_memory`, at most a quarter of the experts.
            If the CPU computes, and experts come from the disk, None means 0.

    Examples:
        >>> from bigload import OffloadConfig
        >>> OffloadConfig(slots=3, reserve="1GiB")
        OffloadConfig(execute='gpu', slots=3, pin=True, reserve='1GiB', expert_cache=None)
        >>> OffloadConfig(expert_cache=0.25).expert_share, OffloadConfig(expert_cache="2GiB").expert_bytes
        (0.25, 2147483648)
    """

    execute: Literal["gpu", "cpu", "auto"] = "gpu"
    slots: int = 2
    pin: bool = True
    reserve: int | str | None = None
    expert_cache: float | int | str | None = None

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
        try:
            _ = self.expert_bytes
        except PlacementError as error:
            raise ConfigError(
                f"OffloadConfig: expert_cache is {self.expert_cache!r}; expected a share from 0 to 1, bytes, or '2GiB'"
            ) from error

    @property
    def expert_share(self) -> float | None:
        """The `expert_cache`, if it is a share of the experts."""
        given = self.expert_cache
        is_share = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given <= 1
        return float(given) if is_share else None  # type: ignore[arg-type]

    @property
    def expert_bytes(self) -> int | None:
        """The `expert_cache`, if it is bytes of each GPU."""
        given = self.expert_cache
        return None if given is None or self.expert_share is not None else parse_size(given)  # type: ignore[arg-type]

    def reserve_bytes(self, dequantized: int) -> int:
        """Return the reserve in bytes.

        Args:
            dequantized: bytes of the largest 4-bit layer when it is dequantized; used if `reserve` is None.

        Examples:
            >>> import bigload
            >>> bigload.OffloadConfig(reserve="1MiB").reserve_bytes(0)
            1048576
        """
        return RESERVE_BYTES + dequantized if self.reserve is None else parse_size(self.reserve)


def as_offload_config(given: object) -> OffloadConfig:
    """Return an `OffloadConfig`; None means the defaults.

    Raises:
        ConfigError: it is neither.
    """
    if given is None:
        return OffloadConfig()
    if not isinstance(given, OffloadConfig):
        raise ConfigError(f"offload is {given!r}; expected an OffloadConfig")
    return given
