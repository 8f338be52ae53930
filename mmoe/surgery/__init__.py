"""Surgery: conversions of trained models, one file per conversion, all written against the `Site` view of a host."""

from mmoe.surgery.site import (
    ExpertWeights,
    HostedMoE,
    RouterWeights,
    Site,
    get_site,
    refused_sites,
    sites,
)
from mmoe.surgery.upcycle import UpcycledSite, UpcycleReport, upcycle

__all__ = [
    "ExpertWeights",
    "HostedMoE",
    "RouterWeights",
    "Site",
    "UpcycleReport",
    "UpcycledSite",
    "get_site",
    "refused_sites",
    "sites",
    "upcycle",
]
