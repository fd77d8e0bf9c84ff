"""The community's VPTQ checkpoints in: Hugging Face directories with a `quantization_config` of method `vptq`.

Packed indices and codebooks are adopted bit for bit; what `VQArray` holds is what the file holds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vptq_jax.array import VQArray
from vptq_jax.convert.hf import (
    finish,
    is_harmless,
    nonfinite_problems,
    quantization_method,
    read_config,
    tensor_problems,
)
from vptq_jax.convert.safetensors_reader import SafetensorsFiles
from vptq_jax.convert.source import FLOATS, HeaderSource, StoredSource, check_dtype, to_device
from vptq_jax.extras import byte_bar
from vptq_jax.format import FLOATS as FLOAT_FIELDS
from vptq_jax.format import Format
from vptq_jax.json_files import read_json, resolve_directory
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.registry import Requirements, build
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.packing import pack_indices
from vptq_jax.problems import raise_problems
from vptq_jax.schema import is_integer, short

_LOG = logging.getLogger(__name__)

TENSORS = {
    "indices": "indices",
    "codebook": "centroids.weight",
    "res_codebook": "res_centroids.weight",
    "outlier_indices": "outlier_indices",
    "outlier_codebook": "outlier_centroids.weight",
    "scale": "weight_scale",
    "offset": "weight_bias",
    "perm": "perm",
}
"""Name of every `VQArray` field inside a layer."""

SWAPPED = "swapped_codebooks"
"""Our own key: layers whose residual codebook, being the larger one, is stored as the main one."""

_RES_INDICES = "res_indices"  # only where indices are not packed
_LAYER_KEYS = frozenset({
    "in_features", "out_features", "bias", "vector_lens", "num_centroids", "num_res_centroids", "group_num",
    "group_size", "outlier_size", "enable_perm", "enable_norm", "is_indice_packed", "norm_dim", "indices_as_float",
    "enable_proxy_error", "vector_quant_dim",
})  # fmt: skip
_SECTION_KEYS = frozenset({
    "quant_method", "config_for_layers", "shared_layer_config", "modules_to_not_convert", "enable_proxy_error",
    "vptq_jax",
})  # fmt: skip
_INDEX_DTYPES = ("int16", "uint16", "float16", "int32", "int64")
_PERM_DTYPES = ("int16", "uint16", "int32", "int64")


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """How one quantized layer lies in the checkpoint."""

    format: Format
    packed: bool
    swapped: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the layer (without bias), by name inside the layer."""
        format = self.format
        shapes = {TENSORS[field]: shape for field, shape in format.shapes().items() if shape is not None}
        plain = (format.num_groups, format.num_vectors, format.group_size)
        if not self.packed:
            shapes["indices"] = plain
            if format.num_res_centroids:
                shapes[_RES_INDICES] = plain
        for name in ("centroids.weight", "res_centroids.weight"):
            if name in shapes:
                groups, size, length = shapes[name]
                shapes[name] = (groups, size * length)
        if format.outlier_size:
            shapes["outlier_indices"] = (1, *shapes["outlier_indices"])
            shapes["outlier_centroids.weight"] = (1, format.num_outlier_centroids * format.outlier_vector_len)
        return shapes


@dataclasses.dataclass(frozen=True)
class VPTQCheckpoint:
    """A VPTQ directory whose headers fit its config: all that is known without reading a weight.

    Attributes:
        directory: where it lies.
        config: of the model.
        files: its tensors.
        plan: what the model asks for.
        layers: every quantized layer, by module path.
    """

    directory: Path
    config: ModelConfig
    files: SafetensorsFiles
    plan: Requirements
    layers: dict[str, StoredLayer]

    def abstract(self) -> Decoder:
        """The model with shapes in place of arrays."""
        return build(self.config, _AbstractVPTQSource(self))


def load_vptq(path_or_id: str | Path, *, dtype: Any = None, progress: bool = False) -> LanguageModel:
    """A VPTQ checkpoint as a model with quantized layers, tensor by tensor.

    Args:
        path_or_id: a directory or hub id.
        dtype: dtype of the tensors that are not quantized; None keeps every one as it is stored.
            Codebooks, scales and offsets always keep theirs.
        progress: show a bar.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: everything that is wrong with it, gathered before a large tensor is read.
    """
    target = check_dtype(dtype)
    stored = open_vptq(path_or_id)
    raise_problems(f"{stored.directory} holds values that cannot be", content_problems(stored))
    with byte_bar(progress, stored.files.nbytes, "reading") as bar:
        model = build(stored.config, _VPTQSource(stored, target, bar.update))
    return finish(model, stored.directory)


