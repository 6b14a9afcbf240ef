"""Triton kernels and their launchers: forward and backward of each stem, without autograd. Installed as gcahng.kernels.

Importing this package needs no Triton; importing a module in it does. A launcher takes the NamedTuples of its stage
(gcahng/engine/stages/<stem>.py) and unpacks them at the kernel's launch. Names inside kernels: p_ pointer, b_ block, o_
offset, m_ mask. Each kernel has one configuration, in configs.py. What kernels share lies in launch.py (whole rows),
tiles.py (edges and the nodes at their ends), product.py, sums.py and functions.py.
"""
