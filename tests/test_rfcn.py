"""R-FCN's RoI heads: score maps and voting, losses, hard examples, inference, tracing, the mimic, learning."""

import math

import pytest
import torch
from detectron2.config import configurable
from detectron2.export import TracingAdapter
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import (
    NUM_CLASSES,
    RESNET_C4,
    RESNET_FPN,
    batch,
    calls_of_mimic_loss,
    image,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)
from tiny_coco import registered

from qmimic_d2.analysis import measure_cost
from qmimic_d2.config_files import get_config_file
from qmimic_d2.data import DigitsSpec, prepare_digits
from qmimic_d2.engine import Trainer, load_config
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.modeling import RFCNROIHeads
from qmimic_d2.modeling.roi_heads import RFCNOutputLayers

K = 2  # bins along each side
RFCN = (
    *("MODEL.ROI_HEADS.NAME", "RFCNROIHeads"),
    *("MODEL.RFCN.NUM_BINS", K),
    *("MODEL.RFCN.CONV_DIM", 8),
)
AGNOSTIC = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
HARD_EXAMPLES = "MODEL.RFCN.HARD_EXAMPLES"


def rfcn(*options, seed=1, **kwargs):
    return seeded_model(tiny_cfg(*RFCN, *options, **kwargs), seed)


def output_layers(*options):
    """On a feature of 5 channels and stride 4."""
    return RFCNOutputLayers(tiny_cfg(*RFCN, *options), ShapeSpec(channels=5, stride=4))


def heads(*options):
    """On a feature "conv5" of 16 channels and stride 8."""
    return RFCNROIHeads(tiny_cfg(*RFCN, *options), {"conv5": ShapeSpec(channels=16, stride=8)})


def proposals_of(*counts, size=(64, 64)):
    """Proposals as the generator makes them, so many of each image."""
    made = []
    for count in counts:
        corner = torch.rand(count, 2) * 30
        boxes = torch.cat([corner, corner + 6 + torch.rand(count, 2) * 25], dim=1)
        made.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(count)))
    return made


def feature_of(count):
    return {"conv5": torch.rand(count, 16, 8, 8, requires_grad=True)}


# --------------------------------------------------------------------------------- score maps and voting


@pytest.mark.parametrize("is_agnostic", [False, True])
@pytest.mark.parametrize("pooler_type", ["PSROIPool", "PSROIAlign"])
def test_predictions_are_the_average_of_the_bins_of_their_own_maps(pooler_type, is_agnostic):
    layers = output_layers("MODEL.RFCN.POOLER_TYPE", pooler_type, AGNOSTIC, is_agnostic)
    feature, boxes = torch.randn(2, 5, 6, 9), [Boxes(torch.rand(3, 4) * 8), Boxes(torch.rand(1, 4) * 8)]
    for each in boxes:
        each.tensor[:, 2:] += 12
    with torch.no_grad():
        predictions = layers(feature, boxes)
        for maps, values, number in zip(
            (layers.cls_score, layers.bbox_pred), predictions, (NUM_CLASSES + 1, 4 if is_agnostic else 4 * NUM_CLASSES)
        ):
            assert values.shape == (4, number)
            # the 1x1 convolution cell by cell, then bin by bin from its own channel
            scores = torch.einsum("dc,nchw->ndhw", maps.weight[:, :, 0, 0], feature) + maps.bias[None, :, None, None]
            pooled = layers.pooler(scores, boxes)
            for value in range(number):
                votes = [pooled[:, value, i, j] for i in range(K) for j in range(K)]
                torch.testing.assert_close(values[:, value], sum(votes) / K**2)


