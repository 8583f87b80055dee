"""Files of data: what is read, and every way in which a file can be wrong."""

import contextlib
import gzip
import io
import os
import pickle
import struct

import numpy as np
import pytest

from theorykit import data

# Files --------------------------------------------------------------------------------------------------------------

IDX_CODES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx(array, code=0x08):
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(IDX_CODES[code]).tobytes()


def op(*parts):
    return b"".join(parts)


def short(text):
    return b"U" + bytes([len(text)]) + text


def python2_batch(rows, labels):
    """A batch in the opcodes that Python 2 wrote: protocol 2, byte strings for keys, names and entries."""
    integers = b"".join(b"K" + bytes([label]) for label in labels)
    dtype = op(b"cnumpy\ndtype\n", short(b"u1"), b"K\x00K\x01\x87R(K\x03", short(b"|"), b"NNNJ\xff\xff\xff\xff")
    dtype += op(b"J\xff\xff\xff\xffK\x00tb")
    entries = rows.tobytes()
    return op(
        b"\x80\x02}(", short(b"batch_label"), short(b"testing batch 1 of 1"), short(b"labels"), b"](", integers, b"e",
        short(b"data"), b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85", short(b"b"),
        b"\x87R(K\x01",
        b"M", struct.pack("<H", rows.shape[0]), b"M", struct.pack("<H", rows.shape[1]), b"\x86", dtype, b"\x89",
        b"T", struct.pack("<I", len(entries)), entries, b"tbu.",
    )  # fmt: skip


IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
LABELS = np.asarray([2, 0, 9], np.uint8)
ROWS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path):
    (tmp_path / "mnist").mkdir()
    for split, images in (("train", IMAGES), ("t10k", IMAGES[::-1])):
        (tmp_path / "mnist" / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), mtime=0))
        (tmp_path / "mnist" / f"{split}-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("code", IDX_CODES)
def test_idx_files_of_every_type_come_back_as_written(tmp_path, code, pack):
    values = np.asarray([[1, 2, 3], [100, 0, 7]])
    values = values if code == 0x08 else -values
    path = tmp_path / "file"
    path.write_bytes(pack(idx(values, code)))
    array = data.read_idx(path)
    assert array.dtype == np.dtype(IDX_CODES[code]).newbyteorder("=") and array.dtype.isnative
    np.testing.assert_array_equal(array, values)


def test_mnist_is_found_in_its_folder_by_the_environment_variable(mnist, monkeypatch):
    monkeypatch.setenv("THEORYKIT_DATA", str(mnist))
    images, labels = data.load("mnist")
    assert images.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_array_equal(images, IMAGES.reshape(3, 16) / np.float32(255))
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(data.load("mnist", split="test").inputs, images[::-1])
    names = [path.name for path in data.source_files("mnist")]
    assert names == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"]


def test_the_same_files_load_from_the_folder_itself_and_by_a_path(mnist):
    expected = data.load("mnist", folder=mnist)
    for name, folder in (("mnist", mnist / "mnist"), ("fashion-mnist", mnist / "mnist"), ("mnist/.", mnist)):
        np.testing.assert_array_equal(data.load(name, folder=folder).inputs, expected.inputs)


@pytest.mark.parametrize("write", [
    python2_batch,
    *(lambda rows, labels, p=p: pickle.dumps({b"data": rows, b"labels": labels}, protocol=p) for p in range(2, 5)),
    lambda rows, labels: pickle.dumps({b"data": np.asfortranarray(rows), b"labels": labels}, protocol=2),
], ids=["python 2", "protocol 2", "protocol 3", "protocol 4", "column-major"])  # fmt: skip
def test_cifar_batches_come_back_as_images_with_colours_last(tmp_path, write):
    path = tmp_path / "data_batch_1"
    path.write_bytes(write(ROWS, LABELS.tolist()))
    images, labels = data.read_cifar_batch(path)
    np.testing.assert_array_equal(labels, LABELS)
    for colour in range(3):
        plane = ROWS[:, 1024 * colour : 1024 * (colour + 1)].reshape(3, 32, 32) / np.float32(255)
        np.testing.assert_array_equal(images.reshape(3, 32, 32, 3)[..., colour], plane)


def test_cifar10_joins_its_five_batches_in_order(tmp_path):
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}").write_bytes(python2_batch(ROWS, [i] * 3))
    (tmp_path / "test_batch").write_bytes(python2_batch(ROWS[:1], [7]))
    images, labels = data.load("cifar10", folder=tmp_path)
    assert images.shape == (15, 3072)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(5), 3))
    assert data.load("cifar10", folder=tmp_path, split="test").labels.tolist() == [7]
    assert [path.name for path in data.source_files("cifar10", folder=tmp_path)] == [
        f"data_batch_{i}" for i in range(1, 6)
    ]


