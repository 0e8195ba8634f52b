"""From hidden states to a loss: the modules, the mixtures, and what they return.

Imports losses, ops, backends, checks and `logprob`.
"""
