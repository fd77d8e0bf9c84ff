"""Files with faults: refused in words, or read as what they were; never a traceback, a hang, or other weights."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
from mutation import dumps, mutated_bytes, mutated_json
from runner import HANG, MEMORY, QUICK

EACH = 20  # cases of one process
MANIFEST = "vptq_jax.json"


def copy(source: Path, target: Path) -> Path:
    """A copy of a model; a GGUF file goes into a directory of its own."""
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    target.mkdir()
    return Path(shutil.copy(source, target / source.name))


def files_of(model: Path, pattern: str) -> list[Path]:
    return [model] if model.is_file() else sorted(file for file in model.glob(pattern) if file.is_file())


def edit_bytes(pattern):
    def edit(model, rng):
        file = rng.choice(files_of(model, pattern))
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))

    return edit


def edit_json(pattern, part=lambda value: value):
    def edit(model, rng):
        file = rng.choice(files_of(model, pattern))
        value = json.loads(file.read_bytes())
        inner = part(value)
        changed = mutated_json(inner, rng)
        if inner is value:
            value = changed
        else:
            inner.clear()
            inner |= changed
        file.write_bytes(dumps(value))

    return edit


def edit_header(pattern):
    """One value in the header of a safetensors file, or in the text that this library keeps there."""

    def edit(model, rng):
        file = rng.choice(files_of(model, pattern))
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        own = header.get("__metadata__", {}).get("vptq_jax")
        if own and rng.random() < 0.7:
            header["__metadata__"]["vptq_jax"] = json.dumps(mutated_json(json.loads(own), rng))
        else:
            header = mutated_json(header, rng)
        text = dumps(header)
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def forge(edit):
    """An edit of a saved model, its checksums made to fit again."""

    def forged(model, rng):
        edit(model, rng)
        try:
            manifest = json.loads((model / MANIFEST).read_bytes())
            for name in manifest["files"]:
                data = (model / name).read_bytes()
                manifest["files"][name] = [len(data), zlib.crc32(data)]
            manifest.pop("crc", None)
            text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
            manifest["crc"] = zlib.crc32(text.encode())
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return
        (model / MANIFEST).write_bytes(dumps(manifest))

    return forged


# Name: the model, what is done to it, and whether other weights than before are a failure.
KINDS = {
    "hf config": ("hf", edit_json("config.json"), False),
    "hf generation config": ("hf", edit_json("generation_config.json"), False),
    "hf tokenizer": ("hf", edit_json("tokenizer*.json"), False),
    "hf safetensors": ("hf", edit_bytes("model.safetensors"), False),
    "hf safetensors header": ("hf", edit_header("model.safetensors"), False),
    "hf shard index": ("sharded", edit_json("*.index.json"), False),
    "vptq config": ("vptq", edit_json("config.json", lambda value: value["quantization_config"]), False),
    "vptq tensors": ("vptq", edit_bytes("*.safetensors"), False),
    "gguf": ("gguf", edit_bytes("*"), False),
    "saved files": ("saved", edit_bytes("**/*"), True),
    "saved manifest": ("saved", edit_json(MANIFEST), True),
    "forged manifest": ("saved", forge(edit_json(MANIFEST)), False),
    "forged arrays": ("saved", forge(edit_bytes("arrays/**/*")), False),
    "hessians": ("hessians", edit_bytes("*"), False),
    "hessian headers": ("hessians", edit_header("*"), False),
}


@pytest.fixture(scope="session")
def models(runner, tiny_hf, saved, tmp_path_factory):
    """A whole model of every kind that is read."""
    place = tmp_path_factory.mktemp("models")
    found = {"hf": copy(tiny_hf, place / "hf"), "saved": saved}
    (found["hf"] / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": true, "top_p": 0.9}')
    commands = [
        ["convert", saved, place / "vptq", "--to", "hf-vptq"],
        ["quantize", tiny_hf, place / "q", *QUICK, "--save-hessians", place / "hessians"],
    ]
    for command in commands:
        done = runner.command(command, place)
        assert done.status == 0, done.err
    call = f"""
from pathlib import Path
from vptq_jax.convert.api import convert
convert({str(tiny_hf)!r}, {str(place / "sharded")!r}, to="hf", max_shard_bytes=20000)
"""
    assert runner.python(call, place).status == 0
    write_gguf(place / "gguf" / "m.gguf", tiny_hf)
    return (
        found | {name: place / name for name in ("vptq", "hessians", "sharded")} | {"gguf": place / "gguf" / "m.gguf"}
    )


def write_gguf(path: Path, source: Path) -> None:
    """The small model as a GGUF file, with a tokenizer in its metadata."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [f"t{index}" for index in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-index) for index in range(len(tokens))])
    writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        for long, short in names.items():
            stem = stem.replace(long, short)
        writer.add_tensor(f"{stem.replace('model.layers', 'blk')}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_faulty_files(kind, runner, models, tmp_path, rng, long, tried):
    name, edit, strict = KINDS[kind]
    for round_number in range(20 if long else 1):
        place = tmp_path / f"{round_number}"
        place.mkdir()
        paths = [models[name]]
        for index in range(EACH):
            target = copy(models[name], place / f"{index}")
            edit(target, rng)
            paths.append(target)
        notes = place / "notes"
        action = "hessians" if name == "hessians" else "load"
        arguments = (list(map(str, paths)), str(notes), action, MEMORY)
        done = runner.python(f"import probe; probe.load_all(*{arguments!r})", place)
        found = [json.loads(line) for line in notes.read_text().splitlines()]
        assert found[0][0] == "ok", found[0]
        for path, (outcome, text) in zip(paths[1:], found[1:], strict=False):
            tried(kind, outcome)
            assert outcome in ("ok", "clean"), f"{path}: {outcome}: {text}"
            assert outcome != "ok" or not strict or text == found[0][1], f"{path}: taken, but it is another model"
        assert len(found) == len(paths), (
            f"{paths[len(found)]}: ends with {done.status} (hangs after {HANG} s): {done.err}"
        )
        shutil.rmtree(place)
