"""The command line: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.numpy import load_file, save_file

from vptq_jax import cli
from vptq_jax.convert.loading import load
from vptq_jax.lm.generation import chat_prompt, generate, stream
from vptq_jax.lm.sampling import Sampling
from vptq_jax.spec import SearchOptions

COMMANDS = ("quickstart", "quantize", "generate", "chat", "eval", "convert", "inspect", "bench")
SPEC = "v2-k64"
QUICK = ("--samples", "4", "--length", "64", "--rounds", "1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys, monkeypatch, command_hooks) -> Run:
    """Runs a command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def quantized(tiny_hf, tmp_path_factory) -> Path:
    """The tiny model, quantized by the command."""
    output = tmp_path_factory.mktemp("quantized") / "model"
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(tiny_hf), str(output), "--spec", SPEC, *QUICK])
    assert stop.value.code == 0
    return output


def failure(outcome: Outcome, code: int = 1) -> str:
    """The message of a command that failed as it should."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    return " ".join(outcome.err.split())


# Help


def test_help_lists_the_commands(run):
    outcome = run("--help")
    assert outcome.code == 0
    assert all(command in outcome.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(run, command):
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert f"vptq-jax {command} " in outcome.out.partition("Examples:")[2]


def test_no_command_prints_the_help(run):
    assert "quickstart" in "".join(run()[1:])


def test_version(run):
    assert run("--version").out.startswith("vptq-jax ")


@pytest.mark.parametrize("arguments", [("quantise",), ("inspect",), ("eval", "m", "--context", "many")])
def test_wrong_usage(run, arguments):
    failure(run(*arguments), code=2)


# What works


def test_quantize_leaves_a_model_and_its_report(quantized):
    report = json.loads((quantized / "quant_report.json").read_text())
    assert len(report["operators"]) == 14
    assert {row["spec"] for row in report["operators"]} == {SPEC}
    assert (quantized / "error_by_layer.png").stat().st_size > 0
    assert [file.name for file in quantized.parent.iterdir()] == ["model"]


def test_quantize_json(run, tiny_hf, tmp_path):
    outcome = run("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC, *QUICK, "--json", "--rule", "k_proj=none")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert len(report["operators"]) == 12
    assert report["bits_total"] > report["bits_nominal"] == 3.0


def test_saved_hessians_serve_another_spec(run, tiny_hf, quantized, tmp_path):
    first = run("quantize", tiny_hf, tmp_path / "a", "--spec", SPEC, *QUICK, "--save-hessians", tmp_path / "h")
    again = run("quantize", tiny_hf, tmp_path / "b", "--spec", SPEC, "--rounds", 1, "--hessians", tmp_path / "h")
    other = run("quantize", tiny_hf, tmp_path / "c", "--spec", "v2-k16", "--hessians", tmp_path / "h")
    assert (first.code, again.code, other.code) == (0, 0, 0)
    errors = [
        [row["error"] for row in json.loads((model / "quant_report.json").read_text())["operators"]]
        for model in (quantized, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[1] == errors[2]
    assert all(coarse > fine for coarse, fine in zip(errors[3], errors[2], strict=True))


def test_inspect(run, quantized):
    outcome = run("inspect", quantized)
    assert outcome.code == 0
    assert "model.layers.*.self_attn.q_proj" in outcome.out
    assert SPEC in outcome.out
    assert "3.000 nominal" in outcome.out


def test_inspect_json_counts_every_byte(run, quantized):
    facts = json.loads(run("inspect", quantized, "--json").out)
    report = json.loads((quantized / "quant_report.json").read_text())
    assert facts["bits_total"] == pytest.approx(report["bits_total"])
    assert facts["bits_nominal"] == 3.0
    layers = {row["path"]: row for row in facts["layers"]}
    q_proj = layers["model.layers.0.self_attn.q_proj"]
    # 32 x 32 weights: 16 x 32 indices of 6 bits, 64 x 2 half codebook, half scale and offset, 2-byte permutation.
    assert q_proj["bytes"] == 16 * 32 * 6 // 8 + 64 * 2 * 2 + 32 * (2 + 2 + 2)
    assert len(layers) == 16
    assert layers["lm_head"]["format"] == "float32"


def test_eval(run, tiny_hf, quantized):
    arguments = ("--context", "64", "--max-windows", "2", "--json")
    plain, small = (
        json.loads(run("eval", model, *arguments).out)["texts"]["builtin"] for model in (tiny_hf, quantized)
    )
    assert plain["windows"] == small["windows"] == 2
    assert small["value"] == pytest.approx(plain["value"], rel=0.2)
    shown = run("eval", quantized, *arguments[:-1]).out
    assert f"builtin: perplexity {small['value']:.3f} (context 64, 2 windows" in shown


def test_eval_of_a_file(run, tiny_hf, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    outcome = run(
        "eval", tiny_hf, "--text", text, "--text", "builtin", "--context", "32", "--max-windows", "2", "--json"
    )
    assert set(json.loads(outcome.out)["texts"]) == {str(text), "builtin"}


def test_generate(run, quantized):
    outcome = run("generate", quantized, "the quick", "--max-new-tokens", "6", "--json")
    result = json.loads(outcome.out)
    assert result["prompts"] == ["the quick"]
    assert len(result["tokens"][0]) <= 6
    shown = run("generate", quantized, "the quick", "--max-new-tokens", "6")
    assert shown.out.rstrip("\n") == "the quick" + result["texts"][0].rstrip("\n")
    assert "6 tokens" in shown.err


def test_generate_from_standard_input(run, quantized, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick"))
    outcome = run("generate", quantized, "-", "--max-new-tokens", "2", "--json")
    assert json.loads(outcome.out)["prompts"] == ["the quick"]


def test_chat_with_one_message(run, quantized):
    outcome = run("chat", quantized, "--message", "the fox", "--system", "a dog", "--max-new-tokens", "4", "--json")
    messages = json.loads(outcome.out)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_chat_remembers_and_ends_at_the_end_of_input(run, quantized, monkeypatch):
    prompts, caches, messages, answers = [], [], [], []

    def streamed(model, prompt, **options):
        prompts.append(prompt)
        caches.append(options["prompt_cache"])
        return stream(model, prompt, **options)

    monkeypatch.setattr("vptq_jax.lm.generation.stream", streamed)
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\nthe dog\nthe fox\n"))
    outcome = run("chat", quantized, "--max-new-tokens", "3")
    assert outcome.code == 0
    assert len(set(map(id, caches))) == 1
    model = load(quantized)
    for question in ("the fox", "the dog", "the fox"):
        messages.append({"role": "user", "content": question})
        prompt = chat_prompt(model, messages)
        answers.append(generate(model, prompt, max_new_tokens=3, sampling=Sampling(repetition_penalty=1.1)))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert prompts[-1] == prompt
    assert outcome.out == "".join(f"{answer}\n" for answer in answers)
    assert caches[0].tokens[: len(prompt)] == prompt


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


def test_a_full_context_drops_the_oldest_exchanges(run, quantized, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vptq_jax.lm.generation.stream", lambda model, ids, **_: asked.append(len(ids)) or iter(["fox"])
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown fox jumps over the dog\n" * 30))
    outcome = run("chat", quantized, "--max-new-tokens", "100", "--system", "be a fox")
    assert outcome.code == 0
    assert outcome.err.count("The oldest messages no longer fit") > 5
    assert len(asked) == 30
    assert 150 < max(asked) <= 256 - 64  # a quarter of the context is kept for the answer


def test_a_message_that_does_not_fit_ends_no_conversation_at_a_terminal(run, quantized, monkeypatch):
    lines = ["the fox", "fox " * 300, "the dog"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines) + "\n"))
    asked = []
    monkeypatch.setattr("vptq_jax.lm.generation.stream", lambda model, ids, **_: asked.append(ids) or iter(["dog"]))
    outcome = run("chat", quantized)
    assert outcome.code == 0
    assert "leaves no room for an answer; expected a shorter message" in outcome.err
    assert "oldest" not in outcome.err
    assert len(asked) == 2
    assert len(asked[1]) > len(asked[0])  # the first exchange is still there
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    outcome = run("chat", quantized)
    assert outcome.code == 1
    assert "error: the message has 3" in outcome.err


def test_convert_round_trip_through_the_community_format(run, quantized, tmp_path):
    there = run("convert", quantized, tmp_path / "vptq", "--to", "hf-vptq", "--json")
    assert json.loads(there.out)["files"] == ["model.safetensors"]
    assert run("convert", tmp_path / "vptq", tmp_path / "back").code == 0
    first, last = (json.loads(run("inspect", model, "--json").out) for model in (quantized, tmp_path / "back"))
    assert first["layers"] == last["layers"]
    answers = [run("generate", model, "the", "--max-new-tokens", 8).out for model in (quantized, tmp_path / "vptq")]
    assert answers[0] == answers[1]


def test_convert_to_dense(run, quantized, tmp_path):
    shown = run("convert", quantized, tmp_path / "dense", "--to", "hf", "--dtype", "bfloat16").out
    assert "note: 14 quantized layers become dense" in shown
    facts = json.loads(run("inspect", tmp_path / "dense", "--json").out)
    assert {row["format"] for row in facts["layers"]} == {"bfloat16"}


def test_convert_check_writes_nothing(run, quantized, tiny_hf, tmp_path):
    outcome = run("convert", quantized, tmp_path / "out", "--to", "hf-vptq", "--check")
    assert outcome.code == 0
    assert "would be written" in outcome.out
    outcome = run("convert", tiny_hf, tmp_path / "out", "--to", "hf-vptq", "--check", "--json")
    assert outcome.code == 1
    assert "no layer is quantized" in json.loads(outcome.out)["problems"][0]
    assert list(tmp_path.iterdir()) == []


def test_bench_quantize(run):
    facts = json.loads(run("bench", "quantize", "--shape", "32x32", "--spec", SPEC, "--json").out)
    assert facts["device"]
    assert [row["spec"] for row in facts["results"]] == [SPEC]
    assert facts["results"][0]["seconds"] > 0


# What does not work


def test_bench_of_nonsense(run):
    for arguments, message in {
        ("quantize", "--shape", "32,32"): "--shape is '32,32'; expected OUTxIN",
        ("matmul", "--spec", "v4"): "cannot read the spec 'v4'",
        ("decode", "--shape", "gpt-5"): "shape is 'gpt-5'; expected one of llama2-7b",
    }.items():
        assert message in failure(run("bench", *arguments))


def test_convert_that_cannot_be(run, tiny_hf, tmp_path):
    assert "no layer is quantized" in failure(run("convert", tiny_hf, tmp_path / "out", "--to", "hf-vptq"))
    assert "to is 'gguf'; expected one of orbax" in failure(run("convert", tiny_hf, tmp_path / "out", "--to", "gguf"))
    assert "--dtype is 'int8'" in failure(run("convert", tiny_hf, tmp_path / "out", "--dtype", "int8"))
    assert list(tmp_path.iterdir()) == []


def test_unreadable_specs(run, tiny_hf, tmp_path):
    for spec, message in {
        "banana": "cannot read the spec 'banana'",
        "v8-k300": "number of centroids is 300; expected a power of two",
        "v8-k131072": "number of centroids is 131072; expected a power of two from 2 to 65536",
        "v65-k256": "vector length is 65; expected a whole number from 1 to 64",
    }.items():
        assert message in failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", spec))
    assert list(tmp_path.iterdir()) == []


def test_unreadable_rules(run, tiny_hf, tmp_path):
    for rule, message in {
        "q_proj": "expected REGEX=SPEC",
        "(=v4-k16": "is not a regular expression",
        "q_proj=v4": "cannot read the spec 'v4'",
    }.items():
        assert message in failure(run("quantize", tiny_hf, tmp_path / "out", "--rule", rule))
    assert list(tmp_path.iterdir()) == []


def test_rule_that_matches_nothing(run, tiny_hf, tmp_path):
    message = failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC, *QUICK, "--rule", "o_prj=v4-k16"))
    assert re.search(r"rule 'o_prj' matches no layer; near it are model\.layers\.\d", message)
    assert list(tmp_path.iterdir()) == []


def test_more_centroids_than_vectors(run, tiny_hf, tmp_path):
    message = failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", "v8-k4096", *QUICK))
    assert "4096 centroids" in message
    assert "k_proj" in message
    assert list(tmp_path.iterdir()) == []


def test_calibration_text_shorter_than_a_window(run, tiny_hf, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("the quick fox")
    message = failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC, "--text", text, "--length", "64"))
    assert "fewer than one window of 64" in message
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


def test_window_longer_than_the_context(run, tiny_hf, tmp_path):
    message = failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC, "--length", "512"))
    assert "--length is 512; the model reads at most 256 tokens" in message
    message = failure(run("eval", tiny_hf, "--context", "512"))
    assert "context is 512; expected 2 to 256 tokens" in message


def test_missing_text(run, tiny_hf, tmp_path):
    for command in (("quantize", tiny_hf, tmp_path / "out"), ("eval", tiny_hf)):
        assert "no such file; expected a UTF-8 text file or one of builtin" in failure(
            run(*command, "--text", "gone.txt")
        )


def test_output_that_holds_something(run, tiny_hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "already holds something" in failure(run("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_overwrite_replaces_models_only(run, tiny_hf, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "model")
    assert run("quantize", tiny_hf, tmp_path / "model", "--spec", "v2-k16", *QUICK, "--overwrite").code == 0
    assert "v2-k16" in run("inspect", tmp_path / "model").out

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    failure(run("quantize", tiny_hf, tmp_path / "home", "--spec", SPEC, *QUICK, "--overwrite"))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_output_that_cannot_be_written(run, tiny_hf, tmp_path):
    (tmp_path / "file").write_text("")
    message = failure(run("quantize", tiny_hf, tmp_path / "file" / "out", "--spec", SPEC))
    assert "cannot write in" in message
    assert "is a file" in failure(run("quantize", tiny_hf, tmp_path / "file", "--spec", SPEC))


def test_missing_model(run, tmp_path):
    for command in ("inspect", "eval"):
        message = failure(run(command, tmp_path / "gone"))
        assert "gone" in message


def test_directory_that_is_no_model(run, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    failure(run("inspect", tmp_path))


def damage_config(path: Path, text: str) -> None:
    (path / "config.json").write_text(text)


def damage_weights(path: Path, keep: int) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    damage_config(path, json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: damage_config(path, "{not json"), "config.json"),
        (lambda path: change_config(path, hidden_size=48), "self_attn.q_proj.weight has shape [32, 32]"),
        (lambda path: change_config(path, model_type="mamba"), "model_type is 'mamba', which is not supported"),
        (lambda path: change_config(path, num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
        (lambda path: damage_weights(path, 1000), "model.safetensors"),
        (lambda path: damage_weights(path, 4), "model.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_damaged_checkpoint(run, tiny_hf, tmp_path, damage, message):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_hf, broken)
    damage(broken)
    assert message in failure(run("quantize", broken, tmp_path / "out", "--spec", SPEC, *QUICK))
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_index_that_names_a_missing_shard(run, tiny_hf, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_hf, broken)
    names = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00001.safetensors" in failure(run("inspect", broken))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(run, tiny_hf, tmp_path, value):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_hf, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, broken / "model.safetensors")
    message = failure(run("quantize", broken, tmp_path / "out", "--spec", SPEC, *QUICK))
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_model_without_tokenizer(run, tiny_hf, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_hf / name, bare)
    for command in (("generate", bare, "hello"), ("eval", bare), ("quantize", bare, tmp_path / "out", *QUICK)):
        assert "has no tokenizer" in failure(run(*command))


def test_prompts_and_settings_out_of_range(run, quantized):
    for arguments, message in {
        ("",): "the prompt is empty",
        ("the fox " * 300,): "prompt 0 has",
        ("fox", "--temperature", "-1"): "temperature is -1.0",
        ("fox", "--top-p", "2"): "top_p is 2.0",
    }.items():
        assert message in failure(run("generate", quantized, *arguments))
    assert "the message is empty" in failure(run("chat", quantized, "--message", " "))
    wrong = run("generate", quantized, "fox", "--max-new-tokens", "0")
    assert wrong.code == 2
    assert "--max-new-tokens" in wrong.err


def test_options_come_from_the_structs_that_hold_them(run, tiny_hf, tmp_path):
    message = failure(run("quantize", tiny_hf, tmp_path / "out", "--kmeans-iters", "0"))
    assert "kmeans_iters is 0; expected a whole number of at least 1" in message
    for command, struct in (("quantize", SearchOptions), ("generate", Sampling), ("chat", Sampling)):
        shown = run(command, "--help").out
        for field in dataclasses.fields(struct):
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "refinement" in run("quantize", "--help").out  # from the docstring of SearchOptions


def test_model_of_a_newer_version(run, quantized, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(quantized, newer)
    changed = [file for file in newer.rglob("*.json") if raise_version(file)]
    assert changed
    assert "newer" in failure(run("inspect", newer))


def raise_version(file: Path) -> bool:
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return False
    if not isinstance(content, dict) or "format_version" not in content:
        return False
    file.write_text(json.dumps(content | {"format_version": 999}))
    return True


def test_interruption_leaves_finished_layers_to_continue_from(run, tiny_hf, quantized, tmp_path, monkeypatch):
    from vptq_jax.nn import quantizer as driver

    command = ("quantize", tiny_hf, tmp_path / "out", "--spec", SPEC, *QUICK)
    real, calls = driver.quantize_weight, []

    def interrupted(*args, name, **options):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, name=name, **options)

    monkeypatch.setattr(driver, "quantize_weight", interrupted)
    message = failure(run(*command), code=130)
    assert "the same command continues" in message
    assert "interrupted" in message
    assert [file.name for file in tmp_path.iterdir()] == ["out.partial"]

    assert run(*command).code == 0
    assert len(calls) == 5 + 10  # 14 operators, 4 of them finished before.
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    facts = [json.loads(run("inspect", model, "--json").out) for model in (quantized, tmp_path / "out")]
    assert facts[0]["layers"] == facts[1]["layers"]


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("inspect", tmp_path / "gone", "--debug")
