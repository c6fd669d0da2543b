"""The decoding of a raw network's outputs as source text for devices without Python: templates and constants."""

import os
from typing import Dict, Iterable, Union

from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.raw.decoding import BOX_CODINGS, Decoding

__all__ = ["decoder_sources"]

_FOLDER = os.path.dirname(os.path.abspath(__file__))
# The line of a template that the constants replace.
_MARK = "/* CONSTANTS */\n"


def decoder_sources(description: ModelDescription) -> Dict[str, str]:
    """Texts by file name: ``decode.c`` and ``decode.mjs`` for a raw network, else nothing."""
    if not description.decoding:
        return {}
    constants = {
        "decode.c": _c_constants(description, description.decoding),
        "decode.mjs": f"export const MODEL = {description.to_json()};\n",
    }
    return {name: _template(name).replace(_MARK, text) for name, text in constants.items()}


def _template(name: str) -> str:
    with open(os.path.join(_FOLDER, name), encoding="utf-8") as file:
        return file.read()


def _c_constants(description: ModelDescription, decoding: Decoding) -> str:
    spec, levels = description.input_spec, decoding.levels
    candidates = [
        min(decoding.top_k, level.height * level.width * len(level.anchors) * decoding.num_classes) for level in levels
    ]
    macros = {
        "INPUT_HEIGHT": spec.fixed_height,
        "INPUT_WIDTH": spec.fixed_width,
        "NUM_CLASSES": decoding.num_classes,
        "NUM_LEVELS": len(levels),
        "NUM_OUTPUTS": len(decoding.output_shapes),
        "MAX_CANDIDATES": sum(candidates),
        "MAX_DETECTIONS": decoding.max_detections,
        "HAS_CENTERNESS": int(decoding.has_centerness),
        "HAS_DISTANCES": BOX_CODINGS.index(decoding.box_coding),
    }
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    lines += [
        f"static const float SCORE_THRESHOLD = {decoding.score_threshold!r};",
        f"static const double NMS_THRESHOLD = {decoding.nms_threshold!r};",
        f"static const float DELTA_WEIGHTS[4] = {_braces(decoding.delta_weights)};",
        f"static const float LARGEST_LOG_SCALE = {decoding.largest_log_scale!r};",
        f"const char *const CLASS_NAMES[NUM_CLASSES] = {_braces(map(_c_text, description.names))};",
        f"const char *const OUTPUT_NAMES[NUM_OUTPUTS] = {_braces(map(_c_text, decoding.output_shapes))};",
    ]
    rows = []
    for index, (level, most) in enumerate(zip(levels, candidates)):
        name, count = f"ANCHORS_{index}", len(level.anchors)
        lines.append(f"static const float {name}[][4] = {_braces(map(_braces, level.anchors))};")
        rows.append(_braces([level.height, level.width, count, most, level.stride, level.offset, name]))
    return "\n".join([*lines, f"static const Level LEVELS[NUM_LEVELS] = {_braces(rows)};", ""])


def _braces(values: Iterable[Union[float, str]]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _c_text(text: str) -> str:
    """A string of C: printable ASCII, and every other byte of its UTF-8 as three octal digits."""
    codes = text.encode("utf-8", "replace")
    plain = (chr(code) if 32 <= code < 127 and code not in b'"\\?' else f"\\{code:03o}" for code in codes)
    return '"' + "".join(plain) + '"'
