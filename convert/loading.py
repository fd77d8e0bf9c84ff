"""`load`: one call for every kind of checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from vptq_jax.convert.source import check_dtype
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.meshes import check_axis
from vptq_jax.nn.forms import cast
from vptq_jax.nn.forms import trainable as make_trainable
from vptq_jax.nn.inference import inference_form
from vptq_jax.nn.placement import place

Kind = Literal["orbax", "hf", "hf-vptq", "gguf"]


def recognize(path_or_id: str | Path) -> tuple[Kind, Path]:
    """The kind of a checkpoint, and where it lies (a hub id is downloaded).

    Raises:
        FileNotFoundError: nothing there, or nothing that is recognised.
        NotImplementedError: weights quantized by a method that is not supported.
        ValueError: a config.json that is not JSON.
    """
    from vptq_jax.convert.checkpoint import MANIFEST, is_checkpoint
    from vptq_jax.convert.hf import quantization_method
    from vptq_jax.json_files import read_json, resolve_directory

    path = resolve_directory(path_or_id)
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return "gguf", path
        raise FileNotFoundError(f"{path} is a file, but not a GGUF file; give the checkpoint's directory instead")
    if is_checkpoint(path):
        return "orbax", path
    if (path / "config.json").is_file():
        method = quantization_method(read_json(path / "config.json"))
        if method not in (None, "vptq"):
            raise NotImplementedError(f"{path} is quantized by {method!r}; plain checkpoints and 'vptq' are read")
        return ("hf" if method is None else "hf-vptq"), path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return "gguf", ggufs[0]
    if ggufs:
        raise FileNotFoundError(f"{path} holds {len(ggufs)} GGUF files; name one, such as {ggufs[0]}")
    raise FileNotFoundError(
        f"{path} holds no checkpoint: neither {MANIFEST} (vptq_jax), nor config.json (Hugging Face), nor a GGUF file"
    )


def load(
    path_or_id: str | Path,
    *,
    dtype: Any = None,
    trainable: bool = False,
    mesh: Mesh | None = None,
    axis: str | None = None,
    progress: bool = False,
) -> LanguageModel:
    """A model from any kind of checkpoint, its quantized layers packed where kernels run.

    Args:
        path_or_id: a directory saved by `checkpoint.save`, a Hugging Face directory or hub id (plain
            or VPTQ), or a GGUF file.
        dtype: dtype of the parameters; None keeps the stored one (GGUF: float32). Codebooks of quantized layers
            always keep theirs.
        trainable: leave quantized layers in the form that can be trained, with codebooks in float32
            (`nn.forms.trainable`).
        mesh, axis: where the arrays go, see `nn.placement.place`; None: the default device.
        progress: show a bar where weights are read one by one.

    Raises:
        FileNotFoundError: nothing there, or nothing that is recognised.
        NotImplementedError: a format, architecture or quantization that is not supported.
        ValueError: a damaged checkpoint, every fault named; a dtype that no parameter can have; an axis without a mesh,
            that the mesh does not have, or among whose devices layers do not divide.
    """
    if mesh is not None:
        check_axis(mesh, axis)
    elif axis is not None:
        raise ValueError(f"axis is {axis!r}, but there is no mesh; give the mesh that has it")
    lm = _load(path_or_id, dtype, progress)
    module = lm.module if mesh is None else place(lm.module, mesh, axis)
    module = make_trainable(module) if trainable else inference_form(module, donate=True)
    return dataclasses.replace(lm, module=module)


def _load(path_or_id: str | Path, dtype: Any, progress: bool) -> LanguageModel:
    kind, path = recognize(path_or_id)
    if kind == "orbax":
        from vptq_jax.convert import checkpoint

        lm = checkpoint.load(path)
        return lm if dtype is None else dataclasses.replace(lm, module=cast(lm.module, check_dtype(dtype)))
    if kind == "gguf":
        from vptq_jax.convert.gguf import load_gguf

        return load_gguf(path, dtype=dtype, progress=progress)
    if kind == "hf":
        from vptq_jax.convert.hf import load_hf

        return load_hf(path, dtype=dtype, progress=progress)
    from vptq_jax.convert.vptq_format import load_vptq

    return load_vptq(path, dtype=dtype, progress=progress)


def open_streamed(path_or_id: str | Path, *, dtype: Any = None) -> StreamedModel:
    """A plain checkpoint (Hugging Face or GGUF) whose weights are read one by one as `quantize` asks for them.

    Args:
        path_or_id: see `load`.
        dtype: dtype of the parameters; None keeps the stored one (GGUF: float32).

    Raises:
        FileNotFoundError, NotImplementedError, ValueError: see `load`; ValueError also for a checkpoint that is
            quantized or saved by vptq_jax.
    """
    kind, path = recognize(path_or_id)
    if kind == "gguf":
        from vptq_jax.convert.gguf import stream_gguf

        return stream_gguf(path, dtype=dtype)
    if kind == "hf":
        from vptq_jax.convert.hf import stream_hf

        return stream_hf(path, dtype=dtype)
    raise ValueError(
        f"{path} is of kind {kind!r}, which cannot be streamed; expected a plain Hugging Face or GGUF model"
    )
