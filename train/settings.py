"""The settings of a run: one yaml file, any key overridden on the command line, all of it checked before any work."""

import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kansformer import FFN_TYPES


@dataclass
class Settings:
    # what is trained, on what
    model: str = "configs/models/tiny_kan_fourier.json"  # a json that AutoConfig reads, or a saved model to start from
    model_overrides: dict = field(default_factory=dict)  # its fields to change; --model.hidden_size 256
    data: str = "tinyshakespeare"  # bundled text, a file or folder of .txt/.md/.jsonl[.bz2|.gz], or hub:NAME[:CONFIG]
    text_column: str = "text"  # the text's field in .jsonl files and hub datasets
    max_documents: int | None = None  # read at most so many
    tokenizer: str = "byte"  # or bpe:SIZE, trained on the training text, or a tokenizer folder or name
    val_split: str = "tail"  # tail: the end of the text; document: whole documents, by hash; file: files named valid.*
    val_fraction: float = 0.1
    sequence_length: int = 256
    # how
    steps: int = 1000
    batch_size: int = 16  # sequences a step, over all processes and accumulation
    micro_batch_size: int | None = None  # sequences a process holds at once; the rest is accumulated. null: its share
    optimizer: str = "adamw"  # or muon: matrices by orthogonalised momentum, the rest by AdamW at the same rate
    learning_rate: float = 1e-3
    min_lr_ratio: float = 0.1  # where the cosine ends, as a share of learning_rate
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings do not decay
    spline_lr_ratio: float = 1.0  # of learning_rate, for spline coefficients
    spline_weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    grid_update_steps: list = field(default_factory=list)  # [100, 200]: before these steps, fit the grids to the inputs
    grid_update_spread: float = 4.0  # standard deviations a grid then reaches on either side of its input's mean
    coarse_grids: list = field(default_factory=list)  # [[500, 3]]: grids of 3 intervals until step 500
    seed: int = 0
    # on what
    device: str = "auto"  # auto: a GPU where there is one; cpu
    processes: int | None = None  # stop unless the launcher started exactly so many
    precision: str = "no"  # no: fp32; bf16: autocast
    compile: bool = False
    gradient_checkpointing: bool = False
    # what is written
    output_dir: str = "runs/train"
    cache_dir: str = "runs/cache"  # token files, shared between runs
    verify_data: bool = True  # compare the token files' digests at the start: about a second a GB
    log_every: int = 10
    eval_every: int = 250
    eval_batches: int | None = None  # evaluate on so many batches, evenly spread over the text; null: all of it
    save_every: int = 500
    keep_checkpoints: int = 2  # the newest ones
    keep_best: bool = True  # and the one of the lowest validation loss: an evaluation that finds it saves it
    final_model: str = "last"  # what model/ holds: last, or best (by validation loss; needs keep_best)
    tracker: str | None = None  # an accelerate tracker beside metrics.jsonl, such as tensorboard
    spike_window: int = 100  # a loss spike is measured against so many steps before it
    spike_threshold: float | None = 10.0  # warn of a loss so many robust standard deviations above their median
    out_of_grid_threshold: float | None = 0.25  # warn of a layer with a greater share of its inputs outside its grid
    resume: str = "auto"  # auto: go on from the newest whole checkpoint of output_dir; none: refuse a used output_dir
    max_minutes: float | None = None  # then save and stop, as on SIGTERM

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            setattr(self, name, _typed(name, getattr(self, name), kind))
        for name in (
            *("steps", "batch_size", "sequence_length", "learning_rate", "log_every", "eval_every", "save_every"),
            *("grid_update_spread", "spike_window"),
        ):
            _check(name, getattr(self, name), getattr(self, name) > 0, "must be positive")
        for name in (
            *("micro_batch_size", "max_documents", "max_grad_norm", "processes", "max_minutes", "keep_checkpoints"),
            *("spike_threshold", "out_of_grid_threshold", "eval_batches"),
        ):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "must be positive, or null for none")
        for name in ("warmup_steps", "weight_decay", "spline_weight_decay", "spline_lr_ratio", "seed"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "must not be negative")
        for name in ("beta1", "beta2"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "must lie in [0, 1)")
        _check("min_lr_ratio", self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "must lie in [0, 1]")
        _check("val_fraction", self.val_fraction, 0 < self.val_fraction < 1, "must lie strictly between 0 and 1")
        valid = all(type(step) is int and step >= 0 for step in self.grid_update_steps)
        _check("grid_update_steps", self.grid_update_steps, valid, "must be a list of steps, such as [100, 200]")
        pairs = [pair if isinstance(pair, (list, tuple)) else [] for pair in self.coarse_grids]
        valid = all(len(pair) == 2 and all(type(number) is int for number in pair) for pair in pairs)
        ends = [[0, 0], *pairs, [self.steps, math.inf]] if valid else []
        rule = f"must be pairs [step, grid_size], both rising, the steps below {self.steps}, such as [[500, 3]]"
        valid = valid and all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(ends))
        _check("coarse_grids", self.coarse_grids, valid, rule)
        if self.precision == "fp16":
            raise ValueError(
                "precision fp16 is not supported: its loss scale overflows now and then and skips those steps, while "
                "here a non-finite gradient stops the run; use bf16, which needs no scale, or no"
            )
        choices = {
            **{"val_split": ("tail", "document", "file"), "device": ("auto", "cpu"), "precision": ("no", "bf16")},
            **{"final_model": ("last", "best"), "resume": ("auto", "none"), "optimizer": ("adamw", "muon")},
        }
        for name, allowed in choices.items():
            _check(name, getattr(self, name), getattr(self, name) in allowed, f"must be one of {', '.join(allowed)}")
        _check("final_model", self.final_model, self.final_model == "last" or self.keep_best, "needs keep_best: true")


