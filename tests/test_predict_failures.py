"""``predict`` loses no job to one input: what was found is written, what is missing is named, and the status is 1."""

import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import warnings
from contextlib import closing

import cv2
import numpy as np
import pytest
from exported import random_image, write_forms
from PIL import Image
from test_command_line import status_of
from tiny_coco import write_images

from qmimic_d2.cli import predict as command
from qmimic_d2.cli.interruption import noted_interruption
from qmimic_d2.image_file import UnusableImageError
from qmimic_d2.inference.video import VideoFrames, VideoWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    return write_forms(folder, "MODEL.QMIMIC.QUANTIZER.NAME", "Clamp", forms=["torchscript"]).files["torchscript"]


class Result:
    """Exit status and JSON of a run."""

    def __init__(self, status, folder):
        self.status, self.folder = status, folder
        self.content = json.loads((folder / "predictions.json").read_text())
        self.drawn = {os.path.basename(each["file_name"]): each["drawn_file"] for each in self.content["images"]}
        self.skipped = self._by_name("skipped")
        self.incomplete = self._by_name("incomplete")

    def _by_name(self, section):
        return {os.path.basename(each["file_name"]): each["reason"] for each in self.content[section]}

    def num_found(self, name):
        ids = [each["id"] for each in self.content["images"] if os.path.basename(each["file_name"]) == name]
        return sum(each["image_id"] in ids for each in self.content["annotations"])


@pytest.fixture
def run(model, tmp_path):
    def predict(*inputs, status=1):
        arguments = ["--input", *inputs, "--output", tmp_path / "out", "--score-threshold", 0.1]
        result = Result(status_of("predict", "--model", model, *arguments), tmp_path / "out")
        assert result.status == status
        return result

    return predict


@pytest.fixture
def before_detection(monkeypatch):
    """Takes a function that is called before each detection of a run, with its number from 1."""

    def install(function):
        open_detector = command.open_detector

        def opened(*args, **options):
            detector, numbers = open_detector(*args, **options), itertools.count(1)

            def detect(image):
                function(next(numbers))
                return detector.detect(image)

            return dataclasses.replace(detector, detect=detect)

        monkeypatch.setattr(command, "open_detector", opened)

    return install


def write_video(path, count=6, size=(48, 64), codec="MJPG", rate=5.0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, size[::-1])
    for seed in range(count):
        writer.write(random_image(*size, seed))
    writer.release()
    return path


# --------------------------------------------------------------------------------------- inputs


def test_one_of_every_kind_of_bad_file(run, tmp_path, capsys):
    folder = tmp_path / "in"
    write_images(folder, 2)
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.png")
    os.symlink("nowhere", folder / "broken.png")
    os.symlink("itself.png", folder / "itself.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(folder / "socket.png"))
        result = run(folder, folder / "pipe.jpg", os.devnull)
    assert result.drawn == {"0.jpg": "0.jpg", "1.jpg": "1.jpg"}
    expected = {
        "broken.png": "No such file",
        "empty.jpg": "cannot be read",
        "itself.png": "symbolic links",
        "pipe.jpg": "a named pipe",
        "pipe.png": "a named pipe",
        "socket.png": "a socket",
        "text.jpg": "cannot be read",
        "null": "a device",
    }
    assert result.skipped.keys() == expected.keys()
    assert all(text in result.skipped[name] for name, text in expected.items())
    err = capsys.readouterr().err
    assert all(f"/{name}: " in err for name in expected)
    assert len(result.content["annotations"]) > 0


def test_linked_folders_are_followed_and_loops_end(run, tmp_path):
    write_images(tmp_path / "elsewhere" / "deep", 1)
    write_images(tmp_path / "in", 2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked_again")
    os.symlink(tmp_path / "in", tmp_path / "elsewhere" / "deep" / "back")
    os.symlink(".", tmp_path / "in" / "self")
    result = run(tmp_path / "in", status=0)
    assert [os.path.relpath(each["file_name"], tmp_path / "in") for each in result.content["images"]] == [
        "0.jpg",
        "1.jpg",
        "linked/deep/0.jpg",
    ]


def test_a_folder_that_cannot_be_listed_is_named(run, tmp_path, monkeypatch):
    write_images(tmp_path / "in", 1)
    (tmp_path / "in" / "locked").mkdir()
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)  # root may read everything
    result = run(tmp_path / "in")
    assert list(result.drawn) == ["0.jpg"] and "cannot be listed" in result.skipped["locked"]


def test_odd_names(run, tmp_path):
    image = Image.new("RGB", (9, 9))
    names = ["a$b", "per%cent", "q'uote", "new\nline", "esc\x1b[31m", "n" * 250, "数", "%03d"]
    (tmp_path / "in").mkdir()
    for name in names:
        image.save(tmp_path / "in" / f"{name}.png")
    image.save(os.path.join(os.fsencode(tmp_path), b"in", b"\xff\xfe.png"))
    write_video(tmp_path / "film.avi")
    os.rename(tmp_path / "film.avi", os.path.join(os.fsencode(tmp_path), b"in", b"%d\xff.avi"))
    result = run(tmp_path / "in", os.path.join(tmp_path, "in", "%d\udcff.avi"), status=0)
    assert len(result.content["images"]) == len(names) + 1 + 6
    drawn = set(os.listdir(result.folder))
    assert {"__.jpg", "%d_.mp4", "new\nline.jpg", "n" * 180 + ".jpg"} <= drawn and len(drawn) == len(names) + 3


def test_many_images_of_one_name_get_names_fast():
    assert command.unique_names(["a/x.jpg"] * 50000, ".jpg")[-1] == "x_50000.jpg"


# ------------------------------------------------------------------------------------- drawings


def test_an_image_too_large_for_a_jpeg(run, tmp_path):
    first, last = write_images(tmp_path, 2)
    Image.fromarray(random_image(20, 70000)).save(tmp_path / "pano.png")
    result = run(first, tmp_path / "pano.png", last)
    assert result.drawn == {"0.jpg": "0.jpg", "pano.png": "", "1.jpg": "1.jpg"}
    assert "at most 65500 pixels" in result.incomplete["pano.png"] and not result.skipped
    assert sorted(os.listdir(result.folder)) == ["0.jpg", "1.jpg", "predictions.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a\nbug"), MemoryError()])
