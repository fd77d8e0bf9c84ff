"""`quantize`: every linear layer of a model, block by block, with its progress on disk."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from vptq_jax.array import VQArray
from vptq_jax.extras import progress_bar
from vptq_jax.lm.activations import Tokens, check_batches, hessian_key
from vptq_jax.lm.calibration import Calibration, GivenHessians, RunningCalibration
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.lm.fingerprint import array_digest, json_digest
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.registry import Requirements
from vptq_jax.lm.report import QuantReport, peak_memory
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.lm.workdir import WorkDir
from vptq_jax.nn.hessians import Hessians
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.quantizer import check_rules, operator_row, quantize_module, quantize_operator, raise_unfit, unfit
from vptq_jax.quantization.linalg import check_hessian
from vptq_jax.quantization.metric import LastMetric
from vptq_jax.spec import QuantConfig, VQSpec

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def quantize(
    model: Any,
    config: QuantConfig | VQSpec | str,
    calibration: Hessians | Iterable[Tokens],
    *,
    workdir: str | os.PathLike[str] | WorkDir | None = None,
    progress: bool = True,
) -> tuple[Any, QuantReport]:
    """Quantizes the linear layers of a language model, or of any NNX module, with VPTQ.

    Besides what the caller put there, the device holds one block of dense weights and its Hessians at a time; a
    `StreamedModel` is never in memory as a whole. The output projection and the embedding, when a rule names
    them, come last; an untied embedding has no input, so all its columns count alike.

    Args:
        model: a `LanguageModel`, its module, or a `StreamedModel`; or any other module, with Hessians
            (`nn.quantizer.quantize_module`). Left as it is.
        config: specs by module path, options, seed; a spec alone stands for `QuantConfig(spec)`.
        calibration: Hessians from `collect_hessians` or `load_hessians`, or token batches [B, T] to collect them
            from on the way (needed for `mode="sequential"`).
        workdir: every finished operator is kept there at once; called again with the same inputs after a crash or
            an interrupt, finished operators are skipped and the result is the same to the bit. One run at a time may
            use it. A `WorkDir` stays locked, for the caller to close or remove.
        progress: show a progress bar.

    Returns:
        The quantized model (a `LanguageModel` of a `StreamedModel`, else of the kind that was given), codebooks in
        float16 (a tensor that float16 is too narrow for stays in float32, as the report says), and the report.

    Raises:
        ValueError: before work starts: a spec does not fit a layer, nothing is to be quantized, Hessians belong to
            another model or are not Hessians, a weight is not finite, batches are unusable, or `workdir` belongs to
            another run (the message says what changed).
        OSError: `workdir` cannot be written; what was finished stays usable.

    Example:
        >>> from vptq_jax.lm.hessians import collect_hessians
        >>> layer = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(layer, nnx.relu)  # any module; a language model takes token ids as batches
        >>> batches = [jax.random.normal(jax.random.key(seed), (64, 16)) for seed in range(4)]
        >>> hessians = collect_hessians(model, batches, progress=False)
        >>> small, report = quantize(model, "v4-k16", hessians, progress=False)
        >>> type(small.layers[0]).__name__, small(batches[0]).shape
        ('VQLinear', (64, 32))
    """
    if not isinstance(model, LanguageModel | Decoder | StreamedModel):
        return _quantize_module(model, config, calibration, workdir, progress=progress)
    given = model.module if isinstance(model, LanguageModel) else model
    if workdir is None or isinstance(workdir, WorkDir):
        new, report = _quantize(given, config, calibration, workdir, progress=progress)
    else:
        with WorkDir(workdir) as work:
            new, report = _quantize(given, config, calibration, work, progress=progress)
    if isinstance(model, Decoder):
        return new, report
    return LanguageModel(new, model.tokenizer, model.generation_config), report


def _quantize_module(
    module: Any, config: QuantConfig | VQSpec | str, calibration: Any, workdir: Any, *, progress: bool
) -> tuple[nnx.Module, QuantReport]:
    if not isinstance(module, nnx.Module):
        raise TypeError(f"found a {type(module).__name__}; expected a language model or an NNX module")
    if not isinstance(calibration, Hessians):
        raise ValueError("a module of another kind needs Hessians: collect_hessians(module, batches, call)")
    if workdir is not None:
        raise ValueError("a work directory is for language models; leave it out")
    started = time.perf_counter()
    config = config if isinstance(config, QuantConfig) else QuantConfig(config)
    new, rows = quantize_module(module, config, calibration, progress=progress)
    seconds = {"total": time.perf_counter() - started, "calibration": 0.0}
    return new, QuantReport(rows, config_record(config), seconds, peak_memory(), "")


def run_fingerprint(
    model: LanguageModel | Decoder | StreamedModel,
    config: QuantConfig | VQSpec | str,
    calibration: Hessians | Iterable[Tokens],
) -> str:
    """Digest of everything that the result of `quantize` depends on, as in its report; reads all weights once.

    Raises:
        ValueError: as `quantize` does before work starts.
    """
    config = config if isinstance(config, QuantConfig) else QuantConfig(config)
    shell = _Shell(model.module if isinstance(model, LanguageModel) else model)
    specs = plan(shell.model.config, config)
    along: Calibration
    if isinstance(calibration, Hessians):
        along = GivenHessians(calibration)
    else:
        batches = list(check_batches(calibration, shell.config.vocab_size))
        along = RunningCalibration(shell.model, batches, config, last=-1)
    inputs: dict[str, Any] = {}
    for layer in range(shell.config.num_layers):
        block = shell.dense_block(layer)
        along.enter(block, layer, needed=False)
        for path, owner, attribute in block.places():
            if (path := f"model.layers.{layer}.{path}") in specs:
                inputs[path] = _inputs(path, specs[path], getattr(owner, attribute).weight[...], along)
    for path in (_HEAD, _EMBEDDING):
        if path in specs:
            metric = along if shell.reads_hidden(path) else _uniform(path, shell.config.hidden_size)
            inputs[path] = _inputs(path, specs[path], shell.end(path).weight[...], metric)
    return json_digest([_run_record(shell.config, config), inputs])


def _quantize(
    model: Decoder | StreamedModel,
    config: QuantConfig | VQSpec | str,
    calibration: Hessians | Iterable[Tokens],
    work: WorkDir | None,
    *,
    progress: bool,
) -> tuple[Decoder, QuantReport]:
    started = time.perf_counter()
    config = config if isinstance(config, QuantConfig) else QuantConfig(config)
    shell = _Shell(model)
    specs = plan(shell.model.config, config)
    batches = None if isinstance(calibration, Hessians) else list(check_batches(calibration, shell.config.vocab_size))
    shell.check_weights(specs)
    if isinstance(calibration, Hessians):
        _check_hessians(calibration, specs, shell, config)
    record = _run_record(shell.config, config)
    if work:
        work.bind(record)
    unfinished = {path for path in specs if not (work and work.has(path))}
    along: Calibration
    if isinstance(calibration, Hessians):
        along = GivenHessians(calibration)
    else:
        along = RunningCalibration(shell.model, batches or [], config, _last_block(unfinished, shell.config.num_layers))
    with progress_bar(progress, total=len(specs), desc="Quantizing", unit="layer") as bar:
        operators = _Operators(config, specs, work, bar)
        for layer in range(shell.config.num_layers):
            name = f"model.layers.{layer}"
            block = shell.dense_block(layer)
            places = [(f"{name}.{path}", owner, attribute) for path, owner, attribute in block.places()]
            along.enter(block, layer, needed=any(path in unfinished for path, _, _ in places))
            for path, owner, attribute in places:
                if path in specs:
                    setattr(owner, attribute, operators.quantized(path, getattr(owner, attribute), along))
            along.leave(block)
            shell.model.layers[layer] = block
        for path in (_HEAD, _EMBEDDING):
            if path in specs:
                metric = along if shell.reads_hidden(path) else _uniform(path, shell.config.hidden_size)
                shell.model.set_linear(path, operators.quantized(path, shell.end(path), metric))
    seconds = {"total": time.perf_counter() - started, "calibration": along.seconds}
    fingerprint = json_digest([record, operators.inputs])
    return shell.model, QuantReport(operators.rows, config_record(config), seconds, peak_memory(), fingerprint)


def plan(model: ModelConfig, config: QuantConfig) -> dict[str, VQSpec]:
    """The spec of every layer that is to be quantized, by module path in the order of work.

    Raises:
        ValueError: a rule matches no layer, a spec does not fit its layer (all such layers are listed), or no layer has
            a spec.
    """
    shapes = _linear_shapes(model)
    check_rules(config, shapes)
    specs: dict[str, VQSpec] = {}
    problems: list[str] = []
    for path, shape in shapes.items():
        spec = config.spec_for(path, decoder_linear=path not in (_EMBEDDING, _HEAD))
        if spec is None:
            continue
        specs[path] = spec
        problems += unfit(path, shape, spec)
    raise_unfit(problems)
    if not specs:
        raise ValueError("no layer has a spec: the default spec is None and no rule gives another one")
    return specs


class _Shell:
    """The model in the making: embedding, norm and head as they are, blocks put in one by one."""

    def __init__(self, given: Decoder | StreamedModel):
        self._given = given
        self.config = given.config
        if isinstance(given, Decoder):
            self.model = _copy(given)
            ends = {_EMBEDDING: given.embed_tokens, _HEAD: given.lm_head}
            quantized = [path for path, layer in (ends | given.linears()).items() if isinstance(layer, VQLinear)]
            if quantized:
                raise ValueError(f"the model is quantized already ({quantized[0]} is); give the one it was made from")
        else:
            self.model = given.shell()

    def dense_block(self, layer: int) -> Block:
        """A block that may be changed; read from storage, if that is where the weights are."""
        if isinstance(self._given, Decoder):
            return _copy(self._given.layers[layer])
        return self._given.block(layer)

    def end(self, path: str) -> Any:
        """The embedding or the output projection (the embedding again, when tied)."""
        head = self.model.lm_head
        return self.model.embed_tokens if path == _EMBEDDING or head is None else head

    def reads_hidden(self, path: str) -> bool:
        """Whether a layer has inputs; an embedding that is not tied to the output projection is only looked up in."""
        return path != _EMBEDDING or self.model.lm_head is None

    def weights(self, paths: Iterable[str]) -> dict[str, Array]:
        """Those weights that are in memory; of a streamed model also the first block's, to stand for the rest."""
        layers: dict[str, Any] = {_EMBEDDING: self.end(_EMBEDDING), _HEAD: self.end(_HEAD)}
        if isinstance(self._given, Decoder):
            layers |= self._given.linears()
        else:
            first = self.dense_block(0).places()
            layers |= {f"model.layers.0.{path}": getattr(owner, name) for path, owner, name in first}
        return {path: layers[path].weight[...] for path in paths if path in layers}

    def check_weights(self, paths: Iterable[str]) -> None:
        """Raises ValueError if a weight in memory is not finite."""
        finite = {path: _all_finite(weight) for path, weight in self.weights(paths).items()}
        for path, value in finite.items():
            if not bool(value):
                raise ValueError(f"{path}.weight holds NaN or infinite values, expected finite ones")


