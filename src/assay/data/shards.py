"""Token shards: files of ids, mapped into memory and never copied.

Forms of `.bin`: headerless little-endian uint16 (nanoGPT), and a header of 256 int32 whose first
three are a magic number, a version and the count of tokens, then uint16 (llm.c's GPT-2 form,
modded-nanogpt) or uint32 (llm.c's Llama 3 form, for larger vocabularies). Also `.npy` and `.npz`,
arrays of one axis of integers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from assay.data import cache
from assay.errors import AssayError

HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic number -> version, and the dtype of ids. llm.c: dev/data/data_common.py."""
EVALUATION_MAGIC = 20240522
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
        if magic == EVALUATION_MAGIC:
            raise AssayError(f"{path}: found llm.c's evaluation form, which holds no text's ids.")
        if magic in HEADERS:
            legal, dtype = HEADERS[magic]
            if version != legal:
                raise AssayError(
                    f"{path}: found version {version} of magic {magic}; legal is {legal}."
                )
            expected = HEADER_BYTES + np.dtype(dtype).itemsize * count
            if size != expected:
                raise AssayError(
                    f"{path}: the header tells of {count} tokens, so {expected} bytes, but the "
                    f"file has {size}."
                )
            return _map(path, HEADER_BYTES, count, dtype)
    if size % 2:
        raise AssayError(
            f"{path}: found {size} bytes, but uint16 tokens take an even number; expected "
            f"{size + 1} or {size - 1}."
        )
    return _map(path, 0, size // 2, "<u2")


def _map(path: Path, offset: int, count: int, dtype: str) -> np.ndarray:
    if not count:
        return np.zeros(0, dtype)
    # asarray keeps the mapping but drops the subclass, whose slices are slow.
    return np.asarray(np.memmap(path, dtype, "r", offset=offset, shape=(count,)))


def write(path: str | os.PathLike, ids: np.ndarray, *, header: bool = True) -> None:
    """Writes ids [tokens] as `.bin` (with or without a header) or `.npy`, atomically.

    With a header, ids that are uint32 are written as such, all others as uint16.

    Raises:
        AssayError: if an id does not fit in uint16 where there is no header, or for another
            extension.
    """
    path, ids = Path(path), np.asarray(ids)
    if path.suffix == ".npy":
        import io

        np.save(buffer := io.BytesIO(), ids)
        return cache.write(path, buffer.getvalue())
    if path.suffix != ".bin":
        raise AssayError(f"{path}: found extension '{path.suffix}'; legal are: .bin, .npy.")
    magic = 20240801 if header and ids.dtype == np.uint32 else 20240520
    version, dtype = HEADERS[magic]
    if len(ids) and not (ids.min() >= 0 and ids.max() <= np.iinfo(dtype).max):
        raise AssayError(f"{path}: ids reach {ids.max()}, but this .bin holds uint16; write .npy.")
    head = np.zeros(256 if header else 0, "<i4")
    head[:3] = (magic, version, len(ids))[: len(head)]
    cache.write(path, head.tobytes() + ids.astype(dtype).tobytes())
