"""Routers, one file per idea; importing this package registers all of them."""

from mmoe.routers.by_modality import ByModalityRouter
from mmoe.routers.dense import DenseRouter
from mmoe.routers.dynamic import DynamicRouter
from mmoe.routers.expert_choice import ExpertChoiceRouter
from mmoe.routers.fixed import FixedRouter
from mmoe.routers.gshard import GShardRouter
from mmoe.routers.topk import TopKRouter

__all__ = [
    "ByModalityRouter",
    "DenseRouter",
    "DynamicRouter",
    "ExpertChoiceRouter",
    "FixedRouter",
    "GShardRouter",
    "TopKRouter",
]
