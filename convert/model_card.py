"""The README.md of an exported model: how it is quantized, how large it is, how to open it."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vptq_jax.lm.decoder import Decoder


def model_card(model: Decoder, name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The model card as Markdown with the hub's front matter.

    Args:
        model: the model that is exported.
        name: title of the card.
        config: the exported `config.json`.
        metadata: what was saved beside the model (`calibration`, `base_model`, `license`, ...); every
            entry that is a text or a number is shown.
    """
    quantized = "quantization_config" in config
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    # A JSON text is a YAML one too, whatever it holds.
    front += [
        f"{key}: {json.dumps(metadata[key])}" for key in ("base_model", "license") if isinstance(metadata.get(key), str)
    ]
    front += ["tags:", *(["- vptq"] if quantized else []), "- vptq_jax", "---"]
    body = [f"# {name}", _summary(model, quantized), ""]
    body += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _facts(model, config, metadata))]
    opened = f"""
## Opening it

```python
import vptq_jax as vq

model = vq.load("{name}")
print(vq.generate(model, "The capital of France is", max_new_tokens=32))
```
"""
    return "\n".join([*front, "", *body, opened])


def _summary(model: Decoder, quantized: bool) -> str:
    layers = len(model.quantized_layers())
    if quantized:
        return (
            f"A {model.config.model_type} model whose {layers} linear layers are quantized with VPTQ "
            "(vector post-training quantization, arXiv 2409.17066), in the format of the VPTQ project."
        )
    dense = f", dequantized from {layers} layers in VPTQ form" if layers else ""
    return f"A {model.config.model_type} model in plain Hugging Face format{dense}."


def _facts(model: Decoder, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    layers = model.quantized_layers()
    facts = []
    if layers:
        specs = Counter(str(layer.format) for layer in layers.values())
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        nominal = sum(layer.format.nominal_bits * layer.shape[0] * layer.shape[1] for layer in layers.values())
        stored = sum(layer.array.stored_bits for layer in layers.values())
        facts += [
            ("spec", ", ".join(f"{spec} ({count} layers)" for spec, count in specs.most_common())),
            ("bits per weight, indices alone", f"{nominal / weights:.3f}"),
            ("bits per weight, everything included", f"{stored / weights:.3f}"),
            ("layers left dense", ", ".join(sorted(model.all_linears().keys() - layers.keys())) or "none"),
        ]
    facts.append(("dtype", str(config["dtype"])))
    facts.append(("calibration", str(metadata.get("calibration", "not recorded"))))
    shown = {"calibration", "base_model", "license"}
    facts += [(key, str(value)) for key, value in metadata.items() if key not in shown and _is_plain(value)]
    facts.append(("made with", f"vptq_jax {importlib.metadata.version('vptq_jax')}"))
    return [(_escape(key), _escape(value)) for key, value in facts]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
