"""Convert a pretrained Llama-family decoder into a Kansformer with the same outputs.

    python -m kansformer.convert SRC DST --calibrate TEXT

Every SwiGLU block becomes `kan_gated` with the silu base term, no norm and zero splines,

    y_o = sum_h v_h (down[o, h] silu(z_h) + sum_c 0 * B_c(z_h)),    z = gate x,  v = up x,

which computes what SwiGLU computes, and can learn a gate function of its own on every edge. Tensors keep their names
and bytes, so converting is copying. Attention biases, norms of queries and keys, rotary scalings, sliding windows and
layers without positions are carried over; whatever cannot be is refused by name before any work.
"""

import argparse
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from kansformer.layers import KANLinear, observing
from kansformer.models import KansformerConfig, KansformerForCausalLM
from kansformer.sources import Source, kansformer_config, offloaded, open_source

# The largest logit difference, over the largest logit, that rounding explains. In memory the logits are equal
# to the bit; products of weights that are mapped at other offsets of a file differ in their last bits.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

CALIBRATION_TOKENS, CALIBRATION_LENGTH, PROBE_TOKENS = 2048, 512, 64
PROBE_TEXT = 'He said:\n\n  "1 + 2 = 3", naïvely; 你好 <|im_end|>'


def convert(
    model_or_path: PreTrainedModel | str | os.PathLike,
    *,
    calibration: str | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    grid_size: int = 3,
    spline_order: int = 1,
    grid_range: tuple[float, float] = (-4.0, 4.0),
    spread: float = 4.0,
) -> KansformerForCausalLM:
    """A Kansformer with the outputs of a Llama, Mistral, Qwen2, Qwen3 or SmolLM3 model, bit for bit.

    The splines start at zero, so their grid changes no output. `calibration` gives each gate feature its own range:
    `spread` standard deviations on either side of the mean, cut to the smallest and the largest sample, as
    `KANLinear.update_grid` does. Fine-tune all parameters, or the splines only:

        for name, parameter in model.named_parameters(): parameter.requires_grad = name.endswith("spline_weight")

    Args:
        model_or_path: a model, which is left as it is (.to(bfloat16) has rounded its rotary frequencies too, and ours
            stay exact: load it in that dtype instead); or a folder or hub name with safetensors weights, read one
            tensor at a time; or a .gguf file, whose weights are dequantized to float32.
        calibration: a text, or token ids int64 (batch, seq), to run the model on. None: `grid_range` everywhere.
        tokenizer: for a calibration text where a model is given; with a path it is found there.
        grid_size, spline_order: of the splines, G and k; they add hidden_size * intermediate_size * (G + k) weights to
            every layer.
        grid_range: (lo, hi) without calibration, and for features that are constant in it.
        spread: standard deviations of the calibrated range on either side of the mean.
    Returns:
        The model in evaluation mode, in the source's dtype, with its generation configuration.
    Raises:
        ValueError: naming what cannot be carried over exactly.
    """
    source = open_source(model_or_path)
    splines = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": tuple(grid_range)}
    config = kansformer_config(source.config, **splines)
    skeleton = _skeleton(source, config)
    ids = _token_ids(calibration, tokenizer or source.tokenizer, config)
    grids = _grids(source, ids, config, spread)
    state = {name: _weight(source, name, like, grids) for name, like in _weights(skeleton).items()}
    attention = source.config._attn_implementation
    model = KansformerForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=source.dtype, attn_implementation=attention
    )
    if source.generation_config is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    calibration: str | Tensor | None = None,
    grid_size: int = 3,
    spline_order: int = 1,
    grid_range: tuple[float, float] = (-4.0, 4.0),
    spread: float = 4.0,
    max_shard_size: int | str = "2GB",
    progress: bool = False,
) -> float:
    """Convert a checkpoint on disk to another: weights, tokenizer, chat template, generation settings and model card.

    No more than a shard of weights is in memory at a time: the source runs, for calibration and for the check at the
    end, with its layers on disk. The destination appears whole, once its logits agree with the source's, or not at all.

    Args:
        source: a folder or hub name with safetensors weights, or a .gguf file (held in memory in float32).
        destination: the folder to make.
        max_shard_size: of the weight files, such as "2GB".
        progress: show a bar.
        calibration, grid_size, spline_order, grid_range, spread: as in `convert`.
    Returns:
        The largest difference between a logit of the source and of the converted model, on the calibration text or, for
        want of one, on random tokens.
    Raises:
        ValueError: naming what cannot be carried over exactly, or if the logits differ by more than rounding.
        FileExistsError: if the destination exists.
    """
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it, or choose another destination")
    opened = open_source(source)
    splines = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": tuple(grid_range)}
    config = kansformer_config(opened.config, **splines)
    skeleton = _skeleton(opened, config)
    ids = _token_ids(calibration, opened.tokenizer, config)
    probe = _random_tokens(config.vocab_size) if ids is None else ids[:1, :PROBE_TOKENS]
    grids = _grids(opened, ids, config, spread)
    expected = _logits(opened.model(), probe)

    partial = destination.parent / f".{destination.name}.{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write_weights(opened, skeleton, grids, partial, max_shard_size, progress)
        _write_settings(opened, skeleton, partial)
        if opened.tokenizer is not None:
            text = calibration if isinstance(calibration, str) else PROBE_TEXT
            if AutoTokenizer.from_pretrained(partial)(text)["input_ids"] != opened.tokenizer(text)["input_ids"]:
                raise ValueError(f"{type(opened.tokenizer).__name__} does not survive saving: nothing was written")
        difference = (_logits(offloaded(partial, opened.dtype), probe) - expected).abs().max().item()
        if not difference <= ROUNDING[opened.dtype] * expected.abs().max().item():
            raise ValueError(
                f"the logits of the converted model differ from the source's by up to {difference:.3g}, more than "
                f"rounding in {opened.dtype} explains: nothing was written; please report the model"
            )
        _model_card(opened, config, difference, ids).save(partial / "README.md")
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _skeleton(source: Source, config: KansformerConfig) -> KansformerForCausalLM:
    """The model without its weights, after a check that the source has all of them and no others."""
    with torch.device("meta"):
        skeleton = KansformerForCausalLM(config)
    expected = {_source_name(name): tuple(like.shape) for name, like in _weights(skeleton).items() if not _ours(name)}
    found = {name: tuple(shape) for name, shape in source.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and found.pop("lm_head.weight", None):
        head, embedding = source.weight("lm_head.weight"), source.weight("model.embed_tokens.weight")
        if not torch.equal(head, embedding):
            raise ValueError(
                "tie_word_embeddings=True, but lm_head.weight differs from the embeddings: set it to False"
            )
    if odd := sorted(found.items() ^ expected.items()):
        listed = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in odd[:6])
        raise ValueError(
            f"weights do not fit what the configuration says; unknown, missing or of another shape: {listed}"
        )
    return skeleton