@pytest.mark.parametrize("call", [
    "cos\nsystem\n",
    "cposix\nsystem\n",
    "cbuiltins\neval\n",
    "cnumpy\nload\n",
    "cnumpy.core.multiarray\nscalar\n",
])  # fmt: skip
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, call):
    witness = tmp_path / "witness"
    path = tmp_path / "data_batch_1"
    argument = f"__import__('os').mkdir({str(witness)!r})" if "eval" in call else f"mkdir {witness}"
    path.write_bytes(call.encode() + b"(V" + argument.encode() + b"\ntR.")
    with pytest.raises(
        data.DataError, match=r"data_batch_1: expected a CIFAR-10.*which no CIFAR-10 batch contains.*Remedy"
    ):
        data.read_cifar_batch(path)
    assert not witness.exists()
    if "system" in call or "eval" in call:  # the same bytes do run where nobody refuses them
        pickle.loads(path.read_bytes())
        assert witness.exists() == (os.name == "posix")


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_npz_comes_back_as_rows_and_labels(tmp_path, keys):
    values = np.linspace(-1, 1, 12).reshape(3, 2, 2)
    np.savez(tmp_path / "set.npz", **{keys[0]: values, keys[1]: LABELS})
    inputs, labels = data.load("set.npz", folder=tmp_path)
    np.testing.assert_array_equal(inputs, values.reshape(3, 4).astype(np.float32))
    np.testing.assert_array_equal(labels, LABELS)
    np.savez_compressed(tmp_path / "set.npz", **{keys[0]: IMAGES})
    assert data.load("set.npz", folder=tmp_path).labels is None
    assert data.source_files("set.npz", folder=tmp_path) == [tmp_path / "set.npz"]


def test_npy_comes_back_as_rows_without_labels(tmp_path):
    np.save(tmp_path / "set.npy", IMAGES)
    inputs, labels = data.load("set.npy", folder=tmp_path)
    np.testing.assert_array_equal(inputs, IMAGES.reshape(3, 16) / np.float32(255))
    assert labels is None


def test_digits_load_without_a_folder_and_their_file_exists(monkeypatch):
    monkeypatch.delenv("THEORYKIT_DATA", raising=False)
    assert data.load("digits") is data.digits()
    (path,) = data.source_files("digits")
    stored = np.loadtxt(path, delimiter=",", dtype=np.int32)
    np.testing.assert_array_equal(stored[:, :-1], data.digits().inputs * 16)
    assert data.source_files("gaussian") == data.source_files("clusters") == []


CIFAR = pickle.dumps({b"data": ROWS, b"labels": LABELS.tolist()}, protocol=2)
OBJECTS = np.asarray([[{}], [1]], dtype=object)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def batch(**changes):
    return pickle.dumps(
        {b"data": ROWS, b"labels": LABELS.tolist()} | {k.encode(): v for k, v in changes.items()}, protocol=2
    )


IDX3, IDX1 = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
COPY, PYTHON, ROW = "copy the file again", "the CIFAR-10 *python* version", "save one example a row"
SPLIT, CLASS, FROM_0 = "same set and split", "save one integer class", "number the classes from 0"
REPAIR, ANEW = "remove or repair", "as an array of numbers"


