"""Every claim in every setting: the first table and picture of the document, from the summaries of the groups."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Sequence

from evidence_lib.matrix import Claim, Overview, Setting
from evidence_lib.statistics import Contrast, family
from evidence_lib.summary import GroupSummary

__all__ = ["ClaimSummary", "OverviewSummary", "overview_to_dict", "summarize_overview"]

_MEASURE = "AP"


@dataclass(frozen=True)
class ClaimSummary:
    """
    One column.

    Attributes:
        claim: of the matrix.
        contrasts: one per setting, a family; None where the setting has no variant in one of the roles.
    """

    claim: Claim
    contrasts: List[Optional[Contrast]]


@dataclass(frozen=True)
class OverviewSummary:
    """
    Attributes:
        settings: rows.
        claims: columns.
    """

    settings: Sequence[Setting]
    claims: List[ClaimSummary]

    @property
    def has_results(self) -> bool:
        return any(each and each.sample.n for claim in self.claims for each in claim.contrasts)


def summarize_overview(overview: Overview, summaries: Sequence[GroupSummary]) -> OverviewSummary:
    """
    Args:
        overview: of the matrix.
        summaries: of its groups.
    """
    by_group = {each.group.name: each for each in summaries}
    claims = [_claim(claim, overview.settings, by_group) for claim in overview.claims]
    return OverviewSummary(overview.settings, claims)


def overview_to_dict(summary: OverviewSummary) -> Dict[str, Any]:
    """For ``summary.json``."""
    labels = [each.label for each in summary.settings]
    return {
        claim.claim.label: {
            "paper": claim.claim.paper,
            "settings": {
                label: asdict(contrast) for label, contrast in zip(labels, claim.contrasts) if contrast
            },
        }
        for claim in summary.claims
    }


def _claim(claim: Claim, settings: Sequence[Setting], by_group: Dict[str, GroupSummary]) -> ClaimSummary:
    asked = [index for index, setting in enumerate(settings) if set(claim.roles) <= set(setting.roles)]
    pairs = []
    for setting in (settings[index] for index in asked):
        group = by_group[setting.group]
        a, b = (group.variant(setting.roles[role]).values[_MEASURE] for role in claim.roles)
        pairs.append((a, b))
    contrasts: List[Optional[Contrast]] = [None] * len(settings)
    for index, contrast in zip(asked, family(pairs)):
        contrasts[index] = contrast
    return ClaimSummary(claim, contrasts)
