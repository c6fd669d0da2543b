"""What was trained, in words: architecture, data, teacher, quantizer, mimic loss, schedule."""

from typing import Any, Callable, Dict, List, Sequence, Tuple

from qmimic_d2.modeling.family import detector_name, family_of, has_quantizer_keys, head_section, imitates
from qmimic_d2.report.collect import Run

__all__ = ["describe_backbone", "describe_run", "split_common"]

NONE = "none"
UNKNOWN = "not known"
# Of a run without a teacher, what the mimic's settings are.
NOT_APPLICABLE = ""


def describe_run(run: Run) -> Dict[str, str]:
    """What a run's config says, by heading; "not known" throughout without a config."""
    config = run.config
    facts = {heading: _told(describe, config) for heading, describe in {**_DATA, **_DETECTOR}.items()}
    facts["Teacher"] = _told(lambda config: _teacher(run), config)
    facts.update({heading: _told(describe, config) for heading, describe in _QUANTIZER.items()})
    for heading, describe in _MIMIC.items():
        facts[heading] = _told(describe, config) if run.has_teacher else NOT_APPLICABLE
    facts.update({heading: _told(describe, config) for heading, describe in _TRAINING.items()})
    facts["Done"] = run.state
    return facts


def split_common(facts: Sequence[Dict[str, str]]) -> Tuple[Dict[str, str], List[str]]:
    """
    Returns:
        What all runs to which it applies, and of which it is known, have in common, by heading, and the headings
        under which they differ.
    """
    common, differing = {}, []
    for heading in facts[0] if facts else ():
        values = {each[heading] for each in facts} - {NOT_APPLICABLE}
        known = values - {UNKNOWN} or values
        if len(known) > 1:
            differing.append(heading)
        elif known:
            common[heading] = known.pop()
    return common, differing


def _told(describe: Callable[[Dict[str, Any]], str], config: Dict[str, Any]) -> str:
    try:
        return describe(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # it lacks the keys, or their kinds
        return UNKNOWN


def describe_backbone(config: Dict[str, Any]) -> str:
    """Such as "VGG-1-16 (11 layers, BN)": the paper's way to say that every width is divided by 16."""
    model = config["MODEL"]
    name = model["BACKBONE"]["NAME"]
    if "vgg" in name:
        node = model["VGG"]
        text = f"VGG-1-{node['WIDTH_DIVISOR']} ({node['DEPTH']} layers, {node['NORM'] or 'no norm'})"
    elif "resnet" in name:
        node = model["RESNETS"]
        divided = f"-1-{node['WIDTH_DIVISOR']}" if "divided" in name else ""
        text = f"ResNet{node['DEPTH']}{divided} ({node['NORM'] or 'no norm'})"
    else:
        return str(name)
    return f"{text}, FPN" if "fpn" in name else text


def _heads(config: Dict[str, Any]) -> str:
    model = config["MODEL"]
    name = detector_name(model)
    node = model[head_section(name)]
    # a one-stage family has no choice of heads, so its node has no NAME
    return f"{node['NAME'] if 'NAME' in node else family_of(name).name} on {', '.join(node['IN_FEATURES'])}"


def _input(config: Dict[str, Any]) -> str:
    node = config["INPUT"]
    return f"shorter side {node['MIN_SIZE_TEST']}, longer side at most {node['MAX_SIZE_TEST']} pixels"


def _teacher(run: Run) -> str:
    if not run.has_teacher:
        return NONE if run.config else UNKNOWN
    scale = run.setting("MODEL.QMIMIC.TEACHER.INPUT_SCALE") or 1.0
    enlarged = f", input enlarged by {scale:g}" if scale != 1.0 else ""
    own = run.teacher_config.get("MODEL", {}).get("WEIGHTS")
    weights = run.setting("MODEL.QMIMIC.TEACHER.WEIGHTS") or own or UNKNOWN
    # The two last parts of the path tell which run it was; the rest belongs to the machine.
    return f"{_told(describe_backbone, run.teacher_config)}{enlarged}, {'/'.join(str(weights).split('/')[-2:])}"


def _quantizer(config: Dict[str, Any]) -> str:
    model = config["MODEL"]
    node = model["QMIMIC"]["QUANTIZER"]
    if not has_quantizer_keys(model["META_ARCHITECTURE"]) or not node["NAME"]:
        return NONE
    codes = f", {node['NUM_CODES']} codes" if node["NUM_CODES"] else ""
    return f"{node['NAME']}, s = {node['STRIDE']:g}{codes}{', signed' if node['SIGNED'] else ''}"


def _quantized(config: Dict[str, Any]) -> str:
    model = config["MODEL"]
    node = model["QMIMIC"]["QUANTIZER"]
    if _quantizer(config) == NONE:
        return NOT_APPLICABLE
    is_student, mimic = imitates(model["META_ARCHITECTURE"]), model["QMIMIC"]["MIMIC"]
    places = ["teacher"] if is_student and mimic["QUANTIZE_TEACHER"] else []
    if node["ON_BACKBONE"]:
        places.append("own map")
    if is_student and mimic["QUANTIZE_STUDENT"]:
        places.append("adapted features")
    return ", ".join(places) or "nothing"


def _weight(config: Dict[str, Any]) -> str:
    node = config["MODEL"]["QMIMIC"]["MIMIC"]
    over_time = node["SCHEDULE"]
    if over_time == "warmup":
        over_time = f"warm-up of {node['WARMUP_ITERS']:,} iterations"
    return f"{node['LOSS_WEIGHT']:g} ({over_time})"


def _mimic_loss(config: Dict[str, Any]) -> str:
    node = config["MODEL"]["QMIMIC"]["MIMIC"]
    return f"divided by {node['NORMALIZE_BY']}, adapter {node['ADAPTER'] or NONE}"


def _rois(config: Dict[str, Any]) -> str:
    node = config["MODEL"]["QMIMIC"]["MIMIC"]
    most, size = node["MAX_ROIS_PER_IMAGE"], node["POOLER_RESOLUTION"]
    limit = f", at most {most} per image" if most else ""
    return f"{' + '.join(node['ROI_SOURCE'])}{limit}, {node['POOLER_TYPE']} {size} × {size}"


def _optimizer(config: Dict[str, Any]) -> str:
    node = config["SOLVER"]
    return f"{node.get('OPTIMIZER', 'SGD')}, learning rate {node['BASE_LR']:g}, {node['LR_SCHEDULER_NAME']}"


def _schedule(config: Dict[str, Any]) -> str:
    node = config["SOLVER"]
    return f"{node['MAX_ITER']:,} iterations of {node['IMS_PER_BATCH']} images"


_DATA = {
    "Training data": lambda config: ", ".join(config["DATASETS"]["TRAIN"]) or NONE,
    "Test data": lambda config: ", ".join(config["DATASETS"]["TEST"]) or NONE,
    "Input": _input,
}
_DETECTOR = {"Heads": _heads, "Backbone": describe_backbone}
_QUANTIZER = {"Quantizer": _quantizer, "Quantized": _quantized}
_MIMIC = {"λ": _weight, "Mimic loss": _mimic_loss, "Mimic RoIs": _rois}
_TRAINING = {"Optimizer": _optimizer, "Schedule": _schedule, "Seed": lambda config: str(config["SEED"])}
