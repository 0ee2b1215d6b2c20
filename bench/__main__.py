"""Time the ops and the model against stock, in one interleaved run on the device that is there.

    python bench ops                            every op of bert_fast.kernels.SPECS
    python bench model --only docstrings        some workloads of the model
    python bench all --output FILE.json         both, with a result file
    python bench compare A.json B.json          what got slower, or wrong: exit status 1
    python bench plots FILE.json                pictures
    python bench readme                         the README's figures, from bench/results/
    python bench tune                           launch configurations of this GPU
    python bench gpu                            what `make gpu` runs, in parts
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder in place of what is there: under `python -m bench` that is the repository, whose
    # folder kernels/ would hide a distribution of the same name that transformers imports.
    sys.path[0] = str(Path(__file__).resolve().parent)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

    from cli import main

    sys.exit(main(__doc__))
