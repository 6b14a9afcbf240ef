"""Networks from run folders, checkpoints and safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gcahng.errors import UserError
from gcahng.models.model_file import FORMAT, load_model, save_model

FinishedRun = tuple[Path, dict[str, Any]]


def test_a_network_from_a_run_and_from_safetensors(finished_run: FinishedRun, tmp_path: Path) -> None:
    run, _ = finished_run
    model = load_model(run)
    assert not model.network.training and model.config.backbone.embedding_dim == 16 and model.step == 6
    images = torch.randint(256, (2, 32, 32), dtype=torch.uint8)
    assert model.network(images).shape == (2, 16)

    file = tmp_path / "model.safetensors"
    save_model(file, model.network.state_dict(), model.config, step=model.step, data_digest=model.data_digest)
    again = load_model(file)
    assert (again.config, again.step, again.data_digest) == (model.config, model.step, model.data_digest)
    assert torch.equal(again.network(images), model.network(images))


def test_color_is_turned_gray(finished_run: FinishedRun) -> None:
    network = load_model(finished_run[0]).network
    gray = torch.randint(256, (2, 32, 32), dtype=torch.uint8)
    color = gray[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(network(color), network(gray), rtol=1e-4, atol=1e-5)
    # Colors whose luma (ITU-R BT.601) is a whole number, and that number.
    palette = torch.tensor([[0, 88, 196, 74], [0, 202, 109, 131], [255, 255, 255, 255], [0, 226, 117, 146]])
    painted = palette[torch.randint(4, (2, 32, 32))].to(torch.uint8)
    torch.testing.assert_close(network(painted[..., :3].movedim(-1, 1)), network(painted[..., 3]), rtol=1e-4, atol=1e-5)


def test_files_that_hold_no_model(finished_run: FinishedRun, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        load_model(file)
    file.write_bytes(b"none")
    with pytest.raises(UserError, match="is not a safetensors file, or it is damaged"):
        load_model(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="was not written by gcahng"):
        load_model(file)
    for about in ({}, {"gcahng": "{"}, {"gcahng": "{}"}, {"gcahng": "5"}):
        save_file({"a": torch.zeros(1)}, tmp_path / "mute.safetensors", {"format": FORMAT} | about)
        with pytest.raises(UserError, match="mute.safetensors does not say how its network was made, or is damaged"):
            load_model(tmp_path / "mute.safetensors")
    model = load_model(finished_run[0])
    save_model(file, {"a": torch.zeros(1)}, model.config)
    with pytest.raises(UserError, match="does not hold the weights of glyph_conv"):
        load_model(file)
