"""The teacher's weights: every form that is read, and what is no teacher."""

import pickle

import pytest
import torch
from detectron2.utils.file_io import PathHandler, PathManager
from helpers import RESNET_C4, image, tiny_cfg, write_teacher
from teachers import CONFIG_FILE, OPTS, inputs, plain_teacher

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

WEIGHTS = "MODEL.QMIMIC.TEACHER.WEIGHTS"


def test_features_are_those_of_the_saved_detector(tmp_path):
    written = write_teacher(tmp_path)
    batch = inputs(image(64, 64, seed=1), image(64, 64, seed=2))
    model = written.model.eval()
    with torch.no_grad():
        expected = model.backbone(model.preprocess_image(batch).tensor)["conv5"]
    features = plain_teacher(written).features(batch)
    assert list(features) == ["conv5"]
    assert torch.equal(features["conv5"], expected)


def test_the_weights_of_the_yaml_are_the_default(tmp_path):
    written = write_teacher(tmp_path)
    cfg = tiny_cfg(CONFIG_FILE, written.config_file, OPTS, ["MODEL.WEIGHTS", written.weights])
    assert FrozenTeacher(cfg).digest == FrozenTeacher(tiny_cfg(*written.options)).digest


def test_the_digest_tells_weights_apart(tmp_path):
    digests = {
        FrozenTeacher(tiny_cfg(*write_teacher(tmp_path, name=f"t{seed}", seed=seed).options)).digest
        for seed in (1, 2)
    }
    assert len(digests) == 2 and all(len(digest) == 12 for digest in digests)


def test_no_weights_anywhere_names_both_keys(tmp_path):
    written = write_teacher(tmp_path)
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, written.config_file))
    for word in (WEIGHTS, "MODEL.WEIGHTS", written.config_file, "is empty"):
        assert word in str(caught.value)


def test_missing_weights_name_the_key_and_the_path(tmp_path):
    written = write_teacher(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, written.config_file, WEIGHTS, "absent.pth"))
    assert WEIGHTS in str(caught.value) and "absent.pth" in str(caught.value)


def test_truncated_weights_name_the_key_and_the_path(tmp_path):
    written = write_teacher(tmp_path)
    content = open(written.weights, "rb").read()
    (tmp_path / "teacher.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="unreadable or cut short") as caught:
        FrozenTeacher(tiny_cfg(*written.options))
    assert WEIGHTS in str(caught.value) and written.weights in str(caught.value)


def test_weights_of_another_architecture_are_listed(tmp_path):
    vgg = write_teacher(tmp_path, name="vgg")
    name = next(each for each in sorted(vgg.model.state_dict()) if each.startswith("backbone."))
    resnet = write_teacher(tmp_path, *RESNET_C4, name="resnet")
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, vgg.config_file, WEIGHTS, resnet.weights))
    for word in (WEIGHTS, resnet.weights, name, "backbone.res2.0.conv1.weight"):
        assert word in str(caught.value)


def test_weights_of_another_width_are_listed_with_both_shapes(tmp_path):
    narrow = write_teacher(tmp_path, "MODEL.VGG.WIDTH_DIVISOR", 32, name="narrow")
    wide = write_teacher(tmp_path, name="wide")
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, narrow.config_file, WEIGHTS, wide.weights))
    for word in (WEIGHTS, "(2, 3, 3, 3)", "(4, 3, 3, 3)"):
        assert word in str(caught.value)


def test_a_parameter_that_the_weights_lack_is_listed(tmp_path):
    written = write_teacher(tmp_path)
    state = written.model.state_dict()
    name = next(each for each in state if each.startswith("backbone.") and each.endswith("weight"))
    del state[name]
    torch.save({"model": state}, written.weights)
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(*written.options))
    assert name in str(caught.value)


def test_imagenet_weights_are_no_teacher(tmp_path):
    written = write_teacher(tmp_path)
    torch.save(written.model.backbone.state_dict(), written.weights)
    with pytest.raises(ValueError, match="'backbone.'"):
        FrozenTeacher(tiny_cfg(*written.options))


def test_weights_of_a_ddp_model_and_without_a_counter(tmp_path):
    written = write_teacher(tmp_path)
    digest = FrozenTeacher(tiny_cfg(*written.options)).digest
    state = {
        f"module.{name}": tensor
        for name, tensor in written.model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, written.weights)
    assert FrozenTeacher(tiny_cfg(*written.options)).digest == digest


def write_zoo_file(written, path):
    """The model as Detectron2's zoo has it: a pickle of numpy arrays without counters."""
    state = {
        name: tensor.numpy()
        for name, tensor in written.model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with open(path, "wb") as file:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, file, protocol=2)


def test_weights_of_the_model_zoo(tmp_path):
    written = write_teacher(tmp_path)
    path = tmp_path / "model_final_280758.pkl"
    write_zoo_file(written, path)
    zoo = plain_teacher(written, WEIGHTS, str(path))
    batch = inputs(image())
    assert torch.equal(zoo.features(batch)["conv5"], plain_teacher(written).features(batch)["conv5"])


@pytest.fixture
def zoo_of(tmp_path):
    """An address ``testzoo://`` that Detectron2's PathManager resolves below the test's folder."""

    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["testzoo://"]

        def _get_local_path(self, path, **kwargs):
            local = tmp_path / path[len("testzoo://") :]
            if not local.exists():
                raise OSError("no such object")
            return str(local)

    PathManager.register_handler(Handler(), allow_override=True)
    yield tmp_path
    PathManager._path_handlers.pop("testzoo://")


def test_weights_by_address(zoo_of):
    written = write_teacher(zoo_of)
    write_zoo_file(written, zoo_of / "model.pkl")
    by_address = plain_teacher(written, WEIGHTS, "testzoo://model.pkl")
    assert by_address.digest
    with pytest.raises(FileNotFoundError) as caught:
        plain_teacher(written, WEIGHTS, "testzoo://gone.pkl")
    for word in (WEIGHTS, "testzoo://gone.pkl", "no such object"):
        assert word in str(caught.value)
