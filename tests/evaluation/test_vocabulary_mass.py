"""Measuring the vocabulary's mass, and an export with only the tokens that carry it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignvlm.errors import UserError
from alignvlm.evaluation.vocabulary_mass import VocabularyMass, measure_mass, write_restricted
from tests.tiny import picture, tiny_model


def test_fewest_tokens_by_falling_mass() -> None:
    measured = VocabularyMass(torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64), 1, 1, 0.0)
    assert measured.active(0.5).tolist() == [1]
    assert measured.active(0.7).tolist() == [1, 3]
    assert measured.active(1.0).tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match="keep_mass"):
        measured.active(0.0)
    assert measured.most_used(3).tolist() == [1, 3, 2]
    with pytest.raises(UserError, match="has 4 tokens"):
        measured.most_used(5)


def test_mass_is_the_mean_of_the_connectors_probabilities() -> None:
    model, processor = tiny_model()
    images = [picture(32, 32), picture(70, 40, seed=1)]
    measured = measure_mass(model, processor, images)
    tiles = torch.cat([torch.from_numpy(processor.spec.cut(image)) for image in images])
    with torch.no_grad():
        p = model.model.connector.probabilities(model.model.encode_tiles(tiles).flatten(0, 1))
    assert measured.num_images == 2
    assert measured.num_visual_tokens == len(p)
    torch.testing.assert_close(measured.mass.float(), p.mean(0), atol=1e-6, rtol=1e-4)
    entropy = torch.distributions.Categorical(probs=p).entropy().mean()
    assert measured.mean_entropy == pytest.approx(float(entropy), rel=1e-5)


def test_restricted_export(tmp_path: Path) -> None:
    model, processor = tiny_model()
    image = picture(32, 32)
    measured = measure_mass(model, processor, [image])
    tiles = torch.from_numpy(processor.spec.cut(image))
    with torch.no_grad():
        whole = model.get_image_features(tiles).pooler_output
    summary = write_restricted(model, processor, measured, measured.active(0.9), tmp_path / "active")
    assert summary["num_active"] == len(measured.active(0.9)) < len(measured.mass)
    assert json.loads((tmp_path / "active" / "vocabulary.json").read_text()) == summary
    with torch.no_grad():
        restricted = model.get_image_features(tiles).pooler_output
    spread = torch.cdist(model.get_input_embeddings().weight, model.get_input_embeddings().weight).max()
    assert (restricted - whole).norm(dim=-1).mean() < 0.2 * spread
    config = json.loads((tmp_path / "active" / "config.json").read_text())
    assert config["connector_config"]["num_active"] == summary["num_active"]


def test_what_cannot_be_measured_is_refused() -> None:
    model, processor = tiny_model({"kind": "mlp"})
    with pytest.raises(UserError, match="connector is mlp"):
        measure_mass(model, processor, [])
    model, processor = tiny_model()
    with pytest.raises(UserError, match="no images"):
        measure_mass(model, processor, [])
    model.model.connector.keep_tokens(torch.tensor([1, 2]))
    with pytest.raises(UserError, match="already restricted"):
        measure_mass(model, processor, [picture(8, 8)])
