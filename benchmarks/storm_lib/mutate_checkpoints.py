"""Checkpoints that are damaged, hostile, or of other numbers than they should hold."""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import torch

from storm_lib.cases import Command, Scene, damaged, mutation
from storm_lib.checkpoint_files import arrays_of, pickled, resume, run_to_resume, saved, state_of

_GIB = 2**30
_ZEROS = bytes(16 * 2**20)

# (module, name) of what hostile pickles call, and its arguments, given the shell command and Python code.
_CALLS = (
    ("os", "system", lambda shell, code: (shell,)),
    ("posix", "system", lambda shell, code: (shell,)),
    ("subprocess", "check_output", lambda shell, code: (["sh", "-c", shell],)),
    ("subprocess", "Popen", lambda shell, code: (["sh", "-c", shell],)),
    ("builtins", "eval", lambda shell, code: (code,)),
    ("builtins", "exec", lambda shell, code: (code,)),
    ("__builtin__", "eval", lambda shell, code: (code,)),
    ("timeit", "timeit", lambda shell, code: ("pass", code)),
    ("pdb", "run", lambda shell, code: (code,)),
    ("numpy.testing._private.utils", "runstring", lambda shell, code: (code, {})),
)


def _register_damage(how: str) -> None:
    @mutation(f"checkpoint: .pth, {how}", is_random=True)
    def pth(scene: Scene) -> Command:
        path = scene.folder / "mutated.pth"
        path.write_bytes(damaged(scene.baseline.weights.read_bytes(), scene.rng, how))
        return scene.evaluate(path)

    @mutation(f"checkpoint: .pkl, {how}", is_random=True)
    def pkl(scene: Scene) -> Command:
        path = pickled(scene, {"model": arrays_of(scene)})
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return scene.evaluate(path)

    @mutation(f"checkpoint: .pth of old PyTorch, {how}", is_random=True)
    def legacy(scene: Scene) -> Command:
        path = saved(scene, {"model": state_of(scene)}, _use_new_zipfile_serialization=False)
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return scene.evaluate(path)

    @mutation(f"checkpoint: resumed, {how}", is_random=True)
    def resumed(scene: Scene) -> Command:
        output = run_to_resume(scene)
        path = output / "model_0000001.pth"
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return resume(scene, path.name)


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: Any):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _global(module: str, name: str, style: str) -> bytes:
    if style == "STACK_GLOBAL":
        return b"".join(b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name)) + b"\x93"
    return b"c" + f"{module}\n{name}\n".encode()


def _hostile(scene: Scene) -> bytes:
    """A pickle that holds a dict of weights and, among them, a call."""
    shell = f"touch {scene.marker}"
    code = f"__import__('os').system({shell!r})"
    module, name, arguments = scene.rng.choice(_CALLS)
    body = pickle.dumps(arguments(shell, code), protocol=2)[2:-1]
    style = scene.rng.choice(("STACK_GLOBAL", "GLOBAL"))
    call = _global(module, name, style) + body + b"R"
    return b"\x80\x04}X\x05\x00\x00\x00model" + call + b"s."


@mutation("checkpoint: .pkl that calls a function", is_random=True)
def _pkl_calls(scene: Scene) -> Command:
    path = scene.folder / "mutated.pkl"
    path.write_bytes(_hostile(scene))
    return scene.evaluate(path, must="refuse")


@mutation("checkpoint: .pth that calls a function", is_random=True)
def _pth_calls(scene: Scene) -> Command:
    path = scene.folder / "mutated.pth"
    _rewrite(scene.baseline.weights, path, {"data.pkl": _hostile(scene)})
    return scene.evaluate(path, must="refuse")


@mutation("checkpoint: .pth of old PyTorch that calls a function")
def _legacy_calls(scene: Scene) -> Command:
    content = {"model": _Call(os.system, f"touch {scene.marker}")}
    return scene.evaluate(saved(scene, content, _use_new_zipfile_serialization=False), must="refuse")


@mutation("checkpoint: resumed, calls a function")
def _resumed_calls(scene: Scene) -> Command:
    output = run_to_resume(scene)
    path = output / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    content["trainer"]["more"] = _Call(os.system, f"touch {scene.marker}")
    torch.save(content, path)
    return resume(scene, path.name, must="refuse")


