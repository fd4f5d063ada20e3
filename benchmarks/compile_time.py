"""Measure what `adapt` costs in tracing, lowering and compiling, compared with LoRA written by hand in the model.

    python benchmarks/compile_time.py            # about 4 minutes on two CPU cores

The model is a Llama of 32 unrolled layers in plain JAX, with every projection adapted; the compiled function is the
adapter's gradient, once without and once with each layer under `jax.checkpoint`. All times are CPU seconds. At most 2
times the hand-written model's time to trace and lower, and 1.3 times its total time, are accepted. Measured with jax
0.10.2 on two cores of a server:

    remat=False  ratio: trace + lower 1.55, whole 1.10, FLOPs 0.981
    remat=True   ratio: trace + lower 1.32, whole 1.19, FLOPs 0.982
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

import lora_jax

WIDTH, HEADS, HIDDEN, VOCAB, RANK, LENGTH, BATCH = 64, 4, 160, 256, 4, 32, 2
SHAPES = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, WIDTH),
    "v_proj": (WIDTH, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}


def weights(key, layers):
    def layer(key):
        keys = jax.random.split(key, len(SHAPES))
        kernels = {
            name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5}
            for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
        }
        return {**kernels, "norm_1": jnp.ones(WIDTH), "norm_2": jnp.ones(WIDTH)}

    keys = jax.random.split(key, layers + 2)
    return {
        "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "layers": {str(i): layer(keys[i + 1]) for i in range(layers)},
        "head": {"kernel": jax.random.normal(keys[-1], (WIDTH, VOCAB)) / WIDTH**0.5},
    }


def plain(layer, name, x):
    return x @ layer[name]["kernel"]


def by_hand(layer, name, x):
    node = layer[name]["kernel_lora"]
    return x @ layer[name]["kernel"] + ((x @ node.a) @ node.b) * jax.lax.stop_gradient(node.scale)


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, positions):
    angles = positions[:, None] / 10_000 ** (jnp.arange(x.shape[-1] // 2) / (x.shape[-1] // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def block(dense, layer, x):
    batch, length, _ = x.shape
    h, positions = norm(x, layer["norm_1"]), jnp.arange(length)
    q, k, v = (dense(layer, name, h).reshape(batch, length, HEADS, -1) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = rotate(q, positions), rotate(k, positions)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(positions[:, None] >= positions, scores, -1e30)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(batch, length, -1)
    x = x + dense(layer, "o_proj", mixed)
    h = norm(x, layer["norm_2"])
    return x + dense(layer, "down_proj", jax.nn.silu(dense(layer, "gate_proj", h)) * dense(layer, "up_proj", h))


def llama(dense, remat, params, tokens):
    run = functools.partial(block, dense)
    run = jax.checkpoint(run) if remat else run
    x = params["embedding"][tokens]
    for layer in params["layers"].values():
        x = run(layer, x)
    return x @ params["head"]["kernel"]


def loss(apply, base, adapter, tokens):
    logits = apply(lora_jax.combine(base, adapter), tokens[:, :-1])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


def measure(apply, base, adapter, tokens):
    """CPU seconds to trace, to lower and to compile the loss and the adapter's gradient, and the compiled FLOPs."""
    jax.clear_caches()
    step = jax.jit(jax.value_and_grad(functools.partial(loss, apply), argnums=1))
    start = time.process_time()
    traced = step.trace(base, adapter, tokens)
    middle = time.process_time()
    lowered = traced.lower()
    end = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    return {
        "trace": middle - start,
        "lower": end - middle,
        "compile": done - end,
        "flops": compiled.cost_analysis()["flops"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="of each part, the fastest run counts")
    options = parser.parse_args()
    config = lora_jax.LoRAConfig(rank=RANK, alpha=8.0, targets=tuple(SHAPES))
    params = lora_jax.init(jax.random.key(1), weights(jax.random.key(0), options.layers), config)
    base, adapter = lora_jax.split(params)
    tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)
    for remat in (False, True):
        candidates = {
            "by hand": functools.partial(llama, by_hand, remat),
            "adapted": lora_jax.adapt(functools.partial(llama, plain, remat)),
        }
        runs = {name: [] for name in candidates}
        for _ in range(options.repeats):  # in turn, so that other work on the machine slows both alike
            for name, apply in candidates.items():
                runs[name].append(measure(apply, base, adapter, tokens))
        best = {name: {part: min(run[part] for run in of) for part in of[0]} for name, of in runs.items()}
        print(f"remat={remat}, {options.layers} layers")
        for name, run in best.items():
            print(f"  {name}: " + ", ".join(f"{part} {value:.4g}" for part, value in run.items()))
        front = [run["trace"] + run["lower"] for run in best.values()]
        whole = [run["trace"] + run["lower"] + run["compile"] for run in best.values()]
        flops = best["adapted"]["flops"] / best["by hand"]["flops"]
        print(f"  ratio: trace + lower {front[1] / front[0]:.2f}, whole {whole[1] / whole[0]:.2f}, FLOPs {flops:.4f}")


if __name__ == "__main__":
    main()
