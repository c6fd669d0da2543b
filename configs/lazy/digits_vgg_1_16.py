# Faster R-CNN on a VGG-1-16 and its training on the digits: the model of Digits/student_vgg_1_16_scratch.yaml.
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    transforms,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from qmimic_d2.data.mapper import ImageMapper
from qmimic_d2.modeling.backbone.vgg import VGG

model = L(GeneralizedRCNN)(
    backbone=L(VGG)(depth=11, width_divisor=16, norm="BN", stage_strides=[2, 1, 2, 2, 1], out_features=["conv5"]),
    proposal_generator=L(RPN)(
        in_features=["conv5"],
        head=L(StandardRPNHead)(in_channels=32, num_anchors=6),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[18, 26, 36]], aspect_ratios=[1.0, 1.5], strides=[8], offset=0.0
        ),
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=128,
        positive_fraction=0.5,
        pre_nms_topk=(400, 400),
        post_nms_topk=(100, 60),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=10,
        batch_size_per_image=64,
        positive_fraction=0.5,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
        box_in_features=["conv5"],
        box_pooler=L(ROIPooler)(output_size=7, scales=(1.0 / 8,), sampling_ratio=0, pooler_type="ROIAlignV2"),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=32, height=7, width=7), conv_dims=[], fc_dims=[128]
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=128),
            test_score_thresh=0.05,
            test_topk_per_image=30,
            box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[127.5, 127.5, 127.5],
    pixel_std=[64.0, 64.0, 64.0],
    input_format="BGR",
)

resize = L(transforms.ResizeShortestEdge)(short_edge_length=128, max_size=128)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_det_train"),
        mapper=L(ImageMapper)(is_train=True, augmentations=[resize], image_format="BGR"),
        total_batch_size=8,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_det_val", filter_empty=False),
        mapper=L(ImageMapper)(is_train=False, augmentations=[resize], image_format="BGR"),
        num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=0.004,
    weight_decay=0.0001,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0), warmup_factor=0.001, warmup_length=0.06
)
# what Detectron2's tools/lazyconfig_train_net.py reads
train = dict(
    output_dir="output/lazy/student_vgg_1_16_scratch",
    init_checkpoint="",
    max_iter=800,
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=200, max_to_keep=100),
    eval_period=200,
    log_period=20,
    seed=1,
    cudnn_benchmark=False,
    float32_precision="",
    device="cuda" if torch.cuda.is_available() else "cpu",
)
