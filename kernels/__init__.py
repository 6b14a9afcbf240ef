"""Triton kernels and their launchers: forward and backward of each stem, without autograd. Installed as gcahng.kernels.

Importing this package needs no Triton; importing a module in it does. Names inside kernels: p_ pointer, b_ block,
o_ offset, m_ mask. Each kernel has one configuration, in configs.py.
"""
