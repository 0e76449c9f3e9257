"""``backmatch compare``: several methods from the same weights on the same batches.

:mod:`methods` names what can be compared, :mod:`options` reads the flags, :mod:`tuning` chooses a
learning rate per method on samples held out of the training set, :mod:`trial` trains one net and
:mod:`schedule` all of them in turn, :mod:`folder` keeps what is done, :mod:`summary` computes the
table that :mod:`table` shows and :mod:`figure` (with :mod:`continuum`) draws.

Nothing is imported here, so that the command line can read :mod:`backmatch.comparing.options`
without torch.

``compare.json`` is one object:

- ``options``: those of the comparison; ``versions``; ``machine``: what its times depend on;
- ``began_unix_seconds``: when it was started;
- ``data``: ``train`` (``validation`` of them held out in tuning) and ``test`` samples,
  ``classes``, ``sha256`` of all values;
- ``steps_per_epoch`` on the full training set, ``total_steps`` of a run;
- ``target``: ``accuracy`` and ``source``, how it came about;
- ``methods``: one object per method, in the order of the table: ``name``, ``title``, ``options``
  (of ``backmatch train``), ``lr`` (the chosen rate), ``edge`` (whether it is the smallest or
  largest that was tried), ``tuning`` (per rate ``lr``, ``accuracy`` of every tuning seed on the
  held-out samples, 0 where it diverged, their ``mean`` and how many ``diverged``),
  ``tuning_runs`` and ``summary``;
- ``summary``: ``accuracy`` (per reported epoch), ``best``, ``target_steps``, ``target_seconds``
  and ``step_ms``, each with ``mean``, ``sd`` (n - 1) and ``seeds`` (one value per seed, ``null``
  where there is none), ``reached`` (seeds that reached the target), ``diverged`` and
  ``unconverged_steps`` (steps in which a conjugate gradient stopped at its cap);
- ``runs``: the lines of ``runs.jsonl`` after its first.

A run has ``kind`` (``"tuning"`` or ``"final"``), ``method``, ``lr``, ``seed``, ``weights_sha256``
(of its initial weights), ``train_loss`` (of every batch before its step), ``steps``,
``accuracy`` and ``loss`` (evaluations, the first one before any step, on the held-out samples or on
the test set), ``training_seconds`` (steps alone, at every evaluation), ``step_ms``,
``unconverged_steps`` and ``error`` (``null``, or why it ended early).

Fields that end in ``_seconds`` or ``_ms`` vary from run to run, and ``machine`` with the machine;
all others are the same whenever the same command runs on the same machine, interrupted or not.
"""
