"""What a trained network is worth: its embeddings, retrieval metrics and generated negatives."""
