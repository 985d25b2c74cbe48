"""KAN edges in any transformer: kanify replaces feed-forward modules in place, and keeps the model's function.

A block y = down(act(up x)) is a KAN layer already, whose every edge has the function w_oi act(u). `kanify` adds
splines, zero at the start, beside the activation,

    y_o = b_o + sum_i (w_oi act(u_i) + sum_c W_oic B_c(u_i)),    u = up x,

so any activation (gelu, gelu_new, quick_gelu, ...) and any linear layer (nn.Linear, GPT-2's Conv1D) stay what they are.
Nothing outside the model's own modules changes: no class, no function of transformers.
"""

import fnmatch
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kansformer.layers import FFN_TYPES, KANLinear, feed_forward, observing

PLAN = "kanify.json"
ADDED = "kanified."  # begins the saved names of what kanify added: a new block may have names of the one it replaced


class KANDown(nn.Module):
    """y = down(act(u)) + splines(u): the second layer of a block, given the input of its activation."""

    def __init__(self, down: nn.Module, act: nn.Module, splines: KANLinear) -> None:
        super().__init__()
        self.down, self.act, self.splines = down, act, splines
        if getattr(act, "inplace", False):
            act.inplace = False  # the splines need its input too

    @property
    def weight(self) -> Tensor:
        """The linear layer's: some models look at the dtype of what they call."""
        return self.down.weight

    def forward(self, u: Tensor) -> Tensor:
        return self.down(self.act(u)) + self.splines(u)


def kanify(
    model: nn.Module,
    pattern: str = "*",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    reinitialize: bool = False,
    ffn_type: str = "kan_gated",
    grid_size: int = 3,
    spline_order: int = 1,
    grid_range: tuple[float, float] = (-4.0, 4.0),
) -> list[str]:
    """Replace the feed-forward blocks of a model by KAN blocks, in place.

    From then on the model's `save_pretrained` (and so Trainer) writes what `load_kanified` reads: see `save_kanified`.

    The model runs once: a block is where an elementwise module takes just what a linear layer gives, and gives just
    what another takes. Its second layer becomes a `KANDown`, its activation moves there, and the model runs again:
    outputs that changed undo everything. Dropout between the two then comes before the activation.

    Args:
        model: GPT-2, BERT, ViT and the like. Its blocks may span modules, as BERT's do.
        pattern: which blocks: a shell pattern for the innermost module that holds both layers, such as
            "transformer.h.*.mlp" for GPT-2, "encoder.layer.[0-3]" for BERT.
        inputs: keyword arguments of the model. Where given, they also set the range of each spline's input. None: made
            from the configuration, for token ids or images.
        reinitialize: replace every module that fits `pattern` (which maps (..., d) to (..., d)) by a new block
            `ffn_type` with as many parameters. The function is not kept; for blocks that are not of the form above.
        grid_size, spline_order, grid_range: of the splines, as in `KANLinear`.
    Returns:
        Names of the blocks that were replaced.
    Raises:
        ValueError: if no block is found, an activation is shared between blocks, or the outputs would change.
    """
    if getattr(model, "kanified", None):
        raise ValueError("the model is kanified already: replace all blocks in one call, or start from the original")
    if not isinstance(inputs, Mapping | None):
        raise TypeError(f"inputs must be keyword arguments of the model, {{name: tensor}}, not {type(inputs).__name__}")
    given, inputs = inputs is not None, inputs if inputs is not None else _example(model)
    splines = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": list(grid_range)}
    if ffn_type not in FFN_TYPES:
        raise ValueError(f"ffn_type is {ffn_type!r}; choose one of {', '.join(FFN_TYPES)}")
    if reinitialize:
        splines = {name: value for name, value in splines.items() if name in FFN_TYPES[ffn_type].fields}
        plan = _modules_to_replace(model, pattern, inputs, {"ffn_type": ffn_type, **splines})
    else:
        plan = [step | splines for step in _chains(model, inputs) if fnmatch.fnmatch(step["block"], pattern)]
    if not plan and reinitialize:
        raise ValueError(f"the model runs no module whose name fits {pattern!r}")
    if not plan:
        raise ValueError(
            f"no block of the form down(act(up x)) fits {pattern!r}. Are the model's blocks gated? kansformer.convert "
            "keeps the function of Llama, Mistral, Qwen2, Qwen3 and SmolLM3; of others, name the blocks with pattern= "
            "and reinitialize=True to replace them by new ones of as many parameters, which loses their function"
        )
    expected = None if reinitialize else _run(model, inputs)
    original = {name: model.get_submodule(name) for step in plan for name in _touched(step)}
    _replace(model, plan)
    if not reinitialize:
        found = _run(model, inputs)
        if not all(torch.allclose(a, b, atol=1e-5, rtol=1e-5, equal_nan=True) for a, b in zip(found, expected)):
            for name, module in original.items():
                model.set_submodule(name, module)
            raise ValueError(
                "the outputs change: an activation feeds more than its second layer, or the model is random; choose "
                "fewer blocks with pattern=. The model is as it was"
            )
        if given:
            _calibrate(model, plan, inputs)
    _remember(model, plan)
    return [step["block"] for step in plan]