def test_order_of_class_scores_and_deltas():
    """Classes with the background last; deltas class by class, four to each, as Detectron2's losses read them."""
    layers = output_layers()
    for maps in (layers.cls_score, layers.bbox_pred):
        torch.nn.init.zeros_(maps.weight)
        with torch.no_grad():
            # every value votes the average of its own K * K biases: 1.5, 5.5, 9.5, ...
            maps.bias.copy_(torch.arange(len(maps.bias), dtype=torch.float32))
    scores, deltas = layers(torch.rand(1, 5, 6, 9), [Boxes(torch.tensor([[4.0, 4.0, 20.0, 20.0]]))])
    assert scores[0].tolist() == [1.5 + 4 * index for index in range(NUM_CLASSES + 1)]
    assert deltas[0].tolist() == [1.5 + 4 * index for index in range(4 * NUM_CLASSES)]


def test_parameters_and_flops_by_hand():
    cfg = tiny_cfg(*RFCN, AGNOSTIC, True)
    part = measure_cost(cfg, 64, 64).parts["roi_heads"]
    maps = K * K * (NUM_CLASSES + 1 + 4)
    assert part.parameters == (16 * 8 + 8) + (8 * maps + maps)
    # nothing is computed per region but the average
    assert part.flops == 8 * 8 * (16 * 8 + 8 * maps)
    per_class = tiny_cfg(*RFCN, AGNOSTIC, False)
    more = K * K * 4 * (NUM_CLASSES - 1)
    assert measure_cost(per_class, 64, 64).parts["roi_heads"].parameters == part.parameters + 8 * more + more


@pytest.mark.parametrize(
    "options, kernel, channels, norm",
    [
        ((), 1, 8, False),
        (("MODEL.RFCN.CONV_KERNEL", 3), 3, 8, False),
        (("MODEL.RFCN.CONV_DIM", 4, "MODEL.RFCN.CONV_NORM", "BN"), 1, 4, True),
    ],
)
def test_convolution_before_the_score_maps(options, kernel, channels, norm):
    head = heads(*options)
    assert head.conv.kernel_size == (kernel, kernel) and head.conv.out_channels == channels
    assert (head.conv.norm is not None) == norm and (head.conv.bias is None) == norm
    assert head.box_predictor.cls_score.in_channels == channels
    output = head.conv(torch.randn(1, 16, 5, 7))
    assert output.shape == (1, channels, 5, 7) and output.min() == 0.0


def test_without_that_convolution():
    head = heads("MODEL.RFCN.CONV_DIM", 0)
    assert head.conv is None
    assert head.box_predictor.cls_score.in_channels == 16


def test_remaining_keys_reach_the_pooler():
    pooler = heads("MODEL.RFCN.POOLER_TYPE", "PSROIAlign", "MODEL.RFCN.SAMPLING_RATIO", 3).box_predictor.pooler
    assert (pooler.pooler_type, pooler.sampling_ratio, pooler.num_bins, pooler.stride) == ("PSROIAlign", 3, K, 8)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("is_agnostic", [False, True])
@pytest.mark.parametrize("hard_examples", [0, 6])
@pytest.mark.parametrize("family", [(), RESNET_C4])
def test_every_parameter_gets_a_gradient(family, hard_examples, is_agnostic):
    model = rfcn(*family, HARD_EXAMPLES, hard_examples, AGNOSTIC, is_agnostic)
    assert isinstance(model.roi_heads, RFCNROIHeads)
    step = training_step(model, batch((64, 64), (48, 80)))
    assert set(step.losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(loss) for loss in step.losses.values())
    names = [name for name, _ in model.named_parameters() if name.startswith("roi_heads")]
    assert len(names) == 6
    assert all(step.gradients[name].abs().sum() > 0 for name in names)
    assert "fast_rcnn/cls_accuracy" in step.storage.latest()


