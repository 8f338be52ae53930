"""Routers, one file per idea; importing this package registers all of them."""

from mmoe.routers.dense import DenseRouter
from mmoe.routers.expert_choice import ExpertChoiceRouter
from mmoe.routers.fixed import FixedRouter
from mmoe.routers.topk import TopKRouter

__all__ = ["DenseRouter", "ExpertChoiceRouter", "FixedRouter", "TopKRouter"]
