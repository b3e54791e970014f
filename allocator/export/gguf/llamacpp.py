"""Stock llama.cpp as a runtime: logits, greedy text, its tokenizer, its buffers; through ctypes.

In: a GGUF file. Out: what llama.cpp computes from it. The library is the one inside the `xllamacpp`
wheel; nothing of torch is imported. Its parameter structs change between builds: they are taken by
value from the library's own `*_default_params()`, and a build whose defaults do not lie where we
know them is refused before a field is set.

A damaged file is refused with llama.cpp's own reason (`VerifyError`); but some inconsistencies (a
wrong tensor shape in a graph, a failed assertion of ggml) make the library abort the whole process.
Judge a file from an unknown source in a process of its own.
"""

import ctypes
import os
import platform
from collections import deque
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from allocator.codecs import ggml
from allocator.errors import VerifyError
from allocator.files.progress import waiting
from allocator.targets.gguf.memory import kv_parts

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_F32, _F16 = 0, 1  # ggml_type
_GGML_TYPES = {"f16": _F16, "q4_0": 2, "q8_0": 8}
_NO_VOCAB = 0  # LLAMA_VOCAB_TYPE_NONE
_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_errors: deque[str] = deque(maxlen=8)
_sizes: deque[str] = deque(maxlen=64)


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("opaque", c_int8 * 72),
        ("vocab_only_check_tensors", c_bool * 2),
        ("use_extra_bufts", c_bool),
        ("no_host_no_alloc_load_mtp", c_bool * 3),
        ("rest", c_int8 * 1024),
    )

    def has_known_layout(self) -> bool:
        """Says whether these defaults lie where known builds of llama.cpp have them."""
        before, after = self.vocab_only_check_tensors, self.no_host_no_alloc_load_mtp
        return [*before, self.use_extra_bufts, *after] == [False] * 2 + [True] + [False] * 3


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("states_and_outputs", c_uint32 * 3),
        ("threads", c_int32 * 2),
        ("context_type", c_int32),
        ("rope_pooling_attention_type", c_int32 * 3),
        ("flash_attn_type", c_int32),
        ("rope", c_float * 2),
        ("yarn", c_float * 4),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_threshold", c_float),
        ("evaluation_callback", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("opaque", c_int8 * 24),
        ("embeddings_offload_perf_ops", c_bool * 4),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("rest", c_int8 * 1024),
    )

    def has_known_layout(self) -> bool:
        """Says whether these defaults lie where known builds of llama.cpp have them."""
        return (
            list(self.threads) == [4, 4]
            and [*self.rope_pooling_attention_type, self.flash_attn_type] == [-1] * 4
            and [*self.yarn, self.defrag_threshold] == [-1.0] * 5
            and (self.type_k, self.type_v) == (_F16, _F16)
            and [*self.embeddings_offload_perf_ops] == [False, True, True, True]
            and (self.swa_full, self.kv_unified) == (True, False)
        )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class _Node(ctypes.Structure):  # of a std::map of libstdc++, with llama_memory_breakdown_data
    pass


_Node._fields_ = (
    ("color", c_int32),
    ("parent", POINTER(_Node)),
    ("left", POINTER(_Node)),
    ("right", POINTER(_Node)),
    ("buffer_type", c_void_p),
    ("model", c_size_t),
    ("context", c_size_t),
    ("compute", c_size_t),
)


class _Map(ctypes.Structure):
    _fields_ = (
        ("compare", c_void_p),
        ("color", c_void_p),
        ("root", POINTER(_Node)),
        ("ends", c_void_p * 2),
        ("count", c_size_t),
    )


_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"  # llama-ext.h; C++, so not stable


@dataclass(frozen=True, slots=True)
class Buffers:
    """What llama.cpp has allocated, in bytes.

    Attributes:
        weights: tensors as in the file.
        repacked: second copies of weights, in the order that this CPU computes fastest in.
        kv_cache: keys and values.
        compute: activations.
        log: its own lines, of which `output buffer size` (logits) has no exact counterpart.
    """

    weights: int
    repacked: int
    kv_cache: int
    compute: int
    log: tuple[str, ...]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_type": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_detokenize": (
        c_int32,
        (c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool),
    ),
}


def _keep_errors(level: int, text: bytes | None, _: Any) -> None:
    line = (text or b"").decode(errors="replace").strip()
    if level == _ERROR_LEVEL and line:
        _errors.append(line)
    elif "buffer size =" in line:
        _sizes.append(line)


