"""The community's format in and out, against files and software of the VPTQ project."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from original import load_original
from random_models import CONFIG, TOKENS, assert_same_bits, random_model, random_vqarray
from safetensors.numpy import load_file, save_file
from transformers.utils.quantization_config import VptqConfig, VptqLayerConfig

from vptq_jax.convert.export import export, plan_hf, plan_vptq
from vptq_jax.convert.hf import load_hf
from vptq_jax.convert.vptq_format import load_vptq, open_vptq
from vptq_jax.lm.config import ModelConfig, RopeConfig
from vptq_jax.nn.forms import pack
from vptq_jax.nn.linear import VQLinear
from vptq_jax.spec import VQSpec

HERE = Path(__file__).parent / "golden" / "checkpoints"
CASES = [
    "v6_k64_pad", "v8_k256", "v8_k256_outlier", "v8_k256_r256", "v8_k256_r256_absorbed_bf16", "v8_k64_group4",
]  # fmt: skip


def ulps(left, right):
    """Largest distance in units in the last place."""
    ordered = [np.where(a.view(np.int32) < 0, -(1 << 31) - a.view(np.int32).astype(np.int64), a.view(np.int32)) for a in
               (left, right)]  # fmt: skip
    return np.abs(ordered[0] - ordered[1]).max()


def golden(name, request):
    return HERE / name if (HERE / name).is_dir() else request.getfixturevalue("shared") / "golden/checkpoints" / name


@pytest.mark.parametrize("name", CASES)
def test_published_checkpoints_mean_what_the_reference_makes_of_them(name, request):
    path = golden(name, request)
    expected = np.load(path / "expected.npz")
    model = load_vptq(path, dtype="float32").module
    for key in (key for key in expected if key.startswith("weight/")):
        dense = np.asarray(model.linears()[key.removeprefix("weight/")].weight.dequantize())
        assert ulps(dense, expected[key]) <= 1, key
    np.testing.assert_allclose(np.asarray(model(expected["token_ids"])), expected["logits"], atol=2e-4)


def test_a_bfloat16_checkpoint_runs_in_bfloat16():
    path = HERE / "v8_k256_r256_absorbed_bf16"
    expected = np.load(path / "expected.npz")
    model = load_vptq(path).module
    assert model.dtype == jnp.bfloat16
    logits = np.asarray(model(expected["token_ids"]))
    assert np.linalg.norm(logits - expected["logits"]) < 2e-2 * np.linalg.norm(expected["logits"])


@pytest.mark.parametrize("name", CASES)
def test_stored_bits_reach_the_model_unchanged(name, request):
    path = golden(name, request)
    stored = load_file(path / "model.safetensors")
    model = load_vptq(path).module
    for prefix, layer in model.linears().items():
        weight = layer.weight
        pairs = {
            "indices": weight.indices,
            "centroids.weight": weight.codebook,
            "res_centroids.weight": weight.res_codebook,
            "outlier_indices": weight.outlier_indices,
            "outlier_centroids.weight": weight.outlier_codebook,
            "weight_scale": weight.scale,
            "weight_bias": weight.offset,
            "perm": None if weight.perm is None else weight.perm.astype(jnp.uint16),
        }
        for field, value in pairs.items():
            assert (f"{prefix}.{field}" in stored) == (value is not None)
            if value is not None:
                assert np.asarray(value).tobytes() == stored[f"{prefix}.{field}"].tobytes(), f"{prefix}.{field}"


def write_edited(source, target, edit_config=None, edit_tensors=None):
    shutil.copytree(source, target, dirs_exist_ok=True)
    if edit_config:
        raw = json.loads((target / "config.json").read_text())
        edit_config(raw)
        (target / "config.json").write_text(json.dumps(raw))
    if edit_tensors:
        tensors = load_file(target / "model.safetensors")
        tensors = edit_tensors(tensors) or tensors
        save_file(tensors, target / "model.safetensors")
    return target


def weights_of(model):
    return {path: np.asarray(layer.weight.dequantize()) for path, layer in model.linears().items()}


def assert_same_weights(left, right):
    for path, weight in weights_of(left).items():
        np.testing.assert_array_equal(weight, weights_of(right)[path])


def section_of(raw):
    return raw["quantization_config"]


def tails(raw):
    """Layer configs by last name part; those of the golden cases agree within a part."""
    return {name.rsplit(".", 1)[1]: config for name, config in section_of(raw)["config_for_layers"].items()}


@pytest.mark.parametrize("kept", ["none", "some"])
def test_shared_layer_configs_apply_where_no_own_one_does(tmp_path, kept):
    def share(raw):
        section = section_of(raw)
        section["shared_layer_config"] = tails(raw)
        if kept == "none":
            del section["config_for_layers"]
            return
        section["config_for_layers"] = {
            name: config for name, config in section["config_for_layers"].items() if "layers.0.mlp" in name
        }
        wrong = dict(section["shared_layer_config"]["up_proj"], num_centroids=[-1, 128])
        section["config_for_layers"]["model.layers.1.up_proj.unused"] = wrong
        del section["config_for_layers"]["model.layers.1.up_proj.unused"]

    source = HERE / "v6_k64_pad"
    assert_same_weights(load_vptq(source).module, load_vptq(write_edited(source, tmp_path, share)).module)


def test_unknown_keys_are_ignored_with_one_line(tmp_path, caplog):
    def add(raw):
        section_of(raw)["surprise"] = 1
        for layer in section_of(raw)["config_for_layers"].values():
            layer["novelty"] = [1]

    source = HERE / "v6_k64_pad"
    with caplog.at_level("INFO", logger="vptq_jax"):
        load_vptq(write_edited(source, tmp_path, add))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("vptq_jax.convert")]
    assert lines == ["ignoring unknown keys of quantization_config: novelty, surprise"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("perm_dtype", [np.int64, np.int32, np.uint16])
def test_unpacked_indices_and_wide_permutations(case, perm_dtype, tmp_path, request):
    source = golden(case, request)
    reference = load_vptq(source).module

    def unpack(tensors):
        for path, layer in reference.linears().items():
            main, residual = layer.weight.unpack()
            tensors[f"{path}.indices"] = np.asarray(main).astype(np.uint16).view(np.int16)
            if residual is not None:
                tensors[f"{path}.res_indices"] = np.asarray(residual).astype(np.uint16).view(np.int16)
            if layer.perm is not None:
                tensors[f"{path}.perm"] = np.asarray(layer.perm[...]).astype(perm_dtype)

    def say_so(raw):
        for layer in section_of(raw)["config_for_layers"].values():
            layer["is_indice_packed"] = False

    assert_same_bits(reference, load_vptq(write_edited(source, tmp_path, say_so, unpack)))


def test_layers_left_dense_and_modules_not_converted(tmp_path):
    source = HERE / "v6_k64_pad"
    reference = load_vptq(source).module
    dense = weights_of(reference)
    path, other = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"

    def densify(tensors):
        for name in (path, other):
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            tensors[f"{name}.weight"] = dense[name]

    def say_so(raw):
        del section_of(raw)["config_for_layers"][path]
        section_of(raw)["modules_to_not_convert"] = ["lm_head", f"{other}.weight"]

    assert_same_weights_or_dense(
        reference, load_vptq(write_edited(source, tmp_path, say_so, densify)).module, {path, other}
    )


def assert_same_weights_or_dense(left, right, dense):
    for path, layer in right.linears().items():
        assert isinstance(layer, VQLinear) == (path not in dense)
        weight = layer.weight[...] if path in dense else layer.weight.dequantize()
        np.testing.assert_array_equal(np.asarray(weight), weights_of(left)[path])


def test_shards_and_tied_embeddings(tmp_path):
    source = HERE / "v6_k64_pad"

    def tie(raw):
        raw["tie_word_embeddings"] = True

    write_edited(source, tmp_path, tie)
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_vptq(tmp_path).module
    assert model.lm_head is None
    assert_same_weights(model, load_vptq(source).module)


# ---- out

SPECS = st.builds(
    lambda v, k, kr, g, outlier, tail: f"v{v}-k{k}{f'-{kr}' if kr else ''}{f'-g{g}' if g > 1 else ''}{outlier}{tail}",
    st.integers(2, 12),
    st.sampled_from([2, 4, 16, 32]),
    st.sampled_from([0, 0, 2, 4, 64]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["", "-o5v4k8", "-o12.5v3k2"]),
    st.sampled_from(["", "-nonorm", "-noperm", "-nonorm-noperm"]),
)


def save_vptq(model, path, **options):
    return export(model, path, plan_vptq(model), **options)


@settings(max_examples=55, derandomize=True, deadline=None)
@given(
    specs=st.lists(st.one_of(SPECS, st.none()), min_size=1, max_size=4).filter(any),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    bias=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
    shard=st.sampled_from([5_000_000_000, 3000]),
)
def test_round_trips_are_bit_equal(tmp_path_factory, specs, dtype, bias, tied, seed, shard):
    fields = vars(CONFIG) | {
        "attention_bias": bias, "attention_out_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied,
        "dtype": dtype,
    }  # fmt: skip
    model = random_model(ModelConfig(**fields), specs, jnp.dtype(dtype), seed)
    path = tmp_path_factory.mktemp("trip") / "model"
    files = save_vptq(model, path, max_shard_bytes=shard)
    assert ("model.safetensors" in files) == (shard > 3000)
    again = load_vptq(path).module
    assert_same_bits(model, again)
    assert again.config == model.config


def test_exports_of_golden_checkpoints_are_the_files_they_came_from(tmp_path, request):
    for case in CASES:
        source = golden(case, request)
        save_vptq(load_vptq(source), tmp_path / case)
        ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / case, source))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert ours[name].shape == tensor.shape, name
            assert ours[name].tobytes() == tensor.tobytes(), name


def test_transformers_accepts_our_config(tmp_path):
    model = random_model(CONFIG, ("v6-k16-4-g2-o5v4k8", None))
    save_vptq(model, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    config = VptqConfig.from_dict(raw["quantization_config"])
    assert config.quant_method == "vptq"
    for path, layer in config.config_for_layers.items():
        parsed = VptqLayerConfig(**layer)
        assert (parsed.out_features, parsed.in_features) == model.linears()[path].shape
    dense = {p for p, layer in model.linears().items() if not isinstance(layer, VQLinear)} | {"lm_head"}
    assert set(config.modules_to_not_convert) == dense
    read = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert read.rope_parameters["rope_theta"] == CONFIG.rope.theta
    assert read.rope_parameters["factor"] == CONFIG.rope.factor
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [3, 5]


FAMILIES = {
    "mistral": {"model_type": "mistral", "sliding_window": 3, "attention_bias": False, "attention_out_bias": False},
    "qwen2": {"model_type": "qwen2", "attention_out_bias": False},
    "llama_tied": {"tie_word_embeddings": True, "mlp_bias": True},
    "llama_yarn": {"rope": RopeConfig(1e4, "yarn", 4.0, 64)},
    "llama_linear": {"rope": RopeConfig(1e4, "linear", 4.0)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_travel_and_compute_our_logits(tmp_path, family):
    model = random_model(ModelConfig(**(vars(CONFIG) | FAMILIES[family])), ("v8-k16-8",))
    save_vptq(model, tmp_path / "m")
    again = load_vptq(tmp_path / "m").module
    assert again.config == model.config
    assert_same_bits(model, again)
    np.testing.assert_allclose(np.asarray(model(TOKENS)), original_logits(tmp_path / "m"), atol=2e-4)


def original_logits(path):
    try:
        original = load_original(path)
    except ImportError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        return original(torch.tensor(TOKENS)).logits.numpy()


ORIGINAL_SPECS = [
    ["v8-k16"],
    ["v8-k16-8", "v6-k64"],
    ["v5-k32-4-nonorm", "v4-k8-noperm"],
    ["v4-k8-g4", "v4-k4-4-g2-nonorm-noperm"],
    ["v8-k16-o10v4k8"],
    ["v8-k16-16-o10v4k8", "v6-k16-4-g2-o10v5k4"],
    ["v6-k4-64"],
]


@pytest.mark.parametrize("specs", ORIGINAL_SPECS, ids=lambda specs: "+".join(specs))
def test_the_original_software_computes_our_logits(tmp_path, specs):
    model = random_model(CONFIG, specs)
    model.set_linear("lm_head", VQLinear(random_vqarray("v8-k16-4", 40, 24, 1)))
    save_vptq(model, tmp_path / "m")
    np.testing.assert_allclose(np.asarray(model(TOKENS)), original_logits(tmp_path / "m"), atol=2e-4)


@pytest.mark.parametrize("plan", [plan_vptq, plan_hf])
def test_layers_in_kernel_order_are_exported_like_any_other(plan):
    model = random_model(CONFIG, ("v8-k16-8",), jnp.bfloat16)
    packed = pack(model, target="sm_90")
    assert all(layer.order is not None for layer in packed.linears().values())
    expected, found = plan(model), plan(packed)
    assert expected.config == found.config
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].read().tobytes() == tensor.read().tobytes(), name


def test_a_larger_residual_codebook_changes_roles_and_back(tmp_path):
    model = random_model(CONFIG, ("v6-k4-64",))
    plan = plan_vptq(model)
    assert "exchanged roles" in plan.notes[0]
    export(model, tmp_path / "m", plan)
    layer = next(iter(plan.config["quantization_config"]["config_for_layers"].values()))
    assert (layer["num_centroids"], layer["num_res_centroids"]) == ([-1, 64], [-1, 4])
    assert_same_bits(model, load_vptq(tmp_path / "m"))
    foreign = json.loads((tmp_path / "m" / "config.json").read_text())
    del foreign["quantization_config"]["vptq_jax"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(foreign))
    assert_same_weights(model, load_vptq(tmp_path / "m").module)


def test_a_wide_residual_written_by_others_is_read(tmp_path):
    model = random_model(CONFIG, ("v6-k64-4",))
    save_vptq(model, tmp_path / "m")
    wide = random_model(CONFIG, ("v6-k4-64",))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for path, layer in wide.linears().items():
        raw["quantization_config"]["config_for_layers"][path] |= {
            "num_centroids": [-1, 4],
            "num_res_centroids": [-1, 64],
        }
        tensors[f"{path}.indices"] = np.asarray(layer.weight.indices).view(np.int32)
        tensors[f"{path}.centroids.weight"] = np.asarray(layer.weight.codebook).reshape(1, -1)
        tensors[f"{path}.res_centroids.weight"] = np.asarray(layer.weight.res_codebook).reshape(1, -1)
        for name, value in (("weight_scale", layer.scale), ("weight_bias", layer.offset)):
            tensors[f"{path}.{name}"] = np.asarray(value[...])
        tensors[f"{path}.perm"] = np.asarray(layer.perm[...]).astype(np.int16)
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert_same_weights(wide, load_vptq(tmp_path / "m").module)


def test_what_the_format_cannot_say_is_refused(tmp_path):
    model = random_model(CONFIG, ("v6-k16",))
    model.set_linear("model.embed_tokens", VQLinear(random_vqarray("v8-k16", 40, 24, 1)))
    model.set_linear("model.layers.0.mlp.up_proj", VQLinear(random_vqarray("v8-k16-o5v1k4", 40, 24, 1)))
    with pytest.raises(ValueError, match="2 problems") as error:
        save_vptq(model, tmp_path / "m")
    assert "no quantized embedding table" in str(error.value)
    assert "outlier vectors of length 1" in str(error.value)
    with pytest.raises(ValueError, match="no layer is quantized"):
        save_vptq(random_model(CONFIG, (None,)), tmp_path / "m")
    odd = random_model(ModelConfig(**(vars(CONFIG) | {"attention_out_bias": False})), ("v6-k16",))
    with pytest.raises(ValueError, match="cannot say attention_out_bias = False"):
        save_vptq(odd, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_codebooks_are_not_written(tmp_path):
    model = random_model(CONFIG, ("v6-k16",))
    layer = model.linears()["model.layers.1.mlp.up_proj"]
    layer.codebook[...] = layer.codebook[...].at[0, 3, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.centroids.weight' holds NaN"):
        save_vptq(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_states_the_facts(tmp_path, tiny_hf):
    lm = load_hf(tiny_hf)
    model = lm.module
    for number, (path, layer) in enumerate(model.linears().items()):
        model.set_linear(path, VQLinear(random_vqarray("v8-k16-4", *layer.shape, number)))
    save_vptq(lm, tmp_path / "card", metadata={"calibration": "128 x 2048 tokens of C4", "seed": 3})
    card = (tmp_path / "card" / "README.md").read_text()
    bits = sum(layer.weight.stored_bits for layer in model.linears().values())
    bits /= sum(np.prod(layer.shape) for layer in model.linears().values())
    for text in (
        "v8-k16-4 (14 layers)",
        "0.750",
        f"{bits:.3f}",
        "128 x 2048 tokens of C4",
        "seed",
        "vptq_jax 0",
        "vptq",
    ):
        assert text in card
    assert (tmp_path / "card" / "tokenizer.json").exists()
    assert load_vptq(tmp_path / "card").tokenizer("the fox")["input_ids"] == lm.tokenizer("the fox")["input_ids"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_dequantized_exports_open_in_transformers(tmp_path, dtype, tied):
    config = ModelConfig(**(vars(CONFIG) | {"tie_word_embeddings": tied}))
    model = random_model(config, ("v6-k16-4", "v4-k8-g4-o10v5k8", None))
    model.set_linear("model.embed_tokens", VQLinear(random_vqarray("v8-k16", 40, 24, 1)))
    plan = plan_hf(model, dtype)
    assert plan.notes == ["11 quantized layers become dense"]
    export(model, tmp_path / "m", plan, max_shard_bytes=3000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == (torch.bfloat16 if dtype else torch.float32)
    if dtype is None:
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(np.asarray(model(TOKENS)), expected, atol=1e-4)
    for path, layer in model.linears().items():
        dense = layer.weight.dequantize() if isinstance(layer, VQLinear) else layer.weight[...]
        found = theirs.get_submodule(path).weight.detach().float().numpy()
        tolerance = 2**-8 if dtype else 1e-6
        np.testing.assert_allclose(found, np.asarray(dense), rtol=tolerance, atol=1e-6)


def test_only_a_hugging_face_model_is_replaced(tmp_path):
    model = random_model(CONFIG, ("v6-k16",))
    (tmp_path / "notes.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no Hugging Face model"):
            save_vptq(model, tmp_path, overwrite=overwrite)
    save_vptq(model, tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_vptq(model, tmp_path / "m")
    other = random_model(CONFIG, ("v4-k8",), seed=5)
    save_vptq(other, tmp_path / "m", overwrite=True)
    assert_same_bits(load_vptq(tmp_path / "m"), other)


def test_importing_keeps_the_packed_size(tmp_path):
    """No dense weight appears on the way in: array bytes are those of the file."""
    config = ModelConfig("llama", 64, 512, 2048, 2, 8, 8, 64, dtype="bfloat16")
    model = random_model(config, ("v8-k256-16",), jnp.bfloat16)
    save_vptq(model, tmp_path / "m")
    stored = open_vptq(tmp_path / "m")
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(stored.abstract()))
    perms = sum(2 * layer.shape[1] for layer in model.linears().values())  # int32 here, int16 there
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == stored.files.nbytes + perms
    assert jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(stored.abstract())) == jax.tree.map(
        lambda a: (a.shape, a.dtype), nnx.state(load_vptq(tmp_path / "m").module)
    )
    assert VQSpec.parse("v8-k256-16").nominal_bits == 1.5
    assert ml_dtypes.bfloat16 == leaves[0].dtype
