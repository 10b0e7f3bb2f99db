"""Maps of labels: where they are asked, what they say, where they point."""

from __future__ import annotations

import pytest
import torch

from apm.test_time.label_maps import CHUNK, field_maps, label_maps, peak
from apm.text.zeroshot import ZeroShotHead

HEAD = ZeroShotHead(("left", "right", "below"), torch.eye(3), 10.0)


def test_the_map_is_the_softmax_over_the_labels() -> None:
    features = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)) * 3  # of any length
    maps = label_maps(features, HEAD, [2, 0])
    expected = HEAD.probabilities(features.reshape(-1, 3)).reshape(5, 7, 3)
    assert maps.labels == ("below", "left")
    torch.testing.assert_close(maps.probabilities, expected[..., [2, 0]].permute(2, 0, 1))
    assert torch.equal(maps.best, expected.argmax(-1))


def test_log_odds_still_tell_places_apart_where_probabilities_are_1() -> None:
    sharp = ZeroShotHead(HEAD.labels, HEAD.features, 200.0)
    features = torch.tensor([[[1.0, 0.2, 0.0], [1.0, 0.1, 0.0], [1.0, 0.3, 0.0]]])
    maps = label_maps(features, sharp, [0])
    assert (maps.probabilities == 1).all()
    assert peak(maps.log_odds[0]) == (0.5, 0.5)


def test_a_field_is_asked_everywhere_once_and_in_pieces() -> None:
    asked: list[int] = []

    def field(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """Left and right halves by column, the lowest quarter by row; in cells of a grid of 4."""
        asked.append(len(rows))
        features = torch.zeros(len(rows), 3)
        features[:, 0], features[:, 1] = (cols < 1.5).float(), (cols >= 1.5).float()
        features[rows >= 2.5] = torch.tensor([0.0, 0.0, 1.0])
        return features

    size = 80
    maps = field_maps(field, 4, size, HEAD, [0, 1, 2])
    assert sum(asked) == size**2 and max(asked) <= CHUNK < size**2
    expected = torch.zeros(size, size, dtype=torch.long)
    expected[:, size // 2 :] = 1
    expected[3 * size // 4 :] = 2
    assert torch.equal(maps.best, expected)
    assert torch.equal(maps.probabilities.argmax(0), expected)


@pytest.mark.parametrize("place", [(0, 0), (2, 4), (1, 3)])
def test_the_peak_is_the_middle_of_the_largest_cell(place: tuple[int, int]) -> None:
    values = torch.zeros(3, 5)
    values[place] = 1
    assert peak(values) == ((place[0] + 0.5) / 3, (place[1] + 0.5) / 5)
