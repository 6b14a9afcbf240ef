"""What every operation means: plain, readable PyTorch, any dtype, any device. Faster code is held to it."""
