"""train.py, and then the weights and grids of every process in a file of its own: torchrun ... FOLDER ARGUMENTS"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import settings
from safetensors.torch import save_file

import train

folder, *arguments = sys.argv[1:]
run = train.Run(settings.parse(arguments))
run.start()
run.train(run.settings.steps)
state = {name: tensor.clone() for name, tensor in run.bare_model.state_dict().items()}
save_file(state, f"{folder}/rank{run.rank}.safetensors")