def open_vptq(path_or_id: str | Path) -> VPTQCheckpoint:
    """Checks a VPTQ checkpoint's config, layer configs and headers.

    Raises:
        FileNotFoundError: no such checkpoint, or no weights in it.
        ValueError: every problem found.
    """
    directory = resolve_directory(path_or_id)
    raw = read_json(directory / "config.json")
    if quantization_method(raw) != "vptq":
        raise ValueError(f"{directory} is no VPTQ checkpoint: its quantization method is {quantization_method(raw)!r}")
    files = SafetensorsFiles(directory)
    config = read_config(raw, files)
    plan = Requirements(config)
    layers, problems = read_layers(raw["quantization_config"], plan)
    problems += _header_problems(plan, layers, files, config)
    raise_problems(f"{directory} cannot be read", problems)
    return VPTQCheckpoint(directory, config, files, plan, layers)


def read_layers(section: Mapping[str, Any], plan: Requirements) -> tuple[dict[str, StoredLayer], list[str]]:
    """Every quantized layer that a `quantization_config` describes, and the problems with it."""
    problems: list[str] = []
    own, shared = (_mapping(section, key, problems) for key in ("config_for_layers", "shared_layer_config"))
    left_dense = section.get("modules_to_not_convert") or []
    if not isinstance(left_dense, list) or not all(isinstance(name, str) for name in left_dense):
        problems.append(f"modules_to_not_convert is {short(left_dense)}; expected a list of names")
        left_dense = []
    unknown = set(section) - _SECTION_KEYS
    swapped = section.get("vptq_jax", {})
    swapped = swapped.get(SWAPPED) or [] if isinstance(swapped, Mapping) else []
    if not isinstance(swapped, list) or not all(isinstance(name, str) for name in swapped):
        problems.append(f"{SWAPPED} is {short(swapped)}; expected a list of names")
        swapped = []
    layers: dict[str, StoredLayer] = {}
    for path, (out_features, in_features, _) in plan.linears.items():
        raw = own.get(path, shared.get(path.rsplit(".", 1)[-1]))
        if raw is None or _is_left_dense(path, left_dense):
            continue
        if not isinstance(raw, Mapping):
            problems.append(f"{path}: its layer config is {short(raw)}; expected an object")
            continue
        unknown |= set(raw) - _LAYER_KEYS
        try:
            layers[path] = read_layer(raw, out_features, in_features, swapped=path in swapped)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    problems += [
        f"config_for_layers names {short(name)}, which the model does not have" for name in own.keys() - plan.linears
    ]
    if unknown:
        _LOG.info("ignoring unknown keys of quantization_config: %s", ", ".join(sorted(map(str, unknown))))
    if not layers and not problems:
        problems.append("quantization_config names no layer of the model")
    return layers, problems


def read_layer(raw: Mapping[str, Any], out_features: int, in_features: int, *, swapped: bool = False) -> StoredLayer:
    """One layer's config, checked against the shape that the model config asks for.

    Raises:
        ValueError: a value of the wrong type, out of range, or at odds with the shape.
    """
    for key, expected in (("in_features", in_features), ("out_features", out_features)):
        if _integer(raw, key, -1) not in (-1, expected):
            raise ValueError(f"{key} is {raw[key]}; the model config asks for {expected}")
    if raw.get("norm_dim") not in (None, 0):
        raise ValueError(f"norm_dim is {short(raw['norm_dim'])}; only 0 (scale and bias per input column) is read")
    if raw.get("vector_quant_dim") not in (None, "out"):
        raise ValueError(f"vector_quant_dim is {short(raw['vector_quant_dim'])}; only 'out' is read")
    outlier_length, length = _pair(raw, "vector_lens")
    outlier_centroids, centroids = _pair(raw, "num_centroids")
    outlier_residuals, residuals = _pair(raw, "num_res_centroids")
    outliers, groups = _integer(raw, "outlier_size", 0), _integer(raw, "group_num", 1)
    if outliers and outlier_residuals > 0:
        raise ValueError(
            f"num_res_centroids is {[outlier_residuals, residuals]}: outliers with a residual are not read"
        )
    format = Format(
        out_features=out_features,
        in_features=in_features,
        vector_len=length,
        num_centroids=centroids,
        num_res_centroids=max(residuals, 0),
        num_groups=groups,
        outlier_size=outliers,
        outlier_vector_len=outlier_length if outliers else 0,
        num_outlier_centroids=outlier_centroids if outliers else 0,
        normalize=_boolean(raw, "enable_norm"),
        permute=_boolean(raw, "enable_perm"),
    )
    size = _integer(raw, "group_size", -1)
    if size > 0 and size != format.group_size:
        raise ValueError(
            f"group_size is {size}; {in_features} columns less {outliers} outliers in {groups} groups make "
            f"{format.group_size}"
        )
    return StoredLayer(
        format,
        packed=_boolean(raw, "is_indice_packed"),
        swapped=swapped and format.num_res_centroids > 0,
    )