def test_losses_of_undecided_scores_by_hand():
    """With all scores alike, the class loss is ln(K + 1); with no delta, the box loss is that of the targets."""
    layers = output_layers("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0))
    for parameter in layers.parameters():
        torch.nn.init.zeros_(parameter)
    proposals = Instances((24, 36))
    proposals.proposal_boxes = Boxes(torch.tensor([[10.0, 4.0, 20.0, 14.0], [0.0, 0.0, 8.0, 8.0]]))
    proposals.gt_boxes = Boxes(torch.tensor([[12.0, 3.0, 22.0, 13.0], [0.0, 0.0, 8.0, 8.0]]))
    proposals.gt_classes = torch.tensor([1, NUM_CLASSES])
    predictions = layers(torch.rand(1, 5, 6, 9), [proposals.proposal_boxes])
    with EventStorage():
        losses = layers.losses(predictions, [proposals])
    assert losses["loss_cls"].item() == pytest.approx(math.log(NUM_CLASSES + 1))
    assert losses["loss_box_reg"].item() == pytest.approx((0.2 + 0.1) / 2)


def test_it_samples_as_faster_rcnn_and_returns_what_it_sampled():
    """The same draws from the same proposals, foreground first."""
    cfg = tiny_cfg(*RFCN)
    shapes = {"conv5": ShapeSpec(channels=16, stride=8)}
    targets = [each["instances"] for each in batch()]
    found = []
    for head in (RFCNROIHeads(cfg, shapes), StandardROIHeads(cfg, shapes)):
        torch.manual_seed(3)
        features, proposals = feature_of(2), proposals_of(12, 12)
        with EventStorage():
            sampled, losses = head(None, features, proposals, targets)
        assert set(losses) == {"loss_cls", "loss_box_reg"}
        found.append(sampled)
    ours, theirs = found
    assert [len(each) for each in ours] == [8, 8]
    for one, other in zip(ours, theirs):
        assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(one.gt_classes, other.gt_classes)
        is_background = (one.gt_classes == NUM_CLASSES).int()
        assert (is_background.diff() >= 0).all() and 0 < is_background.sum() < 8


# ------------------------------------------------------------------------------------------- hard examples


def one_image_of_known_losses(*options):
    """
    Heads whose class loss falls from the left edge of an image to its right, on five background regions.

    The score map of the background grows with the column, the others are 0.
    """
    head = heads("MODEL.RFCN.NUM_BINS", 1, "MODEL.RFCN.CONV_DIM", 0, *options).train()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.box_predictor.cls_score.weight.data[NUM_CLASSES, 0] = 1.0
    feature = torch.zeros(1, 16, 8, 8)
    feature[0, 0] = torch.arange(8.0)
    left = torch.tensor([32.0, 0.0, 48.0, 16.0, 50.0])  # columns 4, 0, 6, 2 and 6.25
    boxes = torch.stack([left, torch.zeros(5), left + 8, torch.full((5,), 8.0)], dim=1)
    proposals = [Instances((64, 64), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(5))]
    targets = [Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))]
    return head, {"conv5": feature}, proposals, targets


def test_losses_are_those_of_the_hardest_by_hand():
    head, features, proposals, targets = one_image_of_known_losses(HARD_EXAMPLES, 2)
    with EventStorage():
        kept, losses = head(None, features, proposals, targets)
    # sampling shuffles the background: compare as a set
    assert sorted(kept[0].proposal_boxes.tensor[:, 0].tolist()) == [0.0, 16.0]
    expected = [math.log(NUM_CLASSES + math.exp(score)) - score for score in (0.0, 2.0)]
    assert losses["loss_cls"].item() == pytest.approx(sum(expected) / 2)
    assert losses["loss_box_reg"].item() == 0.0


def test_suppression_looks_for_the_next_hardest():
    # the easiest two, at 48 and 50, overlap by 6 / 10
    for options, expected in (((), 5), (("MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH", 0.5), 4)):
        head, *inputs = one_image_of_known_losses(HARD_EXAMPLES, 5, *options)
        with EventStorage():
            ((kept,), _) = head(None, *inputs)
        assert len(kept) == expected


