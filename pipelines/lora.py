"""LoRA on the pipeline, the way of diffusers: load, save, weigh, fuse and unload updates of the
transformer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from safetensors import safe_open

from avdiff.pipelines.sampling_defaults import METADATA_KEY, SamplingDefaults

WEIGHTS = "pytorch_lora_weights.safetensors"


def sampling_of(path: str, name: str) -> SamplingDefaults | None:
    """What a LoRA's file on this machine says of sampling; None where it says nothing, or is
    elsewhere.

    Raises:
        ValueError: it says something that no call takes.
    """
    file = os.path.join(path, name) if os.path.isdir(path) else path
    if not os.path.isfile(file):
        return None
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    return None if text is None else SamplingDefaults.from_json(text)


class AVLoraLoaderMixin(LoraBaseMixin):
    """Loads LoRA layers into `transformer`; the other methods (`set_adapters`,
    `unload_lora_weights`, ...) are diffusers'. Experts of a mixture are packed into one parameter
    and are no target of an update.
    """

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"
    transformer: Any
    sampling_defaults: SamplingDefaults
    _sampling_before: SamplingDefaults | None = None

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        **kwargs: Any,
    ) -> Any:
        """Tensors of a LoRA from a folder, a file, a hub name or a dict, with names that start with
        "transformer.".

        What `avdiff train` or `transformer.save_lora_adapter` wrote, whose names have no such
        start, gets it here.

        Args:
            kwargs: weight_name, subfolder, revision, cache_dir, token, local_files_only,
                force_download, proxies;
                return_lora_metadata: also return the adapter's settings.

        Raises:
            ValueError: pickled weights are asked for, or what was found is no LoRA. OSError: no
                safetensors file.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False: needs True, as pickled weights can run code")
        names = (
            "weight_name",
            "local_files_only",
            "cache_dir",
            "force_download",
            "proxies",
            "token",
            "revision",
            "subfolder",
        )
        options = {name: kwargs.pop(name, None) for name in names}
        options["force_download"] = bool(options["force_download"])
        if not isinstance(pretrained_model_name_or_path_or_dict, dict):
            path = os.fspath(pretrained_model_name_or_path_or_dict)
            if options["weight_name"] is None and not os.path.isfile(path):
                options["weight_name"] = WEIGHTS
            pretrained_model_name_or_path_or_dict = path
        state, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            **options,
        )
        strange = next((name for name in state if "lora" not in name), None)
        if strange is not None or not state:
            raise ValueError(
                f"lora weights hold {strange!r}: needs a LoRA, whose names all contain 'lora'"
            )
        prefix = f"{cls.transformer_name}."
        if not any(name.startswith(prefix) for name in state):
            state = {prefix + name: tensor for name, tensor in state.items()}
            metadata = metadata and {prefix + name: value for name, value in metadata.items()}
        return (state, metadata) if with_metadata else state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA into the transformer, as `adapter_name` if given; arguments as of
        `lora_state_dict`.

        The pipeline then samples as the LoRA's file says. Where it says nothing, guidance that was
        distilled into the weights is asked for again: plain training unlearns it.
        """
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        kwargs["return_lora_metadata"] = True
        source = pretrained_model_name_or_path_or_dict
        state, metadata = self.lora_state_dict(source, **kwargs)
        named = kwargs.get("weight_name") or WEIGHTS
        asked = None if isinstance(source, dict) else sampling_of(os.fspath(source), named)
        self.load_lora_into_transformer(
            state, self.transformer, adapter_name, self, low_cpu_mem_usage, hotswap, metadata
        )
        # after the weights: a file that cannot be loaded changes nothing
        if self._sampling_before is None:
            self._sampling_before = self.sampling_defaults
        self.sampling_defaults = asked or self._sampling_before.relearned()

    def unload_lora_weights(self) -> None:
        """Remove every LoRA; the pipeline samples again as before the first."""
        super().unload_lora_weights()
        if self._sampling_before is not None:
            self.sampling_defaults = self._sampling_before
            self._sampling_before = None

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: Any,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = True,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Load what `lora_state_dict` returned."""
        transformer.load_lora_adapter(
            state_dict,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            prefix=cls.transformer_name,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Save `peft.get_peft_model_state_dict(pipe.transformer)` with the settings of its
        adapter.
        """
        if not transformer_lora_layers:
            raise ValueError("transformer_lora_layers: needs the tensors of at least one layer")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(
        self,
        components: list[str] = ["transformer"],  # noqa: B006 (diffusers' signature)
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the update to the weights."""
        super().fuse_lora(
            components=components,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
            **kwargs,
        )

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs: Any) -> None:  # noqa: B006
        """Take it out again."""
        super().unfuse_lora(components=components, **kwargs)
