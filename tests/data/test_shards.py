import numpy as np
import pytest

from assay.data import shards
from assay.errors import AssayError


def header(*fields):
    return np.array([*fields, *([0] * (256 - len(fields)))], "<i4").tobytes()


@pytest.mark.parametrize("with_header", [True, False])
def test_bin_round_trip(tmp_path, with_header):
    ids = np.array([0, 1, 50256, 65535])
    shards.write(tmp_path / "a.bin", ids, header=with_header)
    (found,) = shards.read(tmp_path / "a.bin")
    assert found.tolist() == ids.tolist()
    assert (tmp_path / "a.bin").stat().st_size == 8 + 1024 * with_header


def test_the_header_of_larger_vocabularies(tmp_path):
    """llm.c's data for Llama 3: magic 20240801, version 7, uint32."""
    ids = np.array([128000, 0, 65536, 128255], np.uint32)
    path = tmp_path / "tinyshakespeare_train.bin"
    path.write_bytes(header(20240801, 7, 4) + ids.astype("<u4").tobytes())
    (found,) = shards.read(path)
    assert found.tolist() == ids.tolist()
    assert not found.flags.owndata
    shards.write(tmp_path / "ours.bin", ids)
    assert (tmp_path / "ours.bin").read_bytes() == path.read_bytes()


def test_a_nanogpt_file_longer_than_a_header_is_read_whole(tmp_path):
    ids = np.arange(5000, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    assert shards.read(tmp_path / "train.bin")[0].tolist() == ids.tolist()


def test_bin_is_mapped_not_read(tmp_path):
    shards.write(tmp_path / "a.bin", np.arange(100))
    (found,) = shards.read(tmp_path / "a.bin")
    assert not found.flags.owndata
    assert not found.flags.writeable


def test_npz_arrays_come_in_order_of_name(tmp_path):
    np.savez(tmp_path / "a.npz", b=np.array([3]), a=np.array([1, 2]))
    assert [a.tolist() for a in shards.read(tmp_path / "a.npz")] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (header(20240520, 1, 4) + b"12", r"4 tokens, so 1032 bytes, but the file has 1026"),
        (header(20240520, 2, 0), r"found version 2 of magic 20240520; legal is 1"),
        (header(20240801, 1, 0), r"found version 1 of magic 20240801; legal is 7"),
        (header(20240801, 7, 2) + b"1234", r"2 tokens, so 1032 bytes, but the file has 1028"),
        (header(20240522, 1, 0), r"found llm\.c's evaluation form"),
        (b"123", r"found 3 bytes, but uint16"),
    ],
)
def test_bad_bin(tmp_path, content, sentence):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(AssayError, match=rf"a\.bin: .*{sentence}"):
        shards.read(tmp_path / "a.bin")


def test_bad_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(AssayError, match=r"a\.npy: found int32\[2, 2\]"):
        shards.read(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros(2))
    with pytest.raises(AssayError, match=r"float64"):
        shards.read(tmp_path / "b.npy")
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(whole[:-4])
    with pytest.raises(AssayError, match=r"c\.npy: is not a whole"):
        shards.read(tmp_path / "c.npy")
    (tmp_path / "d.npz").write_bytes(b"no zip")
    with pytest.raises(AssayError, match=r"d\.npz: is not a whole"):
        shards.read(tmp_path / "d.npz")


def test_ids_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(AssayError, match=r"65536, but this \.bin holds uint16"):
        shards.write(tmp_path / "a.bin", np.array([65536]))
    with pytest.raises(AssayError, match=r"legal are: \.bin, \.npy"):
        shards.write(tmp_path / "a.dat", np.array([1]))


def test_joined_slices_like_one_array():
    arrays = [np.arange(3), np.zeros(0, int), np.arange(3, 4), np.arange(4, 9)]
    joined, whole = shards.Joined(arrays), np.arange(9)
    assert len(joined) == 9
    for start in range(10):
        for stop in range(start, 12):
            assert joined[start:stop].tolist() == whole[start:stop].tolist()
            parts = joined.parts(start, stop)
            assert [i for part in parts for i in part.tolist()] == whole[start:stop].tolist()
