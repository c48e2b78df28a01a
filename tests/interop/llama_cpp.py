"""llama.cpp as a judge: logits of a GGUF file, by the library inside the package xllamacpp."""

import ctypes
from pathlib import Path

import numpy as np

_POINTER = ctypes.c_void_p


class _Params(ctypes.Structure):
    """Parameters that only llama.cpp looks into: passed by value, and no larger than this."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Llama:
    """A GGUF file opened by llama.cpp."""

    def __init__(self, path: Path, xllamacpp, context: int = 512):
        (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
        self.c = ctypes.CDLL(str(library))
        for name, result in {
            "llama_model_default_params": _Params,
            "llama_context_default_params": _Params,
            "llama_model_load_from_file": _POINTER,
            "llama_init_from_model": _POINTER,
            "llama_model_get_vocab": _POINTER,
            "llama_get_memory": _POINTER,
            "llama_batch_init": _Batch,
            "llama_get_logits_ith": ctypes.POINTER(ctypes.c_float),
        }.items():
            getattr(self.c, name).restype = result
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)(
            lambda level, text, data: None
        )
        self.c.llama_log_set(self._quiet, None)
        self.c.llama_backend_init()
        params = self.c.llama_model_default_params()
        self.model = self.c.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        params = self.c.llama_context_default_params()
        for i in range(3):  # n_ctx, n_batch, n_ubatch
            params.words[i] = context
        self.context = self.c.llama_init_from_model(_POINTER(self.model), params)
        self.vocab = _POINTER(self.c.llama_model_get_vocab(_POINTER(self.model)))
        self.vocab_size = self.c.llama_vocab_n_tokens(self.vocab)
        self.c.llama_set_n_threads(_POINTER(self.context), 1, 1)

    def logits(self, tokens: list[int], after: int = 0) -> np.ndarray:
        """Returns [T, V], for tokens that follow `after` others, which came in calls before."""
        if after == 0:
            memory = self.c.llama_get_memory(_POINTER(self.context))
            self.c.llama_memory_clear(_POINTER(memory), True)
        batch = self.c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, after + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert self.c.llama_decode(_POINTER(self.context), batch) == 0
        rows = [
            np.ctypeslib.as_array(
                self.c.llama_get_logits_ith(_POINTER(self.context), i), (self.vocab_size,)
            ).copy()
            for i in range(len(tokens))
        ]
        self.c.llama_batch_free(batch)
        return np.stack(rows)

    def continued(self, tokens: list[int], count: int) -> list[int]:
        """Returns the likeliest tokens to follow, one after the other."""
        out = [int(np.argmax(self.logits(tokens)[-1]))]
        while len(out) < count:
            after = len(tokens) + len(out) - 1
            out.append(int(np.argmax(self.logits(out[-1:], after)[-1])))
        return out

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()
        n = self.c.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)
        return list(out[:n])

    def close(self) -> None:
        self.c.llama_free(_POINTER(self.context))
        self.c.llama_model_free(_POINTER(self.model))
