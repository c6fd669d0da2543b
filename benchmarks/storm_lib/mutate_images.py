"""Inputs for ``predict``: each stands next to a good image, whose detections must not be lost."""

import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, Callable

from PIL import Image

from storm_lib.cases import ESCAPE, Command, Scene, damaged, mutation


def _job(scene: Scene, *inputs: Any) -> Command:
    """A good image, the inputs, and another good image: the job has to be done to its end."""
    last = scene.folder / "last.jpg"
    shutil.copyfile(scene.baseline.images / "000002.jpg", last)
    command = scene.predict(scene.image(), *inputs, last, names=[], must="handle")
    command.record_names = [scene.image().name, last.name]
    return command


def _png(width: int, height: int, row: bytes) -> bytes:
    """A grey PNG of one bit per pixel that claims a size, and repeats a row of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def _zeros(width: int, height: int) -> bytes:
    packer, parts = zlib.compressobj(1), []
    line = bytes(1 + (width + 7) // 8)
    for _ in range(height):
        parts.append(packer.compress(line))
    return b"".join([*parts, packer.flush()])


def _bomb(side: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(_png(side, side, _zeros(side, side)))


def _register_damage(how: str) -> None:
    @mutation(f"image: .jpg, {how}", is_random=True)
    def jpeg(scene: Scene) -> Command:
        path = scene.folder / "mutated.jpg"
        path.write_bytes(damaged(scene.image().read_bytes(), scene.rng, how))
        return _job(scene, path)

    @mutation(f"image: other formats, {how}", is_random=True)
    def other(scene: Scene) -> Command:
        form = scene.rng.choice(("png", "bmp", "tiff", "gif", "webp", "ppm"))
        path = scene.folder / f"mutated.{form}"
        Image.open(scene.image()).save(path)
        path.write_bytes(damaged(path.read_bytes(), scene.rng, how))
        return _job(scene, path)


for _how in ("truncated", "bit flips", "noise"):
    _register_damage(_how)


def _is_readable(path: Path) -> bool:
    try:
        return path.is_file() or path.is_fifo() or path.is_char_device()
    except OSError:  # a loop of links
        return False


def _register_image(name: str, file: str, write: Callable[[Path], Any]) -> None:
    @mutation(f"image: {name}")
    def image(scene: Scene) -> Command:
        path = scene.folder / "input" / file
        path.parent.mkdir()
        write(path)
        command = _job(scene, path)
        if not _is_readable(path):
            # An argument that is no file may also be refused by name, before the job begins.
            command.must, command.names = "either", [str(path)]
        return command


def _saved(mode: str, size: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size).save(path, **options)


for _name, _file, _write in (
    ("of no byte", "a.jpg", lambda path: path.write_bytes(b"")),
    ("text", "a.png", lambda path: path.write_text("no image")),
    ("a web page", "a.jpg", lambda path: path.write_text("<html>404</html>")),
    ("a FIFO that nobody writes to", "a.jpg", os.mkfifo),
    ("a link to itself", "a.jpg", lambda path: path.symlink_to("a.jpg")),
    ("a link to nothing", "a.jpg", lambda path: path.symlink_to("nowhere.jpg")),
    ("a device without end", "a.jpg", lambda path: path.symlink_to("/dev/zero")),
    ("a folder with an image's name", "a.jpg", lambda path: path.mkdir()),
    ("of 70000 x 20 pixels", "a.png", _saved("RGB", (70000, 20))),
    ("of 20 x 70000 pixels", "a.png", _saved("RGB", (20, 70000))),
    ("of 1 x 1 pixel", "a.png", _saved("RGB", (1, 1))),
    ("of 2 x 3000 pixels", "a.png", _saved("RGB", (2, 3000))),
    ("that claims 2^31 pixels a side", "a.png", lambda path: path.write_bytes(_png(2**31 - 1, 2**31 - 1, b"x"))),
    (
        "a bomb of 60000 x 60000 pixels",
        "a.png",
        _bomb(60000),
    ),
    ("of 12000 x 12000 pixels", "a.png", _bomb(12000)),
    ("16-bit grey", "a.png", lambda path: Image.new("I;16", (64, 64), 3000).save(path)),
    ("32-bit integer", "a.tiff", lambda path: Image.new("I", (64, 64), 70000).save(path)),
    ("float", "a.tiff", lambda path: Image.new("F", (64, 64), float("nan")).save(path)),
    ("grey with alpha", "a.png", _saved("LA", (64, 64))),
    ("CMYK", "a.jpg", _saved("CMYK", (64, 64))),
    ("Lab", "a.tiff", _saved("LAB", (64, 64))),
    ("one bit", "a.png", _saved("1", (64, 64))),
    ("a palette with transparency", "a.gif", _saved("P", (64, 64), transparency=0)),
    ("a name with a terminal escape", f"a{ESCAPE}.jpg", _saved("RGB", (64, 64))),
    ("a name with a line break", "a\nb.jpg", _saved("RGB", (64, 64))),
    ("a name of quotes and shell code", "a'\"$(touch x);`b`.jpg", _saved("RGB", (64, 64))),
    ("a name in other scripts", "\u56fe\u00e9\u05d0.jpg", _saved("RGB", (64, 64))),
    ("a name of 250 letters", "n" * 250 + ".jpg", _saved("RGB", (64, 64))),
    ("a name that begins with a hyphen", "-rf.jpg", _saved("RGB", (64, 64))),
    ("a video of no byte", "a.mp4", lambda path: path.write_bytes(b"")),
    ("a video of noise", "a.avi", lambda path: path.write_bytes(bytes(range(256)) * 64)),
    (
        "an animation",
        "a.webp",
        lambda path: Image.new("RGB", (64, 64)).save(
            path, save_all=True, append_images=[Image.new("RGB", (64, 64), "red")]
        ),
    ),
    ("EXIF data of noise", "a.jpg", _saved("RGB", (64, 64), exif=b"Exif\0\0" + bytes(range(256)))),
):
    _register_image(_name, _file, _write)


@mutation("image: a name that is no Unicode")
def _no_unicode(scene: Scene) -> Command:
    folder = scene.folder / "input"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    os.rename(folder / "a.jpg", os.fsencode(folder) + b"/a\xff\xfe.jpg")
    return _job(scene, folder)


@mutation("image: folders that link to each other")
def _loop(scene: Scene) -> Command:
    folder = scene.folder / "input" / "below"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    (folder / "up").symlink_to("..")
    return _job(scene, scene.folder / "input")


@mutation("image: a folder nested 60 times")
def _nested(scene: Scene) -> Command:
    folder = scene.folder.joinpath("input", *["d"] * 60)
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    return _job(scene, scene.folder / "input")


@mutation("image: a video that is cut", is_random=True)
def _cut_video(scene: Scene) -> Command:
    import cv2
    import numpy as np

    path = scene.folder / "mutated.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 64))
    for index in range(6):
        writer.write(np.full((64, 64, 3), 40 * index, dtype=np.uint8))
    writer.release()
    path.write_bytes(damaged(path.read_bytes(), scene.rng, scene.rng.choice(("truncated", "bit flips"))))
    return _job(scene, path)
