"""A GPU gives what the CPU gives: quantizers, pooling, losses, a training step, mixed precision, and DDP over NCCL."""

import contextlib

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import batch, training_step
from mimic_losses import QUANTIZERS, make_loss, maps, no_boxes, spec, three_boxes
from mimic_models import mimic_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.modeling.quantizer import CodeQuantizer
from qmimic_d2.modeling.roi_pooling import POOLER_TYPES, LevelPooler

pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# Two devices sum in different orders.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def to(device, maps):
    return {name: x.to(device) for name, x in maps.items()}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].detach().float().cpu(),
            value.detach().float().cpu(),
            msg=lambda text, n=name: f"{n}: {text}",
            **TOLERANCE,
        )


@pytest.fixture
def full_precision():
    """TF32 has 10 bits of mantissa: no comparison with the CPU would hold."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        yield


def student(teacher, device, *options):
    return mimic_model(*teacher.options, *options, "MODEL.DEVICE", device).train()


@contextlib.contextmanager
def one_process_group(device, folder):
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"none"}))
def test_quantizers_are_equal_to_the_last_bit(device, name, dtype):
    quantizer = QUANTIZERS[name]
    # Random values, and the midpoints between codes, where one bit decides.
    x = torch.cat([torch.randn(4096) * 3, torch.arange(-40, 41) * 0.125]).to(dtype)
    inputs = [x.to(each).requires_grad_() for each in ("cpu", device)]
    outputs = [quantizer(each) for each in inputs]
    for output in outputs:
        output.float().square().sum().backward()
    assert torch.equal(outputs[1].cpu(), outputs[0]) and outputs[1].dtype == dtype
    assert torch.equal(inputs[1].grad.cpu(), inputs[0].grad)
    if isinstance(quantizer, CodeQuantizer):
        expected, codes = (quantizer.codes(each.detach()) for each in inputs)
        assert torch.equal(codes.cpu(), expected)
        assert torch.equal(quantizer.dequantize(codes, dtype).cpu(), outputs[0])


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_pooling(device, pooler_type, full_precision):
    results = []
    for each in ("cpu", device):
        feature = maps(2, 1)["f"].to(each).requires_grad_()
        pooler = LevelPooler({"f": spec(2)}, pooler_type, 2, 2)
        (rois,) = pooler.assign([boxes.to(each) for boxes in three_boxes()])
        pooled = pooler.pool(0, feature, rois)
        pooled.square().sum().backward()
        results.append({"pooled": pooled.detach(), "gradient": feature.grad})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("boxes", [three_boxes, no_boxes])
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_mimic_loss(device, name, boxes, full_precision):
    results = []
    for each in ("cpu", device):
        loss = make_loss(student_quantizer=QUANTIZERS[name], teacher_quantizer=QUANTIZERS[name]).to(each)
        inputs = to(each, maps(2, 1)), to(each, maps(3, 2)), [b.to(each) for b in boxes()]
        with EventStorage():
            losses = loss.loss(loss.pairs(*inputs))
        sum(losses.values()).backward()
        results.append({**losses, **{n: p.grad for n, p in loss.named_parameters()}})
    assert_close(results[1], results[0])


def test_training_step(device, vgg_teacher, full_precision):
    """Regions are the annotated boxes: sampled ones are drawn by each device's own random numbers."""
    results = []
    for each in ("cpu", device):
        model = student(vgg_teacher, each, "MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["ground_truth"])
        step = training_step(model, batch())
        assert {x.device.type for x in step.gradients.values()} == {each}
        results.append({"loss_mimic": step.losses["loss_mimic"]})
        assert all(torch.isfinite(x).all() for x in (*step.losses.values(), *step.gradients.values()))
    assert_close(results[1], results[0])


def test_mixed_precision(device, vgg_teacher):
    model = student(vgg_teacher, device)
    full = training_step(model, batch()).losses["loss_mimic"].item()
    torch.manual_seed(5)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    with EventStorage(), torch.autocast(device, dtype):
        losses = model(batch())
    sum(losses.values()).backward()
    assert losses["loss_mimic"].dtype == torch.float32
    assert losses["loss_mimic"].item() == pytest.approx(full, rel=0.3)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


def test_distributed_step(device, vgg_teacher, tmp_path):
    model = student(vgg_teacher, device)
    alone = training_step(model, batch())
    with one_process_group(device, tmp_path):
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        together = training_step(parallel, batch())
        gradients = {name[len("module.") :]: x for name, x in together.gradients.items()}
        del parallel
    assert_close(together.losses, alone.losses)
    assert_close(gradients, alone.gradients)
