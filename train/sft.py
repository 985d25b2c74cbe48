"""The model under TRL's `SFTTrainer`: conversations, loss on the answers only.

    python train/sft.py --output_dir runs/sft --max_steps 200 --learning_rate 1e-3
    python train/sft.py --output_dir runs/sft --base runs/demo/kan_fourier/model --max_steps 200

The conversations are in the bundled text: a speech asks and the next one answers. `--help` lists TRL's arguments.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from datasets import Dataset
from settings import Settings, model_config
from tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import kansformer  # noqa: F401 (registers the model with the Auto classes)

HERE = Path(__file__).resolve().parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Example:
    base: str | None = None  # a trained model's folder; none: one from scratch
    model: str = str(HERE.parent / "configs/models/tiny_kan_fourier.json")  # the configuration of one from scratch
    text: str = str(HERE / "tinyshakespeare.txt")  # speeches with empty lines between
    conversations: int = 2000


def conversations(text: str) -> list[dict]:
    """A speech and its answer, in TRL's conversational prompt-completion form."""
    return [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
        for asked, answer in pairwise(text.strip().split("\n\n"))
    ]


def main(arguments: list[str]) -> SFTTrainer:
    example, training = HfArgumentParser((Example, SFTConfig)).parse_args_into_dataclasses(arguments)
    set_seed(training.seed)
    if example.base:
        tokenizer = AutoTokenizer.from_pretrained(example.base)
        model = AutoModelForCausalLM.from_pretrained(example.base)
    else:
        tokenizer = load_tokenizer("byte", training.max_length)
        config = model_config(Settings(model=example.model), tokenizer)
        model = AutoModelForCausalLM.from_config(config)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    rows = conversations(Path(example.text).read_text())[: example.conversations]
    trainer = SFTTrainer(model, args=training, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir) if resume == "last" else resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
