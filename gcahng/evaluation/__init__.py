"""Measures trained networks: their embeddings, retrieval metrics and generated negatives."""
