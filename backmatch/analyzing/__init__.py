"""``backmatch analyze``: the studies of :mod:`backmatch.analysis`, printed, drawn and stored.

Nothing is imported here, so that the command line can read :mod:`backmatch.analyzing.options`
without torch.

``analysis.json`` is one object:

- ``versions``: of backmatch, torch, NumPy and Python; ``threads``: of torch;
- ``options``: those of the run; ``interrupted``: whether it was cut short;
- ``failed``: by name, why a study came to no end;
- ``studies``: by name, each with ``name``, ``claim``, ``options`` (arguments of
  ``bm.analysis.NAME``, with which it can be made again), ``rows`` and ``elapsed_seconds``.

A row is described at :class:`backmatch.analysis.Study`; numbers have seven digits. With the same
versions and threads on the same machine everything but ``elapsed_seconds`` is the same from run to
run.
"""
