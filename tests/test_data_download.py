"""``python -m qmimic_d2 data download``: small archives stand in for what torchvision downloads."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_pascal_voc
from test_command_line import status_of

import miniature
from qmimic_d2.data.download import DownloadError, download_pascal_voc, download_wider_face
from qmimic_d2.data.wider_face import register_wider_face

pytest.importorskip("sklearn")  # for the images

NUM_IMAGES = 8
VOC_ARCHIVES = ["VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar", "VOCtrainval_11-May-2012.tar"]
WIDER_FACE_ARCHIVES = ["wider_face_split.zip", "WIDER_train.zip", "WIDER_val.zip", "eval_tools.zip"]


class Server:
    """Serves the archives of a folder in the place of torchvision's downloads; ``served`` lists their names."""

    def __init__(self, folder):
        self.folder, self.served, self.is_down = folder, [], False

    def download_url(self, url, root, filename=None, md5=None):
        self.download_file("", root, filename or os.path.basename(url), md5)

    def download_file(self, file_id, root, filename, md5=None):
        if (Path(root) / filename).exists():
            return
        if self.is_down:
            raise URLError("no network")
        os.makedirs(root, exist_ok=True)
        shutil.copy(self.folder / filename, root)
        self.served.append(filename)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """What the two sites have, with few images in it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("archives")
    for dataset in ("voc", "widerface"):
        miniature.main(["--dataset", dataset, "--out", str(source), "--images", str(NUM_IMAGES)])
    for name, year, split in zip(VOC_ARCHIVES, ("2007", "2007", "2012"), ("trainval", "test", "trainval")):
        write_voc_archive(folder / name, source / f"VOC{year}", split)
    for name in WIDER_FACE_ARCHIVES:
        part = source / "widerface" / name[:-4]
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path in sorted(part.rglob("*")):
                archive.write(path, path.relative_to(part.parent))
    return folder


def write_voc_archive(path, folder, split):
    """As the challenge has them: the archive of the test images has no other."""
    lists = folder / "ImageSets" / "Main"
    with tarfile.open(path, "w") as archive:
        members = [lists / f"{split}.txt"]
        for each in (lists / f"{split}.txt").read_text().split():
            members += [folder / "Annotations" / f"{each}.xml", folder / "JPEGImages" / f"{each}.jpg"]
        for each in members:
            archive.add(each, Path("VOCdevkit") / each.relative_to(folder.parent))


@pytest.fixture
def server(archives, monkeypatch):
    server = Server(archives)
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", server.download_url)
    monkeypatch.setattr(torchvision.datasets.widerface, "download_file_from_google_drive", server.download_file)
    return server


@pytest.fixture
def root(tmp_path, monkeypatch):
    """DETECTRON2_DATASETS of this process."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    root = tmp_path / "datasets"
    register_all_pascal_voc(str(root))
    register_wider_face(str(root))
    return root


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------------- Pascal VOC


@pytest.mark.slow
def test_pascal_voc_from_nothing_and_again(root, server, capsys):
    assert status_of("data", "download", "voc") == 0
    text = capsys.readouterr().out
    assert server.served == VOC_ARCHIVES
    assert text.count("fetched") == 3 and f"images    {NUM_IMAGES}" in text and "can be used" in text
    found = files(root)
    assert "VOC2007/ImageSets/Main/test.txt" in found and "VOC2007/ImageSets/Main/trainval.txt" in found
    assert not any("downloads" in each for each in found)
    assert status_of("data", "download", "voc") == 0
    assert server.served == VOC_ARCHIVES and capsys.readouterr().out.count("there already") == 3
    assert files(root) == found


def test_a_part_of_pascal_voc_that_lacks_a_file_is_fetched_again(root, server):
    for year, split in ((2007, "trainval"), (2007, "test")):
        assert download_pascal_voc(str(root), year, split)
    whole = files(root)
    list_of_test = (root / "VOC2007" / "ImageSets" / "Main" / "test.txt").read_text().split()
    (root / "VOC2007" / "JPEGImages" / f"{list_of_test[0]}.jpg").unlink()
    assert not download_pascal_voc(str(root), 2007, "trainval")
    assert download_pascal_voc(str(root), 2007, "test")
    assert server.served == [*VOC_ARCHIVES[:2], VOC_ARCHIVES[1]] and files(root) == whole


def test_an_interrupted_unpacking_goes_on_with_the_archive(root, server, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", full)
    with pytest.raises(DownloadError, match="VOCtrainval_06-Nov-2007.tar cannot be .* unpacked: OSError: the disk"):
        download_pascal_voc(str(root), 2007, "trainval")
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", server.download_url)
    server.is_down = True
    half = root / "downloads" / "VOCdevkit" / "VOC2007" / "JPEGImages" / "half.jpg"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert download_pascal_voc(str(root), 2007, "trainval")
    assert server.served == VOC_ARCHIVES[:1] and not any("half" in each for each in files(root))


# --------------------------------------------------------------------------------------------------- WIDER FACE


def test_wider_face_from_nothing_and_again(root, server, capsys):
    assert status_of("data", "download", "widerface") == 0
    text = capsys.readouterr().out
    assert "fetched wider_face_split, WIDER_train, WIDER_val, eval_tools" in text
    assert f"images    {NUM_IMAGES}" in text and "can be used" in text
    assert set(server.served) == set(WIDER_FACE_ARCHIVES)
    found = files(root)
    assert "widerface/eval_tools/ground_truth/wider_hard_val.mat" in found
    assert not any("downloads" in each for each in found)
    server.is_down = True
    assert status_of("data", "download", "widerface") == 0
    assert "fetched nothing, all is there" in capsys.readouterr().out and files(root) == found


def test_an_image_of_wider_face_that_lacks(root, server):
    download_wider_face(str(root))
    next((root / "widerface" / "WIDER_val").rglob("*.jpg")).unlink()
    assert download_wider_face(str(root)) == ["WIDER_val"]


def test_archives_that_are_there_need_no_download(root, server, archives, monkeypatch):
    listed = []
    for file_id, _, name in torchvision.datasets.WIDERFace.FILE_LIST[:2]:
        listed.append((file_id, hashlib.md5((archives / name).read_bytes()).hexdigest(), name))
    monkeypatch.setattr(torchvision.datasets.WIDERFace, "FILE_LIST", listed)
    place = root / "downloads" / "widerface"
    place.mkdir(parents=True)
    for name in WIDER_FACE_ARCHIVES:
        shutil.copy(archives / name, place)
    server.is_down = True
    monkeypatch.setattr(torchvision.datasets.widerface, "download_file_from_google_drive", None)
    assert download_wider_face(str(root)) == ["wider_face_split", "WIDER_train", "WIDER_val", "eval_tools"]
    assert server.served == []


def test_half_of_the_evaluation_tools_is_fetched_again(root, server):
    place = root / "downloads" / "widerface"
    place.mkdir(parents=True)
    (place / "eval_tools.zip").write_bytes(b"PK half")
    download_wider_face(str(root))
    assert "eval_tools.zip" in server.served


# --------------------------------------------------------------------------------------------------- no network


@pytest.mark.parametrize("dataset, archive", [("voc", VOC_ARCHIVES[0]), ("widerface", "wider_face_split.zip")])
def test_without_a_network(root, server, capsys, dataset, archive):
    server.is_down = True
    assert status_of("data", "download", dataset) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Run the command again" in error
    assert f"{archive} cannot be downloaded or unpacked: URLError" in error


def test_a_data_set_that_is_not_known(capsys):
    assert status_of("data", "download", "coco") == 2
    assert "choose from" in capsys.readouterr().err