def test_a_drawing_that_fails(run, tmp_path, monkeypatch, error):
    def failing(image, path):
        raise error

    monkeypatch.setattr(command, "_save", failing)
    image, = write_images(tmp_path, 1)
    result = run(image)
    assert result.num_found("0.jpg") > 0 and result.drawn == {"0.jpg": ""}
    assert result.incomplete["0.jpg"].startswith(f"not drawn: {type(error).__name__}")
    assert "\n" not in result.incomplete["0.jpg"]


def test_a_folder_where_a_drawing_should_be(run, tmp_path):
    image, = write_images(tmp_path / "in", 1)
    (tmp_path / "out" / "0.jpg").mkdir(parents=True)
    assert "not drawn" in run(image).incomplete["0.jpg"]


def test_a_bomb_is_not_decoded(run, tmp_path, monkeypatch):
    image, = write_images(tmp_path, 1)
    Image.fromarray(random_image(100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)  # twice that is refused
    result = run(tmp_path / "bomb.png", image)
    assert "DecompressionBombError" in result.skipped["bomb.png"] and list(result.drawn) == ["0.jpg"]


def test_a_detector_that_fails_on_one_image(run, tmp_path, before_detection):
    images = write_images(tmp_path, 3)

    def failing(number):
        if number == 2:
            raise IndexError("index 7 is out of range")

    before_detection(failing)
    result = run(*images)
    assert list(result.drawn) == ["0.jpg", "2.jpg"]
    assert result.skipped == {"1.jpg": "IndexError: index 7 is out of range"}


# --------------------------------------------------------------------------------------- videos


def test_a_video_that_is_cut_short(run, tmp_path, capsys):
    data = write_video(tmp_path / "film.avi", 12).read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    result = run(tmp_path / "cut.avi", tmp_path / "film.avi")
    read = sum(name.startswith("cut.avi#") for name in result.drawn)
    assert 0 < read < 12
    assert result.incomplete == {"cut.avi": f"{read} of 12 frames: the video is cut short or damaged"}
    assert len(VideoFrames(str(result.folder / "cut.mp4")).__iter__().__next__()) and not result.skipped
    assert f"{read} of 12 frames" in capsys.readouterr().err


def test_a_video_that_is_damaged(run, tmp_path):
    data = bytearray(write_video(tmp_path / "film.mp4", 20, codec="mp4v").read_bytes())
    third = len(data) // 3
    data[third : len(data) // 2] = bytes(len(data) // 2 - third)
    (tmp_path / "film.mp4").write_bytes(data)
    assert " of 20 frames" in run(tmp_path / "film.mp4").incomplete["film.mp4"]


class Capture:
    """OpenCV's reader of a video that announces another number of frames than it has."""

    def __init__(self, announced, count):
        self.announced, self.left = announced, count

    def isOpened(self):
        return True

    def get(self, what):
        return float(self.announced if what == cv2.CAP_PROP_FRAME_COUNT else 25)

    def read(self):
        self.left -= 1
        return self.left >= 0, np.zeros((2, 2, 3), np.uint8)

    def release(self):
        pass


@pytest.mark.parametrize(
    "name, announced, count, is_missing",
    [
        ("film.webm", 300, 297, False),
        ("film.webm", 300, 290, True),
        ("film.mp4", 300, 299, True),
        ("film.mp4", 0, 299, False),
    ],
)
def test_a_video_whose_length_is_an_estimate(monkeypatch, name, announced, count, is_missing):
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: Capture(announced, count))
    frames = VideoFrames(name)
    assert sum(1 for _ in frames) == frames.num_read == count
    message = f"{count} of {announced} frames: the video is cut short or damaged"
    assert frames.missing == (message if is_missing else "")


def test_a_frame_that_cannot_be_detected_on(run, tmp_path, before_detection):
    write_video(tmp_path / "film.avi", 4)

    def failing(number):
        if number == 2:
            raise ValueError("not finite")

    before_detection(failing)
    result = run(tmp_path / "film.avi")
    assert list(result.drawn) == ["film.avi#0", "film.avi#2", "film.avi#3"]
    assert result.drawn["film.avi#3"] == "film.mp4#3"
    assert list(result.skipped) == ["film.avi#1"] and not result.incomplete
    assert sum(1 for _ in VideoFrames(str(result.folder / "film.mp4"))) == 4


def test_a_video_that_cannot_be_written(run, tmp_path, monkeypatch):
    write_video(tmp_path / "film.avi", 4)

    def failing(self, frame):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "write", failing)
    result = run(tmp_path / "film.avi")
    assert list(result.drawn.values()) == [""] * 4 and "No space left" in result.incomplete["film.avi"]
    assert os.listdir(result.folder) == ["predictions.json"]


