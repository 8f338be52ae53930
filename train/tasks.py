"""Tasks of evaluation by name: importing this registers them all."""

from train import emoji_retrieval, evaluate, replies, specialisation

__all__ = ["emoji_retrieval", "evaluate", "replies", "specialisation"]
