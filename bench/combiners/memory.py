"""The peak of the memory that tensors hold while some code runs, counted byte by byte.

Every storage that an operation returns is counted once, however many tensors look at it, from the operation that made
it until the last of them is gone; autograd's saved tensors count as long as the graph keeps them. So the number is the
same on every run and every machine, unlike the resident memory of a process. Not seen: what one operation allocates
and frees inside itself (such as the workspace of an attention kernel), and what holds no tensor.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live storages; ``with MemoryTracker(parameters) as tracker: …; tracker.peak``.

    Args:
        held: tensors that are there already and are counted from the start, such as the parameters.
    """

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation's result, with its storages counted."""
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            weakref.finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size


def peak_bytes(call: Callable[[], Any], held: Sequence[Tensor] = ()) -> int:
    """Peak of the bytes that are live during a call, the held ones included."""
    collects = gc.isenabled()
    gc.disable()  # when cycles are looked for depends on all that ran before
    try:
        with MemoryTracker(held) as tracker:
            call()
    finally:
        if collects:
            gc.enable()
    return tracker.peak
