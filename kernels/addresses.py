"""Many tensors as the arguments of one launch: a table of their addresses, and which program works on which part."""

from collections.abc import Sequence

import torch
from torch import Tensor

Row = tuple[int, ...]


class AddressTable:
    """Rows of numbers, one a tensor (or a set of tensors of one size), that a launch reads on the device.

    While a CUDA graph is recorded nothing can be sent to the device: the rows are noted, and sent once the recording is
    over. What a recorded launch works on stays where it is, and that of a plain one between replays lies elsewhere, so
    each has a table of its own.

    Arguments:
        sizes: number of elements of each row's tensors.
        part: elements that one program works on.
        num_columns: of a row.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, *, part: int, num_columns: int) -> None:
        assert not _recording(device), "a recorded launch needs a table made before"
        pairs = [(i, k) for i, size in enumerate(sizes) for k in range(-(-size // part))]
        # [programs, 2] int32: which row, and which part of its tensors.
        self.blocks = _sent(torch.tensor(pairs, dtype=torch.int32).view(-1, 2), device)
        self.part = part
        self._shape = (len(sizes), num_columns)
        self._device = device
        self._plain = _Table(self._new())
        self._recorded: _Table | None = None

    def note(self, rows: list[Row]) -> Tensor:
        """The table `[rows, columns]` int64 for the next launch, with these rows."""
        if _recording(self._device):
            assert self._recorded is not None, "a recording has to be prepared"
            self._recorded.rows = rows
            return self._recorded.tensor
        self._plain.rows = rows
        self._plain.upload()
        return self._plain.tensor

    def prepare_recording(self) -> None:
        """To be called before a launch is recorded."""
        self._recorded = _Table(self._new())

    def finish_recording(self) -> None:
        """To be called once the launch was recorded, before it is replayed."""
        if self._recorded is not None:
            self._recorded.upload()

    def _new(self) -> Tensor:
        return torch.zeros(self._shape, dtype=torch.int64, device=self._device)


class _Table:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.rows: list[Row] = []
        self._uploaded: list[Row] = []

    def upload(self) -> None:
        """Send the rows, if the device does not have them."""
        if self.rows != self._uploaded:
            self.tensor.copy_(_sent(torch.tensor(self.rows, dtype=torch.int64), self.tensor.device))
            self._uploaded = self.rows


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, which the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_addressable(op: str, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Raise ValueError unless each tensor is contiguous, of one of these types, and begins on 16 bytes."""
    for x in tensors:
        if x.dtype not in dtypes or not x.is_contiguous() or x.data_ptr() % 16:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{op}: a tensor of shape {tuple(x.shape)} is {x.dtype} at {x.data_ptr() % 16} bytes past a multiple "
                f"of 16; the launch needs contiguous {names} that begins on one"
            )