def content_problems(stored: VPTQCheckpoint, *, everything: bool = False) -> Iterator[str]:
    """Faults that only values show: NaN, permutations that are none, indices beyond their codebook.

    Reads one tensor at a time and keeps none; `everything` also reads the dense weights and packed
    indices of unpacked layers, otherwise only the small tensors of quantized layers.
    """
    small = {f"{path}.{name}": layer for path, layer in stored.layers.items() for name in layer.shapes()}
    for name in stored.files:
        layer = small.get(name)
        if layer is None:
            if everything and stored.files[name].dtype.name in FLOATS:
                yield from nonfinite_problems(name, stored.files.read(name))
        elif name.endswith(".perm"):
            yield from _perm_problems(name, stored.files.read(name), layer.format.in_features)
        elif name.endswith(".outlier_indices"):
            yield from _range_problems(name, stored.files.read(name), layer.format.num_outlier_centroids)
        elif not name.endswith("indices"):
            yield from nonfinite_problems(name, stored.files.read(name))
        elif not layer.packed:
            residual = name.endswith(_RES_INDICES)
            size = layer.format.num_res_centroids if residual else layer.format.num_centroids
            yield from _range_problems(name, stored.files.read(name), size)


class _VPTQSource(StoredSource):
    """Quantized layers from their stored tensors, everything else as it is."""

    def __init__(self, stored: VPTQCheckpoint, dtype: Any, progress: Any):
        super().__init__(lambda name: stored.files.read(name, dtype), progress)
        self._stored = stored

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        layer = self._stored.layers.get(name)
        if layer is None:
            return super().linear(name, out_features, in_features, bias=bias)
        weight = self._read_weight(name, layer)
        return VQLinear(weight, self.tensor(f"{name}.bias", (out_features,)) if bias else None)

    def _read_weight(self, path: str, layer: StoredLayer) -> VQArray:
        fields: dict[str, Any] = {}
        for field, shape in layer.format.shapes().items():
            if shape is None:
                fields[field] = None
            elif field != "indices":
                fields[field] = to_device(f"{path}.{TENSORS[field]}", self._read_field(path, field).reshape(shape))
        if layer.packed:
            indices = jax.device_put(self._read_field(path, "indices"))
            weight = VQArray(indices=indices, format=layer.format, **fields)
        else:
            weight = self._pack(path, layer, fields)
        return swap_codebooks(weight) if layer.swapped else weight

    def _read_field(self, path: str, field: str) -> np.ndarray:
        name = f"{path}.{TENSORS[field]}"
        array = self._stored.files.read(name)
        if self._progress:
            self._progress(array.nbytes)
        if field == "indices" and array.dtype == np.int32:
            return array.view(np.uint32)
        if field == "outlier_indices":
            return _unsigned(array).astype(np.uint16, copy=False)
        return _unsigned(array).astype(np.int32) if field == "perm" else array

    def _pack(self, path: str, layer: StoredLayer, fields: dict[str, Any]) -> VQArray:
        main = _unsigned(self._stored.files.read(f"{path}.indices")).astype(np.uint32)
        residual = None
        if layer.format.num_res_centroids:
            residual = _unsigned(self._stored.files.read(f"{path}.{_RES_INDICES}")).astype(np.uint32)
        packed: Any = jax.device_put((main, residual))
        return VQArray.from_indices(layer.format, *packed, **fields)


class _AbstractVPTQSource(HeaderSource):
    """As `_VPTQSource`, with shapes in place of arrays."""

    def __init__(self, stored: VPTQCheckpoint):
        super().__init__(lambda name: stored.files[name].dtype)
        self._stored = stored

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        layer = self._stored.layers.get(name)
        if layer is None:
            return super().linear(name, out_features, in_features, bias=bias)
        format = swapped_format(layer.format) if layer.swapped else layer.format
        weight = VQArray.abstract(format)
        floats = {field: value for field in FLOAT_FIELDS if (value := getattr(weight, field)) is not None}
        for field, value in floats.items():
            dtype = self._stored.files[f"{name}.{TENSORS[field]}"].dtype
            floats[field] = jax.ShapeDtypeStruct(value.shape, dtype)
        weight = dataclasses.replace(weight, **floats)
        return VQLinear(weight, self.tensor(f"{name}.bias", (out_features,)) if bias else None)


