"""An unpickler that makes tensors and dictionaries, and puts a placeholder where a file names anything else.

Checkpoints of models carry what their trainer kept beside the weights: callbacks, optimisers, NumPy's numbers. The
names that `torch.save` needs for tensors are known; every other name gives `Placeholder`, so that nothing is imported,
and nothing is called that does not stand here. This module is what torch's `load` takes as `pickle_module`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import _utils

__all__ = ["Placeholder", "Unpickler"]


class Placeholder:
    """An object of a class that is not read: it takes whatever arguments, state and entries the file has, and keeps
    none of them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any) -> Placeholder:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Known:
    """A function that a file may call but, unlike the bare function, not give attributes to."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives a function attributes")


# The storage classes' names torch.load resolves before it asks here.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Known(_utils._rebuild_parameter),
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Placeholder)
