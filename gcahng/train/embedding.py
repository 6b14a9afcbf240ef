"""The former place of `gcahng.evaluation.embed`."""

from gcahng.evaluation.embed import EmbedOptions, EmbedResult, embed_to_file

__all__ = ["EmbedOptions", "EmbedResult", "embed_to_file"]
