"""The study: methods of alignment compared in three scenarios, on models small enough to be trained here.

`methods` is what each method does, in any world. `generated` is a small model in the `world` of its own (`models` makes
and trains it), `sentiment` a real one that a lexicon rewards; `schedule` runs a profile of either. `paper` trains and
scores (`harness`) what a `plan` says. `claims` and `report` say what a table of runs shows.
"""
