"""Safetensors files as views and as streams: no more than a block of a tensor is ever copied.

Reading maps a file into memory and gives views of it. Writing takes entries, each of which says
at once what it will be (name, dtype, shape) and gives its values later, so that the header can go
first. Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON, the values).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from assay.errors import AssayError

Shape = tuple[int, ...]

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
"""Their name of a dtype -> numpy's."""
WEIGHTS = ("float32", "bfloat16", "float16", "float64")
"""What a parameter may be kept in."""

BLOCK_BYTES = 2**24
SHARD_BYTES = 5 * 2**30
INDEX = "model.safetensors.index.json"

# ---------------------------------------------------------------------------- entries


@dataclass(frozen=True)
class Entry:
    """One tensor to be read or written: what it will be, and how to get at its values.

    `arrays` gives views that lie one behind the other along the first axis; what they do not
    reach of `shape`, on any axis, is zeros (rows that pad a vocabulary). `source` is what error
    messages call it.
    """

    name: str
    dtype: np.dtype
    shape: Shape
    arrays: Callable[[], Sequence[np.ndarray]]
    source: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(
        self, index: Sequence[slice] | None = None, arrays: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """The values at some slices of unit step (all of them, if none is given), a copy.

        Raises:
            AssayError: if a value is not finite, or became so in this dtype.
        """
        index = index or [slice(None)] * len(self.shape)
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        out = np.zeros([stop - start for start, stop in spans], self.dtype)
        (first, last), rest = spans[0], tuple(slice(*span) for span in spans[1:])
        begin = 0
        for array in self.arrays() if arrays is None else arrays:
            start, stop = max(first, begin), min(last, begin + len(array))
            if start < stop:
                block = array[(slice(start - begin, stop - begin), *rest)]
                within = (slice(start - first, stop - first), *map(slice, block.shape[1:]))
                with np.errstate(over="ignore"):  # what becomes infinite is refused below
                    out[within] = block
            begin += len(array)
        if not np.isfinite(out).all():
            raise AssayError(f"{self.source}: holds values that are not finite.")
        return out

    def blocks(self) -> Iterator[np.ndarray]:
        """The values in order, some rows of the first axis at a time."""
        arrays = self.arrays()
        rows = self.shape[0]
        step = max(1, BLOCK_BYTES // max(self.nbytes // max(rows, 1), 1))
        for start in range(0, rows, step):
            whole = [slice(None)] * (len(self.shape) - 1)
            yield self.read([slice(start, min(start + step, rows)), *whole], arrays)


def dtype_of(tensors: Mapping[str, np.ndarray], name: str) -> np.dtype:
    """A tensor's dtype, without reading its values where the mapping can tell."""
    peek = getattr(tensors, "peek", None)
    return peek(name)[0] if peek else np.dtype(tensors[name].dtype)


def shape_of(tensors: Mapping[str, np.ndarray], name: str) -> Shape:
    """A tensor's shape, without reading its values where the mapping can tell."""
    peek = getattr(tensors, "peek", None)
    return peek(name)[1] if peek else tuple(tensors[name].shape)


def check_dtype(name: str, dtype: np.dtype) -> None:
    """
    Raises:
        AssayError: if it is none that a parameter may have.
    """
    if dtype.name not in WEIGHTS:
        raise AssayError(f"{name}: found {dtype}; quantised weights are not supported.")


# ---------------------------------------------------------------------------- reading


class SafetensorsFolder(Mapping):
    """The tensors of a folder, sharded or not: views of its files, mapped when asked for.

    Raises:
        AssayError: if there is no safetensors file, if the index names a file that is not
            there, or if a file is damaged.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        index, single = path / INDEX, path / "model.safetensors"
        self._headers: dict[Path, dict[str, tuple[np.dtype, Shape, int]]] = {}
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise AssayError(f"{index}: holds no 'weight_map'.")
            self._files = {name: path / Path(shard).name for name, shard in shards.items()}
            for file in sorted(set(self._files.values())):
                if not file.is_file():
                    raise AssayError(f"{file}: {INDEX} names this file, but it is not there.")
        elif single.is_file():
            self._files = dict.fromkeys(self._header(single), single)
        elif pickles := sorted(found for s in PICKLES for found in path.glob(f"*{s}")):
            raise refuse_pickle(pickles[0])
        else:
            raise AssayError(f"{path}: there is no model.safetensors in this folder.")

    def peek(self, name: str) -> tuple[np.dtype, Shape]:
        """dtype and shape, without the values."""
        return self._entry(name)[:2]

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, offset = self._entry(name)
        if 0 in shape or not shape:
            content = self._files[name].read_bytes()[offset : offset + dtype.itemsize]
            return np.frombuffer(content, dtype, count=0 if 0 in shape else 1).reshape(shape)
        mapped = np.memmap(self._files[name], np.uint8, "r", offset, self._bytes(dtype, shape))
        return mapped.view(np.ndarray).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @staticmethod
    def _bytes(dtype: np.dtype, shape: Shape) -> int:
        return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def _entry(self, name: str) -> tuple[np.dtype, Shape, int]:
        path = self._files[name]
        try:
            return self._header(path)[name]
        except KeyError:
            raise AssayError(f"{path}: {name} cannot be read (it is not in the file).") from None

    def _header(self, path: Path) -> dict[str, tuple[np.dtype, Shape, int]]:
        """Names -> dtype, shape and where in the file; the library has checked them."""
        if path not in self._headers:
            try:
                with safe_open(path, framework="numpy"):
                    pass
                with path.open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    entries = json.loads(file.read(size))
                entries.pop("__metadata__", None)
                self._headers[path] = {
                    name: (
                        DTYPES[entry["dtype"]],
                        tuple(entry["shape"]),
                        8 + size + entry["data_offsets"][0],
                    )
                    for name, entry in entries.items()
                }
            except (SafetensorError, OSError, ValueError) as error:
                raise AssayError(f"{path}: cannot be read as safetensors ({error}).") from None
            except KeyError as error:
                raise AssayError(f"{path}: holds a tensor of dtype {error}.") from None
        return self._headers[path]


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_pickle(path: Path) -> AssayError:
    return AssayError(
        f"{path}: is a pickle ({path.suffix}), and reading it could run code; "
        f"convert it to safetensors where it comes from."
    )


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        AssayError: if the file holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AssayError(f"{path}: is not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise AssayError(f"{path}: holds no JSON object.")
    return data


# ---------------------------------------------------------------------------- writing


def write_safetensors(
    folder: Path,
    entries: Sequence[Entry],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Writes model.safetensors, or shards of at most `shard_bytes` and their index.

    A tensor larger than a shard has one to itself. `progress` is told the bytes of each block.
    Returns the files' names.

    Raises:
        AssayError: if a value is not finite.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            _write_file(out, shard, progress)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {
                entry.name: file
                for file, shard in zip(files, shards, strict=True)
                for entry in shard
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(INDEX)
    return files


def _write_file(out: BinaryIO, entries: Iterable[Entry], progress: Callable[[int], None]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The library's own order: larger items first, so that every tensor is aligned.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        for block in entry.blocks():
            out.write(block.reshape(-1).view(np.uint8).data)
            progress(block.nbytes)
    out.flush()
    os.fsync(out.fileno())
