"""Reads the files of runtimes that only infer: GGUF (llama.cpp) and model.bin (CTranslate2), as plain state dicts.

    GGUF          tensors in blocks of few bits, dequantised to fp32 by the package gguf; its tokenizer too
    model.bin     version u32, spec str, revision u32, count u32, then for each tensor
                  name str, rank u8, dims u32, type u8, bytes u32, values; then aliases: count u32, (alias, name) str
                  all little endian; a str is its length u16, with the zero at its end, and its bytes

Names stay the runtime's. The format of model.bin was worked out from files of version 6. torch is imported by the
functions that make tensors, so that importing this file stays quick.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmoe.errors import CorruptFile, MissingExtra, Refused

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 6  # of model.bin
_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # of model.bin, by number
_SPECIAL, _WORDS = 3, {"smollm": True, "gpt-2": False, "gpt2": False}  # tokenizers of GGUF, and if they split digits


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Tensors of a GGUF file in fp32, with the names of llama.cpp.

    Raises:
        MissingExtra: the package gguf is not installed.
    """
    import numpy as np
    import torch

    gguf = _gguf(path)
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: torch.from_numpy(np.array(gguf.dequantize(one.data, one.tensor_type))) for one in tensors}


def gguf_tokenizer(path: Path) -> str:
    """The tokenizer of a GGUF file as the text of a tokenizer.json.

    Raises:
        MissingExtra: the package gguf is not installed. Refused: the tokenizer is of another kind than byte pairs.
        CorruptFile: the file has none, or is damaged.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    gguf, asked = _gguf(path), f"cannot read the tokenizer of '{path}'"
    try:
        fields = gguf.GGUFReader(path).fields
        kind, split, words, types, merges = (
            fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre", "tokens", "token_type", "merges")
        )
    except KeyError as error:
        raise CorruptFile(asked, f"it has no {error}", "tokenizer='PATH/tokenizer.json'") from error
    except Exception as error:  # a damaged file can raise anything
        raise CorruptFile(asked, str(error), f"delete it and get it again: rm '{path}'") from error
    if kind != "gpt2" or split not in _WORDS:
        wrong = f"it is of the kind {kind!r} with words {split!r}; known are gpt2 with {', '.join(_WORDS)}"
        raise Refused(asked, wrong, "tokenizer='PATH/tokenizer.json'")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    found = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] * _WORDS[split]
    found.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    found.decoder = decoders.ByteLevel()
    special = [word for word, type_ in zip(words, types, strict=True) if type_ == _SPECIAL]
    found.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return json.dumps(json.loads(found.to_str()), ensure_ascii=False)


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        asked, wrong = f"cannot read '{path}'", f"the package {error.name} is not installed; it reads GGUF files"
        raise MissingExtra(asked, wrong, "pip install 'mmoe[pretrained]'") from error
    return gguf


def is_ctranslate2(path: Path) -> bool:
    """Whether a file is the model.bin of CTranslate2."""
    if path.suffix != ".bin":
        return False
    with path.open("rb") as file:
        start = file.read(64)
    _, _, rest = start.partition(b"Spec\0")
    return start[1:4] == b"\0\0\0" and bool(rest) and int.from_bytes(start[4:6], "little") == len(start) - len(rest) - 6


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Tensors of CTranslate2's model.bin, with its names ("encoder/conv1/weight"), aliases included.

    Raises:
        Refused: it is of another version, or its weights are of whole numbers. ValueError: it is damaged.
    """
    import torch

    asked, fix = f"cannot read '{path}'", "ct2-transformers-converter --quantization float16, with a release of today"
    found: dict[str, Tensor] = {}
    with path.open("rb") as file:
        (version,) = _numbers(file, "I")
        if version != _VERSION:
            raise Refused(asked, f"it is of version {version} of the format; read is {_VERSION}", fix)
        _text(file), _numbers(file, "I")  # what it is, and the revision of that
        for _ in range(*_numbers(file, "I")):
            name, (rank,) = _text(file), _numbers(file, "B")
            shape = _numbers(file, f"{rank}I")
            kind, size = _numbers(file, "BI")
            if kind >= len(_TYPES):
                raise ValueError(f"{name} is of the unknown type {kind}")
            values = torch.frombuffer(bytearray(_bytes(file, size)), dtype=getattr(torch, _TYPES[kind]))
            if rank > 1 and not values.is_floating_point():
                raise Refused(asked, f"{name} is quantised to {_TYPES[kind]}", fix)
            found[name] = values.reshape(shape)
        aliases = {_text(file): _text(file) for _ in range(*_numbers(file, "I"))}
    return found | {alias: found[name] for alias, name in aliases.items()}


def _bytes(file: IO[bytes], size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise ValueError(f"it ends {size - len(found):,} bytes too early")
    return found


def _numbers(file: IO[bytes], form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", _bytes(file, struct.calcsize(f"<{form}")))


def _text(file: IO[bytes]) -> str:
    return _bytes(file, *_numbers(file, "H")).rstrip(b"\0").decode()
