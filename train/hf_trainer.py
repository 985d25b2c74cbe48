"""The model under transformers' own `Trainer`, as any other: text in rows, `TrainingArguments`, checkpoints.

    python train/hf_trainer.py --output_dir runs/hf_trainer --max_steps 200 --save_steps 100 --learning_rate 1e-3
    python train/hf_trainer.py ... --max_steps 400 --resume_from_checkpoint last

`--help` lists the arguments, which are the Trainer's. `--use_cpu true` keeps it off a GPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from settings import Settings, initial_model, model_config
from tokenizer import load_tokenizer
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import kansformer  # noqa: F401 (registers the model with the Auto classes)

HERE = Path(__file__).resolve().parent


@dataclass
class Example:
    model: str = str(HERE.parent / "configs/models/tiny_kan_fourier.json")  # or a saved model to go on from
    text: str = str(HERE / "tinyshakespeare.txt")
    tokenizer: str = "byte"  # or a tokenizer folder or name
    sequence_length: int = 256
    eval_fraction: float = 0.05  # the text's end


def main(arguments: list[str]) -> dict:
    example, training = HfArgumentParser((Example, TrainingArguments)).parse_args_into_dataclasses(arguments)
    set_seed(training.seed)
    tokenizer = load_tokenizer(example.tokenizer, example.sequence_length)
    names = {"model": example.model, "tokenizer": example.tokenizer}
    settings = Settings(**names, sequence_length=example.sequence_length)
    config = model_config(settings, tokenizer)

    tokens = tokenizer(Path(example.text).read_text(), verbose=False)["input_ids"]
    starts = range(0, len(tokens) - example.sequence_length + 1, example.sequence_length)
    rows = [tokens[start : start + example.sequence_length] for start in starts]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})  # the model shifts the labels
    parts = dataset.train_test_split(example.eval_fraction, shuffle=False)

    trainer = Trainer(
        model=initial_model(settings, config),
        args=training,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir) if resume == "last" else resume)
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(sys.argv[1:]))
