"""What `gcahng bench` does: times and peaks of a training step, gated by a comparison with the reference."""