@pytest.mark.parametrize(("name", "content", "found", "remedy"), [
    (IDX3, b"", "0 bytes, so it is truncated", COPY),
    (IDX3, idx(IMAGES)[:10], "10 bytes, so it is truncated", COPY),
    (IDX3, idx(IMAGES)[:-1], "expected 64 bytes for shape (3, 4, 4), found 63 bytes, so it is truncated", COPY),
    (IDX3, idx(IMAGES) + b"xy", "66 bytes, so it is followed by 2 trailing bytes", COPY),
    (IDX3, b"<html>", "wrong magic 3c 68 74 6d", "not a web page"),
    (IDX3, b"\0\0\x0a\1\0\0\0\0", "expected an IDX type code among 08 09 0b 0c 0d 0e, found 0a", "one of these types"),
    (IDX3, struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), "so it is truncated", COPY),
    (IDX3, b"\0\0\x08\x64" + 100 * b"\0\0\0\1" + b"\0", "expected a shape that NumPy can hold", COPY),
    (IDX3, struct.pack(">HBB3I", 0, 8, 3, 0, *[2**32 - 1] * 2), "expected a shape that NumPy can hold", COPY),
    (IDX3, gzip.compress(idx(IMAGES), mtime=0)[:-9], "expected a whole gzip file, found a damaged one", COPY),
    (IDX3, idx(np.float32([[1, 2], [np.nan, 0]]), 0x0D), "1 non-finite values, the first at index (1, 0)", REPAIR),
    (IDX3, idx(IMAGES[:0]), "uint8 of shape (0, 4, 4)", ROW),
    (IDX1, idx(LABELS[:2]), "expected 3 labels, found 2 labels for 3 examples in", SPLIT),
    (IDX1, idx(LABELS, 0x0D), "float32 of shape (3,)", CLASS),
    (IDX1, idx(-LABELS.astype(int), 0x09), "expected labels between 0 and", FROM_0),
    ("test_batch", b"<html>", "a damaged, foreign or refused pickle", PYTHON),
    ("test_batch", CIFAR[:-20], "a damaged, foreign or refused pickle", COPY),
    ("test_batch", CIFAR + b".", "1 trailing bytes", COPY),
    ("test_batch", pickle.dumps([1]), "a damaged, foreign or refused pickle", PYTHON),
    ("test_batch", batch(data=ROWS[:, :9]), "expected data of shape (n, 3072), found (3, 9)", PYTHON),
    ("test_batch", batch(data=ROWS.astype("f4")), "entries of type f4 where uint8 belongs", PYTHON),
    ("test_batch", batch(labels=[1.5, 2, 3]), "expected labels as a list of integers, found [1.5, 2, 3]", PYTHON),
    ("test_batch", batch(labels=[1, 2]), "expected 3 labels, found 2", SPLIT),
    ("test_batch", batch(labels=[1, 2, 10]), "expected labels between 0 and 9, found 1 to 10", FROM_0),
    ("set.npy", b"<html>", "expected a whole npy array", COPY),
    ("set.npy", npy(np.ones((3, 2)))[:-1], "expected a whole npy array", COPY),
    ("set.npy", npy(np.ones((3, 2))) + b"x", "1 trailing bytes", COPY),
    ("set.npy", npy(OBJECTS), "Object arrays cannot be loaded", ANEW),
    ("set.npy", npy(np.ones(3)), "float64 of shape (3,)", ROW),
    ("set.npy", npy(np.asarray([["a"]])), "<U1 of shape (1, 1)", ROW),
    ("set.npy", npy(np.asarray([[1.0, np.inf]])), "1 non-finite values, the first at index (0, 1)", REPAIR),
    ("set.npy", npy(np.asarray([[1e300, 1.0]])), "1 non-finite values, the first at index (0, 0)", REPAIR),
    ("set.npz", b"<html>", "expected a whole npz file", COPY),
    ("set.npz", npz(x=np.ones((3, 2)))[:-30], "expected a whole npz file", COPY),
    ("set.npz", npz(inputs=np.ones((3, 2))), "images (and labels), found inputs", "numpy.savez(path, x=..., y=...)"),
    ("set.npz", npz(x=np.ones((3, 2)), y=np.ones(3)), "expected labels as integers", CLASS),
    ("set.npz", npz(x=np.ones((3, 2)), y=LABELS[:2]), "expected 3 labels, found 2", SPLIT),
    ("set.npz", npz(x=OBJECTS), "Object arrays cannot be loaded", ANEW),
    ("set.csv", b"1,2", "expected a name that ends in .npz or .npy, found set.csv", "convert it"),
])  # fmt: skip
def test_a_wrong_file_is_an_error_that_names_file_expectation_and_remedy(mnist, name, content, found, remedy):
    path = mnist / name
    if name.startswith("train"):
        path = mnist / "mnist" / name
        path.with_name(f"{name}.gz").unlink(missing_ok=True)
    path.write_bytes(content)
    call = {"train": ("mnist", "train"), "test_": ("cifar10", "test")}.get(name[:5], (name, "train"))
    with pytest.raises(data.DataError) as error:
        data.load(call[0], folder=mnist, split=call[1])
    message = str(error.value)
    assert message.startswith(f"{path}: expected ")
    assert found in message
    assert remedy in message.split(" Remedy: ")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [
    ("file-idx", idx(IMAGES)), ("file-idx", gzip.compress(idx(IMAGES), mtime=0)), ("set.npy", npy(IMAGES)),
    ("set.npz", npz(x=IMAGES, y=LABELS)), ("test_batch", CIFAR), ("test_batch", python2_batch(ROWS, LABELS.tolist())),
])  # fmt: skip
def test_no_truncation_and_no_change_of_a_byte_ends_in_another_error(tmp_path, name, whole):
    path = tmp_path / name
    readers = {"file-idx": lambda: data.read_idx(path), "test_batch": lambda: data.read_cifar_batch(path)}
    read = readers.get(name, lambda: data.load(name, folder=tmp_path))
    # About 150 places all over, and every byte of the two ends, where headers, opcodes and labels are.
    everywhere, n = range(0, len(whole), len(whole) // 150 + 1), len(whole)
    places = sorted({*everywhere, *range(min(n, 150)), *range(max(0, n - 50), n)})
    for cut in places:
        path.write_bytes(whole[:cut])
        with pytest.raises(data.DataError):
            read()
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with contextlib.suppress(data.DataError):
            read()


def test_a_missing_folder_variable_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.delenv("THEORYKIT_DATA", raising=False)
    with pytest.raises(data.DataError, match=r"THEORYKIT_DATA is not set.*Remedy: export THEORYKIT_DATA="):
        data.load("mnist")


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("THEORYKIT_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder. Remedy: create it"):
        data.load("mnist")


@pytest.mark.parametrize(("name", "missing"), [
    ("mnist", "mnist/train-images-idx3-ubyte"),
    ("fashion-mnist", "fashion-mnist/train-images-idx3-ubyte"),
    ("cifar10", "cifar10/data_batch_1"),
    ("minst", "minst"),
    ("folder", "folder/train-images-idx3-ubyte"),
    ("set.npz", "set.npz"),
])  # fmt: skip
def test_a_missing_file_is_named_with_the_remedy(tmp_path, name, missing):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, folder=tmp_path)
    assert str(error.value).startswith(f"{tmp_path / missing}: no such file")
    assert "Remedy" in str(error.value) and "nothing is downloaded" in str(error.value)


def test_a_file_missing_beside_the_others_is_named(mnist):
    (mnist / "mnist" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"mnist.train-labels-idx1-ubyte: no such file.*Remedy"):
        data.load("mnist", folder=mnist)
    for read in (data.read_idx, data.read_cifar_batch):
        with pytest.raises(FileNotFoundError, match=r"absent: no such file. Remedy"):
            read(mnist / "absent")


def test_a_split_that_does_not_exist_and_a_name_that_is_drawn_are_errors(tmp_path):
    with pytest.raises(data.DataError, match=r"digits: has no test split. Remedy: load it once and split"):
        data.load("digits", split="test")
    with pytest.raises(
        data.DataError, match=r"gaussian: is drawn, not read. Remedy: call theorykit.data.gaussian_pairs"
    ):
        data.load("gaussian")
    with pytest.raises(data.DataError, match=r'split is "val": expected "train" or "test". Remedy'):
        data.load("mnist", folder=tmp_path, split="val")
