"""Ways to spoil the files of a run folder, by a seeded generator: wrong bytes, wrong values, wrong kinds of file."""

import json
import os
import random
from typing import Any, Callable, Dict, List, Tuple

import yaml

# Values that no key expects. Some are no JSON and no YAML, which is the point.
POISON: Tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 10**18, 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x", "1e309"),
    *("<script>alert(1)</script>", "\ud800", "a\x00b", "\x1b[31m", "../../etc/passwd", "ä" * 3000),
    *([], [[]], [None], ["x"], [1e308, float("nan")], {}, {"x": {"y": []}}, {"": 0}),
)


def places(content: Any, path: Tuple = ()) -> List[Tuple]:
    """Paths to every value in nested dicts and lists, the outermost first."""
    found = [path]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def poisoned(content: Any, path: Tuple, value: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return value
    copied = dict(content) if isinstance(content, dict) else list(content)
    copied[path[0]] = poisoned(content[path[0]], path[1:], value)
    return copied


def spoilt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut off, with other bytes in it, doubled, deeply nested, or something else altogether."""
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        place = rng.randrange(len(data))
        return data[:place] + rng.choice([b"\x00", b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000, b"1" * 6000, b"&a [*a]"])
    if kind == 3:
        return rng.choice([b"[" * 200_000, b'{"a":' * 100_000, b"- " * 50_000, b"1" * 100_000, b'"\\ud800"'])
    if kind == 4:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(2000)))
    return data + data


def spoil_json(path: str, rng: random.Random) -> str:
    """Spoils one value of a JSON file, or of one line of JSON lines; returns what was done."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    lines = text.splitlines() if path.endswith("metrics.json") else [text]
    number = rng.randrange(len(lines))
    content = json.loads(lines[number])
    place, value = rng.choice(places(content)), rng.choice(POISON)
    lines[number] = json.dumps(poisoned(content, place, value))
    with open(path, "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return f"{place} = {value!r:.60}"


def spoil_yaml(path: str, rng: random.Random) -> str:
    """The same for a YAML; a value that PyYAML cannot write becomes a text."""
    with open(path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    place, value = rng.choice(places(content)), rng.choice(POISON)
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        yaml.safe_dump(poisoned(content, place, value), file, allow_unicode=True)
    return f"{place} = {value!r:.60}"


def spoil_bytes(path: str, rng: random.Random) -> str:
    with open(path, "rb") as file:
        data = spoilt_bytes(file.read(), rng)
    with open(path, "wb") as file:
        file.write(data)
    return f"bytes {data[:30]!r}"


def _folder(path: str) -> None:
    os.makedirs(os.path.join(path, "inside"))


def _large(path: str) -> None:
    with open(path, "wb") as file:
        file.write(b"a: 1 # " + b"x" * 2_000_000)


OTHER_KINDS: Dict[str, Callable[[str], None]] = {
    "a folder": _folder,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: os.symlink(path, path),
    "a broken link": lambda path: os.symlink(path + ".gone", path),
    "a device": lambda path: os.symlink(os.devnull, path),
    "nothing": lambda path: None,
    "an empty file": lambda path: open(path, "wb").close(),
    "a large file": _large,
}
