"""The one edge to files and devices: bytes of a file into a reused buffer, and from there to where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from .checkpoint import LazyTensor, StoredTensor
from .errors import CheckpointError

BUFFER_BYTES = 16 * 2**20


class Reader(AbstractContextManager["Reader"]):
    """Reads tensors of a checkpoint through one host buffer, and one on each GPU that is read to.

    The host buffer is pinned where a GPU is involved. Nothing outlives the `with` block.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self._device_buffers: dict[torch.device, torch.Tensor] = {torch.device("cpu"): self._buffer}
        self._file: BinaryIO | None = None

    def pieces(self, tensor: StoredTensor, device: torch.device) -> Iterator[torch.Tensor]:
        """Read a tensor in order, in pieces of at most the buffer.

        Yields:
            Flat pieces in the stored dtype, on the device; each is valid until the next one is asked for.

        Raises:
            CheckpointError: the file cannot be read, or ended before the tensor did.
        """
        if isinstance(tensor, LazyTensor):
            yield from self._pieces_in_memory(tensor, device)
            return
        if device not in self._device_buffers:
            self._device_buffers[device] = torch.empty_like(self._buffer, device=device, pin_memory=False)
        room = len(self._buffer)
        for begin in range(0, tensor.nbytes, room):
            count = min(room, tensor.nbytes - begin)
            self._fill(tensor, tensor.offset + begin, count)
            landed = self._device_buffers[device][:count]
            if landed.device.type != "cpu":
                landed.copy_(self._buffer[:count])  # blocks, so the host buffer may be filled again
            yield landed.view(tensor.dtype)

    def _pieces_in_memory(self, tensor: LazyTensor, device: torch.device) -> Iterator[torch.Tensor]:
        values = tensor.load().detach().contiguous().view(-1)
        room = max(1, len(self._buffer) // tensor.dtype.itemsize)
        yield from (values[begin : begin + room].to(device) for begin in range(0, len(values), room))

    def _fill(self, tensor: StoredTensor, offset: int, count: int) -> None:
        view = memoryview(self._buffer.numpy())[:count]  # type: ignore[arg-type]
        try:
            file = self._open(tensor.file)
            file.seek(offset)
            while view:
                received = file.readinto(view)  # type: ignore[attr-defined]
                if not received:
                    raise CheckpointError(f"'{tensor.file}' ended while '{tensor.name}' was read: it was cut meanwhile")
                view = view[received:]
        except OSError as error:
            raise CheckpointError(f"reading '{tensor.name}' from '{tensor.file}' failed: {error}") from error

    def _open(self, path: Path) -> BinaryIO:
        if self._file is None or self._file.name != str(path):
            self.close()
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, PTH123 - closed by close()
        return self._file

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        del self._buffer, self._device_buffers


@contextmanager
def default_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU's default stream, after all that the caller's stream holds and before all it will hold.

    bitsandbytes' 4-bit kernels run on the default stream whatever stream is current, so the copies they depend on
    must run there too.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            caller, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            default.wait_stream(caller)
            stack.enter_context(torch.cuda.stream(default))
            stack.callback(caller.wait_stream, default)
        yield