def _weights(skeleton: KansformerForCausalLM) -> dict[str, Tensor]:
    """What is stored: names, and tensors on meta."""
    state = skeleton.state_dict()
    return {name: like for name, like in state.items() if name not in skeleton.all_tied_weights_keys}


def _ours(name: str) -> bool:
    return name.endswith((".spline_weight", ".grid"))


def _source_name(name: str) -> str:
    return name.replace(".down_proj.base_weight", ".down_proj.weight")


def _weight(source: Source, name: str, like: Tensor, grids: Mapping[str, Tensor]) -> Tensor:
    """The tensor `name` of the converted model."""
    if name.endswith(".grid"):
        return grids[name]
    if name.endswith(".spline_weight"):
        return torch.zeros(like.shape, dtype=source.dtype)
    return source.weight(_source_name(name)).to(source.dtype)


@torch.no_grad()
def _grids(source: Source, ids: Tensor | None, config: KansformerConfig, spread: float) -> dict[str, Tensor]:
    """The grid of every layer: the configuration's range, or that of the source's gates on token ids."""
    # A KAN layer's range depends on its inputs alone: one output stands for all.
    options = {"grid_size": config.grid_size, "spline_order": config.spline_order, "grid_range": config.grid_range}
    layers = [KANLinear(config.intermediate_size, 1, **options) for _ in range(config.num_hidden_layers)]
    if ids is not None:
        model = source.model()
        gates = [layer.mlp.gate_proj for layer in model.model.layers]
        hooks = [
            gate.register_forward_hook(lambda _, inputs, z, layer=layer: layer.update_grid(z.cpu(), spread))
            for gate, layer in zip(gates, layers)
        ]
        with observing(model, hooks):
            model.model(input_ids=ids.to(model.device), use_cache=False)
    return {f"model.layers.{index}.mlp.down_proj.grid": layer.grid for index, layer in enumerate(layers)}


