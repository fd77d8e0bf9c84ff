"""What a quantized layer looks like (`VQSpec`, `VQLayout`) and which layer gets which spec (`QuantConfig`)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

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


def _check_vector_len(value: int, what: str) -> None:
    if not 1 <= value <= MAX_VECTOR_LEN:
        raise ValueError(f"{what} is {value}; expected a whole number from 1 to {MAX_VECTOR_LEN}")


def _check_centroids(value: int, what: str) -> None:
    if not 2 <= value <= MAX_CENTROIDS or value & (value - 1):
        raise ValueError(f"{what} is {value}; expected a power of two from 2 to {MAX_CENTROIDS}")


def _bits(centroids: int) -> int:
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
        _check_vector_len(self.vector_len, "vector length")
        _check_centroids(self.num_centroids, "number of centroids")
        if self.num_res_centroids:
            _check_centroids(self.num_res_centroids, "number of residual centroids")
        if self.num_groups < 1:
            raise ValueError(f"number of groups is {self.num_groups}; expected at least 1")
        if not 0 <= self.outlier_percent < 100:
            raise ValueError(
                f"outlier percentage is {self.outlier_percent}; expected 0 (none) or more, and less than 100"
            )
        if self.outlier_percent:
            _check_vector_len(self.outlier_vector_len, "outlier vector length")
            _check_centroids(self.num_outlier_centroids, "number of outlier centroids")
        elif self.outlier_vector_len or self.num_outlier_centroids:
            raise ValueError(
                "an outlier codebook is given but the outlier percentage is 0; "
                "leave the outlier part out or give a percentage above 0"
            )

    @classmethod
    def parse(cls, text: str | VQSpec) -> VQSpec:
        """Reads a spec string such as `v8-k256-256` (`str(spec)` writes it)."""
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
        text = _text(self, self.outlier_percent)
        return text + ("" if self.normalize else "-nonorm") + ("" if self.permute else "-noperm")

    @property
    def nominal_bits(self) -> float:
        """Index bits per weight as the community counts them: log2(k)/v + log2(k_r)/v."""
        return (_bits(self.num_centroids) + _bits(self.num_res_centroids)) / self.vector_len

    def layout(self, out_features: int, in_features: int) -> VQLayout:
        """The layout of a weight [out_features, in_features] under this spec.

        Outlier columns are ceil(percent of in_features), plus what is left over so that the
        rest divides into the groups (paper section 3; the released code does the same).

        Raises:
            ValueError: the groups do not divide the columns and there are no outliers to take
                the remainder, or no column is left for the main codebook.
        """
        outliers = math.ceil(self.outlier_percent * in_features / 100)
        remainder = (in_features - outliers) % self.num_groups
        if remainder and not outliers:
            raise ValueError(
                f"{in_features} input columns do not divide into {self.num_groups} groups "
                f"(remainder {remainder}); choose a divisor of {in_features}, or add outlier columns to take the rest"
            )
        outliers += remainder
        if in_features - outliers < self.num_groups:
            raise ValueError(
                f"{outliers} outlier columns of {in_features} leave no column for each of {self.num_groups} groups; "
                "lower the outlier percentage or the number of groups"
            )
        return VQLayout(
            out_features=out_features,
            in_features=in_features,
            vector_len=self.vector_len,
            num_centroids=self.num_centroids,
            num_res_centroids=self.num_res_centroids,
            num_groups=self.num_groups,
            outlier_size=outliers,
            outlier_vector_len=self.outlier_vector_len if outliers else 0,
            num_outlier_centroids=self.num_outlier_centroids if outliers else 0,
        )


@dataclasses.dataclass(frozen=True)
class VQLayout:
    """Static shape facts of one quantized weight [out_features, in_features].

    Permuted columns 0 .. outlier_size-1 are outliers; the rest is `num_groups` runs of
    `group_size` columns, each with its own codebooks.
    """

    out_features: int
    in_features: int
    vector_len: int
    num_centroids: int
    num_res_centroids: int = 0
    num_groups: int = 1
    outlier_size: int = 0
    outlier_vector_len: int = 0
    num_outlier_centroids: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not is_integer(getattr(self, field.name)):
                raise ValueError(f"{field.name} is {short(getattr(self, field.name))}; expected a whole number")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"weight shape is [{self.out_features}, {self.in_features}]; expected both at least 1")
        _check_vector_len(self.vector_len, "vector length")
        _check_centroids(self.num_centroids, "number of centroids")
        if self.num_res_centroids:
            _check_centroids(self.num_res_centroids, "number of residual centroids")
        if not 0 <= self.outlier_size < self.in_features:
            raise ValueError(f"outlier columns: {self.outlier_size}; expected 0 to {self.in_features - 1}")
        if self.outlier_size:
            _check_vector_len(self.outlier_vector_len, "outlier vector length")
            _check_centroids(self.num_outlier_centroids, "number of outlier centroids")
        if self.num_groups < 1 or (self.in_features - self.outlier_size) % self.num_groups:
            raise ValueError(
                f"{self.in_features - self.outlier_size} columns do not divide into {self.num_groups} groups"
            )

    def __str__(self) -> str:
        """As a spec is written, with the number of outlier columns in place of their share: `v8-k256-256-o24v4k64`."""
        return _text(self, self.outlier_size)

    @property
    def group_size(self) -> int:
        """Columns of one group."""
        return (self.in_features - self.outlier_size) // self.num_groups

    @property
    def num_vectors(self) -> int:
        """Vectors of one column (the last one padded when v does not divide out_features)."""
        return -(-self.out_features // self.vector_len)

    @property
    def num_outlier_vectors(self) -> int:
        """Vectors of one outlier column."""
        return -(-self.out_features // self.outlier_vector_len) if self.outlier_size else 0

    @property
    def index_bits(self) -> int:
        """Bits of a main index, log2(k)."""
        return _bits(self.num_centroids)

    @property
    def res_index_bits(self) -> int:
        """Bits of a residual index, log2(k_r), 0 without residual."""
        return _bits(self.num_res_centroids)

    @property
    def packed_words(self) -> int:
        """32-bit words of one packed row of a group."""
        return -(-self.group_size * (self.index_bits + self.res_index_bits) // 32)

    @property
    def nominal_bits(self) -> float:
        """Index bits per weight as the community counts them: log2(k)/v + log2(k_r)/v."""
        return (self.index_bits + self.res_index_bits) / self.vector_len


Mode = Literal["independent", "sequential"]

_MOST = 1 << 20  # rounds and iterations: more is a slip of the pen


def check_search_options(
    *, kmeans_iters: int, samples_per_centroid: int, rounds: int, tolerance: float, damping: float
) -> None:
    """Raises ValueError unless the options of a search are numbers of the right kind, in range."""
    for name, value, low in (
        ("kmeans_iters", kmeans_iters, 1),
        ("samples_per_centroid", samples_per_centroid, 1),
        ("rounds", rounds, 0),
    ):
        _check_whole(name, value, low, _MOST)
    for name, number in (("tolerance", tolerance), ("damping", damping)):
        if not is_finite(number) or not 0 <= number <= _MOST:
            raise ValueError(f"{name} is {short(number)}; expected a number of at least 0")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not is_integer(value):
        raise ValueError(f"{name} is {short(value)}; expected a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {short(value)}; expected {bounds(value, low, high)}")


def _text(format: VQSpec | VQLayout, outliers: float) -> str:
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
class QuantConfig:
    """Which layer gets which spec, and how the search for codebooks and indices runs.

    Attributes:
        spec: spec of every decoder linear that no rule matches (None: leave it in its dtype).
        rules: (regular expression, spec or None) pairs over module paths such as
            `model.layers.0.self_attn.q_proj`; `re.search`, first match wins. Rules may also
            name `lm_head` and `model.embed_tokens`, which are left alone otherwise.
        seed: the one seed; every operator's key is folded from it by the operator's name.
        kmeans_iters: Lloyd iterations at most.
        samples_per_centroid: k-means trains on at most this many vectors per centroid, or on 65536 if that is more.
        rounds: refinement rounds after the column pass (0: the paper's algorithm).
        tolerance: a refinement round that gains less than this share of the loss is the last.
        damping: added to the Hessian's diagonal, as a share of the mean diagonal.
        mode: `independent` (all Hessians from the full-precision model, as in the paper) or
            `sequential` (the Hessian of a layer behind everything that is quantized before it, in its block too).

    Raises:
        ValueError: a spec does not parse, a regular expression does not compile, or a number is
            out of range.
    """

    spec: VQSpec | str | None
    rules: Sequence[tuple[str, VQSpec | str | None]] = ()
    seed: int = 0
    kmeans_iters: int = 50
    samples_per_centroid: int = 64
    rounds: int = 2
    tolerance: float = 1e-3
    damping: float = 0.01
    mode: Mode = "independent"

    def __post_init__(self) -> None:
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
        check_search_options(
            kmeans_iters=self.kmeans_iters,
            samples_per_centroid=self.samples_per_centroid,
            rounds=self.rounds,
            tolerance=self.tolerance,
            damping=self.damping,
        )
        _check_whole("seed", self.seed, 0, (1 << 32) - 1)
        if self.mode not in ("independent", "sequential"):
            raise ValueError(f"mode is {short(self.mode)}; expected 'independent' or 'sequential'")

    def spec_for(self, path: str, *, decoder_linear: bool = True) -> VQSpec | None:
        """The spec of a module path: the first matching rule, else the default for decoder linears."""
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                return as_spec(spec)
        return as_spec(self.spec) if decoder_linear else None
