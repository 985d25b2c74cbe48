"""train.py by accelerate's own FSDP2 route, on CPU processes: torchrun tests/fsdp_on_cpu.py ARGUMENTS OF train.py

accelerate takes that route only where the backend is a GPU's: its choice of backend is the one thing replaced here.
"""

import runpy
from pathlib import Path

import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train/train.py"), run_name="__main__")
