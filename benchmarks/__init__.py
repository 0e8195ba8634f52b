"""Time and memory of alignloss beside full logits and its peers; results/ holds what was measured, and on what."""
