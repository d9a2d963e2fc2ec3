"""Token by token in buffers that are made once a sequence."""

from neurogen.modes.preallocated.mode import PreallocatedMode

__all__ = ["PreallocatedMode"]