def _remember(model: nn.Module, plan: list[dict]) -> None:
    model.kanified = plan
    if isinstance(model, PreTrainedModel):  # its own would write names that stock transformers does not know
        model.save_pretrained = functools.partial(save_kanified, model)
        model.register_load_state_dict_pre_hook(_from_saved_names)


def _saved_name(plan: list[dict], name: str) -> str:
    """What a checkpoint calls a tensor: what was there before keeps its name, what kanify added begins with `ADDED`."""
    for step in plan:
        if "down" not in step and name.startswith(f"{step['block']}."):
            return ADDED + name
        if "down" in step and name.startswith(inside := f"{step['down']}.down."):
            return f"{step['down']}.{name.removeprefix(inside)}"
        if "down" in step and name.startswith(f"{step['down']}.splines."):
            return ADDED + name
    return name


def _from_saved_names(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before load_state_dict, through which Trainer reads checkpoints, and lets pass what it does not find."""
    for name in model.state_dict():
        saved = _saved_name(model.kanified, name)
        if saved != name and prefix + saved in state:
            state[prefix + name] = state.pop(prefix + saved)


def save_kanified(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    **options: object,
) -> None:
    """Write an ordinary checkpoint of the base model that holds what `kanify` added too, and beside it the plan.

    Stock transformers loads the folder as the model it was, without splines, and warns of them; `load_kanified` with
    them. `load_state_dict` of a kanified model takes the files as they are, and so does Trainer where it resumes or
    goes back to the best model. Arguments are those of `save_pretrained`, whose place it takes on a kanified model, but
    save_original_format is False at first: names of older versions of transformers are none that load_state_dict knows.
    """
    if not getattr(model, "kanified", None):
        raise ValueError("the model has no replaced blocks: call kanify(model) first, or save_pretrained")
    plan = _plan_now(model)
    state = model.state_dict() if state_dict is None else state_dict
    state = {_saved_name(model.kanified, name): tensor for name, tensor in state.items()}
    options = {"save_original_format": False} | options
    folder = Path(folder)
    type(model).save_pretrained(model, folder, state_dict=state, is_main_process=is_main_process, **options)
    if is_main_process:
        _write(folder / PLAN, lambda path: path.write_text(json.dumps(plan, indent=2) + "\n"))


def _plan_now(model: nn.Module) -> list[dict]:
    """The plan with the grid sizes that `extend_grid` may have changed since."""
    plan = []
    for step in model.kanified:
        place = step.get("down", step["block"])
        sizes = {layer.grid_size for layer in model.get_submodule(place).modules() if isinstance(layer, KANLinear)}
        if len(sizes) > 1:
            raise ValueError(f"{place} has grids of sizes {sorted(sizes)}: extend them to one size to save the model")
        plan.append(step | {"grid_size": sizes.pop()} if sizes else step)
    return plan


def load_kanified(folder: str | os.PathLike, **options: object) -> PreTrainedModel:
    """The model that `save_kanified` wrote; `options` are those of `from_pretrained`."""
    folder = Path(folder)
    if not (folder / PLAN).exists():
        raise ValueError(f"{folder} has no {PLAN}: it was not written by save_kanified")
    plan, added = json.loads((folder / PLAN).read_text()), _read_added(folder, options.get("variant"))
    stock = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    model = _expecting_more(stock).from_pretrained(folder, **options)
    model.__class__ = stock
    _remember(model, plan)
    _replace(model, plan)
    model.load_state_dict(added, strict=False)
    wanted = {name for name in model.state_dict() if _saved_name(plan, name).startswith(ADDED)}
    if wanted != added.keys():
        raise ValueError(f"the weights in {folder} do not fit its {PLAN}: {sorted(wanted ^ added.keys())}")
    return model


def _read_added(folder: Path, variant: str | None) -> dict[str, Tensor]:
    stem = f"model.{variant}" if variant else "model"
    whole, added = folder / f"{stem}.safetensors", {}
    for path in [whole] if whole.exists() else folder.glob(f"{stem}-*-of-*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(ADDED)]  # noqa: SIM118, no dictionary
            added |= {name.removeprefix(ADDED): file.get_tensor(name) for name in names}
    return added


def _expecting_more(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class in all but one: it loads without a report of the tensors that are kanify's."""
    expected = {*(stock._keys_to_ignore_on_load_unexpected or ()), re.escape(ADDED)}
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names | {"_keys_to_ignore_on_load_unexpected": expected})


