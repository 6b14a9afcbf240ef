"""Copies the headers of PyTorch's stable ABI that csrc/bindings includes, and PyTorch's license, into this folder.

    python third_party/torch/update.py FOLDER

FOLDER is where a wheel of torch was unpacked, or the site-packages folder of an environment with torch. It has to be
the oldest torch that gcahng supports: code that compiles against its headers needs nothing that a newer torch added.
Needs g++ and, for the headers that the CUDA bindings alone include, a CUDA toolkit in CUDA_HOME or /usr/local/cuda.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = "0x020a000000000000"


def included(include: Path) -> set[Path]:
    """The headers below a folder that the bindings include, directly or not."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = set()
    for source in sorted((ROOT / "csrc/bindings").glob("*/*.cpp")):
        command = ["g++", "-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET}", "-M", str(source)]
        folders = ["-I", str(ROOT / "csrc"), "-isystem", str(include), "-isystem", f"{cuda}/include"]
        rule = subprocess.run([*command, *folders], check=True, capture_output=True, text=True).stdout
        paths = (Path(word).resolve() for word in rule.replace("\\\n", " ").split())
        found |= {path for path in paths if path.is_relative_to(include)}
    return found


def license_of_headers(text: str) -> str:
    """PyTorch's own license, and that of FP16, from which Half.h takes code. The rest is about other libraries."""
    own = text.partition("The PyTorch repository and source distributions bundle")[0].rstrip()
    fp16 = re.search(r"/third_party/FP16/LICENSE\n-+\n(.*?)\n/pytorch/", text, re.DOTALL)
    if fp16 is None or "POSSIBILITY OF SUCH DAMAGE" not in own:
        sys.exit("the license of torch has another form; read it, and change this function")
    return f"{own}\n\n\nFrom FP16 (conversions in torch/headeronly/util/Half.h):\n\n{fp16[1].strip()}\n"


def main(site: Path) -> None:
    """Replaces the copies."""
    include = (site / "torch/include").resolve()
    version = re.search(r"__version__ = '([\d.]+)", (site / "torch/version.py").read_text())
    licenses = sorted(site.glob("torch-*.dist-info/licenses/LICENSE"))
    if version is None or not licenses:
        sys.exit(f"{site} holds no torch with its license")
    headers = included(include)
    shutil.rmtree(HERE / "include", ignore_errors=True)
    for header in headers:
        copy = HERE / "include" / header.relative_to(include)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(header, copy)
    (HERE / "LICENSE").write_text(license_of_headers(licenses[0].read_text()))
    (HERE / "VERSION").write_text(f"{version[1]}\n")
    print(f"{len(headers)} headers of torch {version[1]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
