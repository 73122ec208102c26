"""`hf:CONFIG`: models of `transformers` with random weights, from a config alone, offline.

    hf:gpt2                               the defaults of the config class
    hf:gpt2?n_layer=2&n_embd=64           some of them changed
    hf:clip?vision_config.num_hidden_layers=2
    hf:path/to/config.json                a saved config; a folder that holds one will do

`batch` and `length` are no settings of the model but the size of its input.
"""

import inspect
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from gtrans.errors import ModelError, did_you_mean

_BATCH, _LENGTH = 2, 16

# The heads that `transformers` offers for one config, the one to train with first. A config that
# is in none of these tables is built without a head.
_HEADS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


def build(text: str) -> tuple[nn.Module, dict[str, Any]]:
    """Makes the model and keyword inputs that an `hf:` text names.

    Raises:
        ModelError: `transformers` is missing, or there is no such config or setting.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"MODEL {text!r} needs the package 'transformers', which cannot be imported ({error}); "
            "install it with pip install 'gtrans[hf]'"
        ) from error
    name, _, query = text.removeprefix("hf:").partition("?")
    settings = _settings(text, query)
    batch = _size(text, settings, "batch", _BATCH)
    length = _size(text, settings, "length", _LENGTH)
    config = _config(text, name, settings, transformers)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is of no use in training
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    try:
        model = _model(config, transformers)
        return model, _inputs(text, model, config, batch, length)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"MODEL {text!r}: transformers cannot build it: {type(error).__name__}: {error}"
        ) from error


def _settings(text: str, query: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        if "=" not in part:
            raise ModelError(f"MODEL {text!r}: setting {part!r} has no value; write NAME=VALUE")
        (key, value), *_ = parse_qsl(part, keep_blank_values=True)
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _size(text: str, settings: dict[str, Any], name: str, default: int) -> int:
    size = settings.pop(name, default)
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"MODEL {text!r}: {name} must be a positive whole number, got {size!r}")
    return size


def _config(text: str, name: str, settings: dict[str, Any], transformers: Any) -> Any:
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ModelError(f"MODEL {text!r}: there is no file {str(path)!r}")
        try:
            base = json.loads(path.read_text())
            kind = base.pop("model_type")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"MODEL {text!r}: {str(path)!r} is no config of transformers: it must be a JSON "
                "object with a 'model_type'"
            ) from error
    else:
        base, kind = {}, name
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        hub = (
            "; ids of the hub are not downloaded, save the config and give its path"
            if "/" in kind
            else did_you_mean(kind, known.keys())
        )
        raise ModelError(f"MODEL {text!r}: transformers has no config {kind!r}{hub}")
    defaults = known[kind]()
    for key, value in settings.items():
        _set(text, base, defaults, key, value)
    return known[kind](**base)


def _set(text: str, base: dict[str, Any], defaults: Any, key: str, value: Any) -> None:
    """Writes a setting, which may be one of a nested config, into the arguments of a config."""
    *outer, last = key.split(".")
    for part in outer:
        defaults = getattr(defaults, part, None)
        nested = base.setdefault(part, {})
        if not isinstance(nested, dict):
            nested = nested.to_dict()
        base = nested
    if not hasattr(defaults, last):
        known = [*vars(defaults), *getattr(defaults, "attribute_map", {})] if defaults else []
        public = [k for k in known if not k.startswith("_")]
        raise ModelError(f"MODEL {text!r}: the config has no {key!r}{did_you_mean(last, public)}")
    base[last] = value


def _model(config: Any, transformers: Any) -> nn.Module:
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            made: nn.Module = getattr(transformers, name)(config)
            return made
    for table in _HEADS:
        heads = getattr(transformers, table)
        if type(config) in heads:
            head = heads[type(config)]
            model: nn.Module = (head[0] if isinstance(head, (tuple, list)) else head)(config)
            return model
    raise ModelError(f"transformers has no model for {type(config).__name__}")


def _inputs(text: str, model: Any, config: Any, batch: int, length: int) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        inner = getattr(config, "vision_config", config)
        size = inner.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {"pixel_values": torch.randn(batch, inner.num_channels, height, width)}
        labels = torch.randint(max(2, getattr(config, "num_labels", 2)), (batch,))
    elif model.main_input_name == "input_ids":
        settings = config.get_text_config()
        length = min(length, getattr(settings, "max_position_embeddings", None) or length)
        tokens = torch.randint(settings.vocab_size, (batch, length))
        inputs = {"input_ids": tokens}
        labels = tokens.clone()
    else:
        raise ModelError(
            f"MODEL {text!r}: no inputs are made for a model that reads "
            f"{model.main_input_name!r}; write a function that returns (model, inputs)"
        )
    if "labels" in accepted:
        inputs["labels"] = labels
    return inputs
