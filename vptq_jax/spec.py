"""What a quantized layer looks like (`VQSpec`) and which layer gets which spec (`QuantConfig`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from vptq_jax.schema import bounds, is_finite, is_integer, short

MAX_VECTOR_LEN = 64
MAX_CENTROIDS = 65536

_GRAMMAR = (
    "v<vector length>-k<centroids>[-<residual centroids>][-g<groups>]"
    "[-o<percent>v<length>k<centroids>][-nonorm][-noperm], for example 'v8-k256', "
    "'v12-k4096-4096' or 'v12-k4096-4096-g4-o1v4k8192'"
)
_SPEC = re.compile(
    r"v(?P<v>\d+)-k(?P<k>\d+)(?:-(?P<kr>\d+))?(?:-g(?P<g>\d+))?"
    r"(?:-o(?P<op>\d+(?:\.\d+)?)%?v(?P<ov>\d+)k(?P<ok>\d+))?(?P<nonorm>-nonorm)?(?P<noperm>-noperm)?"
)


def check_vector_len(value: int, what: str) -> None:
    """Raises ValueError unless vectors may have this length."""
    if not 1 <= value <= MAX_VECTOR_LEN:
        raise ValueError(f"{what} is {value}; expected a whole number from 1 to {MAX_VECTOR_LEN}")


def check_centroids(value: int, what: str) -> None:
    """Raises ValueError unless a codebook may have this size."""
    if not 2 <= value <= MAX_CENTROIDS or value & (value - 1):
        raise ValueError(f"{what} is {value}; expected a power of two from 2 to {MAX_CENTROIDS}")


def index_bits(centroids: int) -> int:
    """Bits of an index into a codebook, log2(k); 0 for none."""
    return centroids.bit_length() - 1 if centroids else 0


@dataclasses.dataclass(frozen=True)
class VQSpec:
    """The format of one quantized layer, before its shape is known.

    Symbols follow the VPTQ paper (arXiv 2409.17066): `v` consecutive output rows of one input
    column form a vector, which is stored as an index into `num_centroids` centroids, plus one
    into `num_res_centroids` residual centroids (0: no residual codebook).

    Attributes:
        vector_len: v, 1 to 64.
        num_centroids: k, a power of two from 2 to 65536.
        num_res_centroids: k_r, 0 or a power of two from 2 to 65536.
        num_groups: input columns are split into this many groups, each with its own codebooks.
        outlier_percent: percentage of input columns (those with the largest Hessian diagonal)
            that are quantized with the outlier codebook; 0 for none.
        outlier_vector_len: vector length of the outlier columns, 0 without outliers.
        num_outlier_centroids: codebook size of the outlier columns, 0 without outliers.
        normalize: store a scale and an offset per input column.
        permute: quantize the columns in order of falling Hessian diagonal.

    Raises:
        ValueError: a value is out of its range.
    """

    vector_len: int
    num_centroids: int
    num_res_centroids: int = 0
    num_groups: int = 1
    outlier_percent: float = 0.0
    outlier_vector_len: int = 0
    num_outlier_centroids: int = 0
    normalize: bool = True
    permute: bool = True

    def __post_init__(self) -> None:
        check_vector_len(self.vector_len, "vector length")
        check_centroids(self.num_centroids, "number of centroids")
        if self.num_res_centroids:
            check_centroids(self.num_res_centroids, "number of residual centroids")
        if self.num_groups < 1:
            raise ValueError(f"number of groups is {self.num_groups}; expected at least 1")
        if not 0 <= self.outlier_percent < 100:
            raise ValueError(
                f"outlier percentage is {self.outlier_percent}; expected 0 (none) or more, and less than 100"
            )
        if self.outlier_percent:
            check_vector_len(self.outlier_vector_len, "outlier vector length")
            check_centroids(self.num_outlier_centroids, "number of outlier centroids")
        elif self.outlier_vector_len or self.num_outlier_centroids:
            raise ValueError(
                "an outlier codebook is given but the outlier percentage is 0; "
                "leave the outlier part out or give a percentage above 0"
            )

    @classmethod
    def parse(cls, text: str | VQSpec) -> VQSpec:
        """Reads a spec string such as `v8-k256-256` (`str(spec)` writes it).

        Example:
            >>> spec = VQSpec.parse("v8-k256-256")
            >>> spec.vector_len, spec.num_centroids, spec.num_res_centroids, spec.nominal_bits
            (8, 256, 256, 2.0)
        """
        if isinstance(text, VQSpec):
            return text
        match = _SPEC.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"cannot read the spec {text!r}; expected {_GRAMMAR}")
        part = match.groupdict()
        try:
            return cls(
                vector_len=int(part["v"]),
                num_centroids=int(part["k"]),
                num_res_centroids=int(part["kr"] or 0),
                num_groups=int(part["g"] or 1),
                outlier_percent=float(part["op"] or 0),
                outlier_vector_len=int(part["ov"] or 0),
                num_outlier_centroids=int(part["ok"] or 0),
                normalize=part["nonorm"] is None,
                permute=part["noperm"] is None,
            )
        except ValueError as error:
            raise ValueError(f"spec {text!r}: {error}") from None

    def __str__(self) -> str:
        text = spec_text(self, self.outlier_percent)
        return text + ("" if self.normalize else "-nonorm") + ("" if self.permute else "-noperm")

    @property
    def nominal_bits(self) -> float:
        """Index bits per weight as the community counts them: log2(k)/v + log2(k_r)/v."""
        return (index_bits(self.num_centroids) + index_bits(self.num_res_centroids)) / self.vector_len


Mode = Literal["independent", "sequential"]

_MOST = 1 << 20  # rounds and iterations: more is a slip of the pen


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not is_integer(value):
        raise ValueError(f"{name} is {short(value)}; expected a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}; expected {bounds(value, low, high)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the search for the codebooks and indices of one matrix runs.

    Attributes:
        kmeans_iters: Lloyd iterations at most, for each codebook.
        samples_per_centroid: k-means trains on at most this many vectors per centroid, or on 65536 if that is more.
        rounds: refinement rounds after the column pass; 0 is the paper's algorithm.
        tolerance: a refinement round that gains less than this share of the loss is the last.
        damping: added to the Hessian's diagonal, as a share of the mean diagonal.

    Raises:
        ValueError: a number is of another kind, or out of range.
    """

    kmeans_iters: int = 50
    samples_per_centroid: int = 64
    rounds: int = 2
    tolerance: float = 1e-3
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name, low in (("kmeans_iters", 1), ("samples_per_centroid", 1), ("rounds", 0)):
            _check_whole(name, getattr(self, name), low, _MOST)
        for name in ("tolerance", "damping"):
            number = getattr(self, name)
            if not is_finite(number) or not 0 <= number <= _MOST:
                raise ValueError(f"{name} is {short(number)}; expected a number of at least 0")


