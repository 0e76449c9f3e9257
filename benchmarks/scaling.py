"""Time against n, batch, m and threads.

    python benchmarks/scaling.py            # run, store results/scaling.json
    python benchmarks/scaling.py --readme   # the stored tables into docs/performance.md

The cases are those of ``backmatch bench --only scaling``.
"""

import stored
import tables

QUESTIONS = ("scaling",)

if __name__ == "__main__":
    stored.run("scaling", QUESTIONS, tables.scaling, __doc__, stored.PERFORMANCE)