def test_all_proposals_compete_and_each_image_keeps_its_own():
    # BATCH_SIZE_PER_IMAGE is 8, of which a quarter foreground
    head = heads(HARD_EXAMPLES, 11).train()
    targets = [each["instances"] for each in batch(num_boxes=(2, 3))]
    seen = []
    head.box_predictor.register_forward_hook(lambda _, inputs, output: seen.append([len(each) for each in inputs[1]]))
    with EventStorage():
        kept, losses = head(None, feature_of(2), proposals_of(12, 7), targets)
    assert seen == [[14, 10]]  # and the annotations
    assert [len(each) for each in kept] == [11, 10]
    assert torch.isfinite(sum(losses.values()))


# ------------------------------------------------------------------------------------------- empty batches


@pytest.mark.parametrize("hard_examples", [0, 4])
@pytest.mark.parametrize("pooler_type", ["PSROIPool", "PSROIAlign"])
def test_no_proposals_and_no_annotations(pooler_type, hard_examples):
    head = heads("MODEL.RFCN.POOLER_TYPE", pooler_type, HARD_EXAMPLES, hard_examples)
    targets = [each["instances"] for each in batch(num_boxes=(0, 0))]
    features = feature_of(2)
    with EventStorage():
        sampled, losses = head.train()(None, features, proposals_of(0, 0), targets)
    assert [len(each) for each in sampled] == [0, 0]
    assert sum(losses.values()).item() == 0.0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    instances, losses = head.eval()(None, features, proposals_of(0, 0))
    assert losses == {} and [len(each) for each in instances] == [0, 0]
    assert instances[0].pred_boxes.tensor.shape == (0, 4)


def test_one_image_of_two_has_no_proposals():
    head = heads().eval()
    both, _ = head(None, feature_of(2), proposals_of(0, 5))
    assert len(both[0]) == 0 and both[1].image_size == (64, 64)
    targets = [each["instances"] for each in batch(num_boxes=(0, 2))]
    with EventStorage():
        sampled, losses = head.train()(None, feature_of(2), proposals_of(0, 5), targets)
    assert [len(each) for each in sampled] == [0, 7]
    assert torch.isfinite(sum(losses.values()))


# ------------------------------------------------------------------------------------ inference and tracing


@pytest.mark.parametrize("options", [(AGNOSTIC, True), ("MODEL.RFCN.POOLER_TYPE", "PSROIAlign")])
def test_a_trace_at_one_size_is_the_model_at_others(options):
    model = rfcn("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.PRE_NMS_TOPK_TEST", 40, *options).eval()

    def inference(model, inputs):
        return [{"instances": each} for each in model.inference(inputs, do_postprocess=False)]

    adapter = TracingAdapter(model, [{"image": image(64, 64)}], inference)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, (image(64, 64),), check_trace=False)
        for size in ((64, 64), (96, 64), (48, 120), (33, 70)):
            pixels = image(*size, seed=4)
            expected = model.inference([{"image": pixels}], do_postprocess=False)[0]
            (found,) = adapter.outputs_schema(traced(pixels))
            found = found["instances"]
            assert len(expected) > 0 and tuple(found.image_size.tolist()) == size
            assert torch.equal(found.pred_classes, expected.pred_classes)
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            torch.testing.assert_close(found.scores, expected.scores)


def test_half_precision_trains():
    with torch.autocast("cpu", torch.bfloat16):
        step = training_step(rfcn(), batch())
    assert all(torch.isfinite(loss) for loss in step.losses.values())


# ----------------------------------------------------------------------------------------------- the mimic


