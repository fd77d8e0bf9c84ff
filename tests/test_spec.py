"""Spec strings, formats and rules."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_jax.format import Format
from vptq_jax.spec import QuantConfig, VQSpec

powers = st.integers(1, 16).map(lambda bits: 1 << bits)


@st.composite
def specs(draw) -> VQSpec:
    outliers = draw(st.booleans())
    return VQSpec(
        vector_len=draw(st.integers(1, 64)),
        num_centroids=draw(powers),
        num_res_centroids=draw(st.just(0) | powers),
        num_groups=draw(st.integers(1, 16)),
        outlier_percent=draw(st.sampled_from([0.5, 1, 2, 12.25])) if outliers else 0,
        outlier_vector_len=draw(st.integers(1, 64)) if outliers else 0,
        num_outlier_centroids=draw(powers) if outliers else 0,
        normalize=draw(st.booleans()),
        permute=draw(st.booleans()),
    )


@settings(deadline=None, derandomize=True)
@given(specs())
def test_string_round_trip(spec):
    assert VQSpec.parse(str(spec)) == spec


def test_parse_reads_the_papers_2_26_bit_llama_spec():
    spec = VQSpec.parse("v12-k4096-4096-g4-o1v4k8192")
    assert spec == VQSpec(12, 4096, 4096, 4, 1.0, 4, 8192)
    assert spec.nominal_bits == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the spec"),
        ("8-256", "cannot read the spec"),
        ("v8", "cannot read the spec"),
        ("v8-k256-", "cannot read the spec"),
        ("v8-k256 extra", "cannot read the spec"),
        ("v8-k-256", "cannot read the spec"),
        (None, "cannot read the spec"),
        ("v8-k100", "number of centroids is 100; expected a power of two"),
        ("v8-k131072", "number of centroids is 131072"),
        ("v8-k1", "number of centroids is 1;"),
        ("v8-k256-100", "number of residual centroids is 100"),
        ("v65-k256", "vector length is 65; expected a whole number from 1 to 64"),
        ("v0-k256", "vector length is 0"),
        ("v8-k256-g0", "number of groups is 0"),
        ("v8-k256-o0v4k256", "the outlier percentage is 0"),
        ("v8-k256-o100v4k256", "outlier percentage is 100"),
        ("v8-k256-o1v65k256", "outlier vector length is 65"),
        ("v8-k256-o1v4k255", "number of outlier centroids is 255"),
    ],
)
def test_bad_specs_are_refused_with_the_reason(text, message):
    with pytest.raises(ValueError, match="spec") as error:
        VQSpec.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["v8-k256", "v6-k64-16-g4-o2v4k32", "v3-k8-o10v5k4", "v64-k2-65536-g2"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (40, 132), (97, 64)])
def test_layout_covers_every_weight_once(text, rows, columns):
    spec = VQSpec.parse(text)
    format = Format.of(spec, (rows, columns))
    assert format.outlier_size + format.num_groups * format.group_size == columns
    assert 0 <= format.num_vectors * format.vector_len - rows < format.vector_len
    assert format.outlier_size >= columns * spec.outlier_percent / 100
    assert 0 <= format.packed_words * 32 - format.group_size * (format.index_bits + format.res_index_bits) < 32


def test_remainder_of_the_groups_goes_to_the_outliers():
    assert Format.of("v8-k256-g4-o1v4k16", (64, 103)).outlier_size == 2 + 1


def test_remainder_without_outliers_is_an_error():
    with pytest.raises(ValueError, match=r"103 input columns do not divide into 4 groups \(remainder 3\)"):
        Format.of("v8-k256-g4", (64, 103))


def test_outliers_must_leave_columns_for_the_groups():
    with pytest.raises(ValueError, match="leave no column"):
        Format.of("v8-k256-g8-o99v4k16", (64, 16))


def test_rules_first_match_wins_and_none_leaves_a_layer():
    config = QuantConfig("v8-k256", rules=[(r"layers\.0\.", None), (r"down_proj$", "v4-k256"), ("lm_head", "v8-k4096")])
    assert config.spec_for("model.layers.0.mlp.down_proj") is None
    assert config.spec_for("model.layers.1.mlp.down_proj") == VQSpec.parse("v4-k256")
    assert config.spec_for("model.layers.1.mlp.up_proj") == VQSpec.parse("v8-k256")
    assert config.spec_for("lm_head", decoder_linear=False) == VQSpec.parse("v8-k4096")
    assert config.spec_for("model.embed_tokens", decoder_linear=False) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [("(", "v8-k256")]}, r"rule '\(' is not a regular expression"),
        ({"rules": [("a", "v8")]}, "cannot read the spec 'v8'"),
        ({"rounds": -1}, "rounds is -1"),
        ({"kmeans_iters": 0}, "kmeans_iters is 0"),
        ({"mode": "both"}, "mode is 'both'"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig("v8-k256", **change)


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig("v8-k256").seed = 1  # type: ignore[misc]
