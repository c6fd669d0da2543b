"""Checkpoint files that were made to do harm: each is refused in one line, without memory that it does not back."""

import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from qmimic_d2.checkpoint import plain_pickle
from qmimic_d2.checkpoint.files import MAX_INFLATION
from qmimic_d2.checkpoint.reader import UnsafeCheckpointError, read_checkpoint, read_mapping

# ---- a few opcodes, by hand


def name(module, text):
    return b"c" + module.encode() + b"\n" + text.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


DTYPE = name("numpy", "dtype") + text("u1") + b"\x85R"
BLANK = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + integer(0) + b"\x85C\x01b\x87R"


def state_of(values):
    """The state of a one-dimensional array."""
    raw = b"B" + struct.pack("<I", len(values)) + values
    return b"(" + integer(1) + integer(len(values)) + b"\x85" + DTYPE + b"\x89" + raw + b"t"


ARRAY = BLANK + state_of(b"abcd") + b"b"


def in_model(*parts):
    """A pickle of {"model": {"w": what the parts leave}}."""
    return b"\x80\x05}" + text("model") + b"}" + text("w") + b"".join(parts) + b"ss."


def refusal_of(path, kind=ValueError):
    """The message; reading allocates little."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as error:
            read_checkpoint(str(path), "THE.KEY")
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(f"THE.KEY: checkpoint {str(path)!r}") and "\n" not in message
    return message


def refusal(folder, raw, kind=ValueError):
    path = folder / "model.pkl"
    path.write_bytes(raw)
    return refusal_of(path, kind)


def test_the_opcodes_by_hand_are_read(tmp_path):
    (tmp_path / "model.pkl").write_bytes(in_model(ARRAY))
    assert read_checkpoint(str(tmp_path / "model.pkl"))["w"].tolist() == [97, 98, 99, 100]


# ---- memory that is written


def test_a_view_of_freed_memory_is_not_written(tmp_path):
    """An array's state is set twice, and a view of the first buffer is written."""
    view = name("numpy.core.numeric", "_frombuffer") + b"(h\x00" + DTYPE + integer(4) + b"\x85" + text("C") + b"tR"
    writes = view + b"q\x01h\x00" + state_of(b"x") + b"b0h\x01" + integer(0) + integer(0x41) + b"s"
    assert "where bytes are needed" in refusal(tmp_path, in_model(ARRAY, b"q\x000", writes))


@pytest.mark.parametrize(
    "program, reason",
    [
        (ARRAY + state_of(b"efgh") + b"b", "a second state for an array"),
        (ARRAY + integer(0) + integer(65) + b"s", "an item for a Array"),
        (ARRAY + b"(" + integer(0) + integer(65) + b"u", "an item for a Array"),
        (ARRAY + integer(65) + b"a", "AttributeError"),
        (ARRAY + b"(" + integer(65) + b"e", "AttributeError"),
        (BLANK, "an array without a state"),
        (b"}" + b"}" + b"b", "a state for a dict"),
        (b"(" + text("x") + b"l" + integer(0) + integer(1) + b"s", "an item for a list"),
    ],
)
def test_nothing_is_written_into_what_is_no_container(tmp_path, program, reason):
    assert f"; {reason}" in refusal(tmp_path, in_model(program)).replace("; it has ", "; ")


# ---- memory, and time, that is asked for


def nested_key(levels):
    """A tuple of twice the tuple below it: its hash takes 2^levels steps."""
    return b"K\x01q\x00" + b"".join(b"h%c\x85h%c\x85\x86q%c" % (i, i, i + 1) for i in range(levels))


def repeated_lists(levels):
    """A list of 60 times the list below it."""
    lists = [b"0(" + b"h%c" % level * 60 + b"lq%c" % (level + 1) for level in range(levels)]
    return b"(" + b"K\x00" * 60 + b"lq\x00" + b"".join(lists)


