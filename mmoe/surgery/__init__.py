"""Surgery: conversions of trained models, one file per conversion, all written against the `Site` view of a host."""

from mmoe.surgery.blocks import BlockStack, vision_blocks
from mmoe.surgery.frequency_adapters import add_frequency_adapters, frequency_adapters
from mmoe.surgery.side_experts import add_side_experts
from mmoe.surgery.site import (
    ExpertWeights,
    HostedMoE,
    RouterWeights,
    Site,
    get_site,
    refused_sites,
    sites,
)
from mmoe.surgery.swap import SwappedSite, SwapReport
from mmoe.surgery.upcycle import assemble_experts, upcycle

__all__ = [
    "BlockStack",
    "ExpertWeights",
    "HostedMoE",
    "RouterWeights",
    "Site",
    "SwapReport",
    "SwappedSite",
    "add_frequency_adapters",
    "add_side_experts",
    "assemble_experts",
    "frequency_adapters",
    "get_site",
    "refused_sites",
    "sites",
    "upcycle",
    "vision_blocks",
]