@mutation("checkpoint: writes into freed memory")
def _write_after_free(scene: Scene) -> Command:
    """The state of an array is set twice; a view of the first buffer stays, and is written to."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    length = 100_000
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"\x85R"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85C\x01b\x87R("
    array += integer(1) + integer(length) + b"\x85" + dtype + b"\x89\x96" + struct.pack("<Q", length)
    array += b"a" * length + b"tb"
    view = b"cnumpy.core.numeric\n_frombuffer\n(h\x00" + dtype + integer(length) + b"\x85" + text("C") + b"tR"
    second = b"h\x00(" + integer(1) + integer(1) + b"\x85" + dtype + b"\x89C\x01Atb0"
    victim = b"(" + b"N" * (length // 8 - 20) + b"l"
    writes = b"".join(b"h\x01" + integer(index) + integer(0x41) + b"s0" for index in range(4000))
    path = scene.folder / "mutated.pkl"
    parts = (array, b"q\x000", view, b"q\x010", second, victim, b"q\x02", victim, b"q\x030", b"0", writes, b"h\x02.")
    path.write_bytes(b"\x80\x05" + b"".join(parts))
    return scene.evaluate(path, must="refuse")


_HUGE = {
    "bytes of 2 GiB": b"\x8e" + struct.pack("<Q", 2**31) + b"a",
    "bytearray of 8 GiB": b"\x96" + struct.pack("<Q", 2**33) + b"a",
    "text of 4 GiB": b"X" + struct.pack("<I", 2**32 - 1) + b"a",
    "frame of 2^60": b"\x95" + struct.pack("<Q", 2**60) + b"}",
    "number of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a",
    "memo of 2^31": b"}r" + struct.pack("<I", 2**31),
    "nested 100,000 times": b"]" * 100_000 + b"a" * 99_999,
    "array of 2^40": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01btR"
    b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x04abcdtb",
}


def _register_huge(name: str, opcodes: bytes) -> None:
    @mutation(f"checkpoint: .pkl asks for {name}")
    def huge(scene: Scene) -> Command:
        path = scene.folder / "mutated.pkl"
        path.write_bytes(b"\x80\x04" + opcodes + b".")
        command = scene.evaluate(path, must="refuse")
        command.memory_mib = 1024
        return command


for _name, _opcodes in _HUGE.items():
    _register_huge(_name, _opcodes)


def _rewrite(source: Path, target: Path, replaced: Dict[str, bytes], bomb: str = "") -> None:
    """Copies a .pth, with other contents for some members; the one named ``bomb`` becomes 2.5 GiB of zeros."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            ending = name.partition("/")[2]
            if ending == bomb:
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                new.compresslevel = 1
                with new.open(info, "w", force_zip64=True) as file:
                    for _ in range(int(2.5 * _GIB) // len(_ZEROS)):
                        file.write(_ZEROS)
            else:
                new.writestr(name, replaced.get(ending, old.read(name)))


@mutation("checkpoint: .pth with a zip bomb for a tensor")
def _bomb_of_data(scene: Scene) -> Command:
    path = scene.folder / "mutated.pth"
    _rewrite(scene.baseline.weights, path, {}, bomb="data/0")
    command = scene.evaluate(path)
    command.memory_mib = 2048
    return command


@mutation("checkpoint: .pth with a zip bomb for its pickle")
def _bomb_of_pickle(scene: Scene) -> Command:
    path = scene.folder / "mutated.pth"
    _rewrite(scene.baseline.weights, path, {}, bomb="data.pkl")
    command = scene.evaluate(path, must="refuse")
    command.memory_mib = 2048
    return command


_FILES = {
    "no byte": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>\n",
    "noise": bytes(range(256)) * 16,
    "an empty zip": b"PK\x05\x06" + bytes(18),
    "a gzip": b"\x1f\x8b\x08\x00" + bytes(64),
}


def _register_file(name: str, content: bytes, ending: str) -> None:
    @mutation(f"checkpoint: {ending} that is {name}")
    def given(scene: Scene) -> Command:
        path = scene.folder / f"mutated{ending}"
        path.write_bytes(content)
        return scene.evaluate(path, must="refuse")


for _name, _bytes in _FILES.items():
    for _ending in (".pth", ".pkl"):
        _register_file(_name, _bytes, _ending)


@mutation("checkpoint: a folder")
def _folder(scene: Scene) -> Command:
    path = scene.folder / "mutated.pth"
    path.mkdir()
    return scene.evaluate(path, must="refuse")
