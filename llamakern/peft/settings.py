"""adapter_config.json, PEFT's record of how LoRA is built, to and from the settings of a LoRAConfig."""

from collections.abc import Mapping

# Settings without influence on what the adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "task_type",
}  # fmt: skip
PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # the others also change the base's weights

TEXT, NAMES, TABLE, FLAG = (str,), (list, str), (dict,), (bool,)
# PEFT's name: ours, and the types that JSON may hold. What is null there keeps our default.
FIELDS = {
    "r": ("rank", (int,)),
    "lora_alpha": ("alpha", (int, float)),
    "lora_dropout": ("dropout", (int, float)),
    "target_modules": ("targets", NAMES),
    "use_rslora": ("rslora", FLAG),
    "use_dora": ("dora", FLAG),
    "bias": ("bias", TEXT),
    "lora_bias": ("lora_bias", FLAG),
    "rank_pattern": ("rank_pattern", TABLE),
    "alpha_pattern": ("alpha_pattern", TABLE),
    "layers_to_transform": ("layers", (list, int)),
    "exclude_modules": ("exclude", NAMES),
}


def to_peft(config) -> dict:
    """What adapter_config.json says of this LoRAConfig."""
    settings = {theirs: getattr(config, ours) for theirs, (ours, _) in FIELDS.items()}
    settings |= {key: list(value) for key, value in settings.items() if isinstance(value, tuple)}
    settings["exclude_modules"] = settings["exclude_modules"] or None
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    return about | settings


def from_peft(settings: Mapping) -> dict:
    """Those of a LoRAConfig from adapter_config.json. ValueError names a setting that is not built and would matter."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft: peft_type must be LORA, got {settings.get('peft_type')!r}")
    for key, value in settings.items():
        unset = value is None or value is False or value in ({}, [])  # 0 is a layer, not "unset"
        plain = key == "init_lora_weights" and value in PLAIN_INITS
        if not (key in FIELDS or key in HARMLESS or unset or plain):
            raise ValueError(f"peft: adapter_config.json asks for {key} = {value!r}, which is not supported")
    for key in ("r", "lora_alpha", "target_modules"):
        if settings.get(key) is None:
            raise ValueError(f"peft: {key} must be given in adapter_config.json, got none")
    values = {}
    for key, (name, kinds) in FIELDS.items():
        if (value := settings.get(key)) is None:
            continue
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"peft: {key} must be {wanted} in adapter_config.json, got {value!r}")
        values[name] = sorted(value, key=str) if kinds is NAMES and isinstance(value, list) else value  # sets in PEFT
    if isinstance(values.get("layers"), int):
        values["layers"] = [values["layers"]]
    if values.get("layers") == []:
        values["layers"] = None
    return values
