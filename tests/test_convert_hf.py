"""Hugging Face checkpoints in: logits as PyTorch's, faults gathered, memory bounded."""

import json
import shutil
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from vptq_jax.convert.hf import load_hf

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, attention_bias=True)),
    "llama_tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=4)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY)),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


def reference(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # transformers starts biases at zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.float().numpy()


@pytest.mark.parametrize("shard", ["5GB", "12KB"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_pytorch(tmp_path, name, shard):
    model = reference(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    loaded = load_hf(tmp_path).module
    assert loaded.config.model_type == name.split("_")[0]
    assert (loaded.lm_head is None) == ("tied" in name)
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), torch_logits(model), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_dtypes_are_kept_or_converted(tmp_path, dtype):
    model = reference("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    loaded = load_hf(tmp_path).module
    assert loaded.dtype == jnp.dtype(dtype)
    assert loaded.config.dtype == dtype
    exact = load_hf(tmp_path, dtype=jnp.float32).module
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    for path, layer in exact.linears().items():
        assert layer.weight.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(layer.weight[...]), stored[f"{path}.weight"].astype(np.float32))
    np.testing.assert_allclose(np.asarray(exact(TOKENS)), torch_logits(again), atol=2e-5)


def test_tokenizer_and_generation_config_come_along(tiny_hf, tmp_path):
    shutil.copytree(tiny_hf, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "temperature": 0.6}))
    model = load_hf(tmp_path)
    assert model.tokenizer.decode(model.tokenizer("the quick fox")["input_ids"]) == "the quick fox"
    assert model.config.eos_token_id == (1, 7)
    assert model.generation_config["temperature"] == 0.6


def edited(tiny_hf, tmp_path, edit=None, config=None):
    """A copy of the tiny checkpoint with other tensors or config keys."""
    shutil.copytree(tiny_hf, tmp_path, dirs_exist_ok=True)
    if edit:
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    if config:
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | config))
    return tmp_path


def test_all_faults_come_in_one_error(tiny_hf, tmp_path):
    inner = json.loads((tiny_hf / "config.json").read_text())["intermediate_size"]

    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((inner, 32), np.int32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    with pytest.raises(ValueError, match=r"does not fit its config\.json: 4 problems") as error:
        load_hf(edited(tiny_hf, tmp_path, edit))
    text = str(error.value)
    assert "model.norm.weight is missing; expected shape [32]" in text
    assert f"model.layers.0.mlp.up_proj.weight has shape [3, 5]; expected [{inner}, 32]" in text
    assert "model.layers.1.mlp.up_proj.weight has dtype int32; expected float32" in text
    assert "'model.layers.2.mlp.up_proj.weight' of shape [48, 32] is unexpected" in text
    assert "inv_freq" not in text


def test_harmless_tensors_are_ignored(tiny_hf, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    assert load_hf(edited(tiny_hf, tmp_path, edit, {"tie_word_embeddings": True})).module.lm_head is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776, but the checkpoint holds only"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"hidden_size": 1 << 40, "head_dim": 8}, "hidden_size is 1099511627776; expected a whole number of at most"),
        ({"hidden_size": 1 << 30, "head_dim": 8}, "has shape"),
        ({"intermediate_size": 47}, r"expected \[47, 32\]"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \[16, 32\]; expected \[32, 32\]"),
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox', which is not supported"),
    ],
)
def test_a_config_that_lies_is_refused(tiny_hf, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_hf(edited(tiny_hf, tmp_path, config=config))


def test_other_quantization_methods_are_refused(tiny_hf, tmp_path):
    with pytest.raises(NotImplementedError, match="quantized by 'awq'"):
        load_hf(edited(tiny_hf, tmp_path, config={"quantization_config": {"quant_method": "awq"}}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weights_are_named(tiny_hf, tmp_path, value):
    def edit(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj.weight' holds (nan|inf) at \[3, 5\]"):
        load_hf(edited(tiny_hf, tmp_path, edit))


def test_overflow_in_a_narrow_dtype_is_named(tiny_hf, tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"][2] = 1e5

    with pytest.raises(ValueError, match=r"'model.norm.weight' holds inf at \[2\] \(dtype float16\)"):
        load_hf(edited(tiny_hf, tmp_path, edit), dtype="float16")


def test_a_config_that_is_no_json(tiny_hf, tmp_path):
    edited(tiny_hf, tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json is not usable JSON"):
        load_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_hf(tmp_path)


def test_a_broken_tokenizer_is_reported(tiny_hf, tmp_path):
    edited(tiny_hf, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer files in"):
        load_hf(tmp_path)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="does not exist, and is not a hub id"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hugging Face hub"):
        load_hf("nobody/no-such-model")


def test_a_hub_id_fetches_what_is_needed_and_no_more(tiny_hf, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "pytorch_model.bin",
        "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.safetensors", "flax_model.msgpack",
    ]  # fmt: skip
    fetched = []

    def download(repo, *, allow_patterns, ignore_patterns):
        assert repo == "somebody/some-model"
        fetched.extend(filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tiny_hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_hf("somebody/some-model").config.model_type == "llama"
    assert fetched == repository[:7]


def test_a_wrong_dtype_is_refused(tiny_hf):
    with pytest.raises(ValueError, match="dtype is int8; expected one of float32, float16, bfloat16"):
        load_hf(tiny_hf, dtype=jnp.int8)


@pytest.mark.parametrize("dtype", ["None", "'bfloat16'"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, dtype):
    hidden, inner, layers, vocab = 512, 2048, 12, 32000
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    stored = np.float32 if dtype != "None" else ml_dtypes.bfloat16
    save_file({name: np.ones(shape, stored) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    params = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert measured_peak(f"load_hf({str(tmp_path)!r}, dtype={dtype})", tmp_path) <= 1.3 * params


def measured_peak(expression, directory):
    """Peak resident bytes of a fresh process while it evaluates an expression, above those before it."""
    warm = directory / "warm"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(warm)
    code = f"""
        import jax
        from vptq_jax.convert.hf import load_hf

        def status(key):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

        load_hf({str(warm)!r})
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        model = {expression}
        print(status("VmHWM") - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, timeout=120
    )
    return int(result.stdout.split()[-1])
