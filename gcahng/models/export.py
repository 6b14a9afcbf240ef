"""Networks for other programs: ONNX, and PyTorch's exported programs (.pt2).

An exported file takes "images", uint8 (batch, 3, H, W) RGB, or (batch, H, W) gray for a network of glyphs. They are
decoded, resized and cropped, for which the file names the sizes and the interpolation. Scaling to the network's mean
and deviation, which it names too, is part of the file. It returns "embeddings", fp32 (batch, D), which are not
normalized and need no gradient. The batch size is free.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import gcahng
from gcahng.bounds import check_number
from gcahng.config import config_to_dict
from gcahng.data.glyphs import IMAGE_SIZE
from gcahng.data.reading import INTERPOLATION
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import atomic_write, writing
from gcahng.models.backbones import scaling
from gcahng.models.model_file import FORMAT, Model, load_onnx
from gcahng.models.onnx_network import INPUT, OUTPUT, OnnxNetwork
from gcahng.paths import check_target

CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-5
ABOUT_FILE = "gcahng.json"  # inside a .pt2


def export_model(model: Model, out: Path | str, *, opset: int | None = None, check: bool = True) -> float | None:
    """Write a network as ONNX or as an exported program, whole or not at all.

    Args:
        model: the trained network; it is exported on the CPU in evaluation mode.
        out: the file, .onnx or .pt2; it is replaced if it is there.
        opset: ONNX operator set, see `gcahng.bounds`; None: the exporter's choice.
        check: whether the result is run on random images and compared with the network before anything is written.

    Returns:
        The largest difference that the check saw, relative to the largest output; None without a check.

    Raises:
        UserError: the suffix is another one, an extra is missing, the network cannot be exported (with this operator
            set), its outputs differ from the network's by more than `TOLERANCE`, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".onnx", ".pt2"):
        raise UserError(f"out is {out}; it must end in .onnx or .pt2")
    if opset is not None and out.suffix == ".pt2":
        raise UserError(f"opset is {opset} and out is {out}; only ONNX has operator sets: leave opset out")
    check_number("opset", opset, none="None")
    if isinstance(model.network, OnnxNetwork):
        raise UserError(f"model is {model.path}, which is ONNX already; name a run folder or a checkpoint")
    check_target("out", out)
    network = model.network.cpu().eval()
    images = _random_images(model, 2)
    onnx = out.suffix == ".onnx"
    if onnx:
        require("onnx", "onnxscript", extra="export", purpose="export to ONNX")
        _check_opset(opset)
        if check:
            require("onnxruntime", extra="export", purpose="an ONNX file is checked (check=False leaves that out)")
    try:
        with _without_gradients(network):
            known = about(model)
            content = _to_onnx(network, images, known, opset) if onnx else _to_program(network, images, known)
    except UserError:
        raise
    except Exception as error:  # what PyTorch's exporter raises has no common class
        reason = [*str(error.__cause__ or error).split("\n"), type(error).__name__][0]
        raise UserError(
            f"{model.config.backbone.name} cannot be exported by this version of PyTorch: {reason}"
        ) from error
    worst = None
    if check:
        exported = OnnxNetwork(content) if onnx else torch.export.load(io.BytesIO(content)).module()
        worst = _difference(network, exported, model)
    with writing(out):
        atomic_write(out, lambda file: file.write(content))
    return worst


def about(model: Model) -> dict[str, str]:
    """What an exported file says about itself: plain text, or JSON where a value has parts."""
    config, preprocessing = model.config, model.preprocessing
    trained = {"config": config_to_dict(config), "step": model.step, "data_digest": model.data_digest}
    files = {
        "exif_rotate": config.data.rotates,
        "resize_shorter_side": preprocessing.resize,
        "interpolation": INTERPOLATION,
        "center_crop": preprocessing.crop,
    }
    of_glyphs = config.data.name == "glyphs"
    mean, deviation = scaling(model.network)
    return {
        "format": FORMAT,
        "gcahng_version": gcahng.__version__,
        "backbone": config.backbone.name,
        "embedding_dim": str(config.backbone.embedding_dim),
        "normalised": "false",
        "input": f"uint8 {('batch', *_image_shape(model))}".replace("'", ""),
        "size": json.dumps(_image_shape(model)[-2:]),
        "interpolation": json.dumps(None if of_glyphs else INTERPOLATION),
        "mean": json.dumps(mean),
        "deviation": json.dumps(deviation),
        "preprocessing": json.dumps(None if of_glyphs else files),
        "gcahng": json.dumps(trained),
    }


def onnx_network(path: Path | str) -> nn.Module:
    """An exported network that ONNX Runtime runs: uint8 images → embeddings.

    It runs on CUDA where ONNX Runtime has it, and returns its outputs on the device of the images.

    Args:
        path: the .onnx file.

    Raises:
        UserError: ONNX Runtime is missing; the file cannot be read, or `gcahng export` did not write it.
    """
    return load_onnx(Path(path)).network


def _check_opset(opset: int | None) -> None:
    """Raise UserError for an operator set that this version of onnx does not know."""
    from onnx.defs import onnx_opset_version

    if opset is not None and opset > (newest := onnx_opset_version()):
        raise UserError(f"opset is {opset}; it must be at most {newest}, the newest of the onnx that is installed")


def _to_onnx(network: nn.Module, images: Tensor, known: dict[str, str], opset: int | None) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            network,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    got = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise UserError(f"opset is {opset}; this network can be exported with operator set {got}")
    onnx.helper.set_model_props(proto, known)
    return proto.SerializeToString()


def _to_program(network: nn.Module, images: Tensor, known: dict[str, str]) -> bytes:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={ABOUT_FILE: json.dumps(known)})
    return buffer.getvalue()


@contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """Export weights that do not train: a program would otherwise record a graph for each of its outputs."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' warnings, which are about their own code; the files that they write are checked."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _difference(network: nn.Module, exported: Callable[[Tensor], Tensor], model: Model) -> float:
    """The largest difference of the outputs at several batch sizes, relative to the largest output."""
    worst = 0.0
    with torch.no_grad():
        for size in CHECKED_BATCHES:
            images = _random_images(model, size)
            expected, got = network(images), exported(images)
            if got.shape != expected.shape:
                raise UserError(
                    f"the exported network gives {tuple(got.shape)}, not {tuple(expected.shape)}; nothing was written"
                )
            difference = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
            if not difference <= TOLERANCE:  # so that a NaN is a difference
                raise UserError(
                    f"the exported network differs from the original by {difference:.2g} of the largest output "
                    f"at batch size {size}, more than {TOLERANCE:g}; nothing was written"
                )
            worst = max(worst, difference)
    return worst


def _image_shape(model: Model) -> tuple[int, ...]:
    if model.config.data.name == "glyphs":
        return IMAGE_SIZE, IMAGE_SIZE
    return 3, model.preprocessing.crop, model.preprocessing.crop


def _random_images(model: Model, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, *_image_shape(model)), dtype=torch.uint8, generator=generator)
