"""`TokenView`: how the rows of some layers' routings map back to an input, for pictures of routing.

Shapes: T rows of a batch, sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One modality of the inputs as some layers see it.

    Rows are sample by sample: `prefix` rows that belong to no place (class token), then a grid of patches or `length`
    tokens. Where one sequence has several modalities, `length` is that of the whole sequence, and `places` tells which
    of its rows the view shows.

    Attributes:
        layers: pattern of layer names.
        modality: "image", "text", "speech", ...
        prefix: leading rows of each sample to leave out.
        grid: rows and columns of patches.
        length: rows of each sample for sequences.
        tokens: shown text of each token per sample; samples may be shorter than `length`.
        places: rows of each sample that are shown; a sample without this modality has none. Empty for all rows.
        about: what the rows are, where it is not plain.
    """

    layers: str
    modality: str
    prefix: int = 0
    grid: tuple[int, int] | None = None
    length: int | None = None
    tokens: tuple[tuple[str, ...], ...] = ()
    places: tuple[tuple[int, ...], ...] = ()
    about: str = ""

    @property
    def rows(self) -> int:
        """Rows of one sample."""
        if self.grid is None or self.places:
            return self.prefix + (self.length or 1)
        return self.prefix + self.grid[0] * self.grid[1]

    def samples(self, rows: Tensor) -> list[int]:
        """Samples that the view shows of the rows (T, ...) of a routing."""
        if self.places:
            return [sample for sample, places in enumerate(self.places) if places]
        count = len(rows) // self.rows
        return list(range(min(count, len(self.tokens)) if self.tokens else count))

    def of_sample(self, rows: Tensor, sample: int) -> Tensor:
        """Rows (T, ...) of a routing -> the patches or tokens of one sample.

        >>> import torch
        >>> view = TokenView(layers="*", modality="image", grid=(1, 2), length=4, places=((), (1, 2)))
        >>> view.of_sample(torch.arange(8), 1).tolist()
        [5, 6]
        """
        found = rows.unflatten(0, (-1, self.rows))[sample, self.prefix :]
        if self.places:
            return found[list(self.places[sample])]
        return found if self.grid is not None or not self.tokens else found[: len(self.tokens[sample])]