@pytest.mark.parametrize("hard_examples", [0, 5])
def test_the_mimic_compares_the_regions_that_were_trained_on(hard_examples, tmp_path):
    teacher = write_teacher(tmp_path, *RFCN)
    model = rfcn(HARD_EXAMPLES, hard_examples, *teacher.options, meta_architecture="QuantMimicRCNN")
    calls, trained = calls_of_mimic_loss(model), []
    model.roi_heads.register_forward_hook(lambda _, inputs, output: trained.extend(output[0]))
    step = training_step(model, batch())
    assert step.losses["loss_mimic"] > 0
    assert "qmimic/match_ratio" in step.storage.latest()
    seen = calls[0]["boxes"]
    assert [len(each) for each in seen] == [hard_examples or 8] * 2
    for boxes, proposals in zip(seen, trained):
        assert torch.equal(boxes.tensor, proposals.proposal_boxes.tensor)
    assert any(name.startswith("mimic.") for name in step.gradients)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        (RESNET_FPN, ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4', 'p5']", "one map"]),
        (("MODEL.MASK_ON", True), ["MODEL.MASK_ON", "True", "False"]),
        (("MODEL.KEYPOINT_ON", True), ["MODEL.KEYPOINT_ON", "True", "False"]),
        (("MODEL.RFCN.CONV_DIM", -1), ["MODEL.RFCN.CONV_DIM", "-1", "0 = no convolution"]),
        (("MODEL.RFCN.CONV_KERNEL", 5), ["MODEL.RFCN.CONV_KERNEL", "5", "1, 3"]),
        (("MODEL.RFCN.CONV_NORM", "LN"), ["MODEL.RFCN.CONV_NORM", "'LN'", "'BN'"]),
        (("MODEL.RFCN.NUM_BINS", 0), ["MODEL.RFCN.NUM_BINS", "0"]),
        ((HARD_EXAMPLES, -1), [HARD_EXAMPLES, "-1", "0 = off"]),
        (("MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH", 0.0), ["MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH", "0.0", "1.0"]),
        (("MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH", 1.5), ["MODEL.RFCN.HARD_EXAMPLE_NMS_THRESH", "1.5"]),
    ],
)
def test_wrong_settings_name_key_value_and_fix(options, words):
    with pytest.raises(ValueError) as error:
        rfcn(*options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_feature_that_is_not_there():
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.IN_FEATURES is \['conv4'\].*\['conv5'\]"):
        heads("MODEL.ROI_HEADS.IN_FEATURES", ["conv4"])


def test_hard_examples_need_a_loss_that_ranks_regions():
    stock = heads()

    class Federated(RFCNOutputLayers):
        @configurable
        def __init__(self, input_shape, **kwargs):
            super().__init__(input_shape, **kwargs)
            self.use_fed_loss = True

    predictor = Federated(tiny_cfg(*RFCN), ShapeSpec(channels=16, stride=8))
    arguments = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 8,
        "positive_fraction": 0.25,
        "proposal_matcher": stock.proposal_matcher,
        "in_feature": "conv5",
        "box_predictor": predictor,
    }
    assert RFCNROIHeads(**arguments).conv is None
    with pytest.raises(ValueError, match="USE_FED_LOSS is True"):
        RFCNROIHeads(num_hard_examples=4, **arguments)


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
def test_it_learns_a_handful_of_images(tmp_path):
    spec = DigitsSpec("few_digits", split="train", num_images=4)
    folder = prepare_digits(spec, str(tmp_path))
    with registered(tmp_path / spec.name, spec.name):
        cfg = load_config(
            get_config_file("Digits/rfcn_student_vgg_1_16_scratch.yaml"),
            [
                *("MODEL.DEVICE", "cpu", "MODEL.VGG.WIDTH_DIVISOR", 8),
                *("DATASETS.TRAIN", (spec.name,), "DATASETS.TEST", (spec.name,), "OUTPUT_DIR", folder + "_output"),
                *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 150, "SOLVER.WARMUP_ITERS", 10),
                *("SOLVER.CHECKPOINT_PERIOD", 1000),
            ],
        )
        seed_all_rng(1)
        model = Trainer.build_model(cfg)
        optimizer = Trainer.build_optimizer(cfg, model)
        scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
        evaluate = APEvaluation(cfg, spec.name)
        (inputs,) = [each for each, _ in zip(Trainer.build_train_loader(cfg), range(1))]
        losses = []
        model.train()
        with EventStorage():
            for _ in range(cfg.SOLVER.MAX_ITER):
                total = sum(model(inputs).values())
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                scheduler.step()
                losses.append(total.item())
        assert losses[-1] < 0.3 * losses[0]
        assert evaluate(model.eval()) > 75.0
