# SPDX-License-Identifier: Apache-2.0
"""Pickles of plain data, loaded without executing anything in them."""

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TORCH_BEFORE_1_6 = 0x1950A86A20F9469CFC6C  # the first pickle in its files


def load_plain_pickle(file: BinaryIO) -> Any:
    """Load containers, numbers, strings and numpy arrays of numbers; other content raises UnpicklingError, damage any exception."""
    content = _PlainUnpickler(file).load()
    if isinstance(content, int) and content == _TORCH_BEFORE_1_6:
        raise pickle.UnpicklingError("it is of a torch before 1.6; load it and save it again")
    return content


def load_plain_npy(file: BinaryIO) -> Any:
    """Load the object in an .npy file of one object, such as a dictionary, from the position after the header."""
    array = _PlainUnpickler(file, one_object=True).load()
    if not hasattr(array, "object"):
        raise pickle.UnpicklingError("it holds an array of objects, but only one plain object is supported")
    return array.object


def torch_pickle(archive: zipfile.ZipFile) -> str | None:
    """Name of the pickle in a file of torch.save; None for other archives."""
    names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    return names[0] if len(names) == 1 else None


def load_plain_torch(archive: zipfile.ZipFile, pickle_name: str) -> Any:
    """Load a file of torch.save like `load_plain_pickle`; its tensors become numpy arrays."""
    root = pickle_name.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder").decode() != sys.byteorder:
        raise pickle.UnpicklingError("its numbers have the byte order of another processor")
    return _PlainUnpickler(io.BytesIO(archive.read(pickle_name)), storage=lambda key: archive.read(f"{root}data/{key}")).load()


# The implementation in Python: that in C allocates as many entries of its memo as a damaged file asks for.
class _PlainUnpickler(pickle._Unpickler):
    """Unpickler of plain data.

    The globals that a pickle names are never called: functions and classes below replace them. numpy's own classes are unsafe, since
    a pickled state can make an array interpret bytes of the file as object pointers.

    Args:
        storage: reads the bytes of a tensor's storage by its key, in files of torch.save.
        one_object: whether the pickle is an array of one object, which becomes its attribute `object`.
    """

    def __init__(self, file: BinaryIO, *, storage: Callable[[str], bytes] | None = None, one_object: bool = False) -> None:
        super().__init__(_Bounded(file), encoding="latin1")
        self._storage = storage
        # Bound methods, since a pickle could set the defaults of a function.
        self._replacements: dict[str, Any] = {
            "numpy.ndarray": None,  # only an argument of _reconstruct
            "numpy.dtype": _DtypeOrObject if one_object else _Dtype,
            "numpy.core.multiarray._reconstruct": self._empty,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._array,
            "_codecs.encode": self._bytes,
        }
        if storage is not None:
            self._replacements |= {
                "torch._utils._rebuild_tensor_v2": self._tensor,
                "collections.OrderedDict": self._dictionary,
                **_STORAGES,
            }

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if known not in self._replacements:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, but only arrays in plain containers are supported")
        return self._replacements[known]

    def persistent_load(self, pid: Any) -> Tensor:
        if self._storage is None:
            raise pickle.UnpicklingError("the pickle refers to external objects")
        _, dtype, key, _, size = pid
        data = bytearray(self._storage(key))
        storage = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(storage) != size:
            raise pickle.UnpicklingError(f"a tensor has {len(storage)} of its {size} numbers")
        return storage

    def _empty(self, cls: None, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
        return _Array(0)

    def _scalar(self, dtype: "_Dtype", data: bytes | str) -> Any:
        return _numbers(data, dtype, (), "C")[()]

    def _array(self, data: bytes, dtype: "_Dtype", shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
        return _numbers(data, dtype, shape, order)

    def _tensor(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: object) -> np.ndarray:
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or (0 not in size and end >= len(storage)):
            raise pickle.UnpicklingError("a tensor exceeds its numbers")
        tensor = storage.as_strided(size, stride, offset)
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def _dictionary(self) -> dict[Any, Any]:
        return {}

    def _bytes(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")

    def _load_bytearray(self: Any) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # the original allocates before it reads

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray}


class _Bounded:
    """A file of which no more is read than it has: a damaged length would allocate that much memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size > self._end - self._file.tell():
            raise EOFError("it is cut short")
        return self._file.read(size)


class _Dtype:
    """A numpy.dtype of numbers; a pickle can set its byte order only."""

    kinds = "biuf"

    def __init__(self, name: Any, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in self.kinds:
            raise pickle.UnpicklingError(f"the pickle holds an array of {self.dtype}, but only numbers are supported")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _DtypeOrObject(_Dtype):
    """Also the dtype of objects, of which an `_Array` keeps one as it is."""

    kinds = "biufO"


class _Array(np.ndarray):
    """An array whose content is set after its creation, from a checked state."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if dtype.dtype.hasobject:
            if shape != () or not isinstance(data, list) or len(data) != 1:
                raise pickle.UnpicklingError(f"the pickle holds an array of objects {list(shape)}, but only one plain object is supported")
            self.object = data[0]
            return
        array = _numbers(data, dtype, shape, "F" if is_fortran else "C")
        checked: Any = (1, array.shape, array.dtype, False, array.tobytes())
        super().__setstate__(checked)


def _numbers(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """An array of a copy of the data, which the pickle may still change; Python 2 wrote bytes as strings."""
    if dtype.dtype.hasobject:
        raise pickle.UnpicklingError("the pickle holds bytes of objects")
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(bytearray(data), dtype.dtype).reshape(shape, order=order)
