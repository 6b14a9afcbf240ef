"""Networks that turn images into embeddings: built, loaded, saved, imported and exported."""
