"""MODEL texts: every form, and every way to get one wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gtrans.cli.models import load, plugin_classes, session
from gtrans.errors import ModelError, OptionError
from gtrans.registry import pass_table


def _config(model: Any) -> Any:
    return model.config


@pytest.mark.parametrize("function", ["make", "make_tuple", "make_keywords"])
def test_a_function_of_a_file_gives_model_and_inputs(model_file: str, function: str) -> None:
    loaded = load(f"{model_file}:{function}")

    assert loaded.model(*loaded.inputs, **loaded.keyword_inputs).shape == (128, 64)


def test_a_function_of_a_module_in_the_working_directory(
    model_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("package_here").mkdir()
    Path("package_here/__init__.py").touch()
    Path("package_here/nets.py").write_text(Path(model_file).read_text())
    monkeypatch.delitem(sys.modules, "package_here", raising=False)
    before = list(sys.path)

    with session():
        loaded = load("package_here.nets:make")

    assert loaded.inputs[0].shape == (128, 4)
    assert sys.path == before


def test_a_file_may_import_its_neighbours(model_file: str) -> None:
    Path("sub").mkdir()
    Path("sub/neighbour_of_entry.py").write_text(Path(model_file).read_text())
    Path("sub/entry.py").write_text("from neighbour_of_entry import make\n")

    assert load("sub/entry.py:make").inputs[0].shape == (128, 4)


def test_the_seed_decides_the_weights(model_file: str) -> None:
    first, again, other = (
        load(f"{model_file}:make", seed=s).model.get_parameter("up.weight") for s in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.py", "cannot read MODEL 'model.py': MODEL is package.module:function, file.py:fun"),
        (":make", "cannot read MODEL ':make'"),
        ("models.py:make", "there is no file 'models.py'; did you mean 'model.py'"),
        ("model.py:maek", "model.py has no function 'maek'; did you mean 'make'"),
        ("model.py:NUMBER", "model.py has no function 'NUMBER'; known: "),
        (
            "no_such_package.sub:make",
            "no module named 'no_such_package'; it is looked up in the wo",
        ),
        ("broken.py:make", "importing broken.py failed: SyntaxError"),
        ("needs.py:make", "importing needs.py failed: No module named 'not_installed_here'"),
        ("model.py:fails", "the function failed: KeyError: 'weights' (model.py:51)"),
        ("model.py:model_only", "the function returned a Net; it must return (model, inputs)"),
        ("model.py:no_inputs", "the inputs are a NoneType; it must return (model, inputs)"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(model_file: str, text: str, message: str) -> None:
    Path("broken.py").write_text("def make(:\n")
    Path("needs.py").write_text("import not_installed_here\n")

    with pytest.raises(ModelError) as caught:
        load(text)

    assert message in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_config_name_makes_a_model_offline() -> None:
    pytest.importorskip("transformers")
    loaded = load("hf:gpt2?n_layer=1&n_embd=8&n_head=2&vocab_size=50&batch=3&length=5")

    assert type(loaded.model).__name__ == "GPT2LMHeadModel"
    assert _config(loaded.model).n_layer == 1
    assert {k: tuple(v.shape) for k, v in loaded.keyword_inputs.items()} == {
        "input_ids": (3, 5),
        "labels": (3, 5),
    }
    assert loaded.model(**loaded.keyword_inputs).loss.requires_grad


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "hf:bert?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&vocab_size=50"
            "&intermediate_size=16",
            "BertForMaskedLM",
        ),
        (
            "hf:t5?num_layers=1&d_model=8&num_heads=2&d_kv=4&d_ff=16&vocab_size=50",
            "T5ForConditionalGeneration",
        ),
        (
            "hf:vit?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=16"
            "&image_size=32&patch_size=16",
            "ViTForImageClassification",
        ),
    ],
)
def test_other_kinds_of_models_get_their_own_inputs(text: str, kind: str) -> None:
    pytest.importorskip("transformers")
    loaded = load(text)

    assert type(loaded.model).__name__ == kind
    assert loaded.model(**loaded.keyword_inputs).loss.requires_grad


def test_a_saved_config_decides_the_class(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2Model"],
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
        "vocab_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    of_file = load(f"hf:{tmp_path / 'config.json'}?n_embd=4")
    of_folder = load(f"hf:{tmp_path}")

    assert type(of_file.model).__name__ == "GPT2Model"
    assert (_config(of_file.model).n_embd, _config(of_folder.model).n_embd) == (4, 8)
    assert set(of_file.keyword_inputs) == {"input_ids"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:gtp2", "transformers has no config 'gtp2'; did you mean 'gpt2'"),
        ("hf:openai/gpt2", "ids of the hub are not downloaded, save the config and give its path"),
        ("hf:gpt2?n_layers=2", "the config has no 'n_layers'; did you mean 'n_layer'"),
        ("hf:gpt2?n_layer", "setting 'n_layer' has no value; write NAME=VALUE"),
        ("hf:gpt2?batch=0", "batch must be a positive whole number, got 0"),
        ("hf:gpt2?n_embd=7&n_head=2", "transformers cannot build it: ValueError"),
        ("hf:none.json", "there is no file 'none.json'"),
        ("hf:list.json", "'list.json' is no config of transformers: it must be a JSON object"),
        ("hf:wav2vec2?num_hidden_layers=1", "reads 'input_values'; write a function that returns"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")

    with pytest.raises(ModelError) as caught:
        load(text)

    assert message in str(caught.value)


def test_missing_transformers_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ModelError, match=r"needs the package 'transformers'.*'gtrans\[hf\]'"):
        load("hf:gpt2")


def test_plug_ins_are_registered_for_the_session_only(wrong_passes: str) -> None:
    with session([wrong_passes]):
        assert {"wrong-scale", "wrong-pair", "wrong-forward", "raises"} <= pass_table().keys()
    assert "wrong-scale" not in pass_table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.py", "plug-in 'model.py' defines no pass; a pass is a class that derives from gtr"),
        ("missing.py", "plug-in 'missing.py': there is no file 'missing.py'"),
        ("no_such_plugin", "plug-in 'no_such_plugin': no module named 'no_such_plugin'"),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_said(model_file: str, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        plugin_classes(text)
    assert message in str(caught.value)
