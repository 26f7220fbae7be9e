"""Text to tokens, once, and the same batches for everyone ever after.

    files -> documents -> tokens -> <cache_dir>/stdlib-bytes-1a2b3c4d/{tokens.bin, meta.json}

    from data import prepare, get_batch, val_batch
    data = prepare("stdlib", block_size=64)     # no network: Python's own standard library, 12 MB of source
    idx, targets = get_batch(data.train, 64, 32, seed=0, step=7)    # (32, 64) int64 each, targets one ahead

A source is "stdlib", "shakespeare" (1.1 MB, one download), "c4" (English web pages, 319 MB a shard) or the
path of a file or a folder of them; a folder called stdlib is written ./stdlib. A .jsonl or .json file has a
document per line, {"text": "..."}; any other file is one document. Each may be gzipped (.gz). Tokenizers:
bytes (256 ids) and gpt2 (50257).

Split. The unit is a document; but of text files, if there are fewer than 100, a piece of about 4096
characters that ends with a line where it can. A unit whose sha256 falls into the lowest 5 % is validation.
So duplicates share a side, the order of the files does not matter, and one streaming pass is enough.
tokens.bin is training, then validation; where one side is shorter than a block, the cut between them moves
by just the tokens that are missing. A document ends with a newline (bytes) or <|endoftext|> (gpt2).

Reuse. Prepared data is taken again if its meta.json has the fingerprint wanted now (source, tokenizer,
format, and path, size and mtime of every file) and tokens.bin has its full length. Otherwise it is made
anew, in a temporary folder renamed at the end, by one process at a time.
"""
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import stat
import sysconfig
import threading
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

try:
    import fcntl
except ImportError:      # Windows
    fcntl = None

FORMAT = 3               # of the prepared folder; raise it whenever the same text would give other tokens
VAL_FRACTION = 0.05
FEW_DOCUMENTS = 100      # if there are fewer text files, the unit of the split is a piece of one
PIECE = (256, 4096)      # characters, least and most; in between 1 % of the text
RECORDS = re.compile(r"\.jsonl?(\.gz)?$")   # names of files with one document per line
TOKENIZERS = ("bytes", "gpt2")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/"


