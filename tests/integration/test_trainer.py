"""The Trainer of transformers, and a plain loop, with an optimized model on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gtrans

transformers = pytest.importorskip("transformers")

STEPS = 6
ROWS = 32
LENGTH = 8
WORDS = 50


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random word numbers, the same in every run."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tiny(kind: str = "gpt2") -> Any:
    """A language model with dropout in every place that its architecture has one."""
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.2,
            attention_probs_dropout_prob=0.2,
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        attn_pdrop=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def optimized(model: Any) -> Any:
    return gtrans.optimize(model, backend="eager", on_error="raise")


def trainer(model: Any, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        use_cpu=True,
        seed=0,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())


def losses(run: Any) -> dict[int, float]:
    """Loss by step, as the Trainer logged it (rounded there to four digits)."""
    return {e["step"]: e["loss"] for e in run.state.log_history if "loss" in e}


def same_weights(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_trainer_trains_saves_and_resumes_as_without(tmp_path: Path) -> None:
    plain, model = tiny(), optimized(tiny())
    reference = trainer(plain, tmp_path / "plain")  # seeds torch, as each Trainer does
    reference.train()
    run = trainer(model, tmp_path / "optimized")
    run.train()

    assert set(losses(run)) == set(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(reference), abs=2e-4)
    same_weights(plain, model)
    assert gtrans.report(model).training

    run.save_model(str(tmp_path / "saved"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert list(loaded.state_dict()) == list(plain.state_dict())
    same_weights(loaded, plain)

    resumed = trainer(optimized(tiny()), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "optimized" / f"checkpoint-{STEPS // 2}"))
    assert losses(resumed) == pytest.approx(losses(reference), abs=2e-4)
    same_weights(resumed.model, plain)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_plain_loop_with_accumulation(kind: str) -> None:
    plain, model = tiny(kind), optimized(tiny(kind))
    sentences = Sentences().ids
    found: list[list[float]] = []
    for m in (plain, model):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(m.parameters(), 1e-3)
        found.append([])
        for step in range(STEPS):
            ids = sentences[2 * step : 2 * step + 2]
            loss = m(input_ids=ids, labels=ids).loss
            (loss / 2).backward()
            found[-1].append(loss.item())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) == STEPS
    same_weights(plain, model)
