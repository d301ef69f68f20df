"""Token shards: files of ids, mapped into memory and never copied.

Two forms of `.bin`: headerless little-endian uint16 (nanoGPT), and a header of 256 int32 whose
first three are a magic number, a version and the count of tokens, then uint16 (llm.c's GPT-2
form, modded-nanogpt). Also `.npy` and `.npz`, arrays of one axis of integers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from assay.data import cache
from assay.errors import AssayError

MAGIC, VERSION = 20240520, 1
OTHER_MAGICS = {20240801: "llm.c's uint32 form (Llama 3)", 20240522: "llm.c's evaluation form"}
HEADER_BYTES = 256 * 4


class Joined:
    """Arrays of one axis laid end to end, sliced as one without being copied."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = tuple(arrays)
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.arrays else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        pieces = []
        while start < stop:
            i = int(np.searchsorted(self.ends, start, side="right"))
            offset = int(self.ends[i]) - len(self.arrays[i])
            end = min(stop, int(self.ends[i]))
            pieces.append(self.arrays[i][start - offset : end - offset])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def parts(self, start: int, stop: int) -> list[np.ndarray]:
        """The arrays, views, of which tokens start to stop are made."""
        begins = self.ends - [len(array) for array in self.arrays]
        return [
            array[max(start - begin, 0) : stop - begin]
            for array, begin, end in zip(self.arrays, begins.tolist(), self.ends, strict=True)
            if begin < stop and end > start
        ]


def read(path: Path) -> list[np.ndarray]:
    """The arrays of ids of one file, each [tokens], memory-mapped (but for `.npz`).

    Raises:
        AssayError: if the file is truncated, of another version, or not integers on one axis.
    """
    if path.suffix == ".bin":
        return [_read_bin(path)]
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        named = {path.name: loaded}
        if path.suffix == ".npz":
            with loaded:
                named = {f"{path.name}[{key}]": loaded[key] for key in sorted(loaded)}
    except (ValueError, OSError, EOFError) as error:
        raise AssayError(f"{path}: is not a whole {path.suffix} file ({error}).") from None
    for name, array in named.items():
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise AssayError(
                f"{path.with_name(name)}: found {array.dtype}{list(array.shape)}; tokens are one "
                f"axis of integers."
            )
    return list(named.values())


def _read_bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size >= HEADER_BYTES:
        magic, version, count = np.fromfile(path, "<i4", 3).tolist()
        if magic in OTHER_MAGICS or (magic == MAGIC and version != VERSION):
            what = OTHER_MAGICS.get(magic, f"version {version}")
            raise AssayError(
                f"{path}: found {what}; legal are headerless uint16 and magic {MAGIC} "
                f"version {VERSION}."
            )
        if magic == MAGIC:
            expected = HEADER_BYTES + 2 * count
            if size != expected:
                raise AssayError(
                    f"{path}: the header tells of {count} tokens, so {expected} bytes, but the "
                    f"file has {size}."
                )
            return _map(path, HEADER_BYTES, count)
    if size % 2:
        raise AssayError(
            f"{path}: found {size} bytes, but uint16 tokens take an even number; expected "
            f"{size + 1} or {size - 1}."
        )
    return _map(path, 0, size // 2)


def _map(path: Path, offset: int, count: int) -> np.ndarray:
    if not count:
        return np.zeros(0, "<u2")
    # asarray keeps the mapping but drops the subclass, whose slices are slow.
    return np.asarray(np.memmap(path, "<u2", "r", offset=offset, shape=(count,)))


def write(path: str | os.PathLike, ids: np.ndarray, *, header: bool = True) -> None:
    """Writes ids [tokens] as `.bin` (with or without the header) or `.npy`, atomically.

    Raises:
        AssayError: if an id does not fit in uint16 (`.bin`), or for another extension.
    """
    path, ids = Path(path), np.asarray(ids)
    if path.suffix == ".npy":
        import io

        np.save(buffer := io.BytesIO(), ids)
        return cache.write(path, buffer.getvalue())
    if path.suffix != ".bin":
        raise AssayError(f"{path}: found extension '{path.suffix}'; legal are: .bin, .npy.")
    if len(ids) and not (ids.min() >= 0 and ids.max() < 2**16):
        raise AssayError(f"{path}: ids reach {ids.max()}, but .bin holds uint16; write .npy.")
    head = np.zeros(256 if header else 0, "<i4")
    head[:3] = (MAGIC, VERSION, len(ids))[: len(head)]
    cache.write(path, head.tobytes() + ids.astype("<u2").tobytes())