def _replace(model: nn.Module, plan: list[dict]) -> None:
    for step in plan:
        options = {key: step[key] for key in ("grid_size", "spline_order", "grid_range") if key in step}
        like = next(model.get_submodule(step.get("down", step["block"])).parameters())
        options |= {"device": like.device, "dtype": like.dtype}
        if "down" in step:
            down, act = model.get_submodule(step["down"]), model.get_submodule(step["act"])
            splines = KANLinear(step["in_features"], step["out_features"], base_activation=None, **options)
            nn.init.zeros_(splines.spline_weight)
            model.set_submodule(step["act"], nn.Identity())
            model.set_submodule(step["down"], KANDown(down, act, splines))
        else:
            block = feed_forward(step["ffn_type"], step["hidden_size"], step["intermediate_size"], **options)
            model.set_submodule(step["block"], block)
    model.train(model.training)


def _touched(step: dict) -> list[str]:
    return [step["act"], step["down"]] if "down" in step else [step["block"]]


def _chains(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[dict]:
    """Every up -> act -> down through which tensors went unchanged, in the order of the run."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # holds every tensor, so that no address is used twice

    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0], output))

    leaves = [module for module in names if not any(module.children())]
    _run(model, inputs, record, leaves)
    made_by = {_address(y): module for module, _, y in calls if _is_linear(module)}
    acts = [(module, x, y) for module, x, y in calls if _is_elementwise(module)]
    activated = {_address(y): (module, made_by.get(_address(x))) for module, x, y in acts}
    chains = {}
    for down, x, y in calls:
        act, up = activated.get(_address(x), (None, None))
        if up is None or not _is_linear(down):
            continue
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names[up].split("."), names[down].split(".")))
        step = {"block": ".".join(name for name, _ in pairs), "act": names[act], "down": names[down]}
        if not step["block"] and isinstance(model, PreTrainedModel):
            continue  # not a block: a pooler and the head behind it
        step |= {"in_features": x.shape[-1], "out_features": y.shape[-1]}
        if chains.setdefault(act, step) != step:
            raise ValueError(
                f"{step['act']} serves {step['down']} and others: give each block an activation of its own"
            )
    return list(chains.values())


def _modules_to_replace(model: nn.Module, pattern: str, inputs: Mapping[str, Tensor], options: dict) -> list[dict]:
    names = {module: name for name, module in model.named_modules() if name and fnmatch.fnmatch(name, pattern)}
    outer = {m: name for m, name in names.items() if not any(name.startswith(f"{other}.") for other in names.values())}
    plan = []

    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape):
            raise ValueError(f"{outer[module]} does not map one tensor (..., d) to another: choose modules that do")
        size, d = sum(p.numel() for p in module.parameters()), output.shape[-1]
        kan = {key: value for key, value in options.items() if key != "ffn_type"}
        unit = sum(p.numel() for p in feed_forward(options["ffn_type"], d, 1, device="meta", **kan).parameters())
        step = {"block": outer[module], "hidden_size": d, "intermediate_size": max(8, round(size / unit / 8) * 8)}
        if step | options not in plan:
            plan.append(step | options)

    _run(model, inputs, record, list(outer))
    return plan


def _calibrate(model: nn.Module, plan: list[dict], inputs: Mapping[str, Tensor]) -> None:
    downs = [model.get_submodule(step["down"]) for step in plan]
    _run(model, inputs, lambda module, args, kwargs, output: module.splines.update_grid(args[0]), downs)


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor], hook=None, modules=()) -> list[Tensor]:
    """Tensors that the model gives in evaluation mode; `hook` sees the calls of `modules`."""
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    with observing(model, hooks):
        outputs = model(**inputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _example(model: nn.Module) -> dict[str, Tensor]:
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    device = next(model.parameters()).device
    if name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        pixels = torch.linspace(-1, 1, config.num_channels * size * size, device=device, dtype=model.dtype)
        return {name: pixels.view(1, config.num_channels, size, size)}
    if name == "input_ids" and not config.is_encoder_decoder:
        return {name: torch.arange(2, 10, device=device).unsqueeze(0) % config.vocab_size}
    raise ValueError(f"{type(model).__name__} needs an example to run on: pass inputs={{argument: tensor, ...}}")


def _address(x: Tensor) -> tuple:
    return x.data_ptr(), x.numel(), x.device


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether a module without parameters acts on every element alone, and does something."""
    if isinstance(module, nn.Dropout | nn.Identity) or any(True for _ in module.parameters()):
        return False
    x = torch.linspace(-2, 2, 12).view(3, 4)
    try:
        y, part = module(x.clone()), module(x[:1, :2].clone())  # it may work in place
    except (TypeError, ValueError, RuntimeError):
        return False
    alone = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(part, y[:1, :2])
    return alone and not torch.equal(x, y)


def _write(path: Path, write) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    write(partial)
    partial.replace(path)
