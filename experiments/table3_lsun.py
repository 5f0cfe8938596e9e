"""Table 3: table 1 for LSUN bedroom and church at 256x256, with the rows and columns of the paper.

    python -m experiments.table3_lsun --config configs/lsun_bedroom256.py --config.pretrained=google/ddpm-bedroom-256 \\
        --config.evaluate.reference=bedroom_train.npz --out DIR
    python -m experiments.table3_lsun --config configs/digits.py --out DIR
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

from experiments import common, grid, table1_fid

OPTIONS = table1_fid.OPTIONS | {
    "etas": ("0,1", table1_fid.OPTIONS["etas"][1]),
    "steps": ("10,20,50,100", table1_fid.OPTIONS["steps"][1]),
}

if __name__ == "__main__":
    common.start(table1_fid.main, OPTIONS, may_be_empty=grid.MAY_BE_EMPTY)
