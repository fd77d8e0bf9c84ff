"""The real Gemma 3 270M against transformers: weights, tokenizer, logits, greedy text; and what 4 bits leave of it."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from vptq_jax.convert import checkpoint
from vptq_jax.convert.loading import load
from vptq_jax.lm import data
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.evaluation import perplexity
from vptq_jax.lm.generation import generate
from vptq_jax.lm.hessians import collect_hessians
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.quantizer import quantize
from vptq_jax.nn.linear import VQLinear
from vptq_jax.spec import QuantConfig

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = [
    "The capital of France is",
    "Water boils when",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village",
]
TEXTS = [
    "a  b   c\n\n\nd\t\te",
    " leading",
    "ünïcödé 漢字 🙂 \x07",
    "<start_of_turn>user\nhi<end_of_turn>\n<b>x</b>",
    "",
    "x = [1,\n     2]\n\n\n\n",
    "123 4567",
]


@pytest.fixture(scope="module")
def lm(gemma3_gguf) -> LanguageModel:
    return load(gemma3_gguf)


@pytest.fixture(scope="module")
def model(lm) -> Decoder:
    return lm.module


def parameters(model: Decoder) -> dict[str, np.ndarray]:
    """Every parameter of a dense model, by Hugging Face name."""
    found = {path: layer.weight for path, layer in model.all_linears().items()} | {"model.norm": model.norm.weight}
    for index, block in enumerate(model.layers):
        found |= {f"model.layers.{index}.{path}": norm.weight for path, norm in block.norms().items()}
    return {f"{path}.weight": np.asarray(array[...]) for path, array in found.items()}


def shell(model: Decoder):
    config = transformers.Gemma3TextConfig(**model.config.to_hf())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return transformers.Gemma3ForCausalLM(config)


@pytest.fixture(scope="module")
def reference(model):
    """The same parameters in PyTorch."""
    reference = shell(model)
    state = {name: torch.tensor(array) for name, array in parameters(model).items()}
    assert reference.load_state_dict(state, strict=False, assign=True).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    # Buffers that are in no state dict.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)
    reference.model.embed_tokens.embed_scale = torch.tensor(reference.config.hidden_size**0.5)
    assert not [p for p in (*reference.parameters(), *reference.buffers()) if p.is_meta]
    return reference.eval()


def test_weights_are_those_of_transformers(model, gemma3_gguf):
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    read = reader.load_gguf_checkpoint(str(gemma3_gguf), return_tensors=True, model_to_load=shell(model))
    ours, theirs = parameters(model), read["tensors"]
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, np.asarray(theirs[name]), err_msg=name)
    raw = model.config.to_hf()
    shared = raw.keys() & read["config"].keys() - {"rms_norm_eps"}  # which they leave as float32 has it
    assert {key: raw[key] for key in shared} == {key: read["config"][key] for key in shared}


def test_tokenizer_is_that_of_transformers(lm, gemma3_gguf, shared):
    ours = lm.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)
    for text in [(shared / "data" / "eval.txt").read_text(), *TEXTS]:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids[1:]) == text
    assert ours.special_tokens_map.items() <= theirs.special_tokens_map.items()


def test_logits_beyond_the_window(lm, model, reference, shared):
    tokens = np.array([lm.tokenizer((shared / "data" / "eval.txt").read_text()[:6000])["input_ids"][:1200]])
    assert tokens.shape[1] > 2 * model.config.sliding_window
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    # Logits of 45: 2e-4 is four units in their last place, and here are 18 layers.
    assert np.abs(model(tokens) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_greedy_equals_transformers(lm, reference):
    texts = generate(lm, PROMPTS, max_new_tokens=32, stop_tokens=(), return_result=True).tokens
    for prompt, tokens in zip(PROMPTS, texts, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([[*ids, *tokens]])).logits[0]
        assert logits.argmax(-1)[len(ids) - 1 : -1].tolist() == tokens


def windows(lm, part, count):
    tokens = data.tokenize(lm.tokenizer, data.builtin_text()[part])
    return data.windows(tokens, 512, count, first=lm.config.first_token)


def test_four_bits_keep_its_sense(lm, tmp_path):
    hessians = collect_hessians(lm, data.batches(windows(lm, "calibration", 48)), progress=False)
    small, report = quantize(lm, QuantConfig("v2-k256"), hessians, progress=False)
    assert all(isinstance(layer, VQLinear) for layer in small.module.linears().values())
    assert 4 <= report.bits_total < 4.5
    checkpoint.save(small, tmp_path / "small")
    small = checkpoint.load(tmp_path / "small")
    tokens = data.tokenize(lm.tokenizer, data.builtin_text()["evaluation"])
    before, after = (perplexity(each, tokens, context=512, max_windows=4).value for each in (lm, small))
    print(f"{report.bits_total:.3f} bits, perplexity {before:.3f} before, {after:.3f} after")
    assert before < 20  # without BOS in front of every window it is 39
    assert after < 1.1 * before
    text = generate(small, "Paris is the capital of", max_new_tokens=8)
    assert "France" in text