_log_callback = _LogCallback(_keep_errors)  # alive as long as the library may call it


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Loads llama.cpp once, its functions typed, its log silenced.

    Raises:
        FormatError: if xllamacpp is not installed.
    """
    loaded = ggml.library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.llama_log_set(_log_callback, None)
    loaded.llama_backend_init()
    return loaded


def _check_layout(params: _ModelParams | _ContextParams) -> None:
    if not params.has_known_layout():
        raise VerifyError(
            f"llama.cpp: this build has other {type(params).__name__.strip('_')}; "
            "install the xllamacpp of constraints.txt"
        )


def _in_order(node: Any) -> Iterator[Any]:
    if node:
        yield from _in_order(node.contents.left)
        yield node.contents
        yield from _in_order(node.contents.right)


class LlamaCpp:
    """A model loaded in llama.cpp; a context manager, since it holds the model's memory.

    Args:
        path: the GGUF file.
        context: most tokens of a sequence.
        threads: threads to compute with.
        exact: keys and values in F32 and no flash attention, so that nothing but the file is
            judged; False takes llama.cpp's own defaults (F16, flash attention), whose rounding can
            turn an expert choice: mean KL 2e-4 on the reference model, against 3e-12.
        kv_format: how keys and values are stored, e.g. `f16` or `q8_0/q4_0`, with flash attention;
            None leaves it to `exact`.
        micro_batch: tokens computed at once; a whole context by default.
        sequences: that the cache has room for, each of `context` tokens.
        yarn_betas: YaRN's `beta_fast` and `beta_slow`, which some loaders do not read from the
            file; None leaves llama.cpp's own.
        repack: let llama.cpp keep a second copy of weights that its CPU can compute faster with
            (most of Q4_0, IQ4_NL and some others), as it does by default.

    Raises:
        FormatError: if xllamacpp is not installed.
        TargetError: if `kv_format` is unknown.
        VerifyError: if llama.cpp does not load the file; the message ends with its own reason.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 256,
        threads: int = 2,
        exact: bool = True,
        kv_format: str | None = None,
        micro_batch: int | None = None,
        sequences: int = 1,
        yarn_betas: tuple[float, float] | None = None,
        repack: bool = True,
    ) -> None:
        self._model = self._context = None
        self._lib = library()
        self.path = Path(path)
        params = self.context_params(context * sequences, exact=exact)
        params.n_seq_max = sequences
        if kv_format is not None:
            params.type_k, params.type_v = (_GGML_TYPES[name] for name in kv_parts(kv_format))
            params.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
        if micro_batch is not None:
            params.n_ubatch = micro_batch
        if yarn_betas is not None:
            params.yarn[2:] = yarn_betas  # after the factors of extrapolation and attention
        _errors.clear()
        _sizes.clear()
        with waiting("loading the file in llama.cpp"):
            self._model = self._lib.llama_model_load_from_file(
                os.fsencode(self.path), self.model_params(repack=repack)
            )
            if not self._model:
                raise self._failure("llama.cpp does not load it")
            self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise self._failure("llama.cpp makes no context for it")
        self._lib.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._log = tuple(_sizes)
        self.context = context
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def model_params(self, *, repack: bool) -> _ModelParams:
        """Returns what the file is loaded with; a subclass may load it otherwise."""
        params: _ModelParams = self._lib.llama_model_default_params()
        if not repack:
            _check_layout(params)
            params.use_extra_bufts = False
        return params

    def context_params(self, context: int, *, exact: bool) -> _ContextParams:
        """Returns what a context of `context` tokens is made with; a subclass may change it."""
        params: _ContextParams = self._lib.llama_context_default_params()
        _check_layout(params)
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.swa_full = False  # as llama-server and llama-cli have it
        if exact:
            params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = _F32
        return params

    def buffers(self) -> Buffers:
        """Returns what is allocated now; to the byte, from `llama_get_memory_breakdown`.

        Its `std::map` is read as libstdc++ lays it out (and its few nodes are not given back), so
        only on x86-64; the log has the same sizes in hundredths of a MiB.

        Raises:
            VerifyError: on another processor, or if this build has no such function.
        """
        function = getattr(self._lib, _BREAKDOWN, None)
        if function is None or platform.machine() not in ("x86_64", "AMD64"):
            raise VerifyError(
                f"llama.cpp: no sizes in bytes from this build on {platform.machine()}; install "
                "the xllamacpp of constraints.txt on x86-64"
            )
        function.restype, function.argtypes = None, (c_void_p, c_void_p)
        breakdown = _Map()
        function(ctypes.byref(breakdown), self._context)
        nodes = list(_in_order(breakdown.root))
        assert len(nodes) == breakdown.count
        repacked = [
            self._lib.ggml_backend_buft_name(n.buffer_type).endswith(b"_REPACK") for n in nodes
        ]
        return Buffers(
            weights=sum(n.model for n, copy in zip(nodes, repacked, strict=True) if not copy),
            repacked=sum(n.model for n, copy in zip(nodes, repacked, strict=True) if copy),
            kv_cache=sum(n.context for n in nodes),
            compute=sum(n.compute for n in nodes),
            log=self._log,
        )

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns logits after every token of one sequence, `(tokens, vocabulary)`.

        Raises:
            VerifyError: if the sequence does not fit the context or vocabulary, or fails.
        """
        self._clear()
        self.decode(ids, 0)
        rows = [self._row(i) for i in range(len(ids))]
        return np.stack(rows)

    def generate(self, prompt_ids: Sequence[int], n: int) -> list[int]:
        """Generates up to `n` tokens after a prompt, each the likeliest; stops at an end of text.

        Raises:
            VerifyError: if prompt and text do not fit the context or vocabulary, or a decode fails.
        """
        self._clear()
        generated: list[int] = []
        pending, at = list(prompt_ids), 0
        while len(generated) < n:
            self.decode(pending, at)
            token = int(self._row(len(pending) - 1).argmax())
            generated.append(token)
            at += len(pending)
            pending = [token]
            if self.ends_reply(token):
                break
        return generated

    def ends_reply(self, token: int) -> bool:
        """Returns whether llama.cpp stops generating at a token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, markup: bool = False) -> list[int]:
        """Returns the tokens of a text, bos and eos added if the file says so.

        Args:
            text: any.
            markup: whether control tokens that the text spells out count as such.

        Raises:
            VerifyError: if the file has no tokenizer.
        """
        self._check_tokenizer()
        data = text.encode()
        room = len(data) + 8
        ids = (c_int32 * room)()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, True, markup)
        if n < 0:
            raise self._failure("llama.cpp does not tokenize")
        return list(ids[:n])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens without special ones; what is no UTF-8 becomes `U+FFFD`.

        Raises:
            VerifyError: if the file has no tokenizer.
        """
        self._check_tokenizer()
        array = (c_int32 * len(ids))(*ids)
        room = 64 + 16 * len(ids)
        for _ in range(2):
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_detokenize(self._vocab, array, len(ids), text, room, True, False)
            if n >= 0:
                return text.raw[:n].decode(errors="replace")
            room = -n
        raise self._failure("llama.cpp does not detokenize")

    def _check_tokenizer(self) -> None:
        if self._lib.llama_vocab_type(self._vocab) == _NO_VOCAB:  # the library would abort
            raise VerifyError(
                f"{self.path}: has no tokenizer; put tokenizer.json into the checkpoint directory "
                "and write the file again"
            )

    def decode(self, ids: Sequence[int], start: int = 0) -> None:
        """Computes tokens from a position on; their logits stay in llama.cpp.

        Raises:
            VerifyError: if they do not fit the context or vocabulary, or llama.cpp fails.
        """
        n = len(ids)
        if not 0 < n <= self.context - start or not 0 <= min(ids) <= max(ids) < self.n_vocab:
            raise VerifyError(
                f"{self.path}: {n} tokens from position {start}, needed 1..{self.context - start} "
                f"of 0..{self.n_vocab - 1}; open it with a larger context"
            )
        zero = (c_int32 * 1)(0)
        batch = _Batch(
            n_tokens=n,
            token=(c_int32 * n)(*ids),
            embd=None,
            pos=(c_int32 * n)(*range(start, start + n)),
            n_seq_id=(c_int32 * n)(*[1] * n),
            seq_id=(POINTER(c_int32) * n)(*[ctypes.cast(zero, POINTER(c_int32))] * n),
            logits=(c_int8 * n)(*[1] * n),
        )
        _errors.clear()
        if status := self._lib.llama_decode(self._context, batch):
            raise self._failure(f"llama_decode returned {status}")

    def _row(self, index: int) -> npt.NDArray[np.float32]:
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise self._failure(f"no logits at position {index}")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _failure(self, what: str) -> VerifyError:
        reason = "; ".join(_errors) or "no reason given"
        return VerifyError(f"{self.path}: {what}: {reason}")

    def close(self) -> None:
        """Frees the model; further calls are errors of the caller."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