def test_frames_whose_drawing_fails_are_written_bare(run, tmp_path, monkeypatch):
    write_video(tmp_path / "film.avi", 4)

    def failing(*arguments):
        raise ValueError("no font")

    monkeypatch.setattr(command, "draw_detections", failing)
    result = run(tmp_path / "film.avi")
    assert len(result.drawn) == 4 and len(result.content["annotations"]) > 0
    assert "frame 0 and maybe more: ValueError: no font" in result.incomplete["film.avi"]
    assert sum(1 for _ in VideoFrames(str(result.folder / "film.mp4"))) == 4


def test_frames_of_several_sizes(run, tmp_path):
    """JPEGs one after the other are a video to OpenCV."""
    data = b""
    for height, width in ((48, 64), (90, 30), (20, 20)):
        Image.fromarray(random_image(height, width)).save(tmp_path / "frame.jpg")
        data += (tmp_path / "frame.jpg").read_bytes()
    (tmp_path / "film.mpg").write_bytes(data)
    result = run(tmp_path / "film.mpg", status=0)
    assert len(result.content["images"]) == 3
    assert len({frame.shape for frame in VideoFrames(str(result.folder / "film.mp4"))}) == 1


def test_frames_of_several_sizes_are_fitted_into_the_first(tmp_path):
    writer = VideoWriter(str(tmp_path / "film.mp4"), 25.0)
    for height, width in ((64, 64), (128, 64), (16, 16), (1, 900)):
        writer.write(np.full((height, width, 3), 200, np.uint8))
    writer.close()
    bright = [frame[:, :, 0] > 100 for frame in VideoFrames(str(tmp_path / "film.mp4"))]
    assert [each.shape for each in bright] == [(64, 64)] * 4
    assert [each.mean() for each in bright] == pytest.approx([1.0, 0.5, 1 / 16, 1 / 64], abs=0.03)


@pytest.mark.parametrize("rate", [29.97, 1000.123, 90000.0, 1e9, 1e-9])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1, 999), (63, 47)])
def test_videos_of_any_rate_and_size(tmp_path, rate, size):
    writer = VideoWriter(str(tmp_path / "film.mp4"), rate)
    for _ in range(3):
        writer.write(np.full((*size, 3), 200, np.uint8))
    writer.close()
    frames = list(VideoFrames(str(tmp_path / "film.mp4")))
    assert [each.shape for each in frames] == [(size[0] + size[0] % 2, size[1] + size[1] % 2, 3)] * 3


