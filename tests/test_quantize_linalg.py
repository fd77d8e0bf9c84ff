"""The Hessian's side: factor, regularization, checks."""

import jax.numpy as jnp
import numpy as np
import pytest

from vptq_jax.quantization.linalg import check_hessian, inverse_factor, proxy_loss, regularize


def second_moment(size: int, tokens: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(tokens, size)) * np.exp(np.linspace(-2, 2, size))
    return x.T @ x / tokens


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
    H = second_moment(24, 100)
    U, extra = inverse_factor(jnp.asarray(H, jnp.float32))
    U = np.asarray(U, np.float64)
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(U.T @ U @ H, np.eye(24), atol=2e-3)
    expected = np.linalg.cholesky(np.linalg.inv(H)).T
    np.testing.assert_allclose(np.abs(U), np.abs(expected), rtol=1e-3, atol=1e-4)
    assert extra == 0


def test_a_singular_hessian_is_damped_as_little_as_needed_and_says_so():
    H = second_moment(32, 8)
    H[3] = H[2]
    H[:, 3] = H[:, 2]
    U, extra = inverse_factor(jnp.asarray(H, jnp.float32))
    assert np.isfinite(np.asarray(U)).all()
    assert 0 < extra <= 1e-3


def test_a_matrix_that_no_damping_can_save_gives_no_endless_loop():
    U, extra = inverse_factor(jnp.diag(jnp.array([1.0, 1.0, -100.0])))
    assert not np.isfinite(np.asarray(U)).all()
    assert extra == pytest.approx(10)


def test_dead_inputs_are_decoupled():
    H = second_moment(8, 50)
    H[2] = H[:, 2] = 0
    regular, dead = regularize(jnp.asarray(H, jnp.float32), 0.1)
    live = np.arange(8) != 2
    np.testing.assert_array_equal(np.asarray(dead), ~live)
    mean = np.diag(H)[live].mean()
    np.testing.assert_allclose(
        np.asarray(regular)[np.ix_(live, live)], H[np.ix_(live, live)] + 0.1 * mean * np.eye(7), rtol=1e-5
    )
    np.testing.assert_allclose(np.asarray(regular)[2], mean * np.eye(8)[2], rtol=1e-5)


def test_proxy_loss_is_the_trace():
    H = second_moment(6, 20)
    error = np.random.default_rng(1).normal(size=(5, 6))
    found = proxy_loss(jnp.asarray(error.T, jnp.float32), jnp.asarray(H, jnp.float32))
    assert float(found) == pytest.approx(np.trace(error @ H @ error.T), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda H: H[:5], r"the Hessian has shape \(5, 6\); expected \(6, 6\)"),
        (lambda H: H * np.nan, "NaN or infinite"),
        (lambda H: np.where(np.eye(6) > 0, np.inf, H), "NaN or infinite"),
        (lambda H: H * 0, "all zeros"),
        (lambda H: H + np.triu(np.ones((6, 6)), 1), "not symmetric"),
        (lambda H: -H, "diagonal goes down to -"),
    ],
)
def test_what_cannot_be_a_hessian_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        check_hessian(jnp.asarray(change(second_moment(6, 20)), jnp.float32), 6, "model.layers.3.mlp.up_proj")
    assert "model.layers.3.mlp.up_proj" in str(error.value)


def test_a_sound_hessian_passes():
    check_hessian(jnp.asarray(second_moment(6, 20), jnp.float32), 6, "weight")
