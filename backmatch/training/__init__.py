"""One training run from the command line: data, model, loop, run folder and checkpoints.

Nothing is imported here, so that the command line can read
:mod:`backmatch.training.options` and :mod:`backmatch.training.config` without torch.
"""
