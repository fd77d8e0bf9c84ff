"""Fine-tunes quantized layers inside an ordinary optax step.

    python examples/use_in_training.py --steps 300

The three matrices of a small gated network are quantized in the metric of their own inputs, then the
codebooks, scales and offsets learn together to give the outputs of the original network. The packed
indices are not trained, so the layers keep their size.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

import vptq_jax as vq

WIDTH, INNER = 64, 128


class GatedNetwork(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, an ordinary module."""

    def __init__(self, rngs: nnx.Rngs):
        self.gate = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "T width"]) -> Float[Array, "T width"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the relative squared error of the outputs, on inputs not trained on, before and after training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--spec", default="v4-k256")
    options = parser.parse_args(arguments)

    keys = jax.random.split(jax.random.key(0), 2)
    train, test = jax.random.normal(keys[0], (4096, WIDTH)), jax.random.normal(keys[1], (1024, WIDTH))
    teacher = GatedNetwork(nnx.Rngs(0))
    hessians = vq.collect_hessians(teacher, [train], progress=False)
    student, _ = vq.quantize(teacher, options.spec, hessians, progress=False)
    student = vq.trainable(student)

    def loss(student: GatedNetwork, x: Array) -> Array:
        y = teacher(x)
        return jnp.mean((student(x) - y) ** 2) / jnp.mean(y**2)

    # VQParam: codebooks, scale and offset. Indices and permutation are variables of another kind.
    optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=vq.VQParam)

    @nnx.jit
    def step(student: GatedNetwork, optimizer: nnx.Optimizer, x: Array) -> Array:
        error, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, vq.VQParam))(student, x)
        optimizer.update(student, gradient)
        return error

    before = float(loss(student, test))
    for number in range(options.steps):
        error = step(student, optimizer, train)
        if number % 50 == 0:
            print(f"step {number:4d}: relative error {float(error):.4f}")
    after = float(loss(student, test))
    print(f"on new inputs: relative error {before:.4f} before, {after:.4f} after training")
    return before, after


if __name__ == "__main__":
    main()
