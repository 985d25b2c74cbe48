"""A KAN on disk: model.safetensors (parameters, grids, masks, functions) and config.json. Nothing is pickled."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kansformer.kan.network import KAN

FORMAT = "kansformer.kan/1"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save(model: "KAN", folder: str | os.PathLike) -> None:
    """Write `folder`/model.safetensors and config.json, each through a temporary file: whole or absent."""
    from safetensors.torch import save_file

    if model.dtype not in DTYPES.values():
        raise ValueError(f"the network is in {model.dtype}; save it in one of {', '.join(DTYPES)}, as with .float()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, **model.config(), "inputs": model.inputs}
    config["dtype"] = str(config["dtype"]).removeprefix("torch.")
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights, text = folder / f"model.safetensors.{os.getpid()}", folder / f"config.json.{os.getpid()}"
    try:
        save_file(state, weights, metadata={"format": FORMAT})
        text.write_text(json.dumps(config, indent=1) + "\n")
        weights.replace(folder / "model.safetensors")
        text.replace(folder / "config.json")
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)


def load(kind: type["KAN"], folder: str | os.PathLike, device: torch.device | str | None = None) -> "KAN":
    """The network that `save` wrote to `folder`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, of another format, or does not fit the other, naming it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; KAN.save(folder) writes both files")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not json: {error}") from error
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ValueError(f"{folder / 'config.json'} does not describe a {FORMAT} network")
    try:
        inputs = config.pop("inputs")
        model = kind(**{**config, "dtype": DTYPES[config["dtype"]]})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a network: {error!r}") from error
    if not isinstance(inputs, list) or len(inputs) != model.in_features:
        raise ValueError(f"{folder / 'config.json'} names the inputs {inputs!r} of {model.in_features}")
    model.inputs = inputs
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is not a safetensors file: {error}") from error
    expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{folder / 'model.safetensors'} does not fit config.json in {len(wrong)} tensors, {name} first: it has "
            f"{found.get(name, 'none')} where {expected.get(name, 'none')} belongs"
        )
    model.load_state_dict(state)
    return model.to(device)
