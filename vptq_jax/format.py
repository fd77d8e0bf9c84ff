"""`Format`: a spec and a shape, and all that follows from the two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vptq_jax.schema import is_integer, short
from vptq_jax.spec import VQSpec, check_centroids, check_vector_len, index_bits, spec_text

FLOATS = ("codebook", "res_codebook", "outlier_codebook", "scale", "offset")
"""Fields of a quantized weight that can be trained."""

INTEGERS = {"indices": "uint32", "outlier_indices": "uint16", "perm": "int32"}
"""The other fields, and their dtypes."""

_FLAGS = ("normalize", "permute")


@dataclasses.dataclass(frozen=True)
class Format:
    """Everything static about one quantized weight [out_features, in_features]: a spec that has met its shape.

    Permuted columns 0 .. outlier_size-1 are outliers; the rest is `num_groups` runs of
    `group_size` columns, each with its own codebooks. Other attributes: see `VQSpec`.
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
    normalize: bool = True
    permute: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), field.name in _FLAGS
            if not (isinstance(value, bool) if flag else is_integer(value)):
                expected = "true or false" if flag else "a whole number"
                raise ValueError(f"{field.name} is {short(value)}; expected {expected}")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"weight shape is [{self.out_features}, {self.in_features}]; expected both at least 1")
        check_vector_len(self.vector_len, "vector length")
        check_centroids(self.num_centroids, "number of centroids")
        if self.num_res_centroids:
            check_centroids(self.num_res_centroids, "number of residual centroids")
        if not 0 <= self.outlier_size < self.in_features:
            raise ValueError(f"outlier columns: {self.outlier_size}; expected 0 to {self.in_features - 1}")
        if self.outlier_size:
            check_vector_len(self.outlier_vector_len, "outlier vector length")
            check_centroids(self.num_outlier_centroids, "number of outlier centroids")
        if self.num_groups < 1 or (self.in_features - self.outlier_size) % self.num_groups:
            raise ValueError(
                f"{self.in_features - self.outlier_size} columns do not divide into {self.num_groups} groups"
            )

    @classmethod
    def of(cls, spec: VQSpec | str, shape: tuple[int, ...]) -> Format:
        """The format of a weight (out_features, in_features) under a spec.

        Outlier columns are ceil(percent of in_features), plus what is left over so that the
        rest divides into the groups (paper section 3; the released code does the same).

        Raises:
            ValueError: the groups do not divide the columns and there are no outliers to take
                the remainder, or no column is left for the main codebook.

        Example:
            >>> format = Format.of("v8-k256-256-g2", (4096, 14336))
            >>> format.group_size, format.num_vectors, format.shapes()["codebook"]
            (7168, 512, (2, 256, 8))
        """
        spec = VQSpec.parse(spec)
        out_features, in_features = shape
        outliers = math.ceil(spec.outlier_percent * in_features / 100)
        remainder = (in_features - outliers) % spec.num_groups
        if remainder and not outliers:
            raise ValueError(
                f"{in_features} input columns do not divide into {spec.num_groups} groups "
                f"(remainder {remainder}); choose a divisor of {in_features}, or add outlier columns to take the rest"
            )
        outliers += remainder
        if in_features - outliers < spec.num_groups:
            raise ValueError(
                f"{outliers} outlier columns of {in_features} leave no column for each of {spec.num_groups} groups; "
                "lower the outlier percentage or the number of groups"
            )
        return cls(
            out_features=out_features,
            in_features=in_features,
            vector_len=spec.vector_len,
            num_centroids=spec.num_centroids,
            num_res_centroids=spec.num_res_centroids,
            num_groups=spec.num_groups,
            outlier_size=outliers,
            outlier_vector_len=spec.outlier_vector_len if outliers else 0,
            num_outlier_centroids=spec.num_outlier_centroids if outliers else 0,
            normalize=spec.normalize,
            permute=spec.permute,
        )

    def __str__(self) -> str:
        """As a spec is written, with the number of outlier columns in place of their share: `v8-k256-256-o24v4k64`."""
        return spec_text(self, self.outlier_size)

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
        return index_bits(self.num_centroids)

    @property
    def res_index_bits(self) -> int:
        """Bits of a residual index, log2(k_r), 0 without residual."""
        return index_bits(self.num_res_centroids)

    @property
    def packed_words(self) -> int:
        """32-bit words of one packed row of a group."""
        return -(-self.group_size * (self.index_bits + self.res_index_bits) // 32)

    @property
    def nominal_bits(self) -> float:
        """Index bits per weight as the community counts them: log2(k)/v + log2(k_r)/v."""
        return (self.index_bits + self.res_index_bits) / self.vector_len

    @property
    def stored_bits(self) -> int:
        """Bits that a file takes with codebooks in float16: everything included."""
        return 8 * sum(
            math.prod(shape) * np.dtype(self.stored_dtype(field)).itemsize
            for field, shape in self.shapes().items()
            if shape is not None
        )

    def stored_dtype(self, field: str) -> str:
        """dtype of a field in a file: a permutation of up to 65536 columns is narrower there."""
        if field == "perm":
            return "uint16" if self.in_features <= 1 << 16 else "int32"
        return INTEGERS.get(field, "float16")

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shape of every field of a quantized weight (None: the field is None)."""
        columns = (self.in_features,)
        outliers, scale = bool(self.outlier_size), columns if self.normalize else None
        residual = (self.num_groups, self.num_res_centroids, self.vector_len)
        return {
            "indices": (self.num_groups, self.num_vectors, self.packed_words),
            "codebook": (self.num_groups, self.num_centroids, self.vector_len),
            "res_codebook": residual if self.num_res_centroids else None,
            "outlier_indices": (self.num_outlier_vectors, self.outlier_size) if outliers else None,
            "outlier_codebook": (self.num_outlier_centroids, self.outlier_vector_len) if outliers else None,
            "scale": scale,
            "offset": scale,
            "perm": columns if self.permute else None,
        }

    def division_problems(self, devices: int) -> Iterator[str]:
        """Why the vectors of a column cannot be divided among devices, and what would; nothing if they can."""
        for what, count in (("", self.num_vectors), ("outlier ", self.num_outlier_vectors)):
            if count % devices:
                fitting = [n for n in range(1, 2 * devices) if not count % n]
                yield (
                    f"{count} {what}vectors a column do not divide among {devices} devices; "
                    f"{', '.join(map(str, fitting))} would, or another vector length"
                )

    def to_json(self) -> dict[str, Any]:
        """As files have it; `from_json` reads it."""
        facts = dataclasses.asdict(self)
        flags = {name: facts.pop(name) for name in _FLAGS}
        return {"layout": facts, **flags}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Format:
        """Inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(**record["layout"], **{name: record[name] for name in _FLAGS})
