"""Fine-tunes quantized layers inside an ordinary optax step.

    python examples/use_in_training.py --steps 300

The three matrices of a small gated network are quantized one by one, then the codebooks, scales and
offsets learn together to give the outputs of the original network. The packed indices are not
trained, so the layers keep their size.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.quantization.search import quantize_weight

WIDTH, INNER = 64, 128


class GatedNetwork(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, from dense or quantized layers."""

    def __init__(self, gate: Linear | VQLinear, up: Linear | VQLinear, down: Linear | VQLinear):
        self.gate, self.up, self.down = gate, up, down

    def inner(self, x: Float[Array, "T width"]) -> Float[Array, "T inner"]:
        """What `down` reads."""
        return jax.nn.silu(self.gate(x)) * self.up(x)

    def __call__(self, x: Float[Array, "T width"]) -> Float[Array, "T width"]:
        return self.down(self.inner(x))


def quantized(network: GatedNetwork, x: Float[Array, "T width"], spec: str) -> GatedNetwork:
    """The network with each matrix quantized in the metric of its own inputs."""
    inputs = {"gate": x, "up": x, "down": network.inner(x)}
    layers = {}
    for seed, (name, values) in enumerate(inputs.items()):
        hessian = values.T @ values / len(values)
        weight, _ = quantize_weight(getattr(network, name).weight[...], hessian, spec, key=jax.random.key(seed))
        layers[name] = VQLinear(weight)
    return GatedNetwork(**layers)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the relative squared error of the outputs, on inputs not trained on, before and after training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--spec", default="v4-k256")
    options = parser.parse_args(arguments)

    keys = jax.random.split(jax.random.key(0), 5)
    teacher = GatedNetwork(
        gate=Linear(jax.random.normal(keys[0], (INNER, WIDTH)) / WIDTH**0.5),
        up=Linear(jax.random.normal(keys[1], (INNER, WIDTH)) / WIDTH**0.5),
        down=Linear(jax.random.normal(keys[2], (WIDTH, INNER)) / INNER**0.5),
    )
    train, test = jax.random.normal(keys[3], (4096, WIDTH)), jax.random.normal(keys[4], (1024, WIDTH))
    student = quantized(teacher, train, options.spec)

    def loss(student: GatedNetwork, x: Array) -> Array:
        y = teacher(x)
        return jnp.mean((student(x) - y) ** 2) / jnp.mean(y**2)

    # nnx.Param: codebooks, scale, offset and bias. Indices and permutation are variables of another kind.
    optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(student: GatedNetwork, optimizer: nnx.Optimizer, x: Array) -> Array:
        error, gradient = nnx.value_and_grad(loss)(student, x)
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