# Keys that change neither the weights nor the text: they may differ between a checkpoint and the run that resumes it.
# Where text and model lie is among them, as the text's digest and the model's fields are compared themselves.
FREE_KEYS = {
    *("data", "model", "model_overrides"),
    *("micro_batch_size", "device", "processes", "compile", "gradient_checkpointing", "output_dir", "cache_dir"),
    "verify_data",
    *(
        "log_every",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep_checkpoints",
        "keep_best",
        "final_model",
        "resume",
        "max_minutes",
    ),
    *("tracker", "spike_window", "spike_threshold", "out_of_grid_threshold"),
}


def parse(arguments: list[str]) -> Settings:
    """Settings from `[FILE.yaml] [--KEY VALUE | --KEY=VALUE | --model.FIELD VALUE] ...`; the command line wins.

    Raises:
        ValueError: for an unknown key (naming the nearest known one), a wrong type or a value out of range.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{parse.__doc__.splitlines()[0]}\n\n{inspect.getsource(Settings).split('    def ')[0]}")
        raise SystemExit
    values: dict = {}
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("--"):
        path = Path(arguments.pop(0))
        if not path.is_file():
            raise FileNotFoundError(f"settings file {str(path)!r} does not exist (looked from {Path.cwd()})")
        values = yaml.safe_load(path.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    if values.get("precision") is False:
        values["precision"] = "no"  # which yaml reads as false
    values["model_overrides"] = dict(values.get("model_overrides") or {})
    texts = {f.name for f in dataclasses.fields(Settings) if f.type is str}
    while arguments:
        option = arguments.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ValueError(f"expected --key value, not {option!r}")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise ValueError(f"{option} needs a value")
            value = arguments.pop(0)
        target, name = (values["model_overrides"], key[6:]) if key.startswith("model.") else (values, key)
        # A text is taken as it stands: yaml reads a folder named 2024_11 as a number
        target[name] = value if target is values and name in texts else _number(yaml.safe_load(value))
    known = [f.name for f in dataclasses.fields(Settings)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown setting {key!r}{_nearest(key, known)}")
    return Settings(**values)


# Fields that transformers takes from a json and stores under other names, or not at all
OLD_FIELDS = {"auto_map", "torch_dtype", "rope_theta", "rope_scaling"}
# What the width of a block of given parameters depends on
BLOCK_FIELDS = {"ffn_type", "hidden_size", "grid_size", "spline_order", "base_activation", "project_value"}
BLOCK_FIELDS |= {"match_ffn", "match_reference", "match_reference_size"}


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration: the json file, then what follows from the tokenizer, then the overrides.

    The vocabulary is the tokenizer's, rounded up to a multiple of 64 (shards and tensor cores want that). The json's
    intermediate_size belongs to its block: where an override changes that, the width at which blocks have the
    parameters of its match_reference_size (of the usual width, for another hidden_size or match_reference) takes its
    place, up to multiples of 8, unless intermediate_size is overridden too. Kinds of block that it lists layer by layer
    are not those of another number of layers. A field that no Kansformer has is an error; other models' published files
    hold such, and the model ignores them.

    A folder, as `save_pretrained` writes it, stands for its weights too: its vocabulary stays, and must be the
    tokenizer's where it holds one.
    """
    num_tokens = len(tokenizer)
    path = Path(settings.model)
    folder = path if path.is_dir() else None
    if folder is not None:
        path = folder / "config.json"
        own = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else tokenizer
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"tokenizer {settings.tokenizer!r} is not that of {folder}: give --tokenizer {folder}")
        _check("coarse_grids", settings.coarse_grids, not settings.coarse_grids, "starts from new weights: none")
    if not path.is_file():
        raise FileNotFoundError(f"model {settings.model!r} is no json file and no saved model (from {Path.cwd()})")
    try:
        fields = json.loads(path.read_text())
        kind = fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {settings.model!r} is not the config.json of a model: {error!r}") from error
    if folder is None:
        fields["vocab_size"] = -(-num_tokens // 64) * 64
    fields |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    default = AutoConfig.for_model(kind)
    known = set(default.to_dict()) | set(default.attribute_map) | OLD_FIELDS
    for key in (*fields, *settings.model_overrides):
        if key not in known and (kind == "kansformer" or key in settings.model_overrides):
            where = "" if key in settings.model_overrides else f" in {path}"
            raise ValueError(f"unknown model field {key!r}{where}{_nearest(key, known)}")
    layers, kinds = settings.model_overrides.get("num_hidden_layers"), fields.get("ffn_type")
    if folder is None and layers is not None and isinstance(kinds, list) and "ffn_type" not in settings.model_overrides:
        _check(
            "model.num_hidden_layers",
            layers,
            layers == len(kinds),
            f"is not the {len(kinds)} layers that {path} has blocks for: give --model.ffn_type too",
        )
    if kind == "kansformer" and BLOCK_FIELDS & set(settings.model_overrides):
        fields.pop("intermediate_size", None)
    if {"hidden_size", "match_reference"} & set(settings.model_overrides):
        fields.pop("match_reference_size", None)
    fields |= settings.model_overrides
    if fields["vocab_size"] < num_tokens:
        raise ValueError(f"model.vocab_size {fields['vocab_size']} is smaller than the tokenizer's {num_tokens} tokens")
    config = AutoConfig.for_model(**fields)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.sequence_length > longest:
        raise ValueError(
            f"sequence_length {settings.sequence_length} exceeds the model's max_position_embeddings "
            f"{longest}: lower the one or raise the other (--model.max_position_embeddings)"
        )
    if settings.coarse_grids:
        splines = any("grid_size" in FFN_TYPES[kind].fields for kind in getattr(config, "ffn_types", ()))
        size = config.grid_size if splines else 0
        rule = f"must end below the model's grid_size, which is {size}" if size else "needs a block of splines"
        _check("coarse_grids", settings.coarse_grids, settings.coarse_grids[-1][1] < size, rule)
    return config


def initial_model(settings: Settings, config: PretrainedConfig) -> PreTrainedModel:
    """A model of `config` in float32: with new weights, or with those of the folder that `settings.model` names."""
    if not Path(settings.model).is_dir():
        return AutoModelForCausalLM.from_config(config)
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(settings.model, config=config, **options)
    if loading["missing_keys"]:
        raise ValueError(f"the weights in {settings.model} lack {', '.join(sorted(loading['missing_keys']))}")
    return model


def check_world(settings: Settings, world: int, kind: str = "NO") -> None:
    """Stop a run that got other processes than were asked for, by setting or by launcher."""
    asked = settings.processes or int(os.environ.get("WORLD_SIZE", world))
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address, starts one process and says nothing.
    silent = world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked != world or silent:
        raise ValueError(
            f"{'several' if silent else asked} processes were asked for and {world} started; on CPU launch with "
            "`torchrun --nproc_per_node N train/train.py ...` (accelerate launch --cpu starts a single process)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and kind != "FSDP":
        raise ValueError(
            f"FSDP was asked for and accelerate gives {kind}: it shards over GPUs only; launch on CPU with "
            "`torchrun --nproc_per_node N train/train.py ... --device cpu`"
        )


def batch_split(settings: Settings, world: int) -> tuple[int, int]:
    """(sequences a process holds at once, times it accumulates), so that the global batch is the same for any split."""
    micro_batch = settings.micro_batch_size or max(1, settings.batch_size // world)
    accumulation, remainder = divmod(settings.batch_size, micro_batch * world)
    if remainder or not accumulation:
        raise ValueError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {micro_batch} x {world} processes"
        )
    return micro_batch, accumulation


def check_resume(resume: str, identity: dict, saved: dict, folder: Path) -> None:
    """Refuse to go on from a checkpoint of another run."""
    if resume == "none":
        raise ValueError(f"{folder} is there and resume is none: choose another output_dir, or --resume auto")
    identity = json.loads(json.dumps(identity))  # tuples are lists there
    # A key younger than the checkpoint had its default's effect
    saved = json.loads(json.dumps(dataclasses.asdict(Settings()))) | saved
    other = [
        f"{key}: {saved.get(key)!r} -> {identity.get(key)!r}"
        for key in sorted(saved.keys() | identity.keys())
        if key not in FREE_KEYS and saved.get(key) != identity.get(key)
    ]
    if other:
        longer = f"; steps set the schedule, --model {folder} in a new output_dir starts one from these weights"
        raise ValueError(
            f"{folder} was made with another text, model or settings ({'; '.join(other)}): choose another output_dir, "
            f"or delete that one{longer if saved.get('steps') != identity.get('steps') else ''}"
        )


def _nearest(key: str, known) -> str:
    match = difflib.get_close_matches({"lr": "learning_rate"}.get(key, key), known, n=1, cutoff=0.5)
    return f": did you mean {match[0]!r}?" if match else ""


def _check(name: str, value, valid: bool, rule: str) -> None:
    if not valid:
        raise ValueError(f"{name} = {value!r} {rule}")


def _number(value):
    """YAML 1.1 reads 1e-3 as text: read it as the number it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _typed(name: str, value, kind):
    """`value` as `kind` without loss (an int is a float, 1e3 is an int), or ValueError."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(_number(value), (int, float)) and not isinstance(value, bool):
        return float(_number(value))
    if int in kinds and isinstance(_number(value), float) and _number(value).is_integer():
        return int(_number(value))
    if type(value) in kinds:
        return value
    wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise ValueError(f"{name} = {value!r} must be of type {wanted}, not {type(value).__name__}")
