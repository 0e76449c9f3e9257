"""Kernels against SciPy and torch: time, ratios, rates, worst residual, peak memory.

    python benchmarks/kernels.py            # run, store results/kernels.json and kernels.png
    python benchmarks/kernels.py --readme   # put the stored table into README.md, run nothing

The cases are those of ``backmatch bench --only spd_solve,scaled_gram,weighted_gram,cg``.
"""

import stored
import tables

QUESTIONS = ("spd_solve", "scaled_gram", "weighted_gram", "cg")

if __name__ == "__main__":
    stored.run("kernels", QUESTIONS, tables.kernels, __doc__)
