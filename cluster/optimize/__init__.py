"""`manta optimize`: a faster version of a model, kept only when it is right.

`command` is the order of the steps, `target` what is on disk, `samples` the inputs, `export` the
candidates, `bench` runs them, `judge` says whether they are right and faster. What `command`
imports at once is without torch, so that `manta` itself starts fast.
"""
