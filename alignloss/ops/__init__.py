"""From hidden states to log-probabilities: the checked call, the walks over the vocabulary, and the ops made of them.

Imports backends, kernels and checks.
"""