def _token_ids(
    calibration: str | Tensor | None, tokenizer: PreTrainedTokenizerBase | None, config: KansformerConfig
) -> Tensor | None:
    """Rows of tokens (batch, seq), none of them padding."""
    if isinstance(calibration, str):
        if tokenizer is None:
            raise ValueError("a calibration text needs a tokenizer: pass tokenizer=, or token ids in place of the text")
        # No token is shorter than a byte, and few texts need more than 16 characters for one.
        ids = torch.tensor(tokenizer(calibration[: 16 * CALIBRATION_TOKENS])["input_ids"][:CALIBRATION_TOKENS])
        length = min(CALIBRATION_LENGTH, config.max_position_embeddings, len(ids))
        calibration = ids[: len(ids) // max(1, length) * length].view(-1, max(1, length))
    if calibration is not None and (calibration.ndim != 2 or calibration.numel() == 0):
        raise ValueError(f"calibration needs token ids (batch, seq), at least one; got {tuple(calibration.shape)}")
    if calibration is not None and not 0 <= calibration.min() <= calibration.max() < config.vocab_size:
        raise ValueError(
            f"calibration has token ids from {calibration.min()} to {calibration.max()}, but the model's lie in "
            f"[0, {config.vocab_size}): is the tokenizer another model's?"
        )
    return calibration


def _random_tokens(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _write_weights(
    source: Source,
    skeleton: KansformerForCausalLM,
    grids: Mapping[str, Tensor],
    folder: Path,
    max_shard_size: int | str,
    progress: bool,
) -> None:
    weights = _weights(skeleton)
    stored = {name: like.to(like.dtype if name.endswith(".grid") else source.dtype) for name, like in weights.items()}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)
    with tqdm(total=len(stored), unit=" tensors", desc="converting", disable=not progress) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {name: _weight(source, name, stored[name], grids).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            bar.update(len(shard))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_settings(source: Source, skeleton: KansformerForCausalLM, folder: Path) -> None:
    """Configuration with remote code, generation settings, and the tokenizer with its chat template."""
    config = skeleton.config
    config.architectures, config.dtype = [type(skeleton).__name__], source.dtype
    config.save_pretrained(folder)
    for part in (source.generation_config, source.tokenizer):
        if part is not None:
            part.save_pretrained(folder)


def _model_card(source: Source, config: KansformerConfig, difference: float, ids: Tensor | None) -> ModelCard:
    data = ModelCardData(
        base_model=source.name if "/" in source.name else None,
        library_name="transformers",
        license=source.license,
        pipeline_tag="text-generation",
        tags=["kansformer", "kan"],
    )
    grid = f"a range from {ids.numel()} tokens of text" if ids is not None else f"the range {list(config.grid_range)}"
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {source.name} as a Kansformer

{source.name}, whose SwiGLU feed-forward blocks have become KAN blocks (`kan_gated`): a learned gate function on every
edge, silu plus splines of degree {config.spline_order} on {config.grid_size} intervals, each gate feature with {grid}.
The splines are zero, so the model computes what the source computes: the largest difference between their logits is
{difference:.3g} in {str(source.dtype).removeprefix("torch.")}.

```python
from transformers import AutoModelForCausalLM

# Runs the code in the folder. With kansformer installed and imported it needs no trust_remote_code.
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
for name, parameter in model.named_parameters():  # fine-tune the splines only
    parameter.requires_grad = name.endswith("spline_weight")
```
"""
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kansformer.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SRC", help="folder or hub name with safetensors weights, or a .gguf file")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument("--calibrate", metavar="FILE", help="a text whose gate values set the range of the splines")
    parser.add_argument("--grid_size", type=int, default=3, help="intervals of the splines (%(default)s)")
    parser.add_argument("--spline_order", type=int, default=1, choices=(1, 2, 3), help="their degree (%(default)s)")
    parser.add_argument("--grid_range", type=float, nargs=2, default=(-4.0, 4.0), metavar=("LO", "HI"))
    parser.add_argument("--spread", type=float, default=4.0, help="standard deviations a range reaches (%(default)s)")
    parser.add_argument("--max_shard_size", default="2GB", help="of the weight files (%(default)s)")
    options = vars(parser.parse_args(arguments))
    file, source, destination = (options.pop(name) for name in ("calibrate", "source", "destination"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        text = Path(file).read_text() if file else None
        difference = convert_checkpoint(source, destination, calibration=text, progress=True, **options)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{destination}: the largest difference between a logit and the source's is {difference:.3g}")


if __name__ == "__main__":
    main()
