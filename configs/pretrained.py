"""The strict halves of transformers' pretrained classes, shared by tokenizers and priors.

transformers accepts unknown config keys, and logs missing and unexpected weights instead of refusing them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from configs.validation import coerce, did_you_mean, field_hints

# What transformers itself writes into config.json or passes along, besides the fields of PreTrainedConfig.
_TRANSFORMERS_KEYS = {"model_type", "name_or_path", "attn_implementation", "torch_dtype", "_commit_hash"}


class StrictConfig(PreTrainedConfig):
    """A model's configuration: typed fields, unknown keys refused.

    A field with a docstring underneath is an option that users set; fields without one are written by the training.
    """

    def __post_init__(self, **unknown: Any) -> None:
        fields = field_hints(type(self))
        for key in unknown:
            if key not in _TRANSFORMERS_KEYS:
                raise ValueError(did_you_mean(key, fields, f"key of {type(self).__name__}"))
        for name, hint in fields.items():
            setattr(self, name, coerce(getattr(self, name), hint, name))
        super().__post_init__(**unknown)
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError for values that do not go together."""

    def options(self) -> dict[str, Any]:
        """The values of this configuration's own fields, without what transformers adds."""
        return {name: getattr(self, name) for name in sorted(field_hints(type(self)))}


class StrictLoading:
    """Mixin before PreTrainedModel: `from_pretrained` finds the class and refuses weights that do not fit it."""

    @classmethod
    def known_classes(cls) -> tuple[str, dict[str, Any]]:
        """What models of this kind are called, and the table of their classes, such as TOKENIZERS."""
        raise TypeError(f"{cls.__name__} belongs to no table of models")

    def _init_weights(self, module: Any) -> None:
        """Nothing: layers draw their own weights, and transformers would redraw every one of them as N(0, 0.02)."""

    def get_input_embeddings(self) -> Any:
        """None: codes are embedded in several tables; sharding would treat a single one apart."""
        return None

    def checkpoint_activations(self: Any) -> None:
        """Keep the inputs of blocks only, and compute what is inside again in the backward pass.

        Raises:
            ValueError: where the network has no such blocks.
        """
        if not self.supports_gradient_checkpointing:
            kind, table = self.known_classes()
            able = [name for name, model in table.items() if model.supports_gradient_checkpointing]
            name = self.config.model_type.removeprefix("tessera-")
            raise ValueError(
                f"activation_checkpointing=true needs a {kind} with blocks to checkpoint ({', '.join(able)}); "
                f"{name} has none"
            )
        # transformers has renamed it.
        enable = getattr(self, "activation_checkpointing_enable", None) or self.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a saved model of whichever class the folder or hub repository holds.

        Further arguments are those of `PreTrainedModel.from_pretrained`: dtype, subfolder and so on.

        Raises:
            ValueError: where there is no such model, or tensors are missing, surplus or of another shape: all named.
        """
        kind, table = cls.known_classes()
        folder = local_folder(pretrained_model_name_or_path, kwargs.pop("subfolder", ""))
        found = table[saved_model_type(folder, table, kind)]
        if not issubclass(found, cls):
            raise ValueError(f"{folder} holds a {found.__name__}, not a {cls.__name__}")
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below with names, instead of a bare RuntimeError
        try:
            model, info = super(StrictLoading, found).from_pretrained(  # type: ignore[misc]
                folder, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}); copy or train them again") from error
        problems = {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }
        if any(problems.values()):
            each = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
            raise ValueError(
                f"the weights in {folder} do not fit {found.__name__}: {each}; "
                "was the folder edited, or saved by another version?"
            )
        return (model, info) if wants_info else model  # type: ignore[return-value]


def is_hub_name(name_or_path: str | Path) -> bool:
    """Whether a name could be `user/name` on the hub: nothing that stands here, or would stand in a folder of ours."""
    text, path = str(name_or_path), Path(name_or_path)
    is_path = path.exists() or text.startswith((".", "/", "~", "runs/")) or path.parent.is_dir()
    return not is_path and text.count("/") == 1


def local_folder(name_or_path: str | Path, subfolder: str = "") -> Path:
    """A folder on disk for a path or hub name, downloading the latter.

    Raises:
        ValueError: where it is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path / subfolder
    if not is_hub_name(name_or_path):
        raise ValueError(f"there is no folder {name_or_path}")
    try:
        return Path(snapshot_download(str(name_or_path))) / subfolder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"there is no folder {name_or_path}, and no such name on the hub could be read") from error


def saved_model_type(folder: Path, known: Mapping[str, Any], what: str) -> str:
    """The name under which a folder's config.json stands in a table such as TOKENIZERS.

    Raises:
        ValueError: where the folder does not hold a whole model of this kind.
    """
    file = folder / "config.json"
    if not file.is_file():
        contents = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        hint = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
        raise ValueError(
            f"{folder} holds no saved {what} (config.json is missing; found: {contents or 'nothing'}){hint}"
        )
    try:
        model_type = str(json.loads(file.read_text()).get("model_type")).removeprefix("tessera-")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a model's config: {error}") from error
    if model_type not in known:
        raise ValueError(f"{folder} holds a {model_type}, not a {what}; expected one of {', '.join(sorted(known))}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has a config.json but no weights (*.safetensors)")
    return model_type