DEFAULTS = SearchOptions()
"""Those of every search that is not told otherwise."""


def spec_text(format: Any, outliers: float) -> str:
    """A spec, or a format, as it is written, without what follows the outliers."""
    text = f"v{format.vector_len}-k{format.num_centroids}"
    if format.num_res_centroids:
        text += f"-{format.num_res_centroids}"
    if format.num_groups > 1:
        text += f"-g{format.num_groups}"
    if outliers:
        text += f"-o{outliers:g}v{format.outlier_vector_len}k{format.num_outlier_centroids}"
    return text


def as_spec(value: VQSpec | str | None) -> VQSpec | None:
    """A spec from what a user may write for one; None (leave the layer in its dtype) stays None."""
    return None if value is None else VQSpec.parse(value)


@dataclasses.dataclass(frozen=True)
class QuantConfig(SearchOptions):
    r"""Which layer gets which spec, and how the search for codebooks and indices runs (`SearchOptions`).

    Attributes:
        spec: spec of every decoder linear that no rule matches (None: leave it in its dtype).
        rules: (regular expression, spec or None) pairs over module paths such as
            `model.layers.0.self_attn.q_proj`; `re.search`, first match wins. Rules may also
            name `lm_head` and `model.embed_tokens`, which are left alone otherwise.
        seed: the one seed; every operator's key is folded from it by the operator's name.
        mode: `independent` (all Hessians from the full-precision model, as in the paper) or
            `sequential` (the Hessian of a layer behind everything that is quantized before it, in its block too).

    Raises:
        ValueError: a spec does not parse, a regular expression does not compile, or a number is
            out of range.

    Example:
        >>> config = QuantConfig("v8-k256-256", rules=[(r"layers\.0\.", None), ("down_proj$", "v8-k65536")])
        >>> print(config.spec_for("model.layers.3.mlp.down_proj"))
        v8-k65536
        >>> print(config.spec_for("model.layers.0.mlp.down_proj"))
        None
    """

    spec: VQSpec | str | None
    rules: Sequence[tuple[str, VQSpec | str | None]] = ()
    seed: int = 0
    mode: Mode = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spec", as_spec(self.spec))
        rules = []
        for rule in self.rules:
            if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
                raise ValueError(f"rule {short(rule)} is no pair of a regular expression and a spec or None")
            pattern, spec = rule
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"rule {short(pattern)} is not a regular expression: {error}") from None
            rules.append((pattern, as_spec(spec)))
        object.__setattr__(self, "rules", tuple(rules))
        _check_whole("seed", self.seed, 0, (1 << 32) - 1)
        if self.mode not in ("independent", "sequential"):
            raise ValueError(f"mode is {short(self.mode)}; expected 'independent' or 'sequential'")

    def spec_for(self, path: str, *, decoder_linear: bool = True) -> VQSpec | None:
        """The spec of a module path: the first matching rule, else the default for decoder linears."""
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                return as_spec(spec)
        return as_spec(self.spec) if decoder_linear else None
