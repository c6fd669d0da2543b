# Quantization mimic on the digits: the model of Digits/student_vgg_1_16_qmimic.yaml. Its teacher is a YAML's.
from qmimic_d2.lazy_config import add_mimic

from .digits_vgg_1_16 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model = add_mimic(
    model,
    dict(
        TEACHER=dict(CONFIG_FILE="Digits/teacher_vgg_1_8_quant.yaml"),
        QUANTIZER=dict(NAME="Uniform", STRIDE=0.25),
        MIMIC=dict(LOSS_WEIGHT=20.0, NORMALIZE_BY="target", MAX_ROIS_PER_IMAGE=32, POOLER_RESOLUTION=4),
    ),
    max_iter="${train.max_iter}",
)
train.output_dir = "output/lazy/student_vgg_1_16_qmimic"