class _Operators:
    """Makes quantized layers, or takes them from the work directory, and keeps the rows of the report."""

    def __init__(
        self,
        config: QuantConfig,
        specs: Mapping[str, VQSpec],
        work: WorkDir | None,
        bar: Any,
    ):
        self._config, self._specs, self._work, self._bar = config, specs, work, bar
        self._metrics = LastMetric()
        self.rows: list[dict[str, Any]] = []
        self.inputs: dict[str, dict[str, str]] = {}

    def quantized(self, path: str, dense: Linear, calibration: Calibration) -> VQLinear:
        """The quantized form of one dense layer; on disk when this returns."""
        self._bar.set_postfix_str(path)
        weight = dense.weight[...]
        inputs = self.inputs[path] = _inputs(path, self._specs[path], weight, calibration)
        done = self._work.load(path, inputs) if self._work else None
        if done is None:
            done = self._quantize(path, weight, calibration)
            if self._work:
                self._work.save(path, *done, inputs)
        array, stats = done
        self.rows.append(operator_row(path, self._specs[path], array) | stats)
        self._bar.update()
        return VQLinear(array, None if dense.bias is None else dense.bias[...])

    def _quantize(
        self, path: str, weight: Float[Array, "out in"], calibration: Calibration
    ) -> tuple[VQArray, dict[str, Any]]:
        hessian = calibration.hessian(path)
        started = time.perf_counter()
        array, stats = quantize_operator(path, weight, hessian, self._specs[path], self._config, self._metrics)
        array = jax.block_until_ready(array)
        return array, stats | {"seconds": time.perf_counter() - started}


