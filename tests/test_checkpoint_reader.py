"""Reading checkpoints: formats, addresses, and files that are missing, damaged or would run code."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathHandler, PathManager
from torch import nn

from qmimic_d2.checkpoint.checkpointer import SafeCheckpointer
from qmimic_d2.checkpoint.reader import UnsafeCheckpointError, read_checkpoint

KEY = "MODEL.QMIMIC.TEACHER.WEIGHTS"


class RunsCommand:
    """Leaves a file behind if it is unpickled the ordinary way."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def arrays():
    return {
        "backbone.conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "backbone.conv.bias": np.asfortranarray(np.arange(4, dtype=np.float64).reshape(2, 2)),
        "backbone.norm.num_batches_tracked": np.array(7),
        "backbone.empty": np.zeros((0, 3), dtype=np.float16),
        "backbone.big_endian": np.array([1.5, -2.0], dtype=">f4"),
        "backbone.mask": np.array([True, False]),
        "backbone.scalar": np.float32(0.25),
    }


def write(path, data, protocol=2):
    with open(path, "wb") as file:
        pickle.dump(data, file, protocol=protocol)
    return str(path)


def check_arrays(state):
    assert list(state) == list(arrays())
    for name, array in arrays().items():
        assert isinstance(state[name], torch.Tensor)
        np.testing.assert_array_equal(state[name].numpy(), array)
        assert state[name].numpy().dtype == array.dtype.newbyteorder("=")


# ---- what is read


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_model_zoo_pickle_of_any_protocol(tmp_path, protocol):
    content = {"model": arrays(), "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    check_arrays(read_checkpoint(write(tmp_path / "model.pkl", content, protocol)))


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_pickles_of_numpy_1_and_of_numpy_2(tmp_path, core):
    raw = pickle.dumps({"model": arrays(), "__author__": "x"}, protocol=2)
    own = b"numpy._core" if b"numpy._core" in raw else b"numpy.core"
    (tmp_path / "model.pkl").write_bytes(raw.replace(own + b".multiarray", core + b".multiarray"))
    check_arrays(read_checkpoint(str(tmp_path / "model.pkl")))


def test_pickle_of_python_2(tmp_path):
    # what Python 2 wrote for {"w": np.array([1.0, 2.0], "<f4")}: str opcodes for text and bytes alike
    data = np.array([1.0, 2.0], "<f4").tobytes()
    raw = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
        b"\xffK\x00tb\x89U\x08" + data + b"tbs."
    )
    (tmp_path / "model.pkl").write_bytes(raw)
    state = read_checkpoint(str(tmp_path / "model.pkl"))
    assert state["w"].tolist() == [1.0, 2.0]


def test_plain_containers_in_a_pickle(tmp_path):
    extra = {"set": {1}, "frozen": frozenset([2]), "ordered": OrderedDict(a=b"x"), "tuple": (1.0, None)}
    path = write(tmp_path / "model.pkl", {"model": arrays(), "__author__": "x", **extra})
    check_arrays(read_checkpoint(path))


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin", "model.pkl"])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_torch_archive_under_any_name(tmp_path, name, wrap):
    state = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": nn.Parameter(torch.ones(2))}
    torch.save({wrap: state, "iteration": 3} if wrap else state, tmp_path / name)
    loaded = read_checkpoint(str(tmp_path / name))
    assert list(loaded) == ["conv.weight", "conv.bias"]
    assert torch.equal(loaded["conv.weight"], state["conv.weight"])
    assert not loaded["conv.bias"].requires_grad


def test_legacy_torch_file(tmp_path):
    state = {"w": torch.arange(3.0)}
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(str(tmp_path / "model.pth"))["w"], state["w"])


def test_common_module_prefix_is_stripped_with_its_versions(tmp_path):
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    state = read_checkpoint(str(tmp_path / "model.pth"))
    assert set(state) == set(model.module.state_dict())
    assert state._metadata == model.module.state_dict()._metadata


def test_module_prefix_that_not_all_names_have_stays(tmp_path):
    state = {"module.w": torch.zeros(1), "other": torch.zeros(1)}
    torch.save(state, tmp_path / "model.pth")
    assert set(read_checkpoint(str(tmp_path / "model.pth"))) == set(state)


