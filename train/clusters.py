"""Cells of the emoji for the clustering stages of diversified multiplet upcycling (arXiv 2409.19291, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from train.data.emoji import EmojiSet
from train.emoji_retrieval import image_features, text_features


def refine_cells(cells: Tensor, model: Any, emoji: EmojiSet, clusters: tuple[int, int], seed: int) -> Tensor:
    """Splits every cell by k-means clusters of pictures and of names under a model.

    Args:
        cells: (styles, n) labels so far.
        model: newest model.
        emoji: the data; held-out concepts are labelled too but never fitted nor drawn.
        clusters: of pictures and of names.
        seed: of k-means.
    """

    def labels(features: Tensor, fitted: Tensor, count: int) -> Tensor:
        kmeans = MiniBatchKMeans(count, batch_size=4096, max_iter=500, n_init=3, random_state=seed).fit(fitted)
        return torch.from_numpy(kmeans.predict(features)).long()

    pictures = [image_features(model, emoji, style) for style in emoji.training_styles]
    seen = torch.tensor(emoji.seen)
    image = labels(torch.cat(pictures), torch.cat([rows[seen] for rows in pictures]), clusters[0])
    names = text_features(model, [concept.name for concept in emoji.concepts])
    text = labels(names, names[seen], clusters[1])  # (n,)
    return cells * clusters[0] * clusters[1] + clusters[0] * text + image.view(len(pictures), -1)
