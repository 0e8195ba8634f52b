"""The study: methods of alignment compared in three scenarios, on models small enough to be trained here.

`world` is what they learn, `models` how one writes and is trained, `runs` one row of the table, `schedule` all of them,
`report` what they say. Imports alignloss alone of ours.
"""