# ---- where it is read from


class FolderHandler(PathHandler):
    """``zoo-test://name`` stands for ``folder/name``."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def _get_supported_prefixes(self):
        return ["zoo-test://"]

    def _get_local_path(self, path, **kwargs):
        if "offline" in path:
            raise OSError("no route to host")
        return os.path.join(self.folder, path[len("zoo-test://") :])


def test_address_goes_through_detectron2s_path_manager(tmp_path):
    PathManager.register_handler(FolderHandler(tmp_path), allow_override=True)
    write(tmp_path / "model.pkl", {"model": arrays(), "__author__": "x"})
    check_arrays(read_checkpoint("zoo-test://model.pkl", KEY))
    with pytest.raises(FileNotFoundError, match=f"{KEY}.*zoo-test://other.pkl.*does not exist"):
        read_checkpoint("zoo-test://other.pkl", KEY)
    with pytest.raises(FileNotFoundError, match=f"{KEY}.*could not be fetched.*no route to host") as error:
        read_checkpoint("zoo-test://offline.pkl", KEY)
    assert isinstance(error.value.__cause__, OSError)


def test_name_that_the_catalog_does_not_have():
    with pytest.raises(FileNotFoundError, match="catalog://nothing.*could not be fetched"):
        read_checkpoint("catalog://nothing", KEY)


def test_empty_path():
    with pytest.raises(ValueError, match=f"{KEY} is empty"):
        read_checkpoint("", KEY)
    with pytest.raises(ValueError, match="the path of a checkpoint is empty"):
        read_checkpoint("")


def test_missing_file_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        read_checkpoint("out/model.pth", KEY)
    assert KEY in str(error.value) and "does not exist" in str(error.value)
    assert str(tmp_path / "out" / "model.pth") in str(error.value)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_checkpoint(str(tmp_path), KEY)


# ---- damaged files


def raw_files():
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": {"w": torch.arange(500.0)}}, zipped)
    torch.save({"model": {"w": torch.arange(500.0)}}, legacy, _use_new_zipfile_serialization=False)
    zoo = pickle.dumps({"model": {"w": np.arange(500.0)}, "__author__": "x"}, protocol=2)
    return {"zip.pth": zipped.getvalue(), "legacy.pth": legacy.getvalue(), "zoo.pkl": zoo}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "zoo.pkl"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, name, share):
    raw = raw_files()[name]
    path = tmp_path / name
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ValueError, match="unreadable or cut short") as error:
        read_checkpoint(str(path), KEY)
    assert KEY in str(error.value) and str(path) in str(error.value)
    assert error.value.__cause__ is not None
    assert not isinstance(error.value, UnsafeCheckpointError)


@pytest.mark.parametrize("name", ["page.pth", "page.pkl"])
def test_web_page_instead_of_weights(tmp_path, name):
    (tmp_path / name).write_text("<html>404 Not Found</html>")
    with pytest.raises(ValueError, match="unreadable or cut short"):
        read_checkpoint(str(tmp_path / name))


def test_other_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(ValueError, match="unreadable"):
        read_checkpoint(str(tmp_path / "model.pth"))


# ---- files that would run code


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_would_run_a_command(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = {"model": {**arrays(), "x": RunsCommand(trace)}, "__author__": "x"}
    path = write(tmp_path / "model.pkl", content, protocol)
    with pytest.raises(UnsafeCheckpointError, match=r"\.system, which is no tensor") as error:
        read_checkpoint(path, KEY)
    assert KEY in str(error.value) and path in str(error.value) and error.value.__cause__ is not None
    assert not trace.exists()
    with open(path, "rb") as file:  # the file does run it, were it not refused
        pickle.load(file)
    assert trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_that_would_run_a_command(tmp_path, zipped):
    trace = tmp_path / "trace"
    for name in ("model.pth", "model.pkl"):
        torch.save({"x": RunsCommand(trace)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError):
            read_checkpoint(str(tmp_path / name), KEY)
    with pytest.raises(UnsafeCheckpointError, match=r"\.system"):
        read_checkpoint(str(tmp_path / "model.pth"), KEY)
    assert not trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Calls(eval, "1"), id="eval"),
        pytest.param(Calls(getattr, "x", "upper"), id="getattr"),
        pytest.param(Calls(np.load, "x.npy"), id="numpy.load"),
        pytest.param(nn.Linear(1, 1), id="whole module"),
        pytest.param(np.array([None, {}], dtype=object), id="array of objects"),
        pytest.param(np.zeros(2, dtype="i4,f4"), id="structured array"),
        pytest.param(np.array(["text"]), id="array of text"),
        pytest.param(Calls(np.dtype, "O"), id="dtype of objects"),
    ],
)
def test_everything_but_number_arrays_is_refused(tmp_path, value):
    path = write(tmp_path / "model.pkl", {"model": {"x": value}, "__author__": "x"})
    with pytest.raises(UnsafeCheckpointError, match="holds "):
        read_checkpoint(path)


def test_codec_other_than_latin1_is_refused(tmp_path):
    raw = pickle.dumps(b"bytes", protocol=2).replace(b"latin1", b"rot_13")
    (tmp_path / "model.pkl").write_bytes(raw)
    with pytest.raises(UnsafeCheckpointError, match="_codecs.encode"):
        read_checkpoint(str(tmp_path / "model.pkl"))


@pytest.mark.parametrize(
    "value",
    [
        # bytes of the file as pointers: numpy itself would build this array
        pytest.param(Calls(np.ndarray, (1,), "O", b"A" * 8), id="array over a buffer"),
        pytest.param(Calls(np.empty(1).__reduce_ex__(5)[0], b"A" * 8, "O", (1,), "C"), id="frombuffer"),
        pytest.param(Calls(np.float32(0).__reduce__()[0], "O", b"A" * 8), id="scalar"),
    ],
)
def test_bytes_cannot_be_made_objects(tmp_path, value):
    path = write(tmp_path / "model.pkl", {"model": {"x": value}, "__author__": "x"})
    with pytest.raises(ValueError, match="unreadable"):
        read_checkpoint(path)


def test_array_longer_than_its_bytes(tmp_path):
    raw = pickle.dumps({"w": np.zeros(3, dtype="f4")}, protocol=2)
    shape = b"K\x03\x85"  # the tuple (3,)
    assert raw.count(shape) == 1
    (tmp_path / "model.pkl").write_bytes(raw.replace(shape, b"K\x7f\x85"))
    with pytest.raises(ValueError, match="unreadable"):
        read_checkpoint(str(tmp_path / "model.pkl"))


# ---- files that hold something else


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), 3, "text"])
def test_no_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}, where a state dict"):
        read_checkpoint(str(tmp_path / "model.pth"))


def test_dict_of_something_else(tmp_path):
    content = {"net": {"w": torch.zeros(1)}, "epoch": 3, "w": torch.zeros(1), 5: torch.zeros(1)}
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no flat dict") as error:
        read_checkpoint(str(tmp_path / "model.pth"), KEY)
    message = str(error.value)
    assert KEY in message and "net: dict" in message and "epoch: int" in message and "5: Tensor" in message


@pytest.mark.parametrize("content", [{}, {"model": {}}])
def test_empty_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="it is empty"):
        read_checkpoint(str(tmp_path / "model.pth"))


def test_long_lists_are_cut(tmp_path):
    torch.save({f"entry{i:02d}": i for i in range(25)}, tmp_path / "model.pth")
    with pytest.raises(ValueError) as error:
        read_checkpoint(str(tmp_path / "model.pth"))
    assert "entry19" in str(error.value) and "entry20" not in str(error.value)
    assert "and 5 more" in str(error.value)


@pytest.mark.parametrize("model", [None, "weights", 3, [1.0]])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_model_entry_that_is_no_dict(tmp_path, model, suffix):
    path = tmp_path / f"model{suffix}"
    save = torch.save if suffix == ".pth" else (lambda content, target: target.write_bytes(pickle.dumps(content)))
    save({"model": model, "iteration": 3}, path)
    for read in (read_checkpoint, SafeCheckpointer(nn.Linear(2, 2)).load):
        with pytest.raises(ValueError, match="is no flat dict of names and tensors") as refused:
            read(str(path))
        assert str(path) in str(refused.value)
