"""YAML files of options: damaged, nested without end, of other types, and not files at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hostile.arguments import options_of
from hostile.case import FINE, Case, Fault
from hostile.guards import Enough, no_armies, stop_after_steps
from hostile.values import OTHER, REAL, TEXT, WHOLE, damage, hostile_path
from hostile.world import SMALL

_KEYS = (
    "steps",
    "epochs",
    "seed",
    "loss",
    "data",
    "gca",
    "backbone",
    "optimizer",
    "precision",
    "out",
    "no_such_key",
    "",
)


def case(case: Case) -> str:
    """`gcahng train --config` of one such file."""
    import yaml

    no_armies()
    stop_after_steps()
    root = case.copy("folder")
    values: dict[str, Any] = {
        **{name: dict(value) if isinstance(value, dict) else value for name, value in SMALL.items()},
        "out": "out",
    }
    values["data"]["root"] = str(root)
    path = case.folder / "options.yaml"
    kind = case.chance.choices(("values", "text", "bytes", "bomb", "path"), (8, 5, 3, 2, 2))[0]
    plain = None
    if kind == "path":
        path = hostile_path(case.chance, case.folder, ".yaml")
        case.tell(f"--config {path.name}")
    elif kind == "values":
        for _ in range(case.chance.choice((1, 1, 2))):
            case.tell(_change(case.chance, values))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        plain = values
    elif kind == "bytes":
        data, how = damage(case.chance, yaml.safe_dump(values, sort_keys=False).encode())
        path.write_bytes(data)
        case.tell(f"options.yaml with {how}")
    else:
        text = _bomb(case.chance) if kind == "bomb" else _text(case.chance, yaml.safe_dump(values, sort_keys=False))
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        case.tell(f"options.yaml is {text[:200]!r}")
    if kind not in ("path", "values") and path.exists():
        try:
            plain = yaml.safe_load(path.read_bytes()[: 1 << 16])
        except Exception:
            plain = None
    verdict = FINE
    try:
        verdict = case.command("train", "--config", path).verdict
    except Fault as fault:
        if not isinstance(fault.__cause__, Enough):
            raise
    if verdict == FINE:
        _same_options(case, plain)
        if plain is not None and kind in ("text", "bytes"):
            _each_once(yaml.compose(path.read_bytes()))
    return verdict


def _each_once(node: Any) -> None:
    """No option stands in the file twice, of which one would be lost."""
    if not isinstance(node.value, list):
        return
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [str(key.value) for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise Fault("wrong", f"{keys} were taken, of which one is there twice")
    for _, value in pairs:
        _each_once(value)


def _same_options(case: Case, plain: Any) -> None:
    """What ran is what the file says, by a plain reading of YAML."""
    import yaml

    written = case.folder / "out" / "config.yaml"
    if not isinstance(plain, dict) or not written.exists():
        return
    taken = yaml.safe_load(written.read_text(encoding="utf-8"))

    def compare(given: Any, own: Any, at: str) -> None:
        for name, value in given.items():
            if isinstance(value, dict) and isinstance(own.get(name), dict):
                compare(value, own[name], f"{at}{name}.")
            elif name not in own or (value is not None and not _alike(value, own[name])):
                raise Fault("wrong", f"{at}{name} is {value!r} in the file, and ran as {own.get(name)!r}")

    compare(
        {name: value for name, value in plain.items() if name not in ("out", "epochs", "steps", "eval_every")},
        taken,
        "",
    )


def _alike(given: Any, taken: Any) -> bool:
    if isinstance(given, bool) or isinstance(taken, bool):
        return given is taken or str(given).lower() == str(taken).lower()
    if isinstance(taken, (int, float)):
        readings = (float, float.fromhex)
        return any(_reads(str(given), reading) == float(taken) for reading in readings)
    return given == taken or str(given) == str(taken)


def _reads(text: str, reading: Callable[[str], float]) -> float | None:
    try:
        return reading(text)
    except ValueError:
        return None


def _change(chance: random.Random, values: dict[str, Any]) -> str:
    """Change an option, or what stands in the place of a group of options."""
    places: list[tuple[dict, str]] = [(values, name) for name in _KEYS]
    for option, _ in options_of("train"):
        *group, name = option.removeprefix("--").split(".")
        parent = values.setdefault(group[0], {}) if group else values
        if isinstance(parent, dict) and name != "config":
            places += [(parent, name)] * 2
    kinds: tuple[tuple[Any, ...], ...] = (WHOLE, tuple(-whole for whole in WHOLE), REAL, TEXT[:-1], OTHER[:7])
    value = chance.choice(chance.choices(kinds, (5, 2, 3, 3, 3))[0])
    if parent and chance.random() < 0.05:
        del parent[next(iter(parent))]
    if parent is values and name == "out":
        return "out as it was"
    parent[name] = value
    return f"{name} = {str(value)[:60]!r}"


def _text(chance: random.Random, text: str) -> str:
    """YAML that reads otherwise than it looks, or does not read at all."""
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    kinds = {
        "tab": lambda: text.replace("  ", "\t"),
        "twice": lambda: text + "seed: 5\nseed: 6\n",
        "other twice": lambda: text + "data:\n  name: glyphs\n",
        "merge": lambda: "base: &b {steps: 2}\n<<: *b\n" + text,
        "tag": lambda: text + "seed: !!python/object/apply:os.getpid []\n",
        "tags": lambda: (
            text.replace("seed", "seed") + chance.choice(("seed: !!str 5\n", "seed: !!binary AAAA\n", "seed: !x 5\n"))
        ),
        "two documents": lambda: text + "---\n" + text,
        "list": lambda: "- steps: 2\n- seed: 1\n",
        "scalar": lambda: chance.choice(
            ("5", "null", "true", "text", "2020-01-01", "~", "''", "&a", "*a", "? a\n: b", "!!set {a}")
        ),
        "dates": lambda: text + "seed: 2020-01-01\n",
        "sexagesimal": lambda: text + "seed: 1:30\n",
        "octal": lambda: text + "seed: 0o17\n",
        "norway": lambda: text + "deterministic: no\n",
        "float": lambda: text + "seed: 1e3\n",
        "whole float": lambda: text + "seed: 5.0\n",
        "crlf": lambda: text.replace("\n", "\r\n"),
        "bom": lambda: "\ufeff" + text,
        "utf16": lambda: text.encode("utf-16").decode("latin-1").encode("latin-1").decode("utf-8", "surrogateescape"),
        "nul": lambda: text[:30] + "\0" + text[30:],
        "separators": lambda: text.replace("\n", "\u2028"),
        "cut line": lambda: "\n".join([*lines[:at], lines[at][: len(lines[at]) // 2]]),
        "dedent": lambda: "\n".join([*lines[:at], lines[at].strip(), *lines[at + 1 :]]),
        "long": lambda: text + "# " + "x" * 10**6 + "\n",
        "long key": lambda: "k" * 10**5 + ": 1\n" + text,
        "number key": lambda: text + "5: 6\n",
        "list key": lambda: text + "? [a, b]\n: 6\n",
        "empty": lambda: chance.choice(("", "\n", "# nothing\n", "---\n", "{}")),
        "json": lambda: '{"steps": 2, "data": {"name": "folder"}',
        "self": lambda: "a: &a\n  b: *a\n" + text,
        "recursive": lambda: text + "gca: &g\n  base: *g\n",
    }
    return kinds[chance.choice(sorted(kinds))]()


def _bomb(chance: random.Random) -> str:
    """A small text that is large once it is read."""
    if chance.random() < 0.5:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, chance.choice((6, 9, 30)))]
        return "\n".join(lines) + "\n"
    depth = chance.choice((100, 1000, 20000))
    return chance.choice(
        ("[" * depth, "{a: " * depth, "- " * depth + "x", "a:\n" + "".join(" " * i + "a:\n" for i in range(400)))
    )