ENCODE = name("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R"
LARGE = struct.pack("<Q", 2**40)


@pytest.mark.parametrize(
    "program, reason",
    [
        (b"\x96" + LARGE + b"abc", "EOFError"),  # a bytearray
        (b"\x8e" + LARGE + b"abc", "EOFError"),  # bytes
        (b"\x8d" + LARGE + b"abc", "EOFError"),  # text
        (b"\x8b\xff\xff\xff\x7f", "EOFError"),  # an integer
        (name("builtins", "bytearray") + integer(2**31 - 1) + b"\x85R", "where bytes are needed"),
        (BLANK + b"(" + integer(1) + b"(" + integer(2**31 - 1) * 3 + b"t" + DTYPE + b"\x89C\x01atb", "an array of "),
        (b"(" * 200 + b"N" + b"t" * 200, "more than 100 levels"),
        (b"]q\x00h\x00a", "a container that holds itself"),
        (b"}(" + nested_key(60) + b"Nu", "a tuple as a key"),
        (name("builtins", "set") + b"(" + nested_key(60) + b"l\x85R", "a tuple as a key"),
        (repeated_lists(9), "containers of more items than"),
        (b"(" + text("a" * 30_000) + b"q\x000" + ENCODE * 50 + b"l", "values of more than"),
    ],
)
def test_a_few_bytes_cannot_ask_for_much(tmp_path, program, reason):
    assert reason in refusal(tmp_path, in_model(program))


def test_opcodes_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_READS", 1000)
    assert "more opcodes than any checkpoint has" in refusal(tmp_path, in_model(b"\x8f" * 1000))


def test_a_large_memo_index_takes_no_memory(tmp_path):
    (tmp_path / "model.pkl").write_bytes(in_model(ARRAY, b"r" + struct.pack("<I", 2**31)))
    tracemalloc.start()
    assert read_checkpoint(str(tmp_path / "model.pkl"))["w"].tolist() == [97, 98, 99, 100]
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_one_array_under_two_names_is_copied_once(tmp_path):
    array = np.arange(100_000.0)
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump({"model": {f"w{i}": array for i in range(5)}}, file)
    state = read_checkpoint(str(tmp_path / "model.pkl"))
    assert len({tensor.data_ptr() for tensor in state.values()}) == 1


# ---- archives of torch


def rewritten(folder, change=lambda name, raw: raw, compression=zipfile.ZIP_STORED, content=None):
    """A torch archive with its records changed."""
    buffer = io.BytesIO()
    torch.save(content or {"model": {"w": torch.arange(4.0)}}, buffer)
    path = folder / "model.pth"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for record in source.infolist():
            target.writestr(record.filename, change(record.filename, source.read(record.filename)))
    return path


def in_pickle(before, after):
    def change(name, raw):
        if not name.endswith("data.pkl"):
            return raw
        assert raw.count(before) == 1
        return raw.replace(before, after)

    return change


def test_a_compressed_archive_is_read_up_to_a_limit(tmp_path):
    weights = {"model": {"w": torch.randn(10_000)}}
    path = rewritten(tmp_path, compression=zipfile.ZIP_DEFLATED, content=weights)
    assert torch.equal(read_checkpoint(str(path))["w"], weights["model"]["w"])
    zeros = {"model": {"w": torch.zeros(250_000)}}
    path = rewritten(tmp_path, compression=zipfile.ZIP_DEFLATED, content=zeros)
    limit = MAX_INFLATION * path.stat().st_size
    assert f"records of more than {limit} bytes in an archive of {path.stat().st_size}" in refusal_of(path)


def test_a_record_that_inflates_beyond_its_size(tmp_path):
    """Its directory says 16 bytes, which the tensor needs; zlib would make 64 MiB of it."""

    def enlarge(name, raw):
        return bytes(2**26) if name.endswith("data/0") else raw

    path = rewritten(tmp_path, enlarge, compression=zipfile.ZIP_DEFLATED)
    size = struct.pack("<L", 2**26)
    assert path.read_bytes().count(size) == 2  # in front of the record, and in the directory
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<L", 16)))
    assert "BadZipFile" in refusal_of(path)


def test_records_that_overlap(tmp_path):
    path = rewritten(tmp_path, content={"model": {f"w{i}": torch.randn(1000) + i for i in range(4)}})
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record.header_offset for record in archive.infolist()}
    raw = path.read_bytes()
    first, second = (struct.pack("<L", records[f"archive/data/{index}"]) for index in (0, 1))
    directory = raw.index(b"PK\x01\x02")
    path.write_bytes(raw[:directory] + raw[directory:].replace(second, first))
    assert "records that overlap" in refusal_of(path)


