"""Text generation: a jitted prefill, then a decode loop over a cache that is updated in place.

Programs are compiled per power of two of the batch size and per bucket of prompt length and cache size, and once
for greedy decoding and once for sampling; never per batch size, prompt length, call or sampling value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vptq_jax.lm.cache import KVCache, cache_sizes
from vptq_jax.lm.chat import conversation_text
from vptq_jax.lm.decoder import Decoder, check_tokens
from vptq_jax.lm.diagnose import first_nonfinite
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.next_token import SamplingArrays, next_token
from vptq_jax.lm.prompt_cache import RING_SPARE, Call, PromptCache, Reading
from vptq_jax.lm.sampling import GREEDY, Sampling
from vptq_jax.lm.tokens import TextStream, encode
from vptq_jax.meshes import as_automatic
from vptq_jax.nn.inference import inference_form
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.structure import Structure
from vptq_jax.pallas import dispatch
from vptq_jax.programs import Programs
from vptq_jax.schema import is_integer, short

Prompt = str | Sequence[int]
FinishReason = Literal["stop", "length", "context"]

_SMALLEST_BUCKET = 32


class ContextFull(ValueError):
    """A prompt leaves no room for an answer in the model's context."""


_STREAM_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What a batch of prompts gave, and how fast.

    Attributes:
        texts: the continuation of each prompt; None when the model has no tokenizer.
        tokens: token ids of each continuation, without the stop token.
        prompt_tokens: length of each prompt.
        prompt_tokens_read: how many of those were read: all, or those that a prompt cache did not hold.
        finish_reasons: `stop` (a stop token came), `length` (max_new_tokens reached) or
            `context` (the model's context is full).
        prefill_seconds: reading the prompts and choosing the first token; a first call compiles here.
        decode_seconds: all tokens after the first, compilation excluded.
        decode_tokens: tokens chosen in that time, over all rows.
        implementation: which matmul ran, see `matmul_implementation`.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    prompt_tokens: list[int]
    prompt_tokens_read: list[int]
    finish_reasons: list[FinishReason]
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    implementation: str

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, over all rows; 0 when one token was all."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


def generate(
    model: LanguageModel | Decoder,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int | str] | None = None,
    prompt_cache: PromptCache | None = None,
    return_result: bool = False,
) -> str | list[str] | list[int] | list[list[int]] | GenerationResult:
    """Continues one prompt, or a batch of prompts of different lengths.

    Args:
        model: with a tokenizer for text. Where kernels run, its quantized layers are packed first unless `pack` did
            so: once, as long as the model and its arrays stay as they are.
        prompts: a text, a list of token ids, or a list of either.
        max_new_tokens: at least 1. Generation also ends where the model's context is full.
        sampling: how tokens are chosen; by default the most likely one each time. The same settings and prompts give
            the same tokens.
        stop_tokens: ids or tokens that end a row; None takes the model's own, `()` none.
        prompt_cache: what earlier calls have read of the same conversation, for one prompt; this call goes on from it
            and leaves its own there.
        return_result: return a `GenerationResult` instead.

    Returns:
        The continuation without its prompt and stop token (a list of them for a list of prompts):
        text, or token ids if the model has no tokenizer.

    Raises:
        ValueError: no prompt or an empty one, a prompt that fills the context, max_new_tokens
            below 1, a token id outside the vocabulary, text without a tokenizer, a prompt cache with several prompts,
            or logits that are not finite.
        RuntimeError: another call took the prompt cache over.

    Example:
        >>> from vptq_jax.lm.config import ModelConfig
        >>> from vptq_jax.lm.params import RandomSource
        >>> from vptq_jax.lm.registry import build
        >>> config = ModelConfig("llama", 32, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
        >>> model = build(config, RandomSource(jax.random.key(0)))
        >>> result = generate(model, [[1, 2, 3], [4]], max_new_tokens=5, return_result=True)
        >>> [len(tokens) for tokens in result.tokens], result.finish_reasons
        ([5, 5], ['length', 'length'])
    """
    lm, single = LanguageModel.of(model), _is_single(prompts)
    run = _Run.start(lm, [prompts] if single else prompts, max_new_tokens, sampling, stop_tokens, prompt_cache)
    # No step is taken here: this compiles the loop, so that the time below is that of decoding.
    run.decode(0)
    begin = time.perf_counter()
    run.decode(max_new_tokens)
    seconds = time.perf_counter() - begin
    if return_result:
        return run.result(seconds)
    outputs = run.texts() if lm.tokenizer is not None else run.tokens()
    return outputs[0] if single else outputs


