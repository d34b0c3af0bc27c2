"""Noise on features, what visual tokens tell about images, and charts over any quantity, against plain formulas."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from alignvlm.errors import UserError
from alignvlm.report.points import Points, draw_points
from alignvlm.studies import noise, vocabulary
from alignvlm.studies.feature_noise import feature_noise, measure_scale, output_distances
from alignvlm.studies.image_information import image_information
from alignvlm.studies.results.page import write_page
from tests.report.test_report import Page
from tests.studies.made_up import made_up_results
from tests.tiny import picture, tiny_model

MODEL, PROCESSOR = tiny_model()
IMAGES = [picture(32, 32), picture(70, 40, seed=1), picture(32, 30, seed=2), picture(70, 38, seed=3)]


def tiles_of(image: object) -> torch.Tensor:
    return torch.from_numpy(PROCESSOR.spec.cut(image))


@torch.no_grad()
def noise_of(tiles: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """What was added to the features [K, T, d]."""
    seen: list[torch.Tensor] = []
    clean = MODEL.model.encode_tiles(tiles)
    with feature_noise(MODEL, sigma, seed):
        hook = MODEL.model.connector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        MODEL.get_image_features(tiles)
        hook.remove()
    return seen[0] - clean


def test_noise_is_normal_and_belongs_to_the_tile() -> None:
    tiles = torch.cat([tiles_of(image) for image in IMAGES])
    added = noise_of(tiles, 3.0)
    assert float(added.std()) == pytest.approx(3.0, rel=0.03)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.15)
    torch.testing.assert_close(noise_of(tiles.flip(0), 3.0), added.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise_of(tiles[1:2], 6.0), 2 * added[1:2], atol=1e-5, rtol=0)
    assert not torch.allclose(added[0], added[2], atol=0.1)
    assert not torch.allclose(noise_of(tiles, 3.0, seed=1), added, atol=0.1)
    with torch.no_grad():
        before = MODEL.get_image_features(tiles).pooler_output
        with feature_noise(MODEL, 0.0):
            torch.testing.assert_close(MODEL.get_image_features(tiles).pooler_output, before, atol=0, rtol=0)
        assert torch.equal(MODEL.get_image_features(tiles).pooler_output, before)  # nothing stays behind


def test_scale_and_distances_are_those_of_the_formulas() -> None:
    tiles = torch.cat([tiles_of(image) for image in IMAGES])
    with torch.no_grad():
        features = MODEL.model.encode_tiles(tiles).double()
        clean = MODEL.get_image_features(tiles).pooler_output.flatten(0, 1).double()
        with feature_noise(MODEL, 0.7):
            noisy = MODEL.get_image_features(tiles).pooler_output.flatten(0, 1).double()
    scale = measure_scale(MODEL, PROCESSOR, IMAGES)
    assert scale.features == pytest.approx(float(features.std(correction=0)), rel=1e-5)
    assert (scale.num_images, scale.num_visual_tokens) == (4, len(clean))
    torch.testing.assert_close(scale.mean_output, clean.mean(0), atol=1e-5, rtol=0)
    (nothing, _), (plain, centred) = output_distances(MODEL, PROCESSOR, IMAGES, [0.0, 0.7], scale.mean_output)
    cosine = lambda a, b: ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
    assert nothing == pytest.approx(0.0, abs=1e-9)
    assert plain == pytest.approx(1 - float(cosine(clean, noisy)), rel=1e-4)
    assert centred == pytest.approx(1 - float(cosine(clean - clean.mean(0), noisy - clean.mean(0))), rel=1e-3)
    with pytest.raises(UserError, match="no images"):
        measure_scale(MODEL, PROCESSOR, [])


def test_image_information_is_the_variance_at_a_place() -> None:
    with torch.no_grad():
        features = [MODEL.get_image_features(tiles_of(image)).pooler_output for image in IMAGES]
        outputs = [each.flatten(0, 1).double().numpy() for each in features]
    groups = [np.stack(outputs[i::2]) for i in (0, 1)]  # [images, places, D], of one and of several tiles
    every = np.concatenate([group.reshape(-1, group.shape[-1]) for group in groups])
    whole = every.var(axis=0).sum()
    between = [group.var(axis=0).sum(-1) for group in groups]  # [places]
    found = image_information(MODEL, PROCESSOR, IMAGES)
    assert found is not None
    assert found.variance_share == pytest.approx(sum(2 * each.sum() for each in between) / len(every) / whole, rel=1e-6)
    telling = sum(2 * int((each >= 0.01 * whole).sum()) for each in between)
    assert found.token_share == pytest.approx(telling / len(every))
    same = image_information(MODEL, PROCESSOR, [IMAGES[0], IMAGES[0]])
    assert same is not None
    assert (same.variance_share, same.token_share) == (pytest.approx(0, abs=1e-12), 0)
    assert image_information(MODEL, PROCESSOR, IMAGES[:2]) is None


def test_points_are_drawn_at_their_places() -> None:
    figure = draw_points(Points("<T>", {"a&b": [(1, 0.0), (10, 50.0), (100, 100.0)]}, log_x=True, zero=True))
    assert figure is not None
    x, y = np.array([point.split(",") for point in re.findall(r'points="([^"]+)"', figure)[0].split()], float).T
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert "&lt;T&gt;" in figure
    assert "a&amp;b" in figure
    assert draw_points(Points("empty", {"a": []})) is None


def test_pages_of_noise_and_vocabulary_show_what_was_measured(tmp_path: object) -> None:
    levels = lambda cell: [
        {"level": name, "sigma": 1.0, "cosine": 0.1234, "centred_cosine": 0.5678, "scores": {"test": 0.25}}
        for name in noise.LEVELS
    ]
    results = made_up_results(noise.STUDY, feature_std=lambda cell: 1.5, levels=levels)
    text = Page(write_page(noise.STUDY, results, {}, tmp_path / "noise").read_text(encoding="utf-8")).text
    assert {"25.0 ± 0.0", "0.1234 ± 0.0000", "0.5678 ± 0.0000", "27.52"} <= set(text)

    measured = {
        "vocabulary": 512, "images": 4, "visual_tokens": 99, "entropy_of_mean": 2.5, "mean_entropy": 1.5,
        "largest_mean_probability": 0.25, "holding": {"0.9": 7, "0.99": 70, "0.999": 300},
        "curve": [[1, 0.25], [512, 1.0]], "top": [["<b>", 0.25]],
        "pruning": [{"kept": 512 >> i, "mass": 1.0, "bytes": 1e3, "scores": {"test": 0.5 - i / 20}} for i in range(8)],
        "image_information": None,
    }  # fmt: skip
    values = {key: lambda cell, value=value: value for key, value in measured.items()}
    results = made_up_results(vocabulary.STUDY, **values)
    html = write_page(vocabulary.STUDY, results, {}, tmp_path / "vocabulary").read_text("utf-8")
    text = Page(html).text
    assert {"512", "70 ± 0", f"{math.log(512):.3f}", "15.0 ± 0.0", "-35.0 ± 0.0", "<b>"} <= set(text)
    assert "<b></th>" not in html
