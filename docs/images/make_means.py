"""Draws means.svg: how the mean losses of an epoch decide what negatives do in the next one.

    gcahng train --steps 1200 --steps_per_epoch 200 --log_every 10 --seed 0 --threads 1 --device cpu --out runs/means
    python docs/images/make_means.py runs/means    # takes the losses from the run, and draws
    python docs/images/make_means.py               # draws what means.json holds

means.json holds the losses, because another processor gives others in the last digits.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from drawing import curve, frame, line, text

PICTURE = Path(__file__).with_name("means.svg")
NUMBERS = Path(__file__).with_name("means.json")
WIDTH, HEIGHT = 600, 600
LEFT, RIGHT = 58, 580
PLOTS = ((58, 168), (226, 336), (394, 454), (512, 572))  # top and bottom of each
STYLE = """
  svg { font-size: 14px; }
  .loss { stroke: var(--other); stroke-width: 1.5; fill: none; }
  .mean { stroke: var(--anchor); stroke-width: 3; fill: none; }
  .effect { stroke: var(--synthetic); stroke-width: 3; fill: none; }
"""


def measured(run: Path) -> dict:
    """The losses of a training run, as means.json holds them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [values for values in lines if values["kind"] == "train"]
    options = (run / "config.yaml").read_text(encoding="utf-8")
    alpha, beta = (float(re.search(rf"^  {name}: (\S+)$", options, re.MULTILINE)[1]) for name in ("alpha", "beta"))
    return {
        "alpha": alpha,
        "beta": beta,
        "lines_per_epoch": 20,
        "J_m": [round(values["J_m"], 4) for values in losses],
        "J_gen": [round(values["J_gen"], 3) for values in losses],
    }


def epoch_means(values: list[float], length: int) -> list[float]:
    return [sum(values[at : at + length]) / length for at in range(0, len(values), length)]


def loss_plot(values: list[float], means: list[float], place: tuple[int, int], title: str) -> list[str]:
    """A loss over the steps, and its mean over each epoch."""
    top, bottom = place
    most = max(values)
    width = (RIGHT - LEFT) / len(means)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / most

    steps = [(LEFT + (RIGHT - LEFT) * (i + 0.5) / len(values), y(value)) for i, value in enumerate(values)]
    drawn = [line(LEFT, bottom, RIGHT, bottom, "axis"), curve(steps, "loss"), text(20, top - 20, title, "title")]
    drawn += [line(LEFT + width * i, y(m), LEFT + width * (i + 1), y(m), "mean") for i, m in enumerate(means)]
    drawn += [
        text(LEFT + width * (i + 0.5), y(m) - 8 if i else y(m) + 22, f"{m:.3g}", "", "middle")
        for i, m in enumerate(means)
    ]
    return drawn


def effect_plot(values: list[float], place: tuple[int, int], title: str) -> list[str]:
    """What follows from the means, a number in [0, 1] for each epoch."""
    top, bottom = place
    width = (RIGHT - LEFT) / len(values)
    drawn = [line(LEFT, bottom, RIGHT, bottom, "axis"), text(20, top - 20, title, "title")]
    for i, value in enumerate(values):
        y = bottom - (bottom - top) * value
        drawn.append(line(LEFT + width * i, y, LEFT + width * (i + 1), y, "effect"))
        drawn.append(text(LEFT + width * (i + 0.5), y - 7 if value < 0.7 else y + 20, f"{value:.2f}", "", "middle"))
    return drawn


def picture() -> str:
    """The whole picture, as SVG."""
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    metric, generator = (epoch_means(numbers[name], numbers["lines_per_epoch"]) for name in ("J_m", "J_gen"))
    pulls = [1.0, *(math.exp(-numbers["alpha"] / mean) for mean in metric[:-1])]
    weights = [0.0, *(1 - math.exp(-numbers["beta"] / mean) for mean in generator[:-1])]
    drawn = [
        *loss_plot(numbers["J_m"], metric, PLOTS[0], "J_m, and its mean over each epoch"),
        *loss_plot(numbers["J_gen"], generator, PLOTS[1], "J_gen, and its mean over each epoch"),
        *effect_plot(pulls, PLOTS[2], "pull = exp(−α / the last epoch's mean of J_m)"),
        *effect_plot(weights, PLOTS[3], "weight of J_syn = 1 − exp(−β / the last epoch's mean of J_gen)"),
    ]
    width = (RIGHT - LEFT) / len(metric)
    for top, bottom in PLOTS:
        drawn += [line(LEFT + width * i, top, LEFT + width * i, bottom, "dashed") for i in range(1, len(metric))]
    drawn.append(text(RIGHT, HEIGHT - 8, f"{len(metric)} epochs of 200 steps", "quiet", "end"))
    title = (
        "Losses of six epochs, and their means. The mean of J_m decides how far negatives are pulled in the next, "
        "and the mean of J_gen how much they count."
    )
    return frame(WIDTH, HEIGHT, title, drawn, style=STYLE)


if __name__ == "__main__":
    if sys.argv[1:]:
        NUMBERS.write_text(json.dumps(measured(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
