"""A teacher's likeliest tokens on disk: safetensors shards, found by the tokens of a piece."""

import hashlib
import os
from pathlib import Path

import torch
from bitnet_arch import UserError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wrinklefree.files import writing

SHARD_TOKENS = 1 << 16
"""Positions in a shard."""
KEY_BYTES = 16


def piece_key(piece: Tensor) -> bytes:
    """Return what a piece is found by: a digest of its tokens, which are in main memory."""
    return hashlib.blake2b(piece.to(torch.int64).contiguous().numpy().tobytes(), digest_size=KEY_BYTES).digest()


class DiskCache:
    """Answers of one teacher at one temperature, k tokens each.

    A shard `ID.safetensors` holds `keys` uint8 `[P, 16]`, `starts` int64 `[P + 1]`, `tokens` int32 `[N, k]` and
    `log_probabilities` float32 `[N, k]`: what was put in comes out bit for bit. Shards are written whole, and named after what
    they hold, so that several processes may share a folder.
    """

    def __init__(self, directory: Path, top_k: int, vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> None:
        """Open a folder, made if it is not there.

        Args:
            directory: of this teacher and temperature.
            top_k: tokens of an answer.
            vocabulary: V; no token of an answer is above V - 1.
            shard_tokens: positions after which a shard is written.

        Raises:
            UserError: if the folder cannot be written or a shard is damaged, of another k or of another vocabulary.
        """
        self.directory, self.top_k, self.vocabulary, self.shard_tokens = directory, top_k, vocabulary, shard_tokens
        with writing(directory, "teacher.cache_dir"):
            directory.mkdir(parents=True, exist_ok=True)
        self._where: dict[bytes, tuple[Path, int, int]] = {}
        self._open: dict[Path, dict[str, Tensor]] = {}
        self._new: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._held = 0
        for path in sorted(directory.glob("*.safetensors")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._where) + len(self._new)

    def get(self, piece: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the log-probabilities and tokens of a piece, `[n, k]` each, or None."""
        key = piece_key(piece)
        if key in self._new:
            return self._new[key]
        if key not in self._where:
            return None
        path, start, end = self._where[key]
        shard = self._open[path]
        return shard["log_probabilities"][start:end], shard["tokens"][start:end].to(torch.int64)

    def put(self, piece: Tensor, log_probabilities: Tensor, tokens: Tensor) -> None:
        """Keep an answer, float32 and int64 `[n, k]`; a full shard is written."""
        key = piece_key(piece)
        if key in self._new or key in self._where:
            return
        self._new[key] = (log_probabilities.to(torch.float32), tokens.to(torch.int64))
        self._held += len(piece)
        if self._held >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is kept in memory alone.

        Raises:
            UserError: if the disk is full.
        """
        if not self._new:
            return
        values, tokens = zip(*self._new.values(), strict=True)
        sizes = torch.tensor([0, *(len(value) for value in values)])
        keys = torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, KEY_BYTES)
        shard = {
            "keys": keys,
            "starts": sizes.cumsum(0),
            "tokens": torch.cat(tokens).to(torch.int32),
            "log_probabilities": torch.cat(values),
        }
        name = hashlib.blake2b(b"".join(self._new), digest_size=KEY_BYTES).hexdigest()
        path, temporary = self.directory / f"{name}.safetensors", self.directory / f".{name}.{os.getpid()}.partial"
        with writing(path, "teacher.cache_dir"):
            try:
                temporary.write_bytes(save(shard))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        self._new, self._held = {}, 0
        self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                shard = {name: file.get_tensor(name) for name in ("keys", "starts", "tokens", "log_probabilities")}
            whole = shard["starts"][-1] == len(shard["tokens"]) == len(shard["log_probabilities"])
            whole = bool(whole) and len(shard["keys"]) + 1 == len(shard["starts"]) and shard["tokens"].shape[1] == self.top_k
        except (OSError, SafetensorError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} of the teacher's cache is damaged ({reason}): delete it, and it is made anew") from None
        if not whole:
            raise UserError(f"{path} of the teacher's cache is damaged or of another top_k: delete it, and it is made anew")
        tokens = shard["tokens"]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise UserError(
                f"{path} of the teacher's cache names token {wrong}, and the vocabulary has {self.vocabulary}: it is damaged or of "
                "another model, so delete it, and it is made anew"
            )
        self._open[path] = shard
        starts = shard["starts"].tolist()
        for i, key in enumerate(shard["keys"].numpy()):
            self._where[key.tobytes()] = (path, starts[i], starts[i + 1])
