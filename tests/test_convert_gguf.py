"""GGUF in: files written with the gguf package, and a real one, against what went in and against transformers."""

import struct
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vptq_jax.convert.gguf import load_gguf
from vptq_jax.convert.gguf_reader import TYPES, GGUFFile
from vptq_jax.convert.gguf_tokenizer import gguf_tokenizer

Q = gguf.GGMLQuantizationType
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, model, architecture="llama", kind=Q.F32, edit=None, extra=None):
    """A GGUF file of a transformers model, rows of q and k ordered as llama.cpp's converter orders them."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if edit:
        edit(writer)
    tensors = {}
    for name, value in model.state_dict().items():
        stem, ending = name.rsplit(".", 1)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = f"blk.{stem.split('.')[2]}." if stem.startswith("model.layers.") else ""
        part = ".".join(stem.split(".")[3:]) if layer else stem
        array = value.float().numpy()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if architecture == "llama" and part in heads:
            halves = array.reshape(heads[part], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        tensors[f"{layer}{NAMES[part]}.{ending}"] = array
    for name, array in (tensors | (extra or {})).items():
        if array.ndim == 1 or kind == Q.F32:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**kwargs):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | kwargs))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def norms_apart(model):
    """The model with random weights of its norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama_logits_are_those_of_pytorch(tmp_path, options):
    model = llama(**options)
    loaded = load_gguf(write_gguf(tmp_path / "m.gguf", model)).module
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), torch_logits(model), atol=2e-5)


def test_qwen2_keeps_its_row_order_and_biases(tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    loaded = load_gguf(write_gguf(tmp_path / "m.gguf", model, "qwen2")).module
    assert loaded.config.model_type == "qwen2"
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), torch_logits(model), atol=2e-5)


