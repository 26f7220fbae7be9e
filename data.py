"""Text to tokens, once, and the same batches for everyone ever after.

    files -> documents -> tokens -> <cache_dir>/stdlib-bytes-1a2b3c4d/{tokens.bin, meta.json}

    from data import prepare, get_batch, val_batch
    data = prepare("stdlib", block_size=64)     # no network: Python's own standard library, 12 MB of source
    inputs, targets = get_batch(data.train, 64, 32, seed=0, step=7)    # (32, 64) int64 each

A source is "stdlib", "shakespeare" (1.1 MB, one download), "c4" (English web pages, 319 MB a shard) or the
path of a file or a folder of them; a folder called stdlib is written ./stdlib. A .jsonl or .json file has a
document per line, {"text": "..."}; any other file is one document. Each may be compressed (.gz, .xz, .bz2).
Text is UTF-8, or UTF-16 or UTF-32 with its byte-order mark. Tokenizers: bytes (256 ids) and gpt2 (50257).

Left out. Files that are not text (archives, tables, pictures, ...), links to folders, and files with bytes
that are not valid text are counted and named, with the reason, in meta["left_out"]; what is hidden, and what
a run or `prepare` wrote (two such files or more in a folder), is not read and not counted. If no text is
left, that is a DataError with the same words.

Split. The unit is a document. Where there are fewer than 100 text files, the unit is 1 % of the text, but 256
to 4096 characters, up to the end of a line where it is near. A unit whose sha256 falls into the lowest 5 % is
validation. So duplicates share a side, the order of files does not matter, and one streaming pass is enough.
tokens.bin is training, then validation; where one side is shorter than a block, the cut between them moves
by just the tokens that are missing. A document ends with a newline (bytes) or <|endoftext|> (gpt2).

Reuse. Prepared data is taken again if its meta.json has the fingerprint wanted now (source, tokenizer,
format, and path, size and mtime of every file) and tokens.bin has its full length. Otherwise it is made
anew, in a temporary folder renamed at the end, by one process at a time.
"""

import codecs
import contextlib
import hashlib
import http.client
import importlib
import io
import json
import os
import platform
import re
import shutil
import sysconfig
import urllib.request
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

DATA_FORMAT = 4  # of the prepared folder; raise it whenever the same files would give other data
VAL_FRACTION = 0.05
FEW_DOCUMENTS = 100  # if there are fewer text files, the unit of the split is a part of one
PART = (256, 4096)  # characters, least and most; in between 1 % of the text
COMPRESSED = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}  # and the module of Python's that reads it
RECORDS = (".jsonl", ".json")  # have one document per line
UNREADABLE = {  # what is not text, by the end of its name, in words that follow a count
    ".zst .zstd": "packed by zstd (unpack first: zstd -d)",
    ".zip .7z .rar .tar .tgz .tbz .tbz2 .txz .lz4 .lzma .lz .z .br": "packed (unpack first)",
    ".parquet .arrow .feather .orc .avro": "with tables (convert to .jsonl first, with pandas or datasets)",
    ".pdf .doc .docx .odt .rtf .epub": "with layout (convert to .txt first, with pdftotext or pandoc)",
    ".npy .npz .pt .pth .pkl .safetensors .h5": "with numbers, not text",
}
# What `prepare` and a run write, two files or more in a folder.
OWN = "tokens.bin val.bin meta.json log.jsonl checkpoint.pt checkpoint.previous.pt checkpoint.tmp".split()
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
TOKENIZERS = ("bytes", "gpt2")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
C4_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/"


class DataError(ValueError):
    """What is wrong with the data, and what to do about it."""


@dataclass
class Data:
    train: np.memmap  # (train_tokens,) read-only, uint8 or uint16
    val: np.memmap  # (val_tokens,)
    vocab_size: int
    encoding: tiktoken.Encoding
    meta: dict  # meta.json: what the tokens were made from, and how many there are


