"""Embeddings and indices in files that are damaged or lie, and answers beside those of a search written out plainly."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

from hostile.case import FINE, REFUSED, Case, Fault, contents, no_temporaries, refused, unchanged
from hostile.values import TEXT, WHOLE, damage_file
from hostile.world import KINDS

_INDEX_START = struct.Struct("<8sIQQQ")  # what an index begins with: magic, version, and three lengths


def case(case: Case) -> str:
    """A damaged file, a file that lies, or vectors that are hard to rank."""
    kinds = (
        _damaged_embeddings,
        _damaged_embeddings,
        _lying_embeddings,
        _damaged_index,
        _lying_index,
        _ranks,
        _metrics,
    )
    return case.chance.choice(kinds)(case)


def _damaged_embeddings(case: Case) -> str:
    """Bytes of a file of embeddings or of what lies beside it."""
    name = case.chance.choice(
        ("x.safetensors", "x.safetensors", "x.npy", "x.npy", "x.json", "x.csv", "bare.npy", "x.parquet")
    )
    vectors = case.copy("vectors")
    main = vectors / (name if name.endswith((".npy", ".safetensors", ".parquet")) else "x.npy")
    command = _a_command(case, vectors, main)
    right = case.command(*command)
    _forget(case, vectors)
    case.tell(damage_file(case.chance, vectors / name))
    before = contents(vectors)
    ran = case.command(*command)
    no_temporaries(case.folder)
    if ran.status:
        unchanged(before, contents(vectors))
        return REFUSED
    if name == "bare.npy":
        return _as_numpy_reads(main)
    if name != "x.csv" and _answer(ran.out) != _answer(right.out):  # a .csv is text, which a user may edit
        raise Fault("wrong", "a damaged file gave another answer")
    return FINE


def _a_command(case: Case, vectors: Path, main: Path) -> list[str]:
    queries, index = str(vectors / "q.safetensors"), str(vectors / "flat.index")
    return case.chance.choice(
        (
            ["eval", "--embeddings", str(main)],
            ["eval", "--embeddings", queries, "--gallery", str(main)],
            ["index", "build", str(main), "--out", str(case.folder / "new.index")],
            ["search", index, str(main), "--json", "--k", "3"],
            ["index", "add", index, str(main), "--allow_duplicates"],
        )
    )


def _forget(case: Case, vectors: Path) -> None:
    """Undo what a command wrote."""
    (case.folder / "new.index").unlink(missing_ok=True)
    for path in vectors.glob("*.eval.json"):
        path.unlink()
    (vectors / "flat.index").write_bytes((case.world / "vectors" / "flat.index").read_bytes())


def _answer(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if not line.startswith("written"))


def _as_numpy_reads(path: Path) -> str:
    """A bare array carries no checksum, so its values may be others; but it must be an array for numpy too."""
    import numpy as np

    try:
        values = np.load(path, allow_pickle=False)
    except Exception as error:
        raise Fault("wrong", f"numpy cannot read what was taken: {error}") from None
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise Fault("wrong", f"{values.dtype} values that are not all finite were taken")
    return FINE


def _lying_embeddings(case: Case) -> str:
    """A file whose form is right and whose contents do not fit each other."""
    vectors = case.copy("vectors")
    if case.chance.random() < 0.6:
        main = vectors / "x.safetensors"
        data = main.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        if case.chance.random() < 0.6:
            about = json.loads(header["__metadata__"]["gcahng"])
            case.tell(f"{main.name} says {lie(case.chance, about)}")
            header["__metadata__"]["gcahng"] = json.dumps(about)
        else:
            case.tell(f"{main.name}'s header says {lie(case.chance, header)}")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        main.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif case.chance.random() < 0.5:
        main = vectors / "x.npy"
        about = json.loads((vectors / "x.json").read_text())
        case.tell(f"x.json says {lie(case.chance, about)}")
        (vectors / "x.json").write_text(json.dumps(about))
    else:
        main = vectors / "bare.npy"
        _npy_header(case, main)
    ran = case.command(*_a_command(case, vectors, main))
    no_temporaries(case.folder)
    return ran.verdict


def _npy_header(case: Case, path: Path) -> None:
    """Give the array another header; the bytes of its values stay."""
    chance = case.chance
    rows = path.read_bytes()[128:]
    shape = chance.choice(
        (
            "(300, 16)",
            "(10**12, 16)",
            "(1000000000000, 16)",
            "(-1, 16)",
            "(300,)",
            "()",
            "(0, 16)",
            "(300, 0)",
            "(300, 4, 4)",
        )
    )
    kind = chance.choice(("<f4", ">f4", "<f8", "<f2", "|O", "<i4", "<c8", "<U4", "f4", "[('a', '<f4')]", "V4", ""))
    text = f"{{'descr': {kind!r}, 'fortran_order': {chance.choice(('True', 'False', '3'))}, 'shape': {shape}, }}"
    if chance.random() < 0.2:
        text = chance.choice(("", "{", "[]", "{'a': 1}", "(" * 200, "__import__('os').getpid()"))
    case.tell(f"bare.npy with the header {text}")
    version = chance.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text) + 1)
    path.write_bytes(b"\x93NUMPY" + version + length + text.encode() + b"\n" + rows)


def lie(chance: random.Random, value: Any) -> str:
    """Change something in nested JSON, and say what."""
    places: list[tuple[str, Any, Any]] = []

    def walk(node: Any, path: str) -> None:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in list(keys)[:40]:
            places.append((f"{path}/{key}", node, key))
            walk(node[key], f"{path}/{key}")

    walk(value, "")
    path, parent, key = chance.choice(places)
    kind = chance.choice(("drop", "other", "other", "other", "longer", "shorter"))
    old = parent[key]
    if kind == "drop":
        del parent[key]
        return f"nothing for {path}"
    if kind == "longer" and isinstance(old, list):
        parent[key] = [*old, *old[:1]]
        return f"one more of {path}"
    if kind == "shorter" and isinstance(old, list):
        parent[key] = old[:-1]
        return f"one less of {path}"
    finite = (
        None,
        True,
        [],
        {},
        [1, 2],
        {"a": 1},
        *WHOLE,
        *(text for text in TEXT if "\udcff" not in text),
        0.5,
        -1e300,
    )
    parent[key] = chance.choice(finite)
    return f"{path} = {str(parent[key])[:40]!r}"


def _damaged_index(case: Case) -> str:
    """Bytes of an index. Every byte is checked, so that a damaged one is refused."""
    kind = case.chance.choice(KINDS)
    vectors = case.copy("vectors")
    index, queries = vectors / f"{kind}.index", vectors / "q.safetensors"
    command = case.chance.choice(
        (
            ["search", index, queries, "--json"],
            ["index", "info", index],
            ["index", "add", index, queries, "--allow_duplicates"],
        )
    )
    case.tell(damage_file(case.chance, index))
    before = contents(vectors)
    ran = case.command(*command)
    no_temporaries(case.folder)
    if ran.status == 0:
        raise Fault("wrong", "a damaged index was taken")
    unchanged(before, contents(vectors))
    return REFUSED


def _lying_index(case: Case) -> str:
    """An index whose checksum is right and whose header is not."""
    vectors = case.copy("vectors")
    index = vectors / f"{case.chance.choice(KINDS)}.index"
    data = index.read_bytes()
    magic, version, header_size, names_size, payload_size = _INDEX_START.unpack_from(data)
    start = _INDEX_START.size
    header = json.loads(data[start : start + header_size])
    body = data[start + header_size : -32]
    case.tell(f"{index.name} says {lie(case.chance, header)}")
    text = json.dumps(header).encode()
    text += b" " * (-(start + len(text) + len(body) - payload_size) % 64)
    lengths = _INDEX_START.pack(magic, version, len(text), names_size, payload_size)
    index.write_bytes(lengths + text + body + hashlib.sha256(text + body + lengths).digest())
    queries = vectors / "q.safetensors"
    commands = (["search", index, queries, "--json"], ["index", "info", index], ["index", "add", index, queries])
    ran = case.command(*case.chance.choice(commands))
    no_temporaries(case.folder)
    return ran.verdict


# -- answers


def _hard_vectors(case: Case) -> Any:
    """Vectors with copies, nearly equal rows, great and small norms; now and then some that must be refused."""
    import torch

    chance = case.chance
    rows, dim = chance.choice((1, 2, 3, 10, 60, 200)), chance.choice((1, 2, 3, 8, 17))
    values = torch.randn(rows, dim)
    kinds = []
    for _ in range(chance.choice((0, 1, 2))):
        kind = chance.choice(
            ("copies", "constant", "zero", "huge", "tiny", "nan", "mixed", "near", "few values", "negative")
        )
        some = torch.rand(rows) < chance.choice((0.1, 0.5, 0.9))
        kinds.append(kind)
        if kind == "copies":
            values[some] = values[0].clone()
        elif kind == "constant":
            values[some] = 1.0
        elif kind == "zero":
            values[some] = 0.0
        elif kind == "huge":
            values *= 1e18
        elif kind == "tiny":
            values *= 1e-18
        elif kind == "nan":
            values[some] = chance.choice((float("nan"), float("inf")))
        elif kind == "mixed":
            values *= 10.0 ** torch.randint(-8, 8, (rows, 1))
        elif kind == "near":
            values[some] = values[0] * (1 + 1e-7 * torch.randn(int(some.sum()), 1))
        elif kind == "few values":
            values = values.sign()
        elif kind == "negative":
            values[some] = -values[0].clone()
    case.tell(f"{rows} x {dim} vectors, {', '.join(kinds) or 'plain'}")
    return values


def _ranks(case: Case) -> str:
    """`nearest` and the indices beside distances in float64."""
    import torch

    from gcahng.retrieval import build_index, nearest

    chance = case.chance
    values = _hard_vectors(case)
    queries = (
        values[torch.randint(len(values), (chance.choice((1, 5)),))]
        if chance.random() < 0.5
        else torch.randn(3, values.shape[1])
    )
    k = chance.choice((1, 1, 2, 5, len(values), len(values) + 1, 0, 10**6))
    kind = chance.choice(("nearest", "torch", "faiss", "ivf_flat", "hnsw"))
    metric = chance.choice(("cosine", "euclidean"))
    found: list[Any] = []

    def search() -> None:
        for most in sorted({k, min(2 * k, len(values))}):  # fewer neighbors are the first of more
            if kind == "nearest":
                found.append(nearest(queries, most, gallery_embeddings=values, normalize=metric == "cosine"))
            else:
                name, backend = ("flat", kind) if kind in ("torch", "faiss") else (kind, "auto")
                index = build_index(values, name, metric=metric, backend=backend)
                found.append(index.search(queries, most).indices)

    case.tell(f"{kind}, {metric}, k = {k}")
    if refused(search):
        plain = bool(values.isfinite().all()) and float(values.double().norm(dim=1).min()) > 1e-12
        if kind == "nearest" and plain and 1 <= k <= len(values):
            raise Fault("wrong", "vectors that can be ranked were refused")
        return REFUSED
    indices = found[0]
    if kind not in ("ivf_flat", "hnsw") and not torch.equal(found[-1][:, : indices.shape[1]], indices):
        raise Fault("wrong", f"{k} neighbors are not the first of {found[-1].shape[1]}")
    if indices.shape != (len(queries), min(k, len(values))):
        raise Fault("wrong", f"indices of shape {tuple(indices.shape)}")
    if not values.isfinite().all():
        raise Fault("wrong", "vectors that are not finite were taken")
    for row in indices.tolist():
        own = [i for i in row if i >= 0]
        if len(set(own)) != len(own) or (len(own) < len(row) and kind not in ("ivf_flat", "hnsw")):
            raise Fault("wrong", f"rows twice or missing: {row[:10]}")
    if kind in ("nearest", "torch", "faiss"):
        _same_distances(queries.double(), values.double(), indices, metric, exact=kind == "nearest")
    return FINE


def _same_distances(queries: Any, values: Any, indices: Any, metric: str, exact: bool) -> None:
    """Found rows must be as near as the nearest ones, up to the rounding of float32 where it may round."""
    import torch

    if metric == "cosine":
        queries, values = (v / v.norm(dim=1, keepdim=True) for v in (queries, values))
    distances = ((queries[:, None] - values[None]) ** 2).sum(dim=2)
    wanted = distances.sort(dim=1).values[:, : indices.shape[1]]
    given = distances.gather(1, indices)
    scale = distances.amax() + (values**2).sum(dim=1).amax() + (queries**2).sum(dim=1).amax()
    slack = (1e-12 if exact else 1e-5) * scale
    if not torch.all((wanted - given).abs() <= slack):
        raise Fault("wrong", f"distances off by {float((wanted - given).abs().max() / scale):.1e} of the largest")


def _metrics(case: Case) -> str:
    """`retrieval_metrics` and `clustering_metrics` with labels of every kind, beside a plain loop."""
    import torch

    from gcahng.retrieval import clustering_metrics, retrieval_metrics

    chance = case.chance
    values = _hard_vectors(case)
    n = len(values)
    pool = chance.choice(([0, 1], [0, 1, 2, 3], [-1, 0, 1], [10**12, 0], [2**63 - 1, 5, 7], [-(2**63), 1], [3]))
    labels = torch.tensor([chance.choice(pool) for _ in range(n)])
    if chance.random() < 0.1:
        labels = chance.choice((labels.float(), labels[:-1], labels[None], labels.bool()))
    recall_at = chance.choice(((1, 2), (1,), (10**6,), (0,), (-1,), (), (1, 1), (2.5,), ("1",)))
    case.tell(f"labels from {pool} {tuple(labels.shape)}, recall_at={recall_at}")
    found: list[Any] = []
    if chance.random() < 0.25:
        if refused(lambda: found.append(clustering_metrics(values, labels))):
            return REFUSED
        if not -1e-6 <= found[0]["nmi"] <= 1 + 1e-6 or not -1 <= found[0]["ami"] <= 1 + 1e-6:
            raise Fault("wrong", f"{found[0]}")
        return FINE
    if refused(lambda: found.append(retrieval_metrics(values, labels, recall_at=recall_at, normalize=False))):
        return REFUSED
    got = found[0]
    named = [key for key in got if key.startswith("recall@")]
    distances = ((values.double()[:, None] - values.double()[None]) ** 2).sum(dim=2)
    hits: dict[str, list[int]] = {name: [] for name in named}
    for i in range(n):
        others = [j for j in range(n) if j != i]
        if labels[i] == -1 or not any(labels[j] == labels[i] for j in others):  # -1: without a label
            continue
        order = sorted(others, key=lambda j: (float(distances[i, j]), j))
        for name in named:
            hits[name].append(any(labels[j] == labels[i] for j in order[: int(name.split("@")[1])]))
    for name in named:
        if got["queries"] != len(hits[name]):
            raise Fault("wrong", f"{got['queries']} queries, by a plain loop {len(hits[name])}")
        if abs(got[name] - sum(hits[name]) / len(hits[name])) > 1e-9:
            raise Fault("wrong", f"{name} is {got[name]}, by a plain loop {sum(hits[name]) / len(hits[name])}")
    return FINE