class DataError(ValueError):
    """What is wrong with the data and what to do about it, in one line."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


@dataclass
class Data:
    train: np.memmap                # (train_tokens,) read-only, uint8 or uint16
    val: np.memmap                  # (val_tokens,)
    vocab_size: int
    encoding: tiktoken.Encoding
    meta: dict                      # meta.json: what the tokens were made from, and how many there are


def prepare(source, tokenizer="bytes", cache_dir="data", block_size=64, progress=None, shards=1):
    """Data of `source`, each side at least block_size + 1 tokens long. Raises DataError if that cannot be
    had, for any reason. `progress(done_bytes, total_bytes)` is called about once per megabyte while something
    is downloaded or tokenised; the total is a guess where files are compressed. `shards`: how many of C4's
    1024 files to use, from the first on."""
    if block_size < 1:
        raise DataError(f"block_size must be at least 1, got {block_size}")
    source, cache, progress = str(source), Path(cache_dir), progress or (lambda done, total: None)
    encoding = get_encoding(tokenizer)
    try:
        root, files = find_source(source, cache, progress, shards)
        listing = [(path.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for path, s in files]
        identity = json.dumps([FORMAT, tokenizer, str(root.resolve()), listing])
        meta = {"source": source, "tokenizer": tokenizer, "format": FORMAT,
                "python_version": platform.python_version(),
                "fingerprint": hashlib.sha256(identity.encode()).hexdigest()}
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(source).name)[:40] or 'text'}-{tokenizer}"
        folder = cache / f"{stem}-{meta['fingerprint'][:8]}"
        ready = read_meta(folder, meta)
        if ready is None:
            with locked(cache / f".{stem}.lock"):
                for stale in cache.glob(f"{stem}-????????.tmp"):    # of a run that was killed
                    shutil.rmtree(stale)
                ready = read_meta(folder, meta) or build(folder, files, meta, encoding, block_size, progress)
        cut = find_cut(ready, block_size)
        tokens = np.memmap(folder / "tokens.bin", dtype=ready["dtype"], mode="r")
    except OSError as e:
        raise DataError(f"cannot prepare {source!r} in {cache}: {e}") from e
    meta = {**ready, "source": source, "train_tokens": cut, "val_tokens": len(tokens) - cut}
    return Data(tokens[:cut], tokens[cut:], encoding.n_vocab, encoding, meta)


@contextlib.contextmanager
def locked(path):
    """One process at a time, except on Windows and some network file systems, which have no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        with contextlib.suppress(AttributeError, OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(folder, files, meta, encoding, block_size, progress):
    """Tokenise files into folder/tokens.bin and meta.json, in one pass that holds one unit at a time."""
    files = [(path, s) for path, s in files if not is_binary(path)]
    # 2.4 is a guess, C4's ratio
    total = int(sum(s.st_size * (2.4 if path.suffix == ".gz" else 1) for path, s in files))
    few = sum(not RECORDS.search(path.name) for path, _ in files) < FEW_DOCUMENTS
    piece = min(max(total // 100, PIECE[0]), PIECE[1]) if few else -1       # -1 is the whole file
    dtype, content, n_documents, n_bytes = np.min_scalar_type(encoding.n_vocab - 1), hashlib.sha256(), 0, 0
    temp = folder.with_name(folder.name + ".tmp")
    try:
        temp.mkdir()
        with open(temp / "tokens.bin", "wb") as train, open(temp / "val.bin", "w+b") as val:
            for document in documents(files, piece):
                text = ""
                for text in document:
                    raw = text.encode(errors="surrogatepass")
                    content.update(raw)
                    hashed = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64     # in [0, 1)
                    side = val if hashed < VAL_FRACTION else train
                    side.write(np.array(encoding.encode_ordinary(text), dtype).tobytes())
                    n_bytes += len(raw)
                    if n_bytes >> 20 > n_bytes - len(raw) >> 20:
                        progress(n_bytes, total)
                if text:                               # what ends a document goes where its last unit went
                    n_documents += 1
                    newline = [10] * (not text.endswith("\n"))
                    end = [encoding.eot_token] if meta["tokenizer"] == "gpt2" else newline
                    side.write(np.array(end, dtype).tobytes())
            progress(n_bytes, total)
            n_train, n_val = (f.tell() // dtype.itemsize for f in (train, val))
            val.seek(0)
            shutil.copyfileobj(val, train)
        (temp / "val.bin").unlink()
        meta = {**meta, "sha256": content.hexdigest(), "documents": n_documents, "bytes": n_bytes,
                "dtype": dtype.name, "train_tokens": n_train, "val_tokens": n_val}
        find_cut(meta, block_size)                     # too short: say so before anything is kept
        (temp / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)      # if it is there, it is damaged
        os.replace(temp, folder)
        return meta
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def documents(files, piece):
    """Each document as an iterable of units: a record's text, or pieces of a text that end with a line."""
    for path, _ in files:
        yield from records(path) if RECORDS.search(path.name) else [pieces(path, piece)]


def pieces(path, piece):
    with open_text(path) as f:
        while text := f.read(piece) + f.readline(piece):
            yield text


def records(path):
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            try:
                if not line.isspace():
                    yield ["" + json.loads(line)["text"]]       # "" + raises a TypeError unless it is one
            except (ValueError, TypeError, KeyError, RecursionError):
                told = f'{path}, line {number} is no JSON object with a string called "text"'
                raise DataError(told) from None


@contextlib.contextmanager
def open_text(path):
    opener = gzip.open if path.suffix == ".gz" else open
    try:     # utf-8-sig: without the mark that Windows programs put in front
        with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path} is damaged or no gzip file: delete it or get it again ({e})") from e


def is_binary(path):
    with open_text(path) as f:
        return "\0" in f.read(8192)


def read_meta(folder, wanted):
    """meta.json of a folder prepared before, or None unless it is what is wanted, and whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / "meta.json").read_text())
        size = (meta["train_tokens"] + meta["val_tokens"]) * np.dtype(meta["dtype"]).itemsize
        if meta["fingerprint"] == wanted["fingerprint"] and os.path.getsize(folder / "tokens.bin") == size:
            return meta


def find_cut(meta, block_size):
    """Where validation begins in tokens.bin: after train_tokens, or where both sides have a block."""
    need, total = block_size + 1, meta["train_tokens"] + meta["val_tokens"]
    if not meta["documents"]:
        raise DataError(f"{meta['source']!r} holds no text")
    if total < 2 * need:
        raise DataError(f"{meta['source']!r} is too short: block_size {block_size} needs {need} tokens for "
                        f"training and {need} for validation, and there are {total} in all")
    return min(max(meta["train_tokens"], need), total - need)


def find_source(source, cache, progress, shards):
    """(root, [(path, its stat), ...]) of the files that make up a source, sorted by their path below root."""
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = ("site-packages", "dist-packages", "test", "tests", "idle_test")
        files = find_files(root, skip) if root.is_dir() else []
        files = [(path, s) for path, s in files if re.fullmatch(r"(?!test_).*(?<!_test)\.py", path.name)]
        if not files:
            raise DataError(f"no .py files of the Python standard library in {root}: use shakespeare or "
                            "the path of a text")
        return root, files
    if source == "c4":
        return cache / "c4", [(path, path.stat()) for path in fetch_c4(cache, shards, progress)]
    if source == "shakespeare":
        path = fetch(SHAKESPEARE_URL, cache / "shakespeare.txt", progress)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHAKESPEARE_SHA256:
            raise DataError(f"{path} has sha256 {found}, not {SHAKESPEARE_SHA256}: delete it and run again")
        return path, [(path, path.stat())]
    path = Path(source)
    if not source or not path.exists():
        raise DataError(f"no data called {source!r}: use stdlib, shakespeare, c4 or the path of a text "
                        "file or folder")
    if path.is_dir():
        return path, find_files(path)
    if not path.is_file() or is_binary(path):
        raise DataError(f"{source!r} is no text file" + " (NUL byte in its first 8 KB)" * path.is_file())
    return path, [(path, path.stat())]


def find_files(root, skip=()):
    """Regular files below root, but none that are hidden, were prepared here or are a run's. A broken link is
    an error."""
    def fail(e):
        raise e

    found = []
    for folder, dirs, names in os.walk(root, onerror=fail):
        dirs[:] = [d for d in dirs if not d.startswith(".") and d not in skip]
        if not {"tokens.bin", "checkpoint.pt"} & set(names):
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    return [(path, s) for path in found for s in [path.stat()] if stat.S_ISREG(s.st_mode)]


def fetch_c4(cache, shards, progress):
    """The paths of C4's first shards."""
    if not 1 <= shards <= 1024:
        raise DataError(f"c4 has 1 to 1024 shards, not {shards}")
    names = [f"c4-train.{i:05}-of-01024.json.gz" for i in range(shards)]
    return [fetch(C4_URL + name, cache / "c4" / name, progress) for name in names]


def fetch(url, path, progress):
    """path, downloaded from url unless it is there: whole, or not at all."""
    if path.exists():
        return path
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():            # nor has another process made it while this one waited
                download(url, temp, progress)
                os.replace(temp, path)
            return path
    except (OSError, http.client.HTTPException) as e:
        temp.unlink(missing_ok=True)
        raise DataError(f"cannot fetch {url} ({e}): run again, or put it at {path.resolve()} by hand") from e


def download(url, path, progress):
    with urllib.request.urlopen(url, timeout=20) as response, open(path, "wb") as f:
        total = int(response.headers["Content-Length"] or 0)                # 0: the server does not say
        while block := response.read(1 << 20):
            f.write(block)
            progress(f.tell(), total)
        if total and f.tell() != total:
            raise OSError(f"{f.tell()} of {total} bytes came")


def get_encoding(name):
    if name == "bytes":   # the pattern only keeps tiktoken quick: short pieces, and no merges to look for
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={})
    if name != "gpt2":
        raise DataError(f"no tokenizer called {name!r}: use one of {', '.join(TOKENIZERS)}")
    result = ["no answer in 60 s"]

    def fetch():    # in a thread: tiktoken sets no timeout, and a silent firewall would keep it for minutes
        try:
            result[0] = tiktoken.get_encoding(name)
        except Exception as e:  # requests' errors, a wrong hash, a cache that cannot be written
            result[0] = type(e).__name__

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(60)
    if isinstance(result[0], str):
        raise DataError(f"cannot get the files of the gpt2 tokenizer ({result[0]}): set TIKTOKEN_CACHE_DIR "
                        "to a folder that a run with network has filled, or use the bytes tokenizer, which "
                        "needs none")
    return result[0]


def get_batch(tokens, block_size, batch_size, seed, step, stream=0):
    """A random batch: idx, targets, (batch_size, block_size) int64 each. Row i is a function of (seed,
    stream, step, i) alone: batch_size does not change it, and there is no state to save. Streams keep
    training (0) and fresh data for other uses (1, ...) apart."""
    windows = all_windows(tokens, block_size)
    offsets = np.random.default_rng([seed, stream, step]).integers(len(windows), size=batch_size)
    return split_windows(windows[offsets])


def val_batch(tokens, block_size, n_tokens):
    """About n_tokens (at least one window, at most all) in evenly spaced windows that share no target: idx,
    targets. The first begins where tokens begin and the last ends where they end; nothing is random."""
    windows = all_windows(tokens, block_size)
    count = min(max(n_tokens // block_size, 1), (len(tokens) - 1) // block_size)
    return split_windows(windows[np.arange(count) * (len(windows) - 1) // max(count - 1, 1)])


def all_windows(tokens, block_size):
    """Every window of a block and its last target, no copy: (len(tokens) - block_size, block_size + 1)."""
    if len(tokens) <= block_size:
        raise DataError(f"{len(tokens)} tokens are too few for one block of {block_size} and its target")
    return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)


def split_windows(rows):
    rows = torch.from_numpy(rows.astype(np.int64))                                      # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()                          # (B, T) each