def prepare(source, tokenizer="bytes", cache_dir="data", block_size=64, progress=None, shards=1):
    """Data of `source`, each side at least block_size + 1 tokens long. Raises DataError if that cannot be
    had, for any reason. `progress(done_bytes, total_bytes)` is called about once per megabyte while something
    is downloaded or tokenised; the total is a guess where files are compressed. `shards`: how many of C4's
    1024 files to use, from the first on."""
    source, cache, progress = str(source), Path(cache_dir), progress or (lambda done, total: None)
    encoding = get_encoding(tokenizer)
    try:
        root, files = find_source(source, cache, progress, shards)
        listing = [
            (str(path.relative_to(root)), s.st_size, s.st_mtime_ns)
            for path in files
            for s in [path.stat(follow_symlinks=path.exists())]  # a link may lead nowhere
        ]
        identity = json.dumps([DATA_FORMAT, tokenizer, str(root.resolve()), listing])
        meta = {
            "source": source,
            "tokenizer": tokenizer,
            "format": DATA_FORMAT,
            "python_version": platform.python_version(),
            "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        }
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(source).name)[:40] or 'text'}-{tokenizer}"
        folder = cache / f"{stem}-{meta['fingerprint'][:8]}"
        ready = read_meta(folder, meta)
        if ready is None:
            with locked(cache / f".{stem}.lock"):
                for stale in cache.glob(f"{stem}-????????.tmp"):  # of a run that was killed
                    shutil.rmtree(stale)
                ready = read_meta(folder, meta) or build(
                    folder, root, files, meta, encoding, block_size, progress
                )
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
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(folder, root, files, meta, encoding, block_size, progress):
    """Tokenise files into folder/tokens.bin and meta.json, in one pass that holds one unit at a time."""
    left_out = defaultdict(list)
    for path in files:
        left_out[why_unreadable(path)].append(path)
    files = left_out.pop("", [])  # for no reason: they are read
    # 2.4 is a guess, C4's ratio
    sizes = (path.stat().st_size * (2.4 if path.suffix.lower() in COMPRESSED else 1) for path in files)
    total = int(sum(sizes))
    few = sum(kind_of(path) not in RECORDS for path in files) < FEW_DOCUMENTS
    length = min(max(total // 100, PART[0]), PART[1]) if few else -1  # -1 is the whole file
    dtype, content, n_documents, n_bytes = np.min_scalar_type(encoding.n_vocab - 1), hashlib.sha256(), 0, 0
    temp = folder.with_name(folder.name + ".tmp")
    try:
        temp.mkdir()
        with open(temp / "tokens.bin", "wb") as train, open(temp / "val.bin", "w+b") as val:
            for document in documents(files, length, left_out):
                text = ""
                for text in document:
                    raw = text.encode(errors="surrogatepass")
                    content.update(raw)
                    hashed = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64  # in [0, 1)
                    side = val if hashed < VAL_FRACTION else train
                    side.write(np.array(encoding.encode_ordinary(text), dtype).tobytes())
                    n_bytes += len(raw)
                    if n_bytes % 2**20 < len(raw):  # a megabyte is full
                        progress(n_bytes, total)
                if text:  # what ends a document goes where its last unit went
                    n_documents += 1
                    newline = [10] * (not text.endswith("\n"))
                    end = [encoding.eot_token] if meta["tokenizer"] == "gpt2" else newline
                    side.write(np.array(end, dtype).tobytes())
            progress(n_bytes, total)
            n_train, n_val = (f.tell() // dtype.itemsize for f in (train, val))
            val.seek(0)
            shutil.copyfileobj(val, train)
        (temp / "val.bin").unlink()
        meta = {
            **meta,
            "sha256": content.hexdigest(),
            "documents": n_documents,
            "bytes": n_bytes,
            "dtype": dtype.name,
            "train_tokens": n_train,
            "val_tokens": n_val,
            "left_out": in_words(root, left_out),
        }
        find_cut(meta, block_size)  # too short: say so before anything is kept
        (temp / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # if it is there, it is damaged
        os.replace(temp, folder)
        return meta
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def documents(files, length, left_out):
    """Each document as an iterable of units: a record's text, or about `length` characters of a text, up to
    the end of a line where it is near."""
    for path in files:
        replace_bytes.count = 0
        yield from records(path) if kind_of(path) in RECORDS else [lines_of(path, length)]
        if replace_bytes.count:
            left_out["in part, with U+FFFD for invalid bytes (convert text first, with iconv)"].append(path)


def lines_of(path, length):
    with open_text(path) as f:
        while text := f.read(length) + f.readline(length):
            yield text


def records(path):
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            try:
                if not line.isspace():
                    yield ["" + json.loads(line)["text"]]  # "" + raises a TypeError unless it is one
            except (ValueError, TypeError, KeyError, RecursionError):
                raise DataError(
                    f'{path}, line {number} is no JSON object with a string called "text"'
                ) from None


@contextlib.contextmanager
def open_text(path):
    """A file as text; unpacked, if its name ends as a compressed file's does."""
    module = io
    try:
        module = importlib.import_module(COMPRESSED.get(path.suffix.lower(), "io"))
        with module.open(path, "rb") as raw:
            mark = raw.read(4)
            raw.seek(0)
            # utf-8-sig: without the mark that Windows programs put in front
            encoding = BYTE_ORDER_MARKS.get(mark) or BYTE_ORDER_MARKS.get(mark[:2], "utf-8-sig")
            with io.TextIOWrapper(raw, encoding, "replace and count", newline="") as f:
                yield f
    except (ImportError, OSError, EOFError, getattr(module, "LZMAError", zlib.error)) as e:
        raise DataError(
            f"{path} cannot be read ({e}): if it is damaged, get it again; or unpack it, or make it readable"
        ) from e


def replace_bytes(error):
    """As errors="replace", and counted: what is read for bytes that are not valid, and where to go on."""
    replace_bytes.count += 1
    return "\ufffd", error.end


replace_bytes.count = 0
codecs.register_error("replace and count", replace_bytes)


def kind_of(path):
    """The end of a file's name, in lower case, with no regard to compression: .txt for A.TXT.gz."""
    return Path(re.sub(r"\.(gz|xz|bz2)$", "", path.name.lower())).suffix


def why_unreadable(path):
    """Why a path cannot be read as text and what to do about it, to follow a count; "" if it can."""
    if not path.is_file():
        return "that lead nowhere or to a folder, or are a pipe or a device"
    for kinds, why in UNREADABLE.items():
        if kind_of(path) in kinds.split():
            return why
    with open_text(path) as f:
        head = f.read(8192)
    if "\0" in head or head.count("\ufffd") > len(head) / 10:  # French in Latin-1: 1/25
        return "binary or not UTF-8, with NUL or invalid bytes (convert text first, with iconv)"
    return ""


def in_words(root, left_out):
    """How many files are left out for each reason, and the first of them by name, in one line; "" if none."""
    parts = []
    for why, paths in left_out.items():
        names = [f"{path.relative_to(root).as_posix()!r}" for path in paths[:3]]
        parts.append(f"{len(paths)} {why}: {', '.join(names)}{', ...' if len(paths) > 3 else ''}")
    return "; ".join(parts)


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
    note = meta["left_out"] and f"; left out: {meta['left_out']}"
    if not meta["documents"]:
        raise DataError(
            f"{meta['source']!r} holds no text (besides hidden files, and those of runs and of "
            f"prepared data){note}"
        )
    if total < 2 * need:
        raise DataError(
            f"{meta['source']!r} is too short: block_size {block_size} needs {need} tokens for "
            f"training and {need} for validation, and there are {total} in all{note}"
        )
    return min(max(meta["train_tokens"], need), total - need)


def find_source(source, cache, progress, shards):
    """(root, files) of a source, sorted by their path below root."""
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = "site-packages dist-packages test tests idle_test".split()
        files = find_files(root, skip) if root.is_dir() else []
        files = [path for path in files if re.fullmatch(r"(?!test_).*(?<!_test)\.py", path.name)]
        if not files:
            raise DataError(
                f"no .py files of the Python standard library in {root}: use shakespeare or "
                "the path of a text"
            )
        return root, files
    if source == "c4":
        return cache, fetch_c4(cache, shards, progress)
    if source == "shakespeare":
        path = fetch(SHAKESPEARE_URL, cache / "shakespeare.txt", progress)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHAKESPEARE_SHA256:
            raise DataError(f"{path} has sha256 {found}, not {SHAKESPEARE_SHA256}: delete it and run again")
        return cache, [path]
    path = Path(source)
    if source and path.is_dir():
        return path, find_files(path)
    if path.is_file():
        return path.parent, [path]
    raise DataError(
        f"no data called {source!r}: use stdlib, shakespeare, c4 or the path of a text file or folder"
    )


def find_files(root, skip=()):
    """What lies below root, sorted: files and, told apart later, what cannot be read. But nothing hidden, and
    no files that a run or `prepare` wrote. A folder that cannot be read is an error."""

    def fail(e):
        raise e

    found = []
    for folder, dirs, names in os.walk(root, onerror=fail):
        if len(set(names).intersection(OWN)) > 1:  # one may be anybody's
            names = set(names).difference(OWN)
        dirs[:] = [d for d in dirs if not d.startswith(".") and d not in skip]
        links = [d for d in dirs if Path(folder, d).is_symlink()]  # os.walk does not go into them
        found += [Path(folder, name) for name in [*names, *links] if not name.startswith(".")]
    return sorted(found, key=Path.as_posix)


def fetch_c4(cache, shards, progress):
    """The paths of C4's first shards."""
    names = [f"c4-train.{i:05}-of-01024.json.gz" for i in range(shards)]
    return [fetch(C4_URL + name, cache / "c4" / name, progress) for name in names]


def fetch(url, path, progress):
    """path, downloaded from url unless it is there: whole, or not at all."""
    if path.exists():
        return path
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # nor has another process made it while this one waited
                download(url, temp, progress)
                os.replace(temp, path)
            return path
    except (OSError, http.client.HTTPException) as e:
        temp.unlink(missing_ok=True)
        raise DataError(f"cannot fetch {url} ({e}): run again, or put it at {path.resolve()} by hand") from e


def download(url, path, progress):
    with urllib.request.urlopen(url, timeout=20) as response, open(path, "wb") as f:
        total = int(response.headers["Content-Length"] or 0)  # 0: the server does not say
        while block := response.read(1 << 20):
            f.write(block)
            progress(f.tell(), total)
        if total and f.tell() != total:
            raise OSError(f"{f.tell()} of {total} bytes came")


def get_encoding(name):
    if name == "bytes":  # the pattern only keeps tiktoken quick: short pieces, and no merges to look for
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens={})
    if name != "gpt2":
        raise DataError(f"no tokenizer called {name!r}: use one of {', '.join(TOKENIZERS)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # requests' errors, a wrong hash, a cache that cannot be written
        raise DataError(
            f"cannot get the files of the gpt2 tokenizer ({type(e).__name__}): set TIKTOKEN_CACHE_DIR "
            "to a folder that a run with network has filled, or use the bytes tokenizer, which "
            "needs none"
        ) from e


def get_batch(tokens, block_size, batch_size, seed, step, stream=0):
    """A random batch: inputs and, one token ahead, targets, (batch_size, block_size) int64 each. Row i is a
    function of (seed, stream, step, i) alone: batch_size does not change it, and there is no state to save.
    Streams keep the data of training (0) and of other uses (1, ...) apart."""
    windows = all_windows(tokens, block_size)
    offsets = np.random.default_rng([seed, stream, step]).integers(len(windows), size=batch_size)
    return split_windows(windows[offsets])


def val_batch(tokens, block_size, n_tokens):
    """Inputs and targets, about n_tokens of each (at least a window, at most all), in evenly spaced windows
    that share no target. The first begins where tokens begin, the last ends where they end."""
    windows = all_windows(tokens, block_size)
    count = min(max(n_tokens // block_size, 1), (len(tokens) - 1) // block_size)
    return split_windows(windows[np.arange(count) * (len(windows) - 1) // max(count - 1, 1)])


def all_windows(tokens, block_size):
    """Every window of a block and its last target, no copy: (len(tokens) - block_size, block_size + 1)."""
    if len(tokens) <= block_size:
        raise DataError(f"{len(tokens)} tokens are too few for one block of {block_size} and its target")
    return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)


def split_windows(rows):
    rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (B, T) each