def swapped_format(format: Format) -> Format:
    """The format with the sizes of main and residual codebook exchanged."""
    return dataclasses.replace(format, num_centroids=format.num_res_centroids, num_res_centroids=format.num_centroids)


def swap_codebooks(weight: VQArray) -> VQArray:
    """The same weight with main and residual codebook exchanged: their sum does not change."""
    main, residual = weight.unpack()
    assert residual is not None
    assert weight.res_codebook is not None
    format = swapped_format(weight.format)
    packed = pack_indices(residual, main, format.index_bits, format.res_index_bits)
    return dataclasses.replace(
        weight, indices=packed, codebook=weight.res_codebook, res_codebook=weight.codebook, format=format
    )


def _unsigned(array: np.ndarray) -> np.ndarray:
    """Two-byte dtypes hold the bits of a uint16; wider ones hold plain numbers."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _header_problems(
    plan: Requirements, layers: Mapping[str, StoredLayer], files: SafetensorsFiles, config: ModelConfig
) -> list[str]:
    dense = {name: shape for name, shape in plan.shapes.items() if name.removesuffix(".weight") not in layers}
    known = set(dense)
    problems = []
    for path, layer in layers.items():
        for name, shape in layer.shapes().items():
            full = f"{path}.{name}"
            known.add(full)
            if full not in files:
                problems.append(f"{full} is missing; expected shape {list(shape)}")
            elif files[full].shape != shape:
                problems.append(f"{full} has shape {list(files[full].shape)}; expected {list(shape)}")
            elif files[full].dtype.name not in _dtypes_of(name, layer):
                kinds = ", ".join(_dtypes_of(name, layer))
                problems.append(f"{full} has dtype {files[full].dtype.name}; expected {kinds}")
    problems += [problem for problem in tensor_problems(dense, files, config) if not problem.endswith("is unexpected")]
    return problems + [
        f"{short(name)} of shape {list(files[name].shape)} is unexpected"
        for name in files
        if name not in known and not is_harmless(name, config) and not _is_empty_outlier(name, layers)
    ]


def _is_empty_outlier(name: str, layers: Mapping[str, StoredLayer]) -> bool:
    """The reference allocates an outlier codebook and no indices where there are no outlier columns."""
    path, _, tail = name.partition(".outlier_")
    return bool(tail) and path in layers and not layers[path].format.outlier_size


def _dtypes_of(name: str, layer: StoredLayer) -> tuple[str, ...]:
    if name == "perm":
        return _PERM_DTYPES
    if name == "indices" and layer.packed:
        return ("int32", "uint32")
    return _INDEX_DTYPES if name.endswith("indices") else FLOATS


def _perm_problems(name: str, array: np.ndarray, count: int) -> Iterator[str]:
    values = _unsigned(array).astype(np.int64)
    if not np.array_equal(np.sort(values), np.arange(count)):
        yield f"{name} is no permutation of 0 .. {count - 1}"


def _range_problems(name: str, array: np.ndarray, size: int) -> Iterator[str]:
    values = _unsigned(array)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        yield f"{name} holds index {low if low < 0 else high}; its codebook has {size} entries"


def _is_left_dense(path: str, names: list[str]) -> bool:
    stems = (name.removesuffix(".weight") for name in names)
    return any(path == stem or path.endswith(f".{stem}") or path.startswith(f"{stem}.") for stem in stems)


def _mapping(section: Mapping[str, Any], key: str, problems: list[str]) -> Mapping[str, Any]:
    value = section.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    problems.append(f"{key} is {short(value)}; expected an object")
    return {}


def _integer(raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    if not is_integer(value):
        raise ValueError(f"{key} is {short(value)}; expected a whole number")
    return value


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {short(value)}; expected true or false")
    return value


def _pair(raw: Mapping[str, Any], key: str) -> tuple[int, int]:
    value = raw.get(key, [-1, -1] if key == "num_res_centroids" else None)
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_integer, value)):
        raise ValueError(f"{key} is {short(value)}; expected two whole numbers, [of the outliers, of the rest]")
    return value[0], value[1]
