"""`manta check`: validates a model repository without serving it. `command` is the way in.

`verdicts` says what is wrong with a model, `trial` loads a version in a process of its own.
"""