def _inputs(path: str, spec: VQSpec, weight: Float[Array, "out in"], calibration: Calibration) -> dict[str, str]:
    """What one operator's result depends on, beside the configuration."""
    return {"spec": str(spec), "weight": array_digest(weight), **calibration.inputs(path)}


def _uniform(path: str, features: int) -> GivenHessians:
    """The metric in which all columns of one layer count alike."""
    return GivenHessians(Hessians({path: np.eye(features, dtype=np.float32)}, {path: {path: ""}}, tokens=0))


def _last_block(unfinished: set[str], layers: int) -> int:
    """The last block that calibration data must reach, -1 if none."""
    if unfinished & {_HEAD, _EMBEDDING}:
        return layers - 1
    return max((int(path.split(".")[2]) for path in unfinished), default=-1)


def _linear_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape of every linear layer in the order of work: blocks, then output projection and embedding."""
    shapes = {path: (rows, columns) for path, (rows, columns, _) in Requirements(model).linears.items()}
    embedding = shapes.pop(_EMBEDDING)
    return shapes | {_EMBEDDING: embedding}


def _check_hessians(hessians: Hessians, specs: Mapping[str, VQSpec], shell: _Shell, config: QuantConfig) -> None:
    """Raises ValueError unless there is a sound Hessian of this very model for every layer."""
    if config.mode == "sequential":
        raise ValueError(
            "mode 'sequential' collects Hessians while it quantizes and cannot use given ones; "
            "pass token batches, or take mode 'independent'"
        )
    needed = [path for path in specs if shell.reads_hidden(path)]
    missing = [path for path in needed if path not in hessians]
    if missing:
        others = f" and {len(missing) - 1} other layers" if len(missing) > 1 else ""
        raise ValueError(f"there is no Hessian for {missing[0]}{others}; collect them on this model")
    for path, weight in shell.weights(needed).items():
        expected = hessians.weight_digest(path)
        if expected and array_digest(weight) != expected:
            raise ValueError(
                f"the Hessians were collected on another model: {path}.weight differs from the one they belong to; "
                "collect them on this model"
            )
    shapes = _linear_shapes(shell.config)
    for key in dict.fromkeys(map(hessian_key, needed)):
        check_hessian(jnp.asarray(hessians.for_module(key)), shapes[key][1], key)


def _run_record(model: ModelConfig, config: QuantConfig) -> dict[str, Any]:
    return {
        "version": importlib.metadata.version("vptq_jax"),
        "model": model.to_hf(),
        "config": config_record(config),
    }


def config_record(config: QuantConfig) -> dict[str, Any]:
    """A config as JSON values, specs as they are written."""
    rules = [[pattern, None if spec is None else str(spec)] for pattern, spec in config.rules]
    return dataclasses.asdict(config) | {"spec": None if config.spec is None else str(config.spec), "rules": rules}


def _copy(module: Any) -> Any:
    """A module of its own over the same arrays."""
    return nnx.merge(*nnx.split(module), copy=True)


@jax.jit
def _all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()