def stream(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int | str] | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[str]:
    """Continues one prompt and yields its text in pieces as they are decoded.

    The pieces put together are the text that `generate` returns for the same arguments.
    Arguments and errors are those of `generate`; errors in them are raised by this call, before
    the iteration. The model needs a tokenizer.
    """
    lm = LanguageModel.of(model)
    if lm.tokenizer is None:
        raise ValueError("the model has no tokenizer, which streaming text needs; LanguageModel(module, tokenizer) has")
    if not _is_single(prompt):
        raise ValueError("stream continues one prompt; call generate for a batch")
    return _pieces(_Run.start(lm, [prompt], max_new_tokens, sampling, stop_tokens, prompt_cache))


def _pieces(run: _Run) -> Iterator[str]:
    text = TextStream(run.lm.tokenizer, run.prompts[0])
    while True:
        if piece := text.push(run.tokens()[0]):
            yield piece
        if run.finished:
            break
        run.decode(_STREAM_CHUNK)
    if rest := text.finish():
        yield rest


def chat_prompt(model: LanguageModel, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, ready for the model's answer.

    Args:
        model: a model whose tokenizer has a chat template.
        messages: `{"role": ..., "content": ...}` in order, or one user message.

    Raises:
        ValueError: no tokenizer, no chat template, messages of another form, or a template that refuses them, fails or
            takes more than a template may (`chat`).
    """
    tokenizer = LanguageModel.of(model).tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        missing = "tokenizer" if tokenizer is None else "chat template in its tokenizer"
        raise ValueError(f"the model has no {missing}, which chat needs; use generate with a plain prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages are {short(messages)}; expected a list of messages, or a text")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {index} is {short(message)}; expected an object with 'role' and 'content'")
    if not messages:
        raise ValueError("there are no messages; expected at least one")
    text = conversation_text(tokenizer, messages)
    # The template writes its own special tokens, the first one included.
    return encode(tokenizer, text, add_special_tokens=False)


def bucket(length: int) -> int:
    """The length that `length` is padded to: the next power of two, at least 32."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def cache_capacity(slots: int) -> int:
    """Slots of the cache for a need of `slots`: the next quarter of a power of two, so at most a fourth is spare."""
    quarter = max(_SMALLEST_BUCKET, bucket(slots) // 8)
    return -(-slots // quarter) * quarter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """What stays the same during one generation; all traced.

    `limit` is the most tokens each row may get (0: the row only fills the batch up), `stop` the stop tokens (filled up
    with -1).
    """

    limit: Int[Array, "B"]
    stop: Int[Array, "S"]
    sampling: SamplingArrays
    key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What a decode step changes.

    Attributes:
        cache: keys and values of all tokens but the last.
        token: the last token of each row.
        count: tokens chosen so far.
        output: the chosen tokens [B, capacity]; row b holds `length[b]` of them, stop tokens left out.
        done: rows that are complete; `stopped` those by a stop token; `failed` those by logits that are not finite.
        seen: tokens of the prompt and the continuation.
    """

    cache: KVCache
    token: Int[Array, "B"]
    count: Int[Array, ""]
    output: Int[Array, "B N"]
    length: Int[Array, "B"]
    done: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    failed: Bool[Array, "B"]
    seen: Bool[Array, "B V"]


@partial(jax.jit, static_argnames=("structure", "capacity", "spare", "greedy"))
def _prefill(
    structure: Structure,
    arrays: list[Array],
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    request: _Request,
    *,
    capacity: int,
    spare: int,
    greedy: bool,
) -> _State:
    model = structure.module(arrays)
    logits, cache = model.prefill(tokens, start, capacity=capacity, spare=spare)
    batch, length = tokens.shape
    rows = jnp.arange(batch)
    real = jnp.arange(length)[None, :] >= start[:, None]
    seen = jnp.zeros((batch, model.config.vocab_size), bool).at[rows[:, None], tokens].max(real)
    return _choose(_first_state(cache, seen, request, capacity), logits, request, greedy)


@partial(jax.jit, static_argnames=("structure", "capacity", "greedy"), donate_argnames="cache")
def _extend(
    structure: Structure,
    arrays: list[Array],
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    cache: KVCache,
    seen: Bool[Array, "1 V"],
    request: _Request,
    *,
    capacity: int,
    greedy: bool,
) -> _State:
    logits, cache = structure.module(arrays).extend(tokens, length, cache)
    return _choose(_first_state(cache, seen, request, capacity), logits, request, greedy)


def _first_state(cache: KVCache, seen: Bool[Array, "B V"], request: _Request, capacity: int) -> _State:
    """The prompts are read, nothing is chosen."""
    batch = seen.shape[0]
    none = jnp.zeros(batch, bool)
    return _State(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        count=jnp.int32(0),
        output=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        done=request.limit < 1,  # rows that fill the batch up
        stopped=none,
        failed=none,
        seen=seen,
    )


@partial(jax.jit, static_argnames=("structure", "greedy"), donate_argnames="state")
def _decode(
    structure: Structure,
    arrays: list[Array],
    state: _State,
    request: _Request,
    until: Int[Array, ""],
    *,
    greedy: bool,
) -> _State:
    model = structure.module(arrays)

    def going(state: _State) -> Bool[Array, ""]:
        return (state.count < until) & ~state.done.all() & ~state.failed.any()

    def step(state: _State) -> _State:
        logits, cache = model.step(state.token, state.cache)
        return _choose(dataclasses.replace(state, cache=cache), logits, request, greedy)

    return jax.lax.while_loop(going, step, state)


_programs = Programs(_prefill, _extend, _decode)


def _choose(state: _State, logits: Array, request: _Request, greedy: bool) -> _State:
    """Chooses the next token of every row and books it."""
    key = jax.random.fold_in(request.key, state.count)
    token = next_token(logits, state.seen, request.sampling, key, greedy=greedy)
    failed = state.failed | (~jnp.isfinite(logits).all(axis=-1) & ~state.done)
    stopped = state.stopped | ((token[:, None] == request.stop).any(axis=-1) & ~state.done)
    count = state.count + 1
    kept = ~(state.done | stopped | failed)
    return dataclasses.replace(
        state,
        token=token,
        count=count,
        output=jax.lax.dynamic_update_slice(state.output, token[:, None], (0, state.count)),
        length=state.length + kept,
        done=state.done | stopped | (count >= request.limit),
        stopped=stopped,
        failed=failed,
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )


class _Run:
    """One generation in progress: the host's side of `_prefill`, `_extend` and `_decode`."""

    def __init__(
        self,
        lm: LanguageModel,
        model: Decoder,
        prompts: list[list[int]],
        request: _Request,
        greedy: bool,
        prompt_cache: PromptCache | None,
    ):
        self.lm, self.model, self.prompts = lm, model, prompts  # the model is the one that runs, perhaps packed
        self.request, self.greedy = request, greedy
        arrays, self.structure = Structure.of(model)
        self.arrays = as_automatic(arrays)
        self.call = None if prompt_cache is None else Call(prompt_cache, self.structure, arrays)
        self.state: _State
        self.first, self.capacity = 0, 0  # first slot with a token, and slots, of the first row
        self.read = [len(row) for row in prompts]
        self.prefill_seconds = 0.0

    @classmethod
    def start(
        cls,
        lm: LanguageModel,
        prompts: Any,
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Sequence[int | str] | None,
        prompt_cache: PromptCache | None = None,
    ) -> _Run:
        """Checks everything, then reads the prompts and chooses the first tokens."""
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {short(max_new_tokens)}; expected a whole number of at least 1")
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling is {short(sampling)}; expected a Sampling, such as Sampling(temperature=0.7)")
        if not isinstance(prompt_cache, PromptCache | None):
            raise TypeError(f"prompt_cache is {short(prompt_cache)}; expected a PromptCache, or None")
        ids = _prompt_ids(lm, prompts)
        if prompt_cache is not None and len(ids) > 1:
            raise ValueError(f"a prompt cache is one conversation's, and there are {len(ids)} prompts; expected one")
        vocab_size, context = lm.config.vocab_size, lm.config.context_length
        stop = _stop_ids(lm, stop_tokens)
        limit = np.minimum(min(max_new_tokens, context), context - np.array([len(row) for row in ids]))
        _programs.make_room()
        begin = time.perf_counter()
        # Rows up to a power of two, so that few programs serve every batch size; those beyond hold one token.
        limit = np.pad(limit, (0, (1 << (len(ids) - 1).bit_length()) - len(ids)))
        padded_stop = np.full(-(-max(len(stop), 1) // 8) * 8, -1, np.int32)
        padded_stop[: len(stop)] = stop
        request = _Request(
            jnp.asarray(limit, jnp.int32),
            jnp.asarray(padded_stop),
            SamplingArrays.of(sampling, vocab_size),
            jax.random.key(sampling.seed),
        )
        run = cls(lm, inference_form(lm.module), ids, request, sampling.greedy, prompt_cache)
        run.read_prompts(limit)
        run.prefill_seconds = time.perf_counter() - begin
        return run

    def read_prompts(self, limit: np.ndarray) -> None:
        """Reads the prompts and chooses the first tokens; `limit` as in `_Request`."""
        with self._step() as reading:
            if reading is not None:
                reading = reading.toward(self.prompts[0], self.model.config)
            if reading is None:
                self._read_all(limit)
            else:
                self._read_rest(reading, int(limit[0]))
            self._check()

    def _read_all(self, limit: np.ndarray) -> None:
        width = bucket(max(map(len, self.prompts)))
        tokens = np.zeros((len(limit), width), np.int32)
        start = np.full(len(limit), width - 1, np.int32)
        for row, values in enumerate(self.prompts):
            start[row] = width - len(values)
            tokens[row, start[row] :] = values
        self.first, self.capacity = int(start[0]), cache_capacity(width + int(limit.max()))
        # Without a window nothing needs spare slots: the program is then the one of calls without a prompt cache.
        rings = self.call is not None and self.model.config.sliding_window is not None
        self.state = _prefill(
            self.structure,
            self.arrays,
            jnp.asarray(tokens),
            jnp.asarray(start),
            self.request,
            capacity=self.capacity,
            spare=RING_SPARE if rings else 0,
            greedy=self.greedy,
        )

    def _read_rest(self, reading: Reading, limit: int) -> None:
        """Reads what is not in the cache of the first part."""
        prompt, config = self.prompts[0], self.model.config
        new = prompt[len(reading.tokens) :]
        self.read = [len(new)]
        self.first, self.capacity, cache = reading.start, reading.capacity, reading.cache
        slots = self.first + len(prompt)
        if slots + limit > self.capacity:
            # The capacities of fresh prompts, so that few programs serve every length.
            self.capacity = cache_capacity(bucket(slots) + limit)
            cache = cache.grown(cache_sizes(config, self.capacity, RING_SPARE))
        tokens = np.full((1, bucket(len(new))), new[-1], np.int32)
        tokens[0, : len(new)] = new
        seen = np.zeros((1, config.vocab_size), bool)
        seen[0, prompt] = True
        self.state = _extend(
            self.structure,
            self.arrays,
            jnp.asarray(tokens),
            jnp.int32(len(new)),
            cache,
            jnp.asarray(seen),
            self.request,
            capacity=self.capacity,
            greedy=self.greedy,
        )

    def decode(self, steps: int) -> None:
        """Takes up to `steps` more steps, fewer when all rows are done."""
        until = self.state.count + jnp.int32(min(steps, self.model.config.context_length))
        with self._step():
            self.state = _decode(self.structure, self.arrays, self.state, self.request, until, greedy=self.greedy)
            self._check()

    def _step(self) -> contextlib.AbstractContextManager[Reading | None]:
        """Surrounds all that makes a new state, for the prompt cache to follow."""
        return contextlib.nullcontext() if self.call is None else self.call.step(self._reading)

    def _reading(self) -> Reading:
        """What was read and chosen; the last token of all is not in the cache yet."""
        chosen = np.asarray(self.state.output)[0, : int(self.state.count) - 1].tolist()
        return Reading([*self.prompts[0], *chosen], self.state.cache, self.first, self.capacity)

    def _check(self) -> None:
        failed = np.flatnonzero(self.state.failed)
        if not failed.size:
            return
        row = int(failed[0])
        tokens = [*self.prompts[row], *self.tokens()[row]]
        cause = first_nonfinite(self.model, jnp.asarray([tokens])) or "the decode step"
        raise ValueError(
            f"the logits after token {len(tokens)} of prompt {row} are not finite; "
            f"the first place with NaN or infinity is {cause}"
        )

    @property
    def finished(self) -> bool:
        """Whether every row is done."""
        return bool(self.state.done.all())

    def tokens(self) -> list[list[int]]:
        """Token ids of every row so far."""
        output, lengths = np.asarray(self.state.output), np.asarray(self.state.length)
        return [output[row, : lengths[row]].tolist() for row in range(len(self.prompts))]

    def texts(self) -> list[str]:
        """Text of every row so far."""
        texts = []
        for prompt, tokens in zip(self.prompts, self.tokens(), strict=True):
            text = TextStream(self.lm.tokenizer, prompt)
            texts.append(text.push(tokens) + text.finish())
        return texts

    def result(self, decode_seconds: float) -> GenerationResult:
        """Everything about the run."""
        rows = len(self.prompts)
        lengths, stopped = np.asarray(self.state.length)[:rows], np.asarray(self.state.stopped)[:rows]
        rooms = [self.model.config.context_length - len(prompt) for prompt in self.prompts]
        chosen = lengths + stopped
        return GenerationResult(
            texts=None if self.lm.tokenizer is None else self.texts(),
            tokens=self.tokens(),
            prompt_tokens=[len(prompt) for prompt in self.prompts],
            prompt_tokens_read=self.read,
            finish_reasons=[
                "stop" if end else "context" if length == room else "length"
                for end, length, room in zip(stopped, lengths, rooms, strict=True)
            ],
            prefill_seconds=self.prefill_seconds,
            decode_seconds=decode_seconds,
            decode_tokens=int((chosen - 1).sum()),
            implementation=matmul_implementation(self.model),
        )


def matmul_implementation(model: Decoder) -> str:
    """Which products the decoder's linear layers run: `dense`, `xla`, `mosaic`, or several joined by `+`."""
    kernels = dispatch.why_no_mosaic(dispatch.devices_of(model.norm.weight.get_value())) is None

    def name(layer: Linear | VQLinear) -> str:
        if isinstance(layer, Linear):
            return "dense"
        return "mosaic" if kernels and layer.order is not None else "xla"

    return "+".join(sorted({name(layer) for layer in model.linears().values()}))


def _is_single(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray | jax.Array):
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ValueError(f"the prompt is {short(prompts)}; expected a text, a list of token ids, or a list of either")
    return len(prompts) > 0 and all(_is_token(item) for item in prompts)


def _is_token(value: Any) -> bool:
    """Whether a value is one token id: a whole number of Python, NumPy or JAX."""
    if isinstance(value, jax.Array):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    return is_integer(value) or isinstance(value, np.integer)


def _prompt_ids(lm: LanguageModel, prompts: Any) -> list[list[int]]:
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim not in (1, 2):
        raise ValueError(f"the prompts are an array of shape {prompts.shape}; expected [tokens] or [batch, tokens]")
    if len(prompts) == 0:
        raise ValueError("there is no prompt; expected at least one")
    context = lm.config.context_length
    ids = []
    for row, prompt in enumerate(prompts):
        tokens = encode(lm.tokenizer, prompt) if isinstance(prompt, str) else _token_list(prompt, row)
        if not tokens:
            raise ValueError(f"prompt {row} is empty; expected at least one token")
        check_tokens(np.array([tokens]), lm.config.vocab_size, f"prompt {row}")
        if len(tokens) >= context:
            raise ContextFull(
                f"prompt {row} has {len(tokens)} tokens and the model's context holds {context}, which leaves no room "
                f"for an answer; shorten the prompt to at most {context - 1} tokens"
            )
        ids.append(tokens)
    return ids


def _token_list(prompt: Any, row: int) -> list[int]:
    try:
        ids = np.asarray(prompt)
    except (ValueError, OverflowError):
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"prompt {row} is {short(prompt)}; expected a text or a list of token ids")
    return ids.tolist()


def _stop_ids(lm: LanguageModel, stop_tokens: Any) -> list[int]:
    """Ids of the stop tokens; by default those of the config, the generation config and the tokenizer."""
    vocab_size = lm.config.vocab_size
    if stop_tokens is None:
        own = (lm.generation_config or {}).get("eos_token_id")
        ids = [*lm.config.eos_token_id, *(own if isinstance(own, list) else [own])]
        ids.append(getattr(lm.tokenizer, "eos_token_id", None))
        return sorted({token for token in ids if is_integer(token) and 0 <= token < vocab_size})
    if isinstance(stop_tokens, str | bytes | bytearray) or not isinstance(stop_tokens, Iterable):
        raise ValueError(f"stop_tokens is {short(stop_tokens)}; expected a list of tokens")
    found = []
    for token in stop_tokens:
        if isinstance(token, str):
            pieces = encode(lm.tokenizer, token, add_special_tokens=False, what="a stop token")
            if len(pieces) != 1:
                raise ValueError(f"stop token {short(token)} is not one token of the tokenizer; give its token id")
            found.append(pieces[0])
        elif is_integer(token) or isinstance(token, np.integer):
            if not 0 <= token < vocab_size:
                raise ValueError(f"stop token {short(token)} is outside the vocabulary; expected 0 to {vocab_size - 1}")
            found.append(int(token))
        else:
            raise ValueError(f"stop token {short(token)} is neither a token id nor a text")
    return found
