"""Reads the numbers of the authors' code (float64, dropout 0) and compares with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import gcahng

FOLDER = Path(__file__).parent
CASES = ("c5_k3_d16_l1_h2", "c6_k4_d24_l3_h3", "c7_k2_d32_l2_h4", "c9_k3_d48_l2_h4")
# Cancels in the mathematics: the authors' gradient and drift are rounding noise, ours may be exactly zero.
CANCELS = "edge_model.att.k_linear.bias"


@dataclass
class Golden:
    """One golden file: its configuration and tensors."""

    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def loss(self, **options) -> gcahng.GCAHNGLoss:
        """GCAHNGLoss in float64 with the golden weights and running means."""
        config = self.config
        gca = gcahng.GCAHNGLoss(
            config["n_class"],
            config["dim"],
            layers=config["layers"],
            heads=config["heads"],
            alpha=config["alpha"],
            beta=config["beta"],
            dot_weight=config["dot_weight"],
            div_weight=config["div_weight"],
            softmax_factor=config["softmax_factor"],
            edge_dropout=0.0,
            **({"compat": "official"} | options),
        ).double()
        gcahng.load_official_state_dict(gca, self.under("init."))
        gca.mean_metric, gca.mean_generator = config["j_avg"], config["j_gen"]
        return gca

    def feature_extractor(self) -> nn.Module:
        features = self.config["feature_dim"]
        model = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, self.config["dim"])).double()
        model.load_state_dict(self.under("init.feature_extractor."))
        return model


def load(case: str) -> Golden:
    path = FOLDER / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        return Golden(json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def close(actual: Tensor, golden: Tensor, tolerance: float, name: str = "") -> None:
    """|a - b| ≤ tolerance · max|b| + 1e-12."""
    assert actual.shape == golden.shape, name
    error = (actual.double() - golden.double()).abs().max().item()
    allowed = tolerance * golden.double().abs().max().item() + 1e-12
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def canonical(labels: Tensor) -> Tensor:
    """The batch's rows in canonical order."""
    return torch.sort(labels, stable=True).indices
