"""How far a checkpoint's logits are from transformers': ``logit_difference.py HF NEMO [tf32]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_convert.parity import compare, multiply_in_float32

folder, checkpoint, *how = sys.argv[1:]
torch.backends.cuda.matmul.allow_tf32 = True  # as TransformerEngine asks of cuBLAS
if not how:
    multiply_in_float32()
found = compare(Path(folder), Path(checkpoint))
print(found.max_logit_difference / found.logit_spread)
