"""The model under other people's trainers, unpatched: transformers' Trainer, TRL's SFTTrainer and DPOTrainer."""

import json

import hf_trainer
import pytest
import sft
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from training import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

# TRL uses names that transformers 5.2x renames
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
COMMON = ["--use_cpu", "true", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--report_to", "none"]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "train/tinyshakespeare.txt").read_text()[:8_000])
    return path


def losses(folder) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_trainer_trains_saves_and_resumes(text, tmp_path):
    def run(output, *more):
        lengths = ["--text", str(text), "--sequence_length", "64", "--save_steps", "2", "--max_steps", "4"]
        splines = ["--model", str(ROOT / "configs/models/tiny_kan_gated.json")]  # with buffers
        return hf_trainer.main(
            ["--output_dir", str(output), *COMMON, *splines, *lengths, "--learning_rate", "1e-2", *more]
        )

    figures = run(tmp_path / "straight")
    assert figures["eval_loss"] < 5.7  # log(320) = 5.77
    first = losses(tmp_path / "straight/checkpoint-4")
    assert len(first) == 4
    # What a kill after step 2 leaves, resumed
    (tmp_path / "resumed").mkdir()
    (tmp_path / "straight/checkpoint-2").rename(tmp_path / "resumed/checkpoint-2")
    run(tmp_path / "resumed", "--resume_from_checkpoint", "last")
    assert losses(tmp_path / "resumed/checkpoint-4") == first
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("straight", "resumed")]
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.equal(a, b)


def test_sft_counts_answers_only_and_the_model_chats(text, tmp_path):
    arguments = ["--output_dir", str(tmp_path), *COMMON, "--text", str(text), "--max_steps", "2", "--max_length", "256"]
    trainer = sft.main([*arguments, "--learning_rate", "1e-2"])
    batch = next(iter(trainer.get_train_dataloader()))
    counted = batch["labels"] != -100
    tokenizer = trainer.processing_class
    for tokens, mask, real in zip(batch["input_ids"], counted, batch["attention_mask"]):
        conversation, answer = tokenizer.decode(tokens[real.bool()]), tokenizer.decode(tokens[mask])
        assert conversation.startswith("<user>")
        assert conversation.endswith(f"<assistant>{answer}")
        assert answer.endswith("<|endoftext|>") or real.sum() == 256  # cut at max_length
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Speak, speak."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]) == "<user>Speak, speak.<|endoftext|><assistant>"
    assert (
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1]
        == 4 + prompt["input_ids"].shape[1]
    )
    # From a trained model's folder
    again = sft.main([*arguments, "--output_dir", str(tmp_path / "again"), "--base", str(tmp_path), "--max_steps", "1"])
    assert again.state.log_history[0]["loss"] < trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("form", ["path", "object"])
def test_dpo_prefers_what_it_is_told_to(text, tmp_path, form):
    """TRL loads the reference model from where the policy came: from a folder, whichever form is passed."""
    arguments = ["--output_dir", str(tmp_path), *COMMON, "--text", str(text), "--max_steps", "1", "--max_length", "128"]
    tokenizer = sft.main(arguments).processing_class
    model = str(tmp_path) if form == "path" else AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = [{"prompt": "Speak.", "chosen": " Ay, my lord.", "rejected": " No."}] * 4
    config = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    dpo = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    dpo.train()
    history = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
    assert history[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference
    assert history[1] < history[0]