def test_qwen3_norms_its_heads(tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, head_dim=32)).eval()
    file = write_gguf(tmp_path / "m.gguf", norms_apart(model), "qwen3", edit=lambda w: w.add_key_length(32))
    loaded = load_gguf(file).module
    assert loaded.config.model_type == "qwen3"
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), torch_logits(model), atol=2e-5)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_is_recovered(tmp_path, kind):
    rope = ROPES[kind]
    model = llama(rope_parameters=rope, head_dim=64)
    extra = {}
    if kind == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
        extra["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq.numpy()

    def edit(writer):
        writer.add_key_length(64)
        if kind != "llama3":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    loaded = load_gguf(write_gguf(tmp_path / "m.gguf", model, edit=edit, extra=extra)).module
    assert loaded.config.rope.type == kind
    assert loaded.config.rope.factor == rope["factor"]
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), torch_logits(model), atol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_types_hold_the_weights_to_their_precision(tmp_path, kind):
    model = llama()
    loaded = load_gguf(write_gguf(tmp_path / "m.gguf", model, kind=Q[kind])).module
    tolerance = {"F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2}.get(kind, 0.2 if "Q4" in kind else 0.1)
    for path, layer in loaded.linears().items():
        exact = model.state_dict()[f"{path}.weight"].numpy()
        error = np.linalg.norm(np.asarray(layer.weight[...]) - exact) / np.linalg.norm(exact)
        assert 0 < error < tolerance, path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_decode_as_in_transformers(tmp_path, kind):
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (5, 3, size), dtype=np.uint8)
    # The scales are halves: keep them finite and small.
    halves = {"Q6_K": slice(size - 2, size), "Q4_0": slice(0, 2), "Q8_0": slice(0, 2)}.get(kind, slice(0, 4))
    scales = rng.uniform(0.01, 0.02, (5, 3, (halves.stop - halves.start) // 2)).astype(np.float16)
    raw[..., halves] = scales.view(np.uint8)
    raw = raw.reshape(5, 3 * size)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("t", raw, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = dequant.dequantize(torch.tensor(raw), Q[kind].value).numpy().reshape(5, 3 * block)
    np.testing.assert_allclose(GGUFFile(tmp_path / "m.gguf").read("t"), expected, rtol=1e-6, atol=1e-7)
    assert kind in TYPES


def test_reader_agrees_with_the_gguf_package(smollm2_gguf):
    ours, theirs = GGUFFile(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    assert {t.name: tuple(int(n) for n in t.shape[::-1]) for t in theirs.tensors} == {
        name: tensor.shape for name, tensor in ours.tensors.items()
    }
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    for tensor in theirs.tensors[::40]:
        np.testing.assert_array_equal(ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


def test_the_real_tokenizer_is_that_of_transformers(smollm2_gguf, shared):
    ours = gguf_tokenizer(GGUFFile(smollm2_gguf).metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    text = (shared / "data" / "eval.txt").read_text()
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text
    assert ours.special_tokens_map == theirs.special_tokens_map
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
    # transformers ignores the pre-tokenizer's name; SmolLM2's cuts digits off before anything else.
    assert [ours.decode([i]) for i in ours("in  50")["input_ids"]] == ["in", "  ", "5", "0"]


def test_nothing_needs_torch(smollm2_gguf):
    code = f"""
        import sys
        sys.modules["torch"] = None
        from vptq_jax.convert.gguf import load_gguf
        model = load_gguf({str(smollm2_gguf)!r}, dtype="bfloat16")
        print(model.tokenizer("Hello")["input_ids"], model.module.dtype)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, timeout=200
    )
    assert result.stdout.split() == ["[19556]", "bfloat16"]


def test_the_real_weights_are_those_of_transformers(smollm2_gguf):
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    ours = load_gguf(smollm2_gguf).module
    with torch.device("meta"):
        shell = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_hf()))
    theirs = reader.load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=shell)["tensors"]
    for path, layer in {"model.embed_tokens": ours.embed_tokens, **ours.linears()}.items():
        np.testing.assert_array_equal(np.asarray(layer.weight[...]), np.asarray(theirs[f"{path}.weight"]))


def spm_metadata(path):
    """A SentencePiece-like vocabulary as GGUF files store it: tokens with scores, no merges."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    text = ["the quick brown fox jumps over the lazy dog", "a model of a language is a model of the world"] * 3
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    vocabulary = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(vocabulary))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(vocabulary) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return trained, metadata


@pytest.mark.parametrize(
    "text", ["the quick brown fox", "a model of  the world", "lazy\nfox ünd 漢", "", " a", "brown</s>dog"]
)
def test_sentencepiece_vocabularies_split_as_they_were_trained(tmp_path, text):
    trained, metadata = spm_metadata(tmp_path)
    tokenizer = gguf_tokenizer(metadata)
    assert tokenizer(text)["input_ids"] == [1, *(trained.encode(text).ids)] if text else [1]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text.strip()
    without = gguf_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    assert without(text)["input_ids"] == [*tokenizer(text)["input_ids"][1:], 2]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("llama-bpe", "I'll pay 12345 now", ["I", "'ll", " pay", " ", "123", "45", " now"]),
        ("qwen2", "I'll pay 123 now", ["I", "'ll", " pay", " ", "1", "2", "3", " now"]),
        ("tekken", "ABCdef 12 x/\n", ["ABCdef", " ", "1", "2", " x", "/\n"]),
        ("smollm", "a  12", ["a", "  ", "1", "2"]),
        ("gpt-2", "a  12", ["a", " ", " 12"]),
    ],
)
def test_text_is_cut_by_the_rule_of_the_vocabulary(pre, text, expected):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": alphabet,
        "tokenizer.ggml.merges": [],
    }
    backend = gguf_tokenizer(metadata).backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [decoders.ByteLevel().decode([piece]) for piece in pieces] == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, NotImplementedError, "of type 't5'"),
        ({"tokenizer.ggml.scores": [1.0]}, ValueError, "scores has 1 entries; expected"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ValueError, "1 duplicates"),
        ({"tokenizer.ggml.tokens": None}, ValueError, "tokens is None; expected a list of texts"),
        ({"tokenizer.ggml.bos_token_id": 1 << 40}, ValueError, "bos_token_id is 1099511627776"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "other"}, NotImplementedError, "'other'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["zz yy"]}, ValueError, "'zz yy'"),
    ],
)
def test_tokenizers_that_cannot_be_built(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        gguf_tokenizer(spm_metadata(tmp_path)[1] | change)


def test_faults_are_gathered(tmp_path):
    model = llama()
    extra = {"blk.7.ffn_up.weight": np.zeros((96, 64)), "blk.0.ffn_up.weight": np.zeros((4, 64))}
    with pytest.raises(ValueError, match="2 problems") as error:
        load_gguf(write_gguf(tmp_path / "m.gguf", model, extra=extra))
    assert "'blk.7.ffn_up.weight' is unexpected" in str(error.value)
    assert "blk.0.ffn_up.weight has shape [4, 64]; expected [96, 64]" in str(error.value)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda w: w.add_block_count(1 << 31), ValueError, "block_count is 2147483648; expected"),
        (lambda w: w.add_expert_count(8), NotImplementedError, "mixture of 8 experts"),
        (lambda w: w.add_rope_dimension_count(8), NotImplementedError, "rotates 8 of"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), NotImplementedError, "'longrope'"),
        (
            lambda w: w.add_layer_norm_rms_eps(float("nan")),
            ValueError,
            "layer_norm_rms_epsilon is nan; expected a finite",
        ),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, edit, error, message):
    def change(writer):
        writer.add_key_length(16)
        for fields in writer.kv_data:
            fields.pop("llama.block_count", None)
        edit(writer)
        writer.kv_data[0].setdefault("llama.block_count", gguf.gguf_writer.GGUFValue(2, gguf.GGUFValueType.UINT32))

    with pytest.raises(error, match=message):
        load_gguf(write_gguf(tmp_path / "m.gguf", llama(), edit=change))


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="architecture 'gemma'; supported are llama, qwen2, qwen3"):
        load_gguf(write_gguf(tmp_path / "m.gguf", llama(), "gemma"))


