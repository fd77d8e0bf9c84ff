"""Distillation: its gradient, its steps, what learns and what stays, and how it ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import CONFIG, assert_same_bits, random_model

import vptq_jax as vq
from vptq_jax.tune.distill import TuningWarning
from vptq_jax.tune.leaves import learned, units, with_leaves
from vptq_jax.tune.student import Student, Teacher

ONE_BLOCK = dataclasses.replace(CONFIG, num_layers=1)
ROWS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (36, 9)).astype(np.int32)
BATCHES = [ROWS[at : at + 4] for at in range(0, 32, 4)]
HELD_OUT = ROWS[32:]


def config(**changes):
    return vq.TuneConfig(**({"tokens": 36 * 12, "dtype": "float32", "evaluations": 2, "learning_rate": 0.02} | changes))


def pair(*specs, model_config=ONE_BLOCK):
    """A teacher, and a student that is a noisy copy of it in quantized form."""
    teacher = random_model(model_config, specs=(None,))
    return teacher, random_model(model_config, specs=specs)


def naive(student, teacher, tokens):
    """KL as it is written down, all logits at once."""
    p, q = (jax.nn.log_softmax(each(tokens)) for each in (teacher, student))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def test_loss_and_gradient_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr("vptq_jax.tune.loss.CHUNK", 7)  # which does not divide the tokens
    teacher, model = pair("v6-k16-4", "v4-k8-g2", model_config=CONFIG)
    tokens, student = jnp.asarray(ROWS[:3]), Student(model, "float32")
    value, gradient = student.gradient(tokens, Teacher(teacher))

    def formula(leaves):
        changed = nnx.merge(*nnx.split(model), copy=True)
        for index, block in enumerate(model.layers):
            changed.layers[index] = with_leaves(block, leaves[index])
        changed.norm.weight = nnx.Param(leaves[-1]["norm.weight"])
        return naive(changed, teacher, tokens)

    expected, wanted = jax.value_and_grad(formula)(student.by_block(student.leaves))
    assert value == pytest.approx(float(expected), rel=1e-5)
    for found, right in zip(student.by_block(gradient), wanted, strict=True):
        assert set(found) == set(right)
        for name in right:
            scale = np.abs(right[name]).max()
            np.testing.assert_allclose(found[name], right[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_what_learns():
    _, model = pair("v6-k16-4", "v4-k16-o10v2k8", None)
    names = set(learned(model.layers[0]))
    assert {f"self_attn.q_proj.{field}" for field in ("codebook", "res_codebook", "scale", "offset", "bias")} <= names
    assert "self_attn.k_proj.outlier_codebook" in names
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= names
    assert not [name for name in names if "indices" in name or "perm" in name]
    assert not [name for name in names if "v_proj" in name]  # it is not quantized
    student = Student(model, "float32")
    assert [set(leaves) for leaves in student.by_block(student.leaves)] == [names, {"norm.weight"}]


def test_a_step_is_in_units_of_the_leaf():
    _, student = pair("v6-k256")
    layer = student.layers[0].self_attn.q_proj
    book = np.array(layer.codebook[...])
    index = np.asarray(layer.array.unpack()[0])
    unused = sorted(set(range(256)) - set(index.ravel().tolist()))
    assert unused, "the case is to have centroids that nothing carries"
    book[0, unused] = 1e6
    layer.codebook[...] = jnp.asarray(book)
    found = units(student.layers[0], learned(student.layers[0]))
    used = np.delete(book[0].astype(np.float64), unused, axis=0)
    np.testing.assert_allclose(found["self_attn.q_proj.codebook"].squeeze(), np.sqrt((used**2).mean()), rtol=1e-5)
    scale = np.abs(layer.scale[...])
    for field in ("scale", "offset"):
        np.testing.assert_array_equal(found[f"self_attn.q_proj.{field}"], scale)
    np.testing.assert_array_equal(
        found["input_layernorm.weight"], np.abs(student.layers[0].input_layernorm.weight[...])
    )


@pytest.mark.parametrize(
    ("specs", "changes"),
    [
        (("v6-k16-4",), {}),
        (("v4-k16-g2", "v4-k16-o10v2k8", "v4-k16-nonorm"), {"tie_word_embeddings": True}),
    ],
    ids=["residual", "groups, outliers, no scale; tied"],
)
def test_the_student_comes_nearer_and_both_stay_as_they_were(specs, changes, tmp_path):
    teacher, student = pair(*specs, model_config=dataclasses.replace(ONE_BLOCK, **changes))
    copies = [nnx.merge(*nnx.split(each), copy=True) for each in (teacher, student)]
    tuned, history = vq.distill(student, teacher, BATCHES, config(), held_out=HELD_OUT)
    assert_same_bits(teacher, copies[0])
    assert_same_bits(student, copies[1])
    assert history.stopped is None
    assert [row["step"] for row in history.rows] == [0, 6, 12]
    assert history.rows[-1]["tokens"] == 12 * 36
    before, after = (vq.divergence(each, teacher, HELD_OUT) for each in (student, tuned))
    assert before.kl == pytest.approx(history.rows[0]["kl"], rel=1e-4)
    assert after.kl == pytest.approx(min(row["kl"] for row in history.rows), rel=1e-3)
    assert after.kl < 0.95 * before.kl
    for path, layer in tuned.quantized_layers().items():
        assert jnp.array_equal(layer.indices[...], student.quantized_layers()[path].indices[...])
    vq.save(tuned, tmp_path / "tuned")
    stored = vq.divergence(vq.load(tmp_path / "tuned"), teacher, HELD_OUT)
    assert stored.kl == pytest.approx(after.kl, rel=0.02)


def test_the_same_run_twice_is_the_same_to_the_bit_and_holds_text_out():
    teacher, student = pair("v6-k16-4")
    lm = vq.LanguageModel(student, "tokenizer", {"eos_token_id": 3})
    batches = [jnp.asarray(batch) for batch in BATCHES]
    tuned, history = vq.distill(lm, vq.LanguageModel(teacher), batches, config(tokens=36 * 4))
    again, same = vq.distill(lm, teacher, BATCHES, config(tokens=36 * 4))
    assert_same_bits(tuned, again)
    assert (tuned.tokenizer, tuned.generation_config) == ("tokenizer", {"eos_token_id": 3})
    assert [row["kl"] for row in history.rows] == [row["kl"] for row in same.rows]
    # A sixteenth of 32 rows, from the last batch.
    assert history.rows[0]["kl"] == pytest.approx(vq.divergence(student, teacher, BATCHES[-1][:2]).kl, rel=1e-4)


def test_a_rate_that_diverges_ends_the_run_and_keeps_the_best():
    _, student = pair("v6-k16-4")
    teacher = nnx.merge(*nnx.split(student), copy=True)  # already near: there is nothing but to go away
    teacher.norm.weight[...] = 1.1 * teacher.norm.weight[...]
    with pytest.warns(TuningWarning, match="it diverges. Take a lower learning rate than 1;"):
        tuned, history = vq.distill(
            student, teacher, BATCHES, config(learning_rate=1.0, tokens=36 * 60), held_out=HELD_OUT
        )
    assert history.best == 0
    assert "by step 10," in history.stopped
    assert vq.divergence(tuned, teacher, HELD_OUT).kl == pytest.approx(history.rows[0]["kl"], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run():
    teacher, student = pair("v6-k16-4")
    teacher.embed_tokens.weight[...] = teacher.embed_tokens.weight[...].at[7].set(jnp.inf)
    without = np.where(ROWS == 7, 8, ROWS)
    batches = [without[0:4], without[4:8], ROWS[:36].reshape(-1)[ROWS.reshape(-1) == 7][:4].reshape(1, 4)]
    with pytest.warns(TuningWarning, match="the loss of step 3 is nan; the leaf that had grown most .* is .*layers"):
        _, history = vq.distill(student, teacher, batches, config(), held_out=without[32:])
    assert np.isfinite(history.rows[history.best]["kl"])
    with pytest.raises(ValueError, match="not finite before the first step"):
        vq.distill(student, teacher, batches, config(), held_out=batches[2])


def test_bad_input():
    teacher, student = pair("v6-k16-4")
    with pytest.raises(ValueError, match="a vocabulary of 40 tokens and its teacher one of 41"):
        vq.distill(student, random_model(dataclasses.replace(ONE_BLOCK, vocab_size=41)), BATCHES)
    with pytest.raises(ValueError, match="the student has no quantized layer in its blocks"):
        vq.distill(teacher, teacher, BATCHES)
    with pytest.raises(ValueError, match="there are no calibration batches"):
        vq.distill(student, teacher, [])
    with pytest.raises(ValueError, match="there are 4 rows of text in 1 batches; too few to train and to hold out"):
        vq.distill(student, teacher, BATCHES[:1])
    for changes, message in (
        ({"tokens": 0}, "tokens is 0; expected a whole number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a number above 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected bfloat16, float16 or float32"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