@pytest.mark.parametrize(
    "before, after, reason",
    [
        (b"K\x04\x85q", b"J\xff\xff\xff\x7f\x85q", "reaches beyond the 4 values"),  # size
        (b"K\x01\x85q", b"K\x02\x85q", "reaches beyond the 4 values"),  # stride
        (b"QK\x00K\x04", b"QK\x01K\x04", "reaches beyond the 4 values"),  # offset
        (b"K\x04\x85q", b"J\xff\xff\xff\xff\x85q", "sizes that are no numbers of 0 or more"),
        (b"FloatStorage", b"DoubleStorage", "a storage of 32 bytes in 16 bytes"),
        (b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor", "holds torch._utils._rebuild_sparse_tensor"),
        (b"torch._utils\n_rebuild_tensor_v2", b"torch\nFloatTensor", "holds torch.FloatTensor"),
    ],
)
def test_a_tensor_beyond_its_storage(tmp_path, before, after, reason):
    assert reason in refusal_of(rewritten(tmp_path, in_pickle(before, after)))


def test_many_expanded_tensors(tmp_path):
    """A stride of 0 makes a large tensor of one value; a small one is read."""
    small = {"model": {"w": torch.ones(1).expand(3, 1000)}}
    torch.save(small, tmp_path / "model.pth")
    assert torch.equal(read_checkpoint(str(tmp_path / "model.pth"))["w"], torch.ones(3, 1000))
    torch.save({"model": {"w": torch.ones(1).expand(10**6, 10**6)}}, tmp_path / "model.pth")
    assert "values of more than" in refusal_of(tmp_path / "model.pth")


def test_an_older_torch_file_that_names_a_large_storage(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"w": torch.arange(4.0)}}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    in_the_pickle = b"cpuq\x08K\x04N", b"cpuq\x08J\xff\xff\xff\x7fN"
    in_front_of_it = b"\x04" + bytes(7), b"\x04\xff" + bytes(6)
    for before, after in (in_the_pickle, in_front_of_it):
        assert before in raw
        path.write_bytes(after.join(raw.rsplit(before, 1)))
        assert "unreadable or cut short" in refusal_of(path)


# ---- content that is not what it seems


def test_attributes_of_a_dict_are_no_methods(tmp_path):
    state = OrderedDict(w=torch.ones(1))
    state.itemz = 3
    state._metadata = {5: "x"}
    path = rewritten(tmp_path, in_pickle(b"itemz", b"items"), content={"model": state})
    assert not callable(torch.load(path, weights_only=False)["model"].items)
    read = read_checkpoint(str(path))
    assert read["w"].tolist() == [1.0] and not hasattr(read, "_metadata")


def test_names_of_a_file_reach_no_terminal_raw(tmp_path):
    torch.save({"\x1b[31mred": 1}, tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        read_checkpoint(str(tmp_path / "model.pth"))
    assert "\\x1b[31mred: int" in str(error.value) and "\x1b" not in str(error.value)
    message = refusal(tmp_path, in_model(name("os\x1b[31m", "system")), UnsafeCheckpointError)
    assert "os\\x1b[31m.system" in message


# ---- what is read is what torch reads


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}])
def test_tensors_of_all_sorts_are_those_of_torch(tmp_path, options):
    base = torch.randn(4, 6)
    content = {
        "strided": base[:, ::2],
        "transposed": base.t(),
        "part": base[1:, 1:3],
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in
           (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
            torch.complex64)},
        "plain": [1, 2.5, None, "text", b"bytes", (True, {"set"}), {3: 4}, 1j, -(2**70), torch.Size([2])],
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "state": nn.BatchNorm2d(2).state_dict(),
    }  # fmt: skip
    path = str(tmp_path / "model.pth")
    torch.save(content, path, **options)
    read, expected = read_mapping(path, path, ""), torch.load(path, weights_only=False)
    assert list(read) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert read[key].dtype == value.dtype and read[key].stride() == value.stride()
            assert torch.equal(read[key], value)
        elif key != "state":
            assert read[key] == value
    assert read["state"]._metadata == expected["state"]._metadata
    assert read["strided"].untyped_storage().data_ptr() == read["part"].untyped_storage().data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_in_a_torch_file(tmp_path, zipped):
    """Trainers save an evaluation's figures as NumPy's scalars."""
    content = {"model": {"w": torch.ones(1), "s": np.float32(0.5), "a": np.arange(3)}, "best": np.float64(0.25)}
    path = str(tmp_path / "model.pth")
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    state = read_checkpoint(path)
    assert state["s"].item() == 0.5 and state["a"].tolist() == [0, 1, 2]
    assert read_mapping(path, path, "")["best"] == 0.25


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    generator = random.Random(0)
    arrays = {"w": np.arange(6.0).reshape(2, 3), "s": np.float32(1)}
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, zipped in zip(buffers, (True, False)):
        torch.save({"model": {"w": torch.arange(6.0)}}, buffer, _use_new_zipfile_serialization=zipped)
    sources = [("z.pth", buffers[0].getvalue()), ("l.pth", buffers[1].getvalue())]
    sources += [(f"p{protocol}.pkl", pickle.dumps({"model": arrays}, protocol)) for protocol in (0, 2, 5)]
    refused = 0
    for round_number in range(400):
        file_name, raw = sources[round_number % len(sources)]
        mutated = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            mutated[generator.randrange(len(mutated))] = generator.randrange(256)
        (tmp_path / file_name).write_bytes(mutated)
        try:
            read_checkpoint(str(tmp_path / file_name))
        except ValueError as error:
            refused += 1
            assert str(tmp_path / file_name) in str(error)
    assert refused > 200
