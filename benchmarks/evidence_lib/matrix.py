"""The matrix of variants, seeds and groups, read from benchmarks/evidence/matrix.yaml."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

__all__ = ["Axis", "Claim", "Group", "Matrix", "Overview", "Run", "Setting", "Variant", "load_matrix"]

_DEFAULT_MEASURES = ("AP",)


@dataclass(frozen=True)
class Variant:
    """
    One way to train (or only to evaluate) a detector.

    Attributes:
        name: of its folder and in groups.
        label: in tables and plots.
        config: YAML below ``configs/``.
        opts: KEY VALUE pairs over it, as ``train_net.py`` takes them.
        teacher: variant whose weights are MODEL.QMIMIC.TEACHER.WEIGHTS; "" = none.
        weights: variant whose weights are MODEL.WEIGHTS; "" = none.
        seed: the variant is run once, with this seed, whatever the group; None = with the group's.
        eval_only: nothing is trained.
        script: that trains it, with the command line of train_net.py.
        not_yet: why it cannot be run yet; "" = it can.
    """

    name: str
    label: str
    config: str
    opts: Tuple[str, ...] = ()
    teacher: str = ""
    weights: str = ""
    seed: Optional[int] = None
    eval_only: bool = False
    script: str = "train_net.py"
    not_yet: str = ""

    @property
    def needs(self) -> Tuple[str, ...]:
        """Variants whose weights it needs."""
        return tuple(name for name in (self.teacher, self.weights) if name)


@dataclass(frozen=True)
class Run:
    """A variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}_{self.seed}"


@dataclass(frozen=True)
class Axis:
    """
    A quantity over which a group is drawn.

    Attributes:
        label: its name.
        lines: by the line's name, its value of every variant on the line.
        beside: variants that have no value there and are drawn as levels.
    """

    label: str
    lines: Dict[str, Dict[str, float]]
    beside: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """
    Variants that are compared: a table, and for every measure a family of contrasts.

    Attributes:
        name, title: for the command line, and for people.
        variants: names, in the order of the table.
        seeds: of the variants that have none of their own.
        seed_list: name of the list in the matrix that they come from.
        contrasts: (a, b): a minus b.
        measures: names in a record.
        axis: what it is also drawn over, if anything.
        on_request: not run unless it is named.
    """

    name: str
    title: str
    variants: Tuple[str, ...]
    seeds: Tuple[int, ...]
    seed_list: str
    contrasts: Tuple[Tuple[str, str], ...] = ()
    measures: Tuple[str, ...] = _DEFAULT_MEASURES
    axis: Optional[Axis] = None
    on_request: bool = False


@dataclass(frozen=True)
class Claim:
    """
    A difference that is asked for in every setting.

    Attributes:
        label: of its column.
        roles: (a, b): a minus b.
        paper: the paper's figure, in AP; None = it has none.
    """

    label: str
    roles: Tuple[str, str]
    paper: Optional[float] = None


@dataclass(frozen=True)
class Setting:
    """
    One way to train, in which the claims are looked at.

    Attributes:
        label: of its row.
        group: whose seeds count.
        roles: by role, the group's variant.
    """

    label: str
    group: str
    roles: Dict[str, str]


@dataclass(frozen=True)
class Overview:
    """Claims over settings: the first table and picture of the document."""

    claims: Tuple[Claim, ...]
    settings: Tuple[Setting, ...]


@dataclass(frozen=True)
class Matrix:
    """
    Attributes:
        variants, groups: by name, in the file's order.
        overview: of the groups; None = there is none.
        revision: part of every run's digest.
        quick: names of the variants of ``--quick``.
        quick_seeds: their seeds.
        seconds_per_iteration, seconds_besides: expected of a run that has no record to judge by.
    """

    variants: Dict[str, Variant]
    groups: Dict[str, Group]
    overview: Optional[Overview] = None
    revision: int = 1
    quick: Tuple[str, ...] = ()
    quick_seeds: Tuple[int, ...] = ()
    seconds_per_iteration: float = 0.1
    seconds_besides: float = 0.0

    def seeds_of(self, variant: str, seeds: Sequence[int]) -> Tuple[int, ...]:
        """The variant's own seed, or those given."""
        own = self.variants[variant].seed
        return tuple(seeds) if own is None else (own,)

    def runs(
        self, groups: Sequence[str] = (), variants: Sequence[str] = (), seeds: Sequence[int] = ()
    ) -> List[Run]:
        """
        What a selection asks for, each run once.

        Args:
            groups: names; () = all that are not on request (all at all, where variants are named).
            variants: names; () = all of the groups.
            seeds: () = the groups'.

        Returns:
            First what is run once, then seed by seed, so that pairs become complete early.

        Raises:
            ValueError: a name is unknown, or none of the groups has the variant.
        """
        _check_names("--group", groups, self.groups)
        _check_names("--variant", variants, self.variants)
        chosen = [self.groups[name] for name in groups] if groups else list(self.groups.values())
        if not groups and not variants:
            chosen = [group for group in chosen if not group.on_request]
        found: Dict[Tuple[str, int], Run] = {}
        for group in chosen:
            for name in group.variants:
                if not variants or name in variants:
                    for seed in self.seeds_of(name, seeds or group.seeds):
                        found[name, seed] = Run(self.variants[name], seed)
        missing = set(variants).difference(name for name, _ in found)
        if missing:
            raise ValueError(f"--variant: {', '.join(sorted(missing))} is in none of the groups {list(groups)}")
        order = {name: index for index, name in enumerate(self.variants)}
        return sorted(
            found.values(), key=lambda run: (run.variant.seed is None, run.seed, order[run.variant.name])
        )

    def quick_runs(self) -> List[Run]:
        """Those of ``--quick``."""
        return [Run(self.variants[name], seed) for seed in self.quick_seeds for name in self.quick]


