"""What was trained, in words: architecture, data, teacher, quantizer, mimic loss, schedule."""

from typing import Any, Callable, Dict, List, Sequence, Tuple

from qmimic_d2.modeling.family import detector_name, family_of, has_quantizer_keys, head_section, imitates
from qmimic_d2.report.collect import Run

__all__ = ["describe_backbone", "describe_run", "split_common"]

NONE = "none"
UNKNOWN = "not known"
# What the mimic's settings are in a run without a teacher.
NOT_APPLICABLE = ""


def describe_run(run: Run) -> Dict[str, str]:
    """What a run's config says, by heading; "not known" throughout without a config."""
    facts = {}
    for heading, describe in _FACTS.items():
        is_of_no_mimic = heading in _MIMIC and not run.has_teacher
        facts[heading] = NOT_APPLICABLE if is_of_no_mimic else _known(describe, run)
    return facts


def split_common(facts: Sequence[Dict[str, str]]) -> Tuple[Dict[str, str], List[str]]:
    """
    Returns:
        By heading, what all runs have in common of those to which it applies and of which it is known; and the
        headings under which they differ.
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


def _known(describe: Callable[[Any], str], source: Any) -> str:
    try:
        return describe(source)
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


def _text(key: str, text: str) -> Callable[[Run], str]:
    """A fact that is a text, filled in from the config's node ``key``."""
    return lambda run: text.format_map(run.setting(key))


def _heads(run: Run) -> str:
    model = run.config["MODEL"]
    name = detector_name(model)
    node = model[head_section(name)]
    # a one-stage family has no choice of heads, so its node has no NAME
    return f"{node['NAME'] if 'NAME' in node else family_of(name).name} on {', '.join(node['IN_FEATURES'])}"


def _teacher(run: Run) -> str:
    if not run.has_teacher:
        return NONE if run.config else UNKNOWN
    scale = run.setting("MODEL.QMIMIC.TEACHER.INPUT_SCALE") or 1.0
    enlarged = f", input enlarged by {scale:g}" if scale != 1.0 else ""
    own = run.teacher_config.get("MODEL", {}).get("WEIGHTS")
    weights = run.setting("MODEL.QMIMIC.TEACHER.WEIGHTS") or own or UNKNOWN
    # The two last parts of the path say which run it was; the rest belongs to the machine.
    return f"{_known(describe_backbone, run.teacher_config)}{enlarged}, {'/'.join(str(weights).split('/')[-2:])}"


def _quantizer(run: Run) -> str:
    node = run.config["MODEL"]["QMIMIC"]["QUANTIZER"]
    if not has_quantizer_keys(run.config["MODEL"]["META_ARCHITECTURE"]) or not node["NAME"]:
        return NONE
    codes = f", {node['NUM_CODES']} codes" if node["NUM_CODES"] else ""
    return f"{node['NAME']}, s = {node['STRIDE']:g}{codes}{', signed' if node['SIGNED'] else ''}"


def _quantized(run: Run) -> str:
    node = run.config["MODEL"]["QMIMIC"]["QUANTIZER"]
    if _quantizer(run) == NONE:
        return NOT_APPLICABLE
    is_student, mimic = imitates(run.config["MODEL"]["META_ARCHITECTURE"]), run.config["MODEL"]["QMIMIC"]["MIMIC"]
    places = ["teacher"] if is_student and mimic["QUANTIZE_TEACHER"] else []
    if node["ON_BACKBONE"]:
        places.append("own map")
    if is_student and mimic["QUANTIZE_STUDENT"]:
        places.append("adapted features")
    return ", ".join(places) or "nothing"


def _weight(run: Run) -> str:
    node = run.config["MODEL"]["QMIMIC"]["MIMIC"]
    over_time = node["SCHEDULE"]
    if over_time == "warmup":
        over_time = f"warm-up of {node['WARMUP_ITERS']:,} iterations"
    return f"{node['LOSS_WEIGHT']:g} ({over_time})"


def _mimic_loss(run: Run) -> str:
    node = run.config["MODEL"]["QMIMIC"]["MIMIC"]
    return f"divided by {node['NORMALIZE_BY']}, adapter {node['ADAPTER'] or NONE}"


def _rois(run: Run) -> str:
    node = run.config["MODEL"]["QMIMIC"]["MIMIC"]
    most, size = node["MAX_ROIS_PER_IMAGE"], node["POOLER_RESOLUTION"]
    limit = f", at most {most} per image" if most else ""
    return f"{' + '.join(node['ROI_SOURCE'])}{limit}, {node['POOLER_TYPE']} {size} × {size}"


def _optimizer(run: Run) -> str:
    node = run.config["SOLVER"]
    return f"{node.get('OPTIMIZER', 'SGD')}, learning rate {node['BASE_LR']:g}, {node['LR_SCHEDULER_NAME']}"


def _cache(run: Run) -> str:
    if not run.setting("MODEL.QMIMIC.TEACHER.CACHE"):
        return NONE if run.has_teacher else NOT_APPLICABLE
    shares = run.metrics.of("qmimic/teacher_cache_hits").values()
    return f"{sum(shares) / len(shares):.0%} of the images were known" if len(shares) else UNKNOWN


_MIMIC = {"λ": _weight, "Mimic loss": _mimic_loss, "Mimic RoIs": _rois}
_FACTS: Dict[str, Callable[[Run], str]] = {
    "Training data": lambda run: ", ".join(run.config["DATASETS"]["TRAIN"]) or NONE,
    "Test data": lambda run: ", ".join(run.config["DATASETS"]["TEST"]) or NONE,
    "Input": _text("INPUT", "shorter side {MIN_SIZE_TEST}, longer side at most {MAX_SIZE_TEST} pixels"),
    "Heads": _heads,
    "Backbone": lambda run: describe_backbone(run.config),
    "Teacher": _teacher,
    "Teacher cache": _cache,
    "Quantizer": _quantizer,
    "Quantized": _quantized,
    **_MIMIC,
    "Optimizer": _optimizer,
    "Schedule": _text("SOLVER", "{MAX_ITER:,} iterations of {IMS_PER_BATCH} images"),
    "Seed": lambda run: str(run.config["SEED"]),
    "Done": lambda run: run.state,
}
