"""``backmatch bench``: kernels and steps beside their peers, answers checked before timing.

One file per question (:mod:`spd_solve`, :mod:`scaled_gram`, :mod:`weighted_gram`,
:mod:`conjugate_gradient`, :mod:`step`, :mod:`peers`, :mod:`scaling`) yields cases; :mod:`measure`
checks and times one; :mod:`report` and :mod:`figure` show them. Ours and its peers take turns on
rotating inputs, so that caches do not flatter and a machine that slows down slows all.

``bench.json`` is one object:

- ``machine``: ``date``, ``cpu``, ``gpu`` (on CUDA), ``device``, ``threads``, ``simd``, ``commit``
  (``-dirty`` if files differ from it) and the versions;
- ``options``: those of the run, ``quick`` among them; ``interrupted``: whether it was cut short;
- ``rates``: by dtype, ``fma_gflops`` (a loop of multiply-adds in registers on all threads),
  ``matrix_gflops`` (float64 on CUDA: the same on the matrix units) and ``copy_gbytes_per_second``
  (read and written bytes of a copy beyond the last-level cache), medians over all its rows;
- ``rows``: one per case.

A row has ``question``, ``case`` (``n``, ``batch``, ``m``, ``dtype``, .. as they apply), ``ours``
(which of the names below is this package) and

- ``times``: name -> ``median_seconds``, ``iqr_seconds`` (of one call on the whole batch),
  ``repeats``, ``calls_per_repeat``, ``systems_timed`` (a slow peer works on a slice of the batch;
  its times are scaled up to the batch);
- ``failed``: name -> why a peer has no time; ``error`` in place of ``times`` if ours was wrong;
- ``ratios``: peer -> its median over ours; ``best_peer``: the fastest one;
- ``gflops``: name -> rate by the arithmetic that the problem needs; ``fraction_of_fma``;
- ``bytes`` that must be read and written, ``fraction_of_copy`` (absent where meaningless);
- ``fma_gflops``, ``copy_gbytes_per_second``: the rates, measured in turn with this case (their
  fastest sample: a limit is what the machine can do);
- ``worst_scaled_residual``: name -> worst over the batch, in the unit that ``residual`` names;
- further fields of a question: ``iterations``, ``tensor_peak_bytes``, ``process_peak_bytes``, ...

Fields that end in ``seconds``, rates and ratios vary from run to run; the others do not.
"""
