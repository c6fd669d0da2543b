"""
Fonts of this machine that have the characters of a text, found and measured by Pillow.

The same text gets the same font each time: the first in a fixed order that has all of its characters.
"""

import functools
import os
import sys
import unicodedata
from typing import Iterator, List, Optional, Tuple

__all__ = ["FontFile", "find_font", "load_font", "unprintable_characters"]

# Path of a font file, and the font's number in it (a collection holds several); "" is Pillow's own font.
FontFile = Tuple[str, int]

_ENDINGS = (".ttf", ".otf", ".ttc", ".otc")
# Where systems keep fonts, should Matplotlib, which knows better, not be installed.
_FOLDERS = {
    "win32": ("%WINDIR%/Fonts", "%LOCALAPPDATA%/Microsoft/Windows/Fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
}
# Looked at first: plain, legible fonts with many characters, by the beginning of the file's name.
_PREFERRED = ("dejavusans.", "notosans-regular", "notosanscjk-regular", "notosans", "arialuni", "unifont")
# Fonts that have every character, each as a symbol for "there is none", and those of formulas.
_NEVER = ("lastresort", "cm", "stix")
_MOST_FONTS_IN_A_FILE = 8
_PROBE_SIZE = 20
# No character of any script, so what a font draws for it is its symbol for "there is none".
_NO_CHARACTER = "\U0010ffff"


@functools.lru_cache(maxsize=4096)
def find_font(text: str) -> Optional[FontFile]:
    """The first font that has every character of a text; None where this machine has none."""
    characters = sorted({each for each in text if _has_shape(each)})
    for path in _font_paths():
        for font_file in _fonts_in(path):
            if _has_all(font_file, characters):
                return font_file
    return None


def _has_shape(character: str) -> bool:
    """Whether it is more than a space, a mark on another one, or a sign for how to join or turn them."""
    return not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf", "Mn", "Me")


def unprintable_characters(text: str) -> str:
    """The characters of a text that no font of this machine has, each once."""
    return "".join(each for each in sorted(set(text)) if find_font(each) is None)


@functools.lru_cache(maxsize=64)
def load_font(font_file: FontFile, size: int):
    """
    A Pillow font.

    Args:
        font_file: of :func:`find_font`.
        size: in pixels.
    """
    from PIL import ImageFont

    path, number = font_file
    return ImageFont.truetype(path, size, index=number) if path else ImageFont.load_default(size)


def _has_all(font_file: FontFile, characters: List[str]) -> bool:
    try:
        return all(_has(font_file, each) for each in characters)
    except (OSError, ValueError):  # a damaged font, or one of pictures in one size
        return False


@functools.lru_cache(maxsize=65536)
def _has(font_file: FontFile, character: str) -> bool:
    font = load_font(font_file, _PROBE_SIZE)
    drawn, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    is_empty = drawn.getbbox() is None
    return not is_empty and (drawn.size != missing.size or bytes(drawn) != bytes(missing))


def _fonts_in(path: str) -> Iterator[FontFile]:
    count = _MOST_FONTS_IN_A_FILE if path.lower().endswith(("ttc", "otc")) else 1
    for number in range(count):
        try:
            load_font((path, number), _PROBE_SIZE)
        except (OSError, ValueError, ImportError):
            return
        yield path, number


@functools.lru_cache(maxsize=1)
def _font_paths() -> Tuple[str, ...]:
    """Every font file of this machine, the preferred ones first; at last Pillow's own, ""."""
    paths = [each for each in set(_search()) if not os.path.basename(each).lower().startswith(_NEVER)]
    return (*sorted(paths, key=lambda path: (_rank(path), os.path.basename(path), path)), "")


def _rank(path: str) -> int:
    name = os.path.basename(path).lower()
    matches = [index for index, each in enumerate(_PREFERRED) if name.startswith(each)]
    return min(matches, default=len(_PREFERRED))


def _search() -> Iterator[str]:
    try:
        import matplotlib
        from matplotlib.font_manager import findSystemFonts
    except ImportError:
        folders = [os.path.expandvars(os.path.expanduser(each)) for each in _FOLDERS.get(sys.platform, ())]
    else:
        yield from (each for each in findSystemFonts() if each.lower().endswith(_ENDINGS))
        folders = [os.path.join(matplotlib.get_data_path(), "fonts", "ttf")]
    for folder in folders:
        for parent, _, files in os.walk(folder):
            yield from (os.path.join(parent, file) for file in sorted(files) if file.lower().endswith(_ENDINGS))