def test_a_video_of_a_size_that_no_codec_takes(tmp_path):
    with pytest.raises(OSError, match="9000 x 9000"):
        VideoWriter(str(tmp_path / "film.mp4"), 25.0).write(np.zeros((9000, 9000, 3), np.uint8))


def test_a_video_of_which_frames_are_lost(tmp_path):
    writer = VideoWriter(str(tmp_path / "film.mp4"), 25.0)
    writer.write(np.zeros((32, 32, 3), np.uint8))
    writer.num_written += 1
    with pytest.raises(OSError, match="1 of 2 frames"):
        writer.close()


# ------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_after_the_image(run, tmp_path, before_detection, capsys, number):
    images = write_images(tmp_path, 4)
    before_detection(lambda nth: os.kill(os.getpid(), number) if nth == 2 else None)
    before = signal.getsignal(number)
    result = run(*images)
    assert signal.getsignal(number) == before
    assert list(result.drawn.values()) == ["0.jpg", "1.jpg"]
    reason = f"not done: stopped by {number.name}"
    assert result.skipped == {"2.jpg": reason, "3.jpg": reason}
    assert f"stopped by {number.name}: 2 of 4 inputs are done" in capsys.readouterr().err


def test_a_signal_within_a_video(run, tmp_path, before_detection):
    write_video(tmp_path / "film.avi", 6)
    before_detection(lambda nth: os.kill(os.getpid(), signal.SIGTERM) if nth == 3 else None)
    result = run(tmp_path / "film.avi")
    assert result.incomplete == {"film.avi": "3 of 6 frames: stopped by SIGTERM"}
    assert sum(1 for _ in VideoFrames(str(result.folder / "film.mp4"))) == 3


def test_a_second_signal_ends_the_image_too():
    with noted_interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason == "stopped by SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_whatever_ends_the_job_what_was_found_is_written(run, tmp_path, monkeypatch, error):
    images = write_images(tmp_path, 2)
    real = command.read_bgr_image

    def ending(path):
        if path == images[1]:
            raise error
        return real(path)

    monkeypatch.setattr(command, "read_bgr_image", ending)
    result = run(*images)
    assert list(result.drawn) == ["0.jpg"] and type(error).__name__ in result.skipped["1.jpg"]


def test_a_full_disk_at_the_end(model, tmp_path, monkeypatch, capsys):
    image, = write_images(tmp_path, 1)
    real = command.CocoPredictions.write

    def full(self, path):
        if path.startswith(str(tmp_path / "out")):
            raise OSError(28, "No space left on device")
        real(self, path)

    monkeypatch.setattr(command.CocoPredictions, "write", full)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert status_of("predict", "--model", model, "--input", image, "--output", tmp_path / "out") == 1
    written, = (tmp_path / "temporary").rglob("predictions.json")
    assert len(json.loads(written.read_text())["images"]) == 1
    assert f"so {written} holds it" in capsys.readouterr().err


def test_a_folder_where_the_json_should_be(model, tmp_path, capsys):
    image, = write_images(tmp_path / "in", 1)
    (tmp_path / "out" / "predictions.json").mkdir(parents=True)
    assert status_of("predict", "--model", model, "--input", image, "--output", tmp_path / "out") == 2
    assert "is a folder, so the results" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_name(run, tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "数.png")
    with open(tmp_path / "printed.txt", "w", encoding="ascii") as ascii_only:
        monkeypatch.setattr(sys, "stdout", ascii_only)
        result = run(tmp_path / "数.png", status=0)
    assert result.drawn == {"数.png": "数.jpg"}
    assert r"\u6570.png -> " in (tmp_path / "printed.txt").read_text()


def test_nothing_found_is_said(model, tmp_path, capsys):
    image, = write_images(tmp_path, 1)
    arguments = ["--input", image, "--output", tmp_path / "out", "--score-threshold", 1]
    assert status_of("predict", "--model", model, *arguments) == 0
    assert "no detection scores 1 or more" in capsys.readouterr().err


def test_files_that_are_no_videos():
    with warnings.catch_warnings(), pytest.raises(UnusableImageError, match="no video"):
        VideoFrames(os.devnull)
