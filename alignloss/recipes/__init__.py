"""What goes beside a loss: labels and pairs, weights, baselines, a reference that moves.

Imports ops, checks and `logprob`; no module needs it.
"""
