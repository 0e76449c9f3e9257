"""A whole exact step against back-propagation, torch.linalg and layer-wise methods.

    python benchmarks/step.py            # run, store results/step.json
    python benchmarks/step.py --readme   # put the stored tables into README.md, run nothing

The cases are those of ``backmatch bench --only step,peers``.
"""

import stored
import tables

QUESTIONS = ("step", "peers")

if __name__ == "__main__":
    stored.run("step", QUESTIONS, tables.step, __doc__)