def header(tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the magic takes 4 bytes"),
        (b"GGML" + bytes(30), "expected b'GGUF'"),
        (b"GGUF" + struct.pack("<I", 9), "version 9 is not supported"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (header(0, 1 << 60), "length of a metadata key"),
        (header(1 << 60), "length of a tensor name"),
        (header(0, 1, struct.pack("<Q", 1 << 62)), "a metadata key takes"),
        (header(0, 1, text(b"k") + struct.pack("<I", 77)), "unknown type 77"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61)), "'k' takes"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61)), "an entry of 'k'"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 61)), "array of the unsupported type 9"),
        (header(0, 2, 2 * (text(b"k") + struct.pack("<IB", 7, 1))), "'k' occurs twice"),
        (header(1, 0, text(b"t") + struct.pack("<I", 1 << 30)), "has 1073741824 axes"),
        (header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 1 << 50, 0, 0)), "but the file has"),
        (header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 99, 0)), "unknown type number 99"),
        (header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 256, 10, 0)), "of type Q2_K; supported are"),
        (header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0)), "needs a multiple of 32"),
    ],
)
def test_files_that_lie_are_refused(tmp_path, raw, message):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "m.gguf")


def test_a_truncated_file_is_refused(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", llama())
    raw = file.read_bytes()
    file.write_bytes(raw[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_gguf(file)


def test_flipped_bits_never_crash(tmp_path):
    """A hundred files with one bit of metadata or tensor table flipped: refused in words, or read."""
    file = write_gguf(tmp_path / "m.gguf", llama(num_hidden_layers=1))
    raw = file.read_bytes()
    end = raw.index(b"output_norm") + 60
    rng = np.random.default_rng(0)
    said = []
    for position, bit in zip(rng.integers(0, end, 100), rng.integers(0, 8, 100), strict=True):
        changed = bytearray(raw)
        changed[position] ^= 1 << bit
        file.write_bytes(changed)
        try:
            load_gguf(file)
        except (ValueError, NotImplementedError) as error:
            said.append(str(error))
    assert all(said)
    assert len(said) > 50
