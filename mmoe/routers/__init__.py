"""Routers, one file per idea; importing this package registers all of them."""

from mmoe.routers.dense import DenseRouter
from mmoe.routers.dynamic import DynamicRouter
from mmoe.routers.expert_choice import ExpertChoiceRouter
from mmoe.routers.fixed import FixedRouter
from mmoe.routers.gshard import GShardRouter
from mmoe.routers.topk import TopKRouter

__all__ = ["DenseRouter", "DynamicRouter", "ExpertChoiceRouter", "FixedRouter", "GShardRouter", "TopKRouter"]