def load_matrix(path: str) -> Matrix:
    """
    Reads a matrix; the shipped file's comments say what may stand in it.

    Raises:
        ValueError: it is not well-formed; names the place.
    """
    with open(path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    try:
        seeds, settings = content["seeds"], content.get("settings", {})
        common = content.get("common", [])
        variants = {
            name: _variant(name, entry, common, settings) for name, entry in content["variants"].items()
        }
        _check_needs(variants)
        groups = {name: _group(name, entry, seeds, variants) for name, entry in content["groups"].items()}
        quick = content.get("quick", {"count": 0, "variants": []})
        _check_names("quick", quick["variants"], variants)
        expected = content.get("expected", {})
        return Matrix(
            variants=variants,
            groups=groups,
            overview=_overview(content["overview"], groups) if "overview" in content else None,
            revision=content.get("revision", 1),
            quick=tuple(quick["variants"]),
            quick_seeds=_first(seeds, "reporting", quick["count"], "quick"),
            seconds_per_iteration=expected.get("seconds_per_iteration", 0.1),
            seconds_besides=expected.get("seconds_besides", 0.0),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no matrix: {type(error).__name__}: {error}") from error


def _variant(name: str, entry: Dict[str, Any], common: List[Any], settings: Dict[str, List[Any]]) -> Variant:
    entry = dict(entry)
    chosen = entry.pop("with", [])
    _check_names(f"variant {name}, with", chosen, settings)
    opts = [*common, *(each for setting in chosen for each in settings[setting]), *entry.pop("opts", [])]
    if len(opts) % 2:
        raise ValueError(f"variant {name}: {opts} are no KEY VALUE pairs")
    merged = dict(zip(map(str, opts[::2]), map(str, opts[1::2])))  # the later one of a key wins
    flat = tuple(each for pair in merged.items() for each in pair)
    try:
        return Variant(name=name, opts=flat, **entry)
    except TypeError as error:
        raise ValueError(f"variant {name}: {error}") from error


def _check_needs(variants: Dict[str, Variant]) -> None:
    above: List[str] = []
    for variant in variants.values():
        # above it, so that there are no circles
        _check_names(f"variant {variant.name}, teacher or weights (of those above it)", variant.needs, above)
        above.append(variant.name)
        for need in map(variants.__getitem__, variant.needs):
            if need.seed is None or need.eval_only:
                raise ValueError(
                    f"variant {variant.name} needs the weights of {need.name}, which has no seed of its own or "
                    "trains nothing"
                )
        if variant.eval_only and not variant.weights:
            raise ValueError(f"variant {variant.name} is eval_only and has no weights")


def _group(name: str, entry: Dict[str, Any], seeds: Dict[str, List[int]], variants: Dict[str, Variant]) -> Group:
    members = entry["variants"]
    _check_names(f"group {name}", members, variants)
    contrasts = [tuple(pair) for pair in entry.get("contrasts", [])]
    if "against" in entry:
        contrasts += [
            (member, entry["against"])
            for member in members
            if member != entry["against"] and variants[member].seed is None
        ]
    for pair in contrasts:
        _check_names(f"group {name}, contrast {list(pair)}", pair, members)
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"group {name}: {list(pair)} is no contrast of two variants")
    axis = entry.get("x")
    if axis:
        for named in [*axis["lines"].values(), axis.get("beside", [])]:
            _check_names(f"group {name}, x", named, members)
    return Group(
        name=name,
        title=entry["title"],
        variants=tuple(members),
        seeds=_first(seeds, entry["seeds"], entry["count"], f"group {name}"),
        seed_list=entry["seeds"],
        contrasts=tuple(contrasts),
        measures=tuple(entry.get("measures", _DEFAULT_MEASURES)),
        axis=Axis(axis["label"], axis["lines"], tuple(axis.get("beside", []))) if axis else None,
        on_request=entry.get("on_request", False),
    )


def _overview(entry: Dict[str, Any], groups: Dict[str, Group]) -> Overview:
    claims = tuple(Claim(each["label"], tuple(each["of"]), each.get("paper")) for each in entry["claims"])
    settings = tuple(Setting(**each) for each in entry["settings"])
    roles = {role for claim in claims for role in claim.roles}
    for setting in settings:
        _check_names("overview", [setting.group], groups)
        place = f"overview, {setting.label}"
        _check_names(place, list(setting.roles), roles)
        _check_names(place, list(setting.roles.values()), groups[setting.group].variants)
    return Overview(claims, settings)


def _first(seeds: Dict[str, List[int]], name: str, count: int, place: str) -> Tuple[int, ...]:
    if name not in seeds or not 0 <= count <= len(seeds[name]):
        known = {each: len(values) for each, values in seeds.items()}
        raise ValueError(f"{place}: {count} seeds of {name!r}; there are {known}")
    return tuple(seeds[name][:count])


def _check_names(place: str, names: Sequence[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{place}: there is no {name!r}; choose among {', '.join(known)}")
